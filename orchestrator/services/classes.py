"""Classes of VMs: created, changed, deleted, and kept as the nodes have it."""

from orchestrator.errors import Conflict, Refused
from orchestrator.planner.classes import class_condition, evaluated, uses
from orchestrator.resources import (
    Node,
    ObjectMeta,
    Resource,
    VirtualMachine,
    VirtualMachineClass,
    new_metadata,
    with_condition,
)
from orchestrator.resources.pending import with_pending
from orchestrator.services.context import Context, deciding, wake_grant
from orchestrator.services.herd import Herd

_NAMED_AT_MOST = 3


def create_class(ctx: Context, wanted: VirtualMachineClass) -> VirtualMachineClass:
    """Store a class, with what the nodes say to it already.

    Raises:
        AlreadyExists: One of this name is there.
    """
    at = ctx.now()
    meta = new_metadata(wanted.metadata, namespaced=False, now=at).with_(deletion_timestamp=None, finalizers=())
    new = VirtualMachineClass(metadata=meta, spec=wanted.spec)
    batch = ctx.store.batch().create(evaluated(new, ctx.store.all(Node), at))
    created = ctx.store.must_commit(batch)[0]
    wake_grant(ctx)
    return created  # type: ignore[return-value]


def update_class(ctx: Context, wanted: VirtualMachineClass, *, keeps_metadata: bool = False) -> VirtualMachineClass:
    """Replace a class's spec, labels and annotations; its CPU is made anew. VMs that run keep theirs until a restart.

    Args:
        ctx: To work with.
        wanted: Read from a manifest; its status counts for nothing.
        keeps_metadata: Labels and annotations that it does not name stay.

    Returns:
        The class; as it was when nothing differs.

    Raises:
        NotFound: No such class.
        Conflict: `metadata.resourceVersion` is given, and another one is stored.
    """

    def decide() -> VirtualMachineClass:
        old = ctx.store.get(VirtualMachineClass, wanted.name)
        check_version(old, wanted)
        kept = old.metadata if keeps_metadata else ObjectMeta()
        meta = old.metadata.with_(
            labels={**kept.labels, **wanted.metadata.labels},
            annotations={**kept.annotations, **wanted.metadata.annotations},
        )
        if wanted.spec != old.spec:
            meta = meta.with_(generation=old.metadata.generation + 1)
        if (meta, wanted.spec) == (old.metadata, old.spec):
            return old
        new = old.with_(metadata=meta, spec=wanted.spec)
        is_used = any(uses(vm, old) for vm in ctx.store.all(VirtualMachine))
        new = evaluated(new, ctx.store.all(Node), ctx.now(), is_used=is_used)
        return ctx.store.must_commit(ctx.store.batch().put(old, new))[0]  # type: ignore[return-value]

    updated = deciding(decide)
    wake_grant(ctx)
    return updated


def delete_class(ctx: Context, name: str) -> VirtualMachineClass:
    """Delete a class that no VM names.

    Raises:
        NotFound: No such class.
        Refused: VMs name it.
    """

    def decide() -> VirtualMachineClass:
        old = ctx.store.get(VirtualMachineClass, name)
        users = [vm.key for vm in ctx.store.all(VirtualMachine) if vm.spec.virtual_machine_class_name == name]
        if users:
            more = f" and {len(users) - _NAMED_AT_MOST} more" if len(users) > _NAMED_AT_MOST else ""
            raise Refused(
                f"VirtualMachineClass {name!r} is used by VirtualMachine {', '.join(users[:_NAMED_AT_MOST])}{more}: "
                "give them another class first"
            )
        ctx.store.must_commit(ctx.store.batch().delete(old))
        return old

    return deciding(decide)


def check_version(stored: Resource, wanted: Resource) -> None:
    """Refuse a change that was made from another version than what is stored.

    Raises:
        ChangedMeanwhile: It was.
    """
    given = wanted.metadata.resource_version
    if given and given != stored.metadata.resource_version:
        raise ChangedMeanwhile(
            f"{stored.kind_name} {stored.name!r} changed since it was read (metadata.resourceVersion {given[:40]!r}, "
            f"now {stored.metadata.resource_version!r}): read it again, or leave metadata.resourceVersion out"
        )


class ChangedMeanwhile(Refused):
    """A person's change rests on an older version: only a person can decide again."""

    reason = "Conflict"


def keep_classes(ctx: Context, herd: Herd) -> int:
    """Let every class follow the nodes, and VMs what their class says. Cheap when nothing has changed.

    Returns:
        How many documents were changed.
    """
    herd.follower.sync()
    classes = {vm_class.name: vm_class for vm_class in herd.follower.all(VirtualMachineClass)}
    vms = [vm for vm in herd.follower.all(VirtualMachine) if vm.spec.virtual_machine_class_name is not None]
    if not classes and not vms:
        return 0
    nodes, at, changed, told = herd.follower.all(Node), ctx.now(), 0, 0
    for old in sorted(classes.values(), key=lambda vm_class: vm_class.name):
        new = evaluated(old, nodes, at, is_used=any(uses(vm, old) for vm in vms))
        if new.status != old.status:
            classes[old.name] = new
            changed += _put(ctx, old, new)
    for vm in vms:
        name = vm.spec.virtual_machine_class_name or ""
        vm_class = classes.get(name)
        conditions = with_condition(vm.status.conditions, class_condition(name, vm_class), at)
        follows = with_pending(vm.with_status(conditions=conditions), vm_class, at)
        if follows.status != vm.status:
            told += _put(ctx, vm, follows)
    if changed:
        wake_grant(ctx)
    return changed + told


def _put(ctx: Context, old: VirtualMachineClass | VirtualMachine, new: VirtualMachineClass | VirtualMachine) -> bool:
    """Store it, unless it was changed meanwhile: the next round looks again."""
    batch = ctx.store.batch().put(old, new)
    if isinstance(old, VirtualMachineClass) and isinstance(new, VirtualMachineClass):
        batch.tell("class", name=new.name, phase=f"{old.status.phase} => {new.status.phase}", cpu=str(new.status.cpu))
    try:
        ctx.store.must_commit(batch)
    except Conflict:
        return False
    return True
