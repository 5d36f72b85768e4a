"""Other members' silence: what it says of whose power was cut (docs/adr/0019-fencing.md).

A member that fell silent *when* a node's power went may be the one whose power it was: addresses are swapped, and that
BMC is used for nothing any more. Members that were silent *before* (a rack without power) can't be told apart by that:
there each BMC of them must have been read as off as well. Then all of their hosts are off, whichever belongs to whom.
"""

from collections.abc import Callable, Iterable
from typing import Final

from orchestrator.lease import StoredLease
from orchestrator.resources import Node, NodeFencing
from orchestrator.resources.fencing import Bmc
from orchestrator.services.context import Context
from orchestrator.services.fencing.state import LOOK_EVERY_S, identity, leases_of

Leases = dict[str, StoredLease | None]
_HEARTBEATS: Final = 2
_PLACE: Final = ("ip", "ipaddr", "ipport", "port", "plug", "uuid")
"""Options of fence agents that say which power is meant."""


def others(ctx: Context, name: str) -> Leases:
    """Read the leases of all members but one."""
    return _read(ctx, sorted(ctx.store.names(Node) - {name}))


def silent_before(ctx: Context, before: Leases, since: float) -> frozenset[str]:
    """Name those that don't renew their leases for two heartbeats.

    Args:
        ctx: To work with.
        before: Leases as they were then.
        since: When that was, by this worker's own clock.
    """
    longest = max((stored.lease.timing.heartbeat for stored in before.values() if stored is not None), default=0.0)
    until = since + _HEARTBEATS * longest + LOOK_EVERY_S
    return frozenset(_still_silent(ctx, before, until))


def unexplained(ctx: Context, name: str, away: frozenset[str]) -> tuple[list[str], list[str]]:
    """Name the members whose silence speaks against the node's being off, now that its BMC was read as off.

    Each other member must renew its lease, unless there was evidence about it before the power was cut, or it was away
    already when this BMC was last read as on. One that was silent before may be known to be off instead.

    Args:
        ctx: To work with.
        name: The node's.
        away: Members that were silent when this BMC was read as on: it is not theirs, or they were not on it.

    Returns:
        Those that fell silent with it, and those that were silent before and are not known to be off.
    """
    fencings = {fencing.name: fencing for fencing in ctx.store.all(NodeFencing)}
    own = fencings[name]
    cut, before = own.status.cut_epoch, frozenset(own.status.lost_before)
    fenced = {
        other
        for other, fencing in fencings.items()
        if fencing.status.phase.has_evidence
        and fencing.status.evidence is not None
        and (not cut or fencing.status.evidence.epoch < cut)
    }
    # One that was silent before counts though it was recovered and has left the herd since.
    names = (ctx.store.names(Node) | before) - {name} - away - fenced
    waiting = _read(ctx, sorted(names))
    until = ctx.clock.monotonic() + max(
        (stored.lease.timing.lease_ttl for stored in waiting.values() if stored is not None),
        default=ctx.config.lease_ttl,
    )

    def are_off(silent: Iterable[str]) -> set[str]:
        known = ctx.store.many(NodeFencing, sorted(before.intersection(silent)))
        return {str(other) for other, fencing in known.items() if _is_off_too(fencing, own.spec.bmc)}

    waiting = _still_silent(ctx, waiting, until, are_off)
    return sorted(waiting.keys() - before), sorted(waiting.keys() & before)


def _is_off_too(fencing: NodeFencing, bmc: Bmc | None) -> bool:
    """Whether a lost node's BMC, which is another one than this, was read as off since its lease ran out."""
    status, own = fencing.status, fencing.spec.bmc
    return status.bmc_off and not status.bmc_distrust and own is not None and bmc is not None and _differ(own, bmc)


def _differ(one: Bmc, other: Bmc) -> bool:
    """Whether two BMCs are plainly not the same."""
    places = [{key: bmc.options[key] for key in _PLACE if key in bmc.options} for bmc in (one, other)]
    return all(places) and places[0] != places[1]


def _still_silent(
    ctx: Context, before: Leases, until: float, are_off: Callable[[Iterable[str]], set[str]] = lambda _: set()
) -> Leases:
    """Give the leases that are not renewed by a time, less those of nodes that are known to be off."""
    waiting = before
    while waiting:
        now, off = _read(ctx, list(waiting)), are_off(waiting)
        waiting = {
            other: stored
            for other, stored in waiting.items()
            if other not in off and identity(now[other]) == identity(stored)
        }
        if not waiting or ctx.clock.monotonic() >= until:
            break
        ctx.clock.sleep(LOOK_EVERY_S)
    return waiting


def _read(ctx: Context, names: list[str]) -> Leases:
    return leases_of(ctx, names) if names else {}
