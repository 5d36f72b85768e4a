"""The herd balances itself on real hosts: nobody asks for a migration here, the test only makes a reason for one."""

import math
from collections.abc import Iterator

import pytest
import yaml

from orchestrator.planner.capacity import FAILOVER_READY
from orchestrator.resources import OperationPhase, VirtualMachineOperation, find_condition
from orchestrator.resources.rebalancing import REASON_ANNOTATION
from orchestrator.settings import Settings
from tests.builders import keep_apart
from tests.lab import outside
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def idle(herd: LabHerd) -> Iterator[LabHerd]:
    """The module's herd with rebalancing off, before the test and after it."""
    herd.vmherd("rebalance", "--off", "--set", "intervalSeconds=10")
    yield herd
    herd.vmherd("rebalance", "--off")


def reserved(herd: LabHerd, node: str) -> float:
    """The share of a node's CPU that is reserved, from the VMs' own manifests."""
    there = [vm for vm in herd.cluster.vms() if vm.status.node_name == node]
    whole = herd.cluster.node(node).status.capacity.cpu * Settings().cpu_ratio
    return sum(vm.spec.cpu.cores for vm in there) / whole


def migrations(herd: LabHerd) -> list[VirtualMachineOperation]:
    """Operations other than those that started the guests."""
    return [operation for operation in herd.cluster.operations() if operation.spec.type.is_migration]


def crowd(herd: LabHerd) -> tuple[Guest, Guest, str]:
    """Let one node have more than 80 % of its CPU reserved, by a large machine and a small guest."""
    node = herd.lab.hosts[0].name
    whole = herd.cluster.node(node).status.capacity.cpu * Settings().cpu_ratio
    large, small = herd.lab.blank("large", memory_mib=64), herd.lab.guest("small", address="192.0.2.111")
    herd.cluster.create(herd.manifest(large, node=node, cores=math.floor(whole * 0.75)))
    herd.cluster.create(herd.manifest(small, node=node, cores=math.ceil(whole * 0.1)))
    for guest in (large, small):
        herd.wait_vm(guest.name, lambda vm: vm.status.phase == "Running", 90)
        herd.free(guest.name)
    small.wait_up(90)
    assert reserved(herd, node) > 0.8
    return large, small, node


def test_a_node_over_the_threshold_is_relieved_and_only_while_that_is_on(idle: LabHerd) -> None:
    large, small, node = crowd(idle)
    dry = idle.vmherd("rebalance", "--dry-run")
    assert "(nothing was done)" in dry
    before = small.wait_ticks(1)
    # Off: two ticks of beat come and go, each of which would have begun a scan.
    seen = idle.cluster.store.redis.scan_iter
    ticks = set(seen("tick:rebalance:*"))
    wait_until(lambda: len(set(seen("tick:rebalance:*")) - ticks) >= 2, 60, "two ticks of the rebalancer")
    assert migrations(idle) == []
    assert reserved(idle, node) > 0.8

    idle.vmherd("rebalance", "--on")
    wait_until(lambda: reserved(idle, node) <= 0.8, 90, lambda: f"at most 80 %; it is {reserved(idle, node)}")
    moved = [vm for vm in idle.cluster.vms() if vm.status.node_name != node]
    assert len(moved) == 1
    (operation,) = migrations(idle)
    name = operation.name
    idle.wait_operation(name, lambda operation: operation.status.phase is OperationPhase.COMPLETED, 60)
    assert f"node {node} has" in operation.metadata.annotations[REASON_ANNOTATION]
    assert "Considered:" in idle.vmherd("explain", f"vmop/{name}")
    after = small.wait_ticks(1)
    assert after.ticks > before.ticks, "the guest went on, it was not started anew"
    assert after.uptime_s > before.uptime_s
    guest = {"large": large, "small": small}[moved[0].name]
    assert outside.states(idle.lab, guest) == {moved[0].status.node_name: "running"}
    assert "nothing to move" in idle.vmherd("rebalance", "--dry-run")


def test_two_that_are_made_mutually_exclusive_are_separated(herd: LabHerd) -> None:
    herd.vmherd("rebalance", "--on", "--set", "intervalSeconds=10")
    node = herd.lab.hosts[0].name
    guests = [herd.lab.guest(f"web-{i}", address=f"192.0.2.{120 + i}") for i in (1, 2)]
    herd.start_guests(*((guest, node) for guest in guests))
    before = [guest.wait_ticks(1) for guest in guests]
    for guest in guests:
        manifest = herd.manifest(guest, **keep_apart(app="web"))
        manifest["metadata"]["labels"] = {"app": "web"}
        herd.vmherd("apply", "-f", "-", stdin=yaml.safe_dump(manifest))
    wait_until(lambda: len({vm.status.node_name for vm in herd.cluster.vms()}) == 2, 90, "on two nodes")
    wait_until(lambda: all(vm.status.phase == "Running" for vm in herd.cluster.vms()), 60, "both Running")
    after = [guest.wait_ticks(1) for guest in guests]
    assert all(now.ticks > then.ticks for now, then in zip(after, before, strict=True))
    (operation,) = migrations(herd)
    assert "anti-affinity with web-" in operation.metadata.annotations[REASON_ANNOTATION]


def test_each_node_says_whether_it_could_be_lost(herd: LabHerd) -> None:
    guest = herd.lab.blank("alone", memory_mib=64)
    herd.start_guests((guest, herd.lab.hosts[0].name), up=False)
    names = [host.name for host in herd.lab.hosts]
    wait_until(lambda: all(_failover_ready(herd, name) == "True" for name in names), 90, "all can be lost")
    for name in names[1:]:
        herd.cluster.cordon(name)
    wait_until(lambda: _failover_ready(herd, names[0]) == "False", 90, "the first can't be lost")
    condition = find_condition(herd.cluster.node(names[0]).status.conditions, FAILOVER_READY)
    assert condition is not None
    assert "default/alone (0/3 nodes: 2 cordoned, 1 lost)" in condition.message
    herd.vmherd("plan", "failure", names[1])


def _failover_ready(herd: LabHerd, node: str) -> str:
    condition = find_condition(herd.cluster.node(node).status.conditions, FAILOVER_READY)
    return condition.status if condition is not None else ""
