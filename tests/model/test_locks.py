import pytest

from tests.model.locks import goes_on, search


def test_after_a_lock_of_the_living_host_was_met_nothing_of_it_is_granted() -> None:
    searched = search()
    assert not searched.way, "\n".join(searched.way)
    assert len(searched.states) == 438  # a model that lost some of its behaviour would be safe as well
    assert not goes_on()


@pytest.mark.parametrize("evidence", ["BMC", "Deadline"])
def test_where_the_host_is_off_both_run_in_the_end(evidence: str) -> None:
    ran = {s.evidence for s in search().states if s.a.stage == s.b.stage == "runs"}
    assert evidence in ran


def test_that_the_storage_lets_a_dead_host_s_lock_go_is_waited_for() -> None:
    assert any(s.a.stage == "runs" and s.a.tries > 0 for s in search().states)


@pytest.mark.parametrize(
    "rule",
    [
        "a grant rests on the evidence",
        "after a deadline a lock contradicts",
        "after a BMC's evidence a lock is stale",
        "of two, the deadline counts",
    ],
)
def test_each_rule_is_needed(rule: str) -> None:
    assert search(rule).way


def test_what_nobody_has_claimed_has_to_be_called_back() -> None:
    assert goes_on("what nobody has claimed is called back")
