"""Nodes' leases as Kubernetes shows them: `kubectl describe node` asks for the node's own in `kube-node-lease`.

They are read from Redis when they are asked for, and are not in the copy in memory: one that is renewed every other
second is no change that anybody waits for. So they can be read and not watched. Nothing is decided by what is shown.
"""

from datetime import UTC, datetime
from typing import Annotated, ClassVar, Final, Literal, cast

from pydantic import PlainSerializer

from orchestrator.api.entries import ApiResource, Entry
from orchestrator.api.targets import Choice
from orchestrator.cli.ages import age
from orchestrator.cli.tables import Column, Table
from orchestrator.lease import StoredLease, read_lease
from orchestrator.resources import Node, ObjectMeta, Resource
from orchestrator.resources.meta import Model
from orchestrator.services.context import Context
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors

NODE_LEASES: Final = "kube-node-lease"
"""The namespace that clients look into."""


def _micro_time(value: datetime) -> str:
    return f"{value.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"  # Kubernetes reads no other form of these


class LeaseSpec(Model):
    """Who holds it, and since when.

    Attributes:
        holder_identity: The node.
        lease_duration_seconds: It is Ready for so long after a renewal.
        renew_time: The last renewal, by Redis's clock.
    """

    holder_identity: str = ""
    lease_duration_seconds: int = 0
    renew_time: Annotated[datetime, PlainSerializer(_micro_time, return_type=str)] | None = None


class Lease(Resource):
    """A node's heartbeat."""

    kind_name: ClassVar[str] = "Lease"
    group_version: ClassVar[str] = "coordination.k8s.io/v1"
    plural: ClassVar[str] = "leases"
    short: ClassVar[str] = "lease"

    api_version: Literal["coordination.k8s.io/v1"] = "coordination.k8s.io/v1"
    kind: Literal["Lease"] = "Lease"
    spec: LeaseSpec = LeaseSpec()


LEASES = ApiResource(
    Lease,
    ("get", "list"),
    Table(
        Lease,
        (
            Column("NAME", lambda lease, _: lease.name),
            Column("HOLDER", lambda lease, _: lease.spec.holder_identity),
            Column("RENEWED", lambda lease, a: age(lease.spec.renew_time, a.now), is_clock=True),
        ),
    ),
    is_derived=True,
)


def read_leases(ctx: Context, choice: Choice) -> list[Entry]:
    """Read those that are wanted, by name; one that was never renewed says no time."""
    nodes = sorted(ctx.store.all(Node), key=lambda node: node.name)
    if not nodes:
        return []
    with redis_errors(ctx.store.redis):
        texts = cast("list[str | None]", ctx.store.redis.mget([keys.lease(node.name) for node in nodes]))
    stored = zip(nodes, map(read_lease, texts), strict=True)
    entries = (Entry(LEASES, _lease(node, found)) for node, found in stored)
    return [entry for entry in entries if choice.takes(entry)]


def _lease(node: Node, stored: StoredLease | None) -> Lease:
    meta = ObjectMeta(
        name=node.name,
        namespace=NODE_LEASES,
        uid=node.metadata.uid,
        creation_timestamp=node.metadata.creation_timestamp,
        resource_version=node.metadata.resource_version,
    )
    if stored is None:
        return Lease(metadata=meta, spec=LeaseSpec(holder_identity=node.name))
    spec = LeaseSpec(
        holder_identity=node.name,
        lease_duration_seconds=round(stored.lease.timing.lease_ttl),
        renew_time=datetime.fromtimestamp(stored.renewed_ms / 1000, UTC),
    )
    return Lease(metadata=meta, spec=spec)
