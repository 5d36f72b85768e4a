"""What a drain comes to next."""

from datetime import timedelta
from typing import Any

import pytest

from orchestrator.planner.draining import BACKOFF_MOST, Scene, backoff, next_step, sent_home
from orchestrator.resources import (
    Action,
    Condition,
    GrantState,
    Node,
    NodeDrain,
    ObjectMeta,
    OperationPhase,
    OperationType,
    Priority,
    Reason,
    RunPolicy,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
)
from orchestrator.resources.drain import (
    DRAIN_ANNOTATION,
    STRATEGY_ANNOTATION,
    DrainCause,
    DrainPhase,
    DrainSpec,
    DrainStatus,
    VmDrain,
    VmState,
)
from orchestrator.resources.vmop import PRIORITY_ANNOTATION
from tests.builders import NOW, a_node, a_vm, an_operation, granted_operation, some_needs

TIED = some_needs(obstacles=("host device pci 0000:06:02.0",))


def a_drain(phase: DrainPhase = DrainPhase.DRAINING, vms: dict[str, VmDrain] | None = None, **spec: Any) -> NodeDrain:
    timeout_s = spec.get("timeout_s", 0)
    return NodeDrain(
        metadata=ObjectMeta(name="n1"),
        spec=DrainSpec(**spec),
        status=DrainStatus(
            phase=phase,
            started_at=NOW,
            deadline_at=NOW + timedelta(seconds=timeout_s) if timeout_s else None,
            vms=vms or {},
        ),
    )


def a_scene(drain: NodeDrain, *vms: VirtualMachine, after_s: float = 0, **more: Any) -> Scene:
    defaults: dict[str, Any] = {
        "node": a_node("n1", cordoned=True),
        "operations": {},
        "ended": {},
        "inbound": (),
        "shown": frozenset(vm.key for vm in vms if vm.status.node_name == "n1"),
    }
    return Scene(drain=drain, vms={vm.key: vm for vm in vms}, now=NOW + timedelta(seconds=after_s), **(defaults | more))


def failed(name: str, vm: str, reason: Reason, message: str) -> VirtualMachineOperation:
    said = Condition(type="Completed", status="False", reason=reason, message=message)
    return an_operation(name, vm, phase=OperationPhase.FAILED, conditions=(said,))


MOVING = VmDrain(state=VmState.MOVING, operation="evacuation-a-1", memory_mib=1024)


class TestLeaving:
    def test_the_largest_goes_first_and_each_that_matches_goes(self) -> None:
        small, large = a_vm("a", memory="1Gi", labels={"tier": "web"}), a_vm("b", memory="4Gi", labels={"tier": "web"})
        other = a_vm("c", labels={"tier": "db"})
        step = next_step(a_scene(a_drain(selector="tier=web"), small, large, other))
        assert [(one.vm.name, one.type) for one in step.begin] == [
            ("b", OperationType.EVICT),
            ("a", OperationType.EVICT),
        ]
        assert set(step.drain.vms) == {"default/a", "default/b"}

    def test_nothing_new_is_no_news(self) -> None:
        vm, operation = a_vm("a"), an_operation("evacuation-a-1", "a")
        scene = a_scene(a_drain(vms={"default/a": MOVING}), vm, operations={"default/a": operation})
        first = next_step(scene)
        again = next_step(a_scene(first.drain, vm, operations={"default/a": operation}))
        assert again.drain == first.drain
        assert not again.begin

    def test_one_that_moves_already_is_not_asked_again(self) -> None:
        moving = an_operation("evict-a", "a", phase=OperationPhase.IN_PROGRESS)
        step = next_step(a_scene(a_drain(), a_vm("a", phase=VmPhase.MIGRATING), operations={"default/a": moving}))
        assert step.begin == ()
        assert step.drain.vms["default/a"].operation == "evict-a"

    @pytest.mark.parametrize(
        ("name", "priority"),
        [
            ("rebalance-a", Priority.PLACEMENT),
            ("firmware-update-a", Priority.BALANCE),
            ("return-a", Priority.MAINTENANCE),  # to the node of another drain
        ],
    )
    def test_a_move_that_waits_for_its_turn_gives_way_to_an_evacuation(self, name: str, priority: Priority) -> None:
        waits = an_operation(name, "a", kind=OperationType.MIGRATE, priority=priority)
        first = next_step(a_scene(a_drain(), a_vm("a"), operations={"default/a": waits}))
        assert first.drop == (waits,)
        assert first.begin == ()
        marked = waits.with_(metadata=waits.metadata.with_(deletion_timestamp=NOW))
        meanwhile = next_step(a_scene(first.drain, a_vm("a"), operations={"default/a": marked}))
        assert (meanwhile.drop, meanwhile.begin, meanwhile.drain) == ((), (), first.drain)
        then = next_step(a_scene(first.drain, a_vm("a")))
        assert [one.vm.name for one in then.begin] == ["a"]
        assert then.drain.vms["default/a"].failures == 0

    def test_one_that_was_granted_goes_on_and_is_waited_for(self) -> None:
        granted = granted_operation("rebalance-a", "a", node="n1", target="n2")
        granted = granted.with_(metadata=granted.metadata.with_(annotations={PRIORITY_ANNOTATION: "3"}))
        step = next_step(a_scene(a_drain(), a_vm("a"), operations={"default/a": granted}))
        assert (step.drop, step.begin) == ((), ())
        assert step.drain.vms["default/a"].operation == "rebalance-a"

    def test_a_persons_own_move_is_waited_for_though_it_has_not_begun(self) -> None:
        evict = an_operation("evict-a", "a")
        step = next_step(a_scene(a_drain(), a_vm("a"), operations={"default/a": evict}))
        assert (step.drop, step.drain.vms["default/a"].operation) == ((), "evict-a")

    def test_one_that_is_being_stopped_is_waited_for(self) -> None:
        stop = an_operation("stop-a", "a", kind=OperationType.STOP)
        step = next_step(a_scene(a_drain(), a_vm("a", phase=VmPhase.STOPPING), operations={"default/a": stop}))
        assert step.drain.vms["default/a"].state is VmState.WAITING
        assert "waits for the end of stop-a" in step.drain.status.message

    @pytest.mark.parametrize("phase", [VmPhase.PAUSE, VmPhase.STARTING])
    def test_only_a_running_one_migrates(self, phase: VmPhase) -> None:
        step = next_step(a_scene(a_drain(), a_vm("a", phase=phase)))
        assert step.begin == ()
        assert f"a (is {phase.value}" in step.drain.status.message

    def test_evictions_are_about_the_vms_that_they_name(self) -> None:
        drain = a_drain(cause=DrainCause.EVICTION, every=False)
        drain = drain.with_(spec=drain.spec.with_(vms=("default/a",)))
        step = next_step(a_scene(drain, a_vm("a"), a_vm("b")))
        assert [one.vm.name for one in step.begin] == ["a"]

    def test_before_a_host_goes_down_those_that_are_to_run_on_go_first(self) -> None:
        node = a_node("n1")
        down = Condition(type="ShuttingDown", status="True", reason="HostShutdown")
        node = node.with_status(conditions=(*node.status.conditions, down))
        vms = [
            a_vm("manual", memory="1Gi", policy=RunPolicy.MANUAL),
            a_vm("always", memory="4Gi", policy=RunPolicy.ALWAYS_ON),
        ]
        step = next_step(a_scene(a_drain(cause=DrainCause.HOST_SHUTDOWN), *vms, node=node))
        assert [one.vm.name for one in step.begin] == ["always", "manual"]


class TestEnd:
    def test_an_empty_node_is_drained(self) -> None:
        gone = a_vm("a", node="n2")
        done = an_operation("evacuation-a-1", "a", phase=OperationPhase.COMPLETED, target_node="n2")
        step = next_step(a_scene(a_drain(vms={"default/a": MOVING}), gone, ended={"default/a": done}))
        assert step.drain.status.phase is DrainPhase.DRAINED
        assert step.drain.vms["default/a"] == MOVING.with_(
            state=VmState.LEFT, target="n2", moved=True, left_at=NOW, message="moved to node n2"
        )

    def test_not_while_its_host_shows_a_copy(self) -> None:
        gone = a_vm("a", node="n2")
        step = next_step(a_scene(a_drain(), gone, shown=frozenset({"default/a"})))
        assert step.drain.status.phase is DrainPhase.DRAINING
        assert "still shows a" in step.drain.status.message

    def test_not_while_one_is_on_its_way_there_which_is_taken_back(self) -> None:
        inbound = granted_operation("evict-b", "b", node="n2", target="n1", state=GrantState.RUNNING)
        step = next_step(a_scene(a_drain(), inbound=(inbound,)))
        assert step.revoke == (inbound,)
        assert step.drain.status.phase is DrainPhase.DRAINING
        marked = inbound.with_grant(cancel=True)
        assert next_step(a_scene(a_drain(), inbound=(marked,))).revoke == ()

    @pytest.mark.parametrize(("state", "is_revoked"), [(GrantState.GRANTED, True), (GrantState.RUNNING, False)])
    def test_a_start_is_taken_back_if_it_has_not_begun(self, state: GrantState, is_revoked: bool) -> None:
        start = granted_operation("start-a", "a", node="n1", target="n1", action=Action.START, state=state)
        start = start.with_(spec=start.spec.with_(type=OperationType.START))
        vm = a_vm("a", phase=VmPhase.STARTING)
        step = next_step(a_scene(a_drain(), vm, operations={"default/a": start}))
        assert (step.revoke == (start,)) is is_revoked

    def test_a_node_that_is_uncordoned_ends_it_and_drops_what_has_not_begun(self) -> None:
        vms = {"default/a": MOVING, "default/b": MOVING.with_(operation="evacuation-b-1")}
        ours = {DRAIN_ANNOTATION: "n1"}
        pending, running = (
            an_operation("evacuation-a-1", "a"),
            an_operation("evacuation-b-1", "b", phase=OperationPhase.IN_PROGRESS),
        )
        operations = {op.vm_key: op.with_(metadata=op.metadata.with_(annotations=ours)) for op in (pending, running)}
        node = a_node("n1")
        step = next_step(a_scene(a_drain(vms=vms), a_vm("a"), a_vm("b"), operations=operations, node=node))
        assert step.drain.status.phase is DrainPhase.CANCELLED
        assert [operation.name for operation in step.drop] == ["evacuation-a-1"]

    def test_a_persons_own_evict_is_not_dropped(self) -> None:
        evict = an_operation("evict-a", "a")
        drain = a_drain(DrainPhase.CANCELLED, vms={"default/a": MOVING.with_(operation="evict-a")})
        assert next_step(a_scene(drain, a_vm("a"), operations={"default/a": evict})).drop == ()

    def test_at_its_deadline_it_has_failed(self) -> None:
        step = next_step(a_scene(a_drain(timeout_s=60), a_vm("a", phase=VmPhase.PAUSE), after_s=60))
        assert step.drain.status.phase is DrainPhase.FAILED
        assert step.drain.status.message.startswith("drain-failed: not empty after 60 s: 1 of 1 VMs to go")

    def test_it_is_told_once_that_it_takes_long(self) -> None:
        vm = a_vm("a", phase=VmPhase.PAUSE)
        early = next_step(a_scene(a_drain(), vm))
        assert early.next_at == NOW + timedelta(hours=1)
        late = next_step(a_scene(early.drain, vm, after_s=3600))
        assert [note.reason for note in late.notes] == ["NodeEvacuationStuck"]
        assert next_step(a_scene(late.drain, vm, after_s=3700)).notes == ()

    def test_a_node_out_of_the_herd_is_left_alone(self) -> None:
        drain = a_drain(vms={"default/a": MOVING})
        assert next_step(a_scene(drain, node=None)).drain == drain


class TestFailures:
    def test_the_delay_grows(self) -> None:
        assert [backoff(n).total_seconds() for n in range(1, 8)] == [10, 20, 40, 80, 160, 300, 300]
        assert backoff(1000) == BACKOFF_MOST

    def test_a_failed_one_waits_and_is_then_asked_for_anew(self) -> None:
        end = failed("evacuation-a-1", "a", Reason.OPERATION_FAILED, "QEMU died")
        scene = a_scene(a_drain(vms={"default/a": MOVING}), a_vm("a"), ended={"default/a": end})
        step = next_step(scene)
        assert step.begin == ()
        assert step.drain.vms["default/a"].not_before == step.next_at == NOW + timedelta(seconds=10)
        assert "1 failed: QEMU died" in step.drain.status.message
        later = next_step(a_scene(step.drain, a_vm("a"), after_s=10))
        assert [one.vm.name for one in later.begin] == ["a"]
        assert later.drain.vms["default/a"].failures == 1

    def test_one_that_was_deleted_by_hand_counts_as_failed(self) -> None:
        step = next_step(a_scene(a_drain(vms={"default/a": MOVING}), a_vm("a")))
        assert "evacuation-a-1 was deleted" in step.drain.vms["default/a"].message

    def test_one_that_was_superseded_does_not(self) -> None:
        end = an_operation("evacuation-a-1", "a", phase=OperationPhase.SUPERSEDED)
        step = next_step(a_scene(a_drain(vms={"default/a": MOVING}), a_vm("a"), ended={"default/a": end}))
        assert [one.vm.name for one in step.begin] == ["a"]

    def test_one_that_was_never_made_does_not(self) -> None:
        drain = a_drain(vms={"default/a": MOVING.with_(operation="")})
        step = next_step(a_scene(drain, a_vm("a")))
        assert step.drain.vms["default/a"].failures == 0
        assert [one.vm.name for one in step.begin] == ["a"]


class TestStrategy:
    def test_one_that_cant_migrate_is_named_once_and_waited_for(self) -> None:
        vm = a_vm("a", needs=TIED)
        step = next_step(a_scene(a_drain(), vm))
        assert step.begin == ()
        assert step.drain.vms["default/a"].state is VmState.STAYS
        assert "host device pci" in step.drain.status.message
        assert [note.reason for note in step.notes] == ["EvacuationBlocked"]
        assert next_step(a_scene(step.drain, vm)).notes == ()

    @pytest.mark.parametrize(
        ("word", "kind"), [("ShutDown", OperationType.RESTART), ("shutdown", None), ("Wait", None)]
    )
    def test_its_owners_word_is_obeyed(self, word: str, kind: OperationType | None) -> None:
        vm = a_vm("a", needs=TIED, annotations={STRATEGY_ANNOTATION: word})
        begin = next_step(a_scene(a_drain(), vm)).begin
        assert [one.type for one in begin] == ([kind] if kind else [])

    @pytest.mark.parametrize(
        ("reason", "is_shut_down"), [(Reason.TARGET_UNSCHEDULABLE, True), (Reason.OPERATION_FAILED, False)]
    )
    def test_no_room_shuts_it_down_and_a_failed_migration_never_does(self, reason: Reason, is_shut_down: bool) -> None:
        vm = a_vm("a", annotations={STRATEGY_ANNOTATION: "ShutDown"})
        end = failed("evacuation-a-1", "a", reason, "why")
        step = next_step(a_scene(a_drain(vms={"default/a": MOVING}), vm, ended={"default/a": end}))
        assert [one.type for one in step.begin] == ([OperationType.RESTART] if is_shut_down else [])

    def test_a_host_that_shuts_down_does_it_itself(self) -> None:
        node = a_node("n1")
        down = Condition(type="ShuttingDown", status="True", reason="HostShutdown")
        node = node.with_status(conditions=(*node.status.conditions, down))
        vm = a_vm("a", needs=TIED, annotations={STRATEGY_ANNOTATION: "ShutDown"})
        assert next_step(a_scene(a_drain(cause=DrainCause.HOST_SHUTDOWN), vm, node=node)).begin == ()


class TestReturn:
    LEFT = VmDrain(state=VmState.LEFT, target="n2", moved=True, operation="evacuation-a-1")

    def home(self, *vms: VirtualMachine, entries: dict[str, VmDrain], **more: Any) -> Any:
        drain = sent_home(a_drain(DrainPhase.UNCORDONED, vms=entries), NOW)
        return next_step(a_scene(drain, *vms, node=a_node("n1"), **more))

    def test_what_it_moved_comes_back(self) -> None:
        step = self.home(a_vm("a", node="n2"), entries={"default/a": self.LEFT})
        assert [(one.type, one.to) for one in step.begin] == [(OperationType.MIGRATE, "n1")]

    @pytest.mark.parametrize("entry", [LEFT.with_(moved=False), LEFT.with_(target="")])
    def test_what_went_otherwise_does_not(self, entry: VmDrain) -> None:
        step = self.home(a_vm("a", node="n2"), entries={"default/a": entry})
        assert step.begin == ()
        assert step.drain.status.phase is DrainPhase.RETURNED

    def test_what_was_moved_on_since_stays_and_is_named(self) -> None:
        step = self.home(a_vm("a", node="n3"), entries={"default/a": self.LEFT})
        assert step.begin == ()
        assert "a (went to node n3 since)" in step.drain.status.message

    def test_one_that_did_not_come_is_not_tried_again(self) -> None:
        entry = self.LEFT.with_(state=VmState.RETURNING, operation="return-a-1")
        drain = a_drain(DrainPhase.RETURNING, vms={"default/a": entry})
        end = failed("return-a-1", "a", Reason.TARGET_UNSCHEDULABLE, "no node fits")
        step = next_step(a_scene(drain, a_vm("a", node="n2"), node=a_node("n1"), ended={"default/a": end}))
        assert step.drain.status.phase is DrainPhase.RETURNED
        assert step.drain.vms["default/a"].message == "no node fits"

    def test_a_new_drain_drops_what_has_not_begun_and_keeps_the_rest_in_sight(self) -> None:
        entry = self.LEFT.with_(state=VmState.RETURNING)
        names = ("waits", "comes", "asks")
        entries = {f"default/{name}": entry.with_(operation=f"return-{name}") for name in names[:2]}
        waits = an_operation("return-waits", "waits", kind=OperationType.MIGRATE)
        comes = granted_operation("return-comes", "comes", node="n2", target="n1", state=GrantState.RUNNING)
        vms = [a_vm(name, node="n2") for name in names]
        step = next_step(
            a_scene(
                a_drain(vms={**entries, "default/asks": entry}),
                *vms,
                operations={"default/waits": waits, "default/comes": comes},
                inbound=(comes,),
            )
        )
        assert (step.drop, step.revoke) == ((waits,), (comes,))
        assert step.drain.status.phase is DrainPhase.DRAINING
        assert set(step.drain.left()) == {"default/waits", "default/comes"}
        ended = next_step(a_scene(step.drain, *vms))
        assert ended.drain.status.phase is DrainPhase.DRAINED
        assert all(vm.moved and vm.target == "n2" for vm in ended.drain.vms.values()), "they may still be brought home"

    def test_one_that_arrives_all_the_same_is_moved_again(self) -> None:
        entry = self.LEFT.with_(state=VmState.RETURNING, operation="return-a")
        done = an_operation("return-a", "a", kind=OperationType.MIGRATE, phase=OperationPhase.COMPLETED)
        step = next_step(a_scene(a_drain(vms={"default/a": entry}), a_vm("a"), ended={"default/a": done}))
        assert [(one.vm.name, one.type) for one in step.begin] == [("a", OperationType.EVICT)]

    def test_a_cordon_ends_it(self) -> None:
        entry = self.LEFT.with_(state=VmState.RETURNING)
        step = next_step(a_scene(a_drain(DrainPhase.RETURNING, vms={"default/a": entry}), a_vm("a", node="n2")))
        assert step.drain.status.phase is DrainPhase.CANCELLED
        assert step.drain.vms["default/a"].state is VmState.LEFT


def test_its_node_says_when_it_takes_vms_again() -> None:
    node: Node = a_node("n1")
    assert next_step(a_scene(a_drain(DrainPhase.DRAINED), node=node)).drain.status.phase is DrainPhase.UNCORDONED
