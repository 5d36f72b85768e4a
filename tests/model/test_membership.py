import pytest

from tests.model.membership import Rule, search, search_failover


@pytest.mark.parametrize("rule", ["every-registered-acknowledged", "majority-in-each"])
def test_majorities_share_a_member_under_either_rule_for_changes(rule: Rule) -> None:
    searched = search(rule, sizes=range(2, 6), changes=3)
    assert searched.disjoint is None, searched.disjoint
    assert searched.pairs > 40_000  # a search of nothing finds nothing


def test_asking_only_the_agents_that_live_leaves_out_the_one_that_matters() -> None:
    """Violation 9: v caches {v}, then a and b join; or the membership shrinks while the removed agents run on."""
    searched = search("live-acknowledged", sizes=range(1, 6), changes=3)
    assert searched.disjoint is not None
    assert searched.disjoint.changes == 2
    assert searched.disjoint.cached == {"v"}


def test_likewise_where_it_shrinks() -> None:
    searched = search("live-acknowledged", sizes=range(5, 6), changes=3)
    assert searched.disjoint is not None
    assert not searched.disjoint.feeders & searched.disjoint.voters


def test_a_membership_that_a_failover_loses_is_prepared_first() -> None:
    searched = search_failover(prepared=True, sizes=range(2, 6), changed=3)
    assert searched.disjoint is None
    assert searched.pairs > 1000


def test_one_that_is_lost_after_it_was_read_is_a_double() -> None:
    assert search_failover(prepared=False, sizes=range(2, 6), changed=3).disjoint is not None
