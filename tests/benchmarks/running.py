"""What every benchmark is given: progress to be shown, and how much to measure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from rich.progress import Progress

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Bench:
    """One run of benchmarks.

    Attributes:
        progress: Where bars are drawn; nothing is, into a file.
        rounds: Of `emptying`, each way, and of `failover`, of each kind.
        samples: Of `latency`.
    """

    progress: Progress
    rounds: int
    samples: int

    def track(self, steps: Iterable[T], total: int, what: str) -> Iterator[T]:
        """Go through some steps, and show how far that is."""
        task = self.progress.add_task(what, total=total)
        for step in steps:
            yield step
            self.progress.advance(task)
        self.progress.update(task, completed=total)

    def say(self, what: str) -> None:
        """Show what is being done that has no steps."""
        self.progress.console.print(f"[dim]{what}[/]")
