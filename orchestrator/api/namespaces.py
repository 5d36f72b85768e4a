"""Projects as the API shows them: those that are stored, those in which something is, and `default`."""

from collections.abc import Iterable, Iterator

from orchestrator.api.deltas import Documents
from orchestrator.api.entries import ApiResource
from orchestrator.cli.ages import age
from orchestrator.cli.tables import Column, Table
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    Key,
    Namespace,
    Resource,
    VirtualMachine,
    VirtualMachineOperation,
    make_key,
)
from orchestrator.services.namespaces import unstored
from orchestrator.store import Change, ChangeType

NAMESPACE_TABLE: Table[Namespace] = Table(
    Namespace,
    (
        Column("NAME", lambda namespace, _: namespace.name),
        Column("STATUS", lambda namespace, _: namespace.status.phase.value, is_phase=True),
        Column("AGE", lambda namespace, a: age(namespace.metadata.creation_timestamp, a.now), is_clock=True),
    ),
)
_INHABITANTS = (VirtualMachine.kind_name, VirtualMachineOperation.kind_name)


class NamespaceView:
    """Makes the projects that are shown; the owner of each is its name.

    Args:
        api: What offers them.
    """

    def __init__(self, api: ApiResource) -> None:
        self.api = api
        self._inside: dict[str, set[tuple[str, Key]]] = {}

    def affected(self, change: Change) -> Iterable[str]:
        """Name the project that may appear or go."""
        resource = change.resource
        if isinstance(resource, Namespace):
            return (resource.name,)
        if resource.kind_name not in _INHABITANTS:
            return ()
        namespace = resource.metadata.namespace
        inside = self._inside.setdefault(namespace, set())
        were_any = bool(inside)
        if change.type is ChangeType.DELETED:
            inside.discard((resource.kind_name, resource.key))
        else:
            inside.add((resource.kind_name, resource.key))
        return (namespace,) if were_any != bool(inside) else ()

    def owners(self, documents: Documents) -> Iterable[str]:
        """Name all projects."""
        self._inside = {}
        for kind in _INHABITANTS:
            for key, resource in documents[kind].items():
                self._inside.setdefault(resource.metadata.namespace, set()).add((kind, key))
        return {DEFAULT_NAMESPACE, *(namespace.name for namespace in documents[Namespace.kind_name].values())} | set(
            self._inside
        )

    def make(self, owner: str, documents: Documents) -> Iterator[Resource]:
        """Make one project, if it is there."""
        stored = documents[Namespace.kind_name].get(make_key(owner))
        if stored is not None:
            yield stored
        elif owner == DEFAULT_NAMESPACE or self._inside.get(owner):
            yield unstored(owner)
