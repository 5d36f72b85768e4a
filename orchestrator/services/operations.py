"""Admission: operations and VMs are created, changed and deleted here, and nowhere else.

A refusal names the thing, the reason and what to do; nothing is stored then.
"""

from typing import Any
from uuid import UUID, uuid4

from orchestrator.errors import AlreadyExists, Conflict, Invalid, NotFound, Refused
from orchestrator.planner.flow import Note, say
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    Node,
    ObjectMeta,
    OperationPhase,
    OperationType,
    Reason,
    Resource,
    RunPolicy,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
    make_key,
    new_metadata,
    parse,
)
from orchestrator.resources.vm import VirtualMachineStatus
from orchestrator.resources.vmop import (
    CLEANUP_FINALIZER,
    PRIORITIES,
    PRIORITY_ANNOTATION,
    MigrateTo,
    OperationSpec,
    OperationStatus,
)
from orchestrator.services.context import Context, add_notes, deciding, now, wake_grant
from orchestrator.services.results import publish_result
from orchestrator.store import Refusal, keys
from orchestrator.store.connection import redis_errors

CREATABLE: dict[tuple[str, str], type[VirtualMachine] | type[VirtualMachineOperation]] = {
    (kind.group_version, kind.kind_name): kind for kind in (VirtualMachine, VirtualMachineOperation)
}


def create_manifest(ctx: Context, data: Any, namespace: str = "") -> VirtualMachine | VirtualMachineOperation:
    """Create a resource from its manifest.

    Raises:
        Invalid: As `read_manifest`.
        NotFound: As `create_operation`.
        Refused: As `create_operation`.
        AlreadyExists: One of that kind and name is there already.
    """
    return create_resource(ctx, read_manifest(data, namespace))


def create_resource(
    ctx: Context, wanted: VirtualMachine | VirtualMachineOperation
) -> VirtualMachine | VirtualMachineOperation:
    """Create a resource that was read from a manifest."""
    if isinstance(wanted, VirtualMachineOperation):
        return create_operation(ctx, wanted)
    return create_vm(ctx, wanted)


def read_manifest(data: Any, namespace: str = "") -> VirtualMachine | VirtualMachineOperation:
    """Check a manifest by itself; nothing is stored, and nothing that is stored is looked at.

    Args:
        data: The manifest as parsed YAML or JSON.
        namespace: Used when the manifest names none; a different one is refused.

    Raises:
        Invalid: Not a manifest, an unknown kind, or fields that are wrong; names each.
    """
    if not isinstance(data, dict):
        raise Invalid(f"a manifest is a mapping with apiVersion and kind, not {type(data).__name__}")
    wanted = (str(data.get("apiVersion", "")), str(data.get("kind", "")))
    model = CREATABLE.get(wanted)
    if model is None:
        known = ", ".join(f"{kind} of {group}" for group, kind in sorted(CREATABLE))
        raise Invalid(
            f"kind: {wanted[1] or '(none)'} of {wanted[0] or '(no apiVersion)'} can't be created; known: {known}",
            (("kind", "unknown"),),
        )
    data = {key: value for key, value in data.items() if key != "status"}  # status is the server's to write
    meta = data.get("metadata")
    if namespace and isinstance(meta, dict):
        if (meta.get("namespace") or namespace) != namespace:
            raise Invalid(f"metadata.namespace: is {meta['namespace']!r}, the request is for {namespace!r}")
        data = {**data, "metadata": {**meta, "namespace": namespace}}
    resource = parse(model, data)
    new_metadata(resource.metadata, namespaced=True, now=now())  # for its checks of names
    return resource


def create_operation(ctx: Context, wanted: VirtualMachineOperation) -> VirtualMachineOperation:
    """Admit an operation: it is stored Pending, or refused at once.

    Raises:
        NotFound: No such VM.
        Refused: The VM's phase or policy does not allow it, or another operation of the VM is not finished.
        Invalid: A field is wrong.
    """
    _check_priority(wanted)

    def decide() -> VirtualMachineOperation:
        at = now()
        meta = new_metadata(wanted.metadata, namespaced=True, now=at)
        vm = ctx.store.find(VirtualMachine, make_key(wanted.spec.virtual_machine_name, meta.namespace))
        if vm is None:
            raise NotFound(
                f"VirtualMachine {wanted.spec.virtual_machine_name!r} not found in namespace {meta.namespace!r}"
            )
        _check_applicable(ctx, wanted.spec, vm)
        finalizers = (CLEANUP_FINALIZER,) if wanted.spec.type.is_migration else ()
        meta = meta.with_(finalizers=finalizers, deletion_timestamp=None)
        operation = wanted.with_(metadata=meta, status=OperationStatus(), created_version=0)
        operation = say(operation, Reason.MIGRATION_PENDING, "waits to be granted", at)
        batch = ctx.store.batch().create(operation)
        answer = ctx.store.commit(batch)
        if isinstance(answer, Refusal):
            raise _blocked(answer)
        return answer[0]  # type: ignore[return-value]

    operation = deciding(decide)
    wake_grant(ctx)
    return operation


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


def _check_priority(wanted: VirtualMachineOperation) -> None:
    given = wanted.metadata.annotations.get(PRIORITY_ANNOTATION)
    if given is not None and given not in PRIORITIES:
        path, why = f"metadata.annotations.{PRIORITY_ANNOTATION}", f"must be one of {', '.join(PRIORITIES)}"
        raise Invalid(f"{path}: {why} (given: {given!r})", ((path, why),))


def _check_applicable(ctx: Context, spec: OperationSpec, vm: VirtualMachine) -> None:
    policy, phase = vm.spec.run_policy, vm.status.phase
    if policy is RunPolicy.ALWAYS_OFF:
        raise Refused(f"{spec.type} is not applicable: VirtualMachine {vm.name!r} has runPolicy AlwaysOff")
    if spec.type is OperationType.START:
        if spec.force:
            raise Invalid("spec.force: a Start can't be forced", (("spec.force", "a Start can't be forced"),))
        if phase not in {VmPhase.STOPPED, VmPhase.STOPPING, VmPhase.PENDING}:
            raise Refused(f"Start is not applicable: VirtualMachine {vm.name!r} is {phase}, not Stopped")
        return
    if phase is VmPhase.MIGRATING:
        with redis_errors(ctx.store.redis):
            active = ctx.store.redis.hget(keys.ACTIVE_OPERATIONS, vm.key)
        if active:
            raise _blocked(Refusal("field", str(active)))
    if phase is not VmPhase.RUNNING:
        raise Refused(f"{spec.type} is not applicable: VirtualMachine {vm.name!r} is {phase}, not Running")
    wanted = spec.migrate.node_name if spec.migrate else ""
    if wanted:
        if ctx.store.find(Node, wanted) is None:
            raise NotFound(f"Node {wanted!r} not found (spec.migrate.nodeName)")
        if wanted == vm.status.node_name:
            raise Refused(f"VirtualMachine {vm.name!r} runs on node {wanted!r} already (spec.migrate.nodeName)")


def _blocked(refusal: Refusal) -> Exception:
    if refusal.check != "field":
        return Conflict(f"{refusal.check}: {refusal.detail}")
    name = refusal.detail.rpartition("/")[2]
    return Refused(f"VMOP cannot be executed now. Previously created operation {name!r} should finish first")


def delete_operation(ctx: Context, key: str) -> VirtualMachineOperation:
    """Delete an operation, which aborts it where it is under way.

    Returns:
        The operation; phase Terminating when it is still being aborted.

    Raises:
        NotFound: No such operation.
    """

    def decide() -> VirtualMachineOperation:
        operation = ctx.store.get(VirtualMachineOperation, key)
        if operation.metadata.deletion_timestamp is not None:
            return operation
        at = now()
        meta = operation.metadata.with_(deletion_timestamp=at)
        batch = ctx.store.batch()
        note = Note("OperationAborted", "deleted before it began; the VM stays where it is")
        if operation.status.grant is None:
            batch.delete(operation)
            if operation.is_active:
                add_notes(batch, (operation, ctx.store.find(VirtualMachine, operation.vm_key)), (note,), at)
            ctx.store.must_commit(batch)
            gone = operation.with_(metadata=meta)
            if operation.is_active:
                gone = say(gone.with_status(phase=OperationPhase.TERMINATING), Reason.ABORTED, note.message, at)
            return gone
        marked = operation.with_(metadata=meta).with_grant(cancel=True).with_status(phase=OperationPhase.TERMINATING)
        marked = say(marked, Reason.ABORTED, "being aborted", at)
        batch.put(operation, marked)
        if operation.status.grant is not None:
            batch.wake(operation.status.grant.node, "cancel")
        return ctx.store.must_commit(batch)[0]  # type: ignore[return-value]

    operation = deciding(decide)
    if operation.is_active and operation.status.grant is None:
        publish_result(ctx, operation)
    wake_grant(ctx)
    return operation


def create_vm(ctx: Context, wanted: VirtualMachine) -> VirtualMachine:
    """Store a VM; where its policy wants it to run, its start is stored in the same commit.

    Raises:
        AlreadyExists: A VM of this name is there.
        Invalid: `metadata.uid`, which becomes its domain's UUID, is not one, or another VM's.
    """
    _check_uid(wanted.metadata.uid)
    at = now()
    vm = wanted.with_(
        metadata=new_metadata(wanted.metadata, namespaced=True, now=at).with_(deletion_timestamp=None, finalizers=()),
        status=VirtualMachineStatus(ip_address=wanted.spec.ip_address),
        created_version=0,
    )
    batch = ctx.store.batch().create(vm)
    if vm.spec.run_policy in {RunPolicy.ALWAYS_ON, RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY}:
        batch.create(start_operation(vm))
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


def start_operation(vm: VirtualMachine) -> VirtualMachineOperation:
    """Make the Start of a VM that its policy asks for."""
    at = now()
    meta = ObjectMeta(name=f"start-{vm.name}"[:57] + f"-{uuid4().hex[:5]}", namespace=vm.metadata.namespace)
    operation = VirtualMachineOperation(
        metadata=new_metadata(meta, namespaced=True, now=at),
        spec=OperationSpec(type=OperationType.START, virtual_machine_name=vm.name),
    )
    return say(operation, Reason.NOT_READY, "waits to be granted", at)


def delete_vm(ctx: Context, key: str) -> VirtualMachine:
    """Delete a VM that runs nowhere.

    Raises:
        NotFound: No such VM.
        Refused: It occupies a node, or an operation of it is not finished.
    """

    def decide() -> VirtualMachine:
        vm = ctx.store.get(VirtualMachine, key)
        if vm.status.phase.occupies_node:
            raise Refused(
                f"VirtualMachine {vm.name!r} is {vm.status.phase} on node {vm.status.node_name}: stop it first"
            )
        batch = ctx.store.batch().delete(vm).check("field", keys.ACTIVE_OPERATIONS, vm.key, "")
        answer = ctx.store.commit(batch)
        if isinstance(answer, Refusal):
            raise _blocked(answer)
        return vm

    return deciding(decide)


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
    if wanted.spec != stored.spec:
        raise Invalid(
            f"VirtualMachineOperation {wanted.name!r}: .spec is immutable: delete it and create another",
            (("spec", ".spec is immutable"),),
        )
    return stored
