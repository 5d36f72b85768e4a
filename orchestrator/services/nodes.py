"""What people say of nodes: cordon, labels, taints."""

from collections.abc import Callable, Iterable, Mapping

from orchestrator.errors import Invalid
from orchestrator.planner.flow import Note
from orchestrator.resources import Node, parse
from orchestrator.resources.node import HYPERVISOR_LABEL
from orchestrator.resources.scheduling import NodeLabels, Taint
from orchestrator.services import drains
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
        add_notes(batch, (new,), (Note("NodeCordoned", "no VM starts or lands here"),), ctx.now())
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
    for label in (HOSTNAME_LABEL, HYPERVISOR_LABEL):
        if label in changes:
            why = f"is the node's own {'name' if label == HOSTNAME_LABEL else 'word'}, and can't be changed"
            raise Invalid(f"metadata.labels.{label}: {why}", ((f"metadata.labels.{label}", why),))
    wanted = parse(NodeLabels, {"matchLabels": {key: value or "" for key, value in changes.items()}}).match_labels

    def change(old: Node) -> Node:
        labels = {**old.metadata.labels, **wanted}
        kept = {key: value for key, value in labels.items() if changes.get(key, "") is not None}
        return old.with_(metadata=old.metadata.with_(labels=kept))

    return _change(ctx, name, change)


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
    new, gone = {(taint.key, taint.effect.value): taint for taint in wanted}, set(removed)

    def change(old: Node) -> Node:
        taints = {(taint.key, taint.effect.value): taint for taint in old.spec.taints} | new
        kept = tuple(
            taint for (key, effect), taint in taints.items() if not {(key, ""), (key, effect)} & (gone - new.keys())
        )
        return old.with_(spec=old.spec.with_(taints=kept))

    return _change(ctx, name, change)


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
