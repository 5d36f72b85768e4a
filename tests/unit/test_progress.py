"""How far a live migration is said to be."""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner import flow, progress, rounds
from orchestrator.resources import (
    GrantState,
    OperationPhase,
    Reason,
    VirtualMachineOperation,
    find_condition,
)
from orchestrator.resources.vmop import MigrationOutcome, Prediction
from tests.builders import NOW, a_grant, a_reading, a_vm, an_operation, granted_operation

LATER = NOW + timedelta(seconds=1)


def said(operation: VirtualMachineOperation) -> str:
    condition = find_condition(operation.status.conditions, "Completed")
    assert condition is not None
    return condition.reason


def running(**status: Any) -> VirtualMachineOperation:
    return granted_operation(state=GrantState.RUNNING).with_status(**status)


def after(operation: VirtualMachineOperation, percent: int, **more: Any) -> VirtualMachineOperation:
    transition = progress.progressed(operation, percent, "figures", LATER, **more)
    return operation if transition is None else transition.operation


counts = st.integers(0, 2**40)
jobs = st.tuples(counts, counts, counts, st.integers(0, 50))


@given(*(st.integers(-(2**70), 2**70) for _ in range(4)))
def test_progress_is_between_10_and_90_whatever_a_node_says(
    processed: int, remaining: int, total: int, iteration: int
) -> None:
    assert 10 <= progress.progress_percent(processed, remaining, total, iteration) <= 90


def test_the_first_pass_gets_at_most_45() -> None:
    assert [progress.progress_percent(p, 100 - p, 100, 1) for p in (0, 50, 100, 250)] == [10, 27, 45, 45]
    assert progress.progress_percent(100, 100, 100, 2) == 45
    assert progress.progress_percent(900, 0, 100, 9) == 90


@given(st.lists(jobs | st.sampled_from(["began", "failed", "adopted"]), max_size=12))
def test_progress_never_falls(steps: list[tuple[int, int, int, int] | str]) -> None:
    """Over any reports, failed attempts and adoptions, as watchers see them."""
    operation = flow.granted(an_operation(), a_vm(), a_grant(), NOW).operation
    shown = [operation.status.progress]
    for step in steps:
        match step:
            case "began":
                operation = flow.began(operation, None, NOW).operation
            case "failed":
                operation = flow.came_back(operation, None, a_reading("running"), "", NOW, retry_limit=99).operation
                operation = flow.granted(operation, a_vm(), a_grant(), NOW).operation
            case "adopted":
                operation = rounds.adopted(rounds.settling(operation, "", kill=True), 5, NOW).operation
            case str():
                raise AssertionError(step)
            case job:
                transition = progress.progressed(operation, progress.progress_percent(*job), "", NOW)
                operation = operation if transition is None else transition.operation
        shown.append(operation.status.progress)
    operation = flow.completed(operation, None, a_reading("running"), NOW).operation
    assert shown == sorted(shown)
    assert shown[-1] <= operation.status.progress == 100


def test_what_is_no_news_is_not_stored() -> None:
    operation = running().with_status(progress=40)
    assert progress.progressed(operation, 40, "", NOW) is None
    assert progress.progressed(operation, 12, "", NOW) is None
    assert progress.progressed(operation, 41, "TimeElapsed=1.0s", NOW) is not None


def seconds(elapsed: float, **more: Any) -> MigrationOutcome:
    return MigrationOutcome(duration_s=elapsed, **more)


class TestFigures:
    def test_they_are_stored_each_ten_seconds_and_with_each_percent(self) -> None:
        operation = running(progress=40)
        operation = flow.say(operation, Reason.SYNCING, "", NOW)
        assert progress.progressed(operation, 40, "", NOW, outcome=seconds(9.9)) is None
        assert after(operation, 41, outcome=seconds(1)).status.outcome == seconds(1)
        stored = after(operation, 40, outcome=seconds(10))
        assert stored.status.outcome == seconds(10)
        assert progress.progressed(stored, 40, "", NOW, outcome=seconds(19)) is None
        assert after(stored, 40, outcome=seconds(20)).status.outcome == seconds(20)

    def test_no_figure_falls(self) -> None:
        operation = running(progress=40, outcome=seconds(5, throttle_percent=60, iterations=7))
        outcome = after(operation, 41, outcome=seconds(6, throttle_percent=20, iterations=2)).status.outcome
        assert outcome == seconds(6, throttle_percent=60, iterations=7)

    def test_the_turn_to_post_copy_is_told_at_once(self) -> None:
        operation = running(progress=40, outcome=seconds(5))
        outcome = after(operation, 40, outcome=seconds(5, post_copy=True)).status.outcome
        assert outcome is not None
        assert outcome.post_copy

    def test_the_end_adds_what_the_target_measured(self) -> None:
        operation = running(outcome=seconds(5, throttle_percent=20))
        reading = a_reading("running", downtime_ms=12, elapsed_ms=5600, transferred_mib=99)
        ended = flow.completed(operation, a_vm(), reading, NOW).operation
        assert ended.status.outcome == seconds(5.6, downtime_ms=12, transferred_mib=99, throttle_percent=20)
        assert ended.status.downtime_ms == 12

    def test_a_new_grant_begins_with_its_own_forecast_and_nothing_measured(self) -> None:
        before = an_operation(outcome=seconds(5), prediction=Prediction(duration_s=1))
        transition = flow.granted(before, a_vm(), a_grant(), NOW)
        status = progress.forecast(transition, Prediction(duration_s=7)).operation.status
        assert (status.prediction, status.outcome) == (Prediction(duration_s=7), None)


class TestConvergence:
    def test_it_is_said_while_it_lasts(self) -> None:
        operation = flow.say(running(progress=60), Reason.SYNCING, "", NOW)
        transition = progress.progressed(operation, 60, "stalled", NOW, converges=False)
        assert transition is not None
        assert said(transition.operation) == Reason.NOT_CONVERGING
        assert [(note.reason, note.warning) for note in transition.notes] == [("MigrationNotConverging", True)]
        lasting = transition.operation
        assert progress.progressed(lasting, 60, "stalled", NOW, converges=False) is None
        more = progress.progressed(lasting, 61, "stalled", NOW, converges=False)
        assert more is not None
        assert (said(more.operation), more.notes) == (Reason.NOT_CONVERGING, ())
        back = progress.progressed(lasting, 60, "goes on", NOW, converges=True)
        assert back is not None
        assert (said(back.operation), back.operation.message, back.notes) == (Reason.SYNCING, "goes on", ())

    @pytest.mark.parametrize("phase", [OperationPhase.TERMINATING, OperationPhase.SUPERSEDED])
    def test_that_it_is_aborted_or_superseded_goes_before(self, phase: OperationPhase) -> None:
        operation = flow.say(running(progress=20, phase=phase), Reason.ABORTED, "being aborted", NOW)
        operation = after(operation, 50, converges=False)
        assert (said(operation), operation.message) == (Reason.ABORTED, "being aborted")
        assert operation.status.progress == 50
        assert progress.progressed(operation, 50, "", NOW, converges=False) is None
        operation = progress.predicted(operation, Prediction(duration_s=1), NOW).operation
        assert said(operation) == Reason.ABORTED

    def test_the_first_figures_of_a_second_attempt_are_told_though_progress_stands(self) -> None:
        operation = flow.say(running(progress=80), Reason.TARGET_PREPARING, "", NOW)
        operation = after(operation, 12)
        assert (said(operation), operation.status.progress) == (Reason.SYNCING, 80)


class TestSwitchOver:
    def test_both_hosts_tell(self) -> None:
        operation = flow.say(running(progress=88), Reason.SYNCING, "", NOW)
        suspended = progress.switched_over(operation, at_target=False, now=NOW)
        assert suspended is not None
        assert (said(suspended.operation), suspended.operation.status.progress) == (Reason.SOURCE_SUSPENDED, 91)
        resumed = progress.switched_over(suspended.operation, at_target=True, now=NOW)
        assert resumed is not None
        assert (said(resumed.operation), resumed.operation.status.progress) == (Reason.TARGET_RESUMED, 92)
        assert resumed.operation.message == "the guest runs on node n2"
        assert progress.switched_over(resumed.operation, at_target=False, now=NOW) is None

    def test_figures_that_come_later_do_not_take_it_back(self) -> None:
        operation = flow.say(running(progress=91), Reason.SOURCE_SUSPENDED, "", NOW)
        operation = after(operation, 90, outcome=seconds(60), converges=False)
        assert (said(operation), operation.status.progress) == (Reason.SOURCE_SUSPENDED, 91)


class TestTimedOut:
    def test_it_fails_for_good_at_the_first_attempt_and_the_vm_runs_on(self) -> None:
        operation = granted_operation(state=GrantState.RUNNING, timed_out=True)
        why = "aborted after 40 s: it did not complete in its time (20 s per GiB x 2 GiB)"
        transition = flow.came_back(operation, a_vm(), a_reading("running"), why, NOW, retry_limit=5)
        assert transition.ended
        status = transition.operation.status
        assert (status.phase, said(transition.operation)) == (OperationPhase.FAILED, Reason.OPERATION_FAILED)
        assert transition.operation.message == f"{why}; it runs on node n1"
        assert transition.vm is not None
        assert transition.vm.status.node_name == "n1"
        assert [note.reason for note in transition.notes] == ["MigrationTimedOut"]

    def test_an_abort_that_was_asked_for_meanwhile_is_an_abort(self) -> None:
        operation = granted_operation(state=GrantState.RUNNING, timed_out=True, cancel=True)
        transition = flow.came_back(operation, a_vm(), a_reading("running"), "", NOW, retry_limit=5)
        assert said(transition.operation) == Reason.ABORTED

    def test_a_job_that_goes_on_all_the_same_is_under_its_deadlines_anew(self) -> None:
        operation = granted_operation(state=GrantState.RUNNING, timed_out=True)
        grant = rounds.adopted(rounds.settling(operation, "", kill=True), 7, NOW).operation.status.grant
        assert grant is not None
        assert not grant.timed_out
