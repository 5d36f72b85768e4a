"""Liveness: an outage of Redis resets nobody, at any phases of the heartbeats (TAKEOVER.md, "Liveness").

The other model says that nothing bad happens; this one that something good goes on. Nodes and network are healthy;
Redis is up in given windows and down else. Each agent does what the rules say, in steps of 0.05 s: it renews, gives a
renewal up after the timeout, polls, counts the answers, feeds. One that is not fed for W is reset.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product

STEP_S = 0.05


@dataclass(frozen=True, slots=True)
class Profile:
    """T, W, H of DESIGN.md, seconds; the other times follow from them as the agent has them."""

    lease_ttl: float
    watchdog_timeout: float
    heartbeat: float
    round_trip: float = 0.1

    @property
    def redis_timeout(self) -> float:
        """After so long a renewal is given up."""
        return min(0.5, self.heartbeat / 2)

    @property
    def poll_interval(self) -> float:
        """Between two polls."""
        return self.redis_timeout

    @property
    def poll_lasts(self) -> float:
        """S."""
        return 2 * self.poll_interval + self.round_trip

    @property
    def feed_interval(self) -> float:
        """Between two feeds."""
        return self.watchdog_timeout / 4


PROFILES = {
    "critical": Profile(4, 2, 0.5),
    "medium": Profile(10, 5, 2),
    "moderate": Profile(30, 10, 5),
    "slow": Profile(60, 20, 10),
}


@dataclass(slots=True)
class _Agent:
    phase: int
    """Steps from the beginning to its first heartbeat."""
    permit_from: int = 0
    failsafe_from: int = -(10**9)
    fed_at: int = 0
    gives_up_at: int | None = None
    """When the renewal under way is given up; None while the last one succeeded."""
    has_redis: bool = True
    polls_at: int = 0
    polls: list[int] = field(default_factory=list)
    """Starts of polls that are not answered yet."""
    suspects: frozenset[int] = frozenset()


def first_reset(
    profile: Profile,
    phases: Iterable[float],
    windows: Iterable[tuple[float, float]],
    *,
    until: float,
    waits_for_majority: bool = True,
    margin: float = 0,
) -> str:
    """Run some healthy nodes through an outage.

    Args:
        phases: One a node: seconds from the beginning to its first heartbeat.
        windows: When Redis is up, seconds.
        until: When to stop looking.
        waits_for_majority: Rule 6: nobody is suspected before more than half of the leases were fresh for T + margin.
            False is the mutant that went wrong.
        margin: M.

    Returns:
        Which node was reset when, or an empty string.
    """
    steps = _Steps(profile)
    agents = [_Agent(round(phase / STEP_S)) for phase in phases]
    up = [(round(begin / STEP_S), round(end / STEP_S)) for begin, end in windows]
    majority_since: int | None = 0
    for now in range(round(until / STEP_S)):
        is_up = any(begin <= now < end for begin, end in up)
        suspects: frozenset[int] = frozenset()
        if is_up:
            fresh = sum(now - agent.permit_from < steps.lease_ttl for agent in agents)
            if 2 * fresh <= len(agents):
                majority_since = None
            elif majority_since is None:
                majority_since = now
            waited = majority_since is not None and now - majority_since >= steps.lease_ttl + round(margin / STEP_S)
            if waited or not waits_for_majority:
                suspects = frozenset(i for i, a in enumerate(agents) if now - a.permit_from >= steps.lease_ttl)
        for number, agent in enumerate(agents):
            _renew(agent, now, steps, suspects - {number} if is_up else None)
            _poll(agents, number, now, steps, is_up=is_up)
            may_feed = now - agent.permit_from < steps.permission or now - agent.failsafe_from < steps.poll_lasts
            if may_feed and now - agent.fed_at >= steps.feed_interval:
                agent.fed_at = now
            if now - agent.fed_at > steps.watchdog_timeout:
                return f"node {number} was reset at {now * STEP_S:.2f} s"
    return ""


class _Steps:
    """A profile's times in steps."""

    def __init__(self, profile: Profile) -> None:
        def steps(seconds: float) -> int:
            return max(1, round(seconds / STEP_S))

        self.lease_ttl = steps(profile.lease_ttl)
        self.watchdog_timeout = steps(profile.watchdog_timeout)
        self.permission = self.lease_ttl - self.watchdog_timeout
        self.heartbeat = steps(profile.heartbeat)
        self.redis_timeout = steps(profile.redis_timeout)
        self.poll_interval = steps(profile.poll_interval)
        self.poll_lasts = steps(profile.poll_lasts)
        self.feed_interval = steps(profile.feed_interval)
        self.round_trip = steps(profile.round_trip)


def _renew(agent: _Agent, now: int, steps: _Steps, reply: frozenset[int] | None) -> None:
    """Renew at each heartbeat. `reply`: the suspects of which Redis's reply tells; None: there is no Redis."""
    if now >= agent.phase and (now - agent.phase) % steps.heartbeat == 0:
        if reply is not None:
            agent.permit_from, agent.has_redis, agent.gives_up_at, agent.suspects = now, True, None, reply
        elif agent.gives_up_at is None:
            agent.gives_up_at = now + steps.redis_timeout
    if agent.gives_up_at is not None and now >= agent.gives_up_at:
        agent.has_redis, agent.gives_up_at = False, None


def _poll(agents: list[_Agent], number: int, now: int, steps: _Steps, *, is_up: bool) -> None:
    """Ask the peers when there is no Redis; answers come after a round trip and count from the poll's start.

    A peer asked whether it has Redis tries a renewal of its own, and answers when that has ended.
    """
    agent = agents[number]
    if not agent.has_redis and now >= agent.polls_at:
        agent.polls_at = now + steps.poll_interval
        peers = [peer for i, peer in enumerate(agents) if i != number]
        if not is_up:
            supporters = sum(number not in peer.suspects for peer in peers)
            slowest = 0 if all(not peer.has_redis for peer in peers) else steps.redis_timeout
            if 2 * (1 + supporters) > len(agents):
                agent.polls.append(now)
                agent.polls_at = now + max(steps.poll_interval, slowest)
    while agent.polls and now >= agent.polls[0] + steps.round_trip:
        agent.failsafe_from = max(agent.failsafe_from, agent.polls.pop(0))


def phases_of(profile: Profile, nodes: int) -> Iterable[tuple[float, ...]]:
    """Give heartbeats of some nodes, spread over one period in every way that differs much."""
    shares = (0.0, 0.3, 0.6, 0.9)
    return ((0.0, *(profile.heartbeat * s for s in chosen)) for chosen in product(shares, repeat=nodes - 1))
