"""Who may do what, asked of the real application: each verb on each resource, by each role and by nobody.

The expectations stand here as people read them in docs/access.md, and are not computed from the rules.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from orchestrator.api import actions
from orchestrator.resources import AccessToken, Event, Node, Role, VirtualMachine
from orchestrator.resources.access_token import token_text
from orchestrator.services.context import Context
from orchestrator.services.tokens import create_token, revoke_token
from tests.api import GROUP, ServedApi, Watching
from tests.builders import a_node, a_vm
from tests.redis_server import RedisServer
from tests.waiting import wait_until

MERGE = {"content-type": "application/merge-patch+json"}
GROUPED = {"virtualmachines", "virtualmachineoperations", "virtualmachineclasses"}
NAMESPACED = {"virtualmachines", "virtualmachineoperations", "pods", "events"}
PLURALS = (
    "virtualmachines",
    "virtualmachineoperations",
    "pods",
    "events",
    "nodes",
    "virtualmachineclasses",
    "namespaces",
    "nodedrains",
    "maintenances",
    "rebalancepolicies",
    "nodefencings",
)
HERDS = "/apis/vmherd.dev/v1"
OURS = set(PLURALS[-4:])

READERS = {"viewer", "operator", "admin"}
OPERATORS = {"operator", "admin"}
ADMINS = {"admin"}
MAY: dict[str, dict[str, set[str]]] = {
    "virtualmachines": {
        "read": READERS,
        "create": OPERATORS,
        "update": OPERATORS,
        "patch": OPERATORS,
        "delete": OPERATORS,
    },
    "virtualmachineoperations": {
        "read": READERS,
        "create": OPERATORS,
        "update": ADMINS,
        "patch": ADMINS,
        "delete": OPERATORS,
    },
    "pods": {"read": READERS, "evict": OPERATORS},
    "events": {"read": READERS},
    "nodes": {"read": READERS, "update": OPERATORS, "patch": OPERATORS, "delete": ADMINS},
    "virtualmachineclasses": {"read": READERS, "create": ADMINS, "update": ADMINS, "patch": ADMINS, "delete": ADMINS},
    "namespaces": {"read": READERS, "create": ADMINS, "update": ADMINS, "patch": ADMINS, "delete": ADMINS},
    "nodedrains": {
        "read": READERS,
        "create": OPERATORS,
        "update": OPERATORS,
        "patch": OPERATORS,
        "delete": OPERATORS,
    },
    "maintenances": {
        "read": READERS,
        "create": OPERATORS,
        "update": OPERATORS,
        "patch": OPERATORS,
        "delete": OPERATORS,
    },
    "rebalancepolicies": {"read": READERS, "create": ADMINS, "update": ADMINS, "patch": ADMINS},
    "nodefencings": {"read": READERS, "create": ADMINS, "update": ADMINS, "patch": ADMINS},
}
"""Of tokens for all namespaces; those for some may do the same in them, with what is in namespaces."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApi]:
    """One server for all requests, on a Redis of its own: other tests clear theirs."""
    redis = RedisServer(tmp_path_factory.mktemp("redis"))
    redis.start()
    try:
        with ServedApi(redis.url) as served:
            served.store.must_commit(served.store.batch().create(a_node("n1")).create(a_vm("vm-1", node="n1")))
            yield served
    finally:
        redis.kill()


def until_known(client: httpx.Client) -> httpx.Client:
    """Wait until the server has heard of a client's token."""
    wait_until(lambda: client.get("/api").status_code == 200, 10, "the token is known")
    return client


@pytest.fixture(scope="module")
def clients(served: ServedApi) -> dict[str, httpx.Client]:
    made = {role.value: served.client(role.value, role) for role in Role}
    made |= {
        f"{role.value} of default": served.client(f"{role.value}-of-default", role, ["default", "b"]) for role in Role
    }
    made["nobody"] = served.client_with("")
    for name, client in made.items():
        if name != "nobody":
            until_known(client)
    return made


def url(plural: str, namespace: str = "default", name: str = "") -> str:
    root = GROUP if plural in GROUPED else HERDS if plural in OURS else "/api/v1"
    inside = f"/namespaces/{namespace}" if plural in NAMESPACED and namespace else ""
    return f"{root}{inside}/{plural}" + (f"/{name}" if name else "")


def ask(
    client: httpx.Client, verb: str, plural: str, namespace: str = "default", name: str = "absent"
) -> httpx.Response:
    """Send a request that, where it is allowed, changes nothing."""
    one = url(plural, namespace, name)
    match verb:
        case "get":
            return client.get(one)
        case "list":
            return client.get(url(plural, namespace))
        case "watch":
            begun = {"watch": "true", "timeoutSeconds": "10"}
            with client.stream("GET", url(plural, namespace), params=begun) as answer:
                if answer.status_code != 200:
                    answer.read()
                return answer
        case "create":
            return client.post(url(plural, namespace), json={"nonsense": 1})
        case "update":
            return client.put(one, json={"nonsense": 1})
        case "patch":
            return client.patch(one, content=b"{}", headers=MERGE)
        case "delete":
            return client.delete(one)
        case "evict":
            return client.post(one + "/eviction", json={"apiVersion": "policy/v1", "kind": "Eviction"})
        case _:
            raise AssertionError(verb)


def cases() -> Iterator[tuple[str, str, set[str]]]:
    for plural, rights in MAY.items():
        for right, who in rights.items():
            for verb in ("get", "list", "watch") if right == "read" else (right,):
                yield plural, verb, who


@pytest.mark.parametrize(
    ("plural", "verb", "who"), [pytest.param(*case, id=f"{case[1]} {case[0]}") for case in cases()]
)
def test_each_verb_and_role(clients: Mapping[str, httpx.Client], plural: str, verb: str, who: set[str]) -> None:
    nobody = ask(clients["nobody"], verb, plural)
    assert (nobody.status_code, nobody.json()["reason"]) == (401, "Unauthorized")
    assert nobody.headers["www-authenticate"] == "Bearer"
    for role in Role:
        answer = ask(clients[role.value], verb, plural)
        check(answer, role.value, verb, plural, allowed=role.value in who)
        mine = ask(clients[f"{role.value} of default"], verb, plural)
        check(mine, f"{role.value}-of-default", verb, plural, allowed=role.value in who and plural in NAMESPACED)
        if plural in NAMESPACED:
            other = ask(clients[f"{role.value} of default"], verb, plural, namespace="other")
            check(other, f"{role.value}-of-default", verb, plural, allowed=False)
            if verb in {"list", "watch"}:
                everywhere = ask(clients[f"{role.value} of default"], verb, plural, namespace="")
                check(everywhere, f"{role.value}-of-default", verb, plural, allowed=False)
                assert ask(clients[role.value], verb, plural, namespace="").status_code == 200


def check(answer: httpx.Response, user: str, verb: str, plural: str, *, allowed: bool) -> None:
    if allowed:
        assert answer.status_code in ({200} if verb in {"list", "watch"} else {400, 404, 422}), answer.text
        return
    status = answer.json()
    assert (answer.status_code, status["code"], status["reason"]) == (403, 403, "Forbidden"), answer.text
    right = "create" if verb == "evict" else verb
    assert f'User "{user}" cannot {right} resource "{plural}' in status["message"]


ACTIONS = {
    "nodes/uncordon": OPERATORS,
    "nodes/failures": READERS,
    "nodes/overview": READERS,
    "nodedrains/plan": READERS,
    "nodedrains/cancel": OPERATORS,
    "maintenances/pause": OPERATORS,
    "maintenances/resume": OPERATORS,
    "maintenances/stop": OPERATORS,
    "maintenances/claimhook": OPERATORS,
    "maintenances/renewhook": OPERATORS,
    "maintenances/endhook": OPERATORS,
    "rebalancepolicies/plan": READERS,
    "rebalancepolicies/run": OPERATORS,
    "nodefencings/confirm": ADMINS,
    "nodefencings/test": ADMINS,
    "nodefencings/arm": ADMINS,
    "nodefencings/disarm": ADMINS,
    "nodefencings/disarmed": READERS,
}


def test_actions_are_for_some(clients: Mapping[str, httpx.Client]) -> None:
    assert set(ACTIONS) == set(actions.ACTIONS)
    for action, who in ACTIONS.items():
        plural, _, part = action.partition("/")
        path = f"{url(plural, name='absent')}/{part}"
        assert clients["nobody"].post(path, json={}).status_code == 401
        for role in Role:
            wrong = clients[role.value].post(path, json={"nonsense": 1})  # it changes nothing
            assert wrong.status_code == (422 if role.value in who else 403), (action, role, wrong.text)
            assert clients[f"{role.value} of default"].post(path, json={}).status_code == 403
            if role.value in who:
                assert "nonsense: unknown field" in wrong.json()["message"]
                tried = clients[role.value].post(path, json={}, params={"dryRun": "All"})
                assert (tried.status_code, tried.json()["reason"]) == (400, "BadRequest")


def test_a_token_for_namespaces_sees_its_own_by_name(clients: Mapping[str, httpx.Client]) -> None:
    mine = clients["viewer of default"]
    assert mine.get("/api/v1/namespaces/default").json()["metadata"]["name"] == "default"
    assert mine.get("/api/v1/namespaces/b").status_code == 404
    assert mine.get("/api/v1/namespaces/other").status_code == 403
    assert mine.get("/api/v1/namespaces").status_code == 403
    assert clients["admin of default"].delete("/api/v1/namespaces/default").status_code == 403


def test_discovery_is_for_all_who_are_known(clients: Mapping[str, httpx.Client]) -> None:
    for path in ("/api", "/apis", "/api/v1", GROUP, "/openapi/v3"):
        assert clients["nobody"].get(path).status_code == 401
        assert clients["viewer of default"].get(path).status_code == 200, path


class TestNobody:
    def test_reads_three_paths_and_no_more(self, clients: Mapping[str, httpx.Client]) -> None:
        nobody = clients["nobody"]
        for path in ("/healthz", "/readyz", "/version"):
            assert nobody.get(path).status_code == 200
        assert nobody.get("/healthz/").status_code in {307, 401}
        for path in (
            "/",
            "/healthz/etcd",
            "/livez",
            "//healthz",
            "/healthz%2f..%2fapi",
            "/livez/../api/v1/nodes",
            "/metrics",
            "/docs",
            "/openapi.json",
            "/redoc",
            "/console",
            "/no/such/path",
            url("nodes"),
        ):
            answer = nobody.get(path)
            assert (answer.status_code, answer.json()["reason"]) == (401, "Unauthorized"), path

    @pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "FOO"])
    def test_by_any_method(self, clients: Mapping[str, httpx.Client], method: str) -> None:
        for path in (url("virtualmachines"), url("nodes", name="n1"), "/healthz", "/version"):
            answer = clients["nobody"].request(method, path)
            if method == "HEAD" and not path.startswith(("/api", "/apis")):
                assert answer.status_code in {200, 401, 405}
            else:
                assert answer.status_code in {400, 401, 405}, (method, path)

    @pytest.mark.parametrize(
        "header",
        [
            "",
            "Bearer",
            "Bearer x",
            "Basic cm9vdDpyb290",
            "Bearer " + token_text("admin", "x" * 43),
            "Bearer " + "x" * 9_000,
        ],
    )
    def test_with_what_is_no_token(self, served: ServedApi, clients: Mapping[str, httpx.Client], header: str) -> None:
        assert "admin" in clients
        with httpx.Client(base_url=served.url) as client:
            answer = client.get(url("nodes"), headers={"authorization": header})
            assert answer.status_code in {401, 431}
            assert client.get(url("nodes"), params={"access_token": "x", "token": "x"}).status_code == 401


class TestAskingAboutOneself:
    ACCESS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"

    def may(self, client: httpx.Client, **asked: str) -> bool:
        answer = client.post(self.ACCESS, json={"spec": {"resourceAttributes": asked}})
        assert answer.status_code == 201, answer.text
        status = answer.json()["status"]
        assert status["allowed"] or "cannot" in status["reason"]
        return bool(status["allowed"])

    @pytest.mark.parametrize(
        ("who", "asked", "expected"),
        [
            ("viewer", "list nodes", True),
            ("viewer", "create virtualmachines.virtualization.deckhouse.io default", False),
            ("viewer of default", "list nodes", False),
            ("viewer of default", "list virtualmachines.virtualization.deckhouse.io default", True),
            ("viewer of default", "list virtualmachines.virtualization.deckhouse.io", False),
            ("operator", "deletecollection virtualmachines.virtualization.deckhouse.io default", True),
            ("operator of default", "delete virtualmachineoperations.virtualization.deckhouse.io default", True),
            ("operator of default", "delete virtualmachineoperations.virtualization.deckhouse.io other", False),
            ("operator", "list virtualmachines.kubevirt.io default", False),
            ("admin of default", "* *", False),
            ("admin", "*", False),
            ("admin", "* *", True),
        ],
    )
    def test_is_told_what_a_request_would_be(
        self, clients: Mapping[str, httpx.Client], who: str, asked: str, expected: bool
    ) -> None:
        verb, resource, namespace = (*asked.split(), "", "")[:3]
        plural, _, group = resource.partition(".")
        attributes = {
            "verb": verb,
            "resource": plural,
            "group": "*" if plural == "*" else group,
            "namespace": namespace,
        }
        if asked == "*":
            answer = clients[who].post(
                self.ACCESS, json={"spec": {"nonResourceAttributes": {"verb": "*", "path": "/x"}}}
            )
            assert answer.json()["status"]["allowed"] is expected
        else:
            assert self.may(clients[who], **attributes) is expected

    def test_nobody_and_nonsense(self, clients: Mapping[str, httpx.Client]) -> None:
        assert clients["nobody"].post(self.ACCESS, json={"spec": {}}).status_code == 401
        bodies: tuple[object, ...] = ({}, {"spec": 1}, {"spec": {}}, {"spec": {"resourceAttributes": {"verb": 1}}}, [])
        for body in bodies:
            assert clients["viewer"].post(self.ACCESS, json=body).status_code == 400, body
        assert clients["viewer"].get(self.ACCESS).status_code == 405

    def test_who_one_is_and_all_that_one_may(self, clients: Mapping[str, httpx.Client]) -> None:
        mine = clients["viewer of default"]
        who = mine.post("/apis/authentication.k8s.io/v1/selfsubjectreviews", json={}).json()["status"]["userInfo"]
        assert (who["username"], who["groups"]) == ("viewer-of-default", ["vmherd:viewer"])
        assert who["extra"] == {"vmherd.dev/namespaces": ["b", "default"]}
        rules = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
        (rule,) = mine.post(rules, json={"spec": {"namespace": "b"}}).json()["status"]["resourceRules"]
        assert rule["verbs"] == ["get", "list", "watch"]
        assert rule["resources"] == ["events", "pods", "virtualmachineoperations", "virtualmachines"]
        assert mine.post(rules, json={"spec": {"namespace": "c"}}).json()["status"]["resourceRules"] == []


class TestWhatAChangeTouches:
    def test_an_operator_cordons_and_does_not_label(
        self, served: ServedApi, clients: Mapping[str, httpx.Client]
    ) -> None:
        operator, path = clients["operator"], url("nodes", name="n1")
        done = operator.patch(path, json={"spec": {"unschedulable": True}}, headers=MERGE)
        assert done.status_code == 200
        assert served.store.get(Node, "n1").spec.unschedulable
        for change in (
            {"metadata": {"labels": {"zone": "a"}}},
            {"metadata": {"annotations": {"zone": "a"}}},
            {"spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]}},
            {"spec": {"unschedulable": None}, "metadata": {"labels": {"zone": "a"}}},
        ):
            refused = operator.patch(path, json=change, headers=MERGE)
            assert refused.status_code == 403, refused.text
            assert "all but spec.unschedulable takes an admin" in refused.json()["message"]
        node = served.store.get(Node, "n1")
        assert (node.metadata.labels, node.spec.taints, node.spec.unschedulable) == ({}, (), True)
        assert operator.patch(path, json={"spec": {"unschedulable": None}}, headers=MERGE).status_code == 200
        assert (
            clients["admin"].patch(path, json={"metadata": {"labels": {"zone": "a"}}}, headers=MERGE).status_code == 200
        )

    def test_raw_libvirt_xml_takes_an_admin_of_all(
        self, served: ServedApi, clients: Mapping[str, httpx.Client]
    ) -> None:
        xml = "<domain type='kvm'><os><type>hvm</type></os></domain>"
        spec = {"memory": {"size": "192Mi"}, "runPolicy": "Manual", "domainTemplate": xml}
        body = {"metadata": {"name": "raw"}, "spec": spec}
        plain = {
            "memory": {"size": "192Mi"},
            "runPolicy": "Manual",
            "cpu": {"cores": 1},
            "disks": [{"name": "root", "file": {"path": "/srv/a"}}],
        }
        for who in ("operator", "operator of default", "admin of default"):
            refused = clients[who].post(url("virtualmachines"), json=body)
            assert refused.status_code == 403, refused.text
            assert "spec.domainTemplate is any libvirt XML" in refused.json()["message"]
            made = clients[who].post(url("virtualmachines"), json={"metadata": {"name": "plain"}, "spec": plain})
            assert made.status_code == 201, made.text
            smuggled = {"spec": {"domainTemplate": xml, "disks": None}}
            path = url("virtualmachines", name="plain")
            assert clients[who].patch(path, json=smuggled, headers=MERGE).status_code == 403
            assert clients[who].delete(path).status_code == 200
        assert served.store.find(VirtualMachine, "default/raw") is None
        assert clients["admin"].post(url("virtualmachines"), json=body).status_code == 201
        kept = clients["operator"].patch(
            url("virtualmachines", name="raw"), json={"metadata": {"labels": {"a": "b"}}}, headers=MERGE
        )
        assert kept.status_code == 200, kept.text


class TestRevocation:
    def test_cuts_its_watches_at_once_and_no_others(self, redis_url: str) -> None:
        with ServedApi(redis_url) as served:
            ctx = Context(served.store, served.outbox)
            leaver = until_known(served.client("leaver", Role.VIEWER))
            stayer = until_known(served.client("stayer", Role.VIEWER))
            watches = [
                Watching(leaver, url("nodes")),
                Watching(leaver, url("virtualmachines")),
                Watching(stayer, url("nodes")),
            ]
            served.store.must_commit(served.store.batch().create(a_node("n1")))
            watches[0].wait(("ADDED", "n1"))
            watches[2].wait(("ADDED", "n1"))
            revoke_token(ctx, "leaver")
            for cut in watches[:2]:
                assert cut.ended()["object"]["reason"] in {"Unauthorized", "Expired"}
            served.store.must_commit(served.store.batch().create(a_node("n2")))
            watches[2].wait(("ADDED", "n1"), ("ADDED", "n2"))
            assert ("ADDED", "n2") not in watches[0].seen()
            assert leaver.get(url("nodes")).status_code == 401
            assert stayer.get(url("nodes")).status_code == 200

    def test_one_made_anew_under_the_name_is_another(self, redis_url: str) -> None:
        with ServedApi(redis_url) as served:
            old = until_known(served.client("ci", Role.VIEWER))
            watch = Watching(old, url("nodes"))
            revoke_token(Context(served.store, served.outbox), "ci")
            until_known(served.client("ci", Role.VIEWER))
            assert old.get("/api").status_code == 401
            assert watch.ended()["type"] == "ERROR"

    def test_a_watch_ends_when_its_token_does(self, redis_url: str) -> None:
        with ServedApi(redis_url) as served:
            _, text = create_token(
                Context(served.store, served.outbox), "brief", Role.VIEWER, None, timedelta(seconds=4)
            )
            client = until_known(served.client_with(text))
            watch = Watching(client, url("nodes"))
            assert watch.status == 200
            watch.ended()
            assert client.get("/api").status_code == 401
            assert "expired" in client.get("/api").json()["message"]


class TestSecrets:
    def test_are_in_no_answer_event_or_audit_line(
        self, redis_url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with ServedApi(redis_url) as served:
            token, text = create_token(Context(served.store, served.outbox), "root", Role.ADMIN)
            client = until_known(served.client_with(text))
            client.post(
                url("virtualmachineclasses"), json={"metadata": {"name": "c"}, "spec": {"cpu": {"type": "Host"}}}
            )
            secrets = (text, text.rpartition("_")[2], token.spec.sha256)
            wait_until(lambda: [e for e in served.store.all(Event) if e.reason == "RequestDone"], 10, "the event")
            shown = [json.dumps([event.manifest() for event in served.store.all(Event)])]
            paths = ("/apis", "/api/v1", "/openapi/v3", url("events"), "/apis/vmherd.dev/v1/accesstokens")
            shown += [client.get(path).text for path in paths]
            assert "root (admin) created VirtualMachineClass 'c'" in shown[0]
            assert served.store.get(AccessToken, "root").spec.sha256 == token.spec.sha256
        out, err = capfd.readouterr()
        for place in (*shown, out, err):
            for secret in secrets:
                assert secret not in place
