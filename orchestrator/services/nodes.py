"""What people say of nodes: cordon, labels, taints."""

from collections.abc import Callable, Iterable, Mapping

from orchestrator.errors import Invalid
from orchestrator.planner.flow import Note
from orchestrator.resources import Node, parse
from orchestrator.resources.node import HYPERVISOR_LABEL
from orchestrator.resources.scheduling import NodeLabels, Taint
from orchestrator.services import drains
from orchestrator.services.classes import check_version
from orchestrator.services.context import Context, add_notes, deciding, wake_grant

HOSTNAME_LABEL = "kubernetes.io/hostname"


def set_unschedulable(ctx: Context, name: str, *, unschedulable: bool) -> bool:
    """Cordon or uncordon a node. Migrations under way go on; nothing new starts or lands on a cordoned node.

    Uncordoning ends a drain of it: what has not begun is dropped.

    Returns:
        Whether anything changed.

    Raises:
        NotFound: No such node.
    """
    if not unschedulable:
        return drains.uncordon(ctx, name)

    def decide() -> bool:
        old = ctx.store.get(Node, name)
        if old.spec.unschedulable:
            return False
        new = old.with_(spec=old.spec.with_(unschedulable=True))
        batch = ctx.store.batch().put(old, new)
        add_notes(batch, (new,), (_cordoning(new),), ctx.now())
        ctx.store.must_commit(batch)
        return True

    changed = deciding(decide)
    if changed:
        drains.step(ctx, name)
        wake_grant(ctx)
    return changed


def set_labels(ctx: Context, name: str, changes: Mapping[str, str | None]) -> bool:
    """Set labels of a node, or remove those whose value is None.

    Returns:
        Whether anything changed.

    Raises:
        NotFound: No such node.
        Invalid: A key or a value can't be one, or the label is the node's own.
    """
    return _change(ctx, name, lambda old: with_labels(old, changes))


def with_labels(old: Node, changes: Mapping[str, str | None]) -> Node:
    """Give a node with its labels changed; raises `Invalid` as `set_labels`."""
    for label in (HOSTNAME_LABEL, HYPERVISOR_LABEL):
        if label in changes:
            raise _own_label(label)
    wanted = parse(NodeLabels, {"matchLabels": {key: value or "" for key, value in changes.items()}}).match_labels
    labels = {**old.metadata.labels, **wanted}
    kept = {key: value for key, value in labels.items() if changes.get(key, "") is not None}
    return old.with_(metadata=old.metadata.with_(labels=kept))


def set_taints(ctx: Context, name: str, wanted: Iterable[Taint], removed: Iterable[tuple[str, str]] = ()) -> bool:
    """Put taints on a node, each in place of one of its key and effect, or remove some.

    Args:
        ctx: To work with.
        name: The node's.
        wanted: To be put on.
        removed: Pairs of key and effect; an empty effect means all of the key.

    Returns:
        Whether anything changed.

    Raises:
        NotFound: No such node.
    """
    new, gone = tuple(wanted), tuple(removed)
    return _change(ctx, name, lambda old: with_taints(old, new, gone))


def with_taints(old: Node, wanted: Iterable[Taint], removed: Iterable[tuple[str, str]]) -> Node:
    """Give a node with its taints changed; arguments are those of `set_taints`."""
    new, gone = {(taint.key, taint.effect.value): taint for taint in wanted}, set(removed)
    taints = {(taint.key, taint.effect.value): taint for taint in old.spec.taints} | new
    kept = tuple(
        taint for (key, effect), taint in taints.items() if not {(key, ""), (key, effect)} & (gone - new.keys())
    )
    return old.with_(spec=old.spec.with_(taints=kept))


def _own_label(label: str) -> Invalid:
    why = f"is the node's own {'name' if label == HOSTNAME_LABEL else 'word'}, and can't be changed"
    return Invalid(f"metadata.labels.{label}: {why}", ((f"metadata.labels.{label}", why),))


def update_node(ctx: Context, wanted: Node) -> Node:
    """Replace what people say of a node: its labels, annotations, taints, and whether it is cordoned.

    Args:
        ctx: To work with.
        wanted: Its status counts for nothing.

    Returns:
        The node; as it was when nothing differs.

    Raises:
        NotFound: No such node.
        Invalid: A label can't be one, or is the node's own.
        ChangedMeanwhile: `metadata.resourceVersion` is given, and another one is stored.
    """
    labels = parse(NodeLabels, {"matchLabels": wanted.metadata.labels}).match_labels

    def decide() -> tuple[Node, bool]:
        old = ctx.store.get(Node, wanted.name)
        check_version(old, wanted)
        if labels.get(HOSTNAME_LABEL) != old.metadata.labels.get(HOSTNAME_LABEL):
            raise _own_label(HOSTNAME_LABEL)
        if labels.get(HYPERVISOR_LABEL) != old.metadata.labels.get(HYPERVISOR_LABEL):
            raise _own_label(HYPERVISOR_LABEL)
        meta = old.metadata.with_(labels=labels, annotations=wanted.metadata.annotations)
        if (meta, wanted.spec) == (old.metadata, old.spec):
            return old, False
        new = old.with_(metadata=meta, spec=wanted.spec)
        batch = ctx.store.batch().put(old, new)
        if new.spec.unschedulable != old.spec.unschedulable:
            add_notes(batch, (new,), (_cordoning(new),), ctx.now())
        return ctx.store.must_commit(batch)[0], True  # type: ignore[return-value]

    node, is_changed = deciding(decide)
    if is_changed:
        drains.step(ctx, wanted.name)
        wake_grant(ctx)
    return node


def _cordoning(node: Node) -> Note:
    if node.spec.unschedulable:
        return Note("NodeCordoned", "no VM starts or lands here")
    return Note("NodeUncordoned", "")


def _change(ctx: Context, name: str, change: Callable[[Node], Node]) -> bool:
    def decide() -> bool:
        old = ctx.store.get(Node, name)
        new = change(old)
        if new == old:
            return False
        ctx.store.must_commit(ctx.store.batch().put(old, new))
        return True

    changed = deciding(decide)
    if changed:
        wake_grant(ctx)
    return changed
