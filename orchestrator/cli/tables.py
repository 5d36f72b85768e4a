"""Tables as kubectl prints them: columns under each other, no boxes, nothing that `awk` stumbles over.

A table is made of rows, and a row of cells. What `get` prints of a kind stands in `TABLES`, one line for each column.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

import typer

from orchestrator.cli.ages import UNKNOWN, age, memory
from orchestrator.resources import (
    Event,
    Maintenance,
    Node,
    NodeDrain,
    NodeFencing,
    RebalancePolicy,
    Resource,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
    find_condition,
)
from orchestrator.resources.maintenance import NodeStage

R = TypeVar("R", bound=Resource)

DELETED = "Deleted"
"""What a watch shows in place of the phase when a resource was deleted."""

_COLOURS = {
    **dict.fromkeys(("Running", "Completed", "Ready", "Drained", "Returned"), "green"),
    **dict.fromkeys(("Migrating", "InProgress", "Starting", "Draining", "Returning"), "cyan"),
    **dict.fromkeys(("Pending", "Stopping", "Terminating", "Pause", "Ready,SchedulingDisabled", "Warning"), "yellow"),
    **dict.fromkeys(("Failed", "DrainFailed", "Degraded", "NotReady", "NotReady,SchedulingDisabled"), "red"),
    **dict.fromkeys(("Stopped", "Superseded", DELETED), "bright_black"),
}
_GAP = "   "


@dataclass(frozen=True, slots=True)
class Around:
    """What cells need besides the resource itself.

    Attributes:
        vms_on: Number of VMs by node.
    """

    now: datetime
    vms_on: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Column(Generic[R]):
    """One column.

    Attributes:
        cell: What stands in it; empty is printed as `<none>`.
        is_wide: Only with `-o wide`.
        is_clock: Moves with time alone, which is not a change.
        counts_vms: Made from `Around.vms_on`, and not from the resource alone.
        is_phase: In colour on a terminal, and where a watch shows that the resource was deleted.
        width: At least this wide in a watch, so that what comes fits under it.
    """

    title: str
    cell: Callable[[R, Around], str]
    is_wide: bool = False
    is_clock: bool = False
    counts_vms: bool = False
    is_phase: bool = False
    width: int = 0


@dataclass(frozen=True, slots=True)
class Table(Generic[R]):
    """How a kind is printed.

    Attributes:
        order: By which rows are sorted.
        stamp: What makes a row a new one though all its cells are the same.
        tells_deletion: Whether a watch says that one was deleted.
        counts_vms: Whether the wide table needs the VMs too.
    """

    kind: type[R]
    columns: tuple[Column[R], ...]
    order: Callable[[R], Any] = lambda resource: resource.key
    stamp: Callable[[R], str] = lambda _: ""
    tells_deletion: bool = True
    counts_vms: bool = False


def _node_status(node: Node) -> str:
    marks = (",Witness" if node.spec.witness else "") + (",SchedulingDisabled" if node.spec.unschedulable else "")
    return ("Ready" if node.is_ready else "NotReady") + marks


def _reason(operation: VirtualMachineOperation) -> str:
    condition = find_condition(operation.status.conditions, "Completed")
    return condition.reason if condition else ""


def _status_of(vm: VirtualMachine, kind: str) -> str:
    condition = find_condition(vm.status.conditions, kind)
    return condition.status if condition else "Unknown"


def _class_cpu(vm_class: VirtualMachineClass) -> str:
    cpu = vm_class.status.cpu
    return (cpu.model or cpu.mode) if cpu else ""


_VM: Table[VirtualMachine] = Table(
    VirtualMachine,
    (
        Column("NAME", lambda vm, _: vm.name),
        Column("PHASE", lambda vm, _: vm.status.phase.value, is_phase=True, width=len("Migrating")),
        Column("NODE", lambda vm, _: vm.status.node_name),
        Column("IPADDRESS", lambda vm, _: vm.status.ip_address),
        Column("AGE", lambda vm, a: age(vm.metadata.creation_timestamp, a.now), is_clock=True),
        Column("CORES", lambda vm, _: str(vm.spec.cpu.cores), is_wide=True),
        Column("COREFRACTION", lambda vm, _: vm.spec.cpu.core_fraction, is_wide=True),
        Column("MEMORY", lambda vm, _: vm.spec.memory.size, is_wide=True),
        Column("NEED RESTART", lambda vm, _: str(bool(vm.status.restart_awaiting_changes)), is_wide=True),
        Column("AGENT", lambda vm, _: _status_of(vm, "AgentReady"), is_wide=True),
        Column("MIGRATABLE", lambda vm, _: _status_of(vm, "Migratable"), is_wide=True),
        Column("RUNPOLICY", lambda vm, _: vm.spec.run_policy.value, is_wide=True),
        Column("INCARNATION", lambda vm, _: str(vm.status.incarnation), is_wide=True),
    ),
)

_VMOP: Table[VirtualMachineOperation] = Table(
    VirtualMachineOperation,
    (
        Column("NAME", lambda op, _: op.name),
        Column("PHASE", lambda op, _: op.status.phase.value, is_phase=True, width=len("Terminating")),
        Column("PROGRESS", lambda op, _: f"{op.status.progress}%"),
        Column("TYPE", lambda op, _: op.spec.type.value),
        Column("VIRTUALMACHINE", lambda op, _: op.spec.virtual_machine_name),
        Column("AGE", lambda op, a: age(op.metadata.creation_timestamp, a.now), is_clock=True),
        Column("SOURCE", lambda op, _: op.status.source_node, is_wide=True),
        Column("TARGET", lambda op, _: op.status.target_node, is_wide=True),
        Column("REASON", lambda op, _: _reason(op), is_wide=True),
        Column("MESSAGE", lambda op, _: op.message, is_wide=True),
    ),
)

_CLASS: Table[VirtualMachineClass] = Table(
    VirtualMachineClass,
    (
        Column("NAME", lambda c, _: c.name),
        Column("PHASE", lambda c, _: c.status.phase.value, is_phase=True, width=len("Pending")),
        Column("AGE", lambda c, a: age(c.metadata.creation_timestamp, a.now), is_clock=True),
        Column("CPUTYPE", lambda c, _: c.spec.cpu.type.value, is_wide=True),
        Column("CPU", lambda c, _: _class_cpu(c), is_wide=True),
        Column("NODES", lambda c, _: str(len(c.status.available_nodes)), is_wide=True),
    ),
)

_NODE: Table[Node] = Table(
    Node,
    (
        Column("NAME", lambda node, _: node.name),
        Column("STATUS", lambda node, _: _node_status(node), is_phase=True, width=len("NotReady")),
        Column("CPU", lambda node, _: str(node.status.capacity.cpu)),
        Column("MEMORY", lambda node, _: memory(node.status.capacity.memory_mib)),
        Column("AGE", lambda node, a: age(node.metadata.creation_timestamp, a.now), is_clock=True),
        Column("VMS", lambda node, a: str(a.vms_on.get(node.name, 0)), is_wide=True, counts_vms=True),
        Column("MIGRATION-URI", lambda node, _: node.status.hypervisor.migration_uri, is_wide=True),
        Column("CPUMODEL", lambda node, _: node.status.hypervisor.cpu_model, is_wide=True),
        Column("HYPERVISOR", lambda node, _: node.status.hypervisor.version, is_wide=True),
    ),
    counts_vms=True,
)

_DRAIN: Table[NodeDrain] = Table(
    NodeDrain,
    (
        Column("NODE", lambda drain, _: drain.name),
        Column("PHASE", lambda drain, _: drain.status.phase.value, is_phase=True, width=len("DrainFailed")),
        Column("LEFT", lambda drain, _: f"{len(drain.left())}/{len(drain.vms)}"),
        Column("MEMORY", lambda drain, _: memory(sum(vm.memory_mib for vm in drain.left().values()))),
        Column("BY", lambda drain, _: drain.spec.requested_by),
        Column("SINCE", lambda drain, a: age(drain.status.started_at, a.now), is_clock=True),
        Column("MESSAGE", lambda drain, _: drain.status.message, is_wide=True),
    ),
)

_MAINTENANCE: Table[Maintenance] = Table(
    Maintenance,
    (
        Column("NAME", lambda m, _: m.name),
        Column("PHASE", lambda m, _: m.status.phase.value, is_phase=True, width=len("Completed")),
        Column(
            "DONE",
            lambda m, _: f"{sum(n.stage is NodeStage.DONE for n in m.status.nodes.values())}/{len(m.spec.nodes)}",
        ),
        Column("AWAY", lambda m, _: ",".join(m.away)),
        Column("AGE", lambda m, a: age(m.metadata.creation_timestamp, a.now), is_clock=True),
        Column("MESSAGE", lambda m, _: m.status.message, is_wide=True),
        Column("HOOK", lambda m, _: m.spec.hook, is_wide=True),
    ),
)

_POLICY: Table[RebalancePolicy] = Table(
    RebalancePolicy,
    (
        Column("NAME", lambda p, _: p.name),
        Column("ENABLED", lambda p, _: str(p.spec.enabled).lower()),
        Column("CPU", lambda p, _: f"{p.spec.thresholds.cpu}%"),
        Column("MEMORY", lambda p, _: f"{p.spec.thresholds.memory}%"),
        Column("INTERVAL", lambda p, _: f"{p.spec.interval_seconds}s"),
        Column("UNRESOLVED", lambda p, _: str(len(p.status.unresolved))),
        Column("AGE", lambda p, a: age(p.metadata.creation_timestamp, a.now), is_clock=True),
        Column("EVENOUT", lambda p, _: str(p.spec.even_out).lower(), is_wide=True),
        Column("MAXMOVES", lambda p, _: str(p.spec.max_moves), is_wide=True),
        Column("MAXGIB", lambda p, _: str(p.spec.max_gib), is_wide=True),
    ),
)


def _enabled(fencing: NodeFencing) -> str:
    return "by label" if fencing.spec.enabled is None else str(fencing.spec.enabled).lower()


_FENCING: Table[NodeFencing] = Table(
    NodeFencing,
    (
        Column("NODE", lambda f, _: f.name),
        Column("ENABLED", lambda f, _: _enabled(f)),
        Column("BMC", lambda f, _: f.spec.bmc.agent if f.spec.bmc else ""),
        Column("PHASE", lambda f, _: f.status.phase.value, is_phase=True, width=len("FenceUnconfirmed")),
        Column("SINCE", lambda f, a: age(f.status.since, a.now), is_clock=True),
        Column("REASON", lambda f, _: f.status.reason),
        Column("EVIDENCE", lambda f, _: f.status.evidence.level.value if f.status.evidence else "", is_wide=True),
        Column("MESSAGE", lambda f, _: f.status.message, is_wide=True),
    ),
)

_EVENT: Table[Event] = Table(
    Event,
    (
        Column("LAST SEEN", lambda event, a: age(event.last_timestamp, a.now), is_clock=True),
        Column("TYPE", lambda event, _: event.type, is_phase=True, width=len("Warning")),
        Column("REASON", lambda event, _: event.reason),
        Column("OBJECT", lambda event, _: f"{event.involved_object.kind.lower()}/{event.involved_object.name}"),
        Column("MESSAGE", lambda event, _: event.message),
    ),
    order=lambda event: (event.last_timestamp, event.created_version),
    stamp=lambda event: event.last_timestamp.isoformat(),
    tells_deletion=False,  # they are cleared away after an hour
)

TABLES: dict[type[Resource], Table[Any]] = {
    table.kind: table for table in (_VM, _CLASS, _VMOP, _NODE, _DRAIN, _MAINTENANCE, _POLICY, _FENCING, _EVENT)
}


def columns_of(table: Table[Any], *, wide: bool, namespaces: bool) -> tuple[Column[Any], ...]:
    """Choose the columns that are printed.

    Args:
        table: Of the kind.
        wide: With the wide ones.
        namespaces: With the namespace first; kinds without one never have it.
    """
    shown = tuple(column for column in table.columns if wide or not column.is_wide)
    if namespaces and table.kind.namespaced:
        first: Column[Any] = Column("NAMESPACE", lambda resource, _: resource.metadata.namespace)
        return (first, *shown)
    return shown


def count_vms(vms: Iterable[Resource]) -> Mapping[str, int]:
    """Count by node the VMs that take memory and CPU there."""
    return Counter(
        vm.status.node_name for vm in vms if isinstance(vm, VirtualMachine) and vm.status.phase.occupies_node
    )


def cells_of(columns: Sequence[Column[R]], resource: R, around: Around) -> tuple[str, ...]:
    """Give a resource's row."""
    return tuple(clean(column.cell(resource, around)) or UNKNOWN for column in columns)


def clean(text: str) -> str:
    """Put a text into one line, and take out what a terminal would obey: hosts and hypervisors wrote parts of it."""
    if text.isprintable() and "  " not in text and text.strip(" ") == text:
        return text
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class Layout:
    """Puts rows under each other. Widths only grow, so that the lines of a watch stay in their columns.

    Args:
        columns: What is printed.
        colour: Whether phases are in colour.
        watching: Whether more rows will come.
    """

    def __init__(self, columns: Sequence[Column[Any]], *, colour: bool, watching: bool = False) -> None:
        self.columns = columns
        self.colour = colour
        self.widths = [max(len(c.title), c.width if watching else 0) for c in columns]

    def header(self) -> str:
        """Give the line of titles; take the first rows in before (`fit`)."""
        return self._line([column.title for column in self.columns], colour=False)

    def fit(self, rows: Iterable[Sequence[str]]) -> None:
        """Make the columns wide enough for some rows."""
        for row in rows:
            self.widths = [max(width, len(cell)) for width, cell in zip(self.widths, row, strict=True)]

    def row(self, cells: Sequence[str]) -> str:
        """Give a line."""
        self.fit([cells])
        return self._line(cells, colour=self.colour)

    def _line(self, cells: Sequence[str], *, colour: bool) -> str:
        last = len(cells) - 1
        parts = [cell if i == last else cell.ljust(self.widths[i]) for i, cell in enumerate(cells)]
        if colour:
            parts = [
                paint(part, cell) if column.is_phase else part
                for column, cell, part in zip(self.columns, cells, parts, strict=True)
            ]
        return _GAP.join(parts)


def paint(text: str, phase: str) -> str:
    """Colour a text as the phase is coloured."""
    colour = _COLOURS.get(phase)
    return typer.style(text, fg=colour) if colour else text


def phase_colour(phase: str) -> str:
    """Name a phase's colour; `default` where it has none."""
    return _COLOURS.get(phase, "default")
