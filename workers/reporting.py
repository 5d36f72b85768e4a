"""Reports that must arrive: what ended is told again until Redis has it."""

import threading
from typing import Any
from uuid import uuid4

from orchestrator.errors import StoreUnavailable
from orchestrator.logs import logger
from orchestrator.store.node_store import NodeStore
from workers import clock

log = logger(__name__)

_RETRY_S = 0.5


def report_surely(store: NodeStore, kind: str, body: dict[str, Any], stop: threading.Event | None = None) -> None:
    """Report until Redis has it, once: the same request id each time. Ends early only when `stop` is set."""
    request = uuid4().hex
    waiting = stop or threading.Event()
    while not waiting.is_set():
        try:
            store.report(kind, body, request)
        except StoreUnavailable as error:
            log.warning("report waits for Redis", kind=kind, error=str(error))
            clock.wait(waiting, _RETRY_S)
        else:
            return
