"""Keeping each VM as its runPolicy wants it: what `planner.policy` asks for becomes an ordinary operation.

It is looked at right after a report or an operation's end has changed the VM, and again by every reconcile, which also
lets back-offs come to their end. A VM on which an operation is open is left alone until that has ended.
"""

from datetime import datetime
from uuid import uuid4

from orchestrator.errors import Conflict
from orchestrator.logs import logger
from orchestrator.planner.flow import say
from orchestrator.planner.policy import Step, next_step
from orchestrator.resources import (
    ObjectMeta,
    OperationType,
    Reason,
    VirtualMachine,
    VirtualMachineOperation,
    new_metadata,
)
from orchestrator.resources.vmop import OperationSpec
from orchestrator.services.context import Context, deciding, wake_grant
from orchestrator.store import Refusal, keys

log = logger(__name__)


def keep(ctx: Context, key: str) -> None:
    """Do what a VM's policy, or its deletion, asks for now."""

    def decide() -> bool:
        vm = ctx.store.find(VirtualMachine, key)
        if vm is None:
            return False
        if is_to_be_removed(vm):
            batch = ctx.store.batch().delete(vm)
            batch.check("field", keys.ACTIVE_OPERATIONS, key, "").check("field", keys.OPEN_GRANTS, key, "")
            batch.tell("VM is deleted", vm=key)
            ctx.store.commit(batch)
            return False
        step = next_step(vm)
        if step is None or not is_due(step, ctx.store.now()):
            return False
        operation = policy_operation(vm, step.type, ctx.now(), force=step.force)
        batch = ctx.store.batch().create(operation)
        batch.check("unchanged", VirtualMachine.kind_name, key, vm.version)
        batch.tell("policy", vm=key, operation=operation.key, does=step.type.value, why=step.why)
        answer = ctx.store.commit(batch)
        if isinstance(answer, Refusal) and answer.check == "unchanged":
            raise Conflict(f"{key} changed")
        return not isinstance(answer, Refusal)  # an operation is active: its end brings us here again

    if deciding(decide):
        wake_grant(ctx)


def is_to_be_removed(vm: VirtualMachine) -> bool:
    """Whether a VM was deleted and has stopped, and nobody's finalizer keeps it."""
    meta = vm.metadata
    return meta.deletion_timestamp is not None and not vm.status.phase.occupies_node and not meta.finalizers


def is_due(step: Step, now: datetime) -> bool:
    """Whether a step's back-off is over."""
    return step.not_before is None or step.not_before <= now


def policy_operation(
    vm: VirtualMachine, kind: OperationType, at: datetime, *, force: bool = False
) -> VirtualMachineOperation:
    """Make an operation that a VM's policy asks for."""
    meta = ObjectMeta(name=f"{kind.value.lower()}-{vm.name}"[:57] + f"-{uuid4().hex[:5]}")
    operation = VirtualMachineOperation(
        metadata=new_metadata(meta.with_(namespace=vm.metadata.namespace), namespaced=True, now=at),
        spec=OperationSpec(type=kind, virtual_machine_name=vm.name, force=force or None),
    )
    return say(operation, Reason.NOT_READY, "waits to be granted", at)
