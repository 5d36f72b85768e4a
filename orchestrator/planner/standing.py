"""What becomes of a VM's status when it runs, has moved, or stops."""

from datetime import datetime
from typing import Final

from orchestrator.planner.policy import CRASHED, backed_off, has_crashed, is_to_start
from orchestrator.resources import Condition, Reading, VirtualMachine, VmPhase, find_condition, with_condition

AGENT_READY: Final = "AgentReady"
"""Condition of a VM, the platform's name: whether the guest's agent is connected. One without a channel has it not."""
MIGRATING: Final = "Migrating"
"""Condition of a VM, likewise: whether its memory is being moved to another node."""


def agent_condition(*, is_ready: bool) -> Condition:
    """Make a VM's condition AgentReady."""
    if is_ready:
        return Condition(type=AGENT_READY, status="True", reason="AgentReady", message="its guest agent is connected")
    return Condition(
        type=AGENT_READY, status="False", reason="AgentNotReady", message="its guest agent is not connected"
    )


def no_longer(conditions: tuple[Condition, ...], new: Condition, now: datetime) -> tuple[Condition, ...]:
    """Set a condition that was True to what it is now; one that is not True, or was never said, stays as it is."""
    old = find_condition(conditions, new.type)
    return with_condition(conditions, new, now) if old is not None and old.status == "True" else conditions


def shown_phase(vm: VirtualMachine, phase: VmPhase) -> VmPhase:
    """A VM that is being deleted is Terminating for as long as it occupies a node."""
    if vm.metadata.deletion_timestamp is not None and phase.occupies_node:
        return VmPhase.TERMINATING
    return phase


def stopped_vm(vm: VirtualMachine, reason: str, message: str, counter: int, now: datetime) -> VirtualMachine:
    """Give a VM as it is when it runs nowhere, with the back-off that follows from the reason.

    Args:
        vm: As it was.
        reason: Of its condition Running (`planner.policy`).
        message: For people.
        counter: Number of the node's report that says so.
        now: Of the stop.
    """
    condition = Condition(type="Running", status="False", reason=reason, message=message)
    conditions = with_condition(vm.status.conditions, condition, now)
    conditions = no_longer(conditions, agent_condition(is_ready=False), now)
    conditions = no_longer(conditions, Condition(type=MIGRATING, status="False", reason="Stopped"), now)
    stopped = vm.with_status(phase=VmPhase.STOPPED, counter=counter, elsewhere="", conditions=conditions)
    return waiting(backed_off(stopped, reason, now), now)


def crashed_vm(vm: VirtualMachine, node: str, counter: int, now: datetime) -> VirtualMachine:
    """Give a VM whose guest crashed while its host keeps the domain, with the back-off of a crash.

    It occupies its node until that has destroyed the domain, whose QEMU holds its disks: nothing is started before.

    Args:
        vm: As it was; one that is known to have crashed is not counted again.
        node: Which keeps it.
        counter: Number of the node's report that says so.
        now: Of the crash.
    """
    if not has_crashed(vm):
        vm = backed_off(vm, CRASHED, now)
    message = f"its guest crashed; node {node} keeps its domain (on_crash=preserve)"
    condition = Condition(type="Running", status="False", reason=CRASHED, message=message)
    conditions = no_longer(vm.status.conditions, agent_condition(is_ready=False), now)
    return vm.with_status(
        phase=shown_phase(vm, VmPhase.DEGRADED),
        node_name=node,
        counter=counter,
        conditions=with_condition(conditions, condition, now),
    )


def waiting(vm: VirtualMachine, now: datetime) -> VirtualMachine:
    """A stopped VM as people see it: Pending where its policy will start it, with the back-off said."""
    if not is_to_start(vm):
        return vm
    status = vm.status
    if status.not_before is None or status.not_before <= now:
        return vm.with_status(phase=VmPhase.PENDING)
    wait_s = round((status.not_before - now).total_seconds())
    running = find_condition(status.conditions, "Running")
    assert running is not None  # noqa: S101 - a back-off begins with a stop
    said = running.with_(
        message=f"{running.message}; {status.failures} times in a row: it is started again after {wait_s} s, "
        f"at {status.not_before:%H:%M:%S} UTC"
    )
    return vm.with_status(phase=VmPhase.PENDING, conditions=with_condition(status.conditions, said, now))


def running_vm(
    vm: VirtualMachine, node: str, reading: Reading, now: datetime, *, succeeded: bool | None
) -> VirtualMachine:
    """Give a VM that was read on a node after an operation.

    Args:
        vm: As it was.
        node: Where it is.
        reading: What that node's hypervisor said.
        now: For conditions.
        succeeded: Of a migration; None for others.
    """
    phase = shown_phase(vm, VmPhase.PAUSE if reading.state in {"paused", "postcopy-failed"} else VmPhase.RUNNING)
    state = vm.status.migration_state
    if state is not None and succeeded is not None and state.end_timestamp is None:
        state = state.with_(end_timestamp=now, result="Succeeded" if succeeded else "Failed")
    ended = Condition(type=MIGRATING, status="False", reason="Completed" if succeeded else "Failed")
    if reading.state == "crashed":
        settled = vm.with_status(
            migration_state=state,
            recovery=None,
            elsewhere="",
            conditions=no_longer(vm.status.conditions, ended, now),
        )
        return crashed_vm(settled, node, reading.counter, now)
    conditions = with_condition(vm.status.conditions, Condition(type="Running", status="True", reason="Running"), now)
    return vm.with_status(
        phase=phase,
        node_name=node,
        counter=reading.counter,
        elsewhere="",
        recovery=None,
        migration_state=state,
        needs=vm.status.needs and vm.status.needs.at_home(node),
        ip_address=vm.spec.ip_address or vm.status.ip_address,
        conditions=no_longer(conditions, ended, now),
    )
