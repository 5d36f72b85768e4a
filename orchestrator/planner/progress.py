"""How far a live migration is: what is foreseen of it, its percentage and figures, and whether it still converges.

Progress never falls, over failed attempts and adoptions too; that a migration is aborted or superseded goes before what
its figures say.
"""

from dataclasses import replace
from datetime import datetime

from orchestrator.planner.convergence import describe_prediction, measured
from orchestrator.planner.flow import Note, Transition, say
from orchestrator.resources import OperationPhase, Reason, VirtualMachineOperation, find_condition
from orchestrator.resources.vmop import MigrationOutcome, Prediction

PROGRESS_SYNCING = (10, 90)
BULK_COPY_MAX = 45
SOURCE_SUSPENDED, TARGET_RESUMED = 91, 92
_SWITCHING_OVER = frozenset({Reason.SOURCE_SUSPENDED, Reason.TARGET_RESUMED})
REFRESH_S = 10.0
"""A migration's figures alone are stored anew once the job is so much older; its progress and its turns at once."""


def forecast(transition: Transition, prediction: Prediction) -> Transition:
    """Add to a migration's grant what is foreseen of it; what was measured of an earlier attempt is gone."""
    return replace(transition, operation=transition.operation.with_status(prediction=prediction, outcome=None))


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


def predicted(operation: VirtualMachineOperation, prediction: Prediction, now: datetime) -> Transition:
    """The guest was measured before its migration; what is foreseen is told before that begins."""
    text = describe_prediction(prediction)
    new = operation.with_status(prediction=prediction)
    if _is_ours_to_say(operation):
        message = f"node {operation.status.source_node} migrates it to {operation.status.target_node}; foreseen: {text}"
        new = say(new, Reason.TARGET_PREPARING, message, now)
    return Transition(new, notes=(Note("MigrationPredicted", text),))


def progressed(
    operation: VirtualMachineOperation,
    percent: int,
    message: str,
    now: datetime,
    *,
    outcome: MigrationOutcome | None = None,
    converges: bool = True,
) -> Transition | None:
    """The node told how far it is; None when that is nothing to be stored. Progress never falls.

    Args:
        operation: With an open grant.
        percent: See `progress_percent`.
        message: The figures, for people.
        outcome: The same figures.
        converges: False while the migration has no way to its end; it is said as long as it lasts.
    """
    status = operation.status
    known = status.outcome or MigrationOutcome()
    figures = known if outcome is None else measured(status.outcome, outcome)
    reason = Reason.SYNCING if converges else Reason.NOT_CONVERGING
    shown = find_condition(status.conditions, "Completed")
    speaks = _is_ours_to_say(operation) and (shown is None or shown.reason not in _SWITCHING_OVER)
    turns = speaks and shown is not None and shown.reason != reason
    is_due = figures.duration_s - known.duration_s >= REFRESH_S
    if not (percent > status.progress or turns or is_due or figures.post_copy != known.post_copy):
        return None
    new = operation.with_status(progress=max(percent, status.progress), outcome=figures if outcome else status.outcome)
    if speaks:
        new = say(new, reason, message, now)
    notes = (Note("MigrationNotConverging", message, warning=True),) if turns and not converges else ()
    return Transition(new, notes=notes)


def switched_over(operation: VirtualMachineOperation, *, at_target: bool, now: datetime) -> Transition | None:
    """A host told that the source's guest is stopped, or that the target's runs; None when that is no news.

    It informs: how the migration ended is read from both hosts.
    """
    status = operation.status
    progress = TARGET_RESUMED if at_target else SOURCE_SUSPENDED
    if progress <= status.progress:
        return None
    new = operation.with_status(progress=progress)
    if not _is_ours_to_say(operation):
        return Transition(new)
    if at_target:
        return Transition(say(new, Reason.TARGET_RESUMED, f"the guest runs on node {status.target_node}", now))
    return Transition(say(new, Reason.SOURCE_SUSPENDED, f"the guest is stopped on node {status.source_node}", now))


def _is_ours_to_say(operation: VirtualMachineOperation) -> bool:
    """Whether a migration's progress may be said: that it is aborted, or superseded, goes before."""
    return operation.status.phase is OperationPhase.IN_PROGRESS
