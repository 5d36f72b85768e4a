"""Which operation may be done to which VM, and which one takes another's place (the platform's two tables).

A VM that is being migrated by an operation of ours counts as Running for what supersedes that operation: the migration
is aborted first, and the VM runs on at its source.
"""

from orchestrator.resources import OperationType, Reason, RunPolicy, VirtualMachine, VmPhase
from orchestrator.resources.vmop import OperationSpec

_STOPPABLE = frozenset({VmPhase.RUNNING, VmPhase.DEGRADED, VmPhase.STARTING, VmPhase.PAUSE})
_PHASES: dict[OperationType, frozenset[VmPhase]] = {
    OperationType.START: frozenset({VmPhase.STOPPED, VmPhase.STOPPING}),
    OperationType.STOP: _STOPPABLE | {VmPhase.PENDING},
    OperationType.RESTART: _STOPPABLE,
    OperationType.EVICT: frozenset({VmPhase.RUNNING}),
    OperationType.MIGRATE: frozenset({VmPhase.RUNNING}),
}
_BY_HAND = frozenset({RunPolicy.MANUAL, RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY})
_POLICIES: dict[OperationType, frozenset[RunPolicy]] = {
    OperationType.START: _BY_HAND,
    OperationType.STOP: _BY_HAND,
    OperationType.RESTART: _BY_HAND | {RunPolicy.ALWAYS_ON},
    OperationType.EVICT: _BY_HAND | {RunPolicy.ALWAYS_ON},
    OperationType.MIGRATE: _BY_HAND | {RunPolicy.ALWAYS_ON},
}
_ENDS_THE_GUEST = frozenset({OperationType.STOP, OperationType.RESTART})


def inapplicable(
    spec: OperationSpec, vm: VirtualMachine, *, superseding: OperationSpec | None = None
) -> tuple[Reason, str] | None:
    """Say why an operation can't be done to a VM as it is now; None when it can.

    Args:
        spec: What is asked.
        vm: As it is now.
        superseding: The active operation that this one would take the place of.
    """
    policy, phase = vm.spec.run_policy, vm.status.phase
    if vm.metadata.deletion_timestamp is not None:
        message = f"{spec.type} is not applicable: VirtualMachine {vm.name!r} is being deleted"
        return Reason.NOT_APPLICABLE_FOR_PHASE, message
    if vm.status.adoption is not None:
        message = f"{spec.type} is not applicable: {handed_over(vm)}"
        return Reason.NOT_READY, message
    if policy not in _POLICIES[spec.type] and not _waits_for_a_person(spec, vm):
        allowed = ", ".join(sorted(_POLICIES[spec.type]))
        message = (
            f"{spec.type} is not applicable: VirtualMachine {vm.name!r} has runPolicy {policy} (applicable: {allowed})"
        )
        return Reason.NOT_APPLICABLE_FOR_RUN_POLICY, message
    if superseding is not None and superseding.type.is_migration and phase is VmPhase.MIGRATING:
        phase = VmPhase.RUNNING
    allowed_phases = applicable_phases(spec)
    if phase not in allowed_phases:
        allowed = ", ".join(p for p in VmPhase if p in allowed_phases)
        message = f"{spec.type} is not applicable: VirtualMachine {vm.name!r} is {phase}, not {allowed}"
        return Reason.NOT_APPLICABLE_FOR_PHASE, message
    return None


def _waits_for_a_person(spec: OperationSpec, vm: VirtualMachine) -> bool:
    """Whether it is the start of an AlwaysOn VM that its policy does not start, as its storage was found locked."""
    recovery, policy = vm.status.recovery, vm.spec.run_policy
    is_held = recovery is not None and bool(recovery.held)
    return is_held and spec.type is OperationType.START and policy is RunPolicy.ALWAYS_ON


def handed_over(vm: VirtualMachine) -> str:
    """Say that a VM is between its host and us, so that nothing else is done to it."""
    adoption = vm.status.adoption
    node = adoption.node if adoption is not None else ""
    return f"VirtualMachine {vm.name!r} is being adopted or released: node {node} has not answered yet"


def applicable_phases(spec: OperationSpec) -> frozenset[VmPhase]:
    """Give the phases of a VM in which an operation may be asked for."""
    phases = _PHASES[spec.type]
    if spec.type in _ENDS_THE_GUEST and spec.force:
        phases |= {VmPhase.STOPPING}
    return phases


def supersedes(new: OperationSpec, old: OperationSpec) -> bool:
    """Whether a new operation takes the place of an active one of the same VM.

    A forced Stop or Restart is never superseded: what it does can't be taken back, and nothing is faster.
    """
    if new.type not in _ENDS_THE_GUEST:
        return False
    match old.type:
        case OperationType.START:
            return new.type is OperationType.STOP
        case OperationType.EVICT | OperationType.MIGRATE:
            return True
        case OperationType.STOP | OperationType.RESTART:
            return bool(new.force) and not old.force
