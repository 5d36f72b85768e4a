"""The herd on Redis itself, with the control plane's rights: the services, called here."""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar, cast

from orchestrator.client.local_upkeep import LocalUpkeep
from orchestrator.client.port import Scope
from orchestrator.errors import AlreadyExists, NotFound, VersionExpired
from orchestrator.resources import (
    Key,
    Resource,
    VirtualMachineClass,
    VirtualMachineOperation,
    make_key,
)
from orchestrator.resources.scheduling import Taint
from orchestrator.services import nodes, operations
from orchestrator.services.classes import delete_class
from orchestrator.services.context import Context
from orchestrator.services.manifests import Applied, Creatable, apply_resource, create_resource
from orchestrator.services.vms import delete_vm
from orchestrator.store import Change
from orchestrator.store.store import Loaded

R = TypeVar("R", bound=Resource)
C = TypeVar("C", bound=Creatable)

IDLE_S = 1.0
"""A watch says that nothing came about so often."""


class LocalClient(LocalUpkeep):
    """`port.Client` on Redis.

    Args:
        context: Of the services. Its store's client decides how often a command is tried again.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.store = context.store

    def find(self, kind: type[R], key: str) -> R | None:
        """Read one resource, or None."""
        return self.store.find(kind, key)

    def get(self, kind: type[R], key: str) -> R:
        """Read one resource."""
        return self.store.get(kind, key)

    def all(self, kind: type[R], namespace: str | None = None) -> list[R]:
        """Read all resources of a kind."""
        return self.store.all(kind, namespace if kind.namespaced else None)

    def many(self, kind: type[R], keys: Iterable[str]) -> dict[Key, R]:
        """Read some resources."""
        return self.store.many(kind, keys)

    def read(self, scope: Scope) -> Loaded:
        """Read what is in a scope."""
        if scope.name and (scope.namespace is not None or not any(kind.namespaced for kind in scope.kinds)):
            return self._read_one(scope)
        loaded = self.store.load(scope.kinds)
        chosen = {
            kind: {key: resource for key, resource in documents.items() if scope.takes(resource)}
            for kind, documents in loaded.resources.items()
        }
        return Loaded(loaded.version, loaded.run_id, chosen)

    def _read_one(self, scope: Scope) -> Loaded:
        version = self.store.version()  # before it is read: a change between the two is given twice, and not lost
        found: dict[str, dict[Key, Resource]] = {}
        for kind in scope.kinds:
            key = make_key(scope.name, scope.namespace or "" if kind.namespaced else "")
            resource = self.store.find(kind, key)
            found[kind.kind_name] = {key: resource} if resource is not None else {}
        return Loaded(version, "", found)

    def watch(self, scope: Scope, since: int, deadline: float | None = None) -> Iterator[Change | None]:
        """Follow what happens in a scope."""
        version = since
        if self.store.version() < version:
            raise VersionExpired(f"version {version} is not this Redis's: list again")
        while deadline is None or time.monotonic() < deadline:
            left = IDLE_S if deadline is None else min(IDLE_S, deadline - time.monotonic())
            changes = self.store.changes(version, max(1, int(left * 1000)))
            for change in changes:
                version = change.version
                if scope.takes(change.resource):
                    yield change
            if not changes:
                if self.store.version() < version:
                    raise VersionExpired(f"this Redis has lost version {version}: list again")
                yield None

    def last_of(self, resource: R) -> R | None:
        """Read how a resource was when it was deleted."""
        return self.store.last_of(resource)

    def create(self, wanted: C) -> C:
        """Create a resource."""
        if isinstance(wanted, VirtualMachineOperation) and wanted.name:
            # Before admission: that would find the operation itself in its way, and blame that.
            try:
                operations.replace_spec(self.context, wanted.manifest())
            except NotFound:
                pass
            else:
                raise AlreadyExists(f"VirtualMachineOperation {wanted.name!r} already exists")
        return cast("C", create_resource(self.context, wanted))

    def apply(self, wanted: Creatable) -> tuple[Creatable, Applied]:
        """Create what is not there, and change what differs."""
        return apply_resource(self.context, wanted)

    def delete(self, kind: type[C], key: str) -> C:
        """Delete a resource."""
        deleted: Creatable
        if kind is VirtualMachineOperation:
            deleted = operations.delete_operation(self.context, key)
        elif kind is VirtualMachineClass:
            deleted = delete_class(self.context, key)
        else:
            deleted = delete_vm(self.context, key)
        return cast("C", deleted)

    def set_unschedulable(self, node: str, *, unschedulable: bool, bring_back: bool | None = None) -> bool:
        """Cordon or uncordon a node."""
        return nodes.set_unschedulable(self.context, node, unschedulable=unschedulable, bring_back=bring_back)

    def set_labels(self, node: str, changes: Mapping[str, str | None]) -> bool:
        """Set or remove labels of a node."""
        return nodes.set_labels(self.context, node, changes)

    def set_taints(self, node: str, wanted: Iterable[Taint], removed: Iterable[tuple[str, str]] = ()) -> bool:
        """Put taints on a node, or remove some."""
        return nodes.set_taints(self.context, node, wanted, removed)

    def close(self) -> None:
        """Close its connections."""
        self.store.close()
