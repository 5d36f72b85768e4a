"""The arithmetic of simulated migrations, against what it stands for."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.hypervisor.simulated_precopy import DOWNTIME_LIMIT_S, Link, Load, Pass, first_pass, next_pass

IDLE = Load(used_mib=1000, working_set_mib=0, dirty_mib_s=0)


def passes(load: Load, link: Link, most: int = 200) -> list[Pass]:
    """All passes up to the last one, or as many as `most`."""
    found = [first_pass(load)]
    while not found[-1].is_last and len(found) < most:
        found.append(next_pass(found[-1], load, link))
    return found


def seconds(found: list[Pass], link: Link) -> float:
    return sum(one.seconds(link) for one in found)


def test_an_idle_guest_takes_as_long_as_its_memory() -> None:
    found = passes(IDLE, Link(100))
    assert [one.mib for one in found] == [1000, 0]
    assert seconds(found, Link(100)) == pytest.approx(10, abs=0.1)


def test_each_pass_sends_what_was_dirtied_in_the_one_before() -> None:
    load = Load(used_mib=1000, working_set_mib=1000, dirty_mib_s=50)
    found = passes(load, Link(100))
    assert [round(one.mib, 1) for one in found] == [1000, 500, 250, 125, 62.5, 31.2, 15.6][: len(found)]
    assert found[-1].mib <= DOWNTIME_LIMIT_S * 100 < found[-2].mib
    assert found[2].dirtied_before_mib_s == pytest.approx(50)
    assert found[-1].sent_before_mib == pytest.approx(sum(one.mib for one in found[:-1]))


def test_a_page_is_sent_once_a_pass_however_often_it_is_written() -> None:
    load = Load(used_mib=1000, working_set_mib=20, dirty_mib_s=1_000_000)
    found = passes(load, Link(100))
    assert [one.mib for one in found] == [1000, 20]


@pytest.mark.parametrize("dirty_mib_s", [101, 150, 1000])
def test_a_guest_that_dirties_faster_than_the_link_never_arrives(dirty_mib_s: float) -> None:
    load = Load(used_mib=1000, working_set_mib=1000, dirty_mib_s=dirty_mib_s)
    assert not passes(load, Link(100))[-1].is_last


def test_auto_converge_slows_a_guest_down_until_it_arrives() -> None:
    load = Load(used_mib=1000, working_set_mib=500, dirty_mib_s=300)
    found = passes(load, Link(100, auto_converge=True))
    assert found[-1].is_last
    throttles = [one.throttle_percent for one in found]
    assert throttles == sorted(throttles)
    steps = [throttle for before, throttle in pairwise(throttles) if throttle != before]
    assert steps == [20, 30, 40, 50, 60, 70, 80, 90][: len(steps)], "as measured: 20, then 10 more each time"
    first = throttles.index(20)
    assert throttles[first : first + 3] == [20, 20, 30], "at every second look"


def test_auto_converge_leaves_a_guest_alone_that_converges() -> None:
    load = Load(used_mib=1000, working_set_mib=500, dirty_mib_s=20)
    assert {one.throttle_percent for one in passes(load, Link(100, auto_converge=True))} == {0}


def test_auto_converge_does_not_help_against_every_guest() -> None:
    load = Load(used_mib=1000, working_set_mib=1000, dirty_mib_s=20_000)
    found = passes(load, Link(100, auto_converge=True))
    assert not found[-1].is_last
    assert found[-1].throttle_percent == 99


def test_a_pass_knows_what_it_has_sent() -> None:
    one = Pass(number=1, mib=100)
    assert [one.sent_mib(Link(10), elapsed) for elapsed in (-1, 0, 4, 10, 99)] == [0, 0, 40, 100, 100]


@given(
    used=st.floats(1, 1e6),
    share=st.floats(0, 1),
    dirty=st.floats(0, 1e5),
    mib_s=st.floats(1, 1e4),
    auto_converge=st.booleans(),
)
def test_no_pass_sends_more_than_the_working_set(
    used: float, share: float, dirty: float, mib_s: float, auto_converge: bool
) -> None:
    load, link = Load(used, used * share, dirty), Link(mib_s, auto_converge)
    found = passes(load, link, most=30)
    for one in found[1:]:
        assert 0 <= one.mib <= load.working_set_mib
        assert 0 <= one.throttle_percent <= 99
    if found[-1].is_last:
        assert found[-1].mib / mib_s <= DOWNTIME_LIMIT_S
