"""The operations by which VMs leave a node: `evacuation-*`, of the priority of maintenance."""

from uuid import uuid4

from orchestrator.resources import ObjectMeta, OperationType, Priority, VirtualMachine, VirtualMachineOperation
from orchestrator.resources.drain import DRAIN_ANNOTATION
from orchestrator.resources.vmop import PRIORITY_ANNOTATION, MigrateTo, OperationSpec


def evacuation(
    vm: VirtualMachine, node: str, kind: OperationType = OperationType.EVICT, *, to: str = ""
) -> VirtualMachineOperation:
    """Make the operation by which a VM leaves a node, or comes back to it; to be admitted as any other.

    Args:
        vm: That is moved, or restarted elsewhere.
        node: Whose drain it belongs to.
        kind: Evict; Restart of one that can't migrate; Migrate of one that comes back.
        to: Of a Migrate.
    """
    stem = f"{'return' if to else 'evacuation'}-{vm.name}"[:57]
    meta = ObjectMeta(
        name=f"{stem.rstrip('-')}-{uuid4().hex[:5]}",
        namespace=vm.metadata.namespace,
        annotations={PRIORITY_ANNOTATION: str(Priority.MAINTENANCE.value), DRAIN_ANNOTATION: node},
    )
    migrate = MigrateTo(node_name=to) if to else None
    return VirtualMachineOperation(
        metadata=meta, spec=OperationSpec(type=kind, virtual_machine_name=vm.name, migrate=migrate)
    )
