"""Whose lease ran out, whether that may be acted upon, and when an armed watchdog's deadline has passed: pure.

The rules are TAKEOVER.md's (docs/adr/0018-takeover.md). Time is one worker's monotonic clock, in seconds; what Redis's
clock says is asked for besides, never alone. A worker that begins anew knows nothing: every wait begins anew with it.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.lease import Lease, Membership, Suspicion, Timing

CLOCKS_APART_S = 1.0
"""Redis's time and a worker's monotonic clock moved apart by more than this: one of them was set, or stood still."""
LONGEST_GAP_S = 5.0
"""Between two scans of one worker; after a longer one it can't say what it missed. What was read so long ago is acted
upon no more, either: another worker may have acted meanwhile."""
AFTER_INTERRUPTION = "AfterInterruption"
_SLACK_S = 0.05
_LATE_S = 2.0
"""Two scans: after a heartbeat and so long without a renewal, a lease is late."""


@dataclass(frozen=True, slots=True)
class Glance:
    """At what, and when, a worker looked.

    Attributes:
        run_id: Of the Redis that answered.
        replication_id: Likewise.
        redis_s: Its time.
        clock: The worker's monotonic clock, before it asked: what it read was true after this.
        read_at: Likewise when it had the answer: what it read was true before this. Waits begin here and end at a
            `clock`, so a slow answer makes them longer, never shorter.
    """

    run_id: str
    replication_id: str
    redis_s: float
    clock: float
    read_at: float

    @property
    def redis(self) -> str:
        """Which Redis answered, and which life of it: another one after each restart and each failover."""
        return f"{self.run_id}/{self.replication_id}"


def interruption(before: Glance | None, now: Glance) -> str:
    """Say what came between two looks, so that those before count for nothing (rules 6, 7, 9); empty: nothing."""
    if before is None:
        return "this worker has just begun"
    if now.replication_id != before.replication_id:
        return "Redis failed over, or restarted"
    if now.run_id != before.run_id:
        return "Redis restarted"
    gap = now.clock - before.clock
    if gap > LONGEST_GAP_S:
        return f"this worker did not look for {gap:.1f} s"
    apart = abs((now.redis_s - before.redis_s) - gap)
    if apart > CLOCKS_APART_S:
        return f"Redis's time and this worker's clock moved apart by {apart:.1f} s"
    return ""


@dataclass(frozen=True, slots=True)
class Watched:
    """One member's lease as one worker has watched it.

    Attributes:
        name: The member's.
        lease: As it was last read; None: there is none.
        unchanged_s: Since this worker first read it as it is (rule 7).
        by_redis_s: Its age by Redis's own clock.
    """

    name: str
    lease: Lease | None
    unchanged_s: float
    by_redis_s: float

    def is_expired(self, default_ttl: float) -> bool:
        """Whether it ran out by both clocks: no pause of this worker and no step of Redis's clock does it alone."""
        ttl = self.ttl(default_ttl)
        return self.unchanged_s > ttl + _SLACK_S and self.by_redis_s > ttl

    def ttl(self, default: float) -> float:
        """T, as its lease says it."""
        return self.lease.timing.lease_ttl if self.lease is not None else default

    def is_late(self, default: Timing) -> bool:
        """Whether it has missed heartbeats: it may be about to be lost, together with one that is lost already.

        Leases of hosts that are cut off at one moment run out within a heartbeat of each other. Counted by expiry,
        the first of them would be a single loss, and its power would be cut.
        """
        timing = self.lease.timing if self.lease is not None else default
        return self.unchanged_s > max(timing.lease_ttl / 2, timing.heartbeat + _LATE_S)


class Act(StrEnum):
    """What is to be done about a member."""

    NONE = "None"
    NOT_READY = "NotReady"
    """Its lease ran out, and it is not to be fenced: a person's matter, or none at all."""
    HOLD = "Hold"
    """It would be fenced, but not now."""
    FENCE = "Fence"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is to be done, and why: a reason in CamelCase and a sentence for people."""

    act: Act
    reason: str = ""
    message: str = ""

    @property
    def is_about_worker(self) -> bool:
        """Whether it says only that this worker has not watched for long enough: another one may know more."""
        return self.reason == AFTER_INTERRUPTION


@dataclass(frozen=True, slots=True)
class Lost:
    """A member whose lease ran out, and what else is known of it.

    Attributes:
        watched: Its lease.
        is_witness: It runs no VMs.
        is_cordoned: By a person.
        is_empty: No VM is on record there, and no grant is open.
        is_enabled: It may be fenced.
        disarmed: Why nothing is fenced; empty: it is armed.
    """

    watched: Watched
    is_witness: bool = False
    is_cordoned: bool = False
    is_empty: bool = False
    is_enabled: bool = True
    disarmed: str = ""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What is known of the herd as a whole.

    Attributes:
        members: How many are registered.
        lost: How many of them look lost: their leases ran out.
        quiet_s: Since the last interruption.
        wait_more_s: Q, where the last interruption was a failover (rule 9).
        max_unhealthy: Percent of the members; more lost than that stops all fencing.
        correlated: What those that are lost have in common; empty: nothing.
        many_ago_s: Since too many looked lost.
        late: How many are lost, or late: no fencing begins when those are too many.
    """

    members: int
    lost: int
    quiet_s: float
    wait_more_s: float = 0
    max_unhealthy: int = 49
    correlated: str = ""
    many_ago_s: float = math.inf
    late: int = 0

    def are_too_many(self, count: int) -> bool:
        """Whether these are so many that nothing is fenced by itself."""
        return count > 1 and count * 100 > self.max_unhealthy * self.members


def judge(lost: Lost, herd: Circumstances, timing: Timing, margin: float, *, is_open: bool = False) -> Judgement:
    """Say what is to be done about a member whose lease ran out.

    Args:
        lost: It.
        herd: The others.
        timing: By which it lived (its lease's own).
        margin: M.
        is_open: It is being fenced; members that are late by now may be so by that.
    """
    for_s = f"its lease was not renewed for {lost.watched.unchanged_s:.0f} s"
    if lost.is_witness:
        return Judgement(Act.NOT_READY, "WitnessLost", f"{for_s}; a witness runs no VMs")
    if lost.is_cordoned and lost.is_empty:
        return Judgement(Act.NOT_READY, "CordonedAndEmpty", f"{for_s}; it is cordoned and runs nothing")
    if not lost.is_enabled:
        return Judgement(Act.NOT_READY, "FencingDisabled", f"{for_s}; fencing is not enabled: nothing of it restarts")
    wait = timing.lease_ttl + margin + herd.wait_more_s
    if herd.quiet_s < wait:  # rules 6 and 9
        why = f"the control plane was interrupted {herd.quiet_s:.0f} s ago, and waits for {wait:.0f} s"
        return Judgement(Act.HOLD, AFTER_INTERRUPTION, f"{for_s}; {why}")
    silent = herd.lost if is_open else max(herd.lost, herd.late)
    if herd.are_too_many(silent):
        common = f" ({herd.correlated})" if herd.correlated else ""
        why = f"{silent} of {herd.members} members look lost{common}, more than {herd.max_unhealthy} %"
        return Judgement(Act.HOLD, "TooManyLost", f"{for_s}; {why}: nothing is fenced by itself, a person may confirm")
    if herd.many_ago_s < wait:  # they come back one after the other: the last of them is no single loss
        why = f"too many looked lost {herd.many_ago_s:.0f} s ago: it is given {wait:.0f} s to come back as well"
        return Judgement(Act.HOLD, AFTER_INTERRUPTION, f"{for_s}; {why}")
    if lost.disarmed:  # last: it does not end a fencing under way, and what stands above does
        return Judgement(Act.HOLD, "FailoverDisarmed", f"{for_s}; failover is disarmed: {lost.disarmed}")
    common = f"; {herd.correlated}" if herd.correlated else ""
    return Judgement(Act.FENCE, "LeaseExpired", for_s + common)


def correlation(lost: Collection[str], labels: Mapping[str, Mapping[str, str]], keys: Collection[str]) -> str:
    """Name what all lost members have in common and no other member has: a rack, a switch.

    Args:
        lost: Names.
        labels: Of all members.
        keys: Labels that tell of such places, the narrowest first.

    Returns:
        For example `all of rack=r2 are lost, and nobody else`; empty for a single loss, or when nothing fits.
    """
    if len(lost) < 2:  # noqa: PLR2004 - one has nothing in common with another
        return ""
    for key in keys:
        values = {labels.get(name, {}).get(key, "") for name in lost}
        if len(values) != 1 or "" in values:
            continue
        value = values.pop()
        if not any(found.get(key) == value for name, found in labels.items() if name not in lost):
            return f"all of {key}={value} are lost, and nobody else"
    return ""


@dataclass(frozen=True, slots=True)
class Ballot:
    """The acknowledgements of a suspicion, as one worker has watched them.

    Attributes:
        suspicion: That is open; None: none is.
        votes: Members other than the lost one whose leases carry its id, by name.
        held_s: Since this worker first read more than half of them, without a break.
    """

    suspicion: Suspicion | None
    votes: frozenset[str] = frozenset()
    held_s: float = 0


def may_suspect(watched: Watched, *, majority_fresh_s: float, quiet_s: float, wait_s: float) -> bool:
    """Whether a suspicion of a lost member may be opened (rule 6).

    Suspecting resets nobody while a majority has Redis, but a node that hears of it refuses the other's failsafe: after
    a long outage, all of whose leases are old, that would reset healthy nodes (violation 11).

    Args:
        watched: It; its lease ran out.
        majority_fresh_s: For how long more than half of the leases were fresh without a break.
        quiet_s: Since the last interruption.
        wait_s: T + M, and Q after a failover.
    """
    return watched.lease is not None and majority_fresh_s >= wait_s and quiet_s >= wait_s


def votes(victim: str, suspicion: Suspicion, leases: Mapping[str, Lease | None], members: Membership) -> frozenset[str]:
    """Name the members whose leases acknowledge a suspicion; the lost one's own word never counts (violation 10)."""
    return frozenset(
        name
        for name in members.members
        if name != victim and (lease := leases.get(name)) is not None and suspicion.suspicion_id in lease.suspicions
    )


def deadline_obstacle(
    watched: Watched, ballot: Ballot, members: Membership, *, margin: float, ack_wait: float
) -> tuple[str, str]:
    """Say why a lost member's watchdog deadline is no evidence yet (rules 7, 8, 11); ("", "") when it is.

    Args:
        watched: It.
        ballot: On it.
        members: As they are published.
        margin: M.
        ack_wait: A.

    Returns:
        A reason in CamelCase, and a sentence.
    """
    lease = watched.lease
    if lease is None:
        return "NoLease", "it has no lease, so nothing is known of a watchdog"
    if not lease.armed:
        return "NotArmed", "its lease does not record an armed watchdog"
    wait = lease.timing.lease_ttl + margin
    if watched.unchanged_s <= wait:
        return "WaitsForDeadline", f"its watchdog's deadline passes {wait:.1f} s after its last renewal was read"
    if not lease.failsafe:
        return "", ""  # rule 11: it was fed by its lease alone
    if len(members.members) <= 2:  # noqa: PLR2004 - rule 11: a majority besides the lost one takes three
        return "TooFewMembers", "two members have no majority without the lost one: add a witness, or a BMC"
    suspicion = ballot.suspicion
    if suspicion is None or (suspicion.generation, suspicion.sequence) != lease.identity:
        return "NotSuspected", "it is not suspected yet: more than half of the leases must be fresh for a while first"
    if not members.is_majority(len(ballot.votes)):
        count = f"{len(ballot.votes)} of {len(members.members)}"
        return "WaitsForAcknowledgement", f"{count} members have acknowledged that it is suspect; more than half must"
    if ballot.held_s <= ack_wait:
        return "WaitsForAcknowledgement", f"the acknowledgements must have stood for {ack_wait:.1f} s"
    return "", ""
