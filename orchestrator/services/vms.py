"""Changes of VMs, and `apply`: a manifest that creates what is not there and changes what is.

A VM's spec may be changed at any time. What can't be done to a running machine waits for a restart and is listed in the
status; the rest applies at once.
"""

from enum import StrEnum
from typing import Any

from orchestrator.errors import AlreadyExists, Invalid, Refused
from orchestrator.planner.applicability import handed_over
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    ObjectMeta,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
    make_key,
)
from orchestrator.resources.pending import changed_fields, with_pending
from orchestrator.services import operations
from orchestrator.services.classes import check_version, update_class
from orchestrator.services.context import Context, deciding, wake_grant
from orchestrator.services.policies import keep

Manifest = VirtualMachine | VirtualMachineClass | VirtualMachineOperation


class Applied(StrEnum):
    """What applying a manifest did."""

    CREATED = "created"
    CONFIGURED = "configured"
    UNCHANGED = "unchanged"


def apply_resource(ctx: Context, wanted: Manifest) -> tuple[Manifest, Applied]:
    """Create what is not there, and change what is.

    Labels and annotations that the manifest does not name stay.

    Raises:
        Invalid: A field is wrong, or can't be changed.
        Refused: As `create_resource` and `update_vm`.
        NotFound: As `create_resource`.
    """
    if not wanted.name:
        return operations.create_resource(ctx, wanted), Applied.CREATED
    found = _find(ctx, wanted)
    if found is None:
        try:
            return operations.create_resource(ctx, wanted), Applied.CREATED
        except AlreadyExists:  # someone else was faster
            found = _find(ctx, wanted)
            if found is None:
                raise
    new: Manifest = found
    if isinstance(wanted, VirtualMachine):
        new = update_vm(ctx, wanted, keeps_metadata=True)
    elif isinstance(wanted, VirtualMachineClass):
        new = update_class(ctx, wanted, keeps_metadata=True)
    else:
        operations.replace_spec(ctx, wanted.manifest())
    is_same = new.metadata.resource_version == found.metadata.resource_version
    return new, Applied.UNCHANGED if is_same else Applied.CONFIGURED


def _find(ctx: Context, wanted: Manifest) -> Manifest | None:
    namespace = (wanted.metadata.namespace or DEFAULT_NAMESPACE) if wanted.namespaced else ""
    return ctx.store.find(type(wanted), make_key(wanted.name, namespace))


def update_manifest(ctx: Context, data: Any, namespace: str = "") -> VirtualMachine:
    """Replace a VM by its changed manifest.

    Raises:
        Invalid: As `read_manifest`; or it is not a VM's.
        NotFound: As `update_vm`.
        Refused: As `update_vm`.
    """
    wanted = operations.read_manifest(data, namespace)
    if not isinstance(wanted, VirtualMachine):
        raise Invalid(f"kind: a {wanted.kind_name} is not updated by this", (("kind", "must be VirtualMachine"),))
    return update_vm(ctx, wanted)


def update_vm(ctx: Context, wanted: VirtualMachine, *, keeps_metadata: bool = False) -> VirtualMachine:
    """Replace a VM's spec, labels and annotations.

    Args:
        wanted: Read from a manifest; its status counts for nothing.
        keeps_metadata: Labels and annotations that it does not name stay.

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
        if old.metadata.deletion_timestamp is not None:
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
    )


def _with_spec(old: VirtualMachine, wanted: VirtualMachine) -> VirtualMachine:
    """Give a VM its new spec; the one that runs is kept beside it where a restart has to apply the change."""
    running = old.running_spec
    waits = old.status.phase.occupies_node and bool(changed_fields(running, wanted.spec))
    new = old.with_(spec=wanted.spec).with_status(applied=running if waits else None)
    if wanted.spec.ip_address != old.spec.ip_address:
        new = new.with_status(ip_address=wanted.spec.ip_address)
    return new
