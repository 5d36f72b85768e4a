"""Checks that a commit makes in Redis: they hold for what is there at that instant, whatever the plan was made from."""

import random
from typing import Any

import pytest
import redis

from orchestrator.resources import (
    Action,
    Node,
    OperationPhase,
    Resource,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
)
from orchestrator.store import Refusal, Store, keys
from orchestrator.store.batch import Batch
from orchestrator.store.connection import connect
from tests.builders import a_grant, a_node, a_vm, an_inventory, an_operation, granted_operation, seen
from tests.redis_contents import contents
from tests.threads import in_threads


def stored(store: Store, *resources: Resource) -> None:
    batch = store.batch()
    for resource in resources:
        batch.create(resource)
    store.must_commit(batch)


def changed(store: Store, kind: type[Any], key: str, **status: Any) -> None:
    old = store.get(kind, key)
    store.must_commit(store.batch().put(old, old.with_status(**status)))


def answer(store: Store, *check: str | int) -> Refusal | None:
    """What a commit says that makes this check and writes something."""
    probe = f"probe-{random.randrange(10**12)}"
    batch = store.batch().check(*check).create(an_operation(probe, probe))
    before = contents(store.redis)
    result = store.commit(batch)
    if isinstance(result, Refusal):
        assert contents(store.redis) == before
        return result
    return None


class TestSlots:
    def slots(self, store: Store, source: str = "n1", target: str = "n2", outbound: int = 1, inbound: int = 1) -> str:
        refusal = answer(store, "slots", "default/new", source, target, outbound, inbound)
        assert refusal is None or refusal.check == "slots"
        return refusal.detail if refusal else ""

    def test_free(self, store: Store) -> None:
        stored(store, a_node("n1"), a_node("n2"))
        assert self.slots(store) == ""

    def test_one_outbound_a_source(self, store: Store) -> None:
        stored(store, *(a_node(f"n{i}") for i in range(1, 5)), granted_operation("a", "vm-a", node="n1", target="n3"))
        assert self.slots(store, "n1", "n2") == "outbound"
        assert self.slots(store, "n2", "n4") == ""

    def test_inbound_as_the_setting_says_and_zero_is_no_limit(self, store: Store) -> None:
        stored(store, *(a_node(f"n{i}") for i in range(1, 5)), granted_operation("a", "vm-a", node="n3", target="n2"))
        assert self.slots(store, inbound=1) == "inbound"
        assert self.slots(store, inbound=2) == ""
        assert self.slots(store, inbound=0) == ""

    def test_the_cap_is_the_schedulable_nodes_counted_in_the_call(self, store: Store) -> None:
        nodes = [a_node(f"n{i}") for i in range(1, 7)]
        grants = [granted_operation(f"op{i}", f"vm{i}", node=f"n{i}", target="n6") for i in (3, 4)]
        stored(store, *nodes, *grants)
        for i in (6, 5, 4):
            assert self.slots(store, inbound=0) == ""
            old = store.get(Node, f"n{i}")
            store.must_commit(store.batch().put(old, old.with_(spec=old.spec.with_(unschedulable=True))))
        # Three are left, and two hold a slot; one that is not Ready counts no more than one that is cordoned.
        assert self.slots(store, inbound=0) == ""
        lost = store.get(Node, "n3")
        store.must_commit(store.batch().put(lost, lost.with_status(conditions=())))
        assert self.slots(store, inbound=0) == "cluster"

    def test_a_herd_that_shrank_below_what_runs_gives_none_until_enough_have_ended(self, store: Store) -> None:
        nodes = [a_node(f"n{i}", cordoned=i > 2) for i in range(1, 8)]
        grants = [granted_operation(f"op{i}", f"vm{i}", node=f"n{i}", target="n2") for i in range(3, 6)]
        stored(store, *nodes, *grants)
        for i in range(3, 6):
            assert self.slots(store, inbound=0) == ("cluster" if i < 5 else "")
            changed(store, VirtualMachineOperation, f"default/op{i}", grant=None)
        assert self.slots(store, inbound=0) == ""

    def test_an_operation_that_holds_one_gets_no_second(self, store: Store) -> None:
        stored(store, a_node("n1"), a_node("n2"), a_node("n3"), granted_operation("new", "vm-a"))
        assert self.slots(store) == "held"

    def test_without_a_schedulable_node_there_is_none(self, store: Store) -> None:
        assert self.slots(store) == "cluster"

    def test_a_start_takes_none(self, store: Store) -> None:
        stored(store, a_node("n1"), granted_operation("a", "vm-a", action=Action.START))
        assert not store.redis.exists(keys.SLOTS_CLUSTER, keys.slots_outbound("n1"), keys.slots_inbound("n1"))


class TestRoom:
    def fits(self, store: Store, memory: int, cpu: int, capacity: tuple[int, int] = (4096, 4000)) -> str:
        refusal = answer(store, "fits", "n1", memory, cpu, *capacity)
        assert refusal is None or refusal.check == "fits"
        return refusal.detail if refusal else ""

    def test_of_an_empty_node(self, store: Store) -> None:
        assert [self.fits(store, *d) for d in ((4096, 4000), (4097, 1), (1, 4001))] == ["", "memory", "cpu"]

    def test_what_runs_what_comes_and_what_is_not_ours_all_count(self, store: Store) -> None:
        stored(
            store,
            a_vm("runs", memory="1Gi", cores=1),  # 1088 with overhead
            granted_operation("comes", "other", node="n2", target="n1", memory_mib=1000),
            an_inventory("n1", {"foreign": seen("running", vm="").with_(vm="", memory_mib=500, vcpus=1)}),
        )
        left = 4096 - 1088 - 1000 - 500
        assert self.fits(store, left, 1000) == ""
        assert self.fits(store, left + 1, 1000) == "memory"
        assert self.fits(store, left, 1001) == "cpu"

    def test_room_is_free_again_when_they_end(self, store: Store) -> None:
        stored(store, a_vm("runs", memory="3Gi"))
        assert self.fits(store, 2000, 1) == "memory"
        changed(store, VirtualMachine, "default/runs", phase=VmPhase.STOPPED)
        assert self.fits(store, 2000, 1) == ""


class TestOthers:
    def test_schedulable(self, store: Store) -> None:
        stored(store, a_node("n1"), a_node("n2", cordoned=True), a_node("n3", ready=False))
        answers = [answer(store, "schedulable", f"n{i}") for i in (1, 2, 3, 4)]
        assert answers == [None, *(Refusal("schedulable", f"n{i}") for i in (2, 3, 4))]

    def test_unchanged(self, store: Store) -> None:
        stored(store, a_vm())
        assert answer(store, "unchanged", "VirtualMachine", "default/linux-vm", 1) is None
        changed(store, VirtualMachine, "default/linux-vm", ip_address="10.0.0.1")
        refusal = Refusal("unchanged", "VirtualMachine default/linux-vm")
        assert answer(store, "unchanged", "VirtualMachine", "default/linux-vm", 1) == refusal
        assert answer(store, "unchanged", "VirtualMachine", "default/none", 0) is None
        assert answer(store, "unchanged", "VirtualMachine", "default/linux-vm", 0) == refusal

    def test_field(self, store: Store) -> None:
        store.redis.hset(keys.CURSORS, "n1", "5-0")
        assert answer(store, "field", keys.CURSORS, "n1", "5-0") is None
        assert answer(store, "field", keys.CURSORS, "n1", "4-0") == Refusal("field", "5-0")
        assert answer(store, "field", keys.CURSORS, "n2", "") is None

    def test_due(self, store: Store) -> None:
        now_ms = int(store.now().timestamp() * 1000)
        store.redis.zadd(keys.DEADLINES, {"default/over": now_ms - 1, "default/not-yet": now_ms + 60_000})
        assert answer(store, "due", keys.DEADLINES, "default/over") is None
        assert answer(store, "due", keys.DEADLINES, "default/not-yet") == Refusal("due", "default/not-yet")
        assert answer(store, "due", keys.DEADLINES, "default/none") == Refusal("due", "default/none")

    def test_identity(self, store: Store) -> None:
        def recorded(**more: str) -> Refusal | None:
            run_id = store.run_id()
            replid = str(store.redis.info("replication")["master_replid"])
            record = {"run_id": run_id, "replid": replid, "state": "normal", **more}
            store.redis.hset(keys.IDENTITY, items=[word for pair in record.items() for word in pair])
            return answer(store, "identity")

        assert answer(store, "identity") == Refusal("identity", "unset")
        assert recorded() is None
        assert recorded(state="recovering") == Refusal("identity", "recovering")
        assert recorded(run_id="0" * 40) == Refusal("identity", "run id changed")
        assert recorded(replid="0" * 40) == Refusal("identity", "replication id changed")

    def test_one_active_operation_a_vm(self, store: Store) -> None:
        stored(store, an_operation("first", "vm"))
        assert store.commit(store.batch().create(an_operation("second", "vm"))) == Refusal("field", "default/first")
        stored(store, an_operation("other", "another-vm"))
        changed(store, VirtualMachineOperation, "default/first", phase=OperationPhase.COMPLETED)
        stored(store, an_operation("second", "vm"))
        # Of a finished one nothing is left that could be taken from its successor.
        store.must_commit(store.batch().delete(store.get(VirtualMachineOperation, "default/first")))
        assert store.redis.hget(keys.ACTIVE_OPERATIONS, "default/vm") == "default/second"

    def test_one_vm_a_uuid(self, store: Store) -> None:
        stored(store, a_vm("first"))
        twin = a_vm("second")
        twin = twin.with_(metadata=twin.metadata.with_(uid=a_vm("first").metadata.uid))
        assert store.commit(store.batch().create(twin)) == Refusal("field", "default/first")


def test_grants_at_once_never_exceed_a_limit(store: Store, redis_url: str) -> None:
    """Eight writers grant and end at random, each checking in the call only; the limits are looked at after each."""
    nodes = [f"n{i}" for i in range(6)]
    stored(store, *(a_node(name) for name in nodes))
    broken: list[str] = []

    def run(seed: int) -> None:
        chance = random.Random(seed)
        mine = Store(connect(redis_url), store.config)
        held: list[str] = []
        for number in range(40):
            if held and chance.random() < 0.4:
                old = mine.get(VirtualMachineOperation, held.pop(chance.randrange(len(held))))
                mine.must_commit(mine.batch().put(old, old.with_status(grant=None, phase=OperationPhase.COMPLETED)))
                continue
            source, target = chance.sample(nodes, 2)
            name = f"op{seed}-{number}"
            operation = an_operation(
                name, f"vm{seed}-{number}", grant=a_grant(node=source, target=target, memory_mib=900)
            )
            batch: Batch = mine.batch().check("slots", operation.key, source, target, 1, 2)
            batch.check("fits", target, 900, 1000, 1500, 9000).create(operation)
            if not isinstance(mine.commit(batch), Refusal):
                held.append(operation.key)
            broken.extend(exceeded(mine, nodes))
        mine.close()

    in_threads(8, run)
    assert broken == []
    granted = [o for o in store.all(VirtualMachineOperation) if o.status.grant]
    assert len(granted) == store.redis.scard(keys.SLOTS_CLUSTER)
    assert granted


def exceeded(store: Store, nodes: list[str]) -> list[str]:
    """The limits that are exceeded at this instant (one call: all counts are of one moment)."""
    pipe = store.redis.pipeline(transaction=True)
    pipe.scard(keys.SLOTS_CLUSTER)
    for name in nodes:
        pipe.scard(keys.slots_outbound(name))
        pipe.scard(keys.slots_inbound(name))
        pipe.hvals(keys.claims(name))
    cluster, *rest = pipe.execute()
    found = [f"cluster {cluster}"] if cluster > len(nodes) else []
    for i, name in enumerate(nodes):
        outbound, inbound, claims = rest[3 * i : 3 * i + 3]
        memory = sum(int(claim.split()[0]) for claim in claims)
        if outbound > 1 or inbound > 2 or memory > 1500:
            found.append(f"{name}: outbound {outbound}, inbound {inbound}, memory {memory}")
    return found


def test_an_unknown_check_writes_nothing(store: Store) -> None:
    """A commit from a newer version with a check that this script does not have is an error before anything is done."""
    before = contents(store.redis)
    with pytest.raises(redis.ResponseError):
        store.commit(store.batch().check("newer", "n1").create(a_node("n1")))
    assert contents(store.redis) == before
