"""Projects. One is there because something is in it; one that a person makes is stored, and stays when it is empty."""

from orchestrator.errors import AlreadyExists, NotFound, Refused
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    Namespace,
    ObjectMeta,
    VirtualMachine,
    VirtualMachineOperation,
    new_metadata,
)
from orchestrator.services.context import Context, deciding
from orchestrator.services.labelling import update_labels

_NAMED_AT_MOST = 3


def create_namespace(ctx: Context, wanted: Namespace) -> Namespace:
    """Store a project.

    Raises:
        AlreadyExists: It is there already, stored or for what is in it.
    """
    meta = new_metadata(wanted.metadata, namespaced=False, now=ctx.now()).with_(deletion_timestamp=None, finalizers=())
    if meta.name == DEFAULT_NAMESPACE or _inhabitants(ctx, meta.name):
        raise AlreadyExists(f"Namespace {meta.name!r} already exists")
    return ctx.store.must_commit(ctx.store.batch().create(Namespace(metadata=meta)))[0]  # type: ignore[return-value]


def find(ctx: Context, name: str) -> Namespace | None:
    """Give a project, stored or not; None where there is none."""
    stored = ctx.store.find(Namespace, name)
    if stored is not None:
        return stored
    is_there = name == DEFAULT_NAMESPACE or bool(_inhabitants(ctx, name))
    return unstored(name) if is_there else None


def unstored(name: str) -> Namespace:
    """Give a project that is there only for what is in it."""
    return Namespace(metadata=ObjectMeta(name=name, uid=f"namespace-{name}"))


def update_namespace(ctx: Context, wanted: Namespace) -> Namespace:
    """Replace a project's labels and annotations; one that was not stored is from then on.

    Raises:
        NotFound: No such project.
        ChangedMeanwhile: `metadata.resourceVersion` is given, and another one is stored.
    """
    if ctx.store.find(Namespace, wanted.name) is not None:
        return update_labels(ctx, wanted)
    if find(ctx, wanted.name) is None:
        raise NotFound(f"Namespace {wanted.name!r} not found")
    meta = new_metadata(unstored(wanted.name).metadata, namespaced=False, now=ctx.now())
    new = Namespace(metadata=meta.with_(labels=wanted.metadata.labels, annotations=wanted.metadata.annotations))
    return ctx.store.must_commit(ctx.store.batch().create(new))[0]  # type: ignore[return-value]


def delete_namespace(ctx: Context, name: str) -> Namespace:
    """Remove a project in which nothing is.

    Raises:
        NotFound: No such project.
        Refused: Something is in it, or it is `default`.
    """

    def decide() -> Namespace:
        if name == DEFAULT_NAMESPACE:
            raise Refused(f"Namespace {name!r} can't be deleted: resources that name none are in it")
        if inside := _inhabitants(ctx, name):
            more = f" and {len(inside) - _NAMED_AT_MOST} more" if len(inside) > _NAMED_AT_MOST else ""
            raise Refused(
                f"Namespace {name!r} is not empty: {', '.join(inside[:_NAMED_AT_MOST])}{more}: delete them first"
            )
        old = ctx.store.find(Namespace, name)
        if old is None:
            raise NotFound(f"Namespace {name!r} not found")
        ctx.store.must_commit(ctx.store.batch().delete(old))
        return old

    return deciding(decide)


def _inhabitants(ctx: Context, namespace: str) -> list[str]:
    return [
        f"{kind.kind_name} {resource.name}"
        for kind in (VirtualMachine, VirtualMachineOperation)
        for resource in ctx.store.all(kind, namespace)
    ]
