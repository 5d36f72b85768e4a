"""The state machine of a heartbeat, rule by rule (TAKEOVER.md)."""

import itertools
from dataclasses import dataclass, field, replace

import pytest

from orchestrator.lease import PROFILES, Lease, Membership, Reply, Timing
from workers.heart import Answer, Ask, Disarm, Effect, Feed, Heart, Identity, Open, Question, Renew, Says, Tell

MEDIUM = PROFILES["medium"]  # T 10, W 5, H 2, S 2
MEMBERS = Membership(1, {name: f"{name}:1" for name in ("v", "p", "q")})


@dataclass
class Rig:
    """A heart, with a watchdog of which is kept what was done to it."""

    heart: Heart
    now: float = 100.0
    done: list[Effect] = field(default_factory=list)
    driver_timeout: int | None = None
    fed: list[float] = field(default_factory=list)
    is_open: bool = False
    sent: Lease | None = None

    def step(self) -> list[Effect]:
        """Do what is due, but for renewals and questions, which a test answers itself."""
        effects = self.heart.due(self.now)
        for effect in effects:
            match effect:
                case Open(timeout) if self.heart.may_feed(self.now):
                    self.is_open = True
                    self.fed.append(self.now)
                    self.heart.opened(self.driver_timeout or timeout, "test", self.now)
                case Feed() if self.heart.may_feed(self.now):
                    self.fed.append(self.now)
                    self.heart.fed(self.now)
                case Disarm():
                    self.is_open = False
                    self.heart.disarmed()
                case Renew(lease):
                    self.sent = lease
                case _:
                    pass
        self.done += effects
        return effects

    def renewal(self) -> Lease:
        """Let time pass until a renewal is sent, unless one is under way."""
        for _ in range(10_000):
            if self.sent is None:
                self.step()
            if self.sent is not None:
                lease, self.sent = self.sent, None
                return lease
            self.now = max(self.now + 0.001, self.heart.next_at(self.now))
        raise AssertionError("no renewal comes")

    def ok(self, reply: Reply | None = None, after: float = 0.01) -> Lease:
        """Let the next renewal be acknowledged."""
        lease = self.renewal()
        self.now += after
        self.heart.renewed(lease, reply or Reply(), self.now)
        return lease

    def fail(self) -> Lease:
        """Let the next renewal fail."""
        lease = self.renewal()
        self.now += 0.01
        self.heart.not_renewed(lease, "test")
        return lease

    def until(self, at: float, *, redis: bool = False) -> None:
        """Let time pass; renewals fail unless `redis`."""
        while self.now < at:
            for effect in self.step():
                if isinstance(effect, Renew):
                    self.sent = None
                    if redis:
                        self.heart.renewed(effect.lease, Reply(), self.now)
                    else:
                        self.heart.not_renewed(effect.lease, "test")
            self.now = min(at, max(self.now + 0.001, self.heart.next_at(self.now)))

    def arm(self) -> Lease:
        """Bring it to where its watchdog is armed, and that is on record."""
        self.ok(Reply(membership=MEMBERS))
        assert self.ok().armed
        assert self.heart.is_armed
        return self.ok()

    def question(self) -> Ask:
        """Let time pass, without Redis, until it asks its peers."""
        for _ in range(1000):
            for effect in self.step():
                if isinstance(effect, Ask):
                    return effect
                if isinstance(effect, Renew):
                    self.sent = None
                    self.heart.not_renewed(effect.lease, "test")
            self.now = max(self.now + 0.001, self.heart.next_at(self.now))
        raise AssertionError("it does not ask")

    def told(self) -> list[str]:
        return [effect.event for effect in self.done if isinstance(effect, Tell)]


def a_rig(
    timing: Timing = MEDIUM, *, node: str = "v", has_watchdog: bool = True, failsafe: bool = True, now: float = 100.0
) -> Rig:
    return Rig(Heart(Identity(node, "g", "b"), timing, has_watchdog=has_watchdog, failsafe=failsafe), now)


class TestRenewals:
    def test_one_each_heartbeat(self) -> None:
        rig = a_rig()
        created = [rig.ok().created for _ in range(5)]
        assert [b - a for a, b in itertools.pairwise(created)] == pytest.approx([2, 2, 2, 2])

    def test_sequences_grow(self) -> None:
        rig = a_rig()
        assert [rig.ok().sequence, rig.fail().sequence, rig.ok().sequence] == [1, 2, 3]

    def test_one_at_a_time(self) -> None:
        rig = a_rig()
        rig.renewal()
        rig.now += 100
        assert not [effect for effect in rig.step() if isinstance(effect, Renew)]

    def test_more_often_while_redis_is_away(self) -> None:
        rig = a_rig()
        rig.ok()
        created = [rig.fail().created for _ in range(3)]
        assert created[2] - created[1] == pytest.approx(MEDIUM.poll_interval)

    def test_an_answer_that_comes_too_late_is_none(self) -> None:
        rig = a_rig()
        rig.arm()
        late = rig.fail()
        before = rig.heart.may_feed(late.created + 4.99)
        rig.heart.renewed(late, Reply(suspicions={"p": "x"}), rig.now)
        assert not before
        assert not rig.heart.may_feed(late.created + 4.99)
        assert rig.heart.suspicions == {}

    def test_what_the_node_holds_is_in_the_next_one(self) -> None:
        rig = a_rig()
        rig.ok(Reply(membership=MEMBERS, suspicions={"p": "id-p", "q": "id-q"}))
        lease = rig.ok(Reply(suspicions={"q": "id-q"}))
        assert (lease.membership, lease.suspicions) == (1, ("id-p", "id-q"))
        assert rig.ok().suspicions == ("id-q",)


class TestRule1:
    """An OK gives permission until created + (T-W)."""

    def test_counted_from_its_creation_not_from_its_answer(self) -> None:
        rig = a_rig()
        rig.arm()
        lease = rig.ok(after=0.4)
        assert rig.heart.may_feed(lease.created + 4.999)
        assert not rig.heart.may_feed(lease.created + 5)

    def test_no_permission_before_the_first(self) -> None:
        rig = a_rig()
        rig.renewal()
        assert not rig.heart.may_feed(rig.now)

    def test_it_is_fed_until_then_and_no_longer(self) -> None:
        rig = a_rig()
        last = rig.arm()
        rig.until(last.created + 60)
        assert last.created + 5 - 2 * MEDIUM.feed_interval < rig.fed[-1] < last.created + 5
        assert "watchdog is not fed: it will reset this host" in rig.told()

    def test_it_is_fed_often_enough_while_redis_answers(self) -> None:
        rig = a_rig()
        rig.arm()
        rig.until(rig.now + 60, redis=True)
        gaps = [b - a for a, b in zip(rig.fed, rig.fed[1:], strict=False)]
        assert max(gaps) <= MEDIUM.feed_interval + 0.01


class TestRule2:
    """Failsafe."""

    @pytest.mark.parametrize(
        ("answers", "permitted"),
        [
            ({"p": Says.NONE}, True),
            ({"p": Says.NONE, "q": Says.NONE}, True),
            ({"p": Says.NONE, "q": Says.REFUSED}, True),
            ({"p": Says.NONE, "q": Says.REDIS}, False),
            ({"p": Says.REFUSED, "q": Says.REFUSED}, False),
            ({"p": Says.REFUSED}, False),
            ({}, False),
        ],
    )
    def test_more_than_half_with_itself_and_none_that_has_redis(
        self, answers: dict[str, Says], permitted: bool
    ) -> None:
        rig = a_rig()
        rig.arm()
        rig.until(rig.now + 5.5)
        assert not rig.heart.may_feed(rig.now)
        ask = rig.question()
        for peer, says in answers.items():
            rig.heart.answered(peer, ask.nonce, says, rig.now)
        rig.now += MEDIUM.poll_timeout
        rig.step()
        assert rig.heart.may_feed(rig.now) is permitted

    def test_two_of_four_are_not_enough(self) -> None:
        rig = a_rig()
        rig.ok(Reply(membership=Membership(1, dict.fromkeys("vpqr", "x:1"))))
        rig.ok()
        rig.until(rig.now + 5.5)
        ask = rig.question()
        rig.heart.answered("p", ask.nonce, Says.NONE, rig.now)
        rig.now += MEDIUM.poll_timeout
        rig.step()
        assert not rig.heart.may_feed(rig.now)

    def test_counted_from_the_start_of_the_poll(self) -> None:
        """Trace 6."""
        rig = a_rig()
        rig.arm()
        rig.until(rig.now + 5.5)
        ask = rig.question()
        started = rig.now
        rig.now += 0.3
        rig.heart.answered("p", ask.nonce, Says.NONE, rig.now)
        rig.heart.answered("q", ask.nonce, Says.NONE, rig.now)
        assert rig.heart.may_feed(started + 1.999)
        assert not rig.heart.may_feed(started + 2)

    def test_an_answer_to_an_earlier_poll_says_nothing(self) -> None:
        rig = a_rig()
        rig.arm()
        rig.until(rig.now + 5.5)
        earlier = rig.question()
        rig.now += MEDIUM.poll_timeout
        later = rig.question()
        assert earlier.nonce != later.nonce
        for peer in ("p", "q"):
            rig.heart.answered(peer, earlier.nonce, Says.NONE, rig.now)
        assert not rig.heart.may_feed(rig.now)

    def test_strangers_do_not_vote_and_nobody_votes_twice(self) -> None:
        rig = a_rig()
        rig.ok(Reply(membership=Membership(1, dict.fromkeys("vpqrs", "x:1"))))
        rig.ok()
        rig.until(rig.now + 5.5)
        ask = rig.question()
        for peer in ("p", "p", "stranger", "v"):
            rig.heart.answered(peer, ask.nonce, Says.NONE, rig.now)
        rig.now += MEDIUM.poll_timeout
        rig.step()
        assert not rig.heart.may_feed(rig.now)

    def test_a_peer_that_has_redis_makes_it_try_again_at_once(self) -> None:
        rig = a_rig()
        rig.arm()
        rig.until(rig.now + 5.5)
        ask = rig.question()
        for peer in ("p", "q"):
            rig.heart.answered(peer, ask.nonce, Says.REDIS, rig.now)
        rig.now += 0.06
        assert [effect for effect in rig.step() if isinstance(effect, Renew)]

    def test_it_is_not_asked_for_while_redis_answers(self) -> None:
        rig = a_rig()
        rig.arm()
        rig.until(rig.now + 30, redis=True)
        assert not [effect for effect in rig.done if isinstance(effect, Ask)]

    def test_off_it_is_never_asked_for(self) -> None:
        rig = a_rig(failsafe=False)
        rig.arm()
        rig.until(rig.now + 30)
        assert not [effect for effect in rig.done if isinstance(effect, Ask)]
        assert not any(effect.lease.failsafe for effect in rig.done if isinstance(effect, Renew))

    def test_an_outage_is_outlived_for_as_long_as_it_lasts(self) -> None:
        rig = a_rig()
        rig.arm()
        end = rig.now + 300
        while rig.now < end:
            for effect in rig.step():
                if isinstance(effect, Renew):
                    rig.heart.not_renewed(effect.lease, "test")
                if isinstance(effect, Ask):
                    for peer in effect.peers:
                        rig.heart.answered(peer, effect.nonce, Says.NONE, rig.now + 0.1)
            rig.now = max(rig.now + 0.001, rig.heart.next_at(rig.now))
        gaps = [b - a for a, b in zip(rig.fed, rig.fed[1:], strict=False)]
        assert max(gaps) < 5
        assert rig.told().count("failsafe") == 1


class TestRule3:
    """Opening, arming, disarming."""

    def test_never_opened_before_an_ok_in_this_life(self) -> None:
        rig = a_rig()
        rig.until(rig.now + 30)
        assert not rig.is_open
        rig.ok(Reply(membership=MEMBERS))
        rig.step()
        assert rig.is_open

    def test_nor_by_an_ok_that_is_too_old(self) -> None:
        rig = a_rig()
        lease = rig.renewal()
        rig.now += 5
        rig.heart.renewed(lease, Reply(membership=MEMBERS), rig.now)
        assert not [effect for effect in rig.step() if isinstance(effect, Open)]

    def test_not_before_peers_can_speak_for_it(self) -> None:
        rig = a_rig()
        rig.until(rig.now + 30, redis=True)
        assert not rig.is_open
        rig.ok(Reply(membership=MEMBERS))
        assert rig.ok().armed

    def test_arming_is_recorded_after_it_is_done(self) -> None:
        rig = a_rig()
        assert not rig.ok(Reply(membership=MEMBERS)).armed
        lease = rig.ok()
        assert rig.is_open
        assert lease.armed
        assert lease.watchdog == "test"

    def test_and_at_once(self) -> None:
        rig = a_rig()
        first = rig.ok(Reply(membership=MEMBERS))
        assert rig.renewal().created - first.created < 0.2

    def test_disarming_is_recorded_before_it_is_done(self) -> None:
        rig = a_rig()
        rig.arm()
        rig.ok(Reply(disarm="maintenance"))
        lease = rig.renewal()
        assert (lease.armed, rig.is_open) == (False, True)
        rig.heart.renewed(lease, Reply(disarm="maintenance"), rig.now)
        rig.step()
        assert not rig.is_open
        assert rig.ok().armed is False

    def test_what_is_not_acknowledged_is_not_disarmed(self) -> None:
        rig = a_rig()
        rig.arm()
        rig.ok(Reply(disarm="maintenance"))
        assert not rig.fail().armed
        rig.until(rig.now + 3)
        assert rig.is_open

    def test_it_is_armed_again_when_the_word_is_taken_back(self) -> None:
        rig = a_rig()
        rig.arm()
        for _ in range(3):
            rig.ok(Reply(disarm="maintenance"))
        assert not rig.is_open
        rig.ok(Reply())
        assert rig.ok().armed

    def test_a_planned_stop_ends_disarmed(self) -> None:
        rig = a_rig()
        rig.arm()
        rig.heart.stop()
        lease = rig.ok()
        assert not lease.armed
        rig.step()
        assert (rig.is_open, rig.heart.has_stopped) == (False, True)

    def test_without_redis_a_planned_stop_waits_and_feeds(self) -> None:
        rig = a_rig()
        rig.arm()
        rig.heart.stop()
        before = len(rig.fed)
        rig.until(rig.now + 4)
        assert not rig.heart.has_stopped
        assert len(rig.fed) > before

    def test_without_a_watchdog_it_stops_at_once(self) -> None:
        rig = a_rig(has_watchdog=False)
        rig.ok(Reply(membership=MEMBERS))
        rig.heart.stop()
        assert rig.heart.has_stopped
        assert not [effect for effect in rig.done if isinstance(effect, Open)]

    def test_a_driver_with_a_timeout_of_its_own_is_recorded_with_that(self) -> None:
        rig = a_rig()
        rig.driver_timeout = 6
        rig.ok(Reply(membership=MEMBERS))
        lease = rig.ok()
        assert lease.timing == replace(MEDIUM, watchdog_timeout=6)
        assert not rig.heart.may_feed(lease.created + 4), "T-W is shorter now"

    def test_one_that_breaks_an_inequality_is_closed_and_never_recorded(self) -> None:
        rig = a_rig()
        rig.driver_timeout = 60
        rig.ok(Reply(membership=MEMBERS))
        rig.until(rig.now + 5, redis=True)
        assert not rig.is_open
        assert not any(effect.lease.armed for effect in rig.done if isinstance(effect, Renew))
        assert "watchdog is not used" in rig.told()

    def test_one_that_does_not_open_is_tried_again_later(self) -> None:
        rig = a_rig()
        rig.ok(Reply(membership=MEMBERS))
        tries = []
        end = rig.now + 25
        while rig.now < end:
            for effect in rig.heart.due(rig.now):
                if isinstance(effect, Open):
                    tries.append(rig.now)
                    rig.heart.not_opened("busy", rig.now)
                if isinstance(effect, Renew):
                    assert not effect.lease.armed
                    rig.heart.renewed(effect.lease, Reply(), rig.now)
            rig.now = max(rig.now + 0.001, rig.heart.next_at(rig.now))
        assert len(tries) in {2, 3}


class TestRule4:
    """What was taken over."""

    def test_it_is_never_fed_again(self) -> None:
        rig = a_rig()
        rig.arm()
        lease = rig.renewal()
        rig.heart.renewed(lease, Reply(refused="taken over"), rig.now)
        assert not rig.heart.may_feed(rig.now)
        fed = len(rig.fed)
        rig.until(rig.now + 30, redis=True)
        assert len(rig.fed) == fed
        assert rig.is_open, "and not disarmed: being reset is what it needs"
        assert "this host was taken over" in rig.told()

    def test_nor_does_it_ask_its_peers(self) -> None:
        rig = a_rig()
        rig.arm()
        rig.heart.renewed(rig.renewal(), Reply(refused="taken over"), rig.now)
        rig.until(rig.now + 30)
        assert not [effect for effect in rig.done if isinstance(effect, Ask)]

    def test_an_outdated_renewal_gives_no_permission(self) -> None:
        rig = a_rig()
        rig.heart.renewed(rig.renewal(), Reply(refused="outdated", membership=MEMBERS), rig.now)
        assert not rig.heart.may_feed(rig.now)
        assert not [effect for effect in rig.step() if isinstance(effect, Open)]


class TestRule5:
    """What it answers peers."""

    def asked(self, rig: Rig, asker: str = "q") -> Question:
        question = Question(asker, "n-1")
        rig.heart.asked(question, rig.now)
        return question

    def answers(self, rig: Rig) -> list[Says]:
        return [effect.says for effect in rig.step() if isinstance(effect, Answer)]

    def test_no_redis_once_an_attempt_after_the_question_failed(self) -> None:
        rig = a_rig(node="p")
        rig.ok()
        rig.fail()
        self.asked(rig)
        assert self.answers(rig) == [], "the failure before it says nothing"
        rig.fail()
        assert self.answers(rig) == [Says.NONE]

    def test_so_says_one_that_was_under_way_and_failed(self) -> None:
        """Without packets from Redis attempts follow each other, and a poll does not wait for two of them."""
        rig = a_rig(node="p")
        rig.ok()
        lease = rig.renewal()
        rig.now += 0.2
        self.asked(rig)
        rig.heart.not_renewed(lease, "test")
        assert self.answers(rig) == [Says.NONE]

    def test_one_that_was_under_way_and_succeeded_says_nothing(self) -> None:
        rig = a_rig(node="p")
        rig.ok()
        lease = rig.renewal()
        rig.now += 0.2
        self.asked(rig)
        rig.heart.renewed(lease, Reply(), rig.now)
        assert self.answers(rig) == []
        rig.ok()
        assert self.answers(rig) == [Says.REDIS]

    def test_redis_once_one_after_the_question_succeeded(self) -> None:
        rig = a_rig(node="p")
        rig.ok()
        self.asked(rig)
        rig.ok()
        assert self.answers(rig) == [Says.REDIS]

    def test_a_question_is_answered_soon(self) -> None:
        rig = a_rig(node="p")
        rig.ok()
        self.asked(rig)
        at = rig.now
        assert rig.renewal().created - at <= 0.06

    def test_suspects_are_refused_until_a_reply_no_longer_lists_them(self) -> None:
        rig = a_rig(node="p")
        rig.ok(Reply(suspicions={"q": "id"}))
        rig.fail()
        self.asked(rig)
        assert self.answers(rig) == [Says.REFUSED]
        self.asked(rig, "r")
        rig.fail()
        assert self.answers(rig) == [Says.NONE]
        rig.ok(Reply())
        self.asked(rig)
        rig.fail()
        assert self.answers(rig) == [Says.NONE]

    def test_a_suspicion_that_is_learnt_meanwhile_counts(self) -> None:
        rig = a_rig(node="p")
        rig.ok()
        early = rig.renewal()
        rig.now += 0.1
        self.asked(rig)
        rig.heart.renewed(early, Reply(suspicions={"q": "id"}), rig.now)
        rig.fail()
        assert self.answers(rig) == [Says.REFUSED]

    def test_after_a_restart_nobody_is_supported_until_redis_replied(self) -> None:
        rig = a_rig(node="p")
        rig.fail()
        self.asked(rig)
        assert self.answers(rig) == [Says.REFUSED]
