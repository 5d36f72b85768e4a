"""The copy in memory: what was committed before a look is in it, also under load, and after any end of Redis."""

import random
import threading
from collections.abc import Iterator

import pytest

from orchestrator.errors import StoreUnavailable
from orchestrator.resources import Node, NodeInventory, VirtualMachine, VirtualMachineOperation
from orchestrator.services.herd import Herd
from orchestrator.settings import Settings
from orchestrator.store import Change, Store, keys
from orchestrator.store.connection import connect
from orchestrator.store.follower import Follower
from tests.builders import a_node, a_vm, an_inventory, an_operation, granted_operation, seen
from tests.redis_server import RedisServer
from tests.threads import in_threads
from tests.waiting import wait_until

KINDS = (Node, VirtualMachine)


@pytest.fixture
def follower(store: Store) -> Iterator[Follower]:
    follower = Follower(store, KINDS).start()
    yield follower
    follower.stop()


def test_after_sync_it_holds_what_was_committed_before(store: Store, follower: Follower) -> None:
    for number in range(50):
        store.must_commit(store.batch().create(a_node(f"n{number}")))
        follower.sync()
        assert follower.get(Node, f"n{number}") == store.get(Node, f"n{number}")
    assert len(follower.all(Node)) == 50
    assert len(follower.members(keys.SCHEDULABLE)) == 50


def test_kinds_that_it_does_not_keep_move_it_on_all_the_same(store: Store, follower: Follower) -> None:
    store.must_commit(store.batch().create(an_operation()))
    follower.sync()
    assert follower.version == 1


def test_a_deleted_document_goes(store: Store, follower: Follower) -> None:
    store.must_commit(store.batch().create(a_node("n1")))
    store.must_commit(store.batch().delete(store.get(Node, "n1")))
    follower.sync()
    assert follower.get(Node, "n1") is None
    assert follower.members(keys.SCHEDULABLE) == {}


def test_under_load_no_change_is_missed(store: Store, redis_url: str) -> None:
    changes: list[Change] = []
    follower = Follower(store, KINDS, lambda change: changes.append(change) if change else None).start()

    def write(number: int) -> None:
        mine = Store(connect(redis_url), store.config)
        chance = random.Random(number)
        name = f"vm-{number}"
        mine.must_commit(mine.batch().create(a_vm(name)))
        for count in range(100):
            vm = mine.get(VirtualMachine, f"default/{name}")
            mine.must_commit(mine.batch().put(vm, vm.with_status(node_name=f"n{chance.randrange(9)}", counter=count)))
        mine.close()

    in_threads(4, write)
    follower.sync()
    assert [change.version for change in changes] == list(range(1, 405))
    assert {vm.key: vm for vm in follower.all(VirtualMachine)} == store.load(KINDS).resources["VirtualMachine"]
    follower.stop()


def test_whoever_derives_something_from_changes_is_as_current_as_the_copy(store: Store) -> None:
    """`sync` must not return between the copy's step and that of its listener: a new operation would be overlooked."""
    herd = Herd(store)
    listener = herd.follower.on_change
    assert listener is not None

    def slow(change: Change | None) -> None:
        threading.Event().wait(0.02)  # the other thread has all the time to go wrong
        listener(change)

    herd.follower.on_change = slow
    herd.start()
    for number in range(10):
        store.must_commit(store.batch().create(an_operation(f"op{number}", f"vm{number}")))
        assert len(herd.snapshot().pending) == number + 1
    herd.stop()


def test_a_copy_that_fell_behind_the_stream_is_loaded_anew(store: Store) -> None:
    """A process that was stopped for an hour, say: what it missed is not in the stream any more."""
    follower = Follower(store, KINDS)
    follower._reload()
    for number in range(5):
        store.must_commit(store.batch().create(a_node(f"n{number}")))
    store.redis.xtrim(keys.CHANGES, minid="5-0", approximate=False)
    follower.start()
    follower.version = 0  # as it was when it was stopped
    store.must_commit(store.batch().create(a_node("n9")))
    follower.sync()
    wait_until(lambda: len(follower.all(Node)) == 6, 5, "the whole herd is there")
    follower.stop()


def test_it_outlives_a_redis_that_comes_back_empty(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Not even a client that reconnects unseen may leave it with documents of a history that is lost."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    store = Store(connect(server.url, retries=20), Settings())
    follower = Follower(store, KINDS).start()
    for number in range(3):
        store.must_commit(store.batch().create(a_node(f"n{number}")))
    follower.sync()
    server.kill()
    server.start()
    store.must_commit(store.batch().create(a_node("new")).effect("SKIP", 2**20))  # what recovery does
    wait_until(lambda: [node.name for node in follower.all(Node)] == ["new"], 10, lambda: str(follower.all(Node)))
    follower.sync()
    assert follower.version == 2**20 + 1
    store.must_commit(store.batch().create(a_node("newer")))
    follower.sync()
    assert len(follower.all(Node)) == 2
    follower.stop()
    server.kill()


def test_an_outage_is_waited_out_and_said_to_those_who_sync(durable_redis: RedisServer) -> None:
    store = Store(connect(durable_redis.url, retries=0), Settings())
    follower = Follower(store, KINDS).start()
    store.must_commit(store.batch().create(a_node("n1")))
    follower.sync()
    durable_redis.kill()
    with pytest.raises(StoreUnavailable):
        follower.sync(0.5)
    durable_redis.start()
    other = Store(connect(durable_redis.url), Settings())
    other.must_commit(other.batch().create(a_node("n2")))
    wait_until(lambda: len(follower.all(Node)) == 2, 10, "it follows again")
    follower.stop()


def test_it_says_so_when_it_does_not_catch_up(store: Store) -> None:
    follower = Follower(store, KINDS)  # not started
    store.must_commit(store.batch().create(a_node("n1")))
    with pytest.raises(StoreUnavailable, match="the copy of the herd is at version -1, wanted 1"):
        follower.sync(0.05)


def test_one_document_that_can_not_be_read_does_not_stop_it_for_ever(store: Store, follower: Follower) -> None:
    store.redis.xadd(keys.CHANGES, {"type": "ADDED", "kind": "Node", "key": "x", "created": "1", "body": "{"}, id="1-0")
    store.redis.set(keys.VERSION, 1)
    store.must_commit(store.batch().create(a_node("n1")))
    wait_until(lambda: follower.get(Node, "n1") is not None, 10, "it goes on")


def test_operations_are_served_by_priority_then_by_arrival(store: Store) -> None:
    batch = store.batch()
    for name, priority in (("balance", 3), ("second", 1), ("person", 0), ("third", 1)):
        batch.create(an_operation(name, f"vm-{name}", priority=str(priority)))
    store.must_commit(batch)
    odd = an_operation("odd", "vm-odd", priority="whatever")  # from a time before admission looked at it
    store.must_commit(store.batch().create(odd))
    herd = Herd(store).start()
    assert [o.name for o in herd.snapshot().pending] == ["person", "odd", "second", "third", "balance"]
    finished = store.get(VirtualMachineOperation, "default/person")
    store.must_commit(store.batch().delete(finished))
    assert [o.name for o in herd.snapshot().pending] == ["odd", "second", "third", "balance"]
    herd.stop()


def test_what_is_kept_of_nodes_is_what_would_be_made_anew(store: Store) -> None:
    """A snapshot keeps what it says of a node until something on it changes: whatever that is, it must be noticed."""
    chance = random.Random(3)
    kept = Herd(store).start()
    for step in range(60):
        name = f"n{chance.randrange(4)}"
        change_something(store, chance, name, step)
        fresh = Herd(store)
        fresh.follower._reload()
        assert kept.snapshot().nodes == fresh._node_states(), step
    kept.stop()


def change_something(store: Store, chance: random.Random, name: str, step: int) -> None:
    node = store.find(Node, name)
    if node is None:
        store.must_commit(store.batch().create(a_node(name)))
        return
    match chance.randrange(6):
        case 0:
            store.must_commit(store.batch().delete(node))
        case 1:
            labels = node.with_(metadata=node.metadata.with_(labels={"step": str(step)}))
            store.must_commit(store.batch().put(node, labels))
        case 2:
            store.must_commit(store.batch().create(a_vm(f"vm{step}", node=name)))
        case 3:
            grant = granted_operation(f"op{step}", f"vm{step}", node=name, target=f"n{(step + 1) % 4}")
            store.must_commit(store.batch().create(grant))
        case 4:
            foreign = seen("running", vm="").with_(vm="", memory_mib=step)
            old = store.find(NodeInventory, name)
            new = an_inventory(name, {"x": foreign})
            batch = store.batch()
            store.must_commit(batch.create(new) if old is None else batch.put(old, old.with_(domains=new.domains)))
        case _:
            for vm in store.all(VirtualMachine)[:1]:
                store.must_commit(store.batch().put(vm, vm.with_status(node_name=name)))
