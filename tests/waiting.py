"""Waiting for what the world does by itself, with a deadline in place of sleeps."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    predicate: Callable[[], T],
    timeout: float = 10.0,
    message: str | Callable[[], str] = "",
    *,
    interval: float = 0.02,
) -> T:
    """Call `predicate` until it gives something true, and return that.

    It is called at least once, and once more after the deadline, so that a machine which was busy elsewhere for the
    whole time does not fail the test.

    Args:
        predicate: Called again and again. What it raises ends the wait.
        timeout: Seconds until it is given up.
        message: What was waited for; a function is called at the end, to tell how things stand then.
        interval: Seconds between two calls.

    Raises:
        AssertionError: It was not true in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        is_last = time.monotonic() >= deadline
        if value := predicate():
            return value
        if is_last:
            what = message() if callable(message) else message
            raise AssertionError(f"waited {timeout:g} s in vain for: {what or predicate}")
        time.sleep(interval)
