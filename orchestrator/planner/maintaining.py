"""What a rolling maintenance comes to next: pure, from what is on record of its nodes and their drains.

As a drain, it is looked at again and again, and the same state gives the same answer. What it wants done outside of its
own document (a drain begun, a node uncordoned) is recorded as a stage first; whoever finds the stage does it, and does
it again if nobody can tell whether it was done: both may be done twice.

A node counts as back when it is Ready, and either its host has booted anew or it has been Ready all the time for
`STEADY` after the hook's end: a hook that says `reboot` ends before its host goes down.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import assert_never

from orchestrator.planner.flow import Note
from orchestrator.resources import Node, NodeDrain
from orchestrator.resources.drain import DrainPhase
from orchestrator.resources.maintenance import Maintenance, MaintenancePhase, NodeMaintenance, NodeStage

STEADY = timedelta(seconds=30)
"""A host that is to reboot has gone down by then, and its lease, of the default profile, has run out."""

_BEGUN_AT_ONCE = 32
"""So many nodes, and some for those that are refused, may be begun with in one look at most."""
_REFUSALS = 3
"""After so many nodes that can't be spared no more are looked at now: each look places all VMs of a node."""

Admit = Callable[[Iterable[str], str], str]
"""Says why a node can't be emptied besides those that are away; empty when it can."""


@dataclass(frozen=True, slots=True)
class MaintenanceStep:
    """What is to be committed, and then done.

    Attributes:
        drain: Nodes whose drain is to be begun.
        uncordon: Nodes that are to take VMs again.
        cancel: Nodes whose drain is not wanted any more.
        notes: By node, what is told of it; "" is the maintenance itself.
    """

    maintenance: Maintenance
    drain: tuple[str, ...] = ()
    uncordon: tuple[str, ...] = ()
    cancel: tuple[str, ...] = ()
    notes: tuple[tuple[str, Note], ...] = ()


def next_maintenance(
    maintenance: Maintenance,
    nodes: Mapping[str, Node],
    drains: Mapping[str, NodeDrain],
    admit: Admit,
    now: datetime,
) -> MaintenanceStep:
    """Decide what a maintenance comes to now.

    Args:
        maintenance: That is open.
        nodes: Those `in_sight`, as far as they are in the herd.
        drains: Theirs.
        admit: Asked for one node after another, where the number of nodes away at a time is left to the herd.
        now: By Redis's clock.
    """
    look = _Look(maintenance, nodes, drains, now)
    for name in look.names:
        look.look_at(name)
    if look.new.status.phase is MaintenancePhase.RUNNING:
        look.begin_more(admit)
    look.end()
    return MaintenanceStep(look.new, tuple(look.drain), tuple(look.uncordon), tuple(look.cancel), tuple(look.notes))


def in_sight(maintenance: Maintenance) -> tuple[str, ...]:
    """Name the nodes that a look is about, in their order: those away, and the next ones that may be begun with.

    Of a maintenance of a thousand nodes that is a handful, and nothing has to be known of all others.
    """
    waiting = min(maintenance.spec.parallel or _BEGUN_AT_ONCE, _BEGUN_AT_ONCE) + _REFUSALS
    found: list[str] = []
    for name in maintenance.spec.nodes:
        stage = maintenance.node(name).stage
        if stage.is_over or (stage is NodeStage.WAITING and not waiting):
            continue
        waiting -= stage is NodeStage.WAITING
        found.append(name)
    return tuple(found)


def resumed(maintenance: Maintenance, now: datetime) -> Maintenance:
    """Give a maintenance that goes on; nodes that failed go on from where they did."""
    nodes = {
        name: _at(node, node.failed_at or NodeStage.WAITING, now, "") if node.stage is NodeStage.FAILED else node
        for name, node in maintenance.status.nodes.items()
    }
    return maintenance.with_status(phase=MaintenancePhase.RUNNING, nodes=nodes, message="")


def claimed(
    maintenance: Maintenance, name: str, node: Node, holder: str, now: datetime, lease: timedelta
) -> Maintenance:
    """Give a maintenance whose hook is about to be run on a node by someone."""
    before = maintenance.node(name)
    again = f" (run {before.attempts + 1}: what became of the one before is not known)" if before.attempts else ""
    begun = before.with_(
        attempts=before.attempts + 1,
        holder=holder,
        lease_until=now + lease,
        hook_began_at=now,
        hook_ended_at=None,
        exit_code=None,
        output="",
        boot_id=node.status.boot_id,
        away_at=None,
    )
    return maintenance.with_node(name, _at(begun, NodeStage.HOOK, now, f"run by {holder}{again}"))


def hook_ended(maintenance: Maintenance, name: str, exit_code: int, output: str, now: datetime) -> Maintenance:
    """Give a maintenance whose hook has ended on a node."""
    before = maintenance.node(name).with_(
        holder="", lease_until=None, hook_ended_at=now, exit_code=exit_code, output=output
    )
    if exit_code == 0:
        return maintenance.with_node(name, _at(before, NodeStage.RETURNING, now, "waits until the node is Ready"))
    return maintenance.with_node(name, _failed(before, NodeStage.DRAINED, now, f"its hook ended with code {exit_code}"))


def _at(node: NodeMaintenance, stage: NodeStage, now: datetime, message: str) -> NodeMaintenance:
    return node.with_(stage=stage, since=now, failed_at=None, message=message)


def _failed(node: NodeMaintenance, stage: NodeStage, now: datetime, message: str) -> NodeMaintenance:
    return _at(node, NodeStage.FAILED, now, message).with_(failed_at=stage)


class _Look:
    """One look at a maintenance; collects what follows."""

    def __init__(
        self, maintenance: Maintenance, nodes: Mapping[str, Node], drains: Mapping[str, NodeDrain], now: datetime
    ) -> None:
        self.new = maintenance
        self.nodes = nodes
        self.drains = drains
        self.now = now
        self.names = in_sight(maintenance)
        self.drain: list[str] = []
        self.uncordon: list[str] = []
        self.cancel: list[str] = []
        self.notes: list[tuple[str, Note]] = []

    def look_at(self, name: str) -> None:
        """Take one node as far as it goes by itself."""
        before = self.new.node(name)
        match before.stage:
            case NodeStage.WAITING | NodeStage.DONE | NodeStage.SKIPPED:
                after = before
            case NodeStage.DRAINING:
                after = self._draining(name, before)
            case NodeStage.DRAINED:
                after = self._drained(name, before)
            case NodeStage.HOOK:
                after = self._hook(name, before)
            case NodeStage.RETURNING:
                after = self._returning(name, before)
            case NodeStage.UNCORDONING:
                after = self._uncordoning(name, before)
            case NodeStage.FAILED:
                after = self._given_up(name, before)
            case _:
                assert_never(before.stage)
        if after is not before:
            self.new = self.new.with_node(name, after)
        if after.stage is NodeStage.FAILED and before.stage is not NodeStage.FAILED:
            self.notes.append((name, Note("NodeMaintenanceFailed", after.message, warning=True)))
        if after.stage is NodeStage.FAILED and self.new.status.phase is MaintenancePhase.RUNNING:
            self.new = self.new.with_status(phase=MaintenancePhase.PAUSED, message=f"node {name}: {after.message}")
            self.notes.append(("", Note("MaintenancePaused", self.new.status.message, warning=True)))

    @property
    def _is_stopping(self) -> bool:
        return self.new.status.phase is MaintenancePhase.STOPPING

    def _draining(self, name: str, node: NodeMaintenance) -> NodeMaintenance:
        if self._is_stopping:
            self.cancel.append(name)
            return _at(node, NodeStage.UNCORDONING, self.now, "stopped before its hook ran")
        drain = self.drains.get(name)
        begun_at = drain.status.started_at if drain is not None else None
        if drain is None or begun_at is None or (node.since is not None and begun_at < node.since):
            self.drain.append(name)  # it was to be begun, and whoever was to do so has died
            return node
        match drain.status.phase:
            case DrainPhase.DRAINING:
                return node.with_(message=drain.status.message) if node.message != drain.status.message else node
            case DrainPhase.DRAINED:
                return _at(node, NodeStage.DRAINED, self.now, "waits for its hook to be run")
            case _:
                return _failed(node, NodeStage.DRAINING, self.now, f"it was not emptied: {drain.status.message}")

    def _drained(self, name: str, node: NodeMaintenance) -> NodeMaintenance:
        if self._is_stopping:
            return _at(node, NodeStage.UNCORDONING, self.now, "stopped before its hook ran")
        found = self.nodes.get(name)
        if found is not None and not found.spec.unschedulable:
            return _failed(node, NodeStage.DRAINING, self.now, "somebody uncordoned it before its hook ran")
        return node

    def _hook(self, name: str, node: NodeMaintenance) -> NodeMaintenance:
        if node.lease_until is None or node.lease_until > self.now:
            return node
        text = f"{node.holder} was not heard of any more while it ran the hook: it is to be run again"
        self.notes.append((name, Note("HookAbandoned", text, warning=True)))
        return _at(node.with_(holder="", lease_until=None), NodeStage.DRAINED, self.now, text)

    def _returning(self, name: str, node: NodeMaintenance) -> NodeMaintenance:
        found = self.nodes.get(name)
        if found is None or not found.is_ready or found.is_shutting_down:
            if node.away_at is None:
                return node.with_(away_at=self.now, message="its host is away")
            return self._waited_too_long(node)
        if found.status.boot_id != node.boot_id:
            return _at(node, NodeStage.UNCORDONING, self.now, "is back: its host has booted")
        began = node.hook_ended_at or node.since
        if node.away_at is not None and (began is None or node.away_at > began):
            return self._waited_too_long(node.with_(away_at=None, hook_ended_at=self.now, message="is Ready again"))
        if not self.new.spec.reboots and began is not None and self.now - began >= STEADY:
            return _at(node, NodeStage.UNCORDONING, self.now, "is Ready, and did not reboot")
        return self._waited_too_long(node)

    def _waited_too_long(self, node: NodeMaintenance) -> NodeMaintenance:
        limit = self.new.spec.ready_timeout_s
        if not limit or node.since is None or self.now - node.since < timedelta(seconds=limit):
            return node
        return _failed(node, NodeStage.RETURNING, self.now, f"it did not come back within {limit:g} s")

    def _uncordoning(self, name: str, node: NodeMaintenance) -> NodeMaintenance:
        found = self.nodes.get(name)
        if found is not None and found.spec.unschedulable and not node.was_cordoned:
            self.uncordon.append(name)
            return node
        ran = node.exit_code == 0
        self.notes.append((name, Note("NodeMaintained" if ran else "NodeMaintenanceSkipped", node.message)))
        return _at(node, NodeStage.DONE if ran else NodeStage.SKIPPED, self.now, node.message)

    def _given_up(self, name: str, node: NodeMaintenance) -> NodeMaintenance:
        """A node that failed stays as it is, for people to look at, until the maintenance is resumed or stopped."""
        if not self._is_stopping:
            return node
        if node.failed_at is NodeStage.DRAINING:
            self.cancel.append(name)
        self.notes.append((name, Note("NodeMaintenanceSkipped", f"left cordoned: {node.message}", warning=True)))
        return _at(node, NodeStage.SKIPPED, self.now, f"left cordoned: {node.message}")

    def begin_more(self, admit: Admit) -> None:
        """Begin with as many more nodes as may be away."""
        away = list(self.new.away)
        limit, refusals = self.new.spec.parallel, 0
        for name in self.names:
            if (limit and len(away) >= limit) or refusals >= _REFUSALS:
                return
            node = self.new.node(name)
            if node.stage is not NodeStage.WAITING:
                continue
            found = self.nodes.get(name)
            why = "it is not in the herd" if found is None else "" if found.is_ready else "it is not Ready"
            why = why or admit(away, name)
            if found is None or why:
                refusals += 1
                text = f"waits: {why}"
                if node.message != text:
                    self.new = self.new.with_node(name, node.with_(message=text))
                continue
            begun = node.with_(was_cordoned=found.spec.unschedulable)
            self.new = self.new.with_node(name, _at(begun, NodeStage.DRAINING, self.now, "is to be emptied"))
            self.drain.append(name)
            away.append(name)

    def end(self) -> None:
        """Say how far it is, and end it when nothing is left."""
        spec, phase = self.new.spec, self.new.status.phase
        if self._is_stopping:
            for name in spec.nodes:
                if self.new.node(name).stage is NodeStage.WAITING:
                    skipped = _at(self.new.node(name), NodeStage.SKIPPED, self.now, "stopped before it was begun")
                    self.new = self.new.with_node(name, skipped)
        done = sum(self.new.node(name).stage is NodeStage.DONE for name in spec.nodes)
        text = f"{done} of {len(spec.nodes)} nodes done"
        if all(self.new.node(name).stage.is_over for name in spec.nodes):
            ended = MaintenancePhase.STOPPED if self._is_stopping else MaintenancePhase.COMPLETED
            self.new = self.new.with_status(phase=ended, finished_at=self.now, message=text)
            self.notes.append(("", Note(f"Maintenance{ended.value}", text)))
        elif phase is MaintenancePhase.RUNNING and self.new.status.phase is phase:
            away = f"; away: {', '.join(self.new.away)}" if self.new.away else ""
            self.new = self.new.with_status(message=text + away)
