"""VMs are created, changed and deleted here, and nowhere else.

A VM's spec may be changed at any time. What can't be done to a running machine waits for a restart and is listed in the
status; the rest applies at once.
"""

from uuid import UUID

from orchestrator.errors import AlreadyExists, Invalid, Refused
from orchestrator.planner.applicability import handed_over
from orchestrator.planner.flow import Note
from orchestrator.planner.policy import next_step
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    ObjectMeta,
    OperationType,
    VirtualMachine,
    VirtualMachineClass,
    VmPhase,
    finalizers,
    make_key,
    new_metadata,
)
from orchestrator.resources.pending import changed_fields, with_pending
from orchestrator.resources.vm import VirtualMachineStatus
from orchestrator.services.classes import check_version
from orchestrator.services.context import Context, add_notes, deciding, wake_grant
from orchestrator.services.operations import active_operation, put_superseded
from orchestrator.services.policies import keep, policy_operation
from orchestrator.store import Refusal, keys


def create_vm(ctx: Context, wanted: VirtualMachine) -> VirtualMachine:
    """Store a VM; where its policy wants it to run, its start is stored in the same commit.

    Raises:
        AlreadyExists: A VM of this name is there.
        Invalid: `metadata.uid`, which becomes its domain's UUID, is not one, or another VM's; or a finalizer is none.
    """
    _check_uid(wanted.metadata.uid)
    at = ctx.now()
    vm = wanted.with_(
        metadata=new_metadata(wanted.metadata, namespaced=True, now=at).with_(
            deletion_timestamp=None, finalizers=finalizers.at_creation(wanted.metadata)
        ),
        status=VirtualMachineStatus(ip_address=wanted.spec.ip_address),
        created_version=0,
    )
    step = next_step(vm)
    vm = vm if step is not None else vm.with_status(phase=VmPhase.STOPPED)
    batch = ctx.store.batch().create(vm)
    if step is not None:
        batch.create(policy_operation(vm, step.type, at))
    answer = ctx.store.commit(batch)
    if isinstance(answer, Refusal):
        if answer.detail == vm.key:
            raise AlreadyExists(f"VirtualMachine {vm.name!r} already exists")
        why = f"{vm.metadata.uid} is that of VirtualMachine {answer.detail!r} already"
        raise Invalid(f"metadata.uid: {why}", (("metadata.uid", why),))
    wake_grant(ctx)
    return answer[0]  # type: ignore[return-value]


def _check_uid(uid: str) -> None:
    """A uid may be given, for a domain that has one; it becomes the domain's UUID."""
    if not uid:
        return
    try:
        is_canonical = str(UUID(uid)) == uid
    except ValueError:
        is_canonical = False
    if not is_canonical:
        why = f"{uid!r} is not a UUID in lower case with dashes"
        raise Invalid(f"metadata.uid: {why}", (("metadata.uid", why),))


def delete_vm(ctx: Context, key: str) -> VirtualMachine:
    """Delete a VM: it is stopped as gently as its grace period allows, and removed once it runs nowhere.

    What is under way gives way, but for a stop, which is what is wanted.

    Returns:
        The VM; phase Terminating while it still occupies a node.

    Raises:
        NotFound: No such VM.
    """

    def decide() -> VirtualMachine:
        vm = ctx.store.get(VirtualMachine, key)
        if vm.metadata.deletion_timestamp is not None:
            return vm
        if vm.status.adoption is not None:
            raise Refused(handed_over(vm))
        at = ctx.now()
        active = active_operation(ctx, key)
        deleted = vm.with_(metadata=vm.metadata.with_(deletion_timestamp=at))
        if vm.status.phase.occupies_node:
            deleted = deleted.with_status(phase=VmPhase.TERMINATING)
        batch = ctx.store.batch().put(vm, deleted)
        batch.check("field", keys.ACTIVE_OPERATIONS, key, active.key if active else "")
        if active is not None and active.spec.type is not OperationType.STOP:
            stop = policy_operation(vm, OperationType.STOP, at)
            put_superseded(batch, active, stop, at)
            batch.create(stop)
        add_notes(batch, (deleted,), (Note("VirtualMachineDeleted", "it is stopped, and then removed"),), at)
        return ctx.store.must_commit(batch)[0]  # type: ignore[return-value]

    vm = deciding(decide)
    keep(ctx, key)
    wake_grant(ctx)
    return vm


def update_vm(ctx: Context, wanted: VirtualMachine, *, keeps_metadata: bool = False) -> VirtualMachine:
    """Replace a VM's spec, labels, annotations and finalizers; of one that is being deleted all but the spec.

    Args:
        wanted: Read from a manifest; its status counts for nothing.
        keeps_metadata: Labels, annotations and finalizers that it does not name stay.

    Returns:
        The VM; as it was when nothing differs.

    Raises:
        NotFound: No such VM.
        Invalid: `metadata.uid` differs: it is the domain's UUID, and can't be changed.
        Refused: It is being deleted, adopted or released; or it changed since it was read (`metadata.resourceVersion`).
    """
    key = make_key(wanted.name, wanted.metadata.namespace or DEFAULT_NAMESPACE)

    def decide() -> tuple[VirtualMachine, bool]:
        old = ctx.store.get(VirtualMachine, key)
        _check_unchanged(old, wanted)
        meta = _metadata(old.metadata, wanted.metadata, keeps=keeps_metadata)
        if (meta, wanted.spec) == (old.metadata, old.spec):
            return old, False
        if old.status.adoption is not None:
            raise Refused(handed_over(old))
        if old.metadata.deletion_timestamp is not None and wanted.spec != old.spec:
            raise Refused(f"VirtualMachine {old.name!r} is being deleted, and can't be changed any more")
        if wanted.spec != old.spec:
            meta = meta.with_(generation=old.metadata.generation + 1)
        new = _with_spec(old, wanted).with_(metadata=meta)
        name = wanted.spec.virtual_machine_class_name
        vm_class = ctx.store.find(VirtualMachineClass, name) if name is not None else None
        new = with_pending(new, vm_class, ctx.now())
        return ctx.store.must_commit(ctx.store.batch().put(old, new))[0], True  # type: ignore[return-value]

    vm, is_changed = deciding(decide)
    if is_changed:
        keep(ctx, key)
        wake_grant(ctx)
    return vm


def _check_unchanged(old: VirtualMachine, wanted: VirtualMachine) -> None:
    check_version(old, wanted)
    if wanted.metadata.uid not in {"", old.metadata.uid}:
        why = f"is immutable: it is the domain's UUID, {old.metadata.uid}"
        raise Invalid(f"metadata.uid: {why}", (("metadata.uid", why),))


def _metadata(old: ObjectMeta, wanted: ObjectMeta, *, keeps: bool) -> ObjectMeta:
    """Take what people may change; the rest is the server's."""
    return old.with_(
        labels={**old.labels, **wanted.labels} if keeps else wanted.labels,
        annotations={**old.annotations, **wanted.annotations} if keeps else wanted.annotations,
        finalizers=old.finalizers if keeps else finalizers.at_change(old, wanted),
    )


def _with_spec(old: VirtualMachine, wanted: VirtualMachine) -> VirtualMachine:
    """Give a VM its new spec; the one that runs is kept beside it where a restart has to apply the change."""
    running = old.running_spec
    waits = old.status.phase.occupies_node and bool(changed_fields(running, wanted.spec))
    new = old.with_(spec=wanted.spec).with_status(applied=running if waits else None)
    if wanted.spec.ip_address != old.spec.ip_address:
        new = new.with_status(ip_address=wanted.spec.ip_address)
    return new
