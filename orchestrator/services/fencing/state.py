"""The state of a fencing: its phases, what is shown of it, and the leases that it is about.

Every change is decided from the document as it stands in that moment; what a change does not concern it leaves alone.
Evidence is written by `services.takeover` only.
"""

from collections.abc import Callable
from datetime import datetime
from typing import cast

from orchestrator.lease import Lease, StoredLease, read_lease
from orchestrator.planner.flow import Note
from orchestrator.planner.liveness import Judgement
from orchestrator.resources import Node, NodeFencing, ObjectMeta, find_condition, new_metadata
from orchestrator.resources.fencing import Bmc, FencePhase, NodeFencingStatus
from orchestrator.services.context import Context, add_notes, deciding
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors

BMC_CONTRADICTS = "BmcContradicts"
"""Reason of a fencing whose BMC was read as off while the node's lease was fresh: it is another host's."""
BMC_OF_ANOTHER = "BmcOfAnother"
"""Reason of a fencing without evidence, as its BMC is taken for another host's."""
LOOK_EVERY_S = 0.5
"""How often a power or a lease is looked at while something is waited for."""


def new_fencing(ctx: Context, name: str) -> NodeFencing:
    """Make a node's fencing; it is not stored yet."""
    return NodeFencing(metadata=new_metadata(ObjectMeta(name=name), namespaced=False, now=ctx.now()))


def change_fencing(
    ctx: Context, name: str, change: Callable[[NodeFencing], NodeFencing | None], note: Note | None = None
) -> NodeFencing | None:
    """Change a node's fencing, which is made where there is none; None from `change` leaves it as it is."""

    def decide() -> NodeFencing | None:
        old = ctx.store.find(NodeFencing, name)
        base = old or new_fencing(ctx, name)
        new = change(base)
        if new is None or new == old:
            return None
        batch = ctx.store.batch()
        if old is None:
            batch.create(new)
        else:
            batch.put(old, new)
        if note is not None:
            add_notes(batch, (ctx.store.find(Node, name) or new,), (note,), ctx.now())
        if new.status.phase is not base.status.phase:
            batch.tell("fencing", node=name, phase=f"{base.status.phase} => {new.status.phase}", why=new.status.reason)
        ctx.store.must_commit(batch)
        return new

    return deciding(decide)


def _of_lease(status: NodeFencingStatus, lease: Lease | None, at: datetime) -> dict[str, object]:
    """What a status says of the lease that ran out; of another one than before, no power was cut yet."""
    generation, sequence = lease.identity if lease is not None else ("", 0)
    new: dict[str, object] = {"generation": generation, "sequence": sequence}
    new["boot_id"] = lease.boot_id if lease is not None else ""
    is_another = not is_of_lease(status, lease)
    if is_another:
        new |= {"powered_off": False, "cut_epoch": 0, "bmc_off": False, "lost_before": (), "may_be_of": None}
    if is_another or status.lost_at is None:
        new["lost_at"] = at
    return new


def say_suspect(ctx: Context, name: str, judgement: Judgement, lease: Lease | None, *, is_telling: bool = True) -> None:
    """Show why a lost node is not fenced, once for each reason. A fencing under way is halted by it.

    What is only about the worker that says it (it has not watched for long enough) halts nothing, and takes the place
    of no other reason: another worker has watched, and both would say theirs by turns.

    Args:
        ctx: To work with.
        name: The node's.
        judgement: Why.
        lease: That ran out.
        is_telling: Whether there is an event about it: of a node that runs nothing, nobody need know more than that it
            is not Ready.
    """

    def change(old: NodeFencing) -> NodeFencing | None:
        status = old.status
        if status.phase.has_evidence or (status.phase is FencePhase.SUSPECT and status.reason == judgement.reason):
            return None
        is_told = status.phase is FencePhase.SUSPECT and is_of_lease(status, lease)
        if judgement.is_about_worker and (status.phase.is_open or is_told):
            return None  # it goes on when its time has come again
        return old.with_status(
            phase=FencePhase.SUSPECT,
            since=ctx.now(),
            reason=judgement.reason,
            message=judgement.message,
            **_of_lease(status, lease, ctx.now()),
        )

    change_fencing(ctx, name, change, Note("NodeSuspect", judgement.message, warning=True) if is_telling else None)


def is_of_lease(status: NodeFencingStatus, lease: Lease | None) -> bool:
    """Whether a fencing is about the loss of this lease, or of a node that had none."""
    return (status.generation, status.sequence) == (lease.identity if lease is not None else ("", 0))


def begin(ctx: Context, name: str, message: str, lease: Lease | None) -> None:
    """Begin to seek evidence about a lost node."""

    def change(old: NodeFencing) -> NodeFencing | None:
        if old.status.phase.has_evidence or old.status.phase.is_open:
            return None
        return old.with_status(
            phase=FencePhase.FENCING,
            since=ctx.now(),
            reason="LeaseExpired",
            message=message,
            evidence=None,
            **_of_lease(old.status, lease, ctx.now()),
        )

    change_fencing(
        ctx, name, change, Note("NodeFencing", f"{message}: evidence is sought that it runs nothing", warning=True)
    )


def end_renewed(ctx: Context, name: str) -> None:
    """End a fencing that has no evidence, as the node renewed its lease: it is there.

    The lease is read here: the fencing may be another worker's, of a later loss than the one that this one saw end.
    """

    def change(old: NodeFencing) -> NodeFencing | None:
        status = old.status
        if status.phase.has_evidence or status.phase is FencePhase.IDLE:
            return None
        stored = lease_of(ctx, name)
        if stored is None or is_of_lease(status, stored.lease):
            return None
        at, distrust = ctx.now(), status.bmc_distrust
        back = NodeFencingStatus(since=at, reason="LeaseRenewed", message="it is back", bmc_distrust=distrust)
        return old.with_(status=back)

    change_fencing(ctx, name, change, Note("NodeFencingEnded", "it renewed its lease: it is not fenced"))


def say_unconfirmed(ctx: Context, name: str, reason: str, message: str) -> None:
    """Show why there is no evidence yet, once for each reason."""

    def change(old: NodeFencing) -> NodeFencing | None:
        status = old.status
        if not status.phase.is_open or (status.phase is FencePhase.UNCONFIRMED and status.reason == reason):
            return None
        return old.with_status(phase=FencePhase.UNCONFIRMED, since=ctx.now(), reason=reason, message=message)

    text = f"no evidence yet: {message}; nothing of it starts elsewhere (vmherd fence confirm {name}, once it is off)"
    change_fencing(ctx, name, change, Note("FenceUnconfirmed", text, warning=True))


def say_deadline(ctx: Context, name: str, why: str) -> None:
    """Show why a watchdog's deadline will be no evidence; empty: it may be."""

    def change(old: NodeFencing) -> NodeFencing | None:
        return old.with_status(deadline=why) if old.status.phase.is_open else None

    note = Note("DeadlineUnsafe", f"its watchdog's deadline does not count: {why}", warning=True)
    change_fencing(ctx, name, change, note if why else None)


def distrust(ctx: Context, name: str, bmc: Bmc, why: str) -> None:
    """Use a BMC for nothing any more, until another one is set."""

    def change(old: NodeFencing) -> NodeFencing | None:
        return old.with_status(bmc_distrust=why) if bmc.is_as(old.spec.bmc) else None

    change_fencing(ctx, name, change)


# --- leases -----------------------------------------------------------------------------------------------------------


def identity(stored: StoredLease | None) -> tuple[str, int]:
    """Give a lease's generation and sequence; of none, what no lease has."""
    return stored.lease.identity if stored is not None else ("", 0)


def lease_of(ctx: Context, name: str) -> StoredLease | None:
    """Read a node's lease."""
    return leases_of(ctx, [name])[name]


def leases_of(ctx: Context, names: list[str]) -> dict[str, StoredLease | None]:
    """Read some nodes' leases in one round trip."""
    with redis_errors(ctx.store.redis):
        texts = cast("list[str | None]", ctx.store.redis.mget([keys.lease(name) for name in names]))
    return {name: read_lease(text) for name, text in zip(names, texts, strict=True)}


def is_fresh(node: Node) -> bool:
    """Whether liveness has a node's lease for fresh."""
    condition = find_condition(node.status.conditions, "LeaseFresh")
    return condition is not None and condition.status == "True"
