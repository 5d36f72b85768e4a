"""A Redis that is full is one that can't be used now: whoever asks tries again, and no thread dies of it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orchestrator.errors import StoreUnavailable
from orchestrator.store import Store
from orchestrator.store.connection import redis_errors
from orchestrator.store.node_store import NodeStore
from tests.builders import a_lease, a_vm


@pytest.fixture
def full(store: Store) -> Iterator[Store]:
    store.version()
    store.redis.config_set("maxmemory", "1")
    yield store
    store.redis.config_set("maxmemory", "0")


def _pipeline(store: Store, *, transaction: bool) -> None:
    with redis_errors(store.redis):
        pipe = store.redis.pipeline(transaction=transaction)
        pipe.set("a", "1")
        pipe.execute()


WRITES: dict[str, Callable[[Store], Any]] = {
    "a sign of life": lambda store: NodeStore(store.redis, "n1").show_alive("g-1"),
    "a report": lambda store: NodeStore(store.redis, "n1").report("Domain", {}),
    "a commit": lambda store: store.must_commit(store.batch().create(a_vm())),
    "a pipeline": lambda store: _pipeline(store, transaction=False),
    "a transaction": lambda store: _pipeline(store, transaction=True),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_for_later(full: Store, name: str) -> None:
    with pytest.raises(StoreUnavailable, match="can't take this now"):
        WRITES[name](full)


def test_leases_go_on(full: Store) -> None:
    assert NodeStore(full.redis, "n1").renew_lease(a_lease()).refused == ""
