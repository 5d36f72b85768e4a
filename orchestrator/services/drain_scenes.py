"""What a drain is decided from: the VMs of its node, and their operations, as Redis has them or a copy of it.

A step that is committed reads Redis. Reconcile, which looks at every open drain, reads its copy: what it finds there is
no more than a reason to step.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Protocol, TypeVar, cast

from orchestrator.planner.draining import Scene
from orchestrator.planner.observation import ABSENT
from orchestrator.resources import (
    Key,
    Node,
    NodeDrain,
    NodeInventory,
    Resource,
    VirtualMachine,
    VirtualMachineOperation,
)
from orchestrator.resources.meta import split_key
from orchestrator.store import Store, keys
from orchestrator.store.connection import redis_errors
from orchestrator.store.follower import Follower

R = TypeVar("R", bound=Resource)

_GONE = frozenset({ABSENT, "shutoff"})


def scene_of(store: Store, drain: NodeDrain, now: datetime) -> Scene:
    """Read what a drain is decided from; `now` is the store's time."""
    return _scene(_Stored(store), drain, now)


def copied_scene(follower: Follower, drain: NodeDrain, now: datetime) -> Scene:
    """Read it from a follower's copy, under its lock."""
    return _scene(_Copied(follower), drain, now)


class _Source(Protocol):
    """Where documents and indexes are read: Redis, or a copy of it."""

    def find(self, kind: type[R], key: str) -> R | None: ...
    def many(self, kind: type[R], wanted: Iterable[str]) -> Mapping[Key, R]: ...
    def members(self, index: str) -> Mapping[str, str | None]: ...
    def fields(self, index: str, wanted: list[str]) -> list[str]: ...


class _Stored:
    """Redis itself."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def find(self, kind: type[R], key: str) -> R | None:
        return self.store.find(kind, key)

    def many(self, kind: type[R], wanted: Iterable[str]) -> Mapping[Key, R]:
        return self.store.many(kind, wanted)

    def members(self, index: str) -> Mapping[str, str | None]:
        with redis_errors(self.store.redis):
            return cast("dict[str, str | None]", self.store.redis.hgetall(index))

    def fields(self, index: str, wanted: list[str]) -> list[str]:
        if not wanted:
            return []
        with redis_errors(self.store.redis):
            found = cast("list[str | None]", self.store.redis.hmget(index, wanted))
        return [value for value in found if value]


class _Copied:
    """A follower's copy; used under its lock."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower

    def find(self, kind: type[R], key: str) -> R | None:
        return self.follower.get(kind, key)

    def many(self, kind: type[R], wanted: Iterable[str]) -> Mapping[Key, R]:
        found = ((Key(key), self.follower.get(kind, key)) for key in wanted)
        return {key: resource for key, resource in found if resource is not None}

    def members(self, index: str) -> Mapping[str, str | None]:
        return self.follower.index.get(index, {})

    def fields(self, index: str, wanted: list[str]) -> list[str]:
        entries = self.follower.index.get(index, {})
        return [value for key in wanted if (value := entries.get(key))]


def _scene(source: _Source, drain: NodeDrain, now: datetime) -> Scene:
    name = drain.name
    claims = source.members(keys.claims(name))
    inventory = source.find(NodeInventory, name)
    domains = inventory.domains.values() if inventory is not None else ()
    shown = frozenset(seen.vm for seen in domains if seen.vm and seen.state not in _GONE)
    here = {claim.removeprefix("vm/") for claim in claims if claim.startswith("vm/")}
    vms = source.many(VirtualMachine, sorted({*here, *shown, *drain.vms}))
    active = source.many(VirtualMachineOperation, source.fields(keys.ACTIVE_OPERATIONS, sorted(vms)))
    named = {
        key: f"{split_key(Key(key))[0]}/{vm.operation}" for key, vm in drain.vms.items() if vm.operation and key in vms
    }
    known = source.many(VirtualMachineOperation, sorted(named.values()))
    arriving = sorted(claim.removeprefix("operation/") for claim in claims if claim.startswith("operation/"))
    return Scene(
        drain=drain,
        node=source.find(Node, name),
        vms=vms,
        operations={operation.vm_key: operation for operation in active.values()},
        ended={
            key: operation
            for key, wanted in named.items()
            if (operation := known.get(Key(wanted))) is not None and not operation.is_active
        },
        inbound=tuple(source.many(VirtualMachineOperation, arriving).values()),
        shown=shown,
        now=now,
    )
