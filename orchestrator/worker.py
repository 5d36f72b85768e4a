"""The control workers' Celery app: the tasks, with logging as the other processes have it, and metrics."""

from typing import Any

from celery.signals import setup_logging, worker_init, worker_ready, worker_shutdown

from orchestrator import logs, metrics, tasks
from orchestrator.celery_app import app
from orchestrator.services.herd_metrics import HerdMetrics
from orchestrator.settings import settings

__all__ = ["app"]

ROLE = settings().worker_role
_CONTROL = "control"
_ROLES = frozenset({_CONTROL, "liveness", "fencing"})


@setup_logging.connect
def _configure(**_: Any) -> None:
    logs.configure(ROLE if ROLE in _ROLES else _CONTROL)


@worker_init.connect
def _measure(**_: Any) -> None:
    if ROLE not in _ROLES:
        return  # somebody's own way to start a worker
    metrics.watch_tasks()
    # The herd's own are given where its copy is kept anyway. Each control worker gives the same.
    metrics.serve(ROLE, HerdMetrics(tasks.herd).render if ROLE == _CONTROL else None)


@worker_ready.connect
def _look(**_: Any) -> None:
    if ROLE == "liveness":  # its pool is threads: nothing is forked from here on
        tasks.lookout.begin()


@worker_shutdown.connect
def _look_no_more(**_: Any) -> None:
    tasks.lookout.end()
