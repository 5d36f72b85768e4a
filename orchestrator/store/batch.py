"""What one commit is made of: documents against their versions, checks, and effects on indexes and slots.

The indexes of a document are derived from it (`indexes`), so a commit never forgets to update one: `Batch.put` takes
the difference between what the old document put there and what the new one does.
"""

import json
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from orchestrator.resources import (
    Action,
    Node,
    NodeFencing,
    Order,
    OrderKind,
    Resource,
    VirtualMachine,
    VirtualMachineOperation,
)
from orchestrator.resources.node import NodeInventory
from orchestrator.resources.outdated import outdated_orders
from orchestrator.store import keys

Command = list[str | int]
_UNIQUE = frozenset({keys.ACTIVE_OPERATIONS, keys.OPEN_GRANTS, keys.VM_UIDS})
LIST_ORDER = '{"kind":"list"}'
"""The order to a node to list all its domains anew."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One entry that a document has in an index: a member of a set (value None) or a field of a hash."""

    key: str
    member: str
    value: str | None = None


def indexes(resource: Resource | None, memory_overhead_mib: int = 0) -> frozenset[IndexEntry]:
    """Derive a document's index entries.

    Args:
        resource: None has none.
        memory_overhead_mib: What QEMU takes of its host besides the guest's memory.
    """
    match resource:
        case Node() if resource.is_schedulable:
            return frozenset({IndexEntry(keys.SCHEDULABLE, resource.name)})
        case VirtualMachine():
            entries = {IndexEntry(keys.VM_UIDS, resource.metadata.uid, resource.key)}
            if resource.status.node_name and resource.status.phase.occupies_node:
                spec = resource.running_spec
                demand = f"{spec.memory_mib + memory_overhead_mib} {spec.cpu_millicores}"
                entries.add(IndexEntry(keys.claims(resource.status.node_name), f"vm/{resource.key}", demand))
            for node, order in outdated_orders(resource).items():
                entries.add(IndexEntry(keys.orders(node), order.id, order.model_dump_json(by_alias=True)))
            return frozenset(entries)
        case VirtualMachineOperation():
            entries = _grant_indexes(resource)  # a superseded one may have a grant that has to end first
            entries |= _question_indexes(resource)
            if resource.is_active:
                entries.add(IndexEntry(keys.ACTIVE_OPERATIONS, resource.vm_key, resource.key))
            return frozenset(entries)
        case NodeInventory():
            # Domains that we don't manage count in capacity. Each of their vCPUs is taken as reserved whole.
            entries = {
                IndexEntry(keys.claims(resource.name), f"domain/{uuid}", f"{d.memory_mib} {d.vcpus * 1000}")
                for uuid, d in resource.domains.items()
                if not d.vm and d.state != "shutoff"
            }
            if resource.listing_order:
                entries.add(IndexEntry(keys.orders(resource.name), resource.listing_order, LIST_ORDER))
            return frozenset(entries)
        case NodeFencing():
            entries = {
                IndexEntry(keys.orders(resource.name), order.id, order.model_dump_json(by_alias=True))
                for order in resource.status.orders.values()
            }
            if resource.status.listing_order:
                entries.add(IndexEntry(keys.orders(resource.name), resource.status.listing_order, LIST_ORDER))
            return frozenset(entries)
        case _:
            return frozenset()


def _grant_indexes(operation: VirtualMachineOperation) -> set[IndexEntry]:
    """What an open grant holds: its slots, its reservation, the node's copy of it, the orders under way.

    All of them are indexes of the operation's document: they come with the grant in one commit, and no failure can
    leave one behind, since the commit that ends the grant takes them away.
    """
    grant, copy = operation.status.grant, operation.node_grant
    if grant is None:
        return set()
    key = operation.key
    entries = {IndexEntry(keys.OPEN_GRANTS, operation.vm_key, key)}
    if copy is not None:
        entries.add(IndexEntry(keys.grants(grant.node), key, copy.model_dump_json(by_alias=True)))
    if grant.action is Action.MIGRATE:  # a start's claim is its VM's own: the VM is on its node from the grant on
        entries |= {
            IndexEntry(keys.claims(grant.target), f"operation/{key}", f"{grant.memory_mib} {grant.cpu_millicores}"),
            IndexEntry(keys.SLOTS_CLUSTER, key),
            IndexEntry(keys.slots_outbound(grant.node), key),
            IndexEntry(keys.slots_inbound(grant.target), key),
        }
    if grant.settlement is not None:
        entries |= {
            IndexEntry(keys.orders(node), order.id, order.model_dump_json(by_alias=True))
            for node, order in grant.settlement.orders.items()
        }
    return entries


def _question_indexes(operation: VirtualMachineOperation) -> set[IndexEntry]:
    """The questions that an operation's grant waits for; none is left once it is granted, or has ended."""
    asked = operation.status.questions
    if asked is None or not operation.awaits_answers:
        return set()
    order = Order(
        id="",
        kind=OrderKind.CHECK if asked.about else OrderKind.DESCRIBE,
        uuid=asked.uuid,
        epoch=0,
        incarnation=asked.incarnation,
        action=Action.MIGRATE,
        machine=asked.machine,
        copied_disks=asked.copied_disks,
    )
    return {
        IndexEntry(keys.orders(node), question.id, order.with_(id=question.id).model_dump_json(by_alias=True))
        for node, question in asked.open.items()
    }


@dataclass(slots=True)
class Batch:
    """One commit being put together.

    Attributes:
        is_dry: Whether it is only looked at what it would do.
        request_id: Lets the store answer a repeated request without doing it twice.
        told: What the store logs once it is committed: event, whether it is a warning, and what goes with it.
    """

    memory_overhead_mib: int = 0
    is_dry: bool = False
    request_id: str = field(default_factory=lambda: uuid4().hex)
    checks: list[Command] = field(default_factory=list)
    writes: list[dict[str, Any]] = field(default_factory=list)
    effects: list[Command] = field(default_factory=list)
    told: list[tuple[str, bool, dict[str, Any]]] = field(default_factory=list)
    _written: list[Resource] = field(default_factory=list)
    _removed: dict[tuple[str, str], str | None] = field(default_factory=dict)

    def create(self, new: Resource) -> "Batch":
        """Store a document that must not exist yet."""
        return self._write(None, new)

    def put(self, old: Resource, new: Resource) -> "Batch":
        """Replace `old`, which must still be what is stored, by `new`."""
        return self._write(old, new)

    def delete(self, old: Resource) -> "Batch":
        """Remove `old`, which must still be what is stored, and what is kept apart of it.

        Watchers are shown `old` as it is given here: what is said on its end may be set in it.
        """
        if isinstance(old, VirtualMachine):
            self.effect("HDEL", keys.ADOPTED, old.metadata.uid)
        return self._write(old, None)

    def check(self, *command: str | int) -> "Batch":
        """Add a check (see `lua/commit.lua`)."""
        self.checks.append(list(command))
        return self

    def effect(self, *command: str | int) -> "Batch":
        """Add an effect (see `lua/commit.lua`)."""
        self.effects.append(list(command))
        return self

    def tell(self, event: str, *, warning: bool = False, **about: Any) -> "Batch":
        """Log this when, and only when, it was committed: one that lost its race is decided anew."""
        self.told.append((event, warning, about))
        return self

    def wake(self, node: str, why: str) -> "Batch":
        """Wake a node's processes, which then read their grants and orders again."""
        return self.effect("XADD", keys.wake(node), "MAXLEN", "~", keys.WAKE_MAX, "*", "why", why)

    def _write(self, old: Resource | None, new: Resource | None) -> "Batch":
        subject = new or old
        assert subject is not None  # noqa: S101 - create, put and delete each pass one
        self.writes.append(
            {
                "kind": subject.kind_name,
                "key": subject.key,
                "expected": old.version if old is not None else 0,
                "body": encode(new) if new is not None else False,
                "last": encode(old) if new is None and old is not None else "",
            }
        )
        self._written.append(subject)
        # A new entry in an index whose members are unique must be new, or take the place of one that this very commit
        # removes: the commit checks that.
        before, after = indexes(old, self.memory_overhead_mib), indexes(new, self.memory_overhead_mib)
        kept = {(entry.key, entry.member) for entry in after}
        for entry in sorted(before - after, key=lambda e: (e.key, e.member)):
            if (entry.key, entry.member) in kept:
                continue  # the new value overwrites it
            self._removed[entry.key, entry.member] = entry.value
            self.effect("SREM" if entry.value is None else "HDEL", entry.key, entry.member)
        for entry in sorted(after - before, key=lambda e: (e.key, e.member)):
            if entry.key in _UNIQUE:
                self.check("field", entry.key, entry.member, self._removed.pop((entry.key, entry.member), None) or "")
            if entry.value is None:
                self.effect("SADD", entry.key, entry.member)
            else:
                self.effect("HSET", entry.key, entry.member, entry.value)
        return self

    @property
    def written(self) -> list[Resource]:
        """The documents of its writes, in their order."""
        return self._written

    def encoded(self) -> str:
        """Give it as the script's argument."""
        request = {
            "id": self.request_id,
            "checks": self.checks,
            "writes": self.writes,
            "effects": self.effects,
            "dry": self.is_dry,
        }
        return json.dumps(request, separators=(",", ":"))


def encode(resource: Resource) -> str:
    """Give a document as it is stored: without its version, which stands before it.

    Empty fields stay, unlike in what people are shown: a required one that is empty could not be read back.
    """
    return resource.model_dump_json(by_alias=True, exclude_none=True, exclude={"metadata": {"resource_version"}})
