"""Labels, annotations and finalizers that people put on what can't otherwise be changed."""

from typing import TypeVar

from orchestrator.errors import Invalid
from orchestrator.resources import ObjectMeta, Resource, VirtualMachineOperation, finalizers
from orchestrator.services.classes import check_version
from orchestrator.services.context import Context, deciding
from orchestrator.services.operations import check_priority
from orchestrator.services.reports import remove_deleted

R = TypeVar("R", bound=Resource)


def update_operation(ctx: Context, wanted: VirtualMachineOperation) -> VirtualMachineOperation:
    """Replace an operation's labels, annotations and finalizers.

    One that was deleted and has ended is removed when its last finalizer is taken off.

    Raises:
        NotFound: No such operation.
        Invalid: `.spec is immutable`, or its priority is none.
        ChangedMeanwhile: `metadata.resourceVersion` is given, and another one is stored.
    """
    check_priority(wanted)
    stored = ctx.store.get(VirtualMachineOperation, wanted.key)
    if wanted.spec != stored.spec:
        raise Invalid(
            f"VirtualMachineOperation {wanted.name!r}: .spec is immutable: delete it and create another",
            (("spec", ".spec is immutable"),),
        )
    updated = update_labels(ctx, wanted)
    remove_deleted(ctx, updated.key)
    return updated


def update_labels(ctx: Context, wanted: R) -> R:
    """Replace the labels and annotations of a stored resource (of an operation, finalizers too), and nothing else.

    Raises:
        NotFound: It is not there.
        ChangedMeanwhile: `metadata.resourceVersion` is given, and another one is stored.
    """

    def decide() -> R:
        old = ctx.store.get(type(wanted), wanted.key)
        check_version(old, wanted)
        meta = old.metadata.with_(
            labels=wanted.metadata.labels,
            annotations=wanted.metadata.annotations,
        )
        if isinstance(old, VirtualMachineOperation):
            meta = meta.with_(finalizers=finalizers.at_change(old.metadata, wanted.metadata))
        if meta == old.metadata:
            return old
        return ctx.store.must_commit(ctx.store.batch().put(old, old.with_(metadata=meta)))[0]  # type: ignore[return-value]

    return deciding(decide)


def with_metadata(ctx: Context, stored: R, wanted: ObjectMeta) -> R:
    """Give a resource that was just stored the labels and annotations that are wanted; nothing else of them counts."""
    if ctx.store.is_dry:
        return stored
    meta = stored.metadata.with_(labels=wanted.labels, annotations=wanted.annotations, resource_version="")
    return update_labels(ctx, stored.with_(metadata=meta))
