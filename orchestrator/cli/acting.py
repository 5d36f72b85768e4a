"""What commands work with: the herd through its API or on Redis, as the settings say; and, on Redis, the services."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import structlog

from orchestrator.cli.session import is_remote, open_store
from orchestrator.client import Client
from orchestrator.client.local import LocalClient
from orchestrator.queues import Message, Messenger
from orchestrator.services.context import Context
from orchestrator.settings import settings


class LazyMessenger:
    """Sends through Celery, which is loaded at the first message: most commands send none."""

    def send(self, message: Message) -> None:
        """Send a message, or log why it could not be sent."""
        _celery().send(message)

    def finish(self, task_id: str, result: dict[str, Any]) -> None:
        """Store a task's result, or log why it could not be stored."""
        _celery().finish(task_id, result)


@cache
def _celery() -> Messenger:
    from orchestrator.celery_app import CeleryMessenger, app  # noqa: PLC0415 - a quarter of a second

    return CeleryMessenger(app)


@contextmanager
def open_client() -> Iterator[Client]:
    """Open the herd for one command: through the API where the settings name one, else on Redis.

    A herd that is away is told within seconds, so nothing is tried twice here (see `session`).
    """
    quiet_logs()
    if is_remote():
        client = _remote()
        try:
            yield client
        finally:
            client.close()
        return
    with open_store() as store:
        yield LocalClient(Context(store, LazyMessenger()))


def _remote() -> Client:
    from orchestrator.client.place import find_place  # noqa: PLC0415 - who works on Redis needs no HTTP
    from orchestrator.client.remote import RemoteClient  # noqa: PLC0415

    place = find_place(settings())
    assert place is not None  # noqa: S101 - as `is_remote` said
    return RemoteClient(place)


@contextmanager
def open_context() -> Iterator[Context]:
    """Open what services work with, for one command that needs Redis itself."""
    quiet_logs()
    with open_store() as store:
        yield Context(store, LazyMessenger())


def quiet_logs() -> None:
    """Let only warnings through, as lines like our own: by default, log lines would go to standard output."""
    structlog.configure(
        processors=[_plain],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.getLogger().addHandler(logging.NullHandler())  # else the last resort prints what libraries log


def _plain(_logger: object, _method: str, event: structlog.typing.EventDict) -> str:
    detail = event.get("error") or event.get("message") or ""
    return f"vmherd: warning: {event['event']}" + (f": {detail}" if detail else "")
