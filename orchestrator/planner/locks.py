"""A start after evidence that storage refuses, since somebody else holds the lock on an image.

What the lock says depends on the evidence. A host whose power was read back as off holds nothing, but a storage may
keep a dead client's locks (NFS for up to 90 s): the start is tried again on the same node for three minutes. The
deadline of a watchdog is a conclusion, and the lock contradicts it: the guest may well run where it was. Then nothing
that rests on this evidence starts any more. What is held back starts when a person says so (`vmherd start`),
and by nothing else.
"""

from dataclasses import replace
from datetime import datetime, timedelta

from orchestrator.planner.flow import Note, Transition, failed, open_grant, say
from orchestrator.planner.policy import EVIDENCE_CONTRADICTED, STORAGE_LOCKED
from orchestrator.planner.standing import stopped_vm
from orchestrator.resources import NodeFencing, OperationPhase, OperationType, Reason, VirtualMachine, VmPhase
from orchestrator.resources.fencing import FenceLevel
from orchestrator.resources.vm import Recovery
from orchestrator.resources.vmop import VirtualMachineOperation

RETRY_FOR = timedelta(minutes=3)
"""Twice what NFS keeps a dead client's locks for (TAKEOVER.md)."""
_FIRST_WAIT, _LONGEST_WAIT = timedelta(seconds=5), timedelta(seconds=30)


def recovered(vm: VirtualMachine, fencing: NodeFencing) -> VirtualMachine:
    """Note on which evidence a VM starts next; of two that it has not run since, the one that a lock can contradict."""
    evidence, before = fencing.status.evidence, vm.status.recovery
    if evidence is None or (before is not None and before.level is FenceLevel.DEADLINE):
        return vm
    return vm.with_status(recovery=Recovery(node=fencing.name, level=evidence.level, epoch=evidence.epoch))


def refused_by_lock(
    operation: VirtualMachineOperation, vm: VirtualMachine, recovery: Recovery, why: str, now: datetime
) -> Transition:
    """Give what becomes of a start after evidence that a lock refused; its grant is open.

    Args:
        operation: The start.
        vm: Its VM.
        recovery: On which evidence it was started.
        why: The hypervisor's words.
        now: For conditions and waits.
    """
    target = open_grant(operation).target
    if recovery.level is FenceLevel.DEADLINE:
        text = (
            f"node {target} finds its storage locked, which contradicts the evidence about node {recovery.node}, the "
            f"deadline of its watchdog: it may run there still, and is started nowhere ({why}); look at node "
            f"{recovery.node}, then vmherd start {vm.name}"
        )
        return held_back(operation, vm, EVIDENCE_CONTRADICTED, text, now)
    since = recovery.locked_since or now
    for_so_long = now - since
    if for_so_long >= RETRY_FOR:
        text = (
            f"its storage is locked for {for_so_long.total_seconds():.0f} s, and node {recovery.node}, which had it, "
            f"is off: {why}; find who holds the lock, then vmherd start {vm.name}"
        )
        return held_back(operation, vm, STORAGE_LOCKED, text, now)
    wait = min(max(for_so_long, _FIRST_WAIT), _LONGEST_WAIT, RETRY_FOR - for_so_long)
    text = f"node {target} finds its storage locked yet: {why}; tried again there after {wait.total_seconds():.0f} s"
    status = operation.status
    is_halfway = operation.spec.type is OperationType.RESTART and status.phase is OperationPhase.IN_PROGRESS
    new = operation.with_status(
        phase=OperationPhase.IN_PROGRESS if is_halfway else OperationPhase.PENDING,
        grant=None,
        attempts=max(0, status.attempts - 1),  # it is the time that is limited, not the number
        not_before=now + wait,
        planned=target,
        target_node="",
    )
    back = vm.with_status(phase=VmPhase.PENDING, node_name="", counter=0, recovery=recovery.with_(locked_since=since))
    notes = () if recovery.locked_since is not None else (Note(STORAGE_LOCKED, text, warning=True),)
    return Transition(say(new, Reason.NOT_READY, text, now), back, notes, ended=True)


def held_back(
    operation: VirtualMachineOperation, vm: VirtualMachine, reason: str, text: str, now: datetime
) -> Transition:
    """Give a VM that nothing but a person starts any more, and the end of its start."""
    stopped = held_vm(vm, reason, text, now)
    ended = failed(operation, Reason.OPERATION_FAILED, text, now)
    return replace(ended, vm=stopped, notes=(Note(reason, text, warning=True),), ended=True)


def held_vm(vm: VirtualMachine, reason: str, text: str, now: datetime) -> VirtualMachine:
    """Give a VM, which starts after evidence, as one that nothing but a person starts any more."""
    recovery = vm.status.recovery
    held = vm.with_status(recovery=recovery and recovery.with_(held=reason))
    return stopped_vm(held, reason, text, 0, now).with_status(node_name="")


__all__ = ["RETRY_FOR", "held_back", "held_vm", "recovered", "refused_by_lock"]
