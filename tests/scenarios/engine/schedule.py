"""Simulated time: the real code's threads, of which one runs at a time, and a clock that stands still meanwhile.

Each thread of the herd is a thread of this process that runs only while the schedule lets it, from one wait to the
next. When all of them wait, the clock moves to the earliest moment for which one does. So what happens depends on
nothing but the seed: which of those that could go on goes first, and where a thread is interrupted between two effects.

A process that is killed takes no further effect: whatever it calls next raises `Killed` in it.
"""

import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

NEVER = float("inf")
_LEAST_S = 1e-6
_REAL_S = 60.0
"""What one stretch between two waits may take of real time; it takes milliseconds."""
_MOST_STEPS_AT_ONCE = 20_000
"""So many steps without the clock moving mean that two threads only wake each other."""


class Killed(BaseException):
    """Raised in a thread of a process that was killed; like the signal, nothing may catch it."""


class Stuck(AssertionError):
    """The schedule can't go on."""


class Process:
    """A process of the herd: its threads end together.

    Attributes:
        name: `migrate@n1`, `control`.
        node: The node on which it runs; empty for the control plane's.
        number: Tells it from its predecessors of the same name.
    """

    def __init__(self, name: str, number: int = 0) -> None:
        self.name = name
        self.node = name.partition("@")[2]
        self.number = number
        self.is_alive = True
        self.is_frozen = False
        self.began_at = 0.0

    @property
    def holder(self) -> str:
        """As `workers.holder` names a process."""
        return f"{self.number}@{self.began_at:.3f}"


class Strand:
    """One thread of a process."""

    def __init__(self, schedule: "Schedule", process: Process, name: str, run: Callable[[], None]) -> None:
        self.process = process
        self.name = name
        self.has_ended = False
        self.error: BaseException | None = None
        self.ready: Callable[[], bool] = _always
        self.deadline = NEVER
        self.go = _closed_gate()
        self._schedule = schedule
        self._run = run
        self.thread = threading.Thread(target=self._live, name=f"{process.name} {name}", daemon=True)
        self.thread.start()

    def join(self, timeout: float | None = None) -> None:
        """Wait, in simulated time, until it has ended."""
        self._schedule.wait(lambda: self.has_ended, timeout)

    def can_go_on(self, now: float) -> bool:
        """Whether it waits for nothing any more."""
        if not self.process.is_alive:
            return True
        return not self.process.is_frozen and (self.deadline <= now or self.ready())

    def _live(self) -> None:
        self.go.acquire()
        try:
            if self.process.is_alive:
                self._run()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by the schedule, in the test's thread
            self.error = error
        finally:
            self.has_ended = True
            self._schedule.parked.release()


def _always() -> bool:
    return True


def _closed_gate() -> threading.Lock:
    """Make a gate that one thread passes (`acquire`) each time that another opens it (`release`)."""
    gate = threading.Lock()
    gate.acquire()
    return gate


class Schedule:
    """Runs strands, one at a time, in simulated time.

    Args:
        seed: Of all choices. 0 is the plain order: nobody is interrupted, and those that wait go on in turn.
        on_tick: Told each new time.

    Attributes:
        next_elsewhere: Gives the next moment at which something happens by itself on the hosts, or None; to be set.
        now: Seconds since the beginning.
        current: The strand that runs; None while the test's own thread does.
    """

    def __init__(self, seed: int, on_tick: Callable[[float], None]) -> None:
        self.now = 0.0
        self.seed = seed
        self.current: Strand | None = None
        self.parked = _closed_gate()
        self.next_elsewhere: Callable[[], float | None] = lambda: None
        self._random = random.Random(seed)
        self._on_tick = on_tick
        self._strands: list[Strand] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = 0
        self._turn = 0
        self._held = 0
        on_tick(0.0)

    # --- called by threads of the herd --------------------------------------------------------------------------------

    def wait(self, ready: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until something holds or the time is over; tells whether it holds.

        In the test's own thread nothing waits.
        """
        strand = self.current
        if strand is None:
            return ready()
        strand.ready = ready
        strand.deadline = NEVER if timeout_s is None else round(self.now + max(0.0, timeout_s), 6)
        self._park(strand)
        return ready()

    def point(self) -> None:
        """Stand between two effects of a thread: it may be interrupted here, and dies here when it was killed."""
        strand = self.current
        if strand is None:
            return
        if not strand.process.is_alive:
            raise Killed
        if self.seed and not self._held and self._random.random() < 0.2:
            strand.ready, strand.deadline = _always, NEVER
            self._park(strand)

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Do something that no other thread may come between."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def _park(self, strand: Strand) -> None:
        if not strand.process.is_alive:
            raise Killed
        self.current = None
        self.parked.release()
        strand.go.acquire()
        self.current = strand
        if not strand.process.is_alive:
            raise Killed

    # --- called by whoever sets it up ---------------------------------------------------------------------------------

    def spawn(self, process: Process, name: str, run: Callable[[], None]) -> Strand:
        """Add a thread; it begins when its turn comes."""
        strand = Strand(self, process, name, run)
        self._strands.append(strand)
        return strand

    def at(self, moment: float, run: Callable[[], None]) -> None:
        """Call something at a moment, in the test's own thread; never before those that were set for an earlier one."""
        self._numbers += 1
        self._timers.append((round(max(moment, self.now), 6), self._numbers, run))
        self._timers.sort(key=lambda timer: timer[:2])

    def run_until(self, end: float, after_step: Callable[[], None] = lambda: None) -> None:
        """Let time pass.

        Args:
            end: The moment at which to stop, once all that is due by then was done.
            after_step: Called after each step.

        Raises:
            Stuck: A thread waits for something outside of simulated time, or time does not move on.
            BaseException: What a thread of the herd ended with.
        """
        steps = 0
        while True:
            if self._step():
                after_step()
                steps += 1
                if steps > _MOST_STEPS_AT_ONCE:
                    raise Stuck(f"time stands still at {self.now:.3f}: {self._waiting()}")
                continue
            moments = [s.deadline for s in self._strands if not s.process.is_frozen]
            moments += [timer[0] for timer in self._timers[:1]]
            elsewhere = self.next_elsewhere()
            moments += [] if elsewhere is None else [max(elsewhere, self.now + _LEAST_S)]
            moment = min(moments, default=NEVER)
            if moment > end:
                self._move(end)
                return
            self._move(moment)
            steps = 0
            after_step()  # something may have happened on the hosts

    def end(self) -> None:
        """Kill what is left; every thread has ended then."""
        for strand in self._strands:
            strand.process.is_alive = False
        self._timers.clear()
        while self._strands:
            self._resume(self._strands[0])

    def _move(self, moment: float) -> None:
        self.now = max(self.now, moment)
        self._on_tick(self.now)

    def _step(self) -> bool:
        if self._timers and self._timers[0][0] <= self.now:
            self._timers.pop(0)[2]()
            return True
        able = [strand for strand in self._strands if strand.can_go_on(self.now)]
        if not able:
            return False
        self._turn += 1
        chosen = able[self._turn % len(able)] if not self.seed else self._random.choice(able)
        self._resume(chosen)
        if chosen.error is not None:
            raise chosen.error
        return True

    def _resume(self, strand: Strand) -> None:
        self.current = strand
        strand.go.release()
        if not self.parked.acquire(timeout=_REAL_S):
            frame = sys._current_frames().get(strand.thread.ident or 0)
            where = "".join(traceback.format_stack(frame)) if frame else ""
            self._strands.remove(strand)  # it can't be ended
            raise Stuck(f"{strand.thread.name} waits for something outside of simulated time:\n{where}")
        self.current = None
        if strand.has_ended:
            self._strands.remove(strand)

    def _waiting(self) -> str:
        return ", ".join(s.thread.name for s in self._strands if s.can_go_on(self.now))


class SimulatedClock:
    """`workers.clock` in simulated time."""

    MONOTONIC_AT_BEGIN = 10_000.0

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def monotonic(self) -> float:
        """Seconds since some moment."""
        return self.MONOTONIC_AT_BEGIN + self._schedule.now

    def wait(self, event: threading.Event, timeout_s: float | None) -> bool:
        """Wait on an event."""
        return self._schedule.wait(event.is_set, timeout_s)

    def begin(self, name: str, run: Callable[[], None]) -> Strand:
        """Begin a thread of the process that asks."""
        return self._schedule.spawn(self._process(), name, run)

    def pool(self, name: str, size: int) -> Executor:
        """Make a pool of threads of the process that asks."""
        return _Pool(self._schedule, self._process(), name, size)

    def _process(self) -> Process:
        if self._schedule.current is None:
            raise RuntimeError("a thread is begun by a process of the herd, not by the test")
        return self._schedule.current.process


class _Pool(Executor):
    """At most `size` at a time; what a call raises ends its process's scenario, where a real pool would swallow it."""

    def __init__(self, schedule: Schedule, process: Process, name: str, size: int) -> None:
        self._schedule, self._process, self._name, self._size = schedule, process, name, size
        self._running = 0

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        """Have it called in a thread."""
        future: Future[T] = Future()

        def run() -> None:
            self._schedule.wait(lambda: self._running < self._size)
            self._running += 1
            try:
                future.set_result(fn(*args, **kwargs))
            finally:
                self._running -= 1

        self._schedule.spawn(self._process, self._name, run)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing is kept: its threads end by themselves, or with their process."""
