"""Indexes follow the documents: after any commits they are what the documents say, in Redis and in memory."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import AlreadyExists, Conflict
from orchestrator.planner.rounds import settling
from orchestrator.resources import (
    KINDS,
    Action,
    GrantState,
    Key,
    Node,
    NodeFencing,
    NodeInventory,
    ObjectMeta,
    OperationPhase,
    OrderKind,
    Resource,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
)
from orchestrator.store import Store, keys
from orchestrator.store.batch import LIST_ORDER, indexes
from orchestrator.store.follower import Follower
from tests.builders import a_grant, a_node, a_vm, an_inventory, an_operation, granted_operation, seen
from tests.redis_contents import contents

FOLLOWED = (Node, NodeInventory, VirtualMachine, VirtualMachineOperation)
NOT_INDEXES = ("resources:", "request:", "changes", "version", "wake:")
NODES = ("n1", "n2", "n3")

Index = dict[str, dict[str, str | None]]


@st.composite
def operations(draw: st.DrawFn) -> VirtualMachineOperation:
    name, vm = draw(st.sampled_from(["op1", "op2", "op3"])), draw(st.sampled_from(["a", "b"]))
    phase = draw(st.sampled_from(OperationPhase))
    operation = an_operation(name, vm, phase=phase)
    if phase.is_final or draw(st.booleans()):
        return operation
    source, target = draw(st.permutations(NODES))[:2]
    action = draw(st.sampled_from(Action))
    grant = a_grant(node=source, target=target, vm=vm, action=action, epoch=draw(st.integers(1, 4)))
    operation = operation.with_status(grant=grant)
    match draw(st.sampled_from(["granted", "running", "asked", "repair"])):
        case "running":
            return operation.with_grant(state=GrantState.RUNNING, cancel=draw(st.booleans()))
        case "asked":
            return settling(operation, "test", kill=draw(st.booleans()), rounds=draw(st.integers(1, 3)))
        case "repair":
            return settling(operation, "test", kill=False, repair=(target, OrderKind.DESTROY, ("incoming",)))
        case _:
            return operation


nodes = st.builds(
    lambda name, ready, cordoned: a_node(name, ready=ready, cordoned=cordoned),
    st.sampled_from(NODES),
    st.booleans(),
    st.booleans(),
)
vms = st.builds(
    lambda name, node, phase, memory: a_vm(name, node=node, phase=phase, memory=memory),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["", *NODES]),
    st.sampled_from(VmPhase),
    st.sampled_from(["512Mi", "1Gi"]),
)
domains = st.dictionaries(
    st.sampled_from(["a", "x", "y"]),
    st.builds(
        lambda state, vm, memory: seen(state, vm=vm).with_(vm=vm and f"default/{vm}", memory_mib=memory),
        st.sampled_from(["running", "shutoff", "absent", "paused"]),
        st.sampled_from(["", "a"]),
        st.integers(0, 99),
    ),
    max_size=3,
)
inventories = st.builds(
    lambda node, found, order: an_inventory(node, found).with_(listing_order=order),
    st.sampled_from(NODES),
    domains,
    st.sampled_from(["", "recovery-1", "recovery-2"]),
)
steps = st.lists(st.tuples(nodes | vms | inventories | operations(), st.booleans()), max_size=12)


@pytest.fixture
def follower(store: Store) -> Iterator[Follower]:
    follower = Follower(store, FOLLOWED).start()
    yield follower
    follower.stop()


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps)
def test_in_redis_and_in_memory_they_are_what_the_documents_say(
    store: Store, follower: Follower, steps: list[tuple[Resource, bool]]
) -> None:
    for resource, is_removed in steps:
        with contextlib.suppress(AlreadyExists, Conflict):  # another active operation of the VM
            write(store, resource, is_removed=is_removed)
    compare(store, follower)
    for documents in store.load(FOLLOWED).resources.values():
        for document in documents.values():
            store.must_commit(store.batch().delete(document))
    compare(store, follower)
    assert not contents(store.redis, ignoring=NOT_INDEXES)  # nothing is left behind


def write(store: Store, resource: Resource, *, is_removed: bool) -> None:
    old = store.find(type(resource), resource.key)
    batch = store.batch()
    if old is None:
        batch.create(resource)
    elif is_removed:
        batch.delete(old)
    else:
        batch.put(old, resource.with_(metadata=old.metadata, created_version=old.created_version))
    store.must_commit(batch)


def compare(store: Store, follower: Follower) -> None:
    documents = store.load(FOLLOWED).resources
    expected: Index = defaultdict(dict)
    for kind in documents.values():
        for document in kind.values():
            for entry in indexes(document, store.config.memory_overhead_mib):
                expected[entry.key][entry.member] = entry.value
    found = {
        name: dict.fromkeys(value) if isinstance(value, set) else value
        for name, value in contents(store.redis, ignoring=NOT_INDEXES).items()
    }
    assert found == expected
    follower.sync()
    with follower.lock:
        assert {name: value for name, value in follower.index.items() if value} == expected
        assert follower.resources == documents


def test_an_open_grant_holds_its_slots_its_room_and_the_nodes_copy() -> None:
    entries = {(e.key, e.member): e.value for e in indexes(granted_operation(), 64)}
    key = Key("default/op")
    copy = entries.pop((keys.grants("n1"), key))
    assert copy is not None
    assert '"epoch":1' in copy
    assert entries == {
        (keys.ACTIVE_OPERATIONS, "default/linux-vm"): key,
        (keys.OPEN_GRANTS, "default/linux-vm"): key,
        (keys.SLOTS_CLUSTER, key): None,
        (keys.slots_outbound("n1"), key): None,
        (keys.slots_inbound("n2"), key): None,
        (keys.claims("n2"), f"operation/{key}"): "1088 1000",
    }


def test_one_being_settled_keeps_all_but_the_copy_and_has_orders() -> None:
    found = {e.key for e in indexes(settling(granted_operation(), "suspect", kill=True), 64)}
    assert keys.grants("n1") not in found
    assert {keys.orders("n1"), keys.orders("n2"), keys.SLOTS_CLUSTER, keys.slots_outbound("n1")} <= found


def test_what_is_not_ours_counts_with_all_its_cpus_unless_it_is_off() -> None:
    domain = seen("running").with_(vm="", memory_mib=700, vcpus=3)
    inventory = an_inventory("n1", {"x": domain, "off": domain.with_(state="shutoff"), "ours": seen("running")})
    ((entry),) = indexes(inventory, 64)
    assert (entry.key, entry.value) == (keys.claims("n1"), "700 3000")


def test_the_order_to_list_anew_is_an_index_of_the_inventory() -> None:
    (entry,) = indexes(an_inventory("n1").with_(listing_order="recovery-1"), 64)
    assert (entry.key, entry.member, entry.value) == (keys.orders("n1"), "recovery-1", LIST_ORDER)


def test_a_fenced_node_s_orders_are_indexes_of_its_fencing() -> None:
    fencing = NodeFencing(metadata=ObjectMeta(name="n1")).with_status(listing_order="return-1")
    (entry,) = indexes(fencing)
    assert (entry.key, entry.member, entry.value) == (keys.orders("n1"), "return-1", LIST_ORDER)


def test_every_kind_has_its_say() -> None:
    without_indexes = {"AccessToken", "Event", "Maintenance", "Namespace", "NodeDrain", "RebalancePolicy"}
    without_indexes |= {"NodeFencing", "VirtualMachineClass"}  # a fencing's orders: above
    assert set(KINDS) == {kind.kind_name for kind in FOLLOWED} | without_indexes
