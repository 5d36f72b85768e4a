"""Hearts without Redis: nobody is reset, whether it refuses connections, no packet comes back, or half of them late.

`tests/model/outage.py` checks the times; this checks that `Heart` keeps to them. Nodes and network are healthy; steps
of a process come a little late, as on a busy machine. Each case is a seed.
"""

import heapq
import random
from collections.abc import Callable
from itertools import count

import pytest

from orchestrator.lease import PROFILES, Lease, Membership, Reply, Timing
from workers.heart import Answer, Ask, Disarm, Feed, Heart, Identity, Open, Question, Renew

BUSY_S = 0.03
"""What a process may wait for a CPU."""
OUTAGE_S = 30.0
TIMINGS = {**PROFILES, "of the lab": Timing(6, 3, 1, 2)}


class Outage:
    """Some hosts, and what happens to them from 100 s on. Redis goes away at 120 s, or a little later.

    Args:
        seed: Of all phases and delays.
        kind: Redis's host refuses connections at once; nothing answers; or answers take about the timeout.
        dead: So many hosts are lost together with Redis.
    """

    def __init__(self, timing: Timing, seed: int, size: int, *, kind: str, dead: int = 0) -> None:
        self.timing, self.random, self.kind = timing, random.Random(seed), kind
        self.now, self.events, self.numbers = 100.0, list[tuple[float, int, Callable[[], None]]](), count()
        names = [f"h{number}" for number in range(size)]
        self.membership = Membership(1, {name: name for name in names}, size)
        self.hearts = {
            name: Heart(Identity(name, "g", "b", name), timing, has_watchdog=True, failsafe=True) for name in names
        }
        self.fed = dict.fromkeys(names, 0.0)
        self.gone_at = 120.0 + self.random.uniform(0, 2 * timing.heartbeat)
        self.dead = set(names[:dead])
        for name in names:
            self.after(self.random.uniform(0, timing.heartbeat), lambda name=name: self.turn(name))  # type: ignore[misc]

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.numbers), do))

    def run(self) -> None:
        while self.now < self.gone_at + OUTAGE_S:
            self.now, _, do = heapq.heappop(self.events)
            do()
            for name in self.hearts.keys() - self.dead:
                if self.fed[name]:
                    unfed = self.now - self.fed[name]
                    assert unfed < self.timing.watchdog_timeout, f"{name} is reset at {self.now:.2f}"

    def is_away(self, name: str) -> bool:
        return name in self.dead and self.now >= self.gone_at

    def turn(self, name: str) -> None:
        heart = self.hearts[name]
        if self.is_away(name):
            return
        for effect in heart.due(self.now):
            self.do(name, heart, effect)
        again = max(heart.next_at(self.now), self.now + 0.001) - self.now
        self.after(again + self.random.uniform(0, BUSY_S), lambda: self.turn(name))

    def told(self, name: str, what: Callable[[Heart], None], least: float, most: float) -> None:
        """Something reaches a heart, which then looks what is due."""

        def arrive() -> None:
            if not self.is_away(name):
                heart = self.hearts[name]
                what(heart)
                for effect in heart.due(self.now):
                    self.do(name, heart, effect)

        self.after(self.random.uniform(least, most), arrive)

    def do(self, name: str, heart: Heart, effect: object) -> None:
        match effect:
            case Renew(lease):
                self.renew(name, lease)
            case Ask(nonce, peers):
                for peer in peers:
                    question = Question(name, nonce)
                    self.told(peer, lambda h, q=question: h.asked(q, self.now), 0.001, BUSY_S)  # type: ignore[misc]
            case Answer(question, says):

                def answered(h: Heart) -> None:
                    h.answered(name, question.nonce, says, self.now)

                self.told(question.asker, answered, 0.001, BUSY_S)
            case Open(timeout):
                self.fed[name] = self.now
                heart.opened(timeout, "test", self.now)
            case Feed() if heart.may_feed(self.now):
                self.fed[name] = self.now
                heart.fed(self.now)
            case Disarm():
                raise AssertionError("nobody asked for that")
            case _:
                pass

    def renew(self, name: str, lease: Lease) -> None:
        timeout_s = self.timing.redis_timeout
        takes_s = 0.001 if self.now < self.gone_at else self.random.uniform(0.5, 1.5) * timeout_s
        if self.now < self.gone_at or (self.kind == "slow" and takes_s < timeout_s):
            reply = Reply(membership=self.membership)
            self.told(name, lambda h: h.renewed(lease, reply, self.now), takes_s, takes_s + 0.02)
        else:
            gives_up_s = 0.001 if self.kind == "refused" else timeout_s
            self.told(name, lambda h: h.not_renewed(lease, "test"), gives_up_s, gives_up_s + BUSY_S)


@pytest.mark.parametrize("profile", TIMINGS)
@pytest.mark.parametrize("kind", ["refused", "no answer", "slow"])
@pytest.mark.parametrize(("size", "dead"), [(3, 0), (4, 0), (5, 2)])
def test_nobody_is_reset(profile: str, size: int, dead: int, kind: str) -> None:
    for seed in range(3):
        try:
            Outage(TIMINGS[profile], seed, size, kind=kind, dead=dead).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
