"""Many hosts are cut off at once, and come back: no power is cut (planner/liveness.py, "too many").

Their leases run out up to a heartbeat apart, and come back likewise: the first to be lost and the last to come back
look like single losses. The heartbeats' phases, the worker's, and how long the network is away are gone through; who
may be fenced is judged by the product's own code.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from orchestrator.lease import Lease
from orchestrator.planner.liveness import Act, Circumstances, Lost, Watched, judge

Rule = Literal["", "who is late counts", "they are given time to come back", "who was late counts afterwards, too"]

SCAN_S = 1.0


@dataclass(slots=True)
class _Member:
    """One, as the worker has read it."""

    phase: float
    renewed_at: float = 0.0
    first_read_at: float = 0.0
    read: float = -1.0


def first_fenced(
    lease: Lease,
    phases: Iterable[float],
    *,
    cut: int,
    at: float,
    away_s: float,
    scans_at: float,
    without: Rule = "",
) -> str:
    """Cut the first members off, and say who would be fenced when.

    Args:
        lease: Of all members: their times.
        phases: By member, seconds until its first heartbeat.
        cut: So many are cut off.
        at: When, in seconds.
        away_s: For so long.
        scans_at: Seconds until the worker's first look.
        without: A rule that is left out.

    Returns:
        Who, and when; empty: nobody.
    """
    timing = lease.timing
    wait = timing.lease_ttl + timing.margin
    members = [_Member(phase) for phase in phases]
    many_at = float("-inf")
    clock = scans_at
    while clock < at + away_s + 2 * timing.heartbeat + wait:
        for number, member in enumerate(members):
            _read(member, timing.heartbeat, clock, away=(at, at + away_s) if number < cut else (0.0, 0.0))
        watched = [
            Watched(str(n), lease, clock - member.first_read_at, clock - member.renewed_at)
            for n, member in enumerate(members)
        ]
        lost = [w for w in watched if w.is_expired(timing.lease_ttl)]
        late = [w for w in watched if w in lost or w.is_late(timing)]
        herd = Circumstances(len(members), len(lost), quiet_s=1e9, late=len(late), many_ago_s=clock - many_at)
        if without == "who is late counts":
            herd = replace(herd, late=len(lost))
        if without == "they are given time to come back":
            herd = replace(herd, many_ago_s=1e9)
        if herd.are_too_many(herd.lost if without == "who was late counts afterwards, too" else herd.late):
            many_at = clock
        for w in lost:
            if judge(Lost(w), herd, timing, timing.margin).act is Act.FENCE:
                return f"member {w.name} is fenced at {clock:.1f} s"
        clock += SCAN_S
    return ""


def _read(member: _Member, heartbeat: float, clock: float, *, away: tuple[float, float]) -> None:
    """Bring a member up to this moment, and read its lease."""
    due = member.phase
    while due <= clock:
        if due > member.renewed_at and not away[0] <= due < away[1]:
            member.renewed_at = due
        due += heartbeat
    if member.renewed_at != member.read:
        member.read, member.first_read_at = member.renewed_at, clock


def stories(lease: Lease) -> Iterator[tuple[tuple[float, ...], float, float]]:
    """Give phases of five members' heartbeats, for how long three are away, and when the worker looks."""
    timing = lease.timing
    shares = (0.0, 0.45, 0.9)
    for chosen in product(shares, repeat=3):
        phases = (*(timing.heartbeat * share for share in chosen), 0.0, timing.heartbeat / 2)
        for away_s in (0.9 * timing.lease_ttl, timing.lease_ttl + 0.5, 1.2 * timing.lease_ttl, 2 * timing.lease_ttl):
            for scans_at in (0.0, 0.5):
                yield phases, away_s, scans_at
