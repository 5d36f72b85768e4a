"""What stands in the lists and on the pages: documents turned into plain data, and chosen from, by pure functions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from orchestrator.cli.ages import memory
from orchestrator.cli.tables import phase_colour
from orchestrator.planner.applicability import inapplicable
from orchestrator.resources import (
    Condition,
    Event,
    OperationType,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
    find_condition,
)
from orchestrator.resources.vmop import OperationSpec

OFFERED: Final = (OperationType.START, OperationType.STOP, OperationType.RESTART, OperationType.MIGRATE)
"""What a VM's menu offers, in its order."""
PAGE: Final = 50
"""Rows that a browser is sent at a time."""
NOWHERE: Final = "-"
_SHADES: Final = {
    "green": "positive",
    "cyan": "info",
    "yellow": "warning",
    "red": "negative",
    "bright_black": "grey",
    "default": "grey",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of a list is shown.

    Attributes:
        search: A part of the name, or of the address.
        phase: Empty: any.
        node: Empty: any.
        page: From 0.
    """

    search: str = ""
    phase: str = ""
    node: str = ""
    page: int = 0


@dataclass(frozen=True, slots=True)
class Shown:
    """One page of a list.

    Attributes:
        total: How many there are on all pages.
        first: Number of the first of them, from 1; 0: there is none.
        nodes: All nodes that there are to choose from, as in `Wanted.node`.
        phases: By phase, how many there are in all.
    """

    rows: tuple[dict[str, Any], ...]
    total: int
    first: int
    page: int
    pages: int
    nodes: tuple[str, ...]
    phases: dict[str, int]

    @property
    def range(self) -> str:
        """Say which these are."""
        return f"{self.first:,}-{self.first + len(self.rows) - 1:,} of {self.total:,}" if self.rows else "none"


def list_vms(vms: Iterable[VirtualMachine], wanted: Wanted, operations: dict[str, int], *, may: bool) -> Shown:
    """Choose from a project's VMs, and give one page.

    Args:
        vms: By name.
        wanted: What is to be shown; a page that is not there is the last one.
        operations: Progress of operations that are under way, by VM.
        may: Whether the viewer may do something to them.
    """
    search = wanted.search.strip().lower()
    nodes: set[str] = set()
    phases: dict[VmPhase, int] = {}
    found: list[VirtualMachine] = []
    for vm in vms:
        status = vm.status
        phase = status.phase
        nodes.add(status.node_name)
        phases[phase] = phases.get(phase, 0) + 1
        if wanted.phase and phase != wanted.phase:
            continue
        if wanted.node and status.node_name != wanted.node:
            continue
        if search and search not in vm.name and search not in status.ip_address:
            continue
        found.append(vm)
    pages = max(1, -(-len(found) // PAGE))
    page = min(max(0, wanted.page), pages - 1)
    chosen = found[page * PAGE : (page + 1) * PAGE]
    return Shown(
        rows=tuple(vm_row(vm, operations.get(vm.key), may=may) for vm in chosen),
        total=len(found),
        first=page * PAGE + 1 if chosen else 0,
        page=page,
        pages=pages,
        nodes=tuple(sorted(name for name in nodes if name)),
        phases={phase.value: phases[phase] for phase in VmPhase if phase in phases},
    )


def vm_row(vm: VirtualMachine, progress: int | None, *, may: bool) -> dict[str, Any]:
    """Give a VM as a row."""
    return {
        "key": vm.key,
        "name": vm.name,
        "namespace": vm.metadata.namespace,
        "phase": vm.status.phase.value,
        "shade": shade(vm.status.phase.value),
        "progress": progress,
        "node": vm.status.node_name or NOWHERE,
        "ip": vm.status.ip_address or NOWHERE,
        "created": instant(vm.metadata.creation_timestamp),
        "cpu": cpu_text(vm),
        "memory": vm.spec.memory.size,
        "restart": bool(vm.status.restart_awaiting_changes),
        "actions": offered(vm) if may else [],
    }


def offered(vm: VirtualMachine) -> list[dict[str, Any]]:
    """Give what the menu offers for a VM, in its order, and whether each can be done now."""
    specs = ((kind, OperationSpec(type=kind, virtual_machine_name=vm.name)) for kind in OFFERED)
    return [{"name": kind.value, "enabled": inapplicable(spec, vm) is None} for kind, spec in specs]


def cpu_text(vm: VirtualMachine) -> str:
    """Write a VM's CPU: cores, and how much of each is reserved where that is not all."""
    cpu = vm.spec.cpu
    return f"{cpu.cores}" if cpu.core_fraction == "100%" else f"{cpu.cores} at {cpu.core_fraction}"


def operation_row(operation: VirtualMachineOperation, *, may: bool) -> dict[str, Any]:
    """Give an operation as a row."""
    status = operation.status
    return {
        "key": operation.key,
        "name": operation.name,
        "vm": operation.spec.virtual_machine_name,
        "namespace": operation.metadata.namespace,
        "type": operation.spec.type.value,
        "phase": status.phase.value,
        "shade": shade(status.phase.value),
        "progress": status.progress,
        "way": " → ".join(name for name in (status.source_node, status.target_node) if name) or NOWHERE,
        "created": instant(operation.metadata.creation_timestamp),
        "message": operation.message,
        "abort": may and operation.is_active and operation.metadata.deletion_timestamp is None,
    }


def event_row(event: Event) -> dict[str, Any]:
    """Give an event as a row."""
    return {
        "key": event.key,
        "at": instant(event.last_timestamp),
        "bad": event.type == "Warning",
        "reason": event.reason,
        "about": f"{event.involved_object.kind} {event.involved_object.name}",
        "message": event.message,
        "count": event.count,
    }


def facts(vm: VirtualMachine) -> list[tuple[str, str]]:
    """Give a VM's configuration as pairs of a title and what it says; what it does not say is left out."""
    spec = vm.spec
    disks = ", ".join(str(getattr(disk, "name", "")) for disk in spec.disks)
    interfaces = ", ".join(str(getattr(one, "name", "")) for one in spec.interfaces)
    found = [
        ("Startup policy", spec.run_policy.value),
        (
            "CPU",
            f"{spec.cpu.cores} core{'' if spec.cpu.cores == 1 else 's'}, {spec.cpu.core_fraction} of each reserved",
        ),
        ("Memory", f"{spec.memory.size} ({memory(spec.memory_mib)})"),
        ("Class", spec.virtual_machine_class_name or ""),
        ("Live migration policy", spec.live_migration_policy.value),
        ("Operating system", spec.os_type.value),
        ("Bootloader", spec.bootloader.value),
        ("Disks", disks),
        ("Interfaces", interfaces),
        ("Machine", "described by a libvirt domain XML" if spec.domain_template else ""),
    ]
    return [(title, text) for title, text in found if text]


def placement(vm: VirtualMachine) -> list[tuple[str, str]]:
    """Give where a VM is, and where it may be."""
    spec, status = vm.spec, vm.status
    migratable = find_condition(status.conditions, "Migratable")
    migration = status.migration_state
    last = f"{migration.source.node} → {migration.target.node} {migration.result}".strip() if migration else ""
    found = [
        ("Node", status.node_name),
        ("IP address", status.ip_address),
        ("Node selector", ", ".join(f"{key}={value}" for key, value in sorted(spec.node_selector.items()))),
        ("Affinity", "has rules" if spec.affinity is not None else ""),
        ("Tolerations", ", ".join(toleration.key or "all" for toleration in spec.tolerations)),
        ("Migratable", _said(migratable)),
        ("Last migration", last),
        ("Incarnation", str(status.incarnation)),
    ]
    return [(title, text) for title, text in found if text]


def waiting_changes(vm: VirtualMachine) -> list[tuple[str, str]]:
    """Give what waits for a restart: pairs of a field and what it would become."""
    return [
        (change.path, f"{_value(change.current_value)} → {_value(change.desired_value)}")
        for change in vm.status.restart_awaiting_changes
    ]


def under_way(operations: Iterable[VirtualMachineOperation]) -> dict[str, int]:
    """Give the progress of operations that a node works on, by VM."""
    return {one.vm_key: one.status.progress for one in operations if one.status.grant is not None}


def in_order(operations: Iterable[VirtualMachineOperation]) -> list[VirtualMachineOperation]:
    """Give operations that are not over: those under way first, then in the order in which they are served."""
    return sorted(operations, key=lambda one: (one.status.grant is None, one.priority, one.created_version))


def shade(phase: str) -> str:
    """Name the colour of a phase, as the command line has it."""
    return _SHADES[phase_colour(phase)]


def instant(at: datetime | None) -> str:
    """Write an instant for the browser, which shows it in its own zone; empty where there is none."""
    return at.isoformat().replace("+00:00", "Z") if at is not None else ""


def conditions(found: Sequence[Condition]) -> list[dict[str, Any]]:
    """Give conditions as rows."""
    return [
        {"key": one.type, "type": one.type, "status": one.status, "reason": one.reason, "message": one.message}
        for one in found
    ]


def _said(condition: Condition | None) -> str:
    if condition is None:
        return ""
    if condition.status == "True":
        return "yes"
    return f"{condition.status}: {condition.message or condition.reason}"


def _value(value: object) -> str:
    return "not there" if value is None else str(value)
