"""`make demo`: a herd of three hosts and six guests on this machine, and a tour of it.

Everything runs for real: libvirt, QEMU, Redis, Celery. Ctrl-C at any moment removes it all; should this process be
killed, the lab's watchdog does.

    python -m tests.lab.demo            the tour; then it stays up until Ctrl-C
    python -m tests.lab.demo --exit     ends after the tour
"""

import argparse
import contextlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from types import FrameType

from tests.lab.demo_flower import USER
from tests.lab.demo_herd import DemoHerd
from tests.lab.demo_screen import Screen
from tests.lab.demo_tour import FIRST, Tour
from tests.lab.lab import obstacles
from tests.lab.namespaces import REPOSITORY, LabError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130


class Interrupted(BaseException):
    """A person, or the system, wants this to end. Not an Exception: nobody on the way may take it for a failure."""


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise Interrupted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description="A herd on this machine, and a tour of it.")
    parser.add_argument("--exit", action="store_true", help="end after the tour, instead of staying up")
    parser.add_argument("--name", default="demo", help="the lab's name; demos of different names may run side by side")
    chosen = parser.parse_args(arguments)
    if found := obstacles():
        print("The demo can't run here:", *(f"- {obstacle}" for obstacle in found), sep="\n", file=sys.stderr)
        return 1
    try:
        demo = DemoHerd(chosen.name)
    except ValueError as error:
        parser.error(f"--name: {error}")
    return _run(demo, Screen(), stays=not chosen.exit)


def _run(demo: DemoHerd, screen: Screen, *, stays: bool) -> int:
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    began_at = time.monotonic()
    code = INTERRUPTED
    try:
        _tour(demo, screen, began_at)
        code = 0
        if stays:
            screen.say("The herd stays up until Ctrl-C.")
            threading.Event().wait()
    except Interrupted:
        pass
    except BrokenPipeError:
        pass  # nobody reads us any more
    except Exception as error:  # noqa: BLE001 - whatever it is: it is told, the logs are kept, nothing is left
        code = 1
        _tell_failure(demo, error)
    finally:
        # A second Ctrl-C must not end the tidying up half way.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        began_at = time.monotonic()
        demo.down()
    with contextlib.suppress(OSError):  # a terminal that is gone
        screen.console.print(f"\nEverything was removed ({time.monotonic() - began_at:.1f} s).")
    return code


def _tour(demo: DemoHerd, screen: Screen, began_at: float) -> None:
    screen.console.print(
        "[bold]vmherd[/]: three libvirt hosts and six guests on this machine. Ctrl-C ends and removes it all.\n"
    )
    with screen.steps() as steps:
        demo.up(steps)
    screen.times.append(("start", time.monotonic() - began_at))
    tour = Tour(demo, screen)
    with screen.part("The herd"):
        tour.show_herd()
    with screen.part("A running guest moves"):
        tour.evict_one()
    moved_after_s = time.monotonic() - began_at
    with screen.part("Several at once"):
        tour.evict_several()
    with screen.part("An abort"):
        tour.abort_one()
    with screen.part("From Python"):
        tour.run_program()
    with screen.part("What took how long"):
        screen.table(("PART", "SECONDS"), [(title, f"{seconds:7.1f}") for title, seconds in screen.times])
        screen.say(f"{FIRST} had moved {moved_after_s:.0f} s after the start.")
    with screen.part("Play on"):
        _tell_how_to_play_on(demo, screen)


def _tell_how_to_play_on(demo: DemoHerd, screen: Screen) -> None:
    screen.say("In another terminal, as root:")
    screen.copyable(f"export VMHERD_REDIS_URL='{demo.redis_url}'\nexport PATH={REPOSITORY}/.venv/bin:$PATH")
    screen.say("Then, for example, and behind vmherd's back too, which it will notice:")
    screen.copyable(
        "vmherd get vm -w\n"
        "vmherd cordon h2 && vmherd evict web-1 db-1\n"
        f"virsh -c '{demo.lab.hosts[0].libvirt_uri}' list"
    )
    screen.say(f"Flower shows workers, tasks and queues, to user {USER} with password {demo.flower.password}:")
    screen.copyable(demo.flower.url)
    screen.say("Logs of all processes:")
    screen.copyable(f"{demo.lab.logs}")


def _tell_failure(demo: DemoHerd, error: Exception) -> None:
    folder = demo.keep_logs()
    print(f"\nThe demo failed: {error if isinstance(error, LabError) else repr(error)}", file=sys.stderr)
    if folder is not None:
        (folder / "failure.txt").write_text("".join(traceback.format_exception(error)))
        print(f"The logs of all processes, and where it failed, are in {folder}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
