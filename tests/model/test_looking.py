import pytest

from tests.model.looking import Host, reaches, search


@pytest.mark.parametrize("reach", [*reaches()])
def test_who_lives_is_not_cut_and_who_does_not_is_not_taken_for_alive(reach: tuple[bool, ...]) -> None:
    searched = search(reach=reach)
    assert not searched.wrong, "\n".join((*searched.way, searched.wrong))
    assert len(searched.states) > 500  # a search of nothing finds nothing
    assert any(state.is_fenced for state in searched.states)


def test_one_that_lives_and_is_seen_stays() -> None:
    searched = search(reach=(True, False))
    assert any(s.host is Host.LIVES and s.attempts == 2 and not s.attempt and not s.is_fenced for s in searched.states)


@pytest.mark.parametrize(
    "rule",
    [
        "one that sees it is enough",
        "an answer is to this attempt's question",
        "a question counts once",
        "a host that shows no guest is not alive",
        "the port decides where no agent can say",
    ],
)
def test_each_rule_is_needed(rule: str) -> None:
    assert search(reach=(True, False), without=rule).wrong
