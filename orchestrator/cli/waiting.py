"""Waiting for operations: bars on a terminal, a line on each step into a pipe.

An operation is followed until it has ended, or until it is gone (`vmherd delete`). Leaving early leaves it as it is.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import typer

from orchestrator.cli import terminal
from orchestrator.cli.ages import span
from orchestrator.cli.tables import clean, phase_colour
from orchestrator.cli.terminal import tell
from orchestrator.client import Client, Scope
from orchestrator.client.following import follow
from orchestrator.errors import WaitTimeout
from orchestrator.planner.convergence import describe_outcome, describe_prediction
from orchestrator.planner.progress import PROGRESS_SYNCING
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    Key,
    OperationPhase,
    VirtualMachineOperation,
    find_condition,
)
from orchestrator.store import Change, ChangeType
from orchestrator.store.store import Loaded

INTERRUPTED = 130


@dataclass(slots=True)
class Watched:
    """An operation that is waited for.

    Attributes:
        operation: As it was last seen.
        is_gone: It was deleted, and is there no more.
        is_missed: It went while Redis was away, so its end was not seen.
    """

    operation: VirtualMachineOperation
    is_gone: bool = False
    is_missed: bool = False

    @property
    def vm(self) -> str:
        """The VM's name."""
        return self.operation.spec.virtual_machine_name

    @property
    def has_succeeded(self) -> bool:
        """Whether it did what was asked."""
        return self.operation.status.phase is OperationPhase.COMPLETED

    @property
    def reason(self) -> str:
        """Reason of its condition Completed."""
        condition = find_condition(self.operation.status.conditions, "Completed")
        return condition.reason if condition else ""

    @property
    def message(self) -> str:
        """What is the matter, for people."""
        if self.is_gone and self.operation.is_active:
            return "is gone; what came of it was not seen" if self.is_missed else "was deleted before it began"
        downtime = self.operation.status.downtime_ms
        stopped = f" (guest stopped for {downtime} ms)" if self.has_succeeded and downtime is not None else ""
        return clean(self.operation.message + stopped)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.is_gone or not self.operation.is_active

    @property
    def comparison(self) -> list[str]:
        """Of a migration: what was foreseen, once it is under way; and what was measured, once it has ended."""
        status, found = self.operation.status, list[str]()
        if status.prediction is not None and (status.progress >= PROGRESS_SYNCING[0] or self.has_ended):
            found.append(f"predicted: {describe_prediction(status.prediction)}")
        if status.outcome is not None and self.has_ended:
            found.append(f"measured: {describe_outcome(status.outcome)}")
        return found


class Show(Protocol):
    """Shows how far operations are."""

    def update(self, watched: Watched) -> None:
        """Show one that is new, or changed."""
        ...

    def say(self, message: str) -> None:
        """Say something in between."""
        ...


class Silent:
    """Shows nothing."""

    def update(self, watched: Watched) -> None:
        """Do nothing."""

    def say(self, message: str) -> None:
        """Say it on standard error."""
        tell(message)


class Lines(Silent):
    """A line when the phase changes, and while it is Pending when the reason does; and what a migration was like."""

    def __init__(self) -> None:
        self._shown: dict[Key, tuple[str, ...]] = {}
        self._compared: dict[Key, list[str]] = {}

    def update(self, watched: Watched) -> None:
        """Print a line if there is news."""
        operation, phase = watched.operation, watched.operation.status.phase
        news = (phase.value, watched.message if phase is OperationPhase.PENDING else "")
        if self._shown.get(operation.key) != news:
            first = operation.key not in self._shown
            self._shown[operation.key] = news
            name = f" ({operation.name})" if first else ""
            terminal.write(f"{watched.vm}: {phase.value}{name}" + (f": {watched.message}" if watched.message else ""))
        told = self._compared.setdefault(operation.key, [])
        for line in watched.comparison:
            if line not in told:
                told.append(line)
                terminal.write(f"{watched.vm}: {line}")


class Bars:
    """A bar for each operation, with phase and message; redrawn in place."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415 - only where something is drawn
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415
        from rich.table import Column  # noqa: PLC0415

        self.progress = Progress(
            TextColumn("[bold]{task.description}", markup=True),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[phase]}", markup=True),
            TimeElapsedColumn(),
            TextColumn(
                "{task.fields[message]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
            ),
            console=Console(highlight=False),
            expand=True,
        )
        self._tasks: dict[Key, object] = {}
        self._ended: set[Key] = set()

    def update(self, watched: Watched) -> None:
        """Draw one."""
        operation = watched.operation
        phase = operation.status.phase.value
        shown = f"[{phase_colour(phase)}]{phase}[/]"
        task = self._tasks.get(operation.key)
        if task is None:
            task = self._tasks[operation.key] = self.progress.add_task(watched.vm, phase=shown, message="", total=100)
        self.progress.update(
            task,  # type: ignore[arg-type] # rich's NewType of int, which is loaded late
            completed=operation.status.progress,
            phase=shown,
            message=watched.message,
        )
        if watched.has_ended and operation.key not in self._ended:
            self._ended.add(operation.key)
            self.progress.stop_task(task)  # type: ignore[arg-type]
            for line in watched.comparison:
                self.progress.console.print(f"{watched.vm}: {line}", markup=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """Print a line above the bars."""
        self.progress.console.print(f"vmherd: {message}", markup=False, soft_wrap=True)


@contextmanager
def showing(*, quiet: bool = False) -> Iterator[Show]:
    """Give what suits standard output: bars on a terminal, else lines.

    Args:
        quiet: Nothing is shown, since standard output is for something else.
    """
    if quiet:
        yield Silent()
    elif terminal.is_watched():
        bars = Bars()
        with terminal.without_caret_c(), bars.progress:
            yield bars
    else:
        yield Lines()


def wait_for(
    client: Client,
    operations: Sequence[VirtualMachineOperation],
    show: Show,
    *,
    timeout: float | None = None,
    until_gone: bool = False,
) -> list[Watched]:
    """Wait until operations have ended.

    Args:
        client: Of the herd that they are in.
        operations: As they were just stored.
        show: Told of each change.
        timeout: Seconds; None waits for ever.
        until_gone: Until they are deleted, which comes after their end.

    Returns:
        Each with its last state, in the given order.

    Raises:
        WaitTimeout: Not all have ended in time.
    """
    namespaces = {operation.metadata.namespace for operation in operations}
    scope = Scope((VirtualMachineOperation,), namespaces.pop() if len(namespaces) == 1 else None)
    found = follow(client, scope, show.say, is_patient=True)
    ended = take_until_ended(found, operations, show, timeout=timeout, until_gone=until_gone)
    for watched in ended:
        last = client.last_of(watched.operation) if watched.is_missed else None
        if last is not None:  # it had ended, and was gone, before we began to look
            watched.operation, watched.is_missed = last, False
    return ended


def take_until_ended(
    found: Iterable[Loaded | Change | None],
    operations: Sequence[VirtualMachineOperation],
    show: Show,
    *,
    timeout: float | None = None,
    until_gone: bool = False,
) -> list[Watched]:
    """Take what `follow` gives until operations have ended; arguments and answer are `wait_for`'s."""
    deadline = None if timeout is None else time.monotonic() + timeout
    every = {operation.key: Watched(operation) for operation in operations}
    for watched in every.values():
        show.update(watched)

    def is_open(watched: Watched) -> bool:
        return not watched.is_gone and (until_gone or watched.operation.is_active)

    for news in found:
        for watched in _take(news, every):
            show.update(watched)
        waiting = [watched for watched in every.values() if is_open(watched)]
        if not waiting:
            break
        if deadline is not None and time.monotonic() >= deadline:
            raise WaitTimeout("; ".join(_unfinished(w, timeout or 0) for w in waiting) + "; goes on all the same")
    return list(every.values())


def _take(found: Loaded | Change | None, every: dict[Key, Watched]) -> list[Watched]:
    """Bring what is watched up to date; gives those that were touched."""
    match found:
        case Loaded():
            documents = found.resources[VirtualMachineOperation.kind_name]
            for key, watched in every.items():
                _update(watched, documents.get(key), is_gone=key not in documents)
            return list(every.values())
        case Change():
            touched = every.get(found.resource.key)
            if touched is None:
                return []
            _update(touched, found.resource, is_gone=found.type is ChangeType.DELETED)
            return [touched]
        case None:
            return []


def _update(watched: Watched, resource: object, *, is_gone: bool) -> None:
    if watched.is_gone:
        return
    known = watched.operation.metadata.uid
    if isinstance(resource, VirtualMachineOperation) and resource.metadata.uid == known:
        watched.operation, watched.is_gone = resource, is_gone
    else:
        watched.is_gone = watched.is_missed = True  # another one bears its name now, or none


def _unfinished(watched: Watched, timeout: float) -> str:
    why = f": {watched.message}" if watched.message else ""
    return (
        f"VirtualMachineOperation {watched.operation.name!r} is {watched.operation.status.phase.value} "
        f"after {span(timeout)}{why}"
    )


def wait_or_leave(
    client: Client,
    operations: Sequence[VirtualMachineOperation],
    *,
    timeout: float | None,
    quiet: bool = False,
) -> list[Watched]:
    """Wait for operations; Ctrl-C leaves them alone, says so, and ends the command with code 130."""
    try:
        with showing(quiet=quiet) as show:
            return wait_for(client, operations, show, timeout=timeout)
    except KeyboardInterrupt:
        names = " ".join(operation.name for operation in operations)
        namespace = operations[0].metadata.namespace
        inside = f" -n {namespace}" if namespace != DEFAULT_NAMESPACE else ""
        tell(f"no longer waiting; what was begun goes on. To abort it: vmherd delete vmop {names}{inside}")
        raise typer.Exit(INTERRUPTED) from None


def failure(watched: Watched) -> str | None:
    """Say why an operation did not do what was asked; None when it did."""
    if watched.has_succeeded:
        return None
    phase, reason = watched.operation.status.phase.value, watched.reason
    if watched.is_gone and watched.operation.is_active:
        return f"{watched.vm}: {watched.operation.name} {watched.message}"
    why = f" ({reason})" if reason else ""
    return f"{watched.vm}: {watched.operation.name} {phase}{why}: {watched.message or 'no reason given'}"
