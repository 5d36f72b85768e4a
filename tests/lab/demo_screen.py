"""What the demo prints: a tour that reads alike on a terminal and in a file.

On a terminal there are colours, and steps that show what they wait for. Into a file or a pipe goes plain text: a line
for each step when it is done, and no escape sequences.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.spinner import Spinner
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

WIDEST = 100
"""Characters; sentences are not set wider, for the eye's sake."""

_TITLE_WIDTH = 38
_PHASE_STYLES = {
    "Running": "green",
    "Ready": "green",
    "Completed": "green",
    "Migrating": "yellow",
    "InProgress": "yellow",
    "Terminating": "yellow",
    "Pending": "cyan",
    "Failed": "red",
    "NotReady": "red",
}


@dataclass
class Step:
    """One step of the start.

    Attributes:
        title: What it is.
        detail: How far it is, or what came of it.
        seconds: How long it took; None while it goes on.
    """

    title: str
    detail: str = ""
    seconds: float | None = None
    began_at: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """How long it took, or has taken up to now."""
        return time.monotonic() - self.began_at if self.seconds is None else self.seconds


class Steps:
    """Steps that are under way, several at a time; a context manager for the time in which they are shown."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps: list[Step] = []
        self._spinner = Spinner("dots")
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=8, transient=False)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def begin(self, title: str) -> Step:
        """Show a step from now on."""
        step = Step(title)
        self._steps.append(step)
        return step

    def end(self, step: Step, detail: str = "") -> None:
        """Show that a step is done, and how long it took."""
        step.seconds = step.elapsed_s
        step.detail = detail
        if not self._console.is_terminal:
            self._console.print(Text.assemble("  ", *_step_texts(step)), soft_wrap=True)

    def _render(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(width=1)
        grid.add_column(width=_TITLE_WIDTH, no_wrap=True)
        grid.add_column(width=7, no_wrap=True, justify="right", style="dim")
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis", style="dim")
        for step in self._steps:
            sign: RenderableType = self._spinner if step.seconds is None else Text("✓", style="green")
            grid.add_row(sign, step.title, f"{step.elapsed_s:.1f} s", Text(step.detail))
        return grid


def _step_texts(step: Step) -> list[str]:
    return [f"{step.title:<{_TITLE_WIDTH}}", f"{step.elapsed_s:6.1f} s", f"  {step.detail}" if step.detail else ""]


class Screen:
    """The demo's standard output.

    Attributes:
        console: rich's; safe to be printed to by several threads.
        times: Parts of the tour that are over, with the seconds that each took.
    """

    def __init__(self) -> None:
        # A locale without these characters shouldn't end the tour.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        self.console = Console(highlight=False)
        self.times: list[tuple[str, float]] = []

    def steps(self) -> Steps:
        """Show steps; see `Steps`."""
        return Steps(self.console)

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        """Give a part of the tour its heading, and take its time."""
        self.console.print()
        width = min(self.console.width, WIDEST)
        self.console.print(Rule(Text(title, style="bold"), align="left", style="cyan"), width=width)
        began_at = time.monotonic()
        yield
        self.times.append((title, time.monotonic() - began_at))

    def say(self, sentence: str) -> None:
        """Say something to the person, in rich's markup."""
        self.console.print()
        lines = Text.from_markup(sentence).wrap(self.console, min(self.console.width, WIDEST))
        for line in lines:
            line.rstrip()
            self.console.print(line)

    def command(self, arguments: Sequence[str], *, stdin: str | None = None) -> None:
        """Show a command as it could be typed."""
        line = f"$ {shlex.join(arguments)}"
        self.console.print()
        self.lines(line if stdin is None else f"{line} <<END\n{stdin.rstrip()}\nEND", style="bold")

    def lines(self, text: str, *, begin: str = "", style: str = "") -> None:
        """Show what a command printed, phases in colour. Lines too long for a terminal are cut there.

        Args:
            text: One or several lines.
            begin: Put before each.
            style: Of the whole text.
        """
        is_terminal = self.console.is_terminal
        for line in text.rstrip("\n").split("\n"):
            shown = Text(line, style)
            for phase, colour in _PHASE_STYLES.items():
                shown.highlight_regex(rf"\b{phase}\b", colour)
            shown = Text.assemble((begin, "magenta"), shown)
            # Cut, not wrapped: rows of a table stay under each other. A file gets them whole.
            self.console.print(shown, no_wrap=True, overflow="ellipsis" if is_terminal else "ignore", crop=is_terminal)

    def copyable(self, text: str) -> None:
        """Show lines that a person may copy: whole, whatever the terminal's width."""
        self.console.print()
        for line in text.split("\n"):
            self.console.print(Text(line, "bold"), soft_wrap=True)

    def program(self, source: str, language: str) -> None:
        """Show a program's source."""
        self.console.print()
        if not self.console.is_terminal:
            self.lines(source)
            return
        self.console.print(Syntax(source.rstrip(), language, theme="ansi_dark", background_color="default"))

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a small table."""
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
        for header in headers:
            table.add_column(header, no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.console.print()
        if self.console.is_terminal:
            self.console.print(table)
            return
        with self.console.capture() as capture:
            self.console.print(table)
        self.lines("\n".join(line.rstrip() for line in capture.get().rstrip().split("\n")))
