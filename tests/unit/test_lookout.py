"""A process's lookout goes on by itself, whatever a look does."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from orchestrator.errors import StoreUnavailable
from orchestrator.planner.liveness import LONGEST_GAP_S
from orchestrator.services.lookout import Lookout
from tests.waiting import wait_until

Begin = Callable[[Callable[[], Callable[[], None]]], Lookout]


@pytest.fixture
def begin() -> Iterator[Begin]:
    begun: list[Lookout] = []

    def make(look: Callable[[], Callable[[], None]]) -> Lookout:
        lookout = Lookout(look, period_s=0.01)
        begun.append(lookout)
        lookout.begin()
        return lookout

    yield make
    for lookout in begun:
        lookout.end()


def test_it_looks_again_and_again_without_any_tick(begin: Begin) -> None:
    looks: list[int] = []
    lookout = begin(lambda: lambda: looks.append(1))
    wait_until(lambda: len(looks) > 3, 10)
    assert lookout.late_s() == 0
    lookout.end()
    count = len(looks)
    lookout.begin()
    assert len(looks) == count, "what was ended begins no more"


def test_ticks_begin_no_second_one(begin: Begin) -> None:
    makes: list[int] = []

    def make() -> Callable[[], None]:
        makes.append(1)
        return lambda: None

    lookout = begin(make)
    for _ in range(3):
        lookout.begin()
    wait_until(lambda: bool(makes), 10)
    assert sum(thread.name == "lookout" for thread in threading.enumerate()) == 1
    assert makes == [1]


@pytest.mark.parametrize("error", [StoreUnavailable("no Redis"), RuntimeError("a defect")])
def test_one_that_fails_is_not_the_last(begin: Begin, error: Exception) -> None:
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        if len(looks) < 3:
            raise error

    begin(lambda: look)
    wait_until(lambda: len(looks) > 3, 10)


def test_a_store_that_is_not_there_at_the_beginning_is_tried_again(begin: Begin) -> None:
    tries: list[int] = []
    looks: list[int] = []

    def make() -> Callable[[], None]:
        tries.append(1)
        if len(tries) < 3:
            raise StoreUnavailable("no Redis")
        return lambda: looks.append(1)

    begin(make)
    wait_until(lambda: len(looks) > 1, 10)
    assert len(tries) == 3


def test_a_look_that_does_not_end_is_late(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, leave = threading.Event(), threading.Event()

    def look() -> None:
        stuck.set()
        leave.wait(30)

    lookout = begin(lambda: look)
    stuck.wait(10)
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + LONGEST_GAP_S + 2)
    assert lookout.late_s() > 0
    leave.set()
