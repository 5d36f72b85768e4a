"""When a migration has had its time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.deadlines import Deadline, Deadlines
from workers.hypervisor.port import Job

BEGUN = 1000.0


def a_job(elapsed_s: float, left: int, total: int = 100) -> Job:
    return Job(elapsed_ms=int(elapsed_s * 1000), total_bytes=total, remaining_bytes=left)


def test_the_time_in_all() -> None:
    deadlines = Deadlines(40, 0, BEGUN)
    for second in range(40):
        deadlines.look(a_job(second, 100 - second), BEGUN + second)
        assert deadlines.reached(BEGUN + second) is None
    assert deadlines.reached(BEGUN + 40) is Deadline.COMPLETION
    assert deadlines.elapsed_s(BEGUN + 40) == 40


def test_it_is_the_jobs_own_time_that_counts_for_one_that_was_found() -> None:
    deadlines = Deadlines(40, 0, BEGUN)
    deadlines.look(a_job(35, 50), BEGUN)
    assert deadlines.reached(BEGUN + 4.9) is None
    assert deadlines.reached(BEGUN + 5) is Deadline.COMPLETION  # also if the hypervisor has not answered since


def test_a_job_that_is_slow_to_begin_has_no_more_time() -> None:
    """The job's clock begins with the job; ours begins with the call."""
    deadlines = Deadlines(40, 0, BEGUN)
    deadlines.look(a_job(0, 0, total=0), BEGUN + 30)
    assert deadlines.reached(BEGUN + 40) is Deadline.COMPLETION


@pytest.mark.parametrize("left", [[50] * 20, list(range(50, 70))], ids=["stands", "grows"])
def test_without_any_decrease(left: list[int]) -> None:
    deadlines = Deadlines(0, 15, BEGUN)
    for second, bytes_left in enumerate(left):
        deadlines.look(a_job(second, bytes_left), BEGUN + second)
        assert deadlines.reached(BEGUN + second) is (Deadline.PROGRESS if second >= 15 else None)


def test_one_decrease_begins_it_anew_though_it_is_no_new_minimum() -> None:
    """A pass of a busy guest: what is left jumps up, and shrinks again."""
    deadlines = Deadlines(0, 15, BEGUN)
    at = BEGUN
    for lap in range(5):
        for left in (30, 90, *([95] * 12), 94):
            deadlines.look(a_job(at - BEGUN, left), at)
            assert deadlines.reached(at) is None, lap
            at += 1
    assert deadlines.stalled_s(at) == at - BEGUN  # since the first 30


def test_what_is_being_set_up_is_no_progress() -> None:
    deadlines = Deadlines(0, 15, BEGUN)
    for second in range(20):
        deadlines.look(a_job(second, 0, total=0), BEGUN + second)
    assert deadlines.reached(BEGUN + 15) is Deadline.PROGRESS
    assert deadlines.stalled_s(BEGUN + 19) == 0  # and nothing that does not converge


def test_no_deadline_is_never_reached() -> None:
    deadlines = Deadlines(0, 0, BEGUN)
    deadlines.look(a_job(10**6, 100), BEGUN)
    assert deadlines.reached(BEGUN + 10**9) is None


@given(st.lists(st.integers(0, 100), min_size=1, max_size=60), st.integers(1, 20))
def test_the_progress_deadline_is_reached_just_when_nothing_shrank_for_so_long(left: list[int], limit: int) -> None:
    deadlines = Deadlines(0, limit, BEGUN)
    shrank = 0
    for second, bytes_left in enumerate(left):
        deadlines.look(a_job(second, bytes_left), BEGUN + second)
        if second == 0 or bytes_left < left[second - 1]:
            shrank = second
        assert (deadlines.reached(BEGUN + second) is not None) == (second - shrank >= limit)
    lowest = left.index(min(left))
    assert deadlines.stalled_s(BEGUN + len(left) - 1) == len(left) - 1 - lowest
