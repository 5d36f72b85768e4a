import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

from tests.waiting import wait_until
from workers import clock


class StandingClock:
    """A time in which nothing moves, and nothing runs beside its beginner."""

    def monotonic(self) -> float:
        return 42.0

    def wait(self, event: threading.Event, timeout_s: float | None) -> bool:
        return event.is_set()

    def begin(self, name: str, run: Callable[[], None]) -> threading.Thread:
        run()
        return threading.Thread()

    def pool(self, name: str, size: int) -> Executor:
        return ThreadPoolExecutor(1)


def test_real_time_moves_on_and_a_wait_ends_when_its_event_is_set() -> None:
    begin, event = clock.monotonic(), threading.Event()
    assert not clock.wait(event, 0.01)
    assert clock.monotonic() >= begin + 0.01
    thread = clock.begin("sets it", event.set)
    assert clock.wait(event, 10)
    thread.join(10)


def test_a_pool_runs_as_many_as_it_may_at_a_time() -> None:
    running, most, gate, lock = 0, 0, threading.Event(), threading.Lock()

    def run() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(10)
        with lock:
            running -= 1

    with clock.pool("two", 2) as pool:
        ends = [pool.submit(run) for _ in range(5)]
        wait_until(lambda: running == 2, message="two run")
        gate.set()
    assert all(end.done() for end in ends)
    assert most == 2


def test_another_time_is_lived_in_until_it_is_left() -> None:
    ran: list[str] = []
    with clock.use(StandingClock()):
        assert clock.monotonic() == 42.0
        assert not clock.wait(threading.Event(), 1_000)
        clock.begin("at once", lambda: ran.append("ran"))
        assert ran == ["ran"]
    assert clock.monotonic() != 42.0
