"""Hearts against a control plane that keeps to rules 6 to 8: whatever happens, none is taken over while it runs.

`tests/model` checks the rules; this checks that `Heart` keeps to them. Messages are lost or late at random, processes
pause, die between any two effects and are started again, Redis goes away, and clocks run apart. A node runs until its
watchdog has not been fed for W, and L more. Each run is a seed; a failing one is kept by adding it to `KEPT`.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator.lease import Lease, Membership, Reply, Timing
from tests.fast_redis import LeaseTable
from workers.heart import Answer, Ask, Disarm, Feed, Heart, Identity, Open, Question, Renew

KEPT: tuple[int, ...] = ()
RUNS = 30
SECONDS = 90.0
TICK = 0.05
TIMING = Timing(4, 2, 0.5, 1, latency=1.0, drift=0.0)
"""Critical: the shortest, so that most happens in a run."""


@dataclass
class Host:
    """One host: a watchdog, and a process that may be dead, paused, or about to do what it decided."""

    name: str
    generation: int = 0
    heart: Heart | None = None
    pending: deque[Any] = field(default_factory=deque)
    paused_until: float = 0.0
    timeout: float | None = None
    fed_at: float = 0.0
    has_died: bool = False


class World:
    """A herd whose node v may be taken over.

    Args:
        seed: Of all choices.
        size: Members.
        heart: A heart, or one that breaks a rule.
        margin: M, likewise.
        ack_wait: A.
    """

    def __init__(
        self,
        seed: int,
        size: int,
        heart: type[Heart] = Heart,
        margin: float = TIMING.margin,
        ack_wait: float = TIMING.ack_wait,
    ) -> None:
        self.kind, self.margin, self.ack_wait = heart, margin, ack_wait
        self.random = random.Random(seed)
        self.now = 100.0
        names = ["v", *"pqrs"[: size - 1]]
        self.membership = Membership(1, {name: name for name in names}, size)
        self.hosts = {name: Host(name) for name in names}
        self.table = LeaseTable(self.membership)
        self.messages: list[tuple[float, int, Any]] = []
        self.count = 0
        self.redis_back_at = 0.0
        self.cut: dict[str, float] = {}
        self.read: tuple[tuple[str, int], float] | None = None
        self.acked_since: float | None = None
        self.suspicion = ""
        self.taken = False
        self.takeovers = 0
        self.resets = 0
        for host in self.hosts.values():
            self.start(host)

    def start(self, host: Host) -> None:
        host.generation += 1
        identity = Identity(host.name, f"{host.name}-{host.generation}", "boot", host.name)
        host.heart = self.kind(identity, TIMING, has_watchdog=host.name == "v", failsafe=True)
        host.pending.clear()

    def later(self, least: float, most: float, what: Any) -> None:
        self.count += 1
        self.messages.append((self.now + self.random.uniform(least, most), self.count, what))

    # --- time ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while self.now < 100.0 + SECONDS and not self.taken:
            self.now += TICK
            self.faults()
            for message in sorted(m for m in self.messages if m[0] <= self.now):
                self.messages.remove(message)
                message[2]()
            for host in self.hosts.values():
                self.turn(host)
            self.control()

    def faults(self) -> None:
        chance = self.random.random
        if chance() < 0.004:
            self.redis_back_at = self.now + self.random.choice((0.3, 2, 8, 20))
        if chance() < 0.01:
            self.cut[self.random.choice(list(self.hosts))] = self.now + self.random.choice((0.5, 3, 12, 30))
        for host in self.hosts.values():
            # The victim is to live on in most runs: that it dies of its own watchdog shows nothing.
            is_victim = host.name == "v"
            if chance() < 0.004:
                host.paused_until = self.now + self.random.choice((0.2, 0.7, 1.4) if is_victim else (0.2, 1, 2.5, 6))
            if chance() < (0.0003 if is_victim else 0.003) and not host.has_died:
                self.start(host)
        victim = self.hosts["v"]
        if victim.timeout is not None and self.now >= victim.fed_at + victim.timeout + TIMING.latency:
            victim.has_died = True

    def is_cut(self, name: str) -> bool:
        return self.cut.get(name, 0.0) > self.now

    # --- a host -------------------------------------------------------------------------------------------------------

    def turn(self, host: Host) -> None:
        if host.has_died or self.now < host.paused_until or host.heart is None:
            return
        if self.random.random() < 0.1:
            return  # others are on the CPU
        if not host.pending:
            host.pending.extend(host.heart.due(self.now))
        while host.pending:
            effect = host.pending.popleft()
            self.do(host, host.heart, effect)
            if self.random.random() < 0.02:
                return  # interrupted between two effects

    def do(self, host: Host, heart: Heart, effect: Any) -> None:
        match effect:
            case Renew(lease):
                self.renew(host, heart, lease)
            case Ask(nonce, peers):
                for peer in peers:
                    question = Question(host.name, nonce)
                    self.deliver(host.name, peer, lambda h, q=question: h.asked(q, self.now))
            case Answer(question, says):
                nonce = question.nonce
                answerer = host.name
                self.deliver(answerer, question.asker, lambda h, n=nonce, s=says: h.answered(answerer, n, s, self.now))
            case Open(timeout) if heart.may_feed(self.now):
                host.timeout, host.fed_at = timeout, self.now + self.pause_before_write()
                heart.opened(timeout, "test", self.now)
            case Open():
                heart.not_opened("test", self.now)
            case Feed() if heart.may_feed(self.now):
                heart.fed(self.now)
                # Trace 2: paused between the check and the write, it still feeds, if the watchdog has not expired.
                at = self.now + self.pause_before_write()
                if host.timeout is not None and at < host.fed_at + host.timeout:
                    host.fed_at = max(host.fed_at, at)
            case Disarm():
                host.timeout = None
                heart.disarmed()
            case _:
                pass

    def pause_before_write(self) -> float:
        return self.random.choice((0.0, 0.0, 0.0, 0.5, 1.0, 1.9)) if self.random.random() < 0.05 else 0.0

    def deliver(self, source: str, target: str, what: Any) -> None:
        if self.is_cut(source) or self.random.random() < 0.05:
            return

        def arrive() -> None:
            host = self.hosts[target]
            if not self.is_cut(target) and not host.has_died and host.heart is not None:
                what(host.heart)

        self.later(0.001, 0.2, arrive)

    def renew(self, host: Host, heart: Heart, lease: Lease) -> None:
        """Send a renewal: executed, lost, late; its answer likewise."""
        gives_up_at = self.now + TIMING.redis_timeout

        def give_up() -> None:
            if host.heart is heart:
                heart.not_renewed(lease, "test")

        self.later(TIMING.redis_timeout, TIMING.redis_timeout + 0.1, give_up)
        if self.is_cut(host.name) or self.redis_back_at > self.now or self.random.random() < 0.03:
            return

        def execute() -> None:
            if self.redis_back_at > self.now:
                return
            reply = self.table.renew(host.name, lease, heart.membership.version)

            def answer(reply: Reply = reply) -> None:
                if host.heart is heart and not host.has_died and not self.is_cut(host.name) and self.now < gives_up_at:
                    heart.renewed(lease, reply, self.now)

            if self.random.random() > 0.03:
                self.later(0.001, 0.15, answer)

        late = self.random.random() < 0.03  # after its sender gave up, or died
        self.later(*((0.5, 8.0) if late else (0.001, 0.15)), execute)

    # --- the control plane: rules 6 to 8 ------------------------------------------------------------------------------

    def control(self) -> None:
        if self.redis_back_at > self.now:
            return
        lease = self.table.leases.get("v")
        if lease is None:
            return
        if self.read is None or self.read[0] != lease.identity:
            self.read, self.acked_since, self.suspicion = (lease.identity, self.now), None, ""
            self.table.suspicions.pop("v", None)
        unchanged = self.now - self.read[1]
        if not self.suspicion and unchanged >= lease.timing.lease_ttl - lease.timing.watchdog_timeout:
            self.suspicion = f"id-{self.random.random()}"
            self.table.suspicions["v"] = self.suspicion
        acks = [
            name
            for name, found in self.table.leases.items()
            if name != "v" and self.suspicion and self.suspicion in found.suspicions
        ]
        if not self.membership.is_majority(len(acks)):
            self.acked_since = None
        elif self.acked_since is None:
            self.acked_since = self.now
        if (
            lease.armed
            and unchanged >= lease.timing.lease_ttl + self.margin
            and self.acked_since is not None
            and self.now - self.acked_since >= self.ack_wait
        ):
            self.taken = True
            self.takeovers += 1
            assert self.hosts["v"].has_died, f"taken over at {self.now:.2f} while it runs"


@pytest.mark.parametrize("size", [3, 4, 5])
def test_none_is_taken_over_while_it_runs(size: int) -> None:
    takeovers = 0
    for seed in (*KEPT, *range(RUNS)):
        world = World(seed, size)
        try:
            world.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        takeovers += world.takeovers
    assert takeovers > RUNS / 20, "else nothing was tried"


class FeedsAlways(Heart):
    """No rule at all."""

    def may_feed(self, now: float) -> bool:
        return True


class OpensAtOnce(Heart):
    """Rule 3 broken, trace 3: what is started again opens the watchdog, and holds what was acknowledged for good."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._ok_until = float("inf")


class NeedsNoMajority(Heart):
    """Rule 2 broken: any poll permits."""

    def _end_poll(self, now: float) -> None:
        poll = self._poll
        super()._end_poll(now)
        if poll is not None and self._poll is None:
            self._failsafe_until = max(self._failsafe_until, poll.started_at + self.timing.poll_validity)


MUTANTS: dict[str, dict[str, Any]] = {
    "fed always": {"heart": FeedsAlways},
    "permission for ever": {"heart": OpensAtOnce},
    "no majority": {"heart": NeedsNoMajority},
    "waits too short": {"margin": 0.3, "ack_wait": 0.0},
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_found(name: str) -> None:
    """Coarse ones, so that the runs are known to see anything; the fine ones are `tests/model`'s and `test_heart`'s."""
    for seed in range(RUNS):
        try:
            World(seed, 3, **MUTANTS[name]).run()
        except AssertionError:
            return
    raise AssertionError(f"{name}: no run shows it")
