"""The herd as the pages of nodes and the overview show it: rows and figures, made of documents by pure functions."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from html import escape
from typing import Any, Final

from orchestrator.cli.ages import duration, memory
from orchestrator.console.charts import Mark
from orchestrator.console.live import Live
from orchestrator.console.rows import NOWHERE, PAGE, Shown, instant, shade
from orchestrator.planner.capacity import DOMAIN_READY, FAILOVER_READY
from orchestrator.planner.drain import DrainPlan
from orchestrator.resources import (
    Event,
    Node,
    NodeDrain,
    NodeFencing,
    OperationPhase,
    Priority,
    VirtualMachine,
    VirtualMachineOperation,
    find_condition,
)
from orchestrator.resources.drain import DrainPhase, VmState
from orchestrator.resources.fencing import FencePhase
from orchestrator.services.overview import NodeLoad, node_load
from orchestrator.services.use import Use
from orchestrator.store import keys

LINE: Final = 0.8
"""Of a node's CPU: the rebalancer takes nodes that are above it to it."""
DAY: Final = timedelta(hours=24)
_DAY_KEPT: Final = timedelta(seconds=4)
_FENCED: Final = frozenset(
    {"NodeSuspect", "NodeFencing", "FenceUnconfirmed", "NodeFenced", "EvidenceContradicted", "NodeRecovered"}
)
_OF_NODES: Final = frozenset({Node.kind_name, NodeFencing.kind_name})
"""What events of a fencing are about: the node, or once that left the herd, its record."""
_MOST_MARKS: Final = 1_000


@dataclass(frozen=True, slots=True)
class HerdNow:
    """The herd at one version of the copy.

    Attributes:
        loads: By name.
        slots_used: Migrations that run.
        slots_cap: Migrations that may.
    """

    version: int
    loads: Mapping[str, NodeLoad]
    phases: Mapping[str, int]
    slots_used: int
    slots_cap: int


class HerdWatch:
    """Works the herd's figures out, once for each version that somebody asks for; pages share it."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._last: HerdNow | None = None
        self._day: tuple[datetime, list[Mark]] | None = None

    def now(self) -> HerdNow:
        """Give the figures as of now."""
        mirror = self._live.mirror
        if self._last is not None and self._last.version == mirror.version:
            return self._last
        on_node: Counter[str] = Counter()
        phases: Counter[str] = Counter()
        for vm in self._live.all(VirtualMachine):
            assert isinstance(vm, VirtualMachine)  # noqa: S101 - what is under that kind
            phases[vm.status.phase.value] += 1
            if vm.status.phase.occupies_node:
                on_node[vm.status.node_name] += 1
        follower = mirror.follower
        with follower.lock:
            index = follower.index
            loads = {
                node.name: node_load(mirror.store, index, node, on_node[node.name])
                for node in self._live.all(Node)
                if isinstance(node, Node)
            }
            used, cap = len(index.get(keys.SLOTS_CLUSTER, {})), len(index.get(keys.SCHEDULABLE, {}))
        self._last = HerdNow(mirror.version, loads, dict(sorted(phases.items())), used, cap)
        return self._last

    def day(self, now: datetime) -> list[Mark]:
        """Give what the timeline of the last day has; some seconds old at most."""
        if self._day is None or now - self._day[0] >= _DAY_KEPT:
            live = self._live
            found = marks(
                [one for one in live.all(VirtualMachineOperation) if isinstance(one, VirtualMachineOperation)],
                [one for one in live.all(NodeFencing) if isinstance(one, NodeFencing)],
                [one for one in live.all(NodeDrain) if isinstance(one, NodeDrain)],
                live.told,
                now,
            )
            self._day = (now, found)
        return self._day[1]


def list_nodes(
    live: Live,
    herd: HerdNow,
    *,
    search: str = "",
    only: str = "",
    page: int = 0,
    may: bool = False,
    uses: Mapping[str, Use] | None = None,
) -> Shown:
    """Choose from the nodes, by name, and give one page.

    Args:
        live: The copy.
        herd: Its figures.
        search: A part of the name.
        only: A status (`Ready`, `NotReady`, `Cordoned`), or empty.
        page: From 0.
        may: Whether the viewer may empty them.
        uses: Of hosts, by name.
    """
    rows = []
    counts: Counter[str] = Counter()
    for node in sorted((node for node in live.all(Node) if isinstance(node, Node)), key=lambda node: node.name):
        for status in (status_word := _statuses(node)):
            counts[status] += 1
        if (only and only not in status_word) or (search and search.lower() not in node.name):
            continue
        rows.append(node)
    pages = max(1, -(-len(rows) // PAGE))
    page = min(max(0, page), pages - 1)
    chosen = rows[page * PAGE : (page + 1) * PAGE]
    return Shown(
        rows=tuple(
            node_row(
                node,
                replace(load, use=(uses or {}).get(node.name)) if (load := herd.loads.get(node.name)) else None,
                _of(live, NodeDrain, node.name),
                _of(live, NodeFencing, node.name),
                may=may,
            )
            for node in chosen
        ),
        total=len(rows),
        first=page * PAGE + 1 if chosen else 0,
        page=page,
        pages=pages,
        nodes=(),
        phases=dict(sorted(counts.items())),
    )


def _of(live: Live, kind: type[Any], name: str) -> Any:
    return live.find(kind, name)


def _statuses(node: Node) -> list[str]:
    return ["Ready" if node.is_ready else "NotReady", *(["Cordoned"] if node.spec.unschedulable else [])]


def node_row(
    node: Node, load: NodeLoad | None, drain: NodeDrain | None, fencing: NodeFencing | None, *, may: bool
) -> dict[str, Any]:
    """Give a node as a row."""
    status = load.status if load is not None else "NotReady"
    failover = find_condition(node.status.conditions, FAILOVER_READY)
    is_draining = drain is not None and drain.status.phase is DrainPhase.DRAINING
    can_act = may and not node.spec.witness
    return {
        "key": node.name,
        "name": node.name,
        "status": "Witness" if node.spec.witness else status,
        "shade": shade(status),
        "vms": load.vms if load is not None else 0,
        "cpu": _bar(load.cpu_share if load else 0, _cores(load), load.cpu_used if load else None),
        "memory": _bar(load.memory_share if load else 0, _memories(load), load.memory_used if load else None),
        "moves": f"{load.outbound} out, {load.inbound} in" if load is not None else NOWHERE,
        "drain": drain_text(drain) if drain is not None and (is_draining or node.spec.unschedulable) else "",
        "drained": round(100 * drained_share(drain)) if is_draining and drain is not None else None,
        "fencing": fencing_text(node, fencing),
        "fencingShade": _fencing_shade(fencing),
        "failover": "" if failover is None or failover.status == "True" else failover.message,
        "canDrain": can_act and not is_draining,
        "canUncordon": can_act and node.spec.unschedulable,
    }


def _bar(share: float, text: str, used: float | None) -> dict[str, Any]:
    return {
        "share": round(share, 4),
        "percent": f"{share:.0%}",
        "text": text,
        "over": share > LINE,
        "used": round(used, 4) if used is not None else None,
        "inUse": f"{used:.0%} in use" if used is not None else "",
    }


def _cores(load: NodeLoad | None) -> str:
    return f"{load.cpu_reserved_millicores / 1000:g}/{load.cpu_millicores / 1000:g}" if load is not None else ""


def _memories(load: NodeLoad | None) -> str:
    return f"{memory(load.memory_reserved_mib)}/{memory(load.memory_mib)}" if load is not None else ""


def drain_text(drain: NodeDrain) -> str:
    """Say how far a drain is."""
    return f"{drain.status.phase.value}: {drain.status.message}" if drain.status.message else drain.status.phase.value


def drained_share(drain: NodeDrain) -> float:
    """Say how much of what was to leave has left, 0 to 1, by memory."""
    total = sum(vm.memory_mib for vm in drain.vms.values())
    left = sum(vm.memory_mib for vm in drain.vms.values() if vm.state is not VmState.LEFT)
    return 1 - left / total if total else 0.0


def fencing_text(node: Node, fencing: NodeFencing | None) -> str:
    """Say whether a node may be fenced, or how far that is."""
    if fencing is not None and fencing.status.phase is not FencePhase.IDLE:
        reason = fencing.status.reason
        return f"{fencing.status.phase.value} ({reason})" if reason else fencing.status.phase.value
    is_enabled = (fencing or NodeFencing(metadata=node.metadata)).is_enabled(node.metadata.labels)
    return "enabled" if is_enabled else "off"


def _fencing_shade(fencing: NodeFencing | None) -> str:
    phase = fencing.status.phase if fencing is not None else FencePhase.IDLE
    if phase is FencePhase.IDLE:
        return "grey"
    return "warning" if phase in {FencePhase.SUSPECT, FencePhase.RECOVERED} else "negative"


def lost_nodes(live: Live) -> list[tuple[str, str]]:
    """Give nodes that were fenced and taken out: pairs of a name and how that stands."""
    found = (one for one in live.all(NodeFencing) if isinstance(one, NodeFencing) and one.status.kept is not None)
    return sorted(
        (one.name, f"{one.status.phase.value}: {one.status.message}") for one in found if not live.find(Node, one.name)
    )


@dataclass(frozen=True, slots=True)
class Preview:
    """A drain's plan, for people.

    Attributes:
        headline: In one line.
        rows: The moves, in order.
        notes: What is not moved, and why.
        problem: What does not fit; empty when all has a place.
    """

    headline: str
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    problem: str


def preview(node: str, plan: DrainPlan) -> Preview:
    """Put a drain's plan in words."""
    rows = tuple(
        {
            "key": move.job.vm,
            "order": number,
            "vm": move.job.vm,
            "memory": memory(move.job.memory_mib),
            "to": move.job.target,
            "begins": duration(timedelta(seconds=move.begins_s)),
            "takes": duration(timedelta(seconds=move.job.seconds)),
        }
        for number, move in enumerate(plan.moves, 1)
    )
    total = sum(move.job.memory_mib for move in plan.moves)
    takes = duration(timedelta(seconds=plan.seconds))
    count = f"{len(rows)} VM{'' if len(rows) == 1 else 's'}"
    headline = f"{node}: {count}, {memory(total)}, about {takes}" if rows else f"{node}: nothing has to be moved"
    off = tuple(
        f"{key} is shut down, and started where it may run: {why}" for key, why in sorted(plan.shut_down.items())
    )
    stay = tuple(f"{key} can't migrate, and is waited for: {why}" for key, why in sorted(plan.stay.items()))
    return Preview(headline, rows, off + stay, plan.problem())


def node_map(herd: HerdNow) -> str:
    """Draw each node as a square, darker the more of its CPU is reserved; HTML."""
    squares = []
    for name, load in sorted(herd.loads.items()):
        level = "down" if load.status.startswith("NotReady") else _level(load.cpu_share)
        off = " off" if "SchedulingDisabled" in load.status else ""
        said = f"{name}: {load.status}, {load.cpu_share:.0%} CPU, {load.memory_share:.0%} memory, {load.vms} VMs"
        squares.append(f'<i class="{level}{off}" title="{escape(said)}"></i>')
    ready = sum(load.status.startswith("Ready") for load in herd.loads.values())
    over = sum(load.cpu_share > LINE for load in herd.loads.values())
    label = f"{len(herd.loads)} nodes, {ready} Ready, {over} above 80 % of CPU"
    return f'<div class="node-map" role="img" aria-label="{label}">{"".join(squares)}</div>'


def _level(share: float) -> str:
    return "over" if share > LINE else f"l{min(3, int(share / 0.2))}"


def failover_risks(live: Live) -> list[tuple[str, str]]:
    """Give nodes, racks and zones that can't be lost now: pairs of a name and what would be stranded."""
    found: dict[str, str] = {}
    for node in live.all(Node):
        if not isinstance(node, Node):
            continue
        for kind, name in ((FAILOVER_READY, node.name), (DOMAIN_READY, f"{node.name}'s rack or zone")):
            condition = find_condition(node.status.conditions, kind)
            if condition is not None and condition.status == "False":
                found[name] = condition.message
    return sorted(found.items())


def known_risk(live: Live) -> bool:
    """Whether the capacity watch has looked at every node."""
    nodes = [node for node in live.all(Node) if isinstance(node, Node) and not node.spec.witness]
    return bool(nodes) and all(find_condition(node.status.conditions, FAILOVER_READY) for node in nodes)


def marks(
    operations: Iterable[VirtualMachineOperation],
    fencings: Iterable[NodeFencing],
    drains: Iterable[NodeDrain],
    events: Iterable[Event],
    now: datetime,
) -> list[Mark]:
    """Give what the timeline of the last day has, the latest first.

    Args:
        operations: All that are known.
        fencings: Likewise.
        drains: Likewise.
        events: Those that this server has heard of.
        now: The end of the day.
    """
    found = [mark for mark in map(_migration, operations) if mark is not None]
    fenced = {(fencing.name, mark.at): mark for fencing in fencings if (mark := _fencing(fencing)) is not None}
    found += fenced.values()
    found += [mark for mark in map(_drain, drains) if mark is not None]
    # After a reload of the copy some were heard twice.
    for event in {event.key: event for event in events}.values():
        about, at = event.involved_object, event.last_timestamp
        if about.kind not in _OF_NODES or event.reason not in _FENCED:
            continue
        if event.reason == "NodeFenced" and (about.name, at) in fenced:
            continue  # the evidence itself says by what
        found.append(Mark(at, None, "Fencings", f"{about.name}: {event.reason}", bad=event.type == "Warning"))
    recent = (mark for mark in found if (mark.until or mark.at) >= now - DAY)
    return sorted(recent, key=lambda mark: mark.at, reverse=True)[:_MOST_MARKS]


def _migration(operation: VirtualMachineOperation) -> Mark | None:
    status = operation.status
    if status.started_at is None or not operation.spec.type.is_migration:
        return None
    way = f"{status.source_node} → {status.target_node}"
    text = f"{operation.vm_key}: {operation.spec.type} {way}, {status.phase.value}"
    lane = "Moves" if operation.priority in {Priority.PLACEMENT, Priority.BALANCE} else "Migrations"
    return Mark(status.started_at, status.finished_at, lane, text, bad=status.phase is OperationPhase.FAILED)


def _fencing(fencing: NodeFencing) -> Mark | None:
    evidence = fencing.status.evidence
    if evidence is None:
        return None
    return Mark(evidence.at, None, "Fencings", f"{fencing.name}: fenced by {evidence.level}", bad=True)


def _drain(drain: NodeDrain) -> Mark | None:
    status = drain.status
    if status.started_at is None:
        return None
    text = f"{drain.name}: {status.phase.value}, asked for by {drain.spec.requested_by or drain.spec.cause.value}"
    return Mark(status.started_at, status.finished_at, "Moves", text, bad=status.phase is DrainPhase.FAILED)


def mark_rows(found: Sequence[Mark], most: int = 20) -> list[dict[str, Any]]:
    """Give the latest marks as rows."""
    return [
        {"key": str(number), "at": instant(mark.at), "lane": mark.lane, "text": mark.text, "bad": mark.bad}
        for number, mark in enumerate(found[:most])
    ]
