"""Where the time goes, read from the logs that the herd's processes write anyway.

Every line has an instant of the one clock that all processes of the lab share. Each of the stages below begins where
the one before it ends, so their sum is the whole.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.benchmarks.figures import Figure, typical
from tests.benchmarks.joblog import Job


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a process's log."""

    at: float
    process: str
    event: str
    operation: str


class HerdLog:
    """The lines of all processes, oldest first.

    Args:
        folder: The lab's logs.
        since: Leave out what was before.
    """

    def __init__(self, folder: Path, since: float) -> None:
        lines = [line for file in folder.glob("*.log") for line in _read(file) if line.at >= since]
        self.lines = sorted(lines, key=lambda line: line.at)

    def instants(self, operation: str) -> dict[str, float]:
        """Give the first instant of each event of an operation."""
        found: dict[str, float] = {}
        for line in self.lines:
            if line.operation == operation:
                found.setdefault(line.event, line.at)
        return found


def _read(file: Path) -> Iterable[Line]:
    for text in file.read_text(errors="replace").splitlines():
        if not text.startswith("{"):
            continue  # banners of Celery's, or a line that is being written
        try:
            entry: dict[str, Any] = json.loads(text)
            at = datetime.fromisoformat(entry["timestamp"]).timestamp()
        except (ValueError, KeyError):
            continue
        yield Line(at, file.stem, str(entry.get("event", "")), str(entry.get("operation", "")))


@dataclass(frozen=True, slots=True)
class Moved:
    """One finished evict: its operation's key, and the job that libvirt made of it."""

    operation: str
    job: Job


GAP_STAGES = (
    ("libvirt's job has ended -> its call has returned to the worker", "migration call ended", 0),
    ("-> intake has committed that, and asked both hosts", "settling", 0),
    ("-> both have answered, and the end is committed", "settled", 0),
    ("-> the next one is granted", "granted", 1),
    ("-> its worker has claimed it", "migration begins", 1),
)
"""From the end of one migration to the begin of the next: the stage, the event that ends it, of which of the two."""

START_STAGES = (
    ("evict() called -> granted", "granted"),
    ("-> claimed by the node's worker", "migration begins"),
)


def gap_stages(log: HerdLog, moved: Sequence[Moved]) -> list[Figure]:
    """Give the stages between migrations that followed each other on one host, as medians in ms."""
    stages: dict[str, list[float]] = {name: [] for name, _, _ in GAP_STAGES}
    last, whole = "-> libvirt's job has begun", "the whole gap"
    stages |= {last: [], whole: []}
    for one, following in pairwise(moved):
        instants = (log.instants(one.operation), log.instants(following.operation))
        at = one.job.ended_at
        for name, event, which in GAP_STAGES:
            if event in instants[which]:
                stages[name].append((instants[which][event] - at) * 1000)
                at = instants[which][event]
        stages[last].append((following.job.began_at - at) * 1000)
        stages[whole].append((following.job.began_at - one.job.ended_at) * 1000)
    return [typical(name, values, "ms") for name, values in stages.items()]


def start_stages(log: HerdLog, moved: Sequence[Moved], called_at: Sequence[float]) -> list[Figure]:
    """Give the stages from the call of evict() to the begin of libvirt's job, as medians in ms."""
    stages: dict[str, list[float]] = {name: [] for name, _ in START_STAGES}
    last = "-> libvirt's job has begun"
    stages[last] = []
    for one, called in zip(moved, called_at, strict=True):
        instants, at = log.instants(one.operation), called
        for name, event in START_STAGES:
            if event in instants:
                stages[name].append((instants[event] - at) * 1000)
                at = instants[event]
        stages[last].append((one.job.began_at - at) * 1000)
    return [typical(name, values, "ms") for name, values in stages.items()]
