"""Commits on a real Redis: compare and set, all or none, once however often they are sent; the change stream."""

import threading
from collections.abc import Iterator

import pytest
from redis.connection import AbstractConnection

from orchestrator.errors import AlreadyExists, Conflict, NotFound, StoreUnavailable, VersionExpired
from orchestrator.resources import Event, Node, VirtualMachine, VirtualMachineOperation, event_about
from orchestrator.settings import Settings
from orchestrator.store import Change, Refusal, Store, keys
from orchestrator.store.connection import connect
from orchestrator.store.node_store import NodeStore
from tests.builders import NOW, a_node, a_vm, an_operation, granted_operation
from tests.proxy import Proxy
from tests.redis_contents import contents
from tests.redis_server import RedisServer
from tests.threads import in_threads


def create(store: Store, *resources: Node | VirtualMachine | VirtualMachineOperation) -> list[object]:
    batch = store.batch()
    for resource in resources:
        batch.create(resource)
    return list(store.must_commit(batch))


def stream(store: Store, since: int = 0) -> list[Change]:
    return store.changes(since, 1)


class TestCompareAndSet:
    def test_a_created_document_is_read_back_with_its_version(self, store: Store) -> None:
        (created,) = store.must_commit(store.batch().create(a_vm()))
        assert (created.version, created.created_version) == (1, 1)
        assert store.get(VirtualMachine, "default/linux-vm") == created

    def test_two_are_not_created_under_one_name(self, store: Store) -> None:
        create(store, a_node("n1"))
        with pytest.raises(AlreadyExists, match="Node 'n1' already exists"):
            create(store, a_node("n1"))
        assert len(stream(store)) == 1

    def test_of_two_writers_one_wins(self, store: Store) -> None:
        create(store, a_node("n1"))
        read = store.get(Node, "n1")
        mine, theirs = read.with_status(boot_id="mine"), read.with_status(boot_id="theirs")
        store.must_commit(store.batch().put(read, mine))
        with pytest.raises(Conflict, match="Node 'n1' changed meanwhile"):
            store.must_commit(store.batch().put(read, theirs))
        assert store.get(Node, "n1").status.boot_id == "mine"

    def test_many_writers_at_once_lose_no_update(self, store: Store, redis_url: str) -> None:
        create(store, a_vm(incarnation=0))

        def count(_: int) -> None:
            mine = Store(connect(redis_url), store.config)
            for _ in range(20):
                while True:
                    vm = mine.get(VirtualMachine, "default/linux-vm")
                    try:
                        mine.must_commit(mine.batch().put(vm, vm.with_status(incarnation=vm.status.incarnation + 1)))
                        break
                    except Conflict:
                        continue
            mine.close()

        in_threads(4, count)
        assert store.get(VirtualMachine, "default/linux-vm").status.incarnation == 80
        assert [change.version for change in stream(store)] == list(range(1, 82))

    def test_a_deleted_one_is_gone_and_can_be_created_anew(self, store: Store) -> None:
        create(store, a_node("n1"))
        old = store.get(Node, "n1")
        store.must_commit(store.batch().delete(old))
        with pytest.raises(NotFound, match="Node 'n1' not found"):
            store.get(Node, "n1")
        with pytest.raises(Conflict):
            store.must_commit(store.batch().delete(old))
        with pytest.raises(Conflict):
            store.must_commit(store.batch().put(old, old))
        (new,) = store.must_commit(store.batch().create(a_node("n1")))
        assert (new.version, new.created_version) == (3, 3)

    def test_what_it_was_created_at_stays(self, store: Store) -> None:
        create(store, a_node("n1"), a_node("n2"))
        node = store.get(Node, "n2")
        (changed,) = store.must_commit(store.batch().put(node, node.with_status(boot_id="b")))
        assert (changed.version, changed.created_version) == (3, 2)
        assert store.get(Node, "n2").created_version == 2

    def test_not_found_names_kind_name_and_namespace(self, store: Store) -> None:
        with pytest.raises(NotFound, match="VirtualMachine 'linux-vm' not found in namespace 'default'"):
            store.get(VirtualMachine, "default/linux-vm")


class TestAllOrNone:
    def test_a_lost_race_on_one_document_writes_none(self, store: Store) -> None:
        create(store, a_node("n1"), a_node("n2"))
        stale = store.get(Node, "n2")
        store.must_commit(store.batch().put(stale, stale.with_status(boot_id="x")))
        fresh = store.get(Node, "n1")
        before = contents(store.redis)
        batch = store.batch().put(fresh, fresh.with_status(boot_id="y")).put(stale, stale.with_status(boot_id="y"))
        batch.create(an_operation()).effect("SADD", keys.SCHEDULABLE, "n9").wake("n1", "test")
        with pytest.raises(Conflict):
            store.must_commit(batch)
        assert contents(store.redis) == before

    def test_a_check_that_does_not_hold_writes_nothing_and_says_what_it_found(self, store: Store) -> None:
        create(store, a_node("n1"))
        before = contents(store.redis)
        batch = store.batch().create(a_vm()).check("schedulable", "n1").check("schedulable", "n7")
        assert store.commit(batch) == Refusal("schedulable", "n7")
        assert contents(store.redis) == before
        with pytest.raises(Conflict, match="schedulable: n7"):
            store.must_commit(batch)

    def test_documents_of_one_commit_come_together(self, store: Store) -> None:
        created = create(store, a_node("n1"), a_vm(), granted_operation())
        loaded = store.load([Node, VirtualMachine, VirtualMachineOperation])
        assert loaded.version == 3
        assert [r for kind in loaded.resources.values() for r in kind.values()] == created


class TestOnceHoweverOftenItIsSent:
    def test_the_same_request_again_gives_the_same_answer_and_one_change(self, store: Store) -> None:
        batch = store.batch().create(a_vm()).wake("n1", "test")
        first = store.commit(batch)
        before = contents(store.redis)
        assert store.commit(batch) == first
        assert contents(store.redis) == before

    def test_a_lost_reply_is_made_good_by_the_client(self, store: Store, lossy: tuple[Proxy, Store]) -> None:
        proxy, mine = lossy
        mine.version()  # connected, and the script is known from the commit before
        store.must_commit(store.batch().create(a_node("n1")))
        proxy.lose_replies(1)
        (vm,) = mine.must_commit(mine.batch().create(a_vm()).wake("n1", "test"))
        assert proxy.lost == 1
        assert vm.version == 2
        assert [change.version for change in stream(store)] == [1, 2]
        assert store.redis.xlen(keys.wake("n1")) == 1

    def test_when_all_replies_are_lost_it_is_an_error_and_may_have_been_done(
        self, store: Store, lossy: tuple[Proxy, Store]
    ) -> None:
        proxy, mine = lossy
        store.must_commit(store.batch().create(a_node("n1")))
        mine.version()
        batch = mine.batch().create(a_vm())
        proxy.lose_replies(100)
        with pytest.raises(StoreUnavailable, match=r"no Redis at redis://127\.0\.0\.1:\d+/0"):
            mine.commit(batch)
        proxy.lose_replies(0)
        (vm,) = mine.must_commit(batch)  # the same request: what was done is told
        assert vm.version == 2
        assert len(stream(store)) == 2

    def test_a_nodes_report_too(self, lossy: tuple[Proxy, Store]) -> None:
        proxy, mine = lossy
        node = NodeStore(mine.redis, "n1")
        assert node.report("Domain", {"uuid": "a"}) == 1
        proxy.lose_replies(1)
        assert node.report("Domain", {"uuid": "b"}) == 2
        assert proxy.lost == 1
        assert node.counter() == 2
        assert mine.redis.xlen(keys.reports("n1")) == 2
        assert node.report("Domain", {"uuid": "c"}, "mine") == 3
        assert node.report("Domain", {"uuid": "c"}, "mine") == 3

    def test_a_claim_too(self, store: Store, lossy: tuple[Proxy, Store]) -> None:
        proxy, mine = lossy
        node = NodeStore(mine.redis, "n1")
        create(store, granted_operation(epoch=7))
        assert node.claim("default/op", 6, "worker") is None  # the script is known now
        proxy.lose_replies(1)
        grant = node.claim("default/op", 7, "worker")
        assert proxy.lost == 1
        assert grant is not None
        assert grant.epoch == 7
        assert node.counter() == 1  # it reported once that it began

    def test_a_claim_is_given_once_also_to_one_and_the_same_worker(self, store: Store) -> None:
        """A message that came twice, while nobody has read the first one's reports yet."""
        create(store, granted_operation(epoch=7))
        node = NodeStore(store.redis, "n1")
        assert node.claim("default/op", 7, "worker") is not None
        assert node.claim("default/op", 7, "worker") is None
        assert node.claim("default/op", 7, "another") is None
        assert node.claimed_by(7) == "worker"  # who is killed when the grant is suspect
        assert node.claimed_by(8) == ""
        assert node.counter() == 1


class TestChanges:
    def test_each_is_told_in_order_with_what_it_is_now(self, store: Store) -> None:
        (created,) = store.must_commit(store.batch().create(a_vm()))
        assert isinstance(created, VirtualMachine)
        (changed,) = store.must_commit(store.batch().put(created, created.with_status(ip_address="10.0.0.1")))
        store.must_commit(store.batch().delete(changed))
        added, modified, deleted = stream(store)
        assert [c.type.value for c in (added, modified, deleted)] == ["ADDED", "MODIFIED", "DELETED"]
        assert [c.version for c in (added, modified, deleted)] == [1, 2, 3]
        assert (added.resource, modified.resource) == (created, changed)
        assert isinstance(deleted.resource, VirtualMachine)  # as it was last, at the version of its deletion
        assert deleted.resource.status.ip_address == "10.0.0.1"
        assert (deleted.resource.version, deleted.resource.created_version) == (3, 1)

    def test_only_what_came_after(self, store: Store) -> None:
        create(store, a_node("n1"), a_node("n2"))
        assert [c.resource.name for c in stream(store, 1)] == ["n2"]
        assert stream(store, 2) == []

    def test_waiting_ends_with_the_change(self, store: Store, redis_url: str) -> None:
        mine = Store(connect(redis_url), store.config)
        watch = mine.watch(block_ms=20_000)
        found: list[Change | None] = []
        thread = threading.Thread(target=lambda: found.append(next(watch)))
        version = mine.version()
        thread.start()
        while not found:
            create(store, a_node(f"n{store.version()}"))
            thread.join(0.2)
        change = found[0]
        assert change is not None
        assert change.version > version
        mine.close()

    def test_a_watch_goes_on_from_a_version(self, store: Store) -> None:
        create(store, a_node("n1"), a_node("n2"), a_node("n3"))
        watch = store.watch(1, block_ms=1)
        assert [change and change.resource.name for change in (next(watch), next(watch), next(watch))] == [
            "n2",
            "n3",
            None,
        ]

    def test_from_the_beginning_as_long_as_it_is_there(self, store: Store) -> None:
        create(store, a_node("n1"))
        change = next(store.watch(0, block_ms=1))
        assert change is not None
        assert change.version == 1

    def test_too_old_is_said_at_once(self, store: Store) -> None:
        create(store, a_node("n1"), a_node("n2"), a_node("n3"))
        store.redis.xtrim(keys.CHANGES, minid="3-0", approximate=False)
        with pytest.raises(VersionExpired, match="version 1 is too old"):
            next(store.watch(1, block_ms=1))
        assert next(store.watch(2, block_ms=1)) is not None

    def test_a_version_that_this_redis_never_had_is_expired_too(self, store: Store) -> None:
        create(store, a_node("n1"))
        with pytest.raises(VersionExpired):
            next(store.watch(5, block_ms=1))
        empty_is_fine = store.watch(1, block_ms=1)
        assert next(empty_is_fine) is None

    def test_falling_behind_the_stream_is_said_and_nothing_is_skipped(self, store: Store) -> None:
        create(store, a_node("n1"))
        watch = store.watch(1, block_ms=1)
        assert next(watch) is None
        create(store, a_node("n2"), a_node("n3"), a_node("n4"))
        store.redis.xtrim(keys.CHANGES, minid="4-0", approximate=False)
        with pytest.raises(VersionExpired):
            next(watch)


class TestReading:
    def test_many_leaves_out_what_is_not_there(self, store: Store) -> None:
        create(store, a_node("n1"), a_node("n2"))
        assert sorted(store.many(Node, ["n2", "n9", "n1", "n2"])) == ["n1", "n2"]
        assert store.many(Node, []) == {}

    def test_all_are_by_name_and_of_one_namespace(self, store: Store) -> None:
        other = a_vm("c").with_(metadata=a_vm("c").metadata.with_(namespace="other"))
        create(store, a_vm("b"), other, a_vm("a"))
        assert [vm.key for vm in store.all(VirtualMachine)] == ["default/a", "default/b", "other/c"]
        assert [vm.key for vm in store.all(VirtualMachine, "default")] == ["default/a", "default/b"]
        assert store.all(Event) == []

    def test_fields_that_a_newer_version_wrote_are_no_error(self, store: Store) -> None:
        create(store, a_node("n1"))
        version, created, body = str(store.redis.hget(keys.resources("Node"), "n1")).split(" ", 2)
        newer = f'{version} {created} {body.removesuffix("}")},"colour":"red"}}'
        store.redis.hset(keys.resources("Node"), "n1", newer)
        assert store.get(Node, "n1").name == "n1"

    def test_epochs_are_never_given_twice(self, store: Store, redis_url: str) -> None:
        taken: list[int] = []

        def take(_: int) -> None:
            mine = Store(connect(redis_url), store.config)
            for _ in range(30):
                taken.extend(mine.next_epochs(3))
            mine.close()

        in_threads(4, take)
        assert sorted(taken) == list(range(1, 361))

    def test_no_redis_is_said_in_one_line(self, store: Store) -> None:
        gone = Store(connect("redis://127.0.0.1:1/0", retries=0), store.config)
        for call in (gone.version, gone.now, gone.run_id, lambda: gone.all(Node), lambda: gone.changes(0, 1)):
            with pytest.raises(StoreUnavailable, match=r"^no Redis at redis://127\.0\.0\.1:1/0: [^\n]+$"):
                call()

    def test_an_event_is_about_what_it_is_about(self, store: Store) -> None:
        (vm,) = store.must_commit(store.batch().create(a_vm()))
        store.must_commit(store.batch().create(event_about(vm, "Moved", "it left", NOW, warning=True)))
        (event,) = store.all(Event)
        assert (event.involved_object.uid, event.reason, event.type) == (vm.metadata.uid, "Moved", "Warning")


@pytest.fixture
def lossy(redis_server: RedisServer, store: Store) -> Iterator[tuple[Proxy, Store]]:
    """A proxy that loses replies, and a store that goes through it."""
    with Proxy(redis_server.port) as proxy:
        mine = Store(connect(f"redis://127.0.0.1:{proxy.port}/0"), Settings())
        yield proxy, mine
        mine.close()


class TestInterrupted:
    def test_a_reply_that_ctrl_c_left_unread_is_not_taken_for_the_next_ones(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create(store, a_node("n1"))
        create(store, a_node("n2"))

        def interrupted(connection: AbstractConnection, *args: object, **kwargs: object) -> object:
            """Ctrl-C comes as the function is entered, before anything of redis-py sees to the connection."""
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(AbstractConnection, "read_response", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.get(Node, "n1")
        assert store.get(Node, "n2").name == "n2"


class TestTryingOut:
    def test_a_dry_commit_is_checked_and_writes_nothing(self, store: Store) -> None:
        (node,) = store.must_commit(store.batch().create(a_node("n1")))
        before = {key: store.redis.dump(key) for key in store.redis.scan_iter() if not key.startswith("request:")}
        dry = store.dry()
        batch = dry.batch().create(a_vm("a")).put(node, node.with_(metadata=node.metadata.with_(labels={"a": "b"})))
        vm, changed = dry.must_commit(batch.effect("SET", "version", 99))
        assert (vm.metadata.resource_version, changed.version) == ("", node.version)
        assert changed.metadata.labels == {"a": "b"}
        after = {key: store.redis.dump(key) for key in store.redis.scan_iter() if not key.startswith("request:")}
        assert after == before
        assert store.find(VirtualMachine, "default/a") is None

    def test_what_would_fail_fails(self, store: Store) -> None:
        (node,) = store.must_commit(store.batch().create(a_node("n1")))
        dry = store.dry()
        with pytest.raises(AlreadyExists):
            dry.commit(dry.batch().create(a_node("n1")))
        store.must_commit(store.batch().put(node, node.with_(metadata=node.metadata.with_(labels={"a": "b"}))))
        with pytest.raises(Conflict):
            dry.commit(dry.batch().delete(node))
        refused = dry.commit(dry.batch().create(a_vm("a")).check("schedulable", "n2"))
        assert refused == Refusal("schedulable", "n2")


class TestHistory:
    def test_one_kinds_changes_of_a_while(self, store: Store) -> None:
        (vm,) = store.must_commit(store.batch().create(a_vm("a")))
        store.must_commit(store.batch().create(a_node("n1")))
        (changed,) = store.must_commit(store.batch().put(vm, vm.with_(metadata=vm.metadata.with_(labels={"a": "b"}))))
        store.must_commit(store.batch().delete(changed))
        found = store.history(0, 4, VirtualMachine)
        assert [(change.version, change.type.value) for change in found] == [
            (1, "ADDED"),
            (3, "MODIFIED"),
            (4, "DELETED"),
        ]
        assert [change.version for change in store.history(1, 3, VirtualMachine)] == [3]
        assert store.history(4, 4, VirtualMachine) == []

    def test_what_is_missing_is_told(self, store: Store) -> None:
        for number in range(5):
            store.must_commit(store.batch().create(a_node(f"n{number}")))
        with pytest.raises(VersionExpired):
            store.history(3, 9, Node)  # this Redis never had it
        store.redis.xtrim(keys.CHANGES, minid="3-0", approximate=False)
        with pytest.raises(VersionExpired):
            store.history(1, 5, Node)
        assert len(store.history(2, 5, Node)) == 3
        store.must_commit(store.batch().create(a_node("n9")).effect("SKIP", 2**20))
        with pytest.raises(VersionExpired):
            store.history(2, store.version(), Node)
