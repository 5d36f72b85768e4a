"""Stops, restarts, what supersedes what, deletion, and policies: the real services on a real Redis, over fake hosts."""

from collections.abc import Iterator
from datetime import timedelta

import pytest

from orchestrator.errors import Refused
from orchestrator.queues import Message, Task
from orchestrator.resources import (
    GrantState,
    Node,
    NodeDrain,
    OperationPhase,
    OperationType,
    Reason,
    RunPolicy,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
    find_condition,
)
from orchestrator.resources.drain import VmState
from orchestrator.resources.grant import NodeGrant
from orchestrator.services import operations, vms
from orchestrator.services.housekeeping import remove_old_operations
from orchestrator.services.nodes import set_unschedulable
from orchestrator.store import keys
from tests.builders import a_vm
from tests.fakes import Stage

START, STOP, RESTART = OperationType.START, OperationType.STOP, OperationType.RESTART
EVICT = OperationType.EVICT


@pytest.fixture
def stage(redis_url: str) -> Iterator[Stage]:
    stage = Stage(redis_url)
    stage.add_nodes("n1", "n2", "n3")
    yield stage
    stage.close()


def ask(stage: Stage, kind: OperationType, vm: str = "a", *, force: bool | None = None) -> VirtualMachineOperation:
    return operations.create_operation(stage.ctx, operations.new_operation(vm, kind, force=force))


def deliver(stage: Stage) -> Message:
    """Grant what is pending; the one message that is sent is brought, and what the node reports is read."""
    (message,) = stage.grant()
    stage.deliver(message)
    stage.read()
    return message


def settle(stage: Stage, *old: VirtualMachineOperation) -> list[OperationPhase]:
    """Let everything come to its end."""
    stage.play(lambda: all(not stage.operation(o).is_open for o in old))
    return [stage.operation(o).status.phase for o in old]


def reason_of(resource: VirtualMachine | VirtualMachineOperation, kind: str) -> str:
    condition = find_condition(resource.status.conditions, kind)
    assert condition is not None
    return condition.reason


def assert_nothing_is_held(stage: Stage) -> None:
    redis = stage.store.redis
    assert redis.hlen(keys.OPEN_GRANTS) == redis.hlen(keys.ACTIVE_OPERATIONS) == redis.scard(keys.SLOTS_CLUSTER) == 0
    assert redis.zcard(keys.DEADLINES) == redis.zcard(keys.AWAITING) == 0
    assert all(redis.hlen(keys.grants(node)) == redis.hlen(keys.orders(node)) == 0 for node in stage.nodes)


class TestStop:
    def test_the_guest_is_asked_and_nobody_waits_for_it(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        stop = ask(stage, STOP)
        deliver(stage)
        asked = stage.operation(stop)
        assert asked.status.grant is not None
        assert asked.status.grant.state is GrantState.ASKED
        assert (asked.status.phase, reason_of(asked, "Completed")) == (OperationPhase.IN_PROGRESS, "StopInProgress")
        assert reason_of(asked, "SignalSent") == "SignalSentSuccess"
        assert stage.vm("a").status.phase is VmPhase.STOPPING
        assert stage.store.redis.zscore(keys.DEADLINES, stop.key) is None  # no worker that could be suspect
        stage.nodes["n1"].power_off(vm.metadata.uid)
        stage.read()
        assert settle(stage, stop) == [OperationPhase.COMPLETED]
        assert stage.vm("a").status.phase is VmPhase.STOPPED
        assert reason_of(stage.vm("a"), "Running") == "StoppedByOperation"
        stage.reconcile()
        assert len(stage.operations()) == 1  # stopped by hand: it stays so
        assert_nothing_is_held(stage)

    def test_a_guest_that_does_not_obey_has_its_plug_pulled_when_its_time_is_over(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        stop = ask(stage, STOP)
        deliver(stage)
        stage.reconcile()
        assert stage.world.running(vm.metadata.uid) == ["n1"]
        stage.expire(keys.AWAITING, stop.key)
        stage.reconcile()
        assert settle(stage, stop) == [OperationPhase.COMPLETED]
        assert stage.operation(stop).message.endswith("it did not power off within 60 s: its plug was pulled")
        assert stage.world.running(vm.metadata.uid) == []
        assert_nothing_is_held(stage)

    def test_by_force_its_plug_is_pulled_at_once(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        stop = ask(stage, STOP, force=True)
        deliver(stage)
        assert stage.world.running(vm.metadata.uid) == []
        assert settle(stage, stop) == [OperationPhase.COMPLETED]

    def test_a_report_that_was_read_before_the_stop_does_not_bring_it_back(self, stage: Stage) -> None:
        """The agent reads, the plug is pulled and the settlement answered, and only then the agent reports."""
        vm = stage.add_vm("a", "n1")
        began, read = stage.nodes["n1"].store.counter(), stage.nodes["n1"].describe(vm.metadata.uid)
        stop = ask(stage, STOP, force=True)
        deliver(stage)
        assert settle(stage, stop) == [OperationPhase.COMPLETED]
        late = {"uuid": vm.metadata.uid, "domain": read | {"addresses": ["192.0.2.7"]}, "began": began}
        stage.nodes["n1"].store.report("Domain", late)
        stage.nodes["n1"].tell(vm.metadata.uid, "destroyed")
        stage.read()
        stage.reconcile()
        assert stage.vm("a").status.phase is VmPhase.STOPPED
        assert reason_of(stage.vm("a"), "Running") == "StoppedByOperation"
        assert len(stage.operations()) == 1

    def test_news_of_a_copy_that_went_before_it_was_ever_reported_changes_nothing(self, stage: Stage) -> None:
        vm = vms.create_vm(stage.ctx, a_vm("a", policy=RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY))
        assert settle(stage, *stage.operations()) == [OperationPhase.COMPLETED]
        node = stage.nodes[stage.vm("a").status.node_name]
        stop = ask(stage, STOP, force=True)
        assert settle(stage, stop) == [OperationPhase.COMPLETED]
        node.store.report("Domain", {"uuid": vm.metadata.uid, "domain": None, "detail": "", "reason": "", "ran": True})
        node.tell(vm.metadata.uid, "destroyed")
        stage.read()
        stage.reconcile()
        assert reason_of(stage.vm("a"), "Running") == "StoppedByOperation"
        assert len(stage.operations()) == 2

    def test_a_guest_that_went_before_it_was_told_to_have_been_asked(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        stop = ask(stage, STOP)
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.nodes["n1"].power_off(vm.metadata.uid)
        stage.nodes["n1"].ask(grant)
        stage.read()
        assert settle(stage, stop) == [OperationPhase.COMPLETED]
        assert_nothing_is_held(stage)

    def test_a_worker_that_died_before_it_asked_is_followed_by_another(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        stop = ask(stage, STOP)
        (message,) = stage.grant()
        assert stage.nodes["n1"].begin(message) is not None  # and no more of it
        stage.read()
        stage.expire(keys.DEADLINES, stop.key)
        stage.reconcile()
        stage.play(lambda: (g := stage.operation(stop).status.grant) is not None and g.state is GrantState.ASKED)
        assert "kill the holder on n1" in stage.world.calls
        stage.nodes["n1"].power_off(vm.metadata.uid)
        stage.read()
        assert settle(stage, stop) == [OperationPhase.COMPLETED]
        assert_nothing_is_held(stage)

    def test_a_doubled_message_asks_once(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        ask(stage, STOP)
        message = deliver(stage)
        assert stage.deliver(message) is False

    def test_a_vm_that_waits_for_its_start_is_off_at_once(self, stage: Stage) -> None:
        vms.create_vm(stage.ctx, a_vm("a"))
        (start,) = stage.operations()
        stop = ask(stage, STOP)
        stage.grant()
        assert stage.operation(start).status.phase is OperationPhase.SUPERSEDED
        assert stage.operation(stop).status.phase is OperationPhase.COMPLETED
        assert stage.vm("a").status.phase is VmPhase.STOPPED
        stage.reconcile()
        assert len(stage.operations()) == 2
        assert_nothing_is_held(stage)

    def test_it_can_not_be_taken_back(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        stop = ask(stage, STOP)
        deliver(stage)
        operations.delete_operation(stage.ctx, stop.key)
        stage.nodes["n1"].power_off(vm.metadata.uid)
        stage.read()
        stage.play(lambda: stage.operations() == [])
        assert stage.vm("a").status.phase is VmPhase.STOPPED
        assert_nothing_is_held(stage)

    def test_always_on_refuses_it_and_starts_again_after_a_poweroff(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1", policy=RunPolicy.ALWAYS_ON)
        with pytest.raises(Refused, match="NotApplicableForVirtualMachineRunPolicy"):
            ask(stage, STOP)
        stage.nodes["n1"].power_off(vm.metadata.uid)
        stage.read()
        stage.play(lambda: stage.is_at_rest("a"))
        assert stage.vm("a").status.incarnation == 2

    def test_a_node_that_is_not_ready_is_waited_for(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        stage.nodes["n1"].store.report("HypervisorLost", {"message": "gone"})
        stage.read()
        stop = ask(stage, STOP, force=True)
        assert stage.grant() == []
        assert stage.operation(stop).message == "waits for node n1, which is not Ready"


class TestRestart:
    def test_it_is_a_stop_and_a_start_of_one_operation(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1", policy=RunPolicy.MANUAL)
        restart = ask(stage, RESTART)
        deliver(stage)
        stage.nodes["n1"].power_off(vm.metadata.uid)
        stage.read()
        assert settle(stage, restart) == [OperationPhase.COMPLETED]
        assert stage.is_at_rest("a")
        assert stage.vm("a").status.incarnation == 2
        assert [call.split()[0] for call in stage.world.calls] == ["stop", "start"]
        assert_nothing_is_held(stage)

    def test_by_force(self, stage: Stage) -> None:
        stage.add_vm("a", "n1", policy=RunPolicy.ALWAYS_ON)
        restart = ask(stage, RESTART, force=True)
        assert settle(stage, restart) == [OperationPhase.COMPLETED]
        assert stage.vm("a").status.incarnation == 2

    def test_one_that_is_deleted_half_way_leaves_the_start_to_the_policy(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1", policy=RunPolicy.MANUAL)
        restart = ask(stage, RESTART, force=True)
        deliver(stage)
        stage.nodes["n1"].answer()
        stage.read()
        assert stage.operation(restart).status.grant is None
        operations.delete_operation(stage.ctx, restart.key)
        stage.reconcile()
        stage.play(lambda: stage.is_at_rest("a"))
        assert stage.world.running(vm.metadata.uid)
        assert stage.vm("a").status.incarnation == 2


class TestSuperseding:
    @pytest.mark.parametrize("new", [(STOP, None), (STOP, True), (RESTART, None), (RESTART, True)])
    @pytest.mark.parametrize("when", ["pending", "sent", "begun"])
    def test_a_migration_gives_way_to_any_stop(
        self, stage: Stage, new: tuple[OperationType, bool | None], when: str
    ) -> None:
        vm = stage.add_vm("a", "n1")
        evict = stage.evict("a")
        messages = stage.grant() if when != "pending" else []
        grant = stage.nodes["n1"].begin(messages[0]) if when == "begun" else None
        stage.read()
        other = ask(stage, new[0], force=new[1])
        shown = stage.operation(evict)
        assert (shown.status.phase, reason_of(shown, "Completed")) == (OperationPhase.SUPERSEDED, Reason.SUPERSEDED)
        if when == "sent":
            assert stage.grant() == []  # it waits for the grant's end
            assert stage.operation(other).message == f"waits for the end of operation {evict.name}, which it superseded"
            grant = stage.nodes["n1"].begin(messages[0])
            assert grant is not None
            assert grant.cancel
        if grant is not None:
            stage.nodes["n1"].fall_back(grant)
            stage.nodes["n1"].end(grant, "aborted")
            stage.read()
        stage.play(lambda: not stage.operation(evict).is_open)
        assert stage.operation(evict).status.phase is OperationPhase.SUPERSEDED
        stage.play(lambda: not stage.operation(other).is_active or is_asked(stage, other))
        if is_asked(stage, other):
            stage.nodes["n1"].power_off(vm.metadata.uid)
            stage.read()
        assert settle(stage, other) == [OperationPhase.COMPLETED]
        assert bool(stage.world.running(vm.metadata.uid)) == (new[0] is RESTART)
        assert_nothing_is_held(stage)

    @pytest.mark.parametrize("new", [STOP, RESTART])
    @pytest.mark.parametrize("old", [STOP, RESTART])
    def test_force_takes_the_place_of_a_guest_that_was_asked(
        self, stage: Stage, old: OperationType, new: OperationType
    ) -> None:
        vm = stage.add_vm("a", "n1")
        first = ask(stage, old)
        deliver(stage)
        second = ask(stage, new, force=True)
        assert not stage.operation(first).is_open
        assert settle(stage, first, second) == [OperationPhase.SUPERSEDED, OperationPhase.COMPLETED]
        assert bool(stage.world.running(vm.metadata.uid)) == (new is RESTART)
        assert_nothing_is_held(stage)

    def test_force_waits_for_a_worker_that_is_about_to_ask(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        first = ask(stage, STOP)
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.read()
        second = ask(stage, RESTART, force=True)
        assert stage.grant() == []
        stage.nodes["n1"].ask(grant)
        stage.read()
        assert settle(stage, first, second) == [OperationPhase.SUPERSEDED, OperationPhase.COMPLETED]
        assert stage.is_at_rest("a")
        assert_nothing_is_held(stage)

    def test_a_start_under_way_is_stopped_after_it(self, stage: Stage) -> None:
        vms.create_vm(stage.ctx, a_vm("a"))
        (start,) = stage.operations()
        (message,) = stage.grant()
        node = stage.nodes[message.queue.split(".")[1]]
        grant = node.begin(message)
        assert grant is not None
        stage.read()
        stop = ask(stage, STOP, force=True)
        node.end(grant)
        stage.read()
        assert settle(stage, start, stop) == [OperationPhase.SUPERSEDED, OperationPhase.COMPLETED]
        assert stage.vm("a").status.phase is VmPhase.STOPPED
        assert_nothing_is_held(stage)

    @pytest.mark.parametrize(
        ("old", "new"),
        [((STOP, True), (STOP, True)), ((STOP, None), (STOP, None)), ((RESTART, None), (STOP, None))],
    )
    def test_else_the_first_has_to_finish(
        self, stage: Stage, old: tuple[OperationType, bool | None], new: tuple[OperationType, bool | None]
    ) -> None:
        stage.add_vm("a", "n1")
        first = ask(stage, old[0], force=old[1])
        with pytest.raises(Refused, match=f"Previously created operation '{first.name}' should finish first"):
            ask(stage, new[0], force=new[1])
        assert len(stage.operations()) == 1

    def test_one_that_is_being_aborted_still_blocks(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        evict = stage.evict("a")
        stage.grant()
        operations.delete_operation(stage.ctx, evict.key)
        with pytest.raises(Refused, match="should finish first"):
            ask(stage, STOP)

    def test_deleting_a_superseded_one_waits_for_its_grant(self, stage: Stage) -> None:
        evict, grant = superseded_by_a_stop(stage)
        operations.delete_operation(stage.ctx, evict.key)
        assert stage.operation(evict).status.phase is OperationPhase.SUPERSEDED
        come_to_its_end(stage, grant)
        assert evict.key not in [o.key for o in stage.operations()]
        assert_nothing_is_held(stage)

    def test_housekeeping_leaves_a_superseded_one_until_its_grant_has_ended(self, stage: Stage) -> None:
        """What it holds is not free before its hosts have told how it ended, however long that takes."""
        evict, grant = superseded_by_a_stop(stage)
        old = stage.operation(evict)
        assert (old.is_active, old.is_open) == (False, True)
        long_ago = old.metadata.with_(creation_timestamp=stage.store.now() - timedelta(hours=25))
        stage.store.must_commit(stage.store.batch().put(old, old.with_(metadata=long_ago)))
        assert remove_old_operations(stage.ctx) == 0
        come_to_its_end(stage, grant)
        assert remove_old_operations(stage.ctx) == 1
        assert_nothing_is_held(stage)


def superseded_by_a_stop(stage: Stage) -> tuple[VirtualMachineOperation, NodeGrant]:
    """An evict that was under way when its VM was to be stopped, and its grant, which is open still."""
    stage.add_vm("a", "n1")
    evict = stage.evict("a")
    (message,) = stage.grant()
    grant = stage.nodes["n1"].begin(message)
    assert grant is not None
    stage.read()
    ask(stage, STOP, force=True)
    return evict, grant


def come_to_its_end(stage: Stage, grant: NodeGrant) -> None:
    """The evict falls back, and the stop is carried out."""
    stage.nodes["n1"].fall_back(grant)
    stage.nodes["n1"].end(grant, "aborted")
    stage.read()
    stage.play(lambda: stage.vm("a").status.phase is VmPhase.STOPPED)


def is_asked(stage: Stage, operation: VirtualMachineOperation) -> bool:
    grant = stage.operation(operation).status.grant
    return grant is not None and grant.state is GrantState.ASKED


class TestDeletion:
    def test_a_vm_that_runs_is_stopped_and_removed(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1", policy=RunPolicy.ALWAYS_ON)
        vms.delete_vm(stage.ctx, vm.key)
        assert stage.vm("a").status.phase is VmPhase.TERMINATING
        deliver(stage)
        assert stage.vm("a").status.phase is VmPhase.TERMINATING
        stage.nodes["n1"].power_off(vm.metadata.uid)
        stage.read()
        stage.play(lambda: stage.store.find(VirtualMachine, vm.key) is None)
        assert_nothing_is_held(stage)

    def test_one_that_does_not_run_is_removed_at_once(self, stage: Stage) -> None:
        vm = vms.create_vm(stage.ctx, a_vm("a", policy=RunPolicy.MANUAL))
        assert stage.vm("a").status.phase is VmPhase.STOPPED
        vms.delete_vm(stage.ctx, vm.key)
        assert stage.store.find(VirtualMachine, vm.key) is None

    def test_what_is_under_way_gives_way(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        evict = stage.evict("a")
        vms.delete_vm(stage.ctx, vm.key)
        assert stage.operation(evict).status.phase is OperationPhase.SUPERSEDED
        deliver(stage)
        stage.nodes["n1"].power_off(vm.metadata.uid)
        stage.read()
        stage.play(lambda: stage.store.find(VirtualMachine, vm.key) is None)
        assert_nothing_is_held(stage)

    def test_one_that_waits_for_its_start_goes_with_it(self, stage: Stage) -> None:
        vm = vms.create_vm(stage.ctx, a_vm("a"))
        vms.delete_vm(stage.ctx, vm.key)
        stage.play(lambda: stage.store.find(VirtualMachine, vm.key) is None)
        assert not any(domains for domains in stage.world.hosts.values())
        assert_nothing_is_held(stage)


def test_always_off_stops_what_runs(stage: Stage) -> None:
    vm = stage.add_vm("a", "n1", policy=RunPolicy.ALWAYS_OFF)
    stage.reconcile()
    deliver(stage)
    stage.nodes["n1"].power_off(vm.metadata.uid)
    stage.read()
    stage.play(lambda: stage.vm("a").status.phase is VmPhase.STOPPED)
    stage.reconcile()
    assert [o.spec.type for o in stage.operations()] == [STOP]


def test_a_node_is_granted_only_as_many_starts_as_it_works_at(stage: Stage) -> None:
    for node in ("n2", "n3"):
        set_unschedulable(stage.ctx, node, unschedulable=True)
    for number in range(7):
        vms.create_vm(stage.ctx, a_vm(f"vm-{number}", cores=1))
    messages = stage.grant()
    assert [message.task for message in messages] == [Task.NODE_START] * 4
    waiting = [o for o in stage.operations() if o.status.grant is None]
    assert {o.message for o in waiting} == {"waits for a node that fits: each starts as many as it may at a time"}
    for message in messages:
        stage.deliver(message)
    stage.read()
    stage.play(lambda: stage.is_at_rest(*(f"vm-{number}" for number in range(7))))


class TestHostShutdown:
    def begins(self, stage: Stage, node: str, *, begins: bool = True) -> None:
        stage.nodes[node].store.report("HostShutdown", {"begins": begins})
        stage.read()

    def test_its_vms_leave_and_nothing_comes(self, stage: Stage) -> None:
        for name in ("a", "b"):
            stage.add_vm(name, "n1")
        self.begins(stage, "n1")
        assert sorted(o.name.rpartition("-")[0] for o in stage.operations()) == ["evacuation-a", "evacuation-b"]
        stage.play(lambda: stage.world.hosts["n1"] == {} and stage.is_at_rest("a", "b"))
        vms.create_vm(stage.ctx, a_vm("c"))
        stage.play(lambda: stage.is_at_rest("c"))
        assert stage.vm("c").status.node_name != "n1"
        self.begins(stage, "n1", begins=False)
        assert stage.store.get(Node, "n1").is_schedulable

    def test_what_could_not_leave_is_stopped_as_the_nodes_doing_and_runs_again(self, stage: Stage) -> None:
        for node in ("n2", "n3"):
            set_unschedulable(stage.ctx, node, unschedulable=True)
        vms = [stage.add_vm(name, "n1", policy=policy) for name, policy in zip("abc", POLICIES, strict=True)]
        self.begins(stage, "n1")
        stage.grant()
        for vm in vms:
            stage.nodes["n1"].power_off(vm.metadata.uid)
        stage.read()
        assert {reason_of(stage.vm(name), "Running") for name in "abc"} == {"StoppedByNode"}
        stage.reconcile()
        stage.grant()
        assert not any(stage.world.running(vm.metadata.uid) for vm in vms)
        self.begins(stage, "n1", begins=False)
        stage.play(lambda: stage.is_at_rest("a", "b"))
        assert stage.vm("c").status.phase is VmPhase.STOPPED  # Manual
        assert stage.vm("a").status.failures == 0

    def test_an_evacuation_that_failed_is_asked_for_again(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        self.begins(stage, "n1")
        (first,) = stage.operations()
        failed = first.with_status(phase=OperationPhase.FAILED)
        stage.store.must_commit(stage.store.batch().put(first, failed))
        stage.reconcile()
        assert [o.name for o in stage.operations()] == [first.name], "not at once"
        drain = stage.store.get(NodeDrain, "n1")
        (vm,) = drain.vms.values()
        assert (vm.state, vm.failures) == (VmState.WAITING, 1)
        waited = drain.with_status(vms={"default/a": vm.with_(not_before=drain.status.started_at)})
        stage.store.must_commit(stage.store.batch().put(drain, waited))
        stage.reconcile()
        stage.play(lambda: stage.world.hosts["n1"] == {} and stage.is_at_rest("a"))


POLICIES = (RunPolicy.ALWAYS_ON, RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY, RunPolicy.MANUAL)
