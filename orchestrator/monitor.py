"""Flower's app: the one that lists every queue of the herd, those of nodes that join later too.

Flower would ask the workers for their queues by remote control, which is off. Then it shows those that its app names.
"""

from collections.abc import Iterator

from kombu import Queue

from orchestrator.celery_app import make_app
from orchestrator.errors import StoreUnavailable
from orchestrator.logs import logger
from orchestrator.queues import CONTROL, FENCING, LIVENESS, lifecycle_queue, migrate_queue
from orchestrator.resources import Node
from orchestrator.store import Store

log = logger(__name__)


class HerdQueues:
    """The herd's queues, looked up each time that someone goes through them; without Redis those of the last time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._nodes: list[str] = []

    def __iter__(self) -> Iterator[Queue]:
        try:
            self._nodes = [node.name for node in self._store.all(Node)]
        except StoreUnavailable as error:
            log.warning("queues of nodes not read", error=str(error))
        yield from (Queue(name) for name in (CONTROL, LIVENESS, FENCING))
        for node in self._nodes:
            yield from (Queue(migrate_queue(node)), Queue(lifecycle_queue(node)))


app = make_app("vmherd-flower")
app.conf.task_queues = HerdQueues(Store.open())
