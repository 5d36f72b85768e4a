"""Runs all tests in two processes at a time: those that bring up labs and browsers, which often wait, and all others.

    python -m tests [pytest's own arguments]

What the labs say is shown as it comes, the rest's output when both have ended. Ctrl-C, or a SIGINT or SIGTERM to this
process, interrupts both, which take down what they started. The exit code is 0 only when both have succeeded.
"""

import signal
import subprocess
import sys
import tempfile
from types import FrameType

WITH_LABS = "lab or browser"
NO_TESTS = 5
"""pytest's exit code where the arguments name no tests of that kind."""


def main(arguments: list[str]) -> int:
    """Run them; gives the exit code."""
    running: list[subprocess.Popen[bytes]] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        for process in running:
            process.send_signal(signal.SIGINT)

    # Before they are started: they have SIGINT's default then, which a shell's background jobs have not.
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    command = [sys.executable, "-m", "pytest", *arguments]
    with tempfile.TemporaryFile() as told:
        # Sessions of their own: a terminal's Ctrl-C reaches them once, from here.
        running.append(subprocess.Popen([*command, "-m", WITH_LABS], start_new_session=True))
        running.append(
            subprocess.Popen(
                [*command, "-m", f"not ({WITH_LABS})"], stdout=told, stderr=subprocess.STDOUT, start_new_session=True
            )
        )
        codes = [process.wait() for process in running]
        told.seek(0)
        sys.stdout.write(told.read().decode(errors="replace"))
    if all(code == NO_TESTS for code in codes):
        return NO_TESTS
    return next((code for code in codes if code not in {0, NO_TESTS}), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
