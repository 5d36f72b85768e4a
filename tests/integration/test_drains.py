"""Drains and maintenances: the real services on a real Redis, over fake hosts."""

from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.errors import NotFound, Refused
from orchestrator.resources import (
    Maintenance,
    Node,
    NodeDrain,
    OperationPhase,
    OperationType,
    Priority,
    VirtualMachineOperation,
    find_condition,
)
from orchestrator.resources.drain import DrainCause, DrainPhase, DrainSpec, VmState
from orchestrator.resources.maintenance import MaintenancePhase, MaintenanceSpec, NodeStage
from orchestrator.resources.vmop import PRIORITY_ANNOTATION, MigrateTo
from orchestrator.services import drain_plans, drains, maintenances
from orchestrator.services.context import Context
from orchestrator.services.evictions import EvictionState, evict
from orchestrator.services.nodes import set_unschedulable, update_node
from orchestrator.services.operations import create_operation, delete_operation, new_operation
from orchestrator.store import keys
from tests.fakes import Stage

SPEC = DrainSpec(requested_by="the test")


@pytest.fixture
def stage(redis_url: str) -> Iterator[Stage]:
    stage = Stage(redis_url)
    stage.add_nodes("n1", "n2", "n3")
    yield stage
    stage.close()


def phase_of(stage: Stage, node: str = "n1") -> DrainPhase:
    return stage.store.get(NodeDrain, node).status.phase


def condition_of(stage: Stage, node: str = "n1") -> tuple[str, str]:
    condition = find_condition(stage.store.get(Node, node).status.conditions, drains.DRAINED)
    assert condition is not None
    return condition.status, condition.reason


def listed(stage: Stage, node: str = "n1") -> None:
    """Let a host tell all that it has."""
    stage.nodes[node].list_all()
    stage.read()


def timers(stage: Stage) -> list[str]:
    return [str(key) for key in stage.store.redis.zrange(keys.AWAITING, 0, -1) if str(key).startswith("drain/")]


class TestDrain:
    def test_to_the_end(self, stage: Stage) -> None:
        for name in ("a", "b"):
            stage.add_vm(name, "n1")
        drains.begin(stage.ctx, "n1", SPEC)
        assert condition_of(stage) == ("False", "Draining")
        assert timers(stage) == ["drain/n1"]
        stage.play(lambda: stage.world.hosts["n1"] == {} and stage.is_at_rest("a", "b"))
        assert phase_of(stage) is DrainPhase.DRAINING, "its host has not said yet that it shows them no more"
        listed(stage)
        assert condition_of(stage) == ("True", "Drained")
        assert timers(stage) == []
        assert all(vm.moved for vm in stage.store.get(NodeDrain, "n1").vms.values())

    def test_asked_twice_it_is_one(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        first = drains.begin(stage.ctx, "n1", SPEC)
        assert drains.begin(stage.ctx, "n1", SPEC) == first
        assert len(stage.operations()) == 1

    def test_one_that_the_rest_cant_hold_is_refused_and_nothing_is_begun(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        for name in ("n2", "n3"):
            set_unschedulable(stage.ctx, name, unschedulable=True)
        with pytest.raises(Refused, match=r"n1 can't be emptied: .* no place for 1 VMs: a \(0/3 nodes: 2 cordoned"):
            drain_plans.begin_checked(stage.ctx, ["n1"], SPEC)
        assert not stage.store.get(Node, "n1").spec.unschedulable
        assert stage.store.find(NodeDrain, "n1") is None
        drain_plans.begin_checked(stage.ctx, ["n1"], SPEC.with_(partial=True))
        assert stage.store.get(Node, "n1").spec.unschedulable
        with pytest.raises(NotFound, match="Node 'n9' not found"):
            drain_plans.begin_checked(stage.ctx, ["n9"], SPEC)

    def test_what_is_stopped_stays_cordoned_and_has_nothing_left_to_do(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        drains.begin(stage.ctx, "n1", SPEC)
        stopped = drains.cancel(stage.ctx, "n1", "enough")
        assert (stopped.status.phase, stopped.status.message) == (DrainPhase.CANCELLED, "enough")
        assert stage.operations() == []
        assert stage.store.get(Node, "n1").spec.unschedulable
        assert timers(stage) == []
        stage.reconcile()
        assert stage.operations() == []

    def test_whoever_uncordons_its_node_ends_it(self, stage: Stage) -> None:
        """`kubectl uncordon` replaces the node's document."""
        stage.add_vm("a", "n1")
        drains.begin(stage.ctx, "n1", SPEC)
        node = stage.store.get(Node, "n1")
        update_node(stage.ctx, node.with_(spec=node.spec.with_(unschedulable=False)))
        assert phase_of(stage) is DrainPhase.CANCELLED
        assert stage.operations() == []

    def test_a_wake_up_that_was_lost_costs_a_round_of_reconcile(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage.add_vm("a", "n1")
        with monkeypatch.context() as lost:
            lost.setattr(drains, "step", lambda *_: None)
            drains.begin(stage.ctx, "n1", SPEC)
        assert stage.operations() == []
        stage.reconcile()
        assert [operation.name[:13] for operation in stage.operations()] == ["evacuation-a-"]


class TestWhatWaits:
    """Operations that were Pending when a drain began."""

    def a_move(self, stage: Stage, to: str = "n2") -> VirtualMachineOperation:
        annotations = {PRIORITY_ANNOTATION: str(Priority.BALANCE.value)}
        migrate = MigrateTo(node_name=to)
        wanted = new_operation("a", OperationType.MIGRATE, migrate=migrate, annotations=annotations)
        return create_operation(stage.ctx, wanted)

    def test_a_move_for_balance_gives_way_and_the_vm_is_moved_once(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        move = self.a_move(stage)
        drains.begin(stage.ctx, "n1", SPEC)
        (evacuation,) = stage.operations()
        assert evacuation.name.startswith("evacuation-a-")
        assert stage.store.get(NodeDrain, "n1").vms["default/a"].operation == evacuation.name
        stage.play(lambda: stage.world.hosts["n1"] == {} and stage.is_at_rest("a"))
        assert [operation.name for operation in stage.operations()] == [evacuation.name]
        assert move.name not in {operation.name for operation in stage.operations()}
        listed(stage)
        assert phase_of(stage) is DrainPhase.DRAINED

    def test_then_ctrl_c_drops_it_as_any_evacuation(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        self.a_move(stage)
        drains.begin(stage.ctx, "n1", SPEC)
        drains.cancel(stage.ctx, "n1", "enough")
        assert stage.operations() == []

    def test_one_that_is_granted_before_it_is_dropped_goes_on(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage.add_vm("a", "n1")
        move = self.a_move(stage)

        def late(ctx: Context, key: str, **more: Any) -> VirtualMachineOperation:
            stage.grant()
            return delete_operation(ctx, key, **more)

        monkeypatch.setattr(drains, "delete_operation", late)
        drains.begin(stage.ctx, "n1", SPEC)
        (only,) = stage.operations()
        assert (only.name, only.status.grant is not None) == (move.name, True)
        assert only.metadata.deletion_timestamp is None
        assert stage.store.get(NodeDrain, "n1").vms["default/a"].operation == move.name

    def test_what_waits_to_come_home_is_dropped_by_a_new_drain(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        drains.begin(stage.ctx, "n1", SPEC)
        stage.play(lambda: stage.world.hosts["n1"] == {} and stage.is_at_rest("a"))
        listed(stage)
        drains.uncordon(stage.ctx, "n1", bring_back=True)
        assert [operation.name[:9] for operation in stage.operations() if operation.is_active] == ["return-a-"]
        drains.begin(stage.ctx, "n1", SPEC)
        assert [operation for operation in stage.operations() if operation.is_active] == []
        assert phase_of(stage) is DrainPhase.DRAINED
        drains.uncordon(stage.ctx, "n1", bring_back=True)
        assert [operation.name[:9] for operation in stage.operations() if operation.is_active] == ["return-a-"]


class TestEvictions:
    def test_of_a_cordoned_node_they_are_one_drain(self, stage: Stage) -> None:
        for name in ("a", "b", "c"):
            stage.add_vm(name, "n1")
        set_unschedulable(stage.ctx, "n1", unschedulable=True)
        for name in ("a", "b"):
            assert evict(stage.ctx, f"default/{name}", "n1").state is EvictionState.TRIGGERED
            assert evict(stage.ctx, f"default/{name}", "n1").state is EvictionState.IN_PROGRESS
        drain = stage.store.get(NodeDrain, "n1")
        assert (drain.spec.cause, drain.spec.vms) == (DrainCause.EVICTION, ("default/a", "default/b"))
        stage.play(lambda: stage.is_at_rest("a", "b") and len(stage.world.hosts["n1"]) == 1)
        listed(stage)
        assert phase_of(stage) is DrainPhase.DRAINED
        assert stage.vm("c").status.node_name == "n1", "nobody asked for that one"

    def test_one_that_failed_waits_for_its_time_however_often_it_is_asked_for(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        set_unschedulable(stage.ctx, "n1", unschedulable=True)
        evict(stage.ctx, "default/a", "n1")
        (first,) = stage.operations()
        failed = first.with_status(phase=OperationPhase.FAILED)
        stage.store.must_commit(stage.store.batch().put(first, failed))
        for _ in range(2):
            again = evict(stage.ctx, "default/a", "n1")
            assert again.state is EvictionState.IN_PROGRESS
            assert "1 failed" in again.message
        assert [operation.name for operation in stage.operations()] == [first.name]
        assert stage.store.get(NodeDrain, "n1").vms["default/a"].state is VmState.WAITING

    def test_of_a_node_that_is_drained_anyway_it_is_nothing_new(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        drains.begin(stage.ctx, "n1", SPEC)
        assert evict(stage.ctx, "default/a", "n1").state is EvictionState.IN_PROGRESS
        assert stage.store.get(NodeDrain, "n1").spec == SPEC
        assert len(stage.operations()) == 1


class TestMaintenance:
    def begin(self, stage: Stage, *nodes: str) -> None:
        maintenances.begin(stage.ctx, "m", MaintenanceSpec(nodes=nodes, hook="true"))
        stage.reconcile()  # its drain begins, and ends at once: nothing is there
        stage.reconcile()

    def stage_of(self, stage: Stage, node: str) -> NodeStage:
        return stage.store.get(Maintenance, "m").node(node).stage

    def test_two_who_run_hooks_never_run_the_same(self, stage: Stage) -> None:
        self.begin(stage, "n1")
        assert self.stage_of(stage, "n1") is NodeStage.DRAINED
        assert maintenances.claim_hook(stage.ctx, "m", "one") == "n1"
        assert maintenances.claim_hook(stage.ctx, "m", "two") is None
        assert maintenances.renew_hook(stage.ctx, "m", "n1", "one")
        assert not maintenances.renew_hook(stage.ctx, "m", "n1", "two")
        assert not maintenances.end_hook(stage.ctx, "m", "n1", "two", 0, "")
        assert maintenances.end_hook(stage.ctx, "m", "n1", "one", 0, "x" * 5000)
        node = stage.store.get(Maintenance, "m").node("n1")
        assert (node.stage, len(node.output)) == (NodeStage.RETURNING, 2000)

    def test_no_hook_is_run_on_a_node_that_takes_vms(self, stage: Stage) -> None:
        self.begin(stage, "n1")
        assert self.stage_of(stage, "n1") is NodeStage.DRAINED
        set_unschedulable(stage.ctx, "n1", unschedulable=False)
        assert maintenances.claim_hook(stage.ctx, "m", "one") is None
        stage.reconcile()
        assert stage.store.get(Maintenance, "m").status.phase is MaintenancePhase.PAUSED

    def test_a_node_is_in_one_maintenance_at_a_time_and_a_name_is_one(self, stage: Stage) -> None:
        self.begin(stage, "n1")
        with pytest.raises(Refused, match="node 'n1' is in Maintenance 'm'"):
            maintenances.begin(stage.ctx, "other", MaintenanceSpec(nodes=("n2", "n1"), hook="true"))
        with pytest.raises(Refused, match="about other nodes or another hook"):
            maintenances.begin(stage.ctx, "m", MaintenanceSpec(nodes=("n1",), hook="false"))
        again = maintenances.begin(stage.ctx, "m", MaintenanceSpec(nodes=("n1",), hook="true"))
        assert again.metadata.uid == stage.store.get(Maintenance, "m").metadata.uid
        maintenances.stop(stage.ctx, "m", "enough")
        with pytest.raises(Refused, match="not Paused"):
            maintenances.resume(stage.ctx, "m")
        with pytest.raises(NotFound, match="'n9'"):
            maintenances.begin(stage.ctx, "third", MaintenanceSpec(nodes=("n9",), hook="true"))

    def test_paused_no_hook_is_given_out(self, stage: Stage) -> None:
        self.begin(stage, "n1")
        assert self.stage_of(stage, "n1") is NodeStage.DRAINED
        maintenances.pause(stage.ctx, "m", "lunch")
        assert maintenances.claim_hook(stage.ctx, "m", "one") is None
        maintenances.resume(stage.ctx, "m")
        assert maintenances.claim_hook(stage.ctx, "m", "one") == "n1"
