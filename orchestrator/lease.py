"""A node's lease, and the times by which it is lost: what heartbeats write and takeover reads (TAKEOVER.md, ADR 0020).

A lease says for itself by which times its node lives, so a herd may have nodes of different profiles. Takeover counts
with the lease's times and never with its own settings.

Nothing but the standard library is imported here: the heartbeat process, whose memory is locked, loads this module.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from orchestrator.errors import Invalid

LATENCY_S: Final = 1.0
"""L unless it is set: from a watchdog's expiry to the last instruction or I/O of a guest."""
DRIFT: Final = 0.01
"""Allowance for clocks that run apart, as a share of what is measured. Crystals are off by 0.01 %, an NTP slew by
0.05 %; a watchdog's own divider by more."""
_SLACK_S: Final = 0.05
"""By which the waits of rule 8 exceed their bounds: both are strict."""
_NETWORK_S: Final = 0.2
"""What a question to a peer takes besides the peer's own attempt at Redis: the network, and waiting for CPUs twice."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of one node's lease and watchdog, seconds. The letters are TAKEOVER.md's.

    Attributes:
        lease_ttl: T: without a renewal for so long the node is suspect.
        watchdog_timeout: W: unfed for so long the watchdog resets the host. Whole seconds, as drivers have it.
        heartbeat: H: from one renewal to the next.
        poll_validity: S: how long a poll of the peers may be used, from its start.
        latency: L: from the watchdog's expiry to the last guest instruction or I/O.
        drift: δ, a share.
    """

    lease_ttl: float
    watchdog_timeout: float
    heartbeat: float
    poll_validity: float
    latency: float = LATENCY_S
    drift: float = DRIFT

    @property
    def permission(self) -> float:
        """T-W: for so long after its creation an acknowledged renewal permits feeding (rule 1)."""
        return self.lease_ttl - self.watchdog_timeout

    @property
    def redis_timeout(self) -> float:
        """For how long a renewal may take; then it has failed."""
        return min(0.5, self.heartbeat / 2)

    @property
    def poll_interval(self) -> float:
        """From the start of one poll to the start of the next."""
        return min(0.5, self.heartbeat / 2)

    @property
    def poll_timeout(self) -> float:
        """For how long answers to a poll are waited for: a peer tries Redis itself before it answers."""
        return self.redis_timeout + _NETWORK_S

    @property
    def feed_interval(self) -> float:
        """From one feed to the next."""
        return self.watchdog_timeout / 4

    @property
    def margin(self) -> float:
        """M of rule 8: how long after T an unchanged lease may be taken over at the earliest."""
        return self._bound(self.watchdog_timeout + self.latency, self.lease_ttl)

    @property
    def ack_wait(self) -> float:
        """A of rule 8: how long the acknowledgements of a suspicion must have been there."""
        return self._bound(self.poll_validity + 2 * self.watchdog_timeout + self.latency, 0)

    def _bound(self, base: float, more: float) -> float:
        return base + self.drift * (base + more) + _SLACK_S

    def check(self, *, margin: float | None = None, ack_wait: float | None = None) -> None:
        """Check TAKEOVER.md's inequalities: rule 8, and those of liveness.

        Args:
            margin: M, where it is set; else it is computed from the bound.
            ack_wait: A, likewise.

        Raises:
            Invalid: One does not hold; the message names it.
        """
        t, w, h, s = self.lease_ttl, self.watchdog_timeout, self.heartbeat, self.poll_validity
        rt, pi, rtt, feed = self.redis_timeout, self.poll_interval, self.poll_timeout, self.feed_interval
        m = self.margin if margin is None else margin
        a = self.ack_wait if ack_wait is None else ack_wait
        late, voted = w + self.latency, s + 2 * w + self.latency
        d = self.drift
        for name, holds, figures in (
            ("all times > 0, latency and drift >= 0", min(t, w, h, s) > 0 <= min(self.latency, d), str(self)),
            ("the watchdog timeout W is in whole seconds", w == math.floor(w) and w >= 1, f"W = {w:g}"),
            ("H + redis_timeout <= T - W", h + rt <= t - w, f"{h:g} + {rt:g} > {t:g} - {w:g}"),
            ("M > W + L + drift (T + W + L)", m > late + d * (t + late), f"{m:g} <= {late + d * (t + late):g}"),
            ("A > S + 2W + L + drift (S + 2W + L)", a > voted * (1 + d), f"{a:g} <= {voted * (1 + d):g}"),
            (
                "2H + redis_timeout + poll_interval + poll_timeout < T - feed_interval",
                2 * h + rt + pi + rtt < t - feed,
                f"2 * {h:g} + {rt:g} + {pi:g} + {rtt:g} >= {t:g} - {feed:g}",
            ),
            ("S >= 2 poll_interval + poll_timeout", s >= 2 * pi + rtt, f"{s:g} < 2 * {pi:g} + {rtt:g}"),
        ):
            if not holds:
                raise Invalid(f"failure detection: {name} does not hold ({figures}); {_LEGEND}")


_LEGEND: Final = (
    "T is VMHERD_LEASE_TTL, W VMHERD_WATCHDOG_TIMEOUT, H VMHERD_HEARTBEAT, S VMHERD_POLL_VALIDITY, L "
    "VMHERD_WATCHDOG_LATENCY, M VMHERD_TAKEOVER_MARGIN, A VMHERD_ACK_WAIT (docs/heartbeat.md, Profiles)"
)

PROFILES: Final[Mapping[str, Timing]] = {
    "critical": Timing(4, 2, 0.5, 1),
    "medium": Timing(10, 5, 2, 2),
    "moderate": Timing(30, 10, 5, 4),
    "slow": Timing(60, 20, 10, 8),
}
DEFAULT_PROFILE: Final = "medium"


def timing_of(values: Mapping[str, str]) -> Timing:
    """Give the times that an environment sets: a profile's, each of which may be set by itself.

    Args:
        values: `VMHERD_PROFILE`, and any of `VMHERD_LEASE_TTL`, `VMHERD_WATCHDOG_TIMEOUT`, `VMHERD_HEARTBEAT`,
            `VMHERD_POLL_VALIDITY`, `VMHERD_WATCHDOG_LATENCY`, in seconds.

    Raises:
        Invalid: No such profile, something that is no number, or an inequality that does not hold.
    """
    name = values.get("VMHERD_PROFILE") or DEFAULT_PROFILE
    if name not in PROFILES:
        raise Invalid(f"VMHERD_PROFILE: {name!r} is none of {', '.join(PROFILES)}")
    changes: dict[str, float] = {}
    for variable, attribute in TIMING_VARIABLES.items():
        if text := values.get(variable):
            try:
                changes[attribute] = float(text)
            except ValueError:
                raise Invalid(f"{variable}: {text!r} is no number of seconds") from None
    timing = replace(PROFILES[name], **changes)
    timing.check()
    return timing


TIMING_VARIABLES: Final[Mapping[str, str]] = {
    "VMHERD_LEASE_TTL": "lease_ttl",
    "VMHERD_WATCHDOG_TIMEOUT": "watchdog_timeout",
    "VMHERD_HEARTBEAT": "heartbeat",
    "VMHERD_POLL_VALIDITY": "poll_validity",
    "VMHERD_WATCHDOG_LATENCY": "latency",
}
"""What may be set, and which of `Timing` it is."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One heartbeat, as rule 1 wants it. What the control plane reads of it is a claim of that node about itself alone.

    Attributes:
        generation: Of the heartbeat process; new with each.
        boot_id: Of the host's boot.
        sequence: Of this renewal in this generation, from 1. `(generation, sequence)` is what takeover watches.
        created: When it was created, seconds of the host's CLOCK_BOOTTIME. Permission counts from here, and a renewal
            that was created before the one on record is refused: it was under way when its process died.
        membership: Version of the membership that the node goes by; it may be asked for its vote under this one, or one
            more (rule 10).
        suspicions: Ids of the suspicions of others that it holds: since it knows each, it refuses that node's failsafe.
        timing: By which it lives now. W is what the watchdog's driver gave back.
        armed: A watchdog counts. Recorded after it is armed, and taken back before it is disarmed.
        failsafe: It may feed by its peers' word (rule 2).
        watchdog: What the driver calls itself; empty: there is none.
        address: Where peers ask it, `host:port`.
        witness: It runs no VMs.
    """

    generation: str
    boot_id: str
    sequence: int
    created: float
    timing: Timing
    membership: int = 0
    suspicions: tuple[str, ...] = ()
    armed: bool = False
    failsafe: bool = True
    watchdog: str = ""
    address: str = ""
    witness: bool = False

    @property
    def identity(self) -> tuple[str, int]:
        """What changes with each renewal."""
        return self.generation, self.sequence

    def text(self) -> str:
        """Write it as it is stored; `lua/lease.lua` adds `renewed_ms`, Redis's time."""
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class StoredLease:
    """A lease as it stands in Redis.

    Attributes:
        renewed_ms: When it was renewed, by Redis's clock. Good for people; nothing is decided by it alone (trace 7).
    """

    lease: Lease
    renewed_ms: int


def read_lease(text: str | None) -> StoredLease | None:
    """Read a lease as it is stored.

    Returns:
        None when there is none, or none that can be read: that node's trouble alone, and as good as no renewal.
    """
    if text is None:
        return None
    try:
        found = json.loads(text)
        known = {attribute.name for attribute in fields(Lease)}
        values: dict[str, Any] = {key: value for key, value in found.items() if key in known}
        times = {attribute.name for attribute in fields(Timing)}
        timing = Timing(**{key: float(value) for key, value in values.pop("timing").items() if key in times})
        suspicions = tuple(str(item) for item in values.pop("suspicions", ()))
        lease = Lease(**values, timing=timing, suspicions=suspicions)
        if not _is_sound(lease):
            return None
        return StoredLease(lease, int(found["renewed_ms"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _is_sound(lease: Lease) -> bool:
    """Whether each value has the type that it is declared with: a node writes what it likes."""
    texts = (lease.generation, lease.boot_id, lease.watchdog, lease.address)
    numbers = (lease.created, *asdict(lease.timing).values())
    return (
        all(isinstance(value, str) for value in texts)
        and all(type(value) is int for value in (lease.sequence, lease.membership))
        and all(isinstance(value, bool) for value in (lease.armed, lease.failsafe, lease.witness))
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers)
    )


@dataclass(frozen=True, slots=True)
class Membership:
    """Who votes: the registered nodes and witnesses.

    Attributes:
        version: One more with each change; 0: none was published yet.
        members: Name to `host:port`.
        changed: By how many members it differs from the version before.
    """

    version: int = 0
    members: Mapping[str, str] = field(default_factory=dict)
    changed: int = 0

    def text(self) -> str:
        """Write it as it is published."""
        members = dict(sorted(self.members.items()))
        found = {"version": self.version, "changed": self.changed, "members": members}
        return json.dumps(found, separators=(",", ":"))

    def is_majority(self, count: int) -> bool:
        """Whether so many are more than half (rule 2, and trace 10: half is not enough)."""
        return 2 * count > len(self.members)

    def counts_for(self, held: int) -> bool:
        """Whether votes under this membership count against a node that may go by the one it acknowledged last.

        More than half of this one and more than half of that one share a member if they are the same, or differ by one.

        Args:
            held: The version in that node's lease; it holds that, or this one.
        """
        return held == self.version or (held == self.version - 1 and self.changed <= 1)


def read_membership(text: str | None) -> Membership:
    """Read a membership as it is published; version 0 when there is none."""
    if text is None:
        return Membership()
    found = json.loads(text)
    members = {str(name): str(address) for name, address in found["members"].items()}
    return Membership(int(found["version"]), members, int(found["changed"]))


@dataclass(frozen=True, slots=True)
class Suspicion:
    """An open suspicion, as it is published in `suspicions`, field by field a node.

    It is about one reading of a lease. A renewal makes it void, whether or not it was deleted yet: takeover asks that
    the lease on record is still this one.

    Attributes:
        suspicion_id: Random, never used twice.
        generation: Of the lease that ran out.
        sequence: Likewise.
        redis: Run id and replication id of the Redis at which it was opened: at any other one it is void (rule 9).
    """

    suspicion_id: str
    generation: str
    sequence: int
    redis: str = ""

    def text(self) -> str:
        """Write it as it is published; `lua/lease.lua` reads the first word."""
        return f"{self.suspicion_id} {self.generation} {self.sequence} {self.redis}"


def read_suspicion(text: str) -> Suspicion:
    """Read one as it is published.

    Raises:
        ValueError: It is none.
    """
    suspicion_id, generation, sequence, redis = (*text.split(" "), "")[:4]
    return Suspicion(suspicion_id, generation, int(sequence), redis)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a renewal is answered.

    Attributes:
        refused: Empty: OK, which means that the value on record has changed. `taken over`: this boot's VMs may run
            elsewhere. `outdated`: a later renewal of this boot is on record.
        suspicions: Node to id, of all that are open; never of this node itself.
        membership: The one published, where it is not the one held; None: it is held.
        peer_key: Likewise the key by which peers speak to each other.
        disarm: Why the node's watchdog is to be disarmed; empty: it may be armed.
    """

    refused: str = ""
    suspicions: Mapping[str, str] = field(default_factory=dict)
    membership: Membership | None = None
    peer_key: str | None = None
    disarm: str = ""


def read_reply(text: str) -> Reply:
    """Read the answer of `lua/lease.lua`.

    Raises:
        ValueError: It is none.
    """
    found = json.loads(text)
    membership = read_membership(found["membership"]) if found["membership"] else None
    return Reply(found["refused"], dict(found["suspicions"]), membership, found["peer_key"] or None, found["disarm"])
