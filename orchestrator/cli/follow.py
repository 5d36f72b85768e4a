"""Following the store through whatever happens to Redis: the list first, then each change, a new list after a gap.

The stream wakes us, nothing is polled. A connection that breaks may have hidden changes, and the Redis that answers
next may be another one with another history: so after each break everything is listed anew, and whoever follows
compares that with what it knew.
"""

import time
from collections.abc import Callable, Iterator

from orchestrator.errors import StoreUnavailable, VersionExpired
from orchestrator.resources import Resource
from orchestrator.store.store import Change, Loaded, Store

RETRY_S = 0.5
BLOCK_MS = 1000


def follow(
    store: Store, kinds: tuple[type[Resource], ...], say: Callable[[str], None], *, is_patient: bool = False
) -> Iterator[Loaded | Change | None]:
    """Follow some kinds, for ever.

    Args:
        store: Of a client that does not try again by itself: it would hide a break.
        kinds: What is wanted.
        say: Told once when Redis goes away.
        is_patient: Whether Redis may be away at the beginning too.

    Yields:
        A whole list: first, and after each break. Changes of the wanted kinds, in order. None about once a second
        while nothing comes, for the caller's deadline.

    Raises:
        StoreUnavailable: Redis does not answer at the beginning.
    """
    has_begun = was_told = False
    while True:
        try:
            loaded = store.load(kinds)
            has_begun, was_told = True, False
            yield loaded
            yield from _until_gap(store, kinds, loaded.version)
        except VersionExpired:
            continue  # more than the stream holds came while we were away: a new list has it all
        except StoreUnavailable as error:
            if not has_begun and not is_patient:
                raise
            if not was_told:
                say(f"{error}; goes on when it is back")
                was_told = True
            yield None
            time.sleep(RETRY_S)


def _until_gap(store: Store, kinds: tuple[type[Resource], ...], version: int) -> Iterator[Change | None]:
    wanted = {kind.kind_name for kind in kinds}
    for change in store.watch(version, block_ms=BLOCK_MS):
        if change is None:
            if store.version() < version:
                return  # this Redis has lost what we have seen
            yield None
        else:
            version = change.version
            if change.resource.kind_name in wanted:
                yield change
