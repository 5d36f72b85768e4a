"""The connection to Redis that commands share.

A command that finds no Redis says so within seconds, so nothing is tried twice here: whoever waits for long
(`follow`) tries again by itself, and then knows that it may have missed something.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.cli.simulated_herd import use_running_herd
from orchestrator.settings import settings
from orchestrator.store import Store
from orchestrator.store.connection import connect

TIMEOUT_S = 3.0
"""For one answer of Redis."""


@contextmanager
def open_store() -> Iterator[Store]:
    """Open the herd's store for one command. Nothing is sent yet.

    Raises:
        Invalid: The URL can't be used.
    """
    use_running_herd()
    store = Store(connect(settings().redis_url.get_secret_value(), timeout_s=TIMEOUT_S, retries=0))
    try:
        yield store
    finally:
        store.close()
