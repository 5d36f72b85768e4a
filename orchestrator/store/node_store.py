"""What a node does in Redis, with a node's rights: it reads its grants and orders, and writes its lease and reports.

`access.py` holds the ACL that allows this and nothing else.
"""

import json
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

import redis

from orchestrator.lease import Lease, Reply, read_reply
from orchestrator.resources.adoption import AdoptionOrder, AdoptionOrderKind
from orchestrator.resources.grant import NodeGrant, Order
from orchestrator.resources.looking import LookOrder
from orchestrator.settings import settings
from orchestrator.store import keys
from orchestrator.store.calls import lease_arguments
from orchestrator.store.connection import connect, read_streams, redis_errors, script


@dataclass(frozen=True, slots=True)
class Report:
    """One report of a node.

    Attributes:
        number: The node's counter.
        kind: `Began`, `Progress`, `Ended`, `Answer`, `Adoption`, `Looked`, `Listing`, `Domain` or `HypervisorLost`.
        body: What it says; see the handlers in `services.reports`.
    """

    number: int
    kind: str
    body: dict[str, Any]


class NodeStore:
    """One node's view of Redis.

    Args:
        client: A connection with the node's rights.
        node: Its name.
    """

    def __init__(self, client: "redis.Redis", node: str) -> None:
        self.redis = client
        self.node = node
        self._report = script(client, "report")
        self._claim = script(client, "claim")
        self._lease = script(client, "lease")

    @classmethod
    def open(cls) -> "NodeStore":
        """Open it as the settings say."""
        return cls(connect(settings().redis_url.get_secret_value()), settings().node)

    def renew_lease(self, lease: Lease, peer_key: str = "") -> Reply:
        """Renew the lease; Redis stamps it with its own time.

        Args:
            lease: Newer than any before it.
            peer_key: The one held.

        Returns:
            What the control plane publishes; it may be a refusal.
        """
        with redis_errors(self.redis):
            answer = self._lease(keys=[keys.lease(self.node)], args=lease_arguments(self.node, lease, peer_key))
        return read_reply(cast("str", answer))

    def report(self, kind: str, body: dict[str, Any], request_id: str | None = None) -> int:
        """Append a report and give its number. With the same request id it is written once, however often called."""
        request = keys.node_prefix(self.node) + "request:" + (request_id or uuid4().hex)
        with redis_errors(self.redis):
            number = self._report(
                keys=[keys.counter(self.node), keys.reports(self.node), request],
                args=[keys.REPORTS_MAX, "kind", kind, "body", json.dumps(body, separators=(",", ":"))],
            )
        return int(cast("int", number))

    def show_alive(self, sign: str) -> None:
        """Give a sign of life of the agent, unlike the one before."""
        with redis_errors(self.redis):
            self.redis.set(keys.agent(self.node), sign, px=keys.LEASE_KEPT_MS)

    def show_use(self, cpu: float, memory_mib: int) -> None:
        """Show what is in use of the host, for a minute (`services.use`)."""
        text = json.dumps({"cpu": round(cpu, 4), "memory_mib": memory_mib})
        with redis_errors(self.redis):
            self.redis.set(keys.use(self.node), text, px=keys.USE_KEPT_MS)

    def counter(self) -> int:
        """Read the number of the node's last report."""
        with redis_errors(self.redis):
            return int(cast("str | None", self.redis.get(keys.counter(self.node))) or 0)

    def claim(self, operation: str, epoch: int, holder: str) -> NodeGrant | None:
        """Take a grant: once per epoch, whoever asks; reports `Began` in the same call.

        Returns:
            The grant, or None when it is not (or no longer) there or was taken before, by whomever.
        """
        began = json.dumps({"operation": operation, "epoch": epoch, "holder": holder})
        with redis_errors(self.redis):
            grant = self._claim(
                keys=[
                    keys.claim(self.node, epoch),
                    keys.counter(self.node),
                    keys.reports(self.node),
                ],
                args=[keys.grants(self.node), operation, epoch, f"{holder} {uuid4().hex}", keys.REPORTS_MAX, began],
            )
        return NodeGrant.model_validate_json(cast("str", grant)) if grant else None

    def claimed_by(self, epoch: int) -> str:
        """Read which process claimed a grant; empty if none is known."""
        with redis_errors(self.redis):
            claim = cast("str | None", self.redis.get(keys.claim(self.node, epoch)))
        return (claim or "").partition(" ")[0]

    def grant(self, operation: str) -> NodeGrant | None:
        """Read a grant as it is now."""
        with redis_errors(self.redis):
            grant = cast("str | None", self.redis.hget(keys.grants(self.node), operation))
        return NodeGrant.model_validate_json(grant) if grant else None

    def orders(self) -> dict[str, Order | AdoptionOrder | LookOrder | None]:
        """Read the orders that wait for an answer, by id; None stands for the order to list everything."""
        with redis_errors(self.redis):
            found = cast("dict[str, str]", self.redis.hgetall(keys.orders(self.node)))
        return {order_id: _read_order(body) for order_id, body in found.items()}

    def order(self, order_id: str) -> Order | None:
        """Read one order; None when it is answered or withdrawn."""
        with redis_errors(self.redis):
            body = cast("str | None", self.redis.hget(keys.orders(self.node), order_id))
        order = _read_order(body) if body else None
        return order if isinstance(order, Order) else None

    def adoption_order(self, order_id: str) -> AdoptionOrder | None:
        """Read one order about a definition; None when it is answered or withdrawn."""
        with redis_errors(self.redis):
            body = cast("str | None", self.redis.hget(keys.orders(self.node), order_id))
        order = _read_order(body) if body else None
        return order if isinstance(order, AdoptionOrder) else None

    def wait_for_wake(self, last_id: str, timeout_s: float) -> str:
        """Wait until something is new for this node, or the time is over.

        Args:
            last_id: What the call before gave; `0-0` at first.
            timeout_s: More than 0.

        Returns:
            The id to pass to the next call. Whether it was woken does not matter: what is to be done stands elsewhere.
        """
        with redis_errors(self.redis):
            answer = self.redis.xread({keys.wake(self.node): last_id}, block=max(1, int(timeout_s * 1000)))
        streams = read_streams(answer)
        return streams[0][1][-1][0] if streams else last_id


_ADOPTION_KINDS = frozenset(kind.value for kind in AdoptionOrderKind)


def _read_order(body: str) -> Order | AdoptionOrder | LookOrder | None:
    kind = json.loads(body)["kind"]
    if kind == "list":
        return None
    if kind == "look":
        return LookOrder.model_validate_json(body)
    return AdoptionOrder.model_validate_json(body) if kind in _ADOPTION_KINDS else Order.model_validate_json(body)
