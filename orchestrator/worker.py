"""The control workers' Celery app: the tasks, and logging as the other processes have it."""

from typing import Any

from celery.signals import setup_logging

from orchestrator import logs
from orchestrator.celery_app import app

__all__ = ["app"]


@setup_logging.connect
def _configure(**_: Any) -> None:
    logs.configure("control")
