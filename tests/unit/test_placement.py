"""Which node takes a VM, and what is said of those that don't."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner.placement import (
    Demand,
    choose_node,
    class_obstacle,
    move_demand,
    refusal,
    start_demand,
)
from orchestrator.planner.rules import Whereabouts
from orchestrator.planner.snapshot import NodeState
from orchestrator.resources import ObjectMeta, VmPhase, parse
from orchestrator.resources.cpu import DEFAULT_CPU, CpuRequest
from orchestrator.resources.machine import CpuFeature, Machine, MachineCpu
from orchestrator.resources.scheduling import NodeLabels, Taint, TaintEffect, Toleration
from orchestrator.resources.vm import Memory
from tests.builders import a_class, a_cpu, a_node_state, a_structured_vm

AVX2 = CpuRequest(model="qemu64", features=frozenset({"sse2", "avx2"}))
TAINTED = (Taint(key="dedicated", value="db", effect=TaintEffect.NO_SCHEDULE),)
AVOIDED = Taint(key="old", effect=TaintEffect.PREFER_NO_SCHEDULE)
TOLERANT = Toleration(key="dedicated", operator="Exists")
IN_ZONE = parse(
    NodeLabels,
    {
        "matchLabels": {"disk": "ssd"},
        "matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}],
    },
)


def a_demand(**more: Any) -> Demand:
    """A demand; `labels`, `class_labels` and `tolerations` are of its whereabouts."""
    parts = {name: more.pop(name) for name in ("labels", "class_labels", "tolerations", "affinity") if name in more}
    where = Whereabouts(**{"labels": {}, **parts})
    return Demand(**{"memory_mib": 1088, "cpu_millicores": 1000, "where": where, **more})


def nodes(*states: NodeState) -> dict[str, NodeState]:
    return {state.name: state for state in states}


@pytest.mark.parametrize(
    ("node", "demand", "reason"),
    [
        pytest.param({}, {}, "", id="fits"),
        pytest.param({"ready": False}, {}, "not Ready", id="not ready"),
        pytest.param({"cordoned": True}, {}, "cordoned", id="cordoned"),
        pytest.param({"shutting_down": True}, {}, "shutting down", id="its host shuts down"),
        pytest.param({"ready": False, "cordoned": True}, {}, "not Ready", id="not ready comes first"),
        pytest.param({}, {"exclude": {"n1": "where it runs"}}, "where it runs", id="excluded"),
        pytest.param({}, {"exclude": {"n2": "where it runs"}}, "", id="another excluded"),
        pytest.param({}, {"node_name": "n2"}, "not node n2", id="another named"),
        pytest.param({}, {"node_name": "n1"}, "", id="named"),
        pytest.param({}, {"labels": {"zone": "a"}}, "without label zone=a", id="label missing"),
        pytest.param({"labels": {"zone": "b"}}, {"labels": {"zone": "a"}}, "without label zone=a", id="label differs"),
        pytest.param({"labels": {"zone": "a"}}, {"labels": {"zone": "a"}}, "", id="label there"),
        pytest.param({}, {"labels": {"b": "2", "a": "1"}}, "without label a=1, b=2", id="labels in order"),
        pytest.param({"memory_mib": 1088}, {}, "", id="memory just enough"),
        pytest.param({"memory_mib": 1087}, {}, "short of 1088 MiB memory", id="memory short"),
        pytest.param({"memory_mib": 2000, "memory_used_mib": 1000}, {}, "short of 1088 MiB memory", id="memory used"),
        pytest.param({"cpu": 1000}, {}, "", id="CPU just enough"),
        pytest.param({"cpu": 999}, {}, "short of 1000 millicores CPU", id="CPU short"),
        pytest.param({"cpu_used_millicores": 7001}, {}, "short of 1000 millicores CPU", id="CPU reserved already"),
        pytest.param({"outbound": 1, "inbound": 5}, {}, "", id="slots are not placement"),
    ],
)
def test_why_a_node_is_refused(node: dict[str, Any], demand: dict[str, Any], reason: str) -> None:
    assert refusal(a_node_state("n1", **node), a_demand(**demand)) == reason


def test_the_least_reserved_share_of_cpu_wins_whatever_the_size() -> None:
    big = a_node_state("big", cpu=64_000, cpu_used_millicores=31_000)  # 50 % afterwards
    small = a_node_state("small", cpu=4_000, cpu_used_millicores=500)  # 38 % afterwards
    assert choose_node(nodes(big, small), a_demand()).node == "small"


def test_names_break_ties() -> None:
    assert choose_node(nodes(a_node_state("n3"), a_node_state("n1"), a_node_state("n2")), a_demand()).node == "n1"


def test_where_it_failed_before_comes_last_but_comes() -> None:
    idle, loaded = a_node_state("n1"), a_node_state("n2", cpu_used_millicores=6000)
    demand = a_demand(avoid=frozenset({"n1"}))
    assert choose_node(nodes(idle, loaded), demand).node == "n2"
    assert choose_node(nodes(idle), demand).node == "n1"


def test_the_explanation_counts_reasons() -> None:
    choice = choose_node(
        nodes(
            a_node_state("n1"),
            a_node_state("n2", cordoned=True),
            a_node_state("n3", memory_mib=512),
            a_node_state("n4", memory_mib=600),
        ),
        a_demand(exclude={"n1": "where it runs"}),
    )
    assert choice.node is None
    assert choice.explain() == "0/4 nodes: 1 cordoned, 2 short of 1088 MiB memory, 1 where it runs"


def test_without_a_node_there_is_nothing_to_count() -> None:
    assert choose_node({}, a_demand()).explain() == "there is no node"


def test_the_explanation_stays_short_in_a_large_herd_and_the_same_while_nodes_fill() -> None:
    def full(more: int) -> str:
        states = [a_node_state(f"n{i}", memory_mib=2000, memory_used_mib=1000 + i + more) for i in range(500)]
        return choose_node(nodes(*states), a_demand()).explain()

    assert len(full(0)) < 100
    assert full(0) == full(1)  # else each pass would write each waiting operation anew


@given(
    st.lists(
        st.builds(
            lambda cordoned, memory, cpu, used: {
                "cordoned": cordoned,
                "memory_mib": memory,
                "cpu": cpu,
                "cpu_used_millicores": used,
            },
            st.booleans(),
            st.integers(0, 4000),
            st.integers(0, 8000),
            st.integers(0, 8000),
        ),
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_the_choice_fits_is_the_best_and_does_not_depend_on_order(fields: list[dict[str, Any]], random: Any) -> None:
    states = [a_node_state(f"n{i}", **more) for i, more in enumerate(fields)]
    demand = a_demand()
    choice = choose_node(nodes(*states), demand)
    random.shuffle(states)
    assert choose_node(nodes(*states), demand) == choice
    fitting = [state for state in states if not refusal(state, demand)]
    assert set(choice.refused) == {state.name for state in states} - {state.name for state in fitting}
    if choice.node is None:
        assert not fitting
    else:
        shares = {s.name: (s.cpu_used_millicores + 1000) / s.cpu_millicores for s in fitting}
        assert shares[choice.node] == min(shares.values())


class TestClassesAndTaints:
    @pytest.mark.parametrize(
        ("node", "demand", "reason"),
        [
            pytest.param({"taints": TAINTED}, {}, "with taint dedicated=db:NoSchedule", id="tainted"),
            pytest.param({"taints": TAINTED}, {"tolerations": (TOLERANT,)}, "", id="tolerated"),
            pytest.param({"taints": (AVOIDED,)}, {}, "", id="only disliked"),
            pytest.param({}, {"class_labels": IN_ZONE}, "without label disk=ssd, zone In (a, b)", id="class labels"),
            pytest.param(
                {"labels": {"zone": "b", "disk": "ssd"}}, {"class_labels": IN_ZONE}, "", id="class labels met"
            ),
            pytest.param({"cpu_": a_cpu("sse2")}, {"cpu": AVX2}, "without CPU features avx2", id="CPU"),
            pytest.param({"cpu_": a_cpu("sse2", "avx2")}, {"cpu": AVX2}, "", id="CPU there"),
            pytest.param({}, {"cpu": AVX2}, "", id="a CPU that was not told is no obstacle"),
            pytest.param({"cpu_": a_cpu()}, {"like": a_cpu()}, "", id="the same CPU"),
            pytest.param({"cpu_": a_cpu()}, {"like": a_cpu("sse2")}, "without an identical CPU", id="another CPU"),
            pytest.param({"domain_type": "qemu"}, {"kvm": True}, "without KVM", id="no KVM"),
        ],
    )
    def test_why_a_node_is_refused(self, node: dict[str, Any], demand: dict[str, Any], reason: str) -> None:
        state = replace(a_node_state("n1", **{k: v for k, v in node.items() if k != "cpu_"}), cpu=node.get("cpu_"))
        assert refusal(state, a_demand(**demand)) == reason

    def test_a_disliked_node_comes_after_a_fuller_one(self) -> None:
        disliked, full = a_node_state("n1", taints=(AVOIDED,)), a_node_state("n2", cpu_used_millicores=6000)
        assert choose_node(nodes(disliked, full), a_demand()).node == "n2"
        assert choose_node(nodes(disliked), a_demand()).node == "n1"

    def test_reasons_of_cpus_are_counted(self) -> None:
        poor = [replace(a_node_state(f"n{n}"), cpu=a_cpu("sse2")) for n in range(2)]
        choice = choose_node(nodes(*poor, a_node_state("n9", taints=TAINTED)), a_demand(cpu=AVX2))
        assert choice.explain() == "0/3 nodes: 1 with taint dedicated=db:NoSchedule, 2 without CPU features avx2"

    def test_the_class_wins_over_the_vms_own_selector(self) -> None:
        vm = a_structured_vm(nodeSelector={"zone": "a", "disk": "ssd"}, virtualMachineClassName="c")
        vm_class = a_class("c", nodeSelector={"matchLabels": {"zone": "b"}}, tolerations=[{"operator": "Exists"}])
        demand = start_demand(vm, vm_class, 64)
        assert (dict(demand.where.labels), dict(demand.where.class_labels.match_labels)) == (
            {"disk": "ssd"},
            {"zone": "b"},
        )
        assert refusal(a_node_state("n1", labels={"zone": "b", "disk": "ssd"}, taints=TAINTED), demand) == ""
        assert refusal(a_node_state("n1", labels={"zone": "a", "disk": "ssd"}), demand) == "without label zone=b"

    def test_a_start_gives_the_cpu_that_was_recorded_while_the_same_is_asked_for(self) -> None:
        cpu = MachineCpu(model="EPYC", features=(CpuFeature(name="avx2"), CpuFeature(name="svm", policy="disable")))
        vm = a_structured_vm().with_status(machine=Machine(cpu=cpu, cpu_from="custom Nehalem"))
        assert start_demand(vm, None, 0).cpu == cpu.request
        other = vm.with_status(machine=Machine(cpu=cpu, cpu_from="custom qemu64"))
        assert start_demand(other, None, 0).cpu == DEFAULT_CPU

    def test_a_running_vm_takes_along_what_it_runs_with(self) -> None:
        vm = a_structured_vm().with_status(phase=VmPhase.RUNNING, node_name="n1")
        vm = vm.with_(spec=vm.spec.with_(memory=Memory(size="8Gi"))).with_status(applied=vm.spec)
        source = a_node_state("n1")
        demand = move_demand(vm, None, 64, source)
        assert (demand.memory_mib, demand.cpu, demand.kvm) == (1088, None, False)
        seen = Machine(domain_type="kvm", cpu=MachineCpu(mode="host-passthrough"))
        demand = move_demand(vm.with_status(machine=seen), None, 64, replace(source, cpu=a_cpu()))
        assert (demand.like, demand.kvm) == (a_cpu(), True)

    @pytest.mark.parametrize(
        ("machine", "source", "is_compared"),
        [
            ("kvm", "kvm", True),
            ("qemu", "qemu", True),
            ("", "kvm", True),
            ("kvm", "qemu", False),
            ("qemu", "kvm", False),
        ],
    )
    def test_cpus_are_compared_within_one_domain_type(self, machine: str, source: str, is_compared: bool) -> None:
        """A host tells of the CPU that it gives by its own domain type: another one's says nothing of this guest."""
        features = (CpuFeature(name="avx2"),)
        for mode in ("custom", "host-passthrough"):
            seen = Machine(domain_type=machine, cpu=MachineCpu(mode=mode, model="EPYC", features=features))
            vm = a_structured_vm().with_status(phase=VmPhase.RUNNING, node_name="n1", machine=seen)
            here = replace(a_node_state("n1", domain_type=source), cpu=a_cpu("avx2"))
            demand = move_demand(vm, None, 64, here)
            assert (demand.cpu is not None) == is_compared
            assert (demand.like is not None) == (is_compared and mode == "host-passthrough")
            poor = replace(a_node_state("n2", domain_type=machine or "kvm"), cpu=a_cpu("sse2"))
            assert (refusal(poor, demand) != "") == is_compared

    def test_a_class_that_is_not_there_holds_up_the_start(self) -> None:
        vm = a_structured_vm(virtualMachineClassName="c")
        assert class_obstacle(vm, None) == "VirtualMachineClass 'c' not found"
        assert class_obstacle(vm, a_class("c")) == ""
        edited = a_class("c").with_(metadata=ObjectMeta(name="c", generation=2))
        assert class_obstacle(vm, edited) == "VirtualMachineClass 'c' has no CPU yet"
        assert class_obstacle(a_structured_vm(), None) == ""
