"""Following a herd through whatever happens to the connection: the list, then each change, a new list after a gap.

The change stream wakes us, nothing is polled. A connection that breaks may have hidden changes, and the Redis that
answers next may be another one with another history: so after each break everything is listed anew, and whoever follows
compares that with what it knew.
"""

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from orchestrator.client.port import Scope
from orchestrator.errors import StoreUnavailable, VersionExpired
from orchestrator.store import Change
from orchestrator.store.store import Loaded

RETRY_S = 0.5


class Source(Protocol):
    """The part of `port.Client` that is followed."""

    def read(self, scope: Scope) -> Loaded:
        """As `Client.read`."""
        ...

    def watch(self, scope: Scope, since: int, deadline: float | None = None) -> Iterator[Change | None]:
        """As `Client.watch`."""
        ...


def follow(
    source: Source, scope: Scope, say: Callable[[str], None], *, is_patient: bool = False
) -> Iterator[Loaded | Change | None]:
    """Follow a scope, for ever.

    Args:
        source: One that does not try again by itself: it would hide a break.
        scope: What is wanted.
        say: Told once when the herd goes away.
        is_patient: Whether it may be away at the beginning too.

    Yields:
        A whole list: first, and after each break. Changes of the wanted kinds, in order. None about once a second
        while nothing comes, for the caller's deadline.

    Raises:
        StoreUnavailable: The herd does not answer at the beginning.
    """
    has_begun = was_told = False
    while True:
        try:
            loaded = source.read(scope)
            has_begun, was_told = True, False
            yield loaded
            yield from source.watch(scope, loaded.version)
        except VersionExpired:
            continue  # more than is kept came while we were away: a new list has it all
        except StoreUnavailable as error:
            if not has_begun and not is_patient:
                raise
            if not was_told:
                say(f"{error}; goes on when it is back")
                was_told = True
            yield None
            time.sleep(RETRY_S)
