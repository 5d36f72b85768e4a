"""The connection to Redis that commands share, for those that work on Redis itself.

A command that finds no Redis says so within seconds, so nothing is tried twice here: whoever waits for long
(`follow`) tries again by itself, and then knows that it may have missed something.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.cli.simulated_herd import URL_VARIABLE, use_running_herd
from orchestrator.errors import Refused
from orchestrator.settings import settings
from orchestrator.store import Store
from orchestrator.store.connection import connect

TIMEOUT_S = 3.0
"""For one answer of Redis."""


def is_remote() -> bool:
    """Whether the settings name an API: then commands that can, work through it."""
    return bool(settings().server or settings().kubeconfig)


@contextmanager
def open_store() -> Iterator[Store]:
    """Open the herd's store for one command. Nothing is sent yet.

    Raises:
        Invalid: The URL can't be used.
        Refused: Only the API's place is known, and this is for commands that need Redis.
    """
    if is_remote() and URL_VARIABLE not in os.environ:
        raise Refused(f"this command works on Redis itself: set {URL_VARIABLE}; VMHERD_SERVER is not enough for it")
    use_running_herd()
    store = Store(connect(settings().redis_url.get_secret_value(), timeout_s=TIMEOUT_S, retries=0))
    try:
        yield store
    finally:
        store.close()
