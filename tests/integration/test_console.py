"""What the console keeps: sessions in Redis, and its indexes beside the copy, without a browser."""

import asyncio
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from orchestrator.api.access import Access
from orchestrator.api.audit import Audit
from orchestrator.api.catalog import RESOURCES
from orchestrator.api.mirror import Mirror
from orchestrator.console.actions import Actions
from orchestrator.console.herd_view import marks
from orchestrator.console.live import Changes, Live
from orchestrator.console.sessions import LASTS_S, Sessions
from orchestrator.errors import Forbidden, Refused, Unauthorized
from orchestrator.resources import (
    AccessToken,
    Event,
    Maintenance,
    Namespace,
    Node,
    NodeDrain,
    NodeFencing,
    NodeInventory,
    OperationPhase,
    OperationType,
    Role,
    VirtualMachine,
    VirtualMachineOperation,
)
from orchestrator.services.context import Context
from orchestrator.services.tokens import create_token, revoke_token
from orchestrator.settings import Settings
from orchestrator.store import Store
from orchestrator.store.connection import connect
from tests.builders import a_node, a_vm, an_operation
from tests.declared_keys import check_keys
from tests.fakes import Outbox, Stage
from tests.fencing import FencingStage, a_bmc
from tests.processes import Processes
from tests.redis_server import free_port
from tests.waiting import wait_until

T = TypeVar("T")
HIDDEN = (AccessToken, NodeInventory, Namespace, NodeDrain, NodeFencing, Maintenance)


class Stored:
    """Finds tokens in Redis, where a server has its copy."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def get(self, kind: type[AccessToken], key: str) -> AccessToken | None:
        return self.store.find(kind, key)


@pytest.fixture
def ctx(store: Store) -> Context:
    return Context(store, Outbox())


@pytest.fixture
def access(store: Store) -> Access:
    return Access(Stored(store), lambda: datetime.now(UTC), Audit(None))


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def test_a_session_is_kept_by_its_digest_expires_and_ends_with_its_token(ctx: Context, access: Access) -> None:
    sessions, redis = Sessions(ctx.store, access), ctx.store.redis
    _, text = create_token(ctx, "alice", Role.OPERATOR, ["default"])
    number, begun = run(sessions.begin(text))
    found = run(sessions.find(number))
    assert found is not None
    assert (found.identity.name, found.identity.role, found.csrf) == ("alice", Role.OPERATOR, begun.csrf)
    (key,) = redis.keys("console-session:*")
    kept = f"{key!r} {redis.get(key)!r}"
    assert number not in kept, "whoever reads Redis can't take it over"
    assert text not in kept
    assert LASTS_S - 60 < redis.ttl(key) <= LASTS_S
    assert "console-session:<digest>" in check_keys(redis)

    _, other = run(sessions.begin(text))
    run(sessions.end(other))
    with pytest.raises(Unauthorized):
        run(sessions.renewed(other))
    assert run(sessions.find(number)) is not None, "one browser's end is not another's"
    revoke_token(ctx, "alice")
    create_token(ctx, "alice", Role.ADMIN)  # another under its name
    assert run(sessions.find(number)) is None
    assert not sessions.is_valid(begun)


@pytest.mark.parametrize("text", ["", "nonsense", "vmherd_alice_" + "x" * 43])
def test_nobody_signs_in_without_a_token(ctx: Context, access: Access, text: str) -> None:
    create_token(ctx, "alice", Role.VIEWER)
    with pytest.raises(Unauthorized):
        run(Sessions(ctx.store, access).begin(text))
    assert ctx.store.redis.keys("console-session:*") == []


def test_rights_are_asked_for_at_each_click(ctx: Context, access: Access) -> None:
    store = ctx.store
    store.must_commit(store.batch().create(a_node("n1")).create(a_node("n2")).create(a_vm("vm-1", node="n1")))

    async def click() -> None:
        mirror = Mirror(store, RESOURCES, hidden=HIDDEN)
        await mirror.start()
        sessions = Sessions(store, access)
        actions = Actions(ctx, access, mirror, sessions)
        made = {}
        for role in Role:
            _, text = create_token(ctx, role.value, role)
            _, made[role] = await sessions.begin(text)
        _, text = create_token(ctx, "inside", Role.ADMIN, ["default"])
        _, inside = await sessions.begin(text)
        try:
            viewer, operator = made[Role.VIEWER], made[Role.OPERATOR]
            for forged in (
                actions.operate(viewer, "default", "vm-1", OperationType.STOP),
                actions.abort(viewer, "default", "op"),
                actions.plan(viewer, "n1"),
                actions.drain(viewer, "n1"),
                actions.uncordon(viewer, "n1"),
                actions.drain(inside, "n1"),
                actions.operate(inside, "elsewhere", "vm-1", OperationType.STOP),
            ):
                with pytest.raises(Forbidden):
                    await forged
            assert store.all(VirtualMachineOperation) == []
            plan = await actions.plan(operator, "n1")
            assert [(move.job.vm, move.job.target) for move in plan.moves] == [("default/vm-1", "n2")]
            assert not store.get(Node, "n1").spec.unschedulable, "a plan changes nothing"
            done = await actions.operate(operator, "default", "vm-1", OperationType.MIGRATE, "n2")
            assert done.spec.migrate is not None
            assert done.spec.migrate.node_name == "n2"
            await actions.abort(operator, "default", done.name)
            begun = await actions.drain(operator, "n1")
            assert begun.spec.requested_by == "operator (console)"
            assert store.get(Node, "n1").spec.unschedulable
            assert await actions.uncordon(operator, "n1")
            store.must_commit(store.batch().create(a_vm("vast", node="n1", memory="16Gi")))
            with pytest.raises(Refused, match="no place for 1 VMs: vast"):
                await actions.drain(operator, "n1")
            assert not store.get(Node, "n1").spec.unschedulable
            await actions.drain(operator, "n1", partial=True)
            revoke_token(ctx, "operator")
            with pytest.raises(Unauthorized):
                await actions.uncordon(operator, "n1")
        finally:
            await mirror.stop()

    run(click())


def test_the_indexes_follow_the_copy_and_pages_are_woken(store: Store) -> None:
    first = an_operation("op-1", "vm-2", phase=OperationPhase.COMPLETED)
    store.must_commit(store.batch().create(a_vm("vm-2")).create(first))

    async def follow() -> None:
        mirror = Mirror(store, RESOURCES, hidden=HIDDEN)
        live = Live(mirror)
        await mirror.start()
        changes = Changes([VirtualMachine])
        live.open_page(changes)
        try:
            assert [vm.name for vm in live.vms("default")] == ["vm-2"]
            batch = store.batch().create(a_vm("vm-1")).create(an_operation("op-2", "vm-2"))
            store.must_commit(batch)
            await mirror.newest()
            assert changes.event.is_set()
            assert [vm.name for vm in live.vms("default")] == ["vm-1", "vm-2"], "by name"
            assert [one.name for one in live.operations_of("default/vm-2")] == ["op-2", "op-1"], "the latest first"
            assert [one.name for one in live.operations.values()] == ["op-2"]
            store.must_commit(store.batch().delete(store.get(VirtualMachine, "default/vm-2")))
            store.must_commit(store.batch().delete(store.get(VirtualMachineOperation, "default/op-2")))
            await mirror.newest()
            assert ([vm.name for vm in live.vms("default")], live.count("default")) == (["vm-1"], 1)
            assert live.operations == {}
            changes.event.clear()
            live.close_page(changes)
            store.must_commit(store.batch().create(a_vm("vm-3")))
            await mirror.newest()
            assert not changes.event.is_set()
        finally:
            await mirror.stop()

    run(follow())


@pytest.mark.parametrize("console", [True, False])
def test_an_api_without_the_console_serves_nothing_of_it(redis_url: str, tmp_path: Path, console: bool) -> None:
    """As a process of its own: what is served is decided where that begins."""
    port = free_port()
    store = Store(connect(redis_url), Settings())
    _, token = create_token(Context(store, Outbox()), "root", Role.ADMIN)
    store.must_commit(store.batch().create(a_node("n1")))
    store.close()
    words = ("-m", "orchestrator.cli", "api", "--plain-http", "--port", str(port))
    given = {"VMHERD_CONSOLE": str(console).lower(), "VMHERD_TLS_DIR": str(tmp_path / "tls")}
    bearer = {"authorization": f"Bearer {token}"}
    with (
        Processes(redis_url, tmp_path, **given) as processes,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        processes.start("api", *words)
        wait_until(lambda: answers(http), 120, processes.logs)
        nodes = http.get("/api/v1/nodes", headers=bearer)
        assert [node["metadata"]["name"] for node in nodes.json()["items"]] == ["n1"]
        for path in ("/console", "/console/", "/console/login", "/console/_nicegui_ws/socket.io/"):
            mine, nobodys = http.get(path, headers=bearer), http.get(path)
            if console:
                assert mine.status_code != 404, path
                continue
            assert (mine.status_code, mine.json()["reason"]) == (404, "NotFound"), path
            assert (nobodys.status_code, nobodys.json()["reason"]) == (401, "Unauthorized"), path
        upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
        asked = http.get(
            "/console/_nicegui_ws/socket.io/?EIO=4&transport=websocket",
            headers={**bearer, **upgrade, "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA=="},
        )
        assert (asked.status_code == 404) is not console


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_the_timeline_shows_a_fencing_from_suspicion_to_recovery_each_thing_once(redis_url: str) -> None:
    stage = Stage(redis_url)
    try:
        stage.add_nodes("n1", "n2", "n3", "n4")
        stage.add_vm("a", "n1")
        herd = FencingStage(stage)
        herd.configure("n1", bmc=a_bmc("n1"))
        herd.lose("n1")
        herd.until_tried("n1")
        stage.play(lambda: stage.is_at_rest("a") and not herd.has_node("n1"))
        found = marks([], stage.store.all(NodeFencing), [], stage.store.all(Event), stage.ctx.now())
    finally:
        stage.close()
    told = [(mark.text, mark.bad) for mark in reversed(found)]
    assert told == [
        ("n1: NodeSuspect", True),
        ("n1: NodeFencing", True),
        ("n1: fenced by BMC", True),
        ("n1: NodeRecovered", False),
    ]
