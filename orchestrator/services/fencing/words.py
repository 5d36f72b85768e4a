"""What people say of fencing: what is set for a node, that it is off, and that nothing is fenced for now."""

from collections.abc import Callable
from typing import cast

from orchestrator.errors import Conflict, NotFound, Refused
from orchestrator.fencing.agents import Power
from orchestrator.planner.flow import Note
from orchestrator.planner.power import place_of
from orchestrator.queues import FENCING, Message, Task
from orchestrator.resources import Node, NodeFencing
from orchestrator.resources.fencing import Bmc, FenceLevel, FencePhase, NodeFencingSpec
from orchestrator.services.context import Context, add_notes, deciding
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
        is_as_before = new.spec.bmc is not None and new.spec.bmc.is_as(base.spec.bmc)
        if new.spec.bmc != base.spec.bmc and not is_as_before:
            new = new.with_status(bmc_distrust="", cut_epoch=0, bmc_off=False, lost_before=(), may_be_of=None)
            if not _are_of_one_power(new.spec.bmc, base.spec.bmc):
                new = new.with_status(powered_off=False)  # what another BMC cut is not this one's to switch on
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


def _are_of_one_power(new: Bmc | None, old: Bmc | None) -> bool:
    """Whether two ways to reach a BMC are known to lead to the same one: a password was corrected, say."""
    place = place_of(new) if new is not None else None
    return place is not None and old is not None and place_of(old) == place


def confirm(ctx: Context, name: str, who: str) -> None:
    """Take a person's word that a node runs nothing any more.

    Of one that was fenced and is not back, too: its watchdog, or we, switched it on again, so it may have power, and
    while nobody says that it is off its silence speaks against what the BMCs of others say.

    Raises:
        NotFound: No such node.
        Refused: Its lease is fresh, or a person has said so already, or the herd is in recovery.
    """

    def decide() -> None:
        fenced = ctx.store.find(NodeFencing, name)
        if fenced is not None and fenced.status.phase.has_evidence:
            _confirm_fenced(ctx, fenced, who)
            return
        node = ctx.store.get(Node, name)
        if node.spec.witness:
            raise Refused(f"node {name!r} is a witness: it runs no VMs")
        if is_fresh(node):
            raise Refused(f"node {name!r} renews its lease: it lives (power it off, or drain it)")
        if fenced is None:
            ctx.store.must_commit(ctx.store.batch().create(new_fencing(ctx, name)))
            raise Conflict("made just now: read it")
        stored = lease_of(ctx, name)
        lease = stored.lease if stored is not None else None
        refused = commit_evidence(ctx, fenced, lease, FenceLevel.PERSON, _word(who))
        if refused is not None:
            raise Refused(f"node {name!r} can't be confirmed now: {refused.check}: {refused.detail}")

    deciding(decide)


def _word(who: str) -> str:
    return f"{who} confirmed that it is off"


def _confirm_fenced(ctx: Context, old: NodeFencing, who: str) -> None:
    """Add a person's word to the evidence about a node that has not come back."""
    name, evidence, stored = str(old.name), old.status.evidence, lease_of(ctx, str(old.name))
    assert evidence is not None  # noqa: S101 - the caller looked
    if evidence.level is FenceLevel.PERSON:
        raise Refused(f"node {name!r} is fenced already: {old.status.message}")
    lease = stored.lease if stored is not None else None
    if stored is not None and ctx.store.now().timestamp() - stored.renewed_ms / 1000 <= stored.lease.timing.lease_ttl:
        raise Refused(f"node {name!r} renews its lease: it has booted since it was fenced (power it off)")
    text = f"{evidence.text}; {_word(who)}"
    new = old.with_status(evidence=evidence.with_(level=FenceLevel.PERSON, text=text), message=text, powered_off=False)
    batch = ctx.store.batch().put(old, new)
    batch.check("lease", name, *(lease.identity if lease is not None else ("", 0)), False)
    add_notes(batch, (new,), (Note("NodeConfirmedOff", text),), ctx.now())
    ctx.store.must_commit(batch)


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
