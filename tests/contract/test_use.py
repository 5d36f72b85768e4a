"""What is in use of hosts: agents show it, people see it, and what a node writes there harms nobody."""

import pytest

from orchestrator.services.use import Use, read_uses
from orchestrator.store import Store, keys
from orchestrator.store.node_store import NodeStore


def test_what_agents_show_is_read_in_one_round_trip(store: Store) -> None:
    NodeStore(store.redis, "n1").show_use(0.12345, 2048)
    before = store.redis.info("stats")["total_commands_processed"]
    assert read_uses(store, ["n1", "n2"]) == {"n1": Use(0.1235, 2048)}
    assert store.redis.info("stats")["total_commands_processed"] - before == 2
    assert 0 < store.redis.pttl(keys.use("n1")) <= keys.USE_KEPT_MS
    assert read_uses(store, []) == {}


@pytest.mark.parametrize("text", ["", "x", "{}", '{"cpu": "much", "memory_mib": 1}', "[1, 2]"])
def test_a_node_that_writes_nonsense_has_told_nothing(store: Store, text: str) -> None:
    store.redis.set(keys.use("n1"), text)
    NodeStore(store.redis, "n2").show_use(0.5, 1)
    assert read_uses(store, ["n1", "n2"]) == {"n2": Use(0.5, 1)}
