"""What a VM's runPolicy asks for after each kind of stop, and how long it waits."""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner import policy
from orchestrator.planner.observation import ABSENT, observe
from orchestrator.planner.policy import Step, backed_off, backoff, next_step
from orchestrator.planner.standing import stopped_vm
from orchestrator.resources import OperationType, RunPolicy, VirtualMachine, VmPhase, find_condition
from tests.builders import NOW, a_vm, seen

ON, UNLESS = RunPolicy.ALWAYS_ON, RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY
MANUAL, OFF = RunPolicy.MANUAL, RunPolicy.ALWAYS_OFF
STARTS = {
    policy.CRASHED: {ON, UNLESS},
    policy.DESTROYED: {ON, UNLESS},
    policy.STOPPED_BY_NODE: {ON, UNLESS},
    policy.START_FAILED: {ON, UNLESS},
    policy.RESTARTING: {ON, UNLESS, MANUAL},
    policy.POWERED_OFF: {ON},
    policy.STOPPED_BY_OPERATION: {ON},
}


def stopped(run_policy: RunPolicy, reason: str, **status: Any) -> VirtualMachine:
    return stopped_vm(a_vm(policy=run_policy, **status), reason, "why", 11, NOW)


@pytest.mark.parametrize("run_policy", RunPolicy)
@pytest.mark.parametrize("reason", STARTS)
def test_each_stop_under_each_policy(reason: str, run_policy: RunPolicy) -> None:
    vm = stopped(run_policy, reason)
    step = next_step(vm)
    is_to_start = run_policy in STARTS[reason]
    assert (step.type if step else None) == (OperationType.START if is_to_start else None)
    assert vm.status.phase is (VmPhase.PENDING if is_to_start else VmPhase.STOPPED)


@pytest.mark.parametrize(
    ("run_policy", "kind"),
    [(ON, OperationType.RESTART), (UNLESS, OperationType.RESTART), (MANUAL, None), (OFF, OperationType.STOP)],
)
def test_what_is_left_of_a_crash_is_destroyed_before_the_next_start(
    run_policy: RunPolicy, kind: OperationType | None
) -> None:
    crashed = observe(a_vm(policy=run_policy, failures=1), "n1", seen("crashed"), NOW).vm
    assert crashed is not None
    step = next_step(crashed)
    assert (step.type if step else None) is kind
    if step is not None:
        assert step.force
        assert step.not_before == (NOW + timedelta(seconds=10) if kind is OperationType.RESTART else None)


@pytest.mark.parametrize(("run_policy", "starts"), [(ON, True), (UNLESS, True), (MANUAL, False), (OFF, False)])
def test_a_new_vm(run_policy: RunPolicy, starts: bool) -> None:
    assert (next_step(a_vm(policy=run_policy, phase=VmPhase.PENDING, node="")) is not None) == starts


@pytest.mark.parametrize("run_policy", [ON, UNLESS, MANUAL])
def test_one_that_runs_is_left_alone(run_policy: RunPolicy) -> None:
    assert next_step(a_vm(policy=run_policy)) is None


def test_one_that_runs_under_always_off_is_stopped_once() -> None:
    assert next_step(a_vm(policy=OFF)) == Step(OperationType.STOP, None, "its runPolicy is AlwaysOff")
    assert next_step(a_vm(policy=OFF, phase=VmPhase.STOPPING)) is None


@pytest.mark.parametrize("run_policy", RunPolicy)
def test_one_that_is_deleted_is_stopped_and_never_started(run_policy: RunPolicy) -> None:
    vm = a_vm(policy=run_policy, phase=VmPhase.TERMINATING)
    vm = vm.with_(metadata=vm.metadata.with_(deletion_timestamp=NOW))
    step = next_step(vm)
    assert step is not None
    assert step.type is OperationType.STOP
    assert next_step(vm.with_status(phase=VmPhase.STOPPED)) is None


def test_waits_double_from_ten_seconds_to_five_minutes() -> None:
    vm, waits = a_vm(started_at=NOW), []
    for _ in range(9):
        vm = backed_off(vm, policy.CRASHED, NOW)
        waits.append((vm.status.not_before - NOW).total_seconds() if vm.status.not_before else 0)
    assert waits == [0, 10, 20, 40, 80, 160, 300, 300, 300]


def test_one_that_ran_for_long_begins_anew() -> None:
    vm = a_vm(started_at=NOW, failures=6)
    assert backed_off(vm, policy.CRASHED, NOW + policy.STEADY_AFTER).status.failures == 1
    assert backed_off(vm, policy.CRASHED, NOW + timedelta(minutes=9)).status.failures == 7


def test_a_start_that_fails_is_no_steady_run() -> None:
    vm = a_vm(started_at=NOW, failures=2)
    assert backed_off(vm, policy.START_FAILED, NOW + timedelta(days=1)).status.failures == 3


@pytest.mark.parametrize("reason", [policy.STOPPED_BY_NODE, policy.STOPPED_BY_OPERATION, policy.RESTARTING])
def test_what_somebody_asked_for_counts_for_nothing(reason: str) -> None:
    vm = stopped(ON, reason, failures=4, not_before=NOW)
    assert (vm.status.failures, vm.status.not_before) == (0, None)


def test_the_wait_is_said() -> None:
    vm = stopped(UNLESS, policy.CRASHED, started_at=NOW, failures=2)
    running = find_condition(vm.status.conditions, "Running")
    assert running is not None
    assert running.message == "why; 3 times in a row: it is started again after 20 s, at 12:00:20 UTC"
    observation = observe(a_vm(started_at=NOW, failures=2), "n1", seen(ABSENT, reason="crashed"), NOW)
    assert [(n.reason, n.warning) for n in observation.notes] == [("Stopped", True), ("BackOff", True)]


@given(st.integers(min_value=1, max_value=10**6))
def test_a_wait_never_shrinks_and_has_a_limit(failures: int) -> None:
    assert backoff(failures) <= backoff(failures + 1) <= policy.BACKOFF_MOST
