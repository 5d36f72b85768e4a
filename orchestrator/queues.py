"""Names of queues and tasks: the contract between the control plane and the nodes.

A message is a trigger and carries no truth: whoever gets it reads the grant in Redis and acts only if that is current.
So a message may be lost, doubled, late or out of order, and may be sent again at any time.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

CONTROL = "control"
LIVENESS = "liveness"
FENCING = "fencing"

TICK_PERIOD_S = {"reconcile": 2, "liveness": 1, "housekeeping": 60, "rebalance": 10, "capacity": 60, "power": 20}
"""Beat's ticks and their periods, seconds."""


STARTS_PER_NODE = 4
"""Threads of a node's lifecycle worker, and the most starts that it is granted at a time: one that waited in its queue
for longer than a grant lives would count as suspect."""


class Task(StrEnum):
    """Names of tasks, as Flower shows them."""

    GRANT = "vmherd.grant"
    RECONCILE = "vmherd.reconcile"
    HOUSEKEEPING = "vmherd.housekeeping"
    LIVENESS = "vmherd.liveness"
    FENCE = "vmherd.fence"
    FAILOVER = "vmherd.failover"
    POWER = "vmherd.power"
    READ_POWER = "vmherd.read-power"
    POWER_ON = "vmherd.power-on"
    REBALANCE = "vmherd.rebalance"
    CAPACITY = "vmherd.capacity"
    EVICT = "vmherd.evict"
    MIGRATE = "vmherd.migrate"
    NODE_MIGRATE = "node.migrate"
    NODE_START = "node.start"
    NODE_STOP = "node.stop"
    NODE_SETTLE = "node.settle"
    NODE_ADOPT = "node.adopt"


@dataclass(frozen=True, slots=True)
class Message:
    """One message to be sent.

    Attributes:
        task: What is to be looked at.
        queue: Who looks.
        args: Names and numbers only; the VM's name first, so that Flower's list can be read.
    """

    task: Task
    queue: str
    args: tuple[str | int, ...] = ()


class Messenger(Protocol):
    """Sends messages. One that can't be sent is logged and dropped: reconcile sends it again."""

    def send(self, message: Message) -> None:
        """Send a message, or log why it could not be sent."""
        ...

    def finish(self, task_id: str, result: dict[str, Any]) -> None:
        """Store the result of a task that ended without one, or log why it could not be stored."""
        ...


def migrate_queue(node: str) -> str:
    """A node's migrations; its worker takes one at a time."""
    return f"node.{node}.migrate"


def lifecycle_queue(node: str) -> str:
    """A node's starts and stops, and the repairs of a settlement."""
    return f"node.{node}.lifecycle"
