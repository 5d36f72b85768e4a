"""What the console keeps beside the server's copy: operations and events by what they are about, and who is to be told.

It hears of each change once, in the event loop, and adds little to it. Pages are told that something of a kind
changed, not what: each draws anew at most so many times a second, and only what it shows.
"""

import asyncio
from bisect import insort
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Final

from orchestrator.api.catalog import EVENTS, OPERATIONS, VIRTUAL_MACHINES
from orchestrator.api.deltas import Delta
from orchestrator.api.entries import ApiResource
from orchestrator.api.mirror import Mirror
from orchestrator.console.charts import Sample, sample_of
from orchestrator.resources import (
    Event,
    Key,
    Node,
    NodeDrain,
    NodeFencing,
    Resource,
    VirtualMachine,
    VirtualMachineOperation,
)

KINDS: Final = (VirtualMachine, VirtualMachineOperation, Node, NodeDrain, NodeFencing, Event)
SAMPLES_OF_ONE: Final = 600
SAMPLED: Final = 500
"""Migrations whose samples are kept; those begun first go first."""
TOLD: Final = 5_000
"""Events that are kept beyond the hour that Redis keeps them, for the timeline."""


class Changes:
    """Wakes one page when something of some kinds has changed."""

    def __init__(self, kinds: Iterable[type[Resource]]) -> None:
        self.kinds = frozenset(kind.kind_name for kind in kinds)
        self.event = asyncio.Event()


class Samples:
    """The figures of migrations as this server saw them: a bounded ring of each, of the latest ones."""

    def __init__(self) -> None:
        self._kept: dict[Key, deque[Sample]] = {}

    def take(self, operation: VirtualMachineOperation) -> None:
        """Take what an operation says now, if that is new."""
        sample = sample_of(operation)
        if sample is None:
            return
        ring = self._kept.get(operation.key)
        if ring is None:
            while len(self._kept) >= SAMPLED:
                self._kept.pop(next(iter(self._kept)))
            ring = self._kept[operation.key] = deque(maxlen=SAMPLES_OF_ONE)
        if not ring or sample.elapsed_s > ring[-1].elapsed_s:
            ring.append(sample)
        elif sample.elapsed_s < ring[-1].elapsed_s:  # another attempt
            ring.clear()
            ring.append(sample)

    def of(self, key: Key) -> list[Sample]:
        """Give an operation's samples, in order."""
        return list(self._kept.get(key, ()))


class _Watcher:
    """Hears of one kind; after a reload of the copy it is told so, and looks at all of it."""

    def __init__(self, live: "Live", api: ApiResource) -> None:
        self._live = live
        self._api = api

    def push(self, delta: Delta) -> None:
        """Take what happened."""
        old, new = delta.old, delta.new
        self._live.take(old.resource if old is not None else None, new.resource if new is not None else None)

    def end(self, error: Exception | None) -> None:
        """Take that the copy was loaded anew, or that the server ends."""
        if error is not None:
            self._live.reload(self._api)


class Live:
    """The indexes, and the pages that are open. For the event loop's thread.

    Args:
        mirror: The server's copy; not yet started, so that its first load is heard of.

    Attributes:
        operations: Those that are not over, by key.
        told: Events in the order in which they came, the last ones.
    """

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.operations: dict[Key, VirtualMachineOperation] = {}
        self.told: deque[Event] = deque(maxlen=TOLD)
        self.samples = Samples()
        self._by_vm: dict[str, dict[Key, VirtualMachineOperation]] = defaultdict(dict)
        self._about: dict[tuple[str, str], dict[Key, Event]] = defaultdict(dict)
        self._names: dict[str, list[str]] = defaultdict(list)
        self._pages: set[Changes] = set()
        for api in (VIRTUAL_MACHINES, OPERATIONS, EVENTS):
            mirror.watch(api, _Watcher(self, api))
        for kind in KINDS:
            mirror.listen(kind, lambda name=kind.kind_name: self._notify(name))  # type: ignore[misc]

    # --- reading ------------------------------------------------------------------------------------------------------

    def find(self, kind: type[Resource], key: str) -> Resource | None:
        """Give one document of the copy."""
        return self.mirror.documents.get(kind.kind_name, {}).get(Key(key))

    def all(self, kind: type[Resource]) -> Iterable[Resource]:
        """Give all documents of a kind, in no order."""
        return self.mirror.documents.get(kind.kind_name, {}).values()

    def projects(self) -> list[str]:
        """Name the namespaces that have VMs, or a document of their own."""
        shown = {str(entry.resource.name) for entry in self.mirror.entries.get("namespaces", {}).values()}
        return sorted(shown | {name for name, vms in self._names.items() if vms})

    def vms(self, namespace: str) -> Iterator[VirtualMachine]:
        """Give a namespace's VMs, by name."""
        documents = self.mirror.documents.get(VirtualMachine.kind_name, {})
        for name in self._names.get(namespace, ()):
            vm = documents.get(Key(f"{namespace}/{name}"))
            if isinstance(vm, VirtualMachine):
                yield vm

    def count(self, namespace: str) -> int:
        """Say how many VMs a namespace has."""
        return len(self._names.get(namespace, ()))

    def operations_of(self, vm: str) -> list[VirtualMachineOperation]:
        """Give a VM's operations, the latest first."""
        return sorted(self._by_vm.get(vm, {}).values(), key=lambda found: -found.created_version)

    def events_about(self, kind: type[Resource], key: str) -> list[Event]:
        """Give what happened to something, the latest first."""
        found = self._about.get((kind.kind_name, key), {}).values()
        return sorted(found, key=lambda event: (event.last_timestamp, event.name), reverse=True)

    # --- hearing ------------------------------------------------------------------------------------------------------

    def open_page(self, changes: Changes) -> None:
        """Tell a page of changes from now on."""
        self._pages.add(changes)

    def close_page(self, changes: Changes) -> None:
        """Tell it no more."""
        self._pages.discard(changes)

    def _notify(self, kind: str) -> None:
        for page in self._pages:
            if kind in page.kinds:
                page.event.set()

    def take(self, old: Resource | None, new: Resource | None) -> None:
        """Take one change into the indexes."""
        if old is not None and new is None:
            self._drop(old)
        elif new is not None:
            self._put(new, is_new=old is None)

    def reload(self, api: ApiResource) -> None:
        """Make the indexes of a kind anew."""
        if api is VIRTUAL_MACHINES:
            self._names.clear()
        elif api is OPERATIONS:
            self._by_vm.clear()
            self.operations.clear()
        else:
            self._about.clear()
        found = (entry.resource for entry in self.mirror.entries[api.plural].values())
        for resource in sorted(found, key=lambda one: (str(getattr(one, "last_timestamp", "")), one.key)):
            self._put(resource, is_new=True)

    def _put(self, resource: Resource, *, is_new: bool) -> None:
        match resource:
            case VirtualMachine() if is_new:
                insort(self._names[resource.metadata.namespace], resource.name)
            case VirtualMachineOperation():
                self._by_vm[resource.vm_key][resource.key] = resource
                if resource.is_open:
                    self.operations[resource.key] = resource
                else:
                    self.operations.pop(resource.key, None)
                self.samples.take(resource)
            case Event():
                about = resource.involved_object
                key = f"{about.namespace}/{about.name}" if about.namespace else about.name
                self._about[about.kind, key][resource.key] = resource
                if is_new:
                    self.told.append(resource)
            case _:
                pass

    def _drop(self, resource: Resource) -> None:
        match resource:
            case VirtualMachine():
                names = self._names[resource.metadata.namespace]
                if resource.name in names:
                    names.remove(resource.name)
            case VirtualMachineOperation():
                self.operations.pop(resource.key, None)
                self._by_vm[resource.vm_key].pop(resource.key, None)
                if not self._by_vm[resource.vm_key]:
                    del self._by_vm[resource.vm_key]
            case Event():
                about = resource.involved_object
                key = about.kind, f"{about.namespace}/{about.name}" if about.namespace else about.name
                self._about[key].pop(resource.key, None)
                if not self._about[key]:
                    del self._about[key]
            case _:
                pass
