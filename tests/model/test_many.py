import pytest

from orchestrator.lease import PROFILES
from tests.builders import a_lease
from tests.model.many import Rule, first_fenced, stories


def fenced(name: str, *, cut: int = 3, without: Rule = "") -> list[str]:
    lease = a_lease(timing=PROFILES[name])
    at = 3 * lease.timing.heartbeat
    return [
        found
        for phases, away_s, scans_at in stories(lease)
        for moment in (at, at + 0.4 * lease.timing.heartbeat)
        if (found := first_fenced(lease, phases, cut=cut, at=moment, away_s=away_s, scans_at=scans_at, without=without))
    ]


@pytest.mark.parametrize("name", PROFILES)
def test_three_of_five_that_are_cut_off_at_once_keep_their_power(name: str) -> None:
    assert not fenced(name)


def test_a_single_loss_is_fenced() -> None:
    assert fenced("medium", cut=1)


@pytest.mark.parametrize(
    "rule", ["who is late counts", "they are given time to come back", "who was late counts afterwards, too"]
)
def test_each_rule_is_needed(rule: Rule) -> None:
    assert fenced("medium", without=rule)
