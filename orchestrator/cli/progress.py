"""How far a command is that does not wait for operations: what can be counted is, and what can't shows that it goes on.

Bars and signs are for terminals; into a pipe there are lines. Operations have bars of their own (`waiting`).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from orchestrator.cli import terminal


class Counts(Protocol):
    """Shows how many of several things are done."""

    def update(self, what: str, done: int, count: int) -> None:
        """Show that so many of them are done."""
        ...

    def write(self, line: str) -> None:
        """Print a line, above the bars where there are any."""
        ...


class _Lines:
    """A line when a part is done, if that is wanted."""

    def __init__(self, *, tells_done: bool) -> None:
        self._tells_done = tells_done
        self._said: set[str] = set()

    def update(self, what: str, done: int, count: int) -> None:
        """Say what is done."""
        if self._tells_done and done >= count and what not in self._said:
            self._said.add(what)
            terminal.write(f"{done} {what}")

    def write(self, line: str) -> None:
        """Print a line."""
        terminal.write(line)


class _Silent:
    """Nothing: what came of it is told otherwise."""

    def update(self, what: str, done: int, count: int) -> None:
        """Show nothing."""

    def write(self, line: str) -> None:
        """Print nothing."""


class _Bars:
    """A bar for each part."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415 - only where something is drawn
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

        columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # What is redirected is printed where the bars are: errors that go elsewhere must still go there.
        self.progress = Progress(*columns, console=Console(highlight=False), redirect_stderr=sys.stderr.isatty())
        self._tasks: dict[str, Any] = {}

    def update(self, what: str, done: int, count: int) -> None:
        """Draw one."""
        if what not in self._tasks:
            self._tasks[what] = self.progress.add_task(what, total=count)
        self.progress.update(self._tasks[what], completed=done)
        if done >= count:
            self.progress.stop_task(self._tasks[what])

    def write(self, line: str) -> None:
        """Print a line above the bars."""
        self.progress.console.print(line, markup=False, soft_wrap=True)


@contextmanager
def counting(*, tells_done: bool = False, quiet: bool = False) -> Iterator[Counts]:
    """Give what suits standard output: bars on a terminal, else lines.

    Args:
        tells_done: Into a pipe, that a part is done is a line; else only what is written is.
        quiet: Show nothing: a document is printed there.
    """
    if quiet:
        yield _Silent()
        return
    if not terminal.is_watched():
        yield _Lines(tells_done=tells_done)
        return
    bars = _Bars()
    with terminal.without_caret_c(), bars.progress:
        yield bars


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on a terminal, while it lasts, that something is done of which nothing can be counted: `makes a plan`."""
    if not terminal.is_watched():
        yield
        return
    from rich.console import Console  # noqa: PLC0415 - only where something is drawn
    from rich.markup import escape  # noqa: PLC0415

    with terminal.without_caret_c(), Console(highlight=False).status(escape(what)):
        yield
