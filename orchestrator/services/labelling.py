"""Labels and annotations that people put on what can't otherwise be changed."""

from typing import TypeVar

from orchestrator.errors import Invalid
from orchestrator.resources import Resource, VirtualMachineOperation
from orchestrator.services.classes import check_version
from orchestrator.services.context import Context, deciding
from orchestrator.services.operations import check_priority

R = TypeVar("R", bound=Resource)


def update_operation(ctx: Context, wanted: VirtualMachineOperation) -> VirtualMachineOperation:
    """Replace an operation's labels and annotations.

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
    return update_labels(ctx, wanted)


def update_labels(ctx: Context, wanted: R) -> R:
    """Replace the labels and annotations of a stored resource, and nothing else.

    Raises:
        NotFound: It is not there.
        ChangedMeanwhile: `metadata.resourceVersion` is given, and another one is stored.
    """

    def decide() -> R:
        old = ctx.store.get(type(wanted), wanted.key)
        check_version(old, wanted)
        meta = old.metadata.with_(labels=wanted.metadata.labels, annotations=wanted.metadata.annotations)
        if meta == old.metadata:
            return old
        return ctx.store.must_commit(ctx.store.batch().put(old, old.with_(metadata=meta)))[0]  # type: ignore[return-value]

    return deciding(decide)
