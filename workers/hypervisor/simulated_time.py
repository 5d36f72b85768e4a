"""The simulation's time: what is to happen at which moment, and no more than that.

Nothing runs by itself. Whoever holds the timeline brings it up to date (`advance`), and what fell due since happens in
its order, each at its own moment; `next_at` says when the next thing falls due. So the same hosts live in real time, in
time that runs faster, and in time that jumps.
"""

import heapq
from collections.abc import Callable
from typing import Final

_ROUNDING_S: Final = 1e-6
"""Of the clock's seconds: a clock that was set to what `next_at` gave may read a little less, and time stand still."""


class Timer:
    """Something that is to happen once, unless it is cancelled."""

    __slots__ = ("action", "at", "is_cancelled")

    def __init__(self, at: float, action: Callable[[], object]) -> None:
        self.at = at
        self.action = action
        self.is_cancelled = False

    def cancel(self) -> None:
        """Let it not happen; too late is no error."""
        self.is_cancelled = True


class Timeline:
    """Simulated seconds since the beginning, and what they bring.

    Args:
        clock: Monotonic, in seconds.
        speed_up: Simulated seconds that pass in one of the clock's, > 0.

    Attributes:
        now: The moment up to which everything has happened.
    """

    def __init__(self, clock: Callable[[], float], speed_up: float = 1.0) -> None:
        if speed_up <= 0:
            raise ValueError(f"a speed-up of {speed_up:g}: time would not move on")
        self.now = 0.0
        self._clock = clock
        self._speed_up = speed_up
        self._began_at = clock()
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = 0

    def after(self, seconds: float, action: Callable[[], object]) -> Timer:
        """Have something happen in so many simulated seconds; at one moment, in the order in which it was set."""
        timer = Timer(self.now + max(0.0, seconds), action)
        self._count += 1
        heapq.heappush(self._timers, (timer.at, self._count, timer))
        return timer

    def advance(self) -> None:
        """Let everything happen that has fallen due."""
        until = max(self.now, (self._clock() - self._began_at) * self._speed_up)
        soon = until + _ROUNDING_S * self._speed_up
        while (timer := self._first()) is not None and timer.at <= soon:
            heapq.heappop(self._timers)
            self.now = max(self.now, timer.at)
            timer.action()
        self.now = max(self.now, until)

    def next_at(self) -> float | None:
        """By the clock, when the next thing falls due; None while nothing is set."""
        timer = self._first()
        return None if timer is None else self._began_at + timer.at / self._speed_up

    def _first(self) -> Timer | None:
        while self._timers and self._timers[0][2].is_cancelled:
            heapq.heappop(self._timers)
        return self._timers[0][2] if self._timers else None
