"""A process's lookout: it looks at leases, and at agents' signs of life, once a period by its own clock.

What a look may conclude rests on looks without a break (`planner.liveness.LONGEST_GAP_S`). Beat's ticks can't bring
that where several workers take them: a queue serves whom it likes, and one of them may get none for half a minute. So
each liveness process looks by itself, in a thread, and a tick only sees to it that it does (`tasks.liveness`). Several
lookouts side by side are safe: each counts by its own readings, and what it does is decided from the documents as they
stand when it is done. Should one end, the others have watched all the time.

It goes on while no beat runs: whatever it needs to know is in Redis, and a herd without beat loses hosts as well.
"""

import threading
import time
from collections.abc import Callable
from typing import Final

from orchestrator import metrics
from orchestrator.errors import StoreUnavailable
from orchestrator.logs import logger
from orchestrator.planner.liveness import LONGEST_GAP_S
from orchestrator.queues import TICK_PERIOD_S
from orchestrator.services.agents import AgentWatch
from orchestrator.services.context import Context
from orchestrator.services.herd import Herd
from orchestrator.services.liveness import Liveness

log = logger(__name__)

Look = Callable[[], None]
_REST_S: Final = 0.05
"""Between two looks that take longer than a period."""
_END_S: Final = 3.0


class Lookout:
    """Looks once a period until it is ended; one a process.

    Args:
        make: Makes what is called for each look; called in the thread, again and again until Redis is there.
        period_s: From the begin of a look to that of the next one.
    """

    def __init__(self, make: Callable[[], Look], period_s: float = TICK_PERIOD_S["liveness"]) -> None:
        self._make = make
        self._period_s = period_s
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._looked_at = 0.0

    def begin(self) -> None:
        """Look from now on, unless it does already, or was ended."""
        with self._lock:
            if self._ended.is_set() or (self._thread is not None and self._thread.is_alive()):
                return
            self._looked_at = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Look no more; a look under way is given a moment. One that is cut short left nothing half done."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_END_S)

    def late_s(self) -> float:
        """How long ago a look came to its end, beyond what may lie between two; 0: it does what it should."""
        return max(0.0, time.monotonic() - self._looked_at - LONGEST_GAP_S)

    def _run(self) -> None:
        look: Look | None = None
        while not self._ended.is_set():
            begun = time.monotonic()
            try:
                look = look or self._make()
                look()
            except StoreUnavailable as error:
                log.warning("liveness: no store", error=str(error))
            except Exception:  # the thread's entry point: the next look is as good as any
                log.exception("a look at the leases failed")
            else:
                self._looked_at = time.monotonic()
                metrics.LOOKED_AT.set(time.time())
            self._ended.wait(max(begun + self._period_s - time.monotonic(), _REST_S))


def look_at(ctx: Context, herd: Herd, period_s: float = TICK_PERIOD_S["liveness"]) -> Look:
    """Give what looks at agents and leases, and again at what falls due within a period."""
    agents, leases = AgentWatch(ctx, herd), Liveness(ctx, herd)

    def look() -> None:
        try:
            agents.scan()
        finally:  # nothing about agents keeps the leases from being watched
            leases.watch(period_s)

    return look
