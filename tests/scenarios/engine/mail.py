"""Celery's part: messages in Redis lists, early acknowledged. A message may be lost, doubled, or come late."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import HypervisorUnavailable, RecoveryMode, StoreUnavailable
from orchestrator.logs import logger
from orchestrator.queues import Message, Task
from orchestrator.store.connection import redis_errors
from tests.scenarios.engine.redis_time import SimulatedRedis
from tests.scenarios.engine.schedule import Schedule

log = logger(__name__)

_LOOK_S = 60.0
_RETRY_S = 1.0

Handlers = Mapping[Task, Callable[..., object]]


@dataclass
class Fate:
    """What becomes of messages.

    Attributes:
        task: Of which task.
        what: `lose`, `double` or `delay`.
        count: Of how many more.
        delay_s: For `delay`.
    """

    task: str
    what: str
    count: int
    delay_s: float = 0.0


class Mail:
    """The messenger of all processes.

    Args:
        client: Of Redis.
        schedule: For late messages.
    """

    def __init__(self, client: SimulatedRedis, schedule: Schedule) -> None:
        self.fates: list[Fate] = []
        self.results: dict[str, dict[str, Any]] = {}
        self._client = client
        self._schedule = schedule

    def send(self, message: Message) -> None:
        """Send a message, or log why it could not be sent."""
        text = json.dumps([message.task.value, list(message.args)])
        fate = next((fate for fate in self.fates if fate.task == message.task.value), None)
        copies = 1
        if fate is not None:
            fate.count -= 1
            if fate.count <= 0:
                self.fates.remove(fate)
            copies = {"lose": 0, "double": 2, "delay": 0}[fate.what]
            if fate.what == "delay":
                self._schedule.at(self._schedule.now + fate.delay_s, lambda: self._push(message.queue, text))
        for _ in range(copies):
            self._push(message.queue, text)

    def _push(self, queue: str, text: str) -> None:
        try:
            with redis_errors(self._client):
                self._client.lpush(queue, text)
        except StoreUnavailable as error:
            log.warning("message not sent", queue=queue, error=str(error))

    def finish(self, task_id: str, result: dict[str, Any]) -> None:
        """Keep a result."""
        self.results[task_id] = result


def serve(client: SimulatedRedis, schedule: Schedule, queue: str, handlers: Handlers) -> None:
    """Take messages from a queue for ever and do what they ask for, as the tasks of `tasks.py` do.

    Args:
        client: Of the process that serves.
        schedule: In whose time it waits.
        queue: Its name.
        handlers: By task; each is called with the message's arguments.
    """
    while True:
        try:
            with redis_errors(client):
                message = client.take(queue, _LOOK_S)
            if message is not None:
                task, args = message
                handlers[Task(task)](*args)
        except (StoreUnavailable, RecoveryMode, HypervisorUnavailable) as error:
            log.warning("left to reconcile", queue=queue, error=str(error))
            schedule.wait(lambda: False, _RETRY_S)
