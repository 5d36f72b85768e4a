"""The rebalancer on a real Redis: what it makes of a herd, when it leaves it alone, and what people are told."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.errors import Invalid
from orchestrator.planner.capacity import FAILOVER_READY
from orchestrator.planner.migration import Go, plan_grants
from orchestrator.queues import Task
from orchestrator.resources import (
    Node,
    NodeFencing,
    ObjectMeta,
    OperationPhase,
    OperationType,
    Priority,
    RebalancePolicy,
    VirtualMachineOperation,
    find_condition,
)
from orchestrator.resources.fencing import FencePhase, NodeFencingStatus
from orchestrator.resources.rebalancing import EXPLANATION_ANNOTATION, REASON_ANNOTATION
from orchestrator.resources.vmop import PRIORITY_ANNOTATION, MigrateTo
from orchestrator.services import capacity, granting, operations, rebalancing
from orchestrator.services.herd import Herd
from orchestrator.services.nodes import set_labels
from orchestrator.store import keys
from tests.builders import a_node, keep_apart
from tests.fakes import Stage
from tests.integration.command import Vmherd

LOW = {PRIORITY_ANNOTATION: str(Priority.BALANCE.value)}


@pytest.fixture
def stage(redis_url: str) -> Iterator[Stage]:
    """Three hosts of 8 CPUs, each counted once."""
    stage = Stage(redis_url, cpu_ratio=1)
    stage.add_nodes("n1", "n2", "n3")
    yield stage
    stage.close()


def crowd(stage: Stage) -> None:
    """Let n1 have 7 of its 8 CPUs reserved."""
    stage.add_vm("large", "n1", cores=6, memory="2Gi")
    stage.add_vm("small", "n1", cores=1, memory="1Gi")


def scan(stage: Stage) -> list[VirtualMachineOperation]:
    """Do one scan, whenever the last one was; give the operations that it made."""
    stage.store.redis.delete(keys.REBALANCE_SCAN)
    before = {operation.key for operation in stage.operations()}
    made = rebalancing.scan(stage.ctx, stage.herd)
    found = [operation for operation in stage.operations() if operation.key not in before]
    assert made == len(found)
    return found


def finish(stage: Stage) -> None:
    stage.play(lambda: all(not operation.is_open for operation in stage.operations()))


class TestScan:
    def test_an_overloaded_node_is_relieved_by_an_ordinary_operation_that_says_why(self, stage: Stage) -> None:
        crowd(stage)
        (operation,) = scan(stage)
        assert operation.spec.type is OperationType.MIGRATE
        assert (operation.spec.virtual_machine_name, operation.spec.migrate) == ("small", MigrateTo(node_name="n2"))
        assert operation.priority is Priority.BALANCE
        assert operation.metadata.annotations[REASON_ANNOTATION].startswith("load: node n1 has 88 % of its CPU")
        assert json.loads(operation.metadata.annotations[EXPLANATION_ANNOTATION])["cost_mib"] == 1024
        finish(stage)
        assert stage.vm("small").status.node_name == "n2"
        assert scan(stage) == []

    def test_what_is_under_way_is_not_planned_again(self, stage: Stage) -> None:
        crowd(stage)
        assert len(scan(stage)) == 1
        assert scan(stage) == [], "the operation waits for its turn"
        (message,) = stage.grant()
        assert scan(stage) == [], "it is granted"
        stage.deliver(message)
        finish(stage)

    def test_a_broken_rule_is_repaired_with_a_higher_priority(self, stage: Stage) -> None:
        stage.add_vm("web-1", "n1", labels={"app": "web"}, spec=keep_apart(app="web"), memory="2Gi")
        stage.add_vm("web-2", "n1", labels={"app": "web"})
        (operation,) = scan(stage)
        assert (operation.spec.virtual_machine_name, operation.priority) == ("web-2", Priority.PLACEMENT)
        finish(stage)
        assert stage.vm("web-2").status.node_name != "n1"

    def test_off_means_that_nothing_moves(self, stage: Stage) -> None:
        crowd(stage)
        rebalancing.change_policy(stage.ctx, {"enabled": False})
        assert scan(stage) == []
        rebalancing.change_policy(stage.ctx, {"enabled": True})
        assert len(scan(stage)) == 1

    def test_one_scan_an_interval_however_many_workers(self, stage: Stage) -> None:
        crowd(stage)
        assert rebalancing.scan(stage.ctx, stage.herd) == 1
        operations.delete_operation(stage.ctx, stage.operations()[0].key)
        other = Herd(stage.store).start()
        try:
            assert rebalancing.scan(stage.ctx, other) == 0
        finally:
            other.stop()
        assert 0 < stage.store.redis.pttl(keys.REBALANCE_SCAN) <= 60_000

    def test_nothing_moves_while_a_node_is_lost_or_the_herd_recovers(self, stage: Stage) -> None:
        crowd(stage)
        node = stage.store.get(Node, "n3")
        lost = a_node("n3", ready=False).with_(metadata=node.metadata)
        stage.store.must_commit(stage.store.batch().put(node, lost))
        assert scan(stage) == []
        stage.store.must_commit(stage.store.batch().put(stage.store.get(Node, "n3"), node))
        stage.store.redis.hset(keys.IDENTITY, "state", "recovering")
        assert scan(stage) == []
        stage.store.redis.hset(keys.IDENTITY, "state", "normal")
        fencing = NodeFencing(metadata=ObjectMeta(name="n9"), status=NodeFencingStatus(phase=FencePhase.UNCONFIRMED))
        stage.store.must_commit(stage.store.batch().create(fencing))
        assert scan(stage) == []
        stage.store.must_commit(stage.store.batch().delete(stage.store.get(NodeFencing, "n9")))
        assert len(scan(stage)) == 1

    def test_a_node_is_relieved_after_so_many_scans_in_a_row(self, stage: Stage) -> None:
        crowd(stage)
        rebalancing.change_policy(stage.ctx, {"hold": 3})
        assert [len(scan(stage)) for _ in range(3)] == [0, 0, 1]

    def test_but_by_hand_at_once(self, stage: Stage) -> None:
        crowd(stage)
        rebalancing.change_policy(stage.ctx, {"hold": 3})
        why, plan = rebalancing.look(stage.ctx, stage.herd)
        assert (why, [move.vm for move in plan.moves]) == ("", ["default/small"])
        assert scan(stage) == [], "what a person looks at is no scan"

    def test_one_that_moved_lately_is_left_where_it_is(self, stage: Stage) -> None:
        crowd(stage)
        stage.evict("small")
        finish(stage)
        stage.add_vm("new", "n2", cores=7, memory="8Gi")  # now n2 is over, and small is on it
        assert stage.vm("small").status.node_name == "n2"
        assert [operation.spec.virtual_machine_name for operation in scan(stage)] == []
        rebalancing.change_policy(stage.ctx, {"cooldownSeconds": 0})
        assert [operation.spec.virtual_machine_name for operation in scan(stage)] == ["small"]

    def test_a_move_that_failed_is_not_tried_again_at_once(self, stage: Stage) -> None:
        crowd(stage)
        (operation,) = scan(stage)
        now = stage.operation(operation)
        failed = now.with_status(phase=OperationPhase.FAILED, finished_at=stage.store.now())
        stage.store.must_commit(stage.store.batch().put(now, failed))
        assert [operation.spec.virtual_machine_name for operation in scan(stage)] == ["large"]

    def test_what_can_not_be_helped_is_told_once(self, stage: Stage) -> None:
        stage.add_vm("a", "n1", selector={"disk": "ssd"})
        scan(stage)
        policy = stage.store.get(RebalancePolicy, "cluster")
        assert "without label disk=ssd" in policy.status.unresolved["vm/default/a"]
        scan(stage)
        assert stage.store.get(RebalancePolicy, "cluster").version == policy.version
        set_labels(stage.ctx, "n3", {"disk": "ssd"})
        assert len(scan(stage)) == 1
        assert stage.store.get(RebalancePolicy, "cluster").status.unresolved == {}

    @pytest.mark.parametrize(
        ("changes", "path"),
        [({"threshold": 1}, "threshold"), ({"thresholds.cpu": 0}, "thresholds.cpu"), ({"hold.a": 1}, "spec.hold.a")],
    )
    def test_a_policy_that_can_not_be_is_refused(self, stage: Stage, changes: dict[str, Any], path: str) -> None:
        with pytest.raises(Invalid, match=path):
            rebalancing.change_policy(stage.ctx, changes)
        assert stage.store.find(RebalancePolicy, "cluster") is None


def test_two_workers_do_not_put_two_together_that_are_kept_apart(stage: Stage) -> None:
    """Each of them plans from a herd in which the other's grant is not to be seen yet."""
    other, snapshot = Herd(stage.store).start(), stage.herd.snapshot
    to_n2 = MigrateTo(node_name="n2")
    for name, node in (("web-1", "n1"), ("web-2", "n3")):
        stage.add_vm(name, node, labels={"app": "web"}, spec=keep_apart(app="web"))
    wanted = operations.new_operation("web-1", OperationType.MIGRATE, migrate=to_n2, annotations=LOW)
    first = operations.create_operation(stage.ctx, wanted)
    second = operations.new_operation("web-2", OperationType.MIGRATE, migrate=to_n2)

    def late() -> Any:
        """A look at the herd, after which another worker grants the second one the same node."""
        taken = snapshot()
        stage.herd.snapshot = snapshot  # type: ignore[method-assign]
        operations.create_operation(stage.ctx, second)
        seen = other.snapshot()
        go = next(iter(plan_grants(seen)))
        assert isinstance(go, Go)
        assert granting._grant(stage.ctx, seen, go, 99, seen.placements) is None
        return taken

    stage.herd.snapshot = late  # type: ignore[assignment,method-assign]
    assert [message.args[0] for message in stage.grant()] == ["default/web-2"]
    assert stage.operation(first).status.grant is None
    assert len(stage.outbox.take(Task.GRANT)) == 1, "it is looked at again at once"
    stage.grant()
    assert "anti-affinity with web-2" in stage.operation(first).message
    other.stop()


def test_each_node_says_whether_the_herd_could_lose_it(stage: Stage) -> None:
    stage.add_vm("a", "n1", cores=8)
    stage.add_vm("b", "n2", cores=8)
    stage.add_vm("c", "n3", cores=1)
    assert capacity.watch(stage.ctx, stage.herd) == 3
    told = {n.name: find_condition(n.status.conditions, FAILOVER_READY) for n in stage.store.all(Node)}
    assert {name: condition.status for name, condition in told.items() if condition} == {
        "n1": "False",
        "n2": "False",
        "n3": "False",
    }
    assert told["n1"] is not None
    assert "default/a (0/3 nodes: 1 lost, 2 short of 8000 millicores CPU)" in told["n1"].message
    version = stage.store.version()
    capacity.watch(stage.ctx, stage.herd)
    assert stage.store.version() == version, "what is no news costs no write"


class TestCommands:
    def test_dry_run_explain_and_policy(self, stage: Stage, redis_url: str) -> None:
        crowd(stage)
        vmherd = Vmherd(redis_url)
        environment = {"VMHERD_CPU_RATIO": "1"}
        dry = vmherd.run("rebalance", "--dry-run", **environment).stdout
        assert "default/small: n1 -> n2, 1.0 GiB, load" in dry
        assert "(nothing was done)" in dry
        as_data = json.loads(vmherd.run("rebalance", "--dry-run", "-o", "json", **environment).stdout)
        (move,) = as_data["moves"]
        assert [move[name] for name in ("vm", "source", "target", "costMib")] == ["default/small", "n1", "n2", 1024]
        assert (as_data["over"], as_data["operations"]) == (["n1"], [])
        assert stage.operations() == []
        made = vmherd.run("rebalance", **environment).stdout.splitlines()[-1]
        name = made.removeprefix("virtualmachineoperation/").removesuffix(" created")
        told = vmherd.ok("explain", f"vmop/{name}")
        assert "node n1 has 88 % of its CPU" in told
        assert "from node n1 to node n2" in told
        as_data = json.loads(vmherd.ok("explain", f"vmop/{name}", "-o", "json"))
        assert [as_data["move"][name] for name in ("source", "target", "costMib")] == ["n1", "n2", 1024]
        assert vmherd.ok("rebalance", "--off", "--set", "thresholds.cpu=70") == "rebalancepolicy/cluster configured\n"
        shown = vmherd.ok("rebalance", "--policy").splitlines()
        assert {"enabled=false", "thresholds.cpu=70"} <= set(shown)
        assert vmherd.run("rebalance", "--set", "hold=0").returncode == 1
        vmherd.store.close()

    def test_plan_failure(self, stage: Stage, redis_url: str) -> None:
        stage.add_vm("a", "n1", cores=8)
        stage.add_vm("b", "n2", cores=1)
        vmherd = Vmherd(redis_url)
        every = vmherd.run("plan", "failure", "--all", VMHERD_CPU_RATIO="1")
        assert every.returncode == 0
        assert "n1: all 1 VMs that would have to be restarted fit elsewhere" in every.stdout
        stage.add_vm("c", "n3", cores=1)
        one = vmherd.run("plan", "failure", "n1", VMHERD_CPU_RATIO="1")
        assert one.returncode == 1
        assert "1 of 1 VMs would find no place: default/a" in one.stderr
        as_data = vmherd.run("plan", "failure", "n1", "-o", "json", VMHERD_CPU_RATIO="1")
        assert (as_data.returncode, list(json.loads(as_data.stdout)[0]["stranded"])) == (1, ["default/a"])
        assert "not found" in vmherd.run("plan", "failure", "n9").stderr
        vmherd.store.close()
