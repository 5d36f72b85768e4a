"""The time in which a node's processes live: the clock, waits, and threads beside the caller's.

Whatever in `workers` looks at the clock, waits, or begins a thread does it through this module. The tests' scenarios
put a time of their own in its place (`use`), in which minutes pass in a fraction of a second and one thread runs at a
time; the code that runs is the same. An argument would have to go through every function down to `report_surely`.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol


class Thread(Protocol):
    """Something that runs beside its beginner."""

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, or for `timeout` seconds."""
        ...


class Clock(Protocol):
    """See the functions of this module."""

    def monotonic(self) -> float: ...  # noqa: D102
    def wait(self, event: threading.Event, timeout_s: float | None) -> bool: ...  # noqa: D102
    def begin(self, name: str, run: Callable[[], None]) -> Thread: ...  # noqa: D102
    def pool(self, name: str, size: int) -> Executor: ...  # noqa: D102


class RealClock:
    """This machine's."""

    def monotonic(self) -> float:
        """Read `time.monotonic`."""
        return time.monotonic()

    def wait(self, event: threading.Event, timeout_s: float | None) -> bool:
        """Wait on the event itself."""
        return event.wait(timeout_s)

    def begin(self, name: str, run: Callable[[], None]) -> Thread:
        """Start a daemon thread."""
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    def pool(self, name: str, size: int) -> Executor:
        """Make a pool of threads."""
        return ThreadPoolExecutor(max_workers=size, thread_name_prefix=name)


_clock: Clock = RealClock()


def monotonic() -> float:
    """Seconds since some moment, never set back."""
    return _clock.monotonic()


def wait(event: threading.Event, timeout_s: float | None = None) -> bool:
    """Wait until an event is set or the time is over; tells whether it is set."""
    return _clock.wait(event, timeout_s)


def begin(name: str, run: Callable[[], None]) -> Thread:
    """Run something in a thread that does not keep its process alive."""
    return _clock.begin(name, run)


def pool(name: str, size: int) -> Executor:
    """Make a pool of at most `size` threads."""
    return _clock.pool(name, size)


@contextmanager
def use(clock: Clock) -> Iterator[None]:
    """Live in another time; for tests that simulate it."""
    global _clock  # noqa: PLW0603 - a process lives in one time
    before, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = before
