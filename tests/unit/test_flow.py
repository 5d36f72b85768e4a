"""The life of an operation."""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InvariantBroken
from orchestrator.planner import flow, rounds
from orchestrator.resources import (
    Action,
    GrantState,
    OperationPhase,
    OperationType,
    OrderKind,
    Reason,
    VirtualMachineOperation,
    VmPhase,
    find_condition,
)
from tests.builders import NOW, a_grant, a_reading, a_vm, an_operation, granted_operation

LATER = NOW + timedelta(minutes=1)


def said(operation: VirtualMachineOperation) -> str:
    condition = find_condition(operation.status.conditions, "Completed")
    assert condition is not None
    return condition.reason


def running(**grant: Any) -> VirtualMachineOperation:
    return granted_operation(state=GrantState.RUNNING, **grant)


def cancelled(operation: VirtualMachineOperation) -> VirtualMachineOperation:
    meta = operation.metadata.with_(deletion_timestamp=NOW)
    return operation.with_(metadata=meta).with_grant(cancel=True).with_status(phase=OperationPhase.TERMINATING)


def test_whether_a_guest_could_be_asked_to_power_off_is_said() -> None:
    operation = an_operation(kind=OperationType.STOP)
    operation = flow.granted(operation, a_vm(), a_grant(action=Action.STOP), NOW).operation
    for problem, expected in (
        ("", ("True", "SignalSentSuccess", "")),
        ("its QEMU hangs", ("False", "SignalSentError", "its QEMU hangs")),
    ):
        new = flow.asked(operation, problem, NOW).operation
        condition = find_condition(new.status.conditions, "SignalSent")
        assert condition is not None
        assert (condition.status, condition.reason, condition.message) == expected
        assert problem in new.message


class TestMigration:
    def test_a_grant_names_its_nodes_and_leaves_the_vm_alone(self) -> None:
        transition = flow.granted(an_operation(unschedulable_since=NOW, not_before=NOW), a_vm(), a_grant(), NOW)
        status = transition.operation.status
        assert (status.phase, status.progress, status.attempts) == (OperationPhase.PENDING, 2, 1)
        assert (status.source_node, status.target_node) == ("n1", "n2")
        assert (status.unschedulable_since, status.not_before) == (None, None)
        assert transition.vm is None

    def test_the_nodes_report_begins_it(self) -> None:
        transition = flow.began(granted_operation(), a_vm(), NOW)
        assert transition.operation.status.phase is OperationPhase.IN_PROGRESS
        assert transition.operation.status.started_at == NOW
        assert transition.vm is not None
        assert transition.vm.status.phase is VmPhase.MIGRATING
        assert transition.vm.status.migration_state is not None
        assert transition.vm.status.migration_state.target.node == "n2"
        assert [note.reason for note in transition.notes] == ["MigrationStarted"]

    def test_its_source_shows_that_it_came_back(self) -> None:
        vm = flow.began(granted_operation(), a_vm(), NOW).vm
        assert vm is not None
        back = flow.came_back(running(), vm, a_reading("running"), "failed", LATER, retry_limit=5).vm
        assert back is not None
        condition = find_condition(back.status.conditions, "Migrating")
        assert condition is not None
        assert (condition.status, condition.reason) == ("False", "Failed")

    def test_a_second_attempt_keeps_the_time_of_the_first(self) -> None:
        operation = granted_operation().with_status(started_at=NOW)
        assert flow.began(operation, a_vm(), LATER).operation.status.started_at == NOW

    def test_an_operation_that_is_being_aborted_does_not_become_in_progress(self) -> None:
        operation = cancelled(granted_operation())
        assert flow.began(operation, a_vm(), NOW).operation.status.phase is OperationPhase.TERMINATING

    def test_the_end_on_the_target_completes_it(self) -> None:
        vm = flow.began(granted_operation(), a_vm(), NOW).vm
        transition = flow.completed(running(), vm, a_reading("running", counter=33, downtime_ms=41), LATER)
        operation, moved = transition.operation, transition.vm
        assert transition.ended
        assert (operation.status.phase, operation.status.progress) == (OperationPhase.COMPLETED, 100)
        assert (said(operation), operation.message) == (Reason.OPERATION_COMPLETED, "runs on node n2")
        assert (operation.status.downtime_ms, operation.status.finished_at) == (41, LATER)
        assert operation.status.grant is None
        assert operation.metadata.finalizers == ()
        assert moved is not None
        assert (moved.status.phase, moved.status.node_name, moved.status.counter) == (VmPhase.RUNNING, "n2", 33)
        assert moved.status.migration_state is not None
        assert moved.status.migration_state.result == "Succeeded"
        assert "41 ms" in transition.notes[0].message

    def test_a_guest_that_is_paused_there_arrives_paused(self) -> None:
        vm = flow.completed(running(), a_vm(), a_reading("paused"), NOW).vm
        assert vm is not None
        assert vm.status.phase is VmPhase.PAUSE

    def test_an_abort_that_came_too_late_is_said(self) -> None:
        operation = flow.completed(cancelled(running()), a_vm(), a_reading("running"), NOW).operation
        assert operation.status.phase is OperationPhase.COMPLETED
        assert operation.message == "runs on node n2; it was too late to abort"

    def test_an_abort_in_time_ends_on_the_source(self) -> None:
        vm = a_vm(phase=VmPhase.MIGRATING)
        transition = flow.came_back(cancelled(running()), vm, a_reading("running"), "aborted", NOW, retry_limit=5)
        assert transition.ended
        assert transition.operation.status.phase is OperationPhase.FAILED
        assert said(transition.operation) == Reason.ABORTED
        assert transition.vm is not None
        assert (transition.vm.status.phase, transition.vm.status.node_name) == (VmPhase.RUNNING, "n1")
        assert [note.reason for note in transition.notes] == ["MigrationAborted"]

    def test_a_guest_on_neither_host_fails_it_and_is_a_crash(self) -> None:
        transition = flow.gone(running(), a_vm(elsewhere="n2"), "source absent, target absent", NOW)
        assert transition.operation.status.phase is OperationPhase.FAILED
        assert transition.vm is not None
        assert (transition.vm.status.phase, transition.vm.status.elsewhere) == (VmPhase.PENDING, "")
        condition = find_condition(transition.vm.status.conditions, "Running")
        assert condition is not None
        assert condition.reason == "Crashed"  # so a VM that is to run is started again

    def test_a_guest_that_its_hosts_shutdown_stopped_is_no_crash(self) -> None:
        transition = flow.gone(running(), a_vm(), "source absent, target absent", NOW, by_host=True)
        assert transition.operation.message == "node n1 was shut down, and stopped it"
        assert transition.vm is not None
        condition = find_condition(transition.vm.status.conditions, "Running")
        assert condition is not None
        assert (condition.reason, transition.vm.status.failures) == ("StoppedByNode", 0)
        assert not any(note.warning for note in transition.notes)

    def test_a_vm_whose_record_is_gone_stops_nothing(self) -> None:
        assert flow.began(granted_operation(), None, NOW).vm is None
        assert flow.completed(running(), None, a_reading("running"), NOW).ended
        assert flow.came_back(running(), None, a_reading("running"), "no", NOW, retry_limit=1).ended
        assert flow.gone(running(), None, "gone", NOW).ended

    def test_without_a_grant_there_is_nothing_to_begin_or_end(self) -> None:
        with pytest.raises(InvariantBroken, match="default/op has no open grant"):
            flow.began(an_operation(), a_vm(), NOW)


class TestRetries:
    @pytest.mark.parametrize(("attempts", "wait"), [(1, 0), (2, 1), (3, 2), (4, 5), (5, 10), (9, 10)])
    def test_it_backs_off(self, attempts: int, wait: int) -> None:
        operation = running().with_status(attempts=attempts)
        transition = flow.came_back(operation, a_vm(), a_reading("running"), "no route", NOW, retry_limit=10)
        status = transition.operation.status
        assert transition.ended  # slots are free
        assert (status.phase, status.grant) == (OperationPhase.PENDING, None)
        assert status.not_before == (NOW + timedelta(seconds=wait) if wait else None)
        assert status.avoid == ("n2",)
        assert status.target_node == ""
        assert f"attempt {attempts} of 10: migration to node n2 failed: no route" in transition.operation.message

    def test_the_last_attempt_fails_it_for_good(self) -> None:
        operation = running().with_status(attempts=5)
        transition = flow.came_back(operation, a_vm(), a_reading("running"), "no route", NOW, retry_limit=5)
        assert transition.operation.status.phase is OperationPhase.FAILED
        assert said(transition.operation) == Reason.OPERATION_FAILED
        assert transition.vm is not None
        assert transition.vm.status.node_name == "n1"

    def test_targets_to_avoid_are_kept_once(self) -> None:
        operation = running().with_status(avoid=("n3", "n2"))
        status = flow.came_back(operation, a_vm(), a_reading("running"), "", NOW, retry_limit=5).operation.status
        assert status.avoid == ("n3", "n2")

    @given(st.integers(1, 8), st.integers(1, 8))
    def test_attempts_never_exceed_the_limit(self, limit: int, made: int) -> None:
        operation = running().with_status(attempts=made)
        phase = flow.came_back(
            operation, a_vm(), a_reading("running"), "", NOW, retry_limit=limit
        ).operation.status.phase
        assert phase is (OperationPhase.FAILED if made >= limit else OperationPhase.PENDING)


class TestStart:
    def test_a_grant_makes_its_incarnation_the_vms_own(self) -> None:
        vm = a_vm(node="", phase=VmPhase.STOPPED, incarnation=3, counter=99)
        grant = a_grant(node="n2", action=Action.START, incarnation=4)
        transition = flow.granted(an_operation(), vm, grant, NOW)
        assert transition.vm is not None
        status = transition.vm.status
        assert (status.phase, status.node_name, status.incarnation) == (VmPhase.STARTING, "n2", 4)
        assert status.counter == 0  # that node counts for itself

    def test_one_that_did_not_take_place_leaves_the_vm_nowhere(self) -> None:
        vm = a_vm(phase=VmPhase.STARTING)
        operation = running(action=Action.START)
        transition = flow.came_back(operation, vm, a_reading(), "no disk", NOW, retry_limit=5)
        assert transition.vm is not None
        assert (transition.vm.status.phase, transition.vm.status.node_name) == (VmPhase.PENDING, "")
        assert transition.operation.status.phase is OperationPhase.PENDING

    def test_an_aborted_one_does_not_claim_that_it_runs(self) -> None:
        operation = cancelled(running(action=Action.START))
        transition = flow.came_back(operation, a_vm(phase=VmPhase.STARTING), a_reading(), "", NOW, retry_limit=5)
        assert said(transition.operation) == Reason.ABORTED
        assert "runs on" not in transition.operation.message

    def test_done(self) -> None:
        transition = flow.completed(
            running(action=Action.START), a_vm(phase=VmPhase.STARTING), a_reading("running"), NOW
        )
        assert transition.vm is not None
        assert transition.vm.status.phase is VmPhase.RUNNING
        assert transition.vm.status.migration_state is None
        assert [note.reason for note in transition.notes] == ["Started"]


class TestSettling:
    def test_both_hosts_are_asked_and_only_the_holder_is_killed(self) -> None:
        operation = rounds.settling(granted_operation(), "suspect", kill=True)
        grant = operation.status.grant
        assert grant is not None
        assert grant.settlement is not None
        assert {node: order.kind for node, order in grant.settlement.orders.items()} == {
            "n1": OrderKind.KILL_AND_READ,
            "n2": OrderKind.READ,
        }

    def test_the_nodes_copy_of_the_grant_is_withdrawn(self) -> None:
        operation = granted_operation()
        assert operation.node_grant is not None
        assert rounds.settling(operation, "suspect", kill=True).node_grant is None

    def test_each_round_has_new_ids(self) -> None:
        ids: set[str] = set()
        for count in (1, 2, 3):
            grant = rounds.settling(granted_operation(), "", kill=False, rounds=count).status.grant
            assert grant is not None
            assert grant.settlement is not None
            ids |= {order.id for order in grant.settlement.orders.values()}
        assert len(ids) == 6

    def test_a_start_asks_one_host(self) -> None:
        grant = rounds.settling(granted_operation(action=Action.START), "", kill=True).status.grant
        assert grant is not None
        assert grant.settlement is not None
        assert list(grant.settlement.orders) == ["n1"]

    def test_adoption_is_a_new_epoch_of_the_same_grant(self) -> None:
        before = rounds.settling(cancelled(running()), "suspect", kill=True)
        after = rounds.adopted(before, 9, LATER).operation
        grant = after.status.grant
        assert grant is not None
        assert (grant.epoch, grant.state, grant.adopt, grant.settlement) == (9, GrantState.GRANTED, True, None)
        assert grant.cancel  # an abort that was asked for stays asked for
        assert (grant.node, grant.target) == ("n1", "n2")


def test_the_same_is_said_once() -> None:
    operation = flow.say(an_operation(), Reason.MIGRATION_PENDING, "waits", NOW)
    assert flow.is_said(operation, Reason.MIGRATION_PENDING, "waits")
    assert not flow.is_said(operation, Reason.MIGRATION_PENDING, "waits for n1")
    assert not flow.is_said(operation, Reason.NOT_READY, "waits")
