import pytest

from tests.waiting import wait_until


def test_it_gives_what_the_predicate_gave() -> None:
    answers = iter([None, "", "done"])
    assert wait_until(lambda: next(answers), interval=0) == "done"


def test_in_vain_says_what_for_and_how_things_stand() -> None:
    calls: list[int] = []
    with pytest.raises(AssertionError, match=r"waited 0 s in vain for: the guest answers; asked 1 times"):
        wait_until(lambda: calls.append(1), 0, lambda: f"the guest answers; asked {len(calls)} times")


def test_an_error_of_the_predicate_ends_the_wait() -> None:
    def broken() -> bool:
        raise ValueError("no such VM")

    with pytest.raises(ValueError, match="no such VM"):
        wait_until(broken, 60)
