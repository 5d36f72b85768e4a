"""Moving VMs off a node whose host shuts down.

Each VM that runs there gets an Evict named `evacuation-*`. One that can't migrate, or fits nowhere, stays until the
host's own deadline, and is stopped then as the node's doing (`workers.shutdown`).
"""

from orchestrator.errors import Invalid, NotFound, Refused
from orchestrator.logs import logger
from orchestrator.resources import (
    Node,
    ObjectMeta,
    OperationType,
    Priority,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
)
from orchestrator.resources.vmop import PRIORITY_ANNOTATION, OperationSpec
from orchestrator.services.context import Context
from orchestrator.services.herd import Herd
from orchestrator.services.operations import create_operation

log = logger(__name__)


def empty(ctx: Context, node: str) -> None:
    """Ask for the evacuation of each VM that runs on a node and on which nothing is under way."""
    _evict(ctx, [vm for vm in ctx.store.all(VirtualMachine) if vm.status.node_name == node])


def empty_again(ctx: Context, herd: Herd) -> None:
    """Ask again for what is still on nodes that shut down: an evacuation failed, or a VM came free since."""
    leaving = {node.name for node in herd.follower.all(Node) if node.is_shutting_down and node.is_ready}
    if not leaving:
        return
    held = {operation.vm_key for operation in herd.open_operations()}
    _evict(
        ctx,
        [vm for vm in herd.follower.all(VirtualMachine) if vm.status.node_name in leaving and vm.key not in held],
    )


def _evict(ctx: Context, vms: list[VirtualMachine]) -> None:
    for vm in sorted(vms, key=lambda vm: vm.key):
        if vm.status.phase is not VmPhase.RUNNING:
            continue
        try:
            create_operation(ctx, evacuation(vm))
        except (Invalid, NotFound, Refused) as error:
            log.info("not evacuated", vm=vm.key, why=str(error))


def evacuation(vm: VirtualMachine) -> VirtualMachineOperation:
    """Make the operation by which a VM leaves its node; to be admitted as any other."""
    meta = ObjectMeta(
        generate_name=f"evacuation-{vm.name}-"[:57],
        namespace=vm.metadata.namespace,
        annotations={PRIORITY_ANNOTATION: str(Priority.MAINTENANCE.value)},
    )
    spec = OperationSpec(type=OperationType.EVICT, virtual_machine_name=vm.name)
    return VirtualMachineOperation(metadata=meta, spec=spec)
