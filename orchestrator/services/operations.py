"""Admission: operations are created and deleted here, and nowhere else.

A refusal names the thing, the reason and what to do; nothing is stored then.
"""

from datetime import datetime
from typing import Any, cast

from orchestrator.errors import Invalid, NotFound, Refused
from orchestrator.planner.applicability import inapplicable, supersedes
from orchestrator.planner.flow import Note, Transition, say, superseded
from orchestrator.planner.preflight import immovable
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    Action,
    Node,
    ObjectMeta,
    OperationPhase,
    OperationType,
    Reason,
    Resource,
    VirtualMachine,
    VirtualMachineOperation,
    finalizers,
    make_key,
    new_metadata,
    parse,
)
from orchestrator.resources.vmop import (
    CLEANUP_FINALIZER,
    PRIORITIES,
    PRIORITY_ANNOTATION,
    MigrateTo,
    OperationSpec,
    OperationStatus,
)
from orchestrator.services.context import Context, add_notes, deciding, put_transition, wake_grant
from orchestrator.services.results import publish_result
from orchestrator.store import Batch, keys
from orchestrator.store.connection import redis_errors


def create_operation(ctx: Context, wanted: VirtualMachineOperation) -> VirtualMachineOperation:
    """Admit an operation: it is stored Pending, or refused at once.

    Raises:
        NotFound: No such VM.
        Refused: The VM's phase or policy does not allow it, or another operation of the VM is not finished.
        Invalid: A field is wrong.
    """
    check_priority(wanted)

    def decide() -> VirtualMachineOperation:
        batch = ctx.store.batch()
        ended = put_operation(ctx, batch, wanted, ctx.now())
        written = ctx.store.must_commit(batch)  # refused: another was faster, look again
        if ended is not None:
            publish_result(ctx, ended)
        return written[-1]  # type: ignore[return-value]

    operation = deciding(decide)
    wake_grant(ctx)
    return operation


def put_operation(
    ctx: Context, batch: Batch, wanted: VirtualMachineOperation, at: datetime
) -> VirtualMachineOperation | None:
    """Add to a batch that an operation is stored Pending; the last document of the batch is this operation then.

    Returns:
        The operation that it supersedes, as it is then: its result is published after the commit.

    Raises:
        NotFound: As `create_operation`.
        Refused: As `create_operation`.
        Invalid: As `create_operation`.
    """
    meta = new_metadata(wanted.metadata, namespaced=True, now=at)
    vm = ctx.store.find(VirtualMachine, make_key(wanted.spec.virtual_machine_name, meta.namespace))
    if vm is None:
        raise NotFound(f"VirtualMachine {wanted.spec.virtual_machine_name!r} not found in namespace {meta.namespace!r}")
    active = active_operation(ctx, vm.key)
    if active is not None and not _gives_way(active, wanted.spec):
        raise _blocked(active)
    _check_applicable(ctx, wanted.spec, vm, active)
    ours = (CLEANUP_FINALIZER,) if wanted.spec.type.is_migration else ()
    meta = meta.with_(finalizers=finalizers.at_creation(wanted.metadata, *ours), deletion_timestamp=None)
    operation = wanted.with_(metadata=meta, status=OperationStatus(), created_version=0)
    waits = Reason.MIGRATION_PENDING if wanted.spec.type.is_migration else Reason.NOT_READY
    operation = say(operation, waits, "waits to be granted", at)
    ended = put_superseded(batch, active, operation, at) if active is not None else None
    batch.create(operation)
    return ended


def put_superseded(
    batch: Batch, old: VirtualMachineOperation, by: VirtualMachineOperation, at: datetime
) -> VirtualMachineOperation:
    """Add to a batch that another operation takes the place of an active one.

    Returns:
        The old one as it is then; its grant may still be open.
    """
    new = superseded(old, by.name, at)
    note = Note("OperationSuperseded", f"superseded by {by.name} ({by.spec.type})")
    put_transition(batch, old, None, Transition(new, notes=(note,)), at)
    if new.status.grant is not None:
        batch.wake(new.status.grant.node, "cancel")
    return new


def active_operation(ctx: Context, vm: str) -> VirtualMachineOperation | None:
    """Find the operation of a VM that is not finished."""
    with redis_errors(ctx.store.redis):
        key = cast("str | None", ctx.store.redis.hget(keys.ACTIVE_OPERATIONS, vm))
    return ctx.store.find(VirtualMachineOperation, key) if key else None


def _gives_way(active: VirtualMachineOperation, wanted: OperationSpec) -> bool:
    """Whether an active operation is superseded by a new one. One that is being aborted still blocks."""
    return active.metadata.deletion_timestamp is None and supersedes(wanted, active.spec)


def new_operation(
    vm: str,
    kind: OperationType,
    namespace: str = DEFAULT_NAMESPACE,
    migrate: MigrateTo | None = None,
    annotations: dict[str, str] | None = None,
    force: bool | None = None,
) -> VirtualMachineOperation:
    """Make an operation to be given to `create_operation`.

    Raises:
        Invalid: The VM's name can't be one.
    """
    return VirtualMachineOperation(
        metadata=ObjectMeta(
            generate_name=f"{kind.value.lower()}-{vm}-"[:57], namespace=namespace, annotations=annotations or {}
        ),
        spec=parse(OperationSpec, {"type": kind, "virtualMachineName": vm, "migrate": migrate, "force": force}),
    )


def check_priority(wanted: VirtualMachineOperation) -> None:
    """Refuse a priority that is none.

    Raises:
        Invalid: Names those that there are.
    """
    given = wanted.metadata.annotations.get(PRIORITY_ANNOTATION)
    if given is not None and given not in PRIORITIES:
        path, why = f"metadata.annotations.{PRIORITY_ANNOTATION}", f"must be one of {', '.join(PRIORITIES)}"
        raise Invalid(f"{path}: {why} (given: {given!r})", ((path, why),))


def _check_applicable(
    ctx: Context, spec: OperationSpec, vm: VirtualMachine, active: VirtualMachineOperation | None
) -> None:
    if spec.type is OperationType.START and spec.force:
        raise Invalid("spec.force: a Start can't be forced", (("spec.force", "a Start can't be forced"),))
    refusal = inapplicable(spec, vm, superseding=active.spec if active else None)
    if refusal is not None:
        reason, message = refusal
        raise Refused(f"{message} ({reason})")
    if spec.type.is_migration and (tie := immovable(vm)) is not None:
        raise Refused(f"{spec.type} is not applicable: VirtualMachine {vm.name!r} can't migrate: {tie[1]} ({tie[0]})")
    wanted = spec.migrate.node_name if spec.migrate else ""
    if wanted:
        if ctx.store.find(Node, wanted) is None:
            raise NotFound(f"Node {wanted!r} not found (spec.migrate.nodeName)")
        if wanted == vm.status.node_name:
            raise Refused(f"VirtualMachine {vm.name!r} runs on node {wanted!r} already (spec.migrate.nodeName)")


def _blocked(active: VirtualMachineOperation) -> Refused:
    return Refused(f"VMOP cannot be executed now. Previously created operation {active.name!r} should finish first")


def delete_operation(ctx: Context, key: str, *, seen: VirtualMachineOperation | None = None) -> VirtualMachineOperation:
    """Delete an operation, which aborts a migration that is under way.

    One with somebody's finalizers stays, and does nothing more, until these are taken off.

    A stop can't be taken back: it comes to its end, and the operation is removed then. So is what was superseded.

    Args:
        ctx: To work with.
        key: The operation's.
        seen: As it was when this was decided on: one that has changed since (was granted, say) is left as it is.

    Returns:
        The operation; phase Terminating when it is still being aborted.

    Raises:
        NotFound: No such operation.
    """

    def decide() -> VirtualMachineOperation:
        operation = ctx.store.get(VirtualMachineOperation, key)
        is_other = seen is not None and operation.version != seen.version
        if operation.metadata.deletion_timestamp is not None or is_other:
            return operation
        at = ctx.now()
        meta = operation.metadata.with_(deletion_timestamp=at)
        batch = ctx.store.batch()
        note = Note("OperationAborted", "deleted before it began; the VM stays where it is")
        if operation.status.grant is None:
            gone = operation.with_(metadata=meta)
            if operation.is_active:
                gone = say(gone.with_status(phase=OperationPhase.TERMINATING), Reason.ABORTED, note.message, at)
                add_notes(batch, (operation, ctx.store.find(VirtualMachine, operation.vm_key)), (note,), at)
            if finalizers.others(meta):
                gone = gone.with_(metadata=meta.with_(finalizers=finalizers.others(meta)))
                batch.put(operation, gone)
            else:
                batch.delete(operation)
            ctx.store.must_commit(batch)
            return gone
        marked = operation.with_(metadata=meta)
        if operation.is_active and operation.status.grant.action is not Action.STOP:
            marked = marked.with_grant(cancel=True).with_status(phase=OperationPhase.TERMINATING)
            marked = say(marked, Reason.ABORTED, "being aborted", at)
            batch.wake(operation.status.grant.node, "cancel")
        batch.put(operation, marked)
        return ctx.store.must_commit(batch)[0]  # type: ignore[return-value]

    operation = deciding(decide)
    if operation.metadata.deletion_timestamp is None:
        return operation
    if operation.is_active and operation.status.grant is None:
        publish_result(ctx, operation)
    wake_grant(ctx)
    return operation


def replace_spec(ctx: Context, data: Any) -> Resource:
    """Apply a changed manifest of an operation: its spec is immutable, so anything but the same is refused.

    Raises:
        Invalid: `.spec is immutable`.
        NotFound: No such operation.
    """
    wanted = parse(VirtualMachineOperation, {k: v for k, v in data.items() if k != "status"})
    stored = ctx.store.get(
        VirtualMachineOperation, make_key(wanted.name, wanted.metadata.namespace or DEFAULT_NAMESPACE)
    )
    check_same_spec(wanted, stored)
    return stored


def check_same_spec(wanted: VirtualMachineOperation, stored: VirtualMachineOperation) -> None:
    """Refuse to change an operation.

    Raises:
        Invalid: `.spec is immutable`.
    """
    if wanted.spec != stored.spec:
        raise Invalid(
            f"VirtualMachineOperation {wanted.name!r}: .spec is immutable: delete it and create another",
            (("spec", ".spec is immutable"),),
        )
