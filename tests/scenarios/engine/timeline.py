"""The story of a run: what happened to whom, and when, in words that a scenario can expect.

It is read from the change stream, so nothing that was committed is missing, plus what the hosts were asked to do.
Operations made by policies have random names; here they are called by type, VM and number: `start-a#1`.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from orchestrator.errors import VersionExpired
from orchestrator.resources import (
    KINDS,
    Event,
    Key,
    Maintenance,
    NodeDrain,
    Resource,
    VirtualMachine,
    VirtualMachineOperation,
    find_condition,
)
from orchestrator.store import ChangeType, Store

R = TypeVar("R", bound=Resource)

_UNTOLD = {"Syncing"}
"""Reasons that say no more than how far it is."""

Observer = Callable[[Resource | None, Resource | None], None]


@dataclass
class Entry:
    """One thing that happened.

    Attributes:
        at: Seconds since the scenario's beginning.
        who: `vm/a`, `op/evict-a`, `node/n1`, `host/n1`, `process`, `script`; an event may be about several.
        what: In words; the first of them are what scenarios expect.
        is_warning: A person should look: it has to be expected.
    """

    at: float
    who: tuple[str, ...]
    what: str
    is_warning: bool = False

    def __str__(self) -> str:
        mark = "!" if self.is_warning else " "
        return f"{self.at:9.3f} {mark} {' '.join(self.who):<24} {self.what}"


class Timeline:
    """Collects what happens.

    Args:
        store: Whose change stream is read.
        clock: Gives the seconds since the scenario's beginning; nothing before 0 is told.
    """

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self.entries: list[Entry] = []
        self.documents: dict[tuple[str, Key], Resource] = {}
        self.observers: list[Observer] = []
        self._store = store
        self._clock = clock
        self._version = 0
        self._named: set[str] = set()
        self._aliases: dict[str, str] = {}
        self._numbers: Counter[str] = Counter()

    def tell(self, who: str, what: str, *, is_warning: bool = False) -> None:
        """Add what happened now."""
        at = round(self._clock(), 3)
        if at < 0:
            return
        what = self._renamed(what)
        last = self.entries[-1] if self.entries else None
        if last is not None and what.startswith(("event ", "warning ")) and (last.at, last.what) == (at, what):
            last.who = (*last.who, who)  # one event about several
            return
        self.entries.append(Entry(at, (who,), what, is_warning))

    def name(self, operation: str) -> None:
        """Let an operation be called by the name that the script gave it."""
        self._named.add(operation)

    def all(self, kind: type[R]) -> list[R]:
        """Give all documents of a kind, as they are now, by name."""
        found = [(key, document) for (name, key), document in self.documents.items() if name == kind.kind_name]
        return [cast("R", document) for _, document in sorted(found, key=lambda pair: pair[0])]

    def find(self, kind: type[R], key: str) -> R | None:
        """Give one document, as it is now."""
        return cast("R | None", self.documents.get((kind.kind_name, Key(key))))

    def operation_name(self, operation: VirtualMachineOperation) -> str:
        """Give the name by which the story calls an operation."""
        if operation.name in self._named:
            return operation.name
        if operation.name not in self._aliases:
            stem = f"{operation.spec.type.value.lower()}-{operation.spec.virtual_machine_name}"
            self._numbers[stem] += 1
            self._aliases[operation.name] = f"{stem}#{self._numbers[stem]}"
        return self._aliases[operation.name]

    def catch_up(self) -> None:
        """Take in all that was committed."""
        while self._version < self._store.version():
            try:
                changes = self._store.changes(self._version, 1)
            except VersionExpired:  # the counter skipped ahead: a recovery
                self._reload()
                return
            for change in changes:
                new = None if change.type is ChangeType.DELETED else change.resource
                self._take(change.resource.kind_name, change.resource.key, new)
                self._version = change.version

    def _reload(self) -> None:
        loaded = self._store.load(list(KINDS.values()))
        found = {(kind, key): document for kind, all_ in loaded.resources.items() for key, document in all_.items()}
        for kind, key in self.documents.keys() - found.keys():
            self._take(kind, key, None)
        for (kind, key), document in found.items():
            if document != self.documents.get((kind, key)):
                self._take(kind, key, document)
        self._version = loaded.version

    def _take(self, kind: str, key: Key, new: Resource | None) -> None:
        old = self.documents.get((kind, key))
        if new is None:
            self.documents.pop((kind, key), None)
        else:
            self.documents[kind, key] = new
        for observer in self.observers:
            observer(old, new)
        match new:
            case VirtualMachine():
                self._tell_vm(old if isinstance(old, VirtualMachine) else None, new)
            case VirtualMachineOperation():
                self._tell_operation(old if isinstance(old, VirtualMachineOperation) else None, new)
            case Event():
                self._tell_event(new)
            case NodeDrain():
                self._tell_drain(old if isinstance(old, NodeDrain) else None, new)
            case Maintenance():
                self._tell_maintenance(old if isinstance(old, Maintenance) else None, new)
            case None if isinstance(old, VirtualMachine):
                self.tell(f"vm/{old.name}", "removed")
            case None if isinstance(old, VirtualMachineOperation):
                self.tell(f"op/{self.operation_name(old)}", "removed")
            case _:
                pass

    def _tell_vm(self, old: VirtualMachine | None, new: VirtualMachine) -> None:
        if old is None or stands(old) != stands(new):
            self.tell(f"vm/{new.name}", stands(new))
        running = find_condition(new.status.conditions, "Running")
        before = find_condition(old.status.conditions, "Running") if old is not None else None
        if running is not None and running.status == "Unknown" and running != before:
            self.tell(f"vm/{new.name}", f"Running is not known: {running.reason}: {running.message}")

    def _tell_operation(self, old: VirtualMachineOperation | None, new: VirtualMachineOperation) -> None:
        who = f"op/{self.operation_name(new)}"
        if old is None or old.status.phase is not new.status.phase:
            self.tell(who, f"{new.status.phase.value}" + (f": {new.message}" if new.status.phase.is_final else ""))
        said = find_condition(new.status.conditions, "Completed")
        before = find_condition(old.status.conditions, "Completed") if old is not None else None
        if said is None or new.status.phase.is_final or said.reason in _UNTOLD:
            return
        if before is None or (said.reason, said.message) != (before.reason, before.message):
            self.tell(who, f"says {said.reason}: {said.message}")

    def _tell_drain(self, old: NodeDrain | None, new: NodeDrain) -> None:
        before, now = (old.status if old is not None else None), new.status
        if before is None or before.phase is not now.phase or (before.message != now.message and now.message):
            self.tell(f"drain/{new.name}", f"{now.phase.value}: {now.message}".rstrip(": "))

    def _tell_maintenance(self, old: Maintenance | None, new: Maintenance) -> None:
        if old is None or (old.status.phase, old.status.message) != (new.status.phase, new.status.message):
            self.tell(f"maintenance/{new.name}", f"{new.status.phase.value}: {new.status.message}".rstrip(": "))
        for name in new.spec.nodes:
            before, now = (old.node(name) if old is not None else None), new.node(name)
            if before is None or before.stage is not now.stage:
                self.tell(f"turn/{name}", f"{now.stage.value}: {now.message}".rstrip(": "))

    def _tell_event(self, event: Event) -> None:
        about = event.involved_object
        kinds = {"VirtualMachine": "vm", "VirtualMachineOperation": "op", "Node": "node"}
        name = about.name
        if about.kind == VirtualMachineOperation.kind_name:
            found = self.find(VirtualMachineOperation, f"{about.namespace}/{about.name}")
            name = self.operation_name(found) if found is not None else name
        word = "warning" if event.type == "Warning" else "event"
        what = f"{word} {event.reason}: {event.message}".rstrip(": ")
        self.tell(f"{kinds.get(about.kind, about.kind)}/{name}", what, is_warning=event.type == "Warning")

    def _renamed(self, text: str) -> str:
        for name, alias in self._aliases.items():
            if name in text:
                text = re.sub(rf"{re.escape(name)}\b", alias, text)
        return text


def stands(vm: VirtualMachine) -> str:
    """Say how a VM stands: its phase, and where it runs, or why it does not."""
    status = vm.status
    if status.phase.occupies_node:
        return f"{status.phase.value} on {status.node_name}, incarnation {status.incarnation}"
    running = find_condition(status.conditions, "Running")
    return status.phase.value + (f" ({running.reason})" if running is not None and running.status != "True" else "")
