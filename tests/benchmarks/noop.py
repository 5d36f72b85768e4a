"""A Celery task that does nothing, on a worker like vmherd's own: the yardstick for what Celery and Redis take.

celery -A tests.benchmarks.noop worker ...        (the worker; `Yardstick` starts it)
"""

import sys
import time
from typing import Any

from celery import Celery, Task

from orchestrator.celery_app import declare, make_app
from tests.lab.herd import LabHerd
from tests.lab.namespaces import REPOSITORY
from tests.waiting import wait_until

QUEUE = "bench"
_WORKER_OPTIONS = ["-P", "threads", "-c", "4", "--without-gossip", "--without-mingle", "-E", "--loglevel", "WARNING"]
"""Of the control workers (`orchestrator.cli.run`)."""


def register(app: Celery) -> "Task[Any, Any]":
    """Give an app the task."""

    @app.task(name="bench.noop", queue=QUEUE, ignore_result=False)
    def noop() -> None:
        """Do nothing."""

    return noop


class Yardstick:
    """Measures round trips of the task.

    Args:
        herd: Whose Redis is used; the worker runs beside the control plane's.
    """

    def __init__(self, herd: LabHerd) -> None:
        argv = [sys.executable, "-m", "celery", "-A", "tests.benchmarks.noop", "worker", "-Q", QUEUE, "-n", "bench@lab"]
        env = herd.environment(VMHERD_REDIS_URL=herd.redis.url_for_hosts, PYTHONPATH=str(REPOSITORY))
        herd.lab.supervise(
            lambda: herd.lab.control.popen([*argv, *_WORKER_OPTIONS], env=env, log="noop", cwd=REPOSITORY), "noop"
        )
        self._task = register(make_app("bench-client", url=herd.redis.url))
        redis = herd.cluster.store.redis
        wait_until(lambda: redis.exists(f"_kombu.binding.{QUEUE}"), 60, "the yardstick's worker listens")

    def round_trip_ms(self) -> float:
        """Send one, and wait for its result."""
        began = time.perf_counter()
        self._task.delay().get(timeout=30)
        return (time.perf_counter() - began) * 1000


app = make_app("vmherd-bench")
declare(app, QUEUE)
register(app)
