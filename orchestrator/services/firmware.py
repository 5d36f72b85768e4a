"""The condition FirmwareUpToDate of VMs, and the operations that bring them onto a newer hypervisor without a stop."""

from uuid import uuid4

from orchestrator.errors import Conflict, Invalid, NotFound, Refused
from orchestrator.logs import logger
from orchestrator.planner.firmware import Newest, firmware_condition, newest, plan_updates
from orchestrator.resources import (
    Maintenance,
    Node,
    NodeDrain,
    ObjectMeta,
    OperationType,
    Priority,
    VirtualMachine,
    VirtualMachineOperation,
    find_condition,
    with_condition,
)
from orchestrator.resources.node import HYPERVISOR_LABEL
from orchestrator.resources.vmop import PRIORITY_ANNOTATION, MigrateTo, OperationSpec
from orchestrator.services.context import Context, wake_grant
from orchestrator.services.herd import Herd
from orchestrator.services.operations import put_operation

log = logger(__name__)

FIRMWARE_ANNOTATION = "vmherd.dev/firmware-update"
"""Of an operation: the version for whose sake it was made."""
_AT_A_TIME = 100


def keep_firmware(ctx: Context, herd: Herd) -> int:
    """Say of each VM that runs whether its hypervisor is up to date; move some of those whose is not, if that is on.

    Nothing is moved for this while nodes are drained or maintained: whoever moves then moves to newer nodes anyway.

    Returns:
        How many operations were made.
    """
    herd.follower.sync()
    best = newest(herd.follower.all(Node))
    vms = herd.follower.all(VirtualMachine)
    _tell(ctx, [vm for vm in vms if vm.status.phase.occupies_node], best)
    if not ctx.config.firmware_update or not best.is_common:
        return 0
    drains, maintenances = herd.follower.all(NodeDrain), herd.follower.all(Maintenance)
    if any(drain.is_open for drain in drains) or any(found.is_open for found in maintenances):
        return 0
    snapshot = herd.snapshot()
    operations = herd.open_operations()
    ours = sum(FIRMWARE_ANNOTATION in operation.metadata.annotations for operation in operations)
    held = frozenset(operation.vm_key for operation in operations)
    by_key = {vm.key: vm for vm in vms}
    chosen = plan_updates(snapshot, vms, best, held, most=snapshot.cap - ours)
    made = sum(_move(ctx, by_key[key], best.version) for key in chosen)
    if made:
        wake_grant(ctx)
    return made


def _tell(ctx: Context, vms: list[VirtualMachine], best: Newest) -> None:
    news = []
    for vm in sorted(vms, key=lambda vm: vm.key):
        condition = firmware_condition(vm, best)
        shown = find_condition(vm.status.conditions, condition.type)
        if shown is None or (shown.status, shown.message) != (condition.status, condition.message):
            conditions = with_condition(vm.status.conditions, condition, ctx.now())
            news.append((vm, vm.with_status(conditions=conditions)))
    for first in range(0, len(news), _AT_A_TIME):
        batch = ctx.store.batch()
        for old, new in news[first : first + _AT_A_TIME]:
            batch.put(old, new)
        try:
            ctx.store.must_commit(batch)
        except Conflict:
            continue  # some were changed meanwhile: the next round tells


def _move(ctx: Context, vm: VirtualMachine, version: str) -> bool:
    """Make the one operation that a VM gets for a version; that it got it is on record with it."""
    meta = ObjectMeta(
        name=f"{f'firmware-update-{vm.name}'[:57].rstrip('-')}-{uuid4().hex[:5]}",
        namespace=vm.metadata.namespace,
        annotations={PRIORITY_ANNOTATION: str(Priority.BALANCE.value), FIRMWARE_ANNOTATION: version},
    )
    spec = OperationSpec(
        type=OperationType.MIGRATE,
        virtual_machine_name=vm.name,
        migrate=MigrateTo(node_selector={HYPERVISOR_LABEL: version}),
    )
    try:
        batch = ctx.store.batch().put(vm, vm.with_status(firmware_update=version))
        put_operation(ctx, batch, VirtualMachineOperation(metadata=meta, spec=spec), ctx.now())
        ctx.store.must_commit(batch)
    except (Conflict, Invalid, NotFound, Refused) as error:  # it changed since: the next round looks again
        log.info("firmware update not asked for", vm=vm.key, why=str(error))
        return False
    return True
