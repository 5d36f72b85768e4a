"""Could a node, or a rack, be lost now?"""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner.capacity import (
    FAILOVER_READY,
    domain_failures,
    failover_condition,
    plan_failures,
    single_failures,
)
from orchestrator.planner.packing import place_all
from orchestrator.planner.snapshot import Snapshot
from orchestrator.resources import Key, RunPolicy, VirtualMachine
from tests.builders import a_node_state, a_snapshot, a_vm, keep_apart
from tests.small_herds import random_herd


def key(name: str) -> Key:
    return Key(f"default/{name}")


def herd_of(*vms: VirtualMachine, nodes: int = 3, memory_mib: int = 4096) -> Snapshot:
    used = dict.fromkeys([f"n{i}" for i in range(1, nodes + 1)], 0)
    for vm in vms:
        used[vm.status.node_name] += vm.spec.memory_mib
    states = [a_node_state(name, memory_mib=memory_mib, memory_used_mib=mib) for name, mib in used.items()]
    return a_snapshot(states, vms)


def test_all_of_a_node_are_placed_together_and_who_is_left_is_named() -> None:
    snapshot = herd_of(a_vm("a", memory="3Gi"), a_vm("b", memory="1Gi"), a_vm("c", node="n2", memory="2Gi"), nodes=2)
    failures = plan_failures(snapshot, single_failures(snapshot))
    assert list(failures["n1"].stranded) == [key("a")]
    told = "1 of 2 VMs would find no place: default/a (0/2 nodes: 1 lost, 1 short of 3072 MiB memory)"
    assert failures["n1"].message == told
    assert failures["n2"].stranded != {}
    condition = failover_condition(FAILOVER_READY, [failures["n1"]])
    assert (condition.status, condition.reason) == ("False", "VirtualMachinesStranded")


def test_only_what_would_be_restarted_counts() -> None:
    manual = a_vm("a", memory="4Gi", policy=RunPolicy.MANUAL)
    snapshot = herd_of(manual, a_vm("b", node="n2", memory="2Gi"), nodes=2)
    (failure,) = plan_failures(snapshot, {"n1": ("n1",)}).values()
    assert (failure.protected, failure.message) == (0, "no VM would have to be restarted")


def test_rules_hold_in_the_placement_that_is_foreseen() -> None:
    apart = keep_apart(app="web")
    vms = [a_vm(f"w{i}", node=f"n{i}", labels={"app": "web"}, spec=apart) for i in (1, 2, 3)]
    snapshot = herd_of(*vms)
    assert "anti-affinity with w2" in plan_failures(snapshot, {"n1": ("n1",)})["n1"].message
    assert not plan_failures(herd_of(*vms, nodes=4), {"n1": ("n1",)})["n1"].stranded


def test_a_rack_is_lost_as_a_whole() -> None:
    nodes = [
        a_node_state(f"n{i}", memory_mib=2048, memory_used_mib=1024, labels={"rack": rack, "zone": "z"})
        for i, rack in enumerate("aab", 1)
    ]
    snapshot = a_snapshot(nodes, [a_vm(f"v{i}", node=f"n{i}") for i in (1, 2, 3)])
    domains = domain_failures(snapshot)
    assert domains == {"rack=a": ("n1", "n2"), "rack=b": ("n3",)}, "a zone that is the whole herd is no question"
    failures = plan_failures(snapshot, {**single_failures(snapshot), **domains})
    assert [name for name, failure in failures.items() if failure.stranded] == ["rack=a"]


@given(st.integers(0, 10**9))
def test_no_question_changes_the_answer_to_another(seed: int) -> None:
    snapshot = random_herd(Random(seed)).snapshot()
    together = plan_failures(snapshot, single_failures(snapshot))
    for name in snapshot.nodes:
        alone = plan_failures(snapshot, {name: (name,)})[name]
        assert alone == together[name]
        vms = [vm for vm in snapshot.vms.values() if vm.status.node_name == name]
        placed = place_all(snapshot, vms, excluded=frozenset({name}), starting=True)
        assert bool(placed.stranded) == bool(alone.stranded)
        if not alone.stranded:
            assert alone.protected == len(vms)
