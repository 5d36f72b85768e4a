"""Other members' silence: what it says of whose power was cut (docs/adr/0019-fencing.md).

A member that fell silent *when* a node's power went may be the one whose power it was: addresses are swapped, and that
BMC is used for nothing any more. Members that were silent *before* (a rack without power) can't be told apart by that:
there each BMC of them must have been read as off as well (`planner.power`).
"""

from typing import Final

from orchestrator.lease import StoredLease
from orchestrator.planner.power import OffReading, not_known_off, place_of
from orchestrator.resources import Node, NodeFencing
from orchestrator.services.context import Context
from orchestrator.services.fencing.state import LOOK_EVERY_S, change_fencing, identity, leases_of

Leases = dict[str, StoredLease | None]
_HEARTBEATS: Final = 2


def others(ctx: Context, name: str) -> Leases:
    """Read the leases of all members but one, and of those that were fenced and are not back."""
    fenced = {str(fencing.name) for fencing in ctx.store.all(NodeFencing) if fencing.status.phase.has_evidence}
    return _read(ctx, sorted((ctx.store.names(Node) | fenced) - {name}))


def silent_before(ctx: Context, before: Leases, since: float) -> frozenset[str]:
    """Name those that don't renew their leases for two heartbeats.

    Args:
        ctx: To work with.
        before: Leases as they were then.
        since: When that was, by this worker's own clock.
    """
    longest = max((stored.lease.timing.heartbeat for stored in before.values() if stored is not None), default=0.0)
    until = since + _HEARTBEATS * longest + LOOK_EVERY_S
    silent = before
    while silent:
        silent = _not_renewed(silent, _read(ctx, sorted(silent)))
        if not silent or ctx.clock.monotonic() >= until:
            break
        ctx.clock.sleep(LOOK_EVERY_S)
    return frozenset(silent)


def unexplained(
    ctx: Context, fencing: NodeFencing, before: Leases, away: frozenset[str]
) -> tuple[list[str], list[str]]:
    """Name the members whose silence speaks against the node's being off, now that its BMC was read as off.

    Each other member must renew its lease, by the boot that it had before the power was looked at: one that has booted
    since may have been cut. One that was silent before may be known to be off instead; whose power this may be, then,
    is written down for the others. Members that were fenced are no exception, as their hosts may have booted.

    Args:
        ctx: To work with.
        fencing: The node's, as it was when the attempt began.
        before: The others' leases as they were then.
        away: Members that were off when this BMC was read as on: it is not theirs.

    Returns:
        Those that fell silent with it, and those that were silent before and are not known to be off.
    """
    name = str(fencing.name)
    own = ctx.store.get(NodeFencing, name)
    names = (ctx.store.names(Node) | before.keys() | set(own.status.lost_before)) - {name} - away
    lost_before = set(own.status.lost_before) | (names - before.keys())  # of one that has just joined nothing is known
    silent = _read(ctx, sorted(names))
    boots = {other: _boot(before.get(other)) for other in names}
    until = ctx.clock.monotonic() + max(
        (stored.lease.timing.lease_ttl for stored in silent.values() if stored is not None),
        default=ctx.config.lease_ttl,
    )
    while True:
        now = _read(ctx, sorted(silent))
        silent = _not_renewed(silent, now) | {
            other: stored for other, stored in silent.items() if _boot(now[other]) != boots[other]
        }
        with_it = sorted(silent.keys() - lost_before)
        unknown: list[str] = []
        if not with_it:
            may_be_of = {other: boots[other] for other in sorted(silent)}
            _note_whose(ctx, fencing, may_be_of)
            unknown = _not_known_off(ctx, fencing, may_be_of) if may_be_of else []
        if not (with_it or unknown) or ctx.clock.monotonic() >= until:
            return with_it, unknown
        ctx.clock.sleep(LOOK_EVERY_S)


def _note_whose(ctx: Context, fencing: NodeFencing, may_be_of: dict[str, str]) -> None:
    """Write down whose power is off, for the others of this one's kind; that there is evidence already is no matter."""

    def change(old: NodeFencing) -> NodeFencing | None:
        was, now = fencing.status, old.status
        is_same = (was.generation, was.sequence) == (now.generation, now.sequence) and now.lost_at is not None
        is_its = fencing.spec.bmc is not None and fencing.spec.bmc.is_as(old.spec.bmc)
        return old.with_status(may_be_of=may_be_of) if is_same and is_its else None

    change_fencing(ctx, str(fencing.name), change)


def _not_known_off(ctx: Context, fencing: NodeFencing, may_be_of: dict[str, str]) -> list[str]:
    assert fencing.spec.bmc is not None  # noqa: S101 - it was read as off
    readings = {
        str(other.name): OffReading(place_of(other.spec.bmc), other.status.may_be_of)
        for other in ctx.store.all(NodeFencing)
        if other.spec.bmc is not None and other.status.may_be_of is not None and not other.status.bmc_distrust
    }
    name = str(fencing.name)
    readings[name] = OffReading(place_of(fencing.spec.bmc), may_be_of)
    asked = {other for reading in readings.values() for other in reading.may_be_of}
    boots = {other: _boot(stored) for other, stored in _read(ctx, sorted(asked)).items()}
    unknown = not_known_off(name, readings, boots)
    return sorted(unknown - {name}) or sorted(may_be_of if unknown else ())


def _not_renewed(before: Leases, now: Leases) -> Leases:
    return {other: stored for other, stored in before.items() if identity(now[other]) == identity(stored)}


def _boot(stored: StoredLease | None) -> str:
    return stored.lease.boot_id if stored is not None else ""


def _read(ctx: Context, names: list[str]) -> Leases:
    return leases_of(ctx, names) if names else {}
