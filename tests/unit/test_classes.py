"""Classes of VMs: which CPU several nodes have in common, which nodes can give one, and when a class is Ready."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner.classes import class_condition, evaluated, uses
from orchestrator.resources import Node, VirtualMachineClass, VmPhase, find_condition, parse
from orchestrator.resources.cpu import CpuRequest, NodeCpu, baseline, lacking
from orchestrator.resources.node import HypervisorInfo
from orchestrator.resources.vmclass import ClassPhase
from tests.builders import NOW, a_class, a_cpu, a_node, a_structured_vm

FEATURES = st.frozensets(st.sampled_from(["sse2", "avx", "avx2", "aes", "bmi1", "svm"]), min_size=1)
CPUS = st.builds(
    lambda features, model: NodeCpu(
        vendor="AMD", model=model, features=features, models=frozenset({"qemu64", "kvm64", model})
    ),
    FEATURES,
    st.sampled_from(["EPYC", "EPYC-Rome", "Opteron_G2"]),
)


def a_host(name: str, cpu: NodeCpu | None, **labels: str) -> Node:
    return a_node(name, labels=labels).with_status(hypervisor=HypervisorInfo(cpu=cpu))


def wanted(cpu: dict[str, Any], **spec: Any) -> VirtualMachineClass:
    return parse(VirtualMachineClass, {"metadata": {"name": "fast"}, "spec": {"cpu": cpu, **spec}})


def message_of(vm_class: VirtualMachineClass, kind: str = "Ready") -> str:
    condition = find_condition(vm_class.status.conditions, kind)
    assert condition is not None
    return condition.message


class TestBaseline:
    def test_of_equal_models_it_is_the_model_with_what_all_have(self) -> None:
        one, two = a_cpu("sse2", "avx", "aes"), a_cpu("sse2", "avx").with_(disabled=frozenset({"svm"}))
        assert baseline({"n1": one, "n2": two}) == CpuRequest(
            model="EPYC", vendor="AMD", features=frozenset({"sse2", "avx"}), disabled=frozenset({"svm"})
        )

    def test_of_different_models_it_is_a_generic_one_with_what_all_have(self) -> None:
        found = baseline({"n1": a_cpu("sse2", "avx"), "n2": a_cpu("sse2", "aes", model="EPYC-Rome")})
        assert found == CpuRequest(model="qemu64", vendor="AMD", features=frozenset({"sse2"}))

    @pytest.mark.parametrize(
        ("cpus", "why"),
        [
            ({}, "no node matches"),
            ({"n1": NodeCpu()}, "the CPU of node n1 is not known yet"),
            ({"n1": a_cpu(), "n2": a_cpu(vendor="Intel")}, "several vendors (AMD: n1; Intel: n2)"),
            ({"n1": a_cpu(models=()), "n2": a_cpu(model="B")}, "no generic CPU model"),
        ],
    )
    def test_there_is_none(self, cpus: dict[str, NodeCpu], why: str) -> None:
        found = baseline(cpus)
        assert isinstance(found, str)
        assert why in found

    @given(st.dictionaries(st.sampled_from(["n1", "n2", "n3", "n4"]), CPUS, min_size=1))
    def test_every_node_can_give_it_and_it_leaves_nothing_out(self, cpus: dict[str, NodeCpu]) -> None:
        found = baseline(cpus)
        assert isinstance(found, CpuRequest)
        assert [lacking(cpu, found) for cpu in cpus.values()] == [""] * len(cpus)
        common = frozenset.intersection(*(cpu.features for cpu in cpus.values()))
        assert found.features == common


class TestLacking:
    @pytest.mark.parametrize(
        ("wanted_cpu", "why"),
        [
            (None, ""),
            (CpuRequest(mode="host-model"), ""),
            (CpuRequest(mode="host-passthrough"), ""),
            (CpuRequest(model="Nehalem"), ""),
            (CpuRequest(model="EPYC"), ""),
            (CpuRequest(model="Haswell"), "without CPU model Haswell"),
            (CpuRequest(model="qemu64", features=frozenset({"avx2", "aes"})), "without CPU features aes, avx2"),
            (CpuRequest(model="EPYC", vendor="Intel"), "without a CPU of Intel"),
        ],
    )
    def test_a_node_says_what_it_has_not(self, wanted_cpu: CpuRequest | None, why: str) -> None:
        assert lacking(a_cpu("sse2", "avx"), wanted_cpu) == why
        assert lacking(None, wanted_cpu) == ""  # it has not told: the hypervisor itself will say


class TestEvaluation:
    @pytest.mark.parametrize(
        ("cpu", "expected"),
        [
            ({"type": "Host"}, CpuRequest(mode="host-model")),
            ({"type": "HostPassthrough"}, CpuRequest(mode="host-passthrough")),
            ({"type": "Model", "model": "Nehalem"}, CpuRequest(model="Nehalem")),
            (
                {"type": "Features", "features": ["avx"]},
                CpuRequest(model="qemu64", features=frozenset({"avx"})),
            ),
            (
                {"type": "Discovery"},
                CpuRequest(model="EPYC", vendor="AMD", features=frozenset({"sse2", "avx"})),
            ),
        ],
    )
    def test_each_type_of_cpu(self, cpu: dict[str, Any], expected: CpuRequest) -> None:
        found = evaluated(wanted(cpu), [a_host("n2", a_cpu()), a_host("n1", a_cpu())], NOW)
        assert (found.status.cpu, found.status.phase) == (expected, ClassPhase.READY)
        assert found.status.available_nodes == ("n1", "n2")
        assert found.status.observed_generation == 1
        assert evaluated(found, [a_host("n1", a_cpu()), a_host("n2", a_cpu())], NOW) == found

    def test_nodes_that_cannot_give_it_are_left_out_with_their_reason(self) -> None:
        nodes = [a_host("n1", a_cpu("sse2")), a_host("n2", a_cpu("sse2", "avx2"))]
        found = evaluated(wanted({"type": "Features", "features": ["avx2"]}), nodes, NOW)
        assert found.status.available_nodes == ("n2",)
        none = evaluated(wanted({"type": "Features", "features": ["avx512f"]}), nodes, NOW)
        assert none.status.phase is ClassPhase.PENDING
        assert message_of(none) == "no node has CPU features avx512f"
        model = evaluated(wanted({"type": "Model", "model": "Haswell"}), nodes, NOW)
        assert message_of(model) == "all 2 nodes are without CPU model Haswell"

    def test_only_its_nodes_count(self) -> None:
        nodes = [a_host("n1", a_cpu("sse2"), zone="a"), a_host("n2", a_cpu("sse2", "avx"), zone="b")]
        found = evaluated(wanted({"type": "Discovery"}, nodeSelector={"matchLabels": {"zone": "b"}}), nodes, NOW)
        assert found.status.available_nodes == ("n2",)
        assert found.status.cpu is not None
        assert found.status.cpu.features == {"sse2", "avx"}
        looked_at = {"nodeSelector": {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}}
        found = evaluated(wanted({"type": "Discovery", "discovery": looked_at}), nodes, NOW)
        assert found.status.discovered_from == ("n1",)
        assert found.status.available_nodes == ("n1", "n2")
        nowhere = evaluated(wanted({"type": "Host"}, nodeSelector={"matchLabels": {"zone": "c"}}), nodes, NOW)
        assert message_of(nowhere) == "no node matches spec.nodeSelector"

    def test_a_discovered_cpu_follows_the_nodes_until_a_vm_has_it(self) -> None:
        rich, poor = a_host("n1", a_cpu("sse2", "avx")), a_host("n2", a_cpu("sse2"))
        first = evaluated(wanted({"type": "Discovery"}), [rich], NOW)
        free = evaluated(first, [rich, poor], NOW)
        assert free.status.cpu is not None
        assert free.status.cpu.features == {"sse2"}
        held = evaluated(first, [rich, poor], NOW, is_used=True)
        assert (held.status.cpu, held.status.available_nodes) == (first.status.cpu, ("n1",))
        edited = first.with_(metadata=first.metadata.with_(generation=2))
        anew = evaluated(edited, [rich, poor], NOW, is_used=True)
        assert anew.status.cpu == free.status.cpu

    def test_a_discovery_that_fails_says_why(self) -> None:
        nodes = [a_host("n1", a_cpu()), a_host("n2", a_cpu(vendor="Intel"))]
        found = evaluated(wanted({"type": "Discovery"}), nodes, NOW)
        assert (found.status.phase, found.status.cpu) == (ClassPhase.PENDING, None)
        assert "several vendors" in message_of(found, "Discovered")

    def test_who_uses_a_class(self) -> None:
        vm = a_structured_vm(virtualMachineClassName="generic")
        assert not uses(vm, a_class())
        assert uses(vm.with_status(phase=VmPhase.RUNNING), a_class())
        assert not uses(vm.with_status(phase=VmPhase.RUNNING), a_class("other"))

    def test_a_vm_is_told_of_its_class(self) -> None:
        assert class_condition("generic", a_class()).status == "True"
        assert class_condition("generic", None).message == "VirtualMachineClass 'generic' not found"
        pending = evaluated(wanted({"type": "Host"}), [], NOW)
        assert class_condition("fast", pending).message == "no node matches spec.nodeSelector"
