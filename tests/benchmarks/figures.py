"""Figures: what a benchmark gives, how it is printed, and under which conditions it was measured."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure.

    Attributes:
        name: What was measured.
        value: In `unit`.
        unit: `s`, `ms`, `/s`, `x` (a ratio) or `` (a count).
        note: How it spreads, or what is aimed at.
    """

    name: str
    value: float
    unit: str
    note: str = ""

    @property
    def shown(self) -> str:
        """The value with a fitting number of digits."""
        digits = 3 if self.unit == "x" else 0 if abs(self.value) >= 1000 or not self.unit else 2
        return f"{self.value:,.{digits}f} {self.unit}".rstrip()


@dataclass
class Result:
    """What one benchmark gives.

    Attributes:
        name: Of the benchmark.
        title: What it measures, in a sentence.
        tables: By title; the first is the result, the others say where the time goes.
        raw: What was measured, one by one, for the JSON file.
    """

    name: str
    title: str
    tables: dict[str, list[Figure]] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    def print(self, console: Console) -> None:
        """Print all tables."""
        console.print(f"\n[bold]{self.name}[/]: {self.title}")
        for title, figures in self.tables.items():
            table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold", title_justify="left", show_header=True)
            table.add_column(title.upper(), no_wrap=True)
            table.add_column("", justify="right", no_wrap=True)
            table.add_column("")
            for figure in figures:
                table.add_row(figure.name, figure.shown, figure.note)
            console.print()
            console.print(table)


def spread(values: Sequence[float], unit: str) -> str:
    """Say in what range values lie, and how many there are."""
    return f"{min(values):.2f} to {max(values):.2f} {unit}, n = {len(values)}" if values else "n = 0"


def percentile(values: Sequence[float], percent: float) -> float:
    """Give the least value that at least `percent` of 100 values do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def typical(name: str, values: Sequence[float], unit: str) -> Figure:
    """Give the median as a figure, with the range as its note."""
    return Figure(name, median(values) if values else float("nan"), unit, spread(values, unit))


def conditions() -> dict[str, Any]:
    """Tell what this was measured on."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _said("git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "kernel": platform.release(),
        "kvm": Path("/dev/kvm").exists(),
        "python": platform.python_version(),
        "celery": metadata.version("celery"),
        "redis-py": metadata.version("redis"),
        "redis": _said("redis-server", "--version").partition("sha=")[0].strip(),
        "libvirt": _said("libvirtd", "--version").rpartition(" ")[2],
        "qemu": _said("qemu-system-x86_64", "--version").split("\n")[0],
    }


def load_average() -> float:
    """Give the number of processes that wanted a CPU during the last minute."""
    return os.getloadavg()[0]


def write_json(path: Path, results: Sequence[Result], about: dict[str, Any]) -> None:
    """Write everything to a file."""
    document = {"conditions": about, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(document, indent=1, default=str) + "\n")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _said(*argv: str) -> str:
    if shutil.which(argv[0]) is None:
        return "none"
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()
