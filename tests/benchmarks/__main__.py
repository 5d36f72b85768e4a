"""`make bench`: runs the benchmarks and prints their figures.

python -m tests.benchmarks                          all of them
python -m tests.benchmarks --only store             one (may be given several times)
python -m tests.benchmarks --json figures.json      the figures, each measurement and the conditions, as JSON
"""

import argparse
import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, ModuleType

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from orchestrator.errors import VmherdError
from tests.benchmarks.figures import conditions, load_average, write_json
from tests.benchmarks.running import Bench
from tests.lab.lab import obstacles
from tests.lab.namespaces import LabError

BENCHMARKS = {
    "store": "store_rate",
    "api": "api_server",
    "console": "console",
    "throughput": "throughput",
    "rebalancing": "rebalancing",
    "draining": "draining",
    "liveness": "liveness",
    "latency": "latency",
    "emptying": "emptying",
    "failover": "failover",
}
"""By name, the module; those that need a lab come last."""
NEED_LAB = ("latency", "emptying", "failover")
INTERRUPTED = 130
_WIDTH = 120
"""Of a file."""


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code."""
    chosen = _parse(arguments)
    names = [name for name in BENCHMARKS if name in (chosen.only or BENCHMARKS)]
    if any(name in NEED_LAB for name in names) and (found := obstacles()):
        print("The lab can't run here:", *(f"- {obstacle}" for obstacle in found), sep="\n", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    # Only trouble is worth a line here: the product, used as a library, would tell of each grant.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    about = conditions()
    for key, value in about.items():
        console.print(f"{key:<10} {value}", soft_wrap=True)
    results, loads = [], {}
    try:
        for name in names:
            before = load_average()
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            ) as progress:
                results.append(_module(name).run(Bench(progress, chosen.rounds, chosen.samples)))
            loads[name] = (before, load_average())
            results[-1].print(console)
            console.print(f"\nload average before {loads[name][0]:.1f}, after {loads[name][1]:.1f}")
    except KeyboardInterrupt:
        return INTERRUPTED
    except (AssertionError, LabError, VmherdError) as error:  # a wait in vain is an AssertionError
        print(f"The benchmark ended early: {error}", file=sys.stderr)
        return 1
    if chosen.json:
        write_json(chosen.json, results, {**about, "load averages (before, after)": loads})
        console.print(f"\nwritten to {chosen.json}")
    return 0


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"tests.benchmarks.{BENCHMARKS[name]}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure, and print figures in tables.")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    parser.add_argument("--rounds", type=int, default=4, help="of emptying, each way, and of failover (default 4)")
    parser.add_argument("--samples", type=int, default=60, help="of latency (default 60)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
