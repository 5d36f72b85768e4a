"""Get, list and watch over HTTP: one truth, in whatever order things happen, at however many servers."""

import socket
import threading
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest

from orchestrator.resources import OperationPhase, Resource, VirtualMachine, VmPhase
from orchestrator.store import Store, keys
from tests.api import GROUP, MERGE, OPERATIONS, VMS, ServedApi, Watching
from tests.builders import a_node, a_vm, an_inventory, an_operation, granted_operation, seen
from tests.redis_server import RedisServer
from tests.waiting import wait_until

TABLE = {"accept": "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"}


@pytest.fixture
def api(redis_url: str) -> Iterator[ServedApi]:
    with ServedApi(redis_url, api_history=100) as api:
        yield api


@pytest.fixture
def root(api: ServedApi) -> httpx.Client:
    return api.client()


def ended_without_an_end(connection: socket.socket) -> bool:
    """Read what is left on a connection; tells whether it broke off."""
    connection.settimeout(30)
    last = b""
    try:
        while piece := connection.recv(1_000_000):
            last = piece[-5:]
    except ConnectionResetError:
        return True
    return last != b"0\r\n\r\n"


def create(store: Store, *resources: Resource) -> list[Resource]:
    batch = store.batch()
    for resource in resources:
        batch.create(resource)
    return store.must_commit(batch)


def change(store: Store, name: str, **status: Any) -> VirtualMachine:
    old = store.get(VirtualMachine, f"default/{name}")
    return store.must_commit(store.batch().put(old, old.with_status(**status)))[0]  # type: ignore[return-value]


def label(store: Store, name: str, **labels: str) -> None:
    old = store.get(VirtualMachine, f"default/{name}")
    store.must_commit(store.batch().put(old, old.with_(metadata=old.metadata.with_(labels=labels))))


def listed(client: httpx.Client, path: str, **parameters: Any) -> dict[str, Any]:
    answer = client.get(path, params=parameters)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def names(document: dict[str, Any]) -> list[str]:
    return [item["metadata"]["name"] for item in document["items"]]


def refused(client: httpx.Client, path: str, code: int, reason: str, **parameters: Any) -> str:
    answer = client.get(path, params=parameters)
    assert (answer.status_code, answer.json()["reason"]) == (code, reason), answer.text
    assert answer.json()["kind"] == "Status"
    return str(answer.json()["message"])


class TestLists:
    def test_what_was_committed_before_is_in_it(self, api: ServedApi, root: httpx.Client) -> None:
        for number in range(20):
            (written,) = create(api.store, a_vm(f"vm-{number}"))
            document = listed(root, VMS)
            assert len(document["items"]) == number + 1
            assert document["metadata"]["resourceVersion"] == written.metadata.resource_version
            assert root.get(f"{VMS}/vm-{number}").json() == written.manifest()

    def test_two_servers_tell_the_same(self, api: ServedApi, root: httpx.Client, redis_url: str) -> None:
        with ServedApi(redis_url) as other:
            client = other.client("other")
            for number in range(10):
                body = {"metadata": {"name": f"p-{number}"}}
                first, second = (root, client) if number % 2 else (client, root)
                assert first.post("/api/v1/namespaces", json=body).status_code == 201
                assert f"p-{number}" in names(listed(second, "/api/v1/namespaces"))

    def test_a_copy_that_lags_is_waited_for(self, api: ServedApi, root: httpx.Client) -> None:
        store = api.mirror.store
        changes, late = store.changes, threading.Event()

        def slowly(since: int, block_ms: int) -> Any:
            found = changes(since, block_ms)
            if found:
                late.wait(0.3)  # what was read is not in the copy yet
            return found

        store.changes = slowly
        create(api.store, a_node("n9"))  # ends the call that is under way, as it was before
        wait_until(lambda: api.mirror.version == api.store.version(), 10, "it follows")
        create(api.store, a_vm("a"))
        assert names(listed(root, VMS, resourceVersion=0)) == []
        assert names(listed(root, VMS)) == ["a"]
        (new,) = create(api.store, a_vm("b"))
        assert names(listed(root, VMS, resourceVersion=new.version)) == ["a", "b"]
        create(api.store, a_vm("c"))
        assert root.get(f"{VMS}/c").status_code == 200

    def test_namespaces_and_selectors(self, api: ServedApi, root: httpx.Client) -> None:
        elsewhere = a_vm("c").with_(metadata=a_vm("c").metadata.with_(namespace="other"))
        create(api.store, a_vm("a", node="n1"), a_vm("b", node="n2", phase=VmPhase.STOPPED), elsewhere)
        label(api.store, "a", tier="db")
        everywhere = f"{GROUP}/virtualmachines"
        assert names(listed(root, VMS)) == ["a", "b"]
        assert names(listed(root, everywhere)) == ["a", "b", "c"]
        assert names(listed(root, everywhere, fieldSelector="metadata.namespace=other")) == ["c"]
        assert names(listed(root, everywhere, fieldSelector="status.phase=Running")) == ["a", "c"]
        assert names(listed(root, everywhere, labelSelector="tier in (db)")) == ["a"]
        assert names(listed(root, everywhere, labelSelector="tier!=db", fieldSelector="metadata.name!=c")) == ["b"]
        assert "known:" in refused(root, VMS, 400, "BadRequest", fieldSelector="spec.memory=1")
        assert "labelSelector" in refused(root, VMS, 400, "BadRequest", labelSelector="a=b=c")

    def test_pages_are_of_one_version(self, api: ServedApi, root: httpx.Client) -> None:
        create(api.store, *(a_vm(f"vm-{number}") for number in range(5)))
        first = listed(root, VMS, limit=2)
        assert (names(first), first["metadata"]["remainingItemCount"]) == (["vm-0", "vm-1"], 3)
        # What happens meanwhile is not in the rest: neither what comes, nor what goes, nor what changes.
        create(api.store, a_vm("vm-3a"))
        api.store.must_commit(api.store.batch().delete(api.store.get(VirtualMachine, "default/vm-4")))
        change(api.store, "vm-2", phase=VmPhase.MIGRATING)
        second = listed(root, VMS, limit=2, **{"continue": first["metadata"]["continue"]})
        assert names(second) == ["vm-2", "vm-3"]
        assert second["items"][0]["status"]["phase"] == "Running"
        assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
        third = listed(root, VMS, limit=2, **{"continue": second["metadata"]["continue"]})
        assert (names(third), "continue" in third["metadata"]) == (["vm-4"], False)
        assert names(listed(root, VMS)) == ["vm-0", "vm-1", "vm-2", "vm-3", "vm-3a"]

    def test_a_page_of_a_version_that_is_forgotten(self, api: ServedApi, root: httpx.Client) -> None:
        create(api.store, a_vm("a"), a_vm("b"))
        token = listed(root, VMS, limit=1)["metadata"]["continue"]
        for number in range(101):
            change(api.store, "a", counter=number)
        assert "too old" in refused(root, VMS, 410, "Expired", **{"continue": token})

    @pytest.mark.parametrize("token", ["x", "e30=", "WzEsMl0=", "WzAsICJhIl0=", "W3RydWUsICJhIl0=", "%00", "é"])
    def test_a_token_that_is_none(self, root: httpx.Client, token: str) -> None:
        refused(root, VMS, 400, "BadRequest", **{"continue": token})

    def test_versions(self, api: ServedApi, root: httpx.Client) -> None:
        (old,) = create(api.store, a_vm("a"))
        (new,) = create(api.store, a_vm("b"))
        at_old = {"resourceVersion": old.metadata.resource_version, "resourceVersionMatch": "Exact"}
        assert names(listed(root, VMS, **at_old)) == ["a"]
        assert names(listed(root, VMS, resourceVersion=old.version, resourceVersionMatch="NotOlderThan")) == ["a", "b"]
        assert names(listed(root, VMS, resourceVersion=new.version)) == ["a", "b"]
        assert names(listed(root, VMS, resourceVersion=0)) == ["a", "b"]
        never = str(api.store.version() + 1_000)
        for parameters in ({}, {"resourceVersionMatch": "Exact"}, {"watch": "true"}):
            assert "list again" in refused(root, VMS, 410, "Expired", resourceVersion=never, **parameters)
        refused(root, VMS, 400, "BadRequest", resourceVersion="abc")
        refused(root, VMS, 400, "BadRequest", resourceVersion="-1")
        refused(root, VMS, 400, "BadRequest", resourceVersionMatch="Exact")

    def test_tables_have_the_columns_that_vmherd_prints(self, api: ServedApi, root: httpx.Client) -> None:
        create(api.store, a_node("n1"), a_vm("a", ip_address="192.0.2.1"))
        table = root.get(VMS, headers=TABLE).json()
        assert table["kind"] == "Table"
        shown = [column["name"] for column in table["columnDefinitions"] if column["priority"] == 0]
        assert shown == ["NAME", "PHASE", "NODE", "IPADDRESS", "AGE"]
        (row,) = table["rows"]
        assert row["cells"][:4] == ["a", "Running", "n1", "192.0.2.1"]
        assert (row["object"]["kind"], row["object"]["metadata"]["name"]) == ("PartialObjectMetadata", "a")
        assert root.get(VMS, headers=TABLE, params={"includeObject": "Object"}).json()["rows"][0]["object"]["spec"]
        assert root.get(VMS, headers=TABLE, params={"includeObject": "None"}).json()["rows"][0]["object"] is None
        nodes = root.get("/api/v1/nodes", headers=TABLE).json()
        vms = [column["name"] for column in nodes["columnDefinitions"]].index("VMS")
        assert nodes["rows"][0]["cells"][vms] == "1"

    def test_long_lists_are_sent_in_pieces_and_compressed(self, api: ServedApi, root: httpx.Client) -> None:
        create(api.store, *(a_vm(f"vm-{number:03}") for number in range(300)))
        packed = root.get(VMS)
        assert packed.headers["content-encoding"] == "gzip"
        plain = root.get(VMS, headers={"accept-encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert int(packed.headers["content-length"]) < len(plain.content) // 5
        assert packed.json() == plain.json()
        assert len(plain.json()["items"]) == 300

    def test_who_reads_nothing_holds_no_more_than_a_few_long_lists(self, api: ServedApi, root: httpx.Client) -> None:
        create(api.store, *(a_vm(f"vm-{number:04}") for number in range(2_000)))
        head = f"GET {VMS} HTTP/1.1\r\nHost: x\r\nAuthorization: {root.headers['authorization']}\r\n\r\n"
        stalled = []
        for _ in range(8):
            one = socket.create_connection(("127.0.0.1", api.port))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.sendall(head.encode())
            stalled.append(one)
        wait_until(lambda: root.get(VMS).status_code == 429, 20, "the client has as many as it may")
        assert api.client("other").get(VMS, params={"limit": 5}).status_code == 200
        assert root.get(VMS, params={"limit": 5}).status_code == 200
        for one in stalled:
            one.close()
        wait_until(lambda: root.get(VMS).status_code == 200, 20, "its places are free again")

    def test_metadata_alone(self, api: ServedApi, root: httpx.Client) -> None:
        create(api.store, a_vm("a"))
        accept = {"accept": "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"}
        document = root.get(VMS, headers=accept).json()
        assert document["kind"] == "PartialObjectMetadataList"
        assert [list(item) for item in document["items"]] == [["kind", "apiVersion", "metadata"]]

    def test_forms_that_are_not_ours(self, root: httpx.Client) -> None:
        answer = root.get(VMS, headers={"accept": "application/vnd.kubernetes.protobuf"})
        assert (answer.status_code, answer.json()["reason"]) == (406, "NotAcceptable")
        assert root.get(VMS, headers={"accept": "application/vnd.kubernetes.protobuf,application/json"}).is_success


class TestWatches:
    def test_what_is_there_and_then_what_happens(self, api: ServedApi, root: httpx.Client) -> None:
        create(api.store, a_vm("a"))
        watch = Watching(root, VMS)
        watch.wait(("ADDED", "a"))
        create(api.store, a_vm("b"))
        changed = change(api.store, "a", phase=VmPhase.MIGRATING)
        last = api.store.must_commit(api.store.batch().delete(changed))[0]
        watch.wait(("ADDED", "a"), ("ADDED", "b"), ("MODIFIED", "a"), ("DELETED", "a"))
        assert watch.events[2]["object"]["status"]["phase"] == "Migrating"
        # Whoever resumes after a deletion goes on from there.
        assert watch.events[3]["object"]["metadata"]["resourceVersion"] == last.metadata.resource_version

    def test_one_that_begins_at_a_list_misses_nothing(self, api: ServedApi, root: httpx.Client) -> None:
        create(api.store, a_vm("a"))
        version = listed(root, VMS)["metadata"]["resourceVersion"]
        change(api.store, "a", counter=1)
        change(api.store, "a", counter=2)
        watch = Watching(root, VMS, resourceVersion=version)
        watch.wait(("MODIFIED", "a"), ("MODIFIED", "a"))
        assert [event["object"]["status"]["counter"] for event in watch.events] == [1, 2]

    def test_what_stops_matching_is_deleted_for_the_watch(self, api: ServedApi, root: httpx.Client) -> None:
        create(api.store, a_vm("a"), a_vm("b", phase=VmPhase.STOPPED))
        by_phase = Watching(root, VMS, fieldSelector="status.phase=Running")
        by_label = Watching(root, VMS, labelSelector="tier=db")
        change(api.store, "a", phase=VmPhase.STOPPED)
        change(api.store, "b", counter=7)
        change(api.store, "b", phase=VmPhase.RUNNING)
        by_phase.wait(("ADDED", "a"), ("DELETED", "a"), ("ADDED", "b"))
        label(api.store, "a", tier="db")
        label(api.store, "a", tier="db", zone="x")
        label(api.store, "a")
        by_label.wait(("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a"))
        assert by_label.events[-1]["object"]["metadata"]["resourceVersion"] == str(api.store.version())

    def test_one_whose_last_words_do_not_match_is_deleted_all_the_same(
        self, api: ServedApi, root: httpx.Client
    ) -> None:
        (stored,) = create(api.store, an_operation("op"))
        watch = Watching(root, OPERATIONS, fieldSelector="status.phase=Pending")
        watch.wait(("ADDED", "op"))
        ended = stored.with_status(phase=OperationPhase.TERMINATING)  # type: ignore[attr-defined]
        api.store.must_commit(api.store.batch().delete(ended))
        watch.wait(("ADDED", "op"), ("DELETED", "op"))

    def test_tables_tell_what_can_be_seen_to_change(self, api: ServedApi, root: httpx.Client) -> None:
        create(api.store, a_vm("a"))
        watch = Watching(root, VMS, headers=TABLE)
        wait_until(lambda: watch.events, 10, "the first row")
        change(api.store, "a", counter=1)  # no column shows it
        change(api.store, "a", phase=VmPhase.MIGRATING)
        wait_until(lambda: len(watch.events) >= 2, 10, "the change")
        first, second = (event["object"] for event in watch.events)
        assert first["columnDefinitions"]
        assert second["columnDefinitions"] is None
        assert [row["cells"][1] for table in (first, second) for row in table["rows"]] == ["Running", "Migrating"]

    def test_bookmarks(self, api: ServedApi, root: httpx.Client) -> None:
        create(api.store, a_vm("a"))
        watch = Watching(
            root,
            VMS,
            sendInitialEvents="true",
            allowWatchBookmarks="true",
            resourceVersionMatch="NotOlderThan",
            timeoutSeconds=1,
        )
        create(api.store, a_node("n9"))  # of another kind: the watch is further all the same
        last = watch.ended()
        assert watch.seen()[0] == ("ADDED", "a")
        assert watch.events[1]["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
        assert (last["type"], last["object"]["metadata"]["resourceVersion"]) == ("BOOKMARK", str(api.store.version()))
        assert last["object"]["kind"] == "VirtualMachine"

    def test_without_bookmarks_it_ends_at_its_time(self, root: httpx.Client) -> None:
        watch = Watching(root, VMS, timeoutSeconds=1)
        assert watch.ended() == {}

    def test_a_version_that_is_forgotten(self, api: ServedApi, root: httpx.Client) -> None:
        (old,) = create(api.store, a_vm("a"))
        create(api.store, *(a_vm(f"vm-{number}") for number in range(201)))  # more than a server keeps, and looks up
        wait_until(lambda: api.mirror.version == api.store.version(), 10, "it follows")
        assert "too old" in refused(root, VMS, 410, "Expired", watch="true", resourceVersion=old.version)

    def test_a_slow_watcher_is_told_to_list_again(self, redis_url: str) -> None:
        with ServedApi(redis_url, api_watch_queue=10) as api:
            root = api.client()
            create(api.store, a_vm("a"))
            watch = Watching(root, VMS)
            watch.wait(("ADDED", "a"))
            batch = [a_vm(f"vm-{number}") for number in range(50)]
            create(api.store, *batch)  # one commit: it comes in one piece, more than the queue takes
            last = watch.ended()
            assert (last["type"], last["object"]["code"], last["object"]["reason"]) == ("ERROR", 410, "Expired")

    def test_a_watcher_that_takes_nothing_is_hung_up_on(self, redis_url: str) -> None:
        """What its connection holds is full, and its place is free again."""
        with ServedApi(redis_url, api_send_timeout=1, api_watch_queue=10_000, api_watches_per_client=1) as api:
            root = api.client()
            token = root.headers["authorization"]
            wait_until(lambda: root.get(VMS).status_code == 200, 10, "the token is known")
            with socket.socket() as stalled:
                stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                stalled.connect(("127.0.0.1", api.port))
                head = f"GET {VMS}?watch=true HTTP/1.1\r\nHost: localhost\r\nAuthorization: {token}\r\n\r\n"
                stalled.sendall(head.encode())
                wait_until(lambda: Watching(root, VMS, timeoutSeconds=1).status == 429, 20, "its watch is open")
                for number in range(100):
                    vm = a_vm(f"vm-{number}")
                    large = vm.metadata.with_(annotations={"text": "x" * 100_000})
                    create(api.store, vm.with_(metadata=large))
                wait_until(lambda: Watching(root, VMS, timeoutSeconds=1).status == 200, 60, "its place is free again")
                assert ended_without_an_end(stalled)

    def test_watches_of_one_client_are_bounded(self, redis_url: str) -> None:
        with ServedApi(redis_url, api_watches_per_client=2) as api:
            root, other = api.client(), api.client("other")
            first, second = Watching(root, VMS, timeoutSeconds=1), Watching(root, VMS, timeoutSeconds=60)
            answer = root.get(VMS, params={"watch": "true"})
            assert (answer.status_code, answer.json()["reason"]) == (429, "TooManyRequests")
            assert "retry-after" not in answer.headers
            assert Watching(other, VMS).status == 200
            first.ended()
            wait_until(lambda: Watching(root, VMS, timeoutSeconds=1).status == 200, 10, "its place is free again")
            assert second.status == 200

    def test_a_body_that_does_not_come_is_not_waited_for(self, redis_url: str) -> None:
        with ServedApi(redis_url, api_request_timeout=1) as api:
            token = api.client().headers["authorization"]
            head = f"POST {VMS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {token}\r\nContent-Length: 100\r\n\r\n{{"
            with socket.create_connection(("127.0.0.1", api.port), timeout=60) as stalled:
                stalled.sendall(head.encode())
                answer = HTTPResponse(stalled)
                answer.begin()
                assert answer.status == 504
                assert b"took longer than 1 s" in answer.read()
            assert api.store.all(VirtualMachine) == []

    def test_a_revoked_token_ends_its_watches(self, api: ServedApi) -> None:
        from orchestrator.services.context import Context
        from orchestrator.services.tokens import revoke_token

        create(api.store, a_vm("a"))
        mine, yours = api.client("mine"), api.client("yours")
        cut, kept = Watching(mine, VMS), Watching(yours, VMS)
        cut.wait(("ADDED", "a"))
        revoke_token(Context(api.store, api.outbox), "mine")
        last = cut.ended()
        assert (last["type"], last["object"]["code"]) == ("ERROR", 401)
        create(api.store, a_vm("b"))
        kept.wait(("ADDED", "a"), ("ADDED", "b"))
        assert mine.get(VMS).status_code == 401


class TestServersComeAndGo:
    def test_a_watch_is_resumed_at_another_server_without_a_gap(
        self, api: ServedApi, root: httpx.Client, redis_url: str
    ) -> None:
        create(api.store, a_vm("a"), a_vm("b"))
        first = Watching(root, VMS)
        first.wait(("ADDED", "a"), ("ADDED", "b"))
        change(api.store, "a", counter=1)
        wait_until(lambda: len(first.events) == 3, 10, "the change")
        version = first.events[-1]["object"]["metadata"]["resourceVersion"]
        api.stop()
        changed = change(api.store, "a", counter=2)
        create(api.store, an_operation("op"))
        api.store.must_commit(api.store.batch().delete(changed))
        create(api.store, a_vm("c"))
        with ServedApi(redis_url) as other:  # it has begun after all of it
            watch = Watching(other.client("other"), VMS, resourceVersion=version)
            watch.wait(("MODIFIED", "a"), ("DELETED", "a"), ("ADDED", "c"))
            create(api.store, a_vm("d"))
            watch.wait(("MODIFIED", "a"), ("DELETED", "a"), ("ADDED", "c"), ("ADDED", "d"))

    def test_what_is_not_in_the_stream_any_more_has_to_be_listed(
        self, api: ServedApi, root: httpx.Client, redis_url: str
    ) -> None:
        (old,) = create(api.store, a_vm("a"))
        for number in range(5):
            change(api.store, "a", counter=number)
        api.store.redis.xtrim(keys.CHANGES, minid=f"{api.store.version()}-0", approximate=False)
        with ServedApi(redis_url) as other:
            client = other.client("other")
            refused(client, VMS, 410, "Expired", watch="true", resourceVersion=old.version)
            assert names(listed(client, VMS)) == ["a"]

    def test_another_redis_ends_the_watches(self, durable_redis: RedisServer) -> None:
        with ServedApi(durable_redis.url) as api:
            root = api.client()
            create(api.store, a_vm("a"))
            watch = Watching(root, VMS)
            watch.wait(("ADDED", "a"))
            durable_redis.kill()
            assert root.get(VMS, params={"resourceVersion": "0"}).status_code == 200
            answer = root.get(VMS)
            assert (answer.status_code, answer.json()["reason"]) == (503, "ServiceUnavailable")
            assert httpx.get(f"{api.url}/readyz").status_code == 503
            assert httpx.get(f"{api.url}/healthz").status_code == 200
            durable_redis.start()
            last = watch.ended()
            assert (last["type"], last["object"]["reason"]) == ("ERROR", "Expired")
            wait_until(lambda: root.get(VMS).status_code == 200, 10, "it answers again")
            assert names(listed(root, VMS)) == ["a"]


class TestPods:
    def test_a_vm_that_moves_is_another_pod(self, api: ServedApi, root: httpx.Client) -> None:
        create(api.store, a_vm("a", node="n1"))
        pods = "/api/v1/namespaces/default/pods"
        (pod,) = listed(root, pods)["items"]
        assert pod["spec"]["nodeName"] == "n1"
        assert pod["metadata"]["labels"]["vm.kubevirt.internal.virtualization.deckhouse.io/name"] == "a"
        assert [(o["kind"], o["name"], o["controller"]) for o in pod["metadata"]["ownerReferences"]] == [
            ("VirtualMachine", "a", True)
        ]
        source = pod["metadata"]["name"]
        watch = Watching(root, pods)
        watch.wait(("ADDED", source))

        (operation,) = create(api.store, granted_operation("op", "a", node="n1", target="n2"))
        wait_until(lambda: len(watch.events) == 2, 10, "it is on its way")
        arriving = watch.events[1]["object"]
        target = arriving["metadata"]["name"]
        assert (arriving["status"]["phase"], arriving["spec"]["nodeName"]) == ("Pending", "n2")
        assert names(listed(root, pods, fieldSelector="spec.nodeName=n2")) == [target]

        vm = api.store.get(VirtualMachine, "default/a")
        ended = operation.with_status(phase=OperationPhase.COMPLETED, grant=None)  # type: ignore[attr-defined]
        api.store.must_commit(api.store.batch().put(vm, vm.with_status(node_name="n2")).put(operation, ended))
        watch.wait(("ADDED", source), ("ADDED", target), ("DELETED", source), ("MODIFIED", target))
        assert root.get(f"{pods}/{source}").status_code == 404
        found = root.get(f"{pods}/{target}").json()
        assert (found["metadata"]["uid"], found["status"]["phase"]) == (arriving["metadata"]["uid"], "Running")
        # One commit made two events: cut off between them, a watch gets both again.
        versions = [int(event["object"]["metadata"]["resourceVersion"]) for event in watch.events]
        assert versions[2] < versions[3]
        again = Watching(root, pods, resourceVersion=versions[2])
        again.wait(("DELETED", source), ("MODIFIED", target))

    def test_a_migration_that_ends_badly_leaves_its_source(self, api: ServedApi, root: httpx.Client) -> None:
        create(api.store, a_vm("a", node="n1"))
        (operation,) = create(api.store, granted_operation("op", "a", node="n1", target="n2"))
        pods = "/api/v1/pods"
        assert len(listed(root, pods)["items"]) == 2
        ended = operation.with_status(phase=OperationPhase.FAILED, grant=None)  # type: ignore[attr-defined]
        api.store.must_commit(api.store.batch().put(operation, ended))
        assert [pod["spec"]["nodeName"] for pod in listed(root, pods)["items"]] == ["n1"]

    def test_an_eviction_under_way_says_why_and_not_when_to_ask_again(self, api: ServedApi, root: httpx.Client) -> None:
        """Retry-After would make kubectl hide the message."""
        create(api.store, a_node("n1"))
        create(api.store, a_vm("a", node="n1"))
        (pod,) = listed(root, "/api/v1/pods")["items"]
        path = f"/api/v1/namespaces/default/pods/{pod['metadata']['name']}/eviction"
        for told in ('Eviction triggered evacuation of VMI "default/a"', "Evacuation in progress: "):
            answer = root.post(path, json={"apiVersion": "policy/v1", "kind": "Eviction"})
            assert (answer.status_code, answer.json()["reason"]) == (429, "TooManyRequests"), answer.text
            assert told in answer.json()["message"]
            assert "retry-after" not in answer.headers

    def test_a_domain_that_is_not_ours_has_no_controller(self, api: ServedApi, root: httpx.Client) -> None:
        domain = seen("running", vm="").with_(vm="", name="Some Domain!")
        create(api.store, an_inventory("n1", {"x": domain, "y": domain.with_(state="shutoff")}))
        (pod,) = listed(root, "/api/v1/pods")["items"]
        assert pod["metadata"]["name"].startswith("domain-some-domain-")
        assert "ownerReferences" not in pod["metadata"]
        assert (
            listed(root, "/api/v1/pods", labelSelector="vm.kubevirt.internal.virtualization.deckhouse.io/name")["items"]
            == []
        )
        answer = root.post(f"/api/v1/namespaces/default/pods/{pod['metadata']['name']}/eviction", json={})
        assert (answer.status_code, answer.json()["reason"]) == (403, "Forbidden")
        assert "Some Domain!" in answer.json()["message"]


def test_tokens_are_found_in_the_copy_and_not_shown(api: ServedApi, root: httpx.Client) -> None:
    refused(root, "/apis/vmherd.dev/v1/accesstokens", 404, "NotFound")
    assert "accesstoken" not in root.get("/apis").text + root.get("/api/v1").text


def test_patches_name_what_they_are(root: httpx.Client, api: ServedApi) -> None:
    create(api.store, a_vm("a"))
    answer = root.patch(f"{VMS}/a", content=b'{"metadata":{"labels":{"x":"y"}}}', headers=MERGE)
    assert answer.json()["metadata"]["labels"] == {"x": "y"}
