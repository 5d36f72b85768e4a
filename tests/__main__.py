"""Runs tests in shares, two at a time: each share is a pytest of its own, and the next one begins when one has ended.

    python -m tests [pytest's own arguments]         everything
    python -m tests --fast [...]                     what is quick and needs no root: unit, contract, scenarios
    python -m tests tests/lab/test_faults.py [...]   tests that are named are one share

One runs labs, a file at a time: they often wait. The other runs what keeps a CPU busy. Who has nothing left to do takes
of the other's, from its end. What a share says is shown when it ends. Ctrl-C, or a SIGINT or SIGTERM to this process,
interrupts the shares that run, which take down what they started. The exit code is 0 only when all have succeeded.
"""

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

NO_TESTS = 5
"""pytest's exit code where its arguments choose none of a share's tests."""
INTERRUPTED = 130
_TESTS = Path("tests")
_NEED_NO_ROOT = ("unit", "contract", "scenarios")
_TOGETHER = (
    ("migration", "adoption", "policies", "ways_in", "rebalancing"),
    ("maintenance", "kubectl", "console"),
)
"""Labs' files whose herds have the same settings: they are one share, so that one herd serves them all."""
_LONGEST = (("faults",), ("demo",), ("convergence",), ("compose",), ("takeover",))
"""Labs' files that take minutes. They begin before the rest, so that no CPU waits for the last of them."""
_PARTS = 4
"""Of the integration tests."""

Share = tuple[str, ...]
"""Arguments of one pytest."""


def everything() -> list[list[Share]]:
    """Give the labs' shares, and all others."""
    first = (*_TOGETHER, *_LONGEST)
    rest = {path.stem.removeprefix("test_") for path in (_TESTS / "lab").glob("test_*.py")}.difference(*first)
    labs = [
        tuple(str(_TESTS / "lab" / f"test_{name}.py") for name in names)
        for names in (*first, *((name,) for name in sorted(rest)))
    ]
    integration = sorted(map(str, (_TESTS / "integration").glob("test_*.py")))
    others = [tuple(integration[part::_PARTS]) for part in range(_PARTS)]
    others += [(str(_TESTS / "unit"), str(_TESTS / "model"))]
    others += [(str(_TESTS / name),) for name in ("contract", "scenarios", "browser")]
    return [labs, others]


def what_needs_no_root() -> list[list[Share]]:
    """Give three parts, more than there are CPUs: each waits now and then."""
    folders = tuple(str(_TESTS / name) for name in _NEED_NO_ROOT)
    return [[(*folders, "-m", "not lab", "--part", f"{part}/3")] for part in (1, 2, 3)]


class Run:
    """Runs rows of shares beside each other.

    Args:
        rows: As many shares run at a time as there are rows.
        arguments: That each share gets besides its own.
    """

    def __init__(self, rows: Sequence[Sequence[Share]], arguments: Sequence[str]) -> None:
        self.codes: list[int] = []
        self._rows = [deque(row) for row in rows]
        self._arguments = tuple(arguments)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()  # never held by the thread that gets the signals
        self._is_interrupted = False
        self._failed: list[str] = []

    def run(self) -> int:
        """Run all; gives the exit code."""
        workers = [threading.Thread(target=self._work, args=(number,)) for number in range(len(self._rows))]
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(1)  # a signal is handled between two of these
        if self._failed:
            _say("\n".join(self._failed))
        if self._is_interrupted:
            return INTERRUPTED
        if all(code == NO_TESTS for code in self.codes):
            return NO_TESTS
        return next((code for code in self.codes if code not in {0, NO_TESTS}), 0)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Let no more shares begin, and interrupt those that run."""
        del number, frame
        with self._lock:
            self._is_interrupted = True
            for process in self._running:
                process.send_signal(signal.SIGINT)

    def _next(self, row: int) -> Share | None:
        if self._is_interrupted:
            return None
        if self._rows[row]:
            return self._rows[row].popleft()
        return next((other.pop() for other in self._rows if other), None)

    def _work(self, row: int) -> None:
        while True:
            with tempfile.TemporaryFile() as told:
                with self._lock:
                    share = self._next(row)
                    if share is None:
                        return
                    began = time.monotonic()
                    process = subprocess.Popen(
                        [sys.executable, "-m", "pytest", *share, *self._arguments],
                        stdout=told,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # a terminal's Ctrl-C reaches it once, from here
                    )
                    self._running.add(process)
                code = process.wait()
                told.seek(0)
                with self._lock:
                    self._running.remove(process)
                    self.codes.append(code)
                    self._show(share, told.read().decode(errors="replace"), code, time.monotonic() - began)

    def _show(self, share: Share, told: str, code: int, seconds: float) -> None:
        if code == NO_TESTS:
            return
        _say(f"##### {' '.join(share)}: exit code {code} after {seconds:.0f} s\n{told}")
        if code:
            failed = [line for line in told.splitlines() if line.startswith(("FAILED ", "ERROR "))]
            self._failed += failed or [f"FAILED {' '.join(share)}: exit code {code}"]


def _say(text: str) -> None:
    sys.stdout.write(f"\n{text}\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Run what is asked for; gives the exit code."""
    if any(Path(word.partition("::")[0]).exists() for word in arguments):
        rows: list[list[Share]] = [[()]]
    elif "--fast" in arguments:
        arguments.remove("--fast")
        rows = what_needs_no_root()
    else:
        rows = everything()
    run = Run(rows, arguments)
    # Before a share is started: it has SIGINT's default then, which a shell's background jobs have not.
    signal.signal(signal.SIGINT, run.interrupt)
    signal.signal(signal.SIGTERM, run.interrupt)
    return run.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
