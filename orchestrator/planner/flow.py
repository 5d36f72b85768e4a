"""The life of an operation: each function takes it (and its VM) from one state to the next.

A transition is a value: the new documents, and what is worth telling people. Committing them is the services' part.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from orchestrator.resources import (
    Action,
    Condition,
    Grant,
    GrantState,
    OperationPhase,
    Order,
    OrderKind,
    Reading,
    Reason,
    Settlement,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
    find_condition,
    with_condition,
)
from orchestrator.resources.vm import MigrationEndpoint, MigrationState

BACKOFF_S = (0, 1, 2, 5, 10)
"""Waits before the next attempt, by attempts made; the last one goes on."""

HASTY_ROUNDS = 6
"""So many rounds of a settlement follow each other as fast as the hosts answer: a switch-over takes fewer."""
RESTS_S = (2, 5, 10, 30)
"""Waits before each later round; the last one goes on, until the world or a person has changed something."""

PROGRESS_SYNCING = (10, 90)
BULK_COPY_MAX = 45


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
    reason = Reason.MIGRATION_PENDING if grant.action is Action.MIGRATE else Reason.START_IN_PROGRESS
    new = operation.with_status(
        grant=grant,
        attempts=status.attempts + 1,
        progress=max(status.progress, 2),
        source_node=grant.node if grant.action is Action.MIGRATE else "",
        target_node=grant.target,
        not_before=None,
        unschedulable_since=None,
    )
    new = say(new, reason, f"granted to node {grant.node}, epoch {grant.epoch}", now)
    if grant.action is Action.MIGRATE:
        return Transition(new)
    starting = vm.with_status(
        phase=VmPhase.STARTING, node_name=grant.node, incarnation=grant.incarnation, counter=0, elsewhere=""
    )
    return Transition(new, starting)


def began(operation: VirtualMachineOperation, vm: VirtualMachine | None, now: datetime) -> Transition:
    """The node reported that it took the grant."""
    grant = _grant(operation)
    new = operation.with_grant(state=GrantState.RUNNING)
    phase = operation.status.phase
    if phase is not OperationPhase.TERMINATING:
        phase = OperationPhase.IN_PROGRESS
    new = new.with_status(phase=phase, started_at=operation.status.started_at or now)
    if grant.action is Action.START:
        return Transition(say(new, Reason.START_IN_PROGRESS, f"node {grant.node} starts it", now))
    new = new.with_status(progress=max(new.status.progress, 3))
    new = say(new, Reason.TARGET_PREPARING, f"node {grant.node} migrates it to {grant.target}", now)
    if vm is None or grant.adopt:
        return Transition(new)  # an adopted migration began before: its VM is Migrating, and was told so
    state = MigrationState(
        start_timestamp=now, source=MigrationEndpoint(node=grant.node), target=MigrationEndpoint(node=grant.target)
    )
    moving = vm.with_status(phase=VmPhase.MIGRATING, migration_state=state)
    note = Note("MigrationStarted", f"migrates from node {grant.node} to {grant.target}")
    return Transition(new, moving, (note,))


def progress_percent(processed: int, remaining: int, total: int, iteration: int) -> int:
    """Give the progress of a live migration, 10 to 90 whatever a node says; the first pass gets at most 45.

    Args:
        processed: Bytes sent so far.
        remaining: Bytes left in this pass.
        total: Bytes of the guest's memory (and copied disks).
        iteration: Passes so far; 0 or 1 is the first.
    """
    low, high = PROGRESS_SYNCING
    if total <= 0:
        return low
    if iteration <= 1:
        return low + int((BULK_COPY_MAX - low) * (_within(processed, total) / total))
    return BULK_COPY_MAX + int((high - BULK_COPY_MAX) * (1 - _within(remaining, total) / total))


def _within(count: int, most: int) -> int:
    return max(0, min(count, most))


def progressed(operation: VirtualMachineOperation, percent: int, message: str, now: datetime) -> Transition | None:
    """The node told how far it is; None when that is nothing to be stored. Progress never falls."""
    if percent <= operation.status.progress:
        return None
    return Transition(say(operation.with_status(progress=percent), Reason.SYNCING, message, now))


def settling(
    operation: VirtualMachineOperation,
    cause: str,
    *,
    kill: bool,
    rounds: int = 1,
    confirming: str = "",
    repair: tuple[str, OrderKind, tuple[str, ...]] | None = None,
) -> VirtualMachineOperation:
    """Ask every node of the grant what is there, or have one node repair something first.

    Args:
        operation: With an open grant.
        cause: For people.
        kill: Whether the holder is killed before its node answers.
        rounds: Number of this round; makes the orders' ids new.
        confirming: See `Settlement`.
        repair: Node, what to do, and the states in which it may be done.
    """
    grant = _grant(operation)
    nodes = [grant.node] if grant.target == grant.node else [grant.node, grant.target]
    orders: dict[str, Order] = {}
    for node in nodes if repair is None else [repair[0]]:
        kind = OrderKind.KILL_AND_READ if kill and node == grant.node else OrderKind.READ
        orders[node] = Order(
            id=f"{operation.key}#{grant.epoch}.{rounds}.{node}",
            kind=kind if repair is None else repair[1],
            uuid=grant.uuid,
            epoch=grant.epoch,
            incarnation=grant.incarnation,
            action=grant.action,
            expect=() if repair is None else repair[2],
        )
    settlement = Settlement(orders=orders, cause=cause, rounds=rounds, confirming=confirming)
    return operation.with_grant(state=GrantState.SETTLING, settlement=settlement)


def next_round(operation: VirtualMachineOperation, why: str, now: datetime, *, confirming: str = "") -> Transition:
    """Ask both hosts again, at once or after a rest; the settlement's orders are empty while it rests."""
    grant = _grant(operation)
    assert grant.settlement is not None  # noqa: S101 - it is being settled
    cause, rounds = grant.settlement.cause, grant.settlement.rounds + 1
    new = settling(operation, cause, kill=False, rounds=rounds, confirming=confirming)
    if rounds > HASTY_ROUNDS and not confirming:
        new = new.with_grant(settlement=Settlement(cause=cause, rounds=rounds))
    return Transition(say(new, Reason.OUTCOME_UNKNOWN, why, now))


def rest_s(settlement: Settlement) -> float:
    """How long a settlement rests before its round begins; 0 when it does not rest."""
    if settlement.orders:
        return 0
    return RESTS_S[min(settlement.rounds - HASTY_ROUNDS, len(RESTS_S)) - 1]


def adopted(operation: VirtualMachineOperation, epoch: int, now: datetime) -> Transition:
    """The migration goes on without its holder: the same grant, a new epoch, and a worker that only watches."""
    grant = _grant(operation)
    new = operation.with_grant(
        epoch=epoch, state=GrantState.GRANTED, adopt=True, settlement=None, granted_at=now, end="", message=""
    )
    note = Note("MigrationAdopted", f"its worker on node {grant.node} is gone, the migration goes on; watching it")
    return Transition(say(new, Reason.SYNCING, note.message, now), notes=(note,))


def completed(
    operation: VirtualMachineOperation, vm: VirtualMachine | None, reading: Reading, now: datetime
) -> Transition:
    """It runs where it was to run."""
    grant = _grant(operation)
    late = operation.metadata.deletion_timestamp is not None
    migrates = grant.action is Action.MIGRATE
    message = f"runs on node {grant.target}"
    if late:
        message += "; it was too late to abort"
    new = _close(operation, OperationPhase.COMPLETED, now).with_status(
        progress=100, downtime_ms=reading.downtime_ms, not_before=None
    )
    new = say(new, Reason.OPERATION_COMPLETED, message, now, done=True)
    moved = vm and _settled_vm(vm, grant.target, reading, now, succeeded=True if migrates else None)
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
    grant = _grant(operation)
    migrates = grant.action is Action.MIGRATE
    back = vm and _settled_vm(vm, grant.node, reading, now, succeeded=False if migrates else None)
    if vm is not None and not migrates:
        back = vm.with_status(phase=VmPhase.PENDING, node_name="", counter=0)
    what = "migration" if migrates else "start"
    if grant.cancel:
        text = f"aborted; it runs on node {grant.node}" if migrates else "aborted before it was started"
        new = say(_close(operation, OperationPhase.FAILED, now), Reason.ABORTED, text, now)
        told = Note("MigrationAborted" if migrates else "StartAborted", text)
        return Transition(new, back, (told,), ended=True)
    attempts = operation.status.attempts
    text = f"attempt {attempts} of {retry_limit}: {what} to node {grant.target} failed: {why}"
    if attempts >= retry_limit:
        new = say(_close(operation, OperationPhase.FAILED, now), Reason.OPERATION_FAILED, text, now)
        return Transition(new, back, (Note("OperationFailed", text, warning=True),), ended=True)
    wait = BACKOFF_S[min(attempts - 1, len(BACKOFF_S) - 1)]
    avoid = operation.status.avoid
    if grant.target not in avoid:
        avoid = (*avoid, grant.target)
    new = operation.with_status(
        phase=OperationPhase.PENDING,
        grant=None,
        not_before=now + timedelta(seconds=wait) if wait else None,
        avoid=avoid,
        target_node="",
    )
    new = say(new, Reason.MIGRATION_PENDING if migrates else Reason.NOT_READY, text + "; it is tried again", now)
    return Transition(new, back, (Note("AttemptFailed", text, warning=True),), ended=True)


def gone(operation: VirtualMachineOperation, vm: VirtualMachine | None, why: str, now: datetime) -> Transition:
    """The guest ended in the middle: on neither host."""
    new = say(_close(operation, OperationPhase.FAILED, now), Reason.OPERATION_FAILED, why, now)
    told = Note("GuestEnded", f"the guest ended while it was migrated: {why}", warning=True)
    stopped = None
    if vm is not None:
        condition = Condition(type="Running", status="False", reason="Crashed", message=why)
        stopped = vm.with_status(
            phase=VmPhase.STOPPED, conditions=with_condition(vm.status.conditions, condition, now), elsewhere=""
        )
    return Transition(new, stopped, (told,), ended=True)


def failed(operation: VirtualMachineOperation, reason: Reason, message: str, now: datetime) -> Transition:
    """It can't be done; no grant was open."""
    new = say(_close(operation, OperationPhase.FAILED, now), reason, message, now)
    return Transition(new, notes=(Note("OperationFailed", message, warning=True),))


def critical(transition: Transition, message: str) -> Transition:
    """Add a note that a person must see."""
    return replace(transition, notes=(*transition.notes, Note("VirtualMachineRanTwice", message, warning=True)))


def _grant(operation: VirtualMachineOperation) -> Grant:
    return operation.with_grant().status.grant  # type: ignore[return-value] # with_grant refuses where there is none


def _close(operation: VirtualMachineOperation, phase: OperationPhase, now: datetime) -> VirtualMachineOperation:
    meta = operation.metadata.with_(finalizers=())
    return operation.with_(metadata=meta).with_status(phase=phase, grant=None, finished_at=now)


def _settled_vm(
    vm: VirtualMachine, node: str, reading: Reading, now: datetime, *, succeeded: bool | None
) -> VirtualMachine:
    phase = VmPhase.PAUSE if reading.state in {"paused", "postcopy-failed"} else VmPhase.RUNNING
    state = vm.status.migration_state
    if state is not None and succeeded is not None and state.end_timestamp is None:
        state = state.with_(end_timestamp=now, result="Succeeded" if succeeded else "Failed")
    running = Condition(type="Running", status="True", reason="Running")
    return vm.with_status(
        phase=phase,
        node_name=node,
        counter=reading.counter,
        elsewhere="",
        migration_state=state,
        ip_address=vm.spec.ip_address or vm.status.ip_address,
        conditions=with_condition(vm.status.conditions, running, now),
    )
