"""Every key is declared, with its type and its expiry: a leak would be one that is not."""

import pytest

from orchestrator.lease import Membership, Suspicion
from orchestrator.planner.rounds import settling
from orchestrator.resources import GrantState, VirtualMachineOperation
from orchestrator.store import Store, keys
from orchestrator.store.node_store import NodeStore
from tests.builders import a_lease, a_node, a_vm, an_inventory, granted_operation, seen
from tests.declared_keys import check_keys, declared


def test_the_table_is_read() -> None:
    names = {entry.name: entry for entry in declared()}
    assert names["slots:inbound:<node>"].types == ("set",)
    assert names["request:<id>"].expires
    assert not names["changes"].expires
    assert names["node:{<n>}:claim:<epoch>"].pattern.fullmatch("node:{n1}:claim:7")


def test_a_herd_at_work_has_declared_keys_only(store: Store) -> None:
    batch = store.batch().create(a_node("n1")).create(a_node("n2")).create(a_vm()).create(granted_operation())
    batch.create(an_inventory("n1", {"x": seen("running", vm="").with_(vm="")}).with_(listing_order="r"))
    batch.effect("DEADLINE", keys.DEADLINES, "default/op", 1000).effect("DEADLINE", keys.AWAITING, "default/op", 1000)
    batch.effect("HSET", keys.CURSORS, "n1", "1-0").effect("HSET", keys.IDENTITY, "state", "normal").wake("n1", "x")
    store.must_commit(batch)
    store.next_epochs(1)
    node = NodeStore(store.redis, "n1")
    node.renew_lease(a_lease())
    node.show_alive("g-1")
    node.show_use(0.5, 1024)
    node.claim("default/op", 1, "worker")
    store.redis.set(keys.MEMBERSHIP, Membership(1, {"n1": "192.0.2.11:7949"}).text())
    store.redis.set(keys.MEMBERSHIP_NEXT, Membership(1, {"n1": "192.0.2.11:7949"}).text())
    store.redis.set(keys.PEER_KEY, "secret")
    store.redis.hset(keys.SUSPICIONS, "n2", Suspicion("id", "g", 1).text())
    store.redis.set(keys.taken_over("n3"), "b g")
    store.redis.set(keys.disarm("n1"), "maintenance")
    store.redis.hset(keys.DISARMED, keys.DISARMED_ALL, "maintenance")
    store.redis.set(keys.fencing("n1"), "token", px=keys.FENCING_TTL_MS)
    store.redis.set(keys.bmc_on("n1"), "{}", px=keys.BMC_ON_TTL_MS)
    store.redis.set(keys.console_session("digest"), "{}", ex=60)
    store.redis.set(keys.wanted("grant"), "1", px=keys.WANTED_TTL_MS)
    store.redis.set(keys.tick("reconcile", 1), "1", ex=20)
    store.redis.set(keys.REBALANCE_SCAN, "1", px=60_000)
    store.redis.hincrby(keys.PLACEMENTS, "count", 1)
    old = store.get(VirtualMachineOperation, "default/op")
    store.must_commit(store.batch().put(old, settling(old, "test", kill=True)))
    assert old.status.grant is not None
    assert old.status.grant.state is GrantState.GRANTED
    ours = {entry.name for entry in declared() if not entry.name.startswith(("_kombu", "unacked", "node.", "celery"))}
    missing = ours - check_keys(store.redis)
    # Left out above: Celery's queues; the node's answers to repeated calls are those of `report`.
    missing -= {"adopted", "answers:<id>"}  # tests/integration/test_adoption.py looks
    assert missing == {"control", "liveness", "fencing", "grants:<node>", "node:{<n>}:request:<id>"}


@pytest.mark.parametrize(
    ("key", "expiry", "complaint"),
    [
        ("stray", None, "stray (string) is not declared"),
        ("request:1", None, "has no expiry"),
        ("version", 9, "an expiry"),
    ],
)
def test_what_is_not_as_declared_is_found(store: Store, key: str, expiry: int | None, complaint: str) -> None:
    store.redis.set(key, "1", ex=expiry)
    with pytest.raises(AssertionError, match=complaint.replace("(", r"\(").replace(")", r"\)")):
        check_keys(store.redis)
