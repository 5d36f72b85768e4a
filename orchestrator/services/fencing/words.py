"""What people say of fencing: what is set for a node, that it is off, and that nothing is fenced for now."""

from collections.abc import Callable
from typing import cast

from orchestrator.errors import Conflict, NotFound, Refused
from orchestrator.fencing.agents import Power
from orchestrator.queues import FENCING, Message, Task
from orchestrator.resources import Node, NodeFencing
from orchestrator.resources.fencing import FenceLevel, FencePhase, NodeFencingSpec
from orchestrator.services.context import Context, deciding
from orchestrator.services.fencing.state import is_fresh, lease_of, new_fencing
from orchestrator.services.fencing.tools import Tools
from orchestrator.services.takeover import commit_evidence
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors


def set_fencing(ctx: Context, name: str, change: Callable[[NodeFencingSpec], NodeFencingSpec]) -> NodeFencing:
    """Change what is said of a node's fencing; it may not have joined yet."""

    def decide() -> NodeFencing:
        old = ctx.store.find(NodeFencing, name)
        base = old or new_fencing(ctx, name)
        new = base.with_(spec=change(base.spec))
        if new.spec.bmc != base.spec.bmc:
            new = new.with_status(bmc_distrust="", cut_epoch=0, bmc_off=False, lost_before=(), may_be_of=None)
        if new == old:
            return new
        batch = ctx.store.batch()
        if old is None:
            batch.create(new)
        else:
            batch.put(old, new)
        return cast("NodeFencing", ctx.store.must_commit(batch)[0])

    new = deciding(decide)
    if new.spec.bmc is not None and new.status.phase is FencePhase.IDLE:
        ctx.messenger.send(Message(Task.READ_POWER, FENCING, (name,)))
    return new


def confirm(ctx: Context, name: str, who: str) -> None:
    """Take a person's word that a node runs nothing any more.

    Raises:
        NotFound: No such node.
        Refused: Its lease is fresh, or there is evidence already, or the herd is in recovery.
    """

    def decide() -> None:
        node = ctx.store.get(Node, name)
        if node.spec.witness:
            raise Refused(f"node {name!r} is a witness: it runs no VMs")
        if is_fresh(node):
            raise Refused(f"node {name!r} renews its lease: it lives (power it off, or drain it)")
        old = ctx.store.find(NodeFencing, name)
        if old is None:
            ctx.store.must_commit(ctx.store.batch().create(new_fencing(ctx, name)))
            raise Conflict("made just now: read it")
        if old.status.phase.has_evidence:
            raise Refused(f"node {name!r} is fenced already: {old.status.message}")
        stored = lease_of(ctx, name)
        lease = stored.lease if stored is not None else None
        text = f"{who} confirmed that it is off"
        refused = commit_evidence(ctx, old, lease, FenceLevel.PERSON, text)
        if refused is not None:
            raise Refused(f"node {name!r} can't be confirmed now: {refused.check}: {refused.detail}")

    deciding(decide)


def test_power(ctx: Context, tools: Tools, name: str) -> str:
    """Ask a node's BMC for the power state, and nothing else.

    Raises:
        NotFound: The node has no BMC on record.
        Refused: It can't be read.
    """
    fencing = ctx.store.find(NodeFencing, name)
    if fencing is None or fencing.spec.bmc is None:
        raise NotFound(f"node {name!r} has no BMC on record (vmherd fence set {name} --agent ...)")
    answer = tools.switch.status(fencing.spec.bmc)
    if answer.power is Power.UNKNOWN:
        raise Refused(f"node {name!r}: {answer.problem}")
    return answer.power.value


def disarm(ctx: Context, node: str, why: str) -> bool:
    """Let nothing be fenced any more, of one node or (empty) of the herd. A fencing under way goes on to its end.

    Returns:
        Whether one is under way, so that this holds once it has ended.
    """
    field = node or keys.DISARMED_ALL
    if node:
        ctx.store.get(Node, node)
    batch = ctx.store.batch().effect("HSET", keys.DISARMED, field, why)
    batch.tell("failover disarmed", warning=True, node=field, why=why)
    ctx.store.must_commit(batch)
    return any(f.status.phase.is_open for f in ctx.store.all(NodeFencing) if not node or f.name == node)


def arm(ctx: Context, node: str) -> bool:
    """Let nodes be fenced again; whether anything changed."""
    field = node or keys.DISARMED_ALL
    with redis_errors(ctx.store.redis):
        was = bool(ctx.store.redis.hexists(keys.DISARMED, field))
    batch = ctx.store.batch().effect("HDEL", keys.DISARMED, field)
    batch.tell("failover armed", node=field)
    ctx.store.must_commit(batch)
    return was
