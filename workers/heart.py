"""What a heartbeat process may do, and when: the state machine, with the time handed in (TAKEOVER.md, ADR 0020).

A node's watchdog may be fed for two reasons alone. Redis acknowledged a renewal, less than T-W ago counted from its
*creation* (rule 1); or Redis is away, and more than half of the members said so of themselves, less than S ago counted
from the *start* of the question (rule 2). An answer and a lease are facts about different moments, so neither "my lease
is still fresh" nor "most of them are fresh" is among the reasons.

The same machine answers peers that ask (rules 2 and 5), arms and disarms (rule 3), and heeds being taken over (rule 4).
It does nothing by itself: `due` says what is to be done, and the shell (`heartbeat`) says what came of it. All instants
are seconds of the host's CLOCK_BOOTTIME.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from orchestrator.errors import Invalid
from orchestrator.lease import Lease, Membership, Reply, Timing

_NEVER: Final = -math.inf
_BETWEEN_ATTEMPTS_S: Final = 0.05
"""Where Redis refuses connections at once, questions of many peers would make as many attempts."""


class Says(StrEnum):
    """What a member answers a peer that asks whether Redis is away."""

    NONE = "none"
    """An attempt of its own at Redis failed after the question came, whenever it began, and it does not refuse."""
    REDIS = "redis"
    """A renewal of its own succeeded after the question came."""
    REFUSED = "refused"
    """It knows that the asker is suspect, or has not heard from Redis since it was started (rule 5)."""


@dataclass(frozen=True, slots=True)
class Question:
    """A peer asks; see `Says`."""

    asker: str
    nonce: str


# --- what is to be done -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Renew:
    """Send this renewal; it is answered by `renewed` or `not_renewed`."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask these peers, name to address; their answers go to `answered`."""

    nonce: str
    peers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer a peer's question."""

    question: Question
    says: Says


@dataclass(frozen=True, slots=True)
class Open:
    """Open the watchdog and set its timeout, if `may_feed` still; then `opened` or `not_opened`. Opening is a feed."""

    timeout_s: int


@dataclass(frozen=True, slots=True)
class Feed:
    """Feed the watchdog: read the clock, ask `may_feed`, write; then `fed`."""


@dataclass(frozen=True, slots=True)
class Disarm:
    """Close the watchdog so that it stops; then `disarmed`."""


@dataclass(frozen=True, slots=True)
class Tell:
    """Log a transition."""

    event: str
    is_warning: bool = False
    why: str = ""


Effect = Renew | Ask | Answer | Open | Feed | Disarm | Tell


@dataclass(frozen=True, slots=True)
class Identity:
    """Who beats.

    Attributes:
        node: Its name.
        generation: Of this process.
        boot_id: Of the host's boot.
        address: Where peers ask it.
        is_witness: It runs no VMs.
    """

    node: str
    generation: str
    boot_id: str
    address: str = ""
    is_witness: bool = False


@dataclass(slots=True)
class _Poll:
    """One question to all peers.

    Attributes:
        started_at: From when its answers count: rule 2, and trace 6.
        version: Of the membership that was asked. An answer to another one's poll says nothing.
    """

    nonce: str
    started_at: float
    version: int
    peers: Mapping[str, str]
    answers: dict[str, Says] = field(default_factory=dict)


class Heart:
    """One node's heartbeat.

    Args:
        identity: Who beats.
        timing: The node's times.
        has_watchdog: There is one, and the node is to arm it (mode Watchdog).
        failsafe: See `Settings.failsafe`.
    """

    def __init__(self, identity: Identity, timing: Timing, *, has_watchdog: bool, failsafe: bool) -> None:
        self.identity = identity
        self.timing = timing
        self.membership = Membership()
        self.peer_key = ""
        self.suspicions: Mapping[str, str] = {}
        self.is_taken_over = False
        self.is_stopping = False
        self.watchdog = ""
        self._has_watchdog = has_watchdog
        self._failsafe = failsafe
        self._sequence = 0
        self._under_way: Lease | None = None
        self._acknowledged: Lease | None = None
        self._attempted_at = _NEVER
        self._wants_attempt = True
        self._is_without_redis = False
        self._ok_until = _NEVER
        self._failsafe_until = _NEVER
        self._poll: _Poll | None = None
        self._polled_at = _NEVER
        self._questions: dict[Question, float] = {}
        self._device_timeout: int | None = None
        self._is_opening = False
        self._open_at = _NEVER
        self._fed_at = _NEVER
        self._disarm = ""
        self._is_permitted = False
        self._effects: list[Effect] = []

    # --- what it may do ---------------------------------------------------------------------------------------------

    def may_feed(self, now: float) -> bool:
        """Whether the watchdog may be fed at this instant: rules 1 and 2, and nothing else.

        What was taken over is never fed again: its VMs may run elsewhere, and being reset is what it needs.
        """
        return not self.is_taken_over and (now < self._ok_until or now < self._failsafe_until)

    @property
    def is_open(self) -> bool:
        """Whether the watchdog counts, as this process knows."""
        return self._device_timeout is not None

    @property
    def is_armed(self) -> bool:
        """Whether Redis has on record that it counts."""
        return self._acknowledged is not None and self._acknowledged.armed

    @property
    def is_failsafe(self) -> bool:
        """Whether it goes by its peers' word."""
        return self._is_without_redis and self._failsafe_until > self._ok_until

    @property
    def has_stopped(self) -> bool:
        """Whether a planned stop may end the process: nothing counts that would reset the host."""
        return self.is_stopping and not self.is_open and not self._is_opening

    def _wants_armed(self) -> bool:
        """Whether the watchdog is to count. Not before peers can speak for this node: an outage would reset it."""
        is_member = self.identity.node in self.membership.members or not self._failsafe
        is_wanted = self._has_watchdog and not self._disarm and not self.is_stopping
        return is_wanted and is_member and not self.is_taken_over

    def _refuses(self, peer: str) -> bool:
        """Rule 5; traces 4 and 11."""
        return self._acknowledged is None or peer in self.suspicions

    # --- what is due ------------------------------------------------------------------------------------------------

    def due(self, now: float) -> list[Effect]:
        """Say what is to be done now, in this order."""
        self._end_poll(now)
        self._note_permission(now)
        if self.is_open and now >= self._fed_at + self.timing.feed_interval and self.may_feed(now):
            self._effects.append(Feed())
        self._change_watchdog(now)
        self._attempt(now)
        self._begin_poll(now)
        effects, self._effects = self._effects, []
        return effects

    def next_at(self, now: float) -> float:
        """When `due` is to be asked again, if nothing happens before."""
        moments = [now + self.timing.heartbeat]
        if self._under_way is None:
            moments.append(self._next_attempt_at())
        if self.is_open:
            fed_by = self._fed_at + self.timing.feed_interval
            moments.append(fed_by if self.may_feed(max(now, fed_by)) else now + self.timing.feed_interval)
        if self._can_open(now):
            moments.append(self._open_at)
        if self._can_disarm():
            moments.append(now)
        if self._poll is not None:
            moments.append(self._poll.started_at + self.timing.poll_timeout)
        elif self._may_poll():
            moments.append(self._polled_at + self.timing.poll_interval)
        return max(now, min(moments))

    def _note_permission(self, now: float) -> None:
        permitted = self.may_feed(now)
        if self.is_open and permitted != self._is_permitted:
            why = "" if permitted else "Redis does not answer, and too few peers say that they have none either"
            event = "watchdog is fed again" if permitted else "watchdog is not fed: it will reset this host"
            self._tell(event, why=why, is_warning=True)
        self._is_permitted = permitted

    def _change_watchdog(self, now: float) -> None:
        """Arm or disarm. Arming is recorded after it is done, disarming before it is (rule 3)."""
        if self._can_open(now) and now >= self._open_at:
            self._is_opening = True
            self._effects.append(Open(int(self.timing.watchdog_timeout)))
        elif self._can_disarm():
            self._effects.append(Disarm())
        elif self._is_to_be_disarmed() and (self._under_way is None or self._under_way.armed):
            self._wants_attempt = True

    def _can_open(self, now: float) -> bool:
        """Opening feeds. So not before an OK in this process's life, and not by the peers' word.

        Trace 3: a crash loop would keep the host alive for ever.
        """
        is_wanted = self._wants_armed() and not self.is_open and not self._is_opening
        return is_wanted and self._acknowledged is not None and now < self._ok_until

    def _is_to_be_disarmed(self) -> bool:
        return self.is_open and not self._wants_armed() and not self.is_taken_over

    def _can_disarm(self) -> bool:
        return self._is_to_be_disarmed() and self._acknowledged is not None and not self._acknowledged.armed

    # --- renewals ---------------------------------------------------------------------------------------------------

    def _next_attempt_at(self) -> float:
        if self._wants_attempt or self._questions:
            return self._attempted_at + _BETWEEN_ATTEMPTS_S
        is_urgent = self._is_without_redis and not self.is_taken_over
        return self._attempted_at + (self.timing.poll_interval if is_urgent else self.timing.heartbeat)

    def _attempt(self, now: float) -> None:
        if self._under_way is not None or now < self._next_attempt_at():
            return
        self._sequence += 1
        self._wants_attempt = False
        self._attempted_at = now
        self._under_way = Lease(
            self.identity.generation,
            self.identity.boot_id,
            self._sequence,
            now,  # rule 1: stamped when it is created
            self.timing,
            membership=self.membership.version,
            suspicions=tuple(sorted(self.suspicions.values())),
            armed=self.is_open and self._wants_armed(),
            failsafe=self._failsafe,
            watchdog=self.watchdog,
            address=self.identity.address,
            witness=self.identity.is_witness,
        )
        self._effects.append(Renew(self._under_way))

    def renewed(self, lease: Lease, reply: Reply, now: float) -> None:
        """Take the answer to a renewal; one that came too late is none."""
        if lease is not self._under_way:
            return
        self._under_way = None
        self._take_published(reply)
        if self._is_without_redis:
            self._is_without_redis = False
            self._poll = None
            self._tell("Redis answers again")
        if reply.refused:
            self._take_refusal(reply.refused)
            return
        if self.is_taken_over and not self.is_open:
            self.is_taken_over = False  # the control plane took it back as it is: it runs nothing that is outdated
        self._acknowledged = lease
        # By what is on record, and by what the driver counts, whichever is longer.
        w = max(lease.timing.watchdog_timeout, self._device_timeout or 0)
        self._ok_until = max(self._ok_until, lease.created + lease.timing.lease_ttl - w)
        self._answer(Says.REDIS, asked_by=lease.created)
        if self.is_open and lease.armed != self._wants_armed():
            self._wants_attempt = True  # to be on record at once
        self._note_permission(now)

    def _take_published(self, reply: Reply) -> None:
        self.suspicions = dict(reply.suspicions)
        if reply.membership is not None:
            self.membership = reply.membership
        if reply.peer_key is not None:
            self.peer_key = reply.peer_key
        if reply.disarm != self._disarm:
            if self._has_watchdog:
                self._tell("watchdog is to be disarmed" if reply.disarm else "watchdog may be armed", why=reply.disarm)
            self._disarm = reply.disarm

    def _take_refusal(self, refused: str) -> None:
        self._answer(Says.REFUSED)
        if refused == "taken over" and not self.is_taken_over:
            self.is_taken_over = True  # rule 4
            why = "its VMs may run elsewhere; it renews no more until the next boot"
            self._tell("this host was taken over", why=why, is_warning=True)
        elif refused != "taken over":
            self._wants_attempt = True

    def not_renewed(self, lease: Lease, why: str) -> None:
        """Take it that a renewal failed, or was not answered in time. It may have been executed all the same."""
        if lease is not self._under_way:
            return
        self._under_way = None
        if not self._is_without_redis:
            self._is_without_redis = True
            self._tell("lease is not renewed", why=why, is_warning=True)
        self._answer(Says.NONE)

    # --- peers ------------------------------------------------------------------------------------------------------

    def _may_poll(self) -> bool:
        """Rule 2, and 3: failsafe is on record before it is used."""
        return (
            self._is_without_redis
            and self.is_open
            and not self.is_taken_over
            and self._acknowledged is not None
            and self._acknowledged.failsafe
            and self.identity.node in self.membership.members
        )

    def _begin_poll(self, now: float) -> None:
        if self._poll is not None or not self._may_poll() or now < self._polled_at + self.timing.poll_interval:
            return
        peers = {name: at for name, at in self.membership.members.items() if name != self.identity.node}
        self._polled_at = now
        # Unique among all polls of all processes of this node, so that no answer is taken for another poll's.
        nonce = f"{self.identity.generation}-{now:.6f}"
        self._poll = _Poll(nonce, now, self.membership.version, peers)
        self._effects.append(Ask(nonce, peers))

    def answered(self, peer: str, nonce: str, says: Says, now: float) -> None:
        """Take a peer's answer; one to an earlier poll says nothing of now."""
        poll = self._poll
        if poll is None or nonce != poll.nonce or peer not in poll.peers or peer in poll.answers:
            return
        poll.answers[peer] = says
        self._end_poll(now)

    def _end_poll(self, now: float) -> None:
        """Count the votes: when all have answered, or when the time is over."""
        poll = self._poll
        if poll is None:
            return
        if len(poll.answers) < len(poll.peers) and now < poll.started_at + self.timing.poll_timeout:
            return
        self._poll = None
        votes = 1 + sum(says is Says.NONE for says in poll.answers.values())
        if Says.REDIS in poll.answers.values():
            self._wants_attempt = True  # it is there: perhaps for this node, too
        elif poll.version == self.membership.version and self.membership.is_majority(votes):
            was_failsafe = now < self._failsafe_until
            self._failsafe_until = max(self._failsafe_until, poll.started_at + self.timing.poll_validity)
            if not was_failsafe:
                of = len(self.membership.members)
                self._tell("failsafe", why=f"{votes} of {of} members have no Redis", is_warning=True)

    def asked(self, question: Question, now: float) -> None:
        """Take a peer's question. It is answered by the next attempt at Redis that fails, or that begins and succeeds.

        Where nothing answers, an attempt takes its whole timeout. Would an answer wait for one that begins after the
        question, it came after up to two of them: later than the poll that asks, which would find nobody.
        """
        if self._refuses(question.asker):
            self._effects.append(Answer(question, Says.REFUSED))
        else:
            self._questions[question] = now

    def _answer(self, says: Says, *, asked_by: float = math.inf) -> None:
        """Answer what was asked by then, now that the outcome of an attempt is known (rule 2).

        An OK is one after the question only if its renewal was created after it; a failure is, whenever that began.
        """
        for question, asked_at in list(self._questions.items()):
            if asked_at <= asked_by:
                del self._questions[question]
                # Rule 5: looked at when it is answered; the attempt's own reply may have told of a suspicion.
                is_refused = says is Says.NONE and self._refuses(question.asker)
                self._effects.append(Answer(question, Says.REFUSED if is_refused else says))

    # --- the watchdog -----------------------------------------------------------------------------------------------

    def opened(self, timeout_s: int, watchdog: str, now: float) -> None:
        """Take it that the watchdog counts, with the timeout that its driver gives back, which is fed by that."""
        self._is_opening = False
        self._fed_at = now
        self._device_timeout = timeout_s
        self.watchdog = watchdog
        self._is_permitted = True
        if self._acknowledged is not None and timeout_s > self._acknowledged.timing.watchdog_timeout:
            lease = self._acknowledged
            self._ok_until = min(self._ok_until, lease.created + lease.timing.lease_ttl - timeout_s)
        if timeout_s != self.timing.watchdog_timeout:
            timing = replace(self.timing, watchdog_timeout=timeout_s)
            try:
                timing.check()
            except Invalid as error:
                self._has_watchdog = False
                self._tell("watchdog is not used", why=f"its driver gives {timeout_s} s: {error}", is_warning=True)
                return
            self.timing = timing
        self._wants_attempt = True
        self._tell("watchdog is armed", why=f"{watchdog}, {timeout_s} s")

    def not_opened(self, why: str, now: float) -> None:
        """Take it that the watchdog could not be armed, and does not count. It is tried again later."""
        self._is_opening = False
        self._open_at = now + self.timing.lease_ttl
        self._tell("watchdog is not armed", why=why, is_warning=True)

    def fed(self, now: float) -> None:
        """Take it that the watchdog was fed."""
        self._fed_at = now

    def disarmed(self) -> None:
        """Take it that the watchdog stopped."""
        self._device_timeout = None
        self._tell("watchdog is disarmed", why=self._disarm or "the heartbeat ends")

    def stop(self) -> None:
        """Begin a planned stop: once it is on record that nothing counts, the watchdog is disarmed (`has_stopped`)."""
        self.is_stopping = True

    def _tell(self, event: str, *, why: str = "", is_warning: bool = False) -> None:
        self._effects.append(Tell(event, is_warning, why))
