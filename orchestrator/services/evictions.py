"""One VM that is to leave its node, as whoever empties the node asks for it again and again until it has left."""

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.errors import Invalid, NotFound, Refused
from orchestrator.resources import Node, VirtualMachine, VirtualMachineOperation
from orchestrator.resources.drain import VmState
from orchestrator.services import drains
from orchestrator.services.context import Context
from orchestrator.services.evacuation import evacuation
from orchestrator.services.operations import active_operation, create_operation


class EvictionState(StrEnum):
    """How far it is."""

    GONE = "Gone"
    TRIGGERED = "Triggered"
    IN_PROGRESS = "InProgress"
    REFUSED = "Refused"


@dataclass(frozen=True, slots=True)
class Eviction:
    """What became of one request.

    Attributes:
        message: For whoever asked; says what is waited for, or why it can't be.
    """

    state: EvictionState
    message: str = ""


def evict(ctx: Context, key: str, node: str) -> Eviction:
    """Have a VM leave a node: an `evacuation-*` operation is made, unless one is under way.

    Args:
        ctx: To work with.
        key: Of the VM.
        node: That it is to leave; one that it is arriving at counts too.
    """
    vm = ctx.store.find(VirtualMachine, key)
    if vm is None or not vm.status.phase.occupies_node:
        return Eviction(EvictionState.GONE)
    active = active_operation(ctx, key)
    if vm.status.node_name != node:
        if active is not None and active.status.target_node == node and active.status.grant is not None:
            return Eviction(EvictionState.IN_PROGRESS, f"{_name(vm)} is arriving at node {node}; {_progress(active)}")
        return Eviction(EvictionState.GONE)
    if active is not None:
        return _under_way(vm, active)
    found = ctx.store.find(Node, node)
    if found is not None and found.spec.unschedulable and not ctx.store.is_dry:
        return _drained(ctx, vm)
    try:
        created = create_operation(ctx, evacuation(vm, node))
    except (Invalid, NotFound, Refused) as error:
        active = active_operation(ctx, key)
        if active is not None:
            return _under_way(vm, active)  # someone else was faster
        return Eviction(EvictionState.REFUSED, f"{_name(vm)} can't be evacuated: {error}")
    return Eviction(EvictionState.TRIGGERED, f"{_triggered(vm)} ({created.name})")


def _drained(ctx: Context, vm: VirtualMachine) -> Eviction:
    """Of a cordoned node: the control plane sees to it until it has left, or the node is uncordoned."""
    drain = drains.evict(ctx, vm)
    active = active_operation(ctx, vm.key)
    if active is not None:
        return Eviction(EvictionState.TRIGGERED, f"{_triggered(vm)} ({active.name})")
    known = drain.vms.get(vm.key)
    if known is None or known.state is VmState.LEFT:
        return Eviction(EvictionState.GONE)
    if known.state is VmState.STAYS:
        return Eviction(EvictionState.REFUSED, f"{_name(vm)} can't be evacuated: {known.message}")
    return Eviction(EvictionState.IN_PROGRESS, f"Evacuation in progress: {_triggered(vm)} ({known.message})")


def _under_way(vm: VirtualMachine, active: VirtualMachineOperation) -> Eviction:
    if active.spec.type.is_migration:
        return Eviction(EvictionState.IN_PROGRESS, f"Evacuation in progress: {_triggered(vm)} ({_progress(active)})")
    message = f"{_name(vm)} waits for the end of its {active.spec.type}: {_progress(active)}"
    return Eviction(EvictionState.IN_PROGRESS, message)


def _name(vm: VirtualMachine) -> str:
    return f'VMI "{vm.key}"'


def _triggered(vm: VirtualMachine) -> str:
    return f"Eviction triggered evacuation of {_name(vm)}"


def _progress(operation: VirtualMachineOperation) -> str:
    status = operation.status
    said = f": {operation.message}" if operation.message else ""
    return f"{operation.name} {status.phase} {status.progress}%{said}"
