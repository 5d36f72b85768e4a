"""What a VM's runPolicy asks for now, and when: pure, from what is on record.

A stop is told apart by the reason of the condition Running. One that nobody asked for (a crash, a plug that was pulled
behind our back, the node's own doing) is followed by a start, unless the policy is Manual. A guest that powers itself
off stays off, unless the policy is AlwaysOn. A VM that ends again and again waits longer each time.

A guest that crashed may leave its domain behind (on_crash=preserve). That is a crash like another, but the VM occupies
its node until the node has destroyed the domain: so it is restarted, by force, and not started.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from orchestrator.resources import OperationType, RunPolicy, VirtualMachine, VmPhase, find_condition
from orchestrator.resources.pending import restarts_by_itself

BACKOFF_FIRST = timedelta(seconds=10)
BACKOFF_MOST = timedelta(minutes=5)
STEADY_AFTER = timedelta(minutes=10)
"""A VM that ran for so long has not failed in a row."""

CRASHED, DESTROYED, STOPPED_BY_NODE = "Crashed", "Destroyed", "StoppedByNode"
POWERED_OFF, STOPPED_BY_OPERATION = "GuestPoweredOff", "StoppedByOperation"
RESTARTING, START_FAILED, NODE_FENCED = "Restarting", "StartFailed", "NodeFenced"
STORAGE_LOCKED, EVIDENCE_CONTRADICTED = "StorageLocked", "EvidenceContradicted"
"""Reasons of the condition Running, once it is False."""

_NOT_BY_HAND = frozenset({CRASHED, DESTROYED, STOPPED_BY_NODE, RESTARTING, START_FAILED, NODE_FENCED})
_FAILURES = frozenset({CRASHED, DESTROYED, POWERED_OFF, START_FAILED})
"""What counts for the back-off. A node's own doing does not: the VM is started elsewhere, or when its node is back."""


@dataclass(frozen=True, slots=True)
class Step:
    """What the policy asks for.

    Attributes:
        type: Start, Stop, or Restart.
        not_before: When; None is now.
        why: For people.
        force: Whether the guest is not asked to power off: it could not hear it.
    """

    type: OperationType
    not_before: datetime | None
    why: str
    force: bool = False


def next_step(vm: VirtualMachine) -> Step | None:
    """Say what is to be done to a VM on which no operation is open; None when all is as it is wanted."""
    if vm.status.adoption is not None:
        return None  # it is between its host and us
    if vm.metadata.deletion_timestamp is not None:
        return Step(OperationType.STOP, None, "it is being deleted") if vm.status.phase.occupies_node else None
    policy = vm.spec.run_policy
    if policy is RunPolicy.ALWAYS_OFF:
        why = f"its runPolicy is {policy}"
        return Step(OperationType.STOP, None, why, force=has_crashed(vm)) if _runs(vm) else None
    if has_crashed(vm):
        if policy is RunPolicy.MANUAL or vm.status.elsewhere:
            return None  # what is left of it may be looked at, until a person restarts or stops it
        why = f"it crashed, and its runPolicy is {policy}: what is left of it is destroyed first"
        return Step(OperationType.RESTART, vm.status.not_before, why, force=True)
    if is_to_start(vm):
        return Step(OperationType.START, vm.status.not_before, f"its runPolicy is {policy}")
    if vm.status.restart_awaiting_changes and vm.status.phase is VmPhase.RUNNING and restarts_by_itself(vm):
        return Step(OperationType.RESTART, None, "its changes wait for a restart, and restartApprovalMode is Automatic")
    return None


def is_to_start(vm: VirtualMachine) -> bool:
    """Whether it does not run, and its policy wants it to (now, or after its back-off)."""
    if vm.status.phase.occupies_node or vm.metadata.deletion_timestamp is not None:
        return False
    if vm.status.recovery is not None and vm.status.recovery.held:
        return False  # what a lock says of it is a person's to judge
    running = find_condition(vm.status.conditions, "Running")
    match vm.spec.run_policy:
        case RunPolicy.ALWAYS_ON:
            return True
        case RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY:
            return running is None or running.reason in _NOT_BY_HAND
        case RunPolicy.MANUAL:
            # A restart is one wish, not two: its second half is not dropped with its operation.
            return running is not None and running.reason == RESTARTING
        case RunPolicy.ALWAYS_OFF:
            return False


def has_crashed(vm: VirtualMachine) -> bool:
    """Whether its guest crashed while its host keeps the domain: it runs nothing, and occupies its node."""
    running = find_condition(vm.status.conditions, "Running")
    is_there = vm.status.phase in {VmPhase.DEGRADED, VmPhase.TERMINATING}
    return is_there and running is not None and running.reason == CRASHED


def backed_off(vm: VirtualMachine, reason: str, now: datetime) -> VirtualMachine:
    """Count a stop that nobody asked for, and set when the VM may be started again.

    The first is followed by a start at once; then 10 s, doubling up to 5 min, until the VM has run for 10 min.

    Args:
        vm: Just stopped.
        reason: Of its condition Running.
        now: Of the stop.
    """
    if reason not in _FAILURES:
        return vm.with_status(failures=0, not_before=None)
    since = vm.status.started_at
    is_steady = reason != START_FAILED and since is not None and now - since >= STEADY_AFTER
    failures = 1 if is_steady else vm.status.failures + 1
    wait = backoff(failures)
    return vm.with_status(failures=failures, not_before=now + wait if wait else None)


def backoff(failures: int) -> timedelta:
    """Give the wait before the next start after so many failures in a row, >= 1."""
    if failures <= 1:
        return timedelta()
    doublings = min(failures - 2, 10)
    return min(BACKOFF_FIRST * (1 << doublings), BACKOFF_MOST)


def _runs(vm: VirtualMachine) -> bool:
    return vm.status.phase.occupies_node and vm.status.phase is not VmPhase.STOPPING
