"""Beat: periodic ticks, each sent once however many beats run.

Two plain Celery beats run side by side. Before a tick is sent its number (Redis time over its period) is taken with
`SET NX`; the other beat finds it taken. A tick expires after two periods, so a backlog is dropped, not worked off.
"""

from typing import Any

from celery.beat import ScheduleEntry, Scheduler
from celery.signals import setup_logging

from orchestrator import logs, metrics
from orchestrator.celery_app import app
from orchestrator.errors import StoreUnavailable
from orchestrator.logs import logger
from orchestrator.queues import CONTROL, LIVENESS, TICK_PERIOD_S, Task
from orchestrator.settings import settings
from orchestrator.store import keys
from orchestrator.store.connection import connect, redis_errors

log = logger(__name__)

_TASKS = {
    "reconcile": Task.RECONCILE,
    "liveness": Task.LIVENESS,
    "housekeeping": Task.HOUSEKEEPING,
    "rebalance": Task.REBALANCE,
    "power": Task.POWER,
    "capacity": Task.CAPACITY,
}

app.conf.task_send_sent_event = False  # of ticks: see `tasks`
app.conf.beat_schedule = {
    name: {
        "task": _TASKS[name].value,
        "schedule": period,
        "options": {"queue": LIVENESS if name == "liveness" else CONTROL, "expires": 2 * period},
    }
    for name, period in TICK_PERIOD_S.items()
}


@setup_logging.connect
def _configure(**_: Any) -> None:
    logs.configure("beat")


class OnceScheduler(Scheduler):
    """Celery's in-memory scheduler, which asks Redis before it sends a tick."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._redis = connect(settings().redis_url.get_secret_value(), timeout_s=2.0, retries=0)
        super().__init__(*args, **kwargs)
        if not kwargs.get("lazy"):
            metrics.serve("beat")

    def apply_async(self, entry: ScheduleEntry, *args: Any, **kwargs: Any) -> Any:
        """Send a tick, unless another beat has sent it."""
        name = str(entry.name)
        period = TICK_PERIOD_S.get(name)
        if period is not None and not self._is_ours(name, period):
            return None
        return super().apply_async(entry, *args, **kwargs)

    def _is_ours(self, name: str, period: int) -> bool:
        try:
            with redis_errors(self._redis):
                seconds, _ = self._redis.time()
                key = keys.tick(name, seconds // period)
                is_ours = bool(self._redis.set(key, "1", nx=True, ex=10 * period))
        except StoreUnavailable as error:
            metrics.TICKS.labels(name, "failed").inc()
            log.warning("tick not sent", tick=name, error=str(error))
            return False
        metrics.TICKS.labels(name, "sent" if is_ours else "other").inc()
        return is_ours


__all__ = ["OnceScheduler", "app"]
