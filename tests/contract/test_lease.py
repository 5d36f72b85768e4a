"""A renewal, as `lua/lease.lua` does it on a real Redis, and what leases say (TAKEOVER.md, rules 1, 4, 5 and 10)."""

import json
import random
from dataclasses import replace
from typing import cast

import pytest

from orchestrator.lease import PROFILES, Lease, Membership, StoredLease, Suspicion, read_lease
from orchestrator.store import Store, keys
from orchestrator.store.node_store import NodeStore
from tests.builders import a_lease
from tests.fast_redis import LeaseTable


@pytest.fixture
def node(store: Store) -> NodeStore:
    return NodeStore(store.redis, "n1")


def on_record(store: Store) -> StoredLease | None:
    return read_lease(cast("str | None", store.redis.get(keys.lease("n1"))))


def stored(store: Store) -> Lease | None:
    found = on_record(store)
    return found.lease if found else None


def test_a_lease_is_read_as_it_was_written(store: Store, node: NodeStore) -> None:
    lease = a_lease(
        7, created=12_345_678.123456, timing=PROFILES["critical"], suspicions=("a", "b"), armed=True, failsafe=False
    )
    lease = replace(lease, watchdog="i6300ESB timer", address="192.0.2.11:7949", membership=3, witness=True)
    assert node.renew_lease(lease).refused == ""
    found = on_record(store)
    assert found is not None
    assert found.lease == lease
    assert abs(found.renewed_ms - store.now().timestamp() * 1000) < 60_000
    assert 0 < store.redis.pttl(keys.lease("n1")) <= keys.LEASE_KEPT_MS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "nonsense",
        '{"generation":"g"}',
        *(
            json.dumps({**json.loads(a_lease().text()), "renewed_ms": 1, **wrong})
            for wrong in (
                {"sequence": "1"},
                {"armed": 1},
                {"timing": {"lease_ttl": 1}},
                {"timing": None},
                {"created": float("nan")},
                {"boot_id": None},
                {"membership": 1.5},
                {"suspicions": 3},
            )
        ),
    ],
)
def test_what_is_no_lease_is_as_good_as_none(text: str) -> None:
    assert read_lease(text) is None


def test_what_a_later_version_says_besides_is_passed_over() -> None:
    lease = a_lease(1)
    found = json.loads(lease.text()) | {"renewed_ms": 1, "later": 1}
    found["timing"]["later"] = 2.0
    stored = read_lease(json.dumps(found))
    assert stored is not None
    assert stored.lease == lease


def test_a_renewal_tells_what_the_control_plane_publishes(store: Store, node: NodeStore) -> None:
    membership = Membership(4, {"n1": "192.0.2.11:7949", "n2": "192.0.2.12:7949"})
    store.redis.set(keys.MEMBERSHIP, membership.text())
    store.redis.set(keys.PEER_KEY, "secret")
    for name in ("n1", "n2"):
        store.redis.hset(keys.SUSPICIONS, name, Suspicion(f"id-{name}", "g", 1).text())
    store.redis.set(keys.disarm("n1"), "maintenance")
    reply = node.renew_lease(a_lease(1))
    assert reply.membership == membership
    assert reply.peer_key == "secret"
    assert reply.suspicions == {"n2": "id-n2"}, "its own is void by this very renewal"
    assert reply.disarm == "maintenance"
    reply = node.renew_lease(a_lease(2, membership=4), "secret")
    assert (reply.membership, reply.peer_key) == (None, None), "what is held is not sent again"
    store.redis.delete(keys.SUSPICIONS, keys.disarm("n1"))
    reply = node.renew_lease(a_lease(3, membership=3), "another")
    assert reply.membership == membership
    assert reply.peer_key == "secret"
    assert (reply.suspicions, reply.disarm) == ({}, "")


def test_a_version_that_begins_alike_is_another(store: Store, node: NodeStore) -> None:
    store.redis.set(keys.MEMBERSHIP, Membership(41, {"n1": "a:1"}).text())
    assert node.renew_lease(a_lease(1, membership=4)).membership is not None


def test_the_same_renewal_sent_again_is_ok(store: Store, node: NodeStore) -> None:
    """A client that lost the reply sends it again: the value on record did change since it was created."""
    assert node.renew_lease(a_lease(5)).refused == ""
    assert node.renew_lease(a_lease(5)).refused == ""


class TestOutdated:
    """A renewal whose process is gone, and which comes after the next one's."""

    def test_of_a_process_before(self, store: Store, node: NodeStore) -> None:
        before = a_lease(9, created=9.0, armed=True)
        node.renew_lease(a_lease(8, created=8.0, armed=True))
        after = a_lease(1, generation="g2", created=20.0, timing=PROFILES["slow"])
        assert node.renew_lease(after).refused == ""
        assert node.renew_lease(before).refused == "outdated"
        assert stored(store) == after

    def test_the_clock_begins_anew_with_a_boot(self, store: Store, node: NodeStore) -> None:
        node.renew_lease(a_lease(8, created=500.0))
        assert node.renew_lease(a_lease(1, boot_id="b2", generation="g2", created=3.0)).refused == ""

    def test_of_the_same_process(self, store: Store, node: NodeStore) -> None:
        node.renew_lease(a_lease(3))
        assert node.renew_lease(a_lease(2)).refused == "outdated"
        assert stored(store) == a_lease(3)


class TestTakenOver:
    """Rule 4."""

    def test_its_generation_is_refused(self, store: Store, node: NodeStore) -> None:
        node.renew_lease(a_lease(1))
        store.redis.set(keys.taken_over("n1"), "b g")
        assert node.renew_lease(a_lease(2)).refused == "taken over"
        assert stored(store) == a_lease(1), "what takeover read stays as it was"

    def test_so_is_the_next_process_of_the_same_boot(self, store: Store, node: NodeStore) -> None:
        store.redis.set(keys.taken_over("n1"), "b g")
        assert node.renew_lease(a_lease(1, generation="g2")).refused == "taken over"
        assert stored(store) is None

    def test_the_next_boot_is_not(self, store: Store, node: NodeStore) -> None:
        store.redis.set(keys.taken_over("n1"), "b g")
        assert node.renew_lease(a_lease(1, boot_id="b2", generation="g2")).refused == ""

    def test_nor_is_another_node(self, store: Store, node: NodeStore) -> None:
        store.redis.set(keys.taken_over("n1"), "b g")
        assert NodeStore(store.redis, "n10").renew_lease(a_lease()).refused == ""


def test_a_lease_on_record_that_nobody_can_read_is_replaced(store: Store, node: NodeStore) -> None:
    for text in ("nonsense", "[1]", '{"created":"x","boot_id":"b"}', '{"boot_id":{}}'):
        store.redis.set(keys.lease("n1"), text)
        assert node.renew_lease(a_lease()).refused == "", text
        assert stored(store) == a_lease()


def test_a_full_redis_takes_renewals(store: Store, node: NodeStore) -> None:
    store.redis.config_set("maxmemory", "1")
    try:
        assert node.renew_lease(a_lease()).refused == ""
    finally:
        store.redis.config_set("maxmemory", "0")


def test_what_stands_in_for_it_in_memory_answers_alike(store: Store, node: NodeStore) -> None:
    """`tests.fast_redis.LeaseTable`, by which the runs of tests/unit/test_heart_safety.py live."""
    chance = random.Random(1)
    membership = Membership(3, {"n1": "a:1"}, 1)
    store.redis.set(keys.MEMBERSHIP, membership.text())
    table = LeaseTable(membership)
    for _ in range(300):
        lease = a_lease(
            chance.randint(1, 5),
            generation=chance.choice("gh"),
            boot_id=chance.choice("bc"),
            created=float(chance.randint(1, 6)),
            membership=chance.choice((2, 3)),
        )
        if chance.random() < 0.1:
            store.redis.delete(keys.lease("n1"), keys.taken_over("n1"))
            table.leases.clear()
            table.taken_over.clear()
        if chance.random() < 0.05:
            store.redis.set(keys.taken_over("n1"), "b gone")
            table.taken_over["n1"] = "b"
        if chance.random() < 0.2:
            store.redis.hset(keys.SUSPICIONS, "n2", Suspicion("id", "g", 1).text())
            table.suspicions["n2"] = "id"
        assert node.renew_lease(lease) == table.renew("n1", lease, lease.membership)
        assert stored(store) == table.leases.get("n1")
