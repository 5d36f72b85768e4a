"""Which VMs run on an outdated hypervisor, and which of them move."""

import pytest

from orchestrator.planner.firmware import firmware_condition, newest, number, plan_updates
from orchestrator.resources import Node
from orchestrator.resources.node import HYPERVISOR_LABEL, HypervisorInfo
from tests.builders import a_node, a_node_state, a_snapshot, a_vm, some_needs


def with_qemu(name: str, version: str, *, ready: bool = True) -> Node:
    return a_node(name, ready=ready).with_status(hypervisor=HypervisorInfo(version=version))


@pytest.mark.parametrize(
    ("text", "found"), [("QEMU 7.2.22", "7.2.22"), ("", ""), ("fake", ""), ("8.2.0+dfsg", "8.2.0")]
)
def test_the_number_of_a_version(text: str, found: str) -> None:
    assert HypervisorInfo(version=text).number == found


def test_ten_is_newer_than_nine() -> None:
    assert number("8.2.10") > number("8.2.9") > number("8.2") > number("")


def test_the_newest_is_that_of_a_ready_node() -> None:
    nodes = [with_qemu("n1", "QEMU 7.2.22"), with_qemu("n2", "QEMU 8.2.0"), with_qemu("n3", "QEMU 9.0.0", ready=False)]
    best = newest(nodes)
    assert (best.version, best.nodes, best.is_common) == ("8.2.0", ("n2",), True)
    assert not newest([*nodes, with_qemu("n4", "QEMU 7.2.22")]).is_common
    assert newest([]).version == ""


@pytest.mark.parametrize(
    ("runs_on", "status"), [("8.2.0", "True"), ("9.0.0", "True"), ("7.2.22", "False"), ("", "Unknown")]
)
def test_the_condition(runs_on: str, status: str) -> None:
    best = newest([with_qemu("n1", "QEMU 8.2.0")])
    assert firmware_condition(a_vm(firmware=runs_on), best).status == status


class TestUpdates:
    BEST = newest([with_qemu("n1", "QEMU 7.2.22"), with_qemu("n2", "QEMU 8.2.0")])
    NODES = (
        a_node_state("n1", labels={HYPERVISOR_LABEL: "7.2.22"}),
        a_node_state("n2", labels={HYPERVISOR_LABEL: "8.2.0"}),
    )

    def test_an_outdated_one_moves_to_a_newer_node(self) -> None:
        vms = [a_vm("old", firmware="7.2.22"), a_vm("new", node="n2", firmware="8.2.0"), a_vm("unknown")]
        assert plan_updates(a_snapshot(self.NODES, vms), vms, self.BEST, frozenset(), most=9) == {"default/old": "n2"}

    def test_once_for_a_version(self) -> None:
        vms = [
            a_vm("old", firmware="7.2.22", firmware_update="8.2.0"),
            a_vm("older", firmware="7.2.22", firmware_update="8.0.0"),
        ]
        chosen = plan_updates(a_snapshot(self.NODES, vms), vms, self.BEST, frozenset(), most=9)
        assert list(chosen) == ["default/older"]

    def test_not_what_is_held_or_tied_or_has_no_place_there_nor_more_than_may(self) -> None:
        vms = [
            a_vm("held", firmware="7.2.22"),
            a_vm("tied", firmware="7.2.22", needs=some_needs(obstacles=("host device pci",))),
            a_vm("big", firmware="7.2.22", memory="900Gi"),
            a_vm("z-1", firmware="7.2.22"),
            a_vm("z-2", firmware="7.2.22"),
        ]
        snapshot = a_snapshot(self.NODES, vms)
        chosen = plan_updates(snapshot, vms, self.BEST, frozenset({"default/held"}), most=2)
        assert list(chosen) == ["default/z-1"]
        assert plan_updates(snapshot, vms, self.BEST, frozenset(), most=0) == {}
