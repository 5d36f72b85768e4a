"""What a host's report on a domain means for its VM, while no grant is open on that VM.

"Not seen" is not "stopped". A VM counts as stopped by its stop event with the detail, or by a listing that began after
the node's last report on it. A domain that left by migration is not stopped: its new host will report it.

A reading that began before the VM's stop was told does not bring it back: the agent reads and reports in two steps, and
a settlement's answer may come between them. The stop's own event would then be taken for another stop, that nobody
asked for.

A guest that crashed, and whose domain its host keeps, has crashed as any other; but its VM stays where it is until that
domain is destroyed (`planner.policy`).

A copy of a lower incarnation is never taken for the VM, whatever becomes of either; a higher one is what runs, and the
record had lost its start (a failover of Redis).
"""

from dataclasses import dataclass
from datetime import datetime

from orchestrator.planner.flow import Note
from orchestrator.planner.policy import (
    CRASHED,
    DESTROYED,
    POWERED_OFF,
    STOPPED_BY_NODE,
    has_crashed,
    is_to_start,
    next_step,
)
from orchestrator.planner.standing import (
    AGENT_READY,
    MIGRATING,
    agent_condition,
    crashed_vm,
    no_longer,
    shown_phase,
    stopped_vm,
)
from orchestrator.resources import Condition, SeenDomain, VirtualMachine, VmPhase, find_condition, with_condition

ABSENT = "absent"
"""State of a domain that the host does not have (any more); `reason` tells how it went."""

_PHASES = {
    "running": VmPhase.RUNNING,
    "incoming": VmPhase.MIGRATING,
    "paused-migrated": VmPhase.MIGRATING,
    "postcopy": VmPhase.MIGRATING,
    "paused": VmPhase.PAUSE,
    "postcopy-failed": VmPhase.PAUSE,
    "shutdown": VmPhase.STOPPING,
    "shutoff": VmPhase.STOPPED,
}
_STOPS = {
    "shutdown/guest": (POWERED_OFF, "the guest powered itself off"),
    "shutdown/host": (STOPPED_BY_NODE, "its node stopped it"),
    "destroyed": (DESTROYED, "it was destroyed on its node"),
}


@dataclass(frozen=True, slots=True)
class Observation:
    """The VM as it is now known (None: nothing changes), and what is told of it."""

    vm: VirtualMachine | None = None
    notes: tuple[Note, ...] = ()


def observe(vm: VirtualMachine, node: str, seen: SeenDomain, now: datetime) -> Observation:
    """Take one report on a VM's domain into account.

    Args:
        vm: Without an open grant.
        node: Who reports.
        seen: The report, with its number.
        now: For conditions.
    """
    status = vm.status
    if not seen.state:
        return Observation()  # it ran, and went before it was ever read: its stop event, which is to come, tells how
    if status.node_name == node and seen.counter < status.counter:
        return Observation()  # older than what is known
    if status.node_name == node and not status.phase.occupies_node and seen.began < status.counter:
        return Observation()  # read before its stop was told, and reported after it
    if seen.incarnation < status.incarnation:
        return _observe_outdated(vm, node, seen)
    if seen.incarnation > status.incarnation:
        raised = _raise(vm, node, seen.incarnation)
        observation = observe(raised, node, seen, now)
        return Observation(observation.vm or raised, observation.notes)
    if seen.state in {ABSENT, "shutoff"}:
        return _observe_absent(vm, node, seen, now)
    is_elsewhere = status.node_name not in {"", node} and status.phase.occupies_node
    if is_elsewhere and not has_left(vm):
        # Its source has not said yet that it left (or it runs twice). The record follows when it does.
        if seen.state != "running" or status.elsewhere == node:
            return Observation()
        return Observation(vm.with_status(elsewhere=node))
    if seen.state == "crashed" and not status.elsewhere:
        return _observe_crashed(vm, node, seen, now)
    notes: tuple[Note, ...] = ()
    if status.elsewhere and status.node_name == node and seen.state == "running":
        notes = (
            Note("VirtualMachineRunsTwice", f"it runs on node {node} and on node {status.elsewhere}", warning=True),
        )
    phase = shown_phase(vm, _PHASES.get(seen.state, VmPhase.DEGRADED))
    is_known = (
        node not in status.outdated
        and phase is status.phase
        and _address(vm, seen) == status.ip_address
        and status.node_name == node
    )
    if is_known and not has_left(vm) and notes == ():
        return Observation()
    return Observation(_there(vm, node, seen, phase, now), notes)


def with_agent(vm: VirtualMachine, node: str, seen: SeenDomain, now: datetime) -> VirtualMachine:
    """Give a VM with its condition AgentReady as a report has it; the same VM where that is no news.

    Args:
        vm: Without an open grant, and with the report taken into account.
        node: Who reports.
        seen: The report, with its number.
        now: For the condition.
    """
    status = vm.status
    is_here = status.phase.occupies_node and (status.node_name, status.incarnation) == (node, seen.incarnation)
    if seen.agent is None or seen.state != "running" or not is_here or seen.counter < status.counter:
        return vm
    known = find_condition(status.conditions, AGENT_READY)
    new = agent_condition(is_ready=seen.agent)
    if known is not None and known.status == new.status:
        return vm
    return vm.with_status(conditions=with_condition(status.conditions, new, now))


def has_left(vm: VirtualMachine) -> bool:
    """Whether it left the node on record by migration, and nobody has told yet where it is."""
    running = find_condition(vm.status.conditions, "Running")
    return running is not None and running.status == "Unknown" and vm.status.phase.occupies_node


def _raise(vm: VirtualMachine, node: str, incarnation: int) -> VirtualMachine:
    """The VM as it would be on record had its start on this node not been lost."""
    status = vm.status
    return vm.with_status(
        incarnation=incarnation,
        node_name=node if status.phase.occupies_node else status.node_name,
        elsewhere="",
        counter=0,
    )


def _observe_outdated(vm: VirtualMachine, node: str, seen: SeenDomain) -> Observation:
    status = vm.status
    if seen.state in {ABSENT, "shutoff"}:
        if node not in status.outdated:
            return Observation()
        return Observation(vm.with_status(outdated=tuple(name for name in status.outdated if name != node)))
    if node in status.outdated:
        return Observation()
    message = f"node {node} has incarnation {seen.incarnation}, {status.incarnation} may run: it destroys its copy"
    marked = vm.with_status(outdated=tuple(sorted({*status.outdated, node})))
    return Observation(marked, (Note("OutdatedCopySeen", message, warning=True),))


def _observe_absent(vm: VirtualMachine, node: str, seen: SeenDomain, now: datetime) -> Observation:
    status = vm.status
    if status.elsewhere == node:
        return Observation(vm.with_status(elsewhere=""))
    if status.node_name != node or not status.phase.occupies_node:
        return Observation()
    if status.elsewhere:
        moved = vm.with_status(node_name=status.elsewhere, elsewhere="", phase=VmPhase.RUNNING, counter=0)
        note = Note("Moved", f"it left node {node} for {status.elsewhere} behind our back")
        return Observation(moved, (note,))
    if has_left(vm) and not seen.reason:
        return Observation()  # as is known; where it is now, its new host will tell
    if seen.reason.startswith("migrated"):
        condition = Condition(
            type="Running", status="Unknown", reason="OutcomeUnknown", message=f"left node {node} by migration"
        )
        return Observation(vm.with_status(conditions=with_condition(status.conditions, condition, now)))
    reason, message = _STOPS.get(seen.reason, (CRASHED, f"it ended on node {node} ({seen.reason or 'not known how'})"))
    if seen.by_host:
        reason, message = STOPPED_BY_NODE, f"node {node} was shut down"
    stopped = stopped_vm(vm, reason, message, seen.counter, now)
    notes = (Note("Stopped", message, warning=reason == CRASHED),)
    return Observation(stopped, notes + (_backoff_notes(stopped, now) if is_to_start(stopped) else ()))


def _observe_crashed(vm: VirtualMachine, node: str, seen: SeenDomain, now: datetime) -> Observation:
    status = vm.status
    if has_crashed(vm) and status.node_name == node and node not in status.outdated:
        return Observation()
    crashed = crashed_vm(vm, node, seen.counter, now).with_status(
        incarnation=max(seen.incarnation, status.incarnation),
        outdated=tuple(name for name in status.outdated if name != node),
    )
    running = find_condition(crashed.status.conditions, "Running")
    notes = (Note("Crashed", running.message if running is not None else "", warning=True),)
    return Observation(crashed, notes + (_backoff_notes(crashed, now) if next_step(crashed) is not None else ()))


def _backoff_notes(vm: VirtualMachine, now: datetime) -> tuple[Note, ...]:
    until = vm.status.not_before
    if until is None or until <= now:
        return ()
    wait_s = round((until - now).total_seconds())
    times = vm.status.failures
    return (Note("BackOff", f"it stopped {times} times in a row; started again after {wait_s} s", warning=True),)


def _there(vm: VirtualMachine, node: str, seen: SeenDomain, phase: VmPhase, now: datetime) -> VirtualMachine:
    is_running = seen.state == "running"
    condition = Condition(
        type="Running", status="True" if is_running else "False", reason=phase.value, message=seen.reason
    )
    conditions = with_condition(vm.status.conditions, condition, now)
    if phase is not VmPhase.MIGRATING:
        ended = Condition(type=MIGRATING, status="False", reason="Ended")
        conditions = no_longer(conditions, ended, now)
    if is_running and not vm.status.phase.occupies_node:  # its start was lost, or nobody's: it counts from now
        vm = vm.with_status(started_at=now, not_before=None)
    return vm.with_status(
        phase=phase,
        node_name=node,
        counter=seen.counter,
        incarnation=max(seen.incarnation, vm.status.incarnation),
        ip_address=_address(vm, seen),
        outdated=tuple(name for name in vm.status.outdated if name != node),
        conditions=conditions,
    )


def _address(vm: VirtualMachine, seen: SeenDomain) -> str:
    return vm.spec.ip_address or (seen.addresses[0] if seen.addresses else vm.status.ip_address)
