"""Cordon, uncordon, and the joining of nodes."""

from orchestrator.planner.flow import Note
from orchestrator.resources import Node
from orchestrator.resources.node import NodeSpec
from orchestrator.services.context import Context, add_notes, deciding, now, wake_grant


def set_unschedulable(ctx: Context, name: str, *, unschedulable: bool) -> bool:
    """Cordon or uncordon a node. Migrations under way go on; nothing new starts or lands on a cordoned node.

    Returns:
        Whether anything changed.

    Raises:
        NotFound: No such node.
    """

    def decide() -> bool:
        old = ctx.store.get(Node, name)
        if old.spec.unschedulable == unschedulable:
            return False
        at = now()
        new = old.with_(spec=NodeSpec(unschedulable=unschedulable))
        batch = ctx.store.batch().put(old, new)
        note = Note("NodeCordoned", "no VM starts or lands here") if unschedulable else Note("NodeUncordoned", "")
        add_notes(batch, (new,), (note,), at)
        ctx.store.must_commit(batch)
        return True

    changed = deciding(decide)
    if changed:
        wake_grant(ctx)
    return changed
