"""Which nodes' watchdogs are to be disarmed: those that may not be fenced, or are to be disrupted on purpose.

A watchdog resets its host so that its VMs may start elsewhere: where nothing of a node is restarted by itself, a reset
would only do harm. That is so, too, of a node that was drained, as long as it is cordoned and empty: it is neither
fenced nor recovered (`planner.liveness.judge`), and nothing is granted there. Should a VM appear on it by a way that is
not ours, it is not empty any more; until its watchdog is armed again, its lease does not say `armed`, so only its BMC
or a person can be evidence.

The word is a key that the node may read (`disarm:<node>`). The node disarms after Redis has acknowledged that its lease
no longer says `armed`, and arms again when the word is taken back.
"""

from collections.abc import Mapping
from typing import Final, cast

from orchestrator.resources import Maintenance, Node, NodeDrain, NodeFencing
from orchestrator.resources.drain import DrainPhase
from orchestrator.resources.fencing import (
    DISARMED_BY_ANNOTATION,
    DISARMED_BY_MAINTENANCE,
    DISARMED_FAILOVER,
    DRAINED,
    NOT_ENABLED,
    is_enabled_by_label,
)
from orchestrator.resources.maintenance import NodeStage
from orchestrator.services.context import Context
from orchestrator.services.herd import Herd
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors

DISARMING_ANNOTATIONS: Final = (
    "update.node.deckhouse.io/disruption-approved",
    "update.node.deckhouse.io/approved",
    "node-manager.deckhouse.io/fencing-disable",
)
"""The platform's own, on which its fencing agent disarms (deckhouse, node-manager); whatever their values."""


_EMPTY_STAGES: Final = frozenset({NodeStage.DRAINED, NodeStage.HOOK, NodeStage.RETURNING, NodeStage.UNCORDONING})
"""Of a maintenance: its VMs have left, and what is done to the host must not be cut short by a reset."""


def disarm_reason(
    node: Node,
    fencing: NodeFencing | None,
    *,
    maintenance: str = "",
    is_drained: bool = False,
    disarmed: Mapping[str, str] | None = None,
) -> str:
    """Say why a node's watchdog is to be disarmed; empty when it may be armed.

    Args:
        node: It.
        fencing: Its own.
        maintenance: For which it has been emptied; empty: none.
        is_drained: Its drain has emptied it, and it is cordoned and empty still.
        disarmed: Why failover is disarmed, as `failover disarm` says it: nothing of the node would start elsewhere.
    """
    labels = node.metadata.labels
    if not (fencing.is_enabled(labels) if fencing is not None else is_enabled_by_label(labels)):
        return NOT_ENABLED
    found = [name for name in DISARMING_ANNOTATIONS if name in node.metadata.annotations]
    if found:
        return f"{DISARMED_BY_ANNOTATION}{found[0]}"
    if maintenance:
        return f"{DISARMED_BY_MAINTENANCE}{maintenance}"
    if is_drained:
        return DRAINED
    said = disarmed or {}
    why = said.get(keys.DISARMED_ALL) or said.get(node.name)
    return f"{DISARMED_FAILOVER}{why}" if why else ""


def keep_arming(ctx: Context, herd: Herd) -> None:
    """Have `disarm:<node>` say for each node why its watchdog is to be disarmed."""
    nodes = sorted((node for node in herd.follower.all(Node) if not node.spec.witness), key=lambda node: node.name)
    if not nodes:
        return
    redis = ctx.store.redis
    emptied = {
        name: maintenance.name
        for maintenance in herd.follower.all(Maintenance)
        if maintenance.is_open
        for name in maintenance.spec.nodes
        if maintenance.node(name).stage in _EMPTY_STAGES
    }
    with redis_errors(redis):
        disarmed = cast("dict[str, str]", redis.hgetall(keys.DISARMED))
        said = cast("list[str | None]", redis.mget([keys.disarm(node.name) for node in nodes]))
        for node, before in zip(nodes, said, strict=True):
            fencing = herd.follower.get(NodeFencing, node.name)
            reason = disarm_reason(
                node,
                fencing,
                maintenance=emptied.get(node.name, ""),
                is_drained=_is_drained(herd, node),
                disarmed=disarmed,
            )
            if reason and before != reason:
                redis.set(keys.disarm(node.name), reason)
            elif not reason and before is not None:
                redis.delete(keys.disarm(node.name))


def _is_drained(herd: Herd, node: Node) -> bool:
    """Whether a node's drain has ended with it empty, and it is so still: cordoned, without VMs and grants."""
    drain = herd.follower.get(NodeDrain, node.name)
    is_kept_empty = node.spec.unschedulable and not herd.follower.index.get(keys.claims(node.name))
    return is_kept_empty and drain is not None and drain.status.phase is DrainPhase.DRAINED
