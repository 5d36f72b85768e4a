"""The life of an operation: each function takes it (and its VM) from one state to the next.

A transition is a value: the new documents, and what is worth telling people. Committing them is the services' part.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import assert_never

from orchestrator.planner.convergence import measured_at_end
from orchestrator.planner.policy import (
    CRASHED,
    RESTARTING,
    START_FAILED,
    STOPPED_BY_NODE,
    STOPPED_BY_OPERATION,
)
from orchestrator.planner.standing import MIGRATING, running_vm, shown_phase, stopped_vm
from orchestrator.resources import (
    Action,
    Condition,
    Grant,
    GrantState,
    OperationPhase,
    OperationType,
    Reading,
    Reason,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
    finalizers,
    find_condition,
    with_condition,
)
from orchestrator.resources.pending import started
from orchestrator.resources.vm import MigrationEndpoint, MigrationState

BACKOFF_S = (0, 1, 2, 5, 10)
"""Waits before the next attempt, by attempts made; the last one goes on."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something to be told as an event about the operation and its VM."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Transition:
    """The next state of an operation and its VM (None: untouched), and what is told of it.

    Attributes:
        ended: Whether the grant ended, so that slots are free.
    """

    operation: VirtualMachineOperation
    vm: VirtualMachine | None = None
    notes: tuple[Note, ...] = ()
    ended: bool = False


def open_grant(operation: VirtualMachineOperation) -> Grant:
    """Give an operation's open grant.

    Raises:
        InvariantBroken: It has none.
    """
    return operation.with_grant().status.grant  # type: ignore[return-value] # with_grant refuses where there is none


def say(
    operation: VirtualMachineOperation, reason: Reason, message: str, now: datetime, *, done: bool = False
) -> VirtualMachineOperation:
    """Set the condition Completed."""
    condition = Condition(type="Completed", status="True" if done else "False", reason=reason, message=message)
    return operation.with_status(conditions=with_condition(operation.status.conditions, condition, now))


def is_said(operation: VirtualMachineOperation, reason: Reason, message: str) -> bool:
    """Whether the condition Completed says that already: nothing is committed to say it again."""
    condition = find_condition(operation.status.conditions, "Completed")
    return condition is not None and condition.reason == reason and condition.message == message


def granted(operation: VirtualMachineOperation, vm: VirtualMachine, grant: Grant, now: datetime) -> Transition:
    """A grant was given. A start makes its incarnation the VM's own in the same commit."""
    status = operation.status
    new = operation.with_status(
        grant=grant,
        attempts=status.attempts + 1,
        progress=max(status.progress, 2),
        source_node=grant.node if grant.action is Action.MIGRATE else "",
        target_node=grant.target,
        not_before=None,
        unschedulable_since=None,
        questions=status.questions and status.questions.with_(open={}, machine=""),
    )
    reason = Reason.MIGRATION_PENDING if grant.action is Action.MIGRATE else in_progress(operation)
    new = say(new, reason, f"granted to node {grant.node}, epoch {grant.epoch}", now)
    match grant.action:
        case Action.MIGRATE:
            return Transition(new)
        case Action.START:
            starting = vm.with_status(
                phase=VmPhase.STARTING,
                node_name=grant.node,
                incarnation=grant.incarnation,
                counter=0,
                elsewhere="",
                not_before=None,
            )
            return Transition(new, started(starting, now))
        case Action.STOP:
            return Transition(new, vm.with_status(phase=shown_phase(vm, VmPhase.STOPPING)))
        case _:
            assert_never(grant.action)


def in_progress(operation: VirtualMachineOperation) -> Reason:
    """The reason of the condition Completed while it is under way."""
    match operation.spec.type:
        case OperationType.START:
            return Reason.START_IN_PROGRESS
        case OperationType.STOP:
            return Reason.STOP_IN_PROGRESS
        case OperationType.RESTART:
            return Reason.RESTART_IN_PROGRESS
        case OperationType.EVICT | OperationType.MIGRATE:
            return Reason.SYNCING
        case _:
            assert_never(operation.spec.type)


def began(operation: VirtualMachineOperation, vm: VirtualMachine | None, now: datetime) -> Transition:
    """The node reported that it took the grant."""
    grant = open_grant(operation)
    new = operation.with_grant(state=GrantState.RUNNING)
    phase = operation.status.phase
    if phase is OperationPhase.PENDING:
        phase = OperationPhase.IN_PROGRESS
    new = new.with_status(phase=phase, started_at=operation.status.started_at or now)
    if operation.status.superseded_by:
        return Transition(new)
    if grant.action is not Action.MIGRATE:
        does = "starts" if grant.action is Action.START else "stops"
        return Transition(say(new, in_progress(operation), f"node {grant.node} {does} it", now))
    new = new.with_status(progress=max(new.status.progress, 3))
    new = say(new, Reason.TARGET_PREPARING, f"node {grant.node} migrates it to {grant.target}", now)
    if vm is None or grant.adopt:
        return Transition(new)  # an adopted migration began before: its VM is Migrating, and was told so
    state = MigrationState(
        start_timestamp=now, source=MigrationEndpoint(node=grant.node), target=MigrationEndpoint(node=grant.target)
    )
    moves = Condition(
        type=MIGRATING, status="True", reason="InProgress", message=f"{operation.name} moves it to node {grant.target}"
    )
    conditions = with_condition(vm.status.conditions, moves, now)
    moving = vm.with_status(phase=VmPhase.MIGRATING, migration_state=state, conditions=conditions)
    note = Note("MigrationStarted", f"migrates from node {grant.node} to {grant.target}")
    return Transition(new, moving, (note,))


def asked(operation: VirtualMachineOperation, problem: str, now: datetime) -> Transition:
    """The guest was asked to power off; nobody waits for it but the control plane's timer.

    One that was superseded meanwhile has nothing more to do: what took its place goes on from there.

    Args:
        operation: A Stop, or a Restart in its first half.
        problem: Why the guest could not be asked; empty when it was. It has its grace period all the same.
        now: For conditions.
    """
    grant = open_grant(operation)
    if operation.status.superseded_by:
        return Transition(_close(operation, OperationPhase.SUPERSEDED, now), ended=True)
    text = f"the guest was asked to power off, and is given {grant.grace_s} s"
    text += f" ({problem})" if problem else ""
    new = say(operation.with_grant(state=GrantState.ASKED), in_progress(operation), text, now)
    sent = Condition(
        type="SignalSent",
        status="False" if problem else "True",
        reason="SignalSentError" if problem else "SignalSentSuccess",
        message=problem,
    )
    conditions = with_condition(new.status.conditions, sent, now)
    return Transition(new.with_status(progress=max(new.status.progress, 10), conditions=conditions))


def superseded(operation: VirtualMachineOperation, by: str, now: datetime) -> VirtualMachineOperation:
    """Another operation takes its place.

    A grant that some worker may act on is cancelled and still has to come to its end; the other one waits for that. One
    whose guest was merely asked to power off ends here.
    """
    new = operation.with_status(phase=OperationPhase.SUPERSEDED, superseded_by=by)
    new = say(new, Reason.SUPERSEDED, f"superseded by {by}", now)
    grant = operation.status.grant
    if grant is None or grant.state is GrantState.ASKED:
        return _close(new, OperationPhase.SUPERSEDED, now)
    return new.with_grant(cancel=True)


def nothing_to_stop(operation: VirtualMachineOperation, vm: VirtualMachine, now: datetime) -> Transition:
    """A Stop of a VM that does not run: what is left is to remember that a person wants it off."""
    message = f"{vm.name} does not run"
    new = _close(operation, OperationPhase.COMPLETED, now).with_status(progress=100)
    new = say(new, Reason.OPERATION_COMPLETED, message, now, done=True)
    return Transition(new, stopped_vm(vm, STOPPED_BY_OPERATION, f"stopped by {operation.name}", vm.status.counter, now))


def nothing_to_move(operation: VirtualMachineOperation, vm: VirtualMachine, now: datetime) -> Transition:
    """A VM that was to leave its node, for the node's sake or the herd's, has stopped meanwhile."""
    new = _close(operation, OperationPhase.COMPLETED, now).with_status(progress=100)
    message = f"{vm.name} does not run any more: there is nothing to move"
    return Transition(say(new, Reason.OPERATION_COMPLETED, message, now, done=True))


def completed(
    operation: VirtualMachineOperation, vm: VirtualMachine | None, reading: Reading, now: datetime
) -> Transition:
    """It runs where it was to run; or, after a stop, nowhere."""
    grant = open_grant(operation)
    if grant.action is Action.STOP:
        return _completed_stop(operation, vm, reading, now)
    late = operation.metadata.deletion_timestamp is not None
    migrates = grant.action is Action.MIGRATE
    message = f"runs on node {grant.target}"
    if late:
        message += "; it was too late to abort"
    new = _close(operation, OperationPhase.COMPLETED, now).with_status(
        progress=100,
        downtime_ms=reading.downtime_ms,
        outcome=measured_at_end(operation.status.outcome, reading) if migrates else None,
        not_before=None,
    )
    if not operation.status.superseded_by:
        new = say(new, Reason.OPERATION_COMPLETED, message, now, done=True)
    moved = vm and running_vm(vm, grant.target, reading, now, succeeded=True if migrates else None)
    if moved is not None and not migrates:
        moved = moved.with_status(started_at=now)
    took = f", guest stopped for {reading.downtime_ms} ms" if reading.downtime_ms is not None else ""
    told = Note("MigrationSucceeded" if migrates else "Started", message + took)
    return Transition(new, moved, (told,), ended=True)


def came_back(
    operation: VirtualMachineOperation,
    vm: VirtualMachine | None,
    reading: Reading,
    why: str,
    now: datetime,
    *,
    retry_limit: int,
) -> Transition:
    """It did not take place: the VM is where it was. Aborted, or tried again, or failed for good.

    Args:
        reading: Of the node on which the VM runs, or, for a start, does not run.
        why: The hypervisor's words, or ours.
        retry_limit: Attempts at all.
    """
    grant = open_grant(operation)
    migrates = grant.action is Action.MIGRATE
    starts = grant.action is Action.START
    back = vm and running_vm(vm, grant.node, reading, now, succeeded=False if migrates else None)
    if vm is not None and starts:
        back = vm.with_status(phase=VmPhase.PENDING, node_name="", counter=0)
    if operation.status.superseded_by:
        return Transition(_close(operation, OperationPhase.SUPERSEDED, now), back, ended=True)
    what = {Action.MIGRATE: "migration", Action.START: "start", Action.STOP: "stop"}[grant.action]
    if grant.revoked and operation.metadata.deletion_timestamp is None:
        return _taken_back(operation, back, now)
    if grant.cancel:
        text = "aborted before it was started" if starts else f"aborted; it runs on node {grant.node}"
        new = say(_close(operation, OperationPhase.FAILED, now), Reason.ABORTED, text, now)
        told = Note("MigrationAborted" if migrates else "StartAborted", text)
        return Transition(new, back, (told,), ended=True)
    if grant.timed_out:
        text = f"{why}; it runs on node {grant.node}"
        new = say(_close(operation, OperationPhase.FAILED, now), Reason.OPERATION_FAILED, text, now)
        return Transition(new, back, (Note("MigrationTimedOut", text, warning=True),), ended=True)
    attempts = operation.status.attempts
    text = f"attempt {attempts} of {retry_limit}: {what} {'to' if migrates else 'on'} node {grant.target} failed: {why}"
    if attempts >= retry_limit:
        if vm is not None and starts:
            back = stopped_vm(vm, START_FAILED, text, 0, now).with_status(node_name="")
        new = say(_close(operation, OperationPhase.FAILED, now), Reason.OPERATION_FAILED, text, now)
        return Transition(new, back, (Note("OperationFailed", text, warning=True),), ended=True)
    wait = BACKOFF_S[min(attempts - 1, len(BACKOFF_S) - 1)]
    avoid = operation.status.avoid
    if grant.target not in avoid and grant.action is not Action.STOP:
        avoid = (*avoid, grant.target)
    new = operation.with_status(
        phase=OperationPhase.PENDING,
        grant=None,
        not_before=now + timedelta(seconds=wait) if wait else None,
        avoid=avoid,
        target_node="",
    )
    if operation.status.phase is OperationPhase.IN_PROGRESS and operation.spec.type is OperationType.RESTART:
        new = new.with_status(phase=OperationPhase.IN_PROGRESS)  # its first half is done
    new = say(new, Reason.MIGRATION_PENDING if migrates else Reason.NOT_READY, text + "; it is tried again", now)
    return Transition(new, back, (Note("AttemptFailed", text, warning=True),), ended=True)


def is_ending(operation: VirtualMachineOperation) -> bool:
    """Whether it is not tried again, whatever kept it: aborted, taken back, or another took its place."""
    grant = open_grant(operation)
    return bool(operation.status.superseded_by or grant.revoked or grant.cancel or grant.timed_out)


def revoked(operation: VirtualMachineOperation, why: str, now: datetime) -> VirtualMachineOperation:
    """The control plane takes an open grant back: its node is told to leave it, or to abort."""
    return say(operation.with_grant(cancel=True, revoked=why), Reason.ABORTED, f"taken back: {why}", now)


def _taken_back(operation: VirtualMachineOperation, vm: VirtualMachine | None, now: datetime) -> Transition:
    """What was taken back did not take place: another node is looked for, unless only that one was wanted.

    It was no attempt that failed, and counts as none.
    """
    grant = open_grant(operation)
    text = f"taken back from node {grant.target}: {grant.revoked}"
    if operation.spec.migrate is not None and operation.spec.migrate.node_name:
        new = say(_close(operation, OperationPhase.FAILED, now), Reason.ABORTED, text, now)
        return Transition(new, vm, (Note("MigrationAborted", text, warning=True),), ended=True)
    halfway = operation.spec.type is OperationType.RESTART and operation.status.phase is OperationPhase.IN_PROGRESS
    new = operation.with_status(
        phase=OperationPhase.IN_PROGRESS if halfway else OperationPhase.PENDING,
        grant=None,
        attempts=max(0, operation.status.attempts - 1),
        target_node="",
    )
    reason = Reason.MIGRATION_PENDING if grant.action is Action.MIGRATE else Reason.NOT_READY
    return Transition(say(new, reason, text, now), vm, (Note("GrantRevoked", text),), ended=True)


def gone(
    operation: VirtualMachineOperation, vm: VirtualMachine | None, why: str, now: datetime, *, by_host: bool = False
) -> Transition:
    """The guest ended in the middle: on neither host.

    Args:
        why: For people.
        by_host: Its source was being shut down, and stopped it.
    """
    new = _close(operation, OperationPhase.FAILED, now)
    why = f"node {open_grant(operation).node} was shut down, and stopped it" if by_host else why
    if not operation.status.superseded_by:
        new = say(new, Reason.ABORTED if by_host else Reason.OPERATION_FAILED, why, now)
    told = Note("GuestEnded", f"the guest ended while it was migrated: {why}", warning=not by_host)
    stopped = vm and stopped_vm(vm, STOPPED_BY_NODE if by_host else CRASHED, why, vm.status.counter, now)
    return Transition(new, stopped, (told,), ended=True)


def failed(operation: VirtualMachineOperation, reason: Reason, message: str, now: datetime) -> Transition:
    """It can't be done; no grant was open."""
    new = say(_close(operation, OperationPhase.FAILED, now), reason, message, now)
    return Transition(new, notes=(Note("OperationFailed", message, warning=True),))


def critical(transition: Transition, message: str) -> Transition:
    """Add a note that a person must see."""
    return replace(transition, notes=(*transition.notes, Note("VirtualMachineRanTwice", message, warning=True)))


def _completed_stop(
    operation: VirtualMachineOperation, vm: VirtualMachine | None, reading: Reading, now: datetime
) -> Transition:
    """It runs no more: a Stop has ended, a Restart goes on with a start."""
    grant = open_grant(operation)
    how = grant.message or ("its plug was pulled" if grant.force else "the guest powered off")
    if operation.spec.type is OperationType.RESTART and not operation.status.superseded_by:
        new = operation.with_status(grant=None, attempts=0, progress=50, target_node="", avoid=())
        new = say(new, Reason.RESTART_IN_PROGRESS, f"stopped on node {grant.node} ({how}); it is started again", now)
        halfway = vm and stopped_vm(vm, RESTARTING, f"restarted by {operation.name}", reading.counter, now)
        running = find_condition(vm.status.conditions, "Running") if vm is not None else None
        if vm is not None and halfway is not None and running is not None and running.reason == CRASHED:
            halfway = halfway.with_status(failures=vm.status.failures)  # what was left of a crash: it counts on
        return Transition(new, halfway, (Note("StoppedForRestart", how),), ended=True)
    new = _close(operation, OperationPhase.COMPLETED, now).with_status(progress=100)
    if not operation.status.superseded_by:
        new = say(new, Reason.OPERATION_COMPLETED, f"stopped on node {grant.node}: {how}", now, done=True)
    stopped = vm and stopped_vm(vm, STOPPED_BY_OPERATION, f"stopped by {operation.name}", reading.counter, now)
    return Transition(new, stopped, (Note("Stopped", how),), ended=True)


def _close(operation: VirtualMachineOperation, phase: OperationPhase, now: datetime) -> VirtualMachineOperation:
    """End it; one that was superseded stays so, whatever came of its grant."""
    meta = operation.metadata.with_(finalizers=finalizers.others(operation.metadata))
    if operation.status.superseded_by:
        phase = OperationPhase.SUPERSEDED
    return operation.with_(metadata=meta).with_status(phase=phase, grant=None, finished_at=now)
