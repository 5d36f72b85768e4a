"""`vmherd drain` and `vmherd maintenance` as a person runs them, beside the real services over fake hosts."""

import json
import re
from collections.abc import Iterator

import pytest

from orchestrator.resources import Maintenance, Node, NodeDrain
from orchestrator.resources.drain import DrainPhase, DrainSpec
from orchestrator.resources.maintenance import MaintenancePhase, MaintenanceSpec, NodeStage
from orchestrator.services import drains, maintenances
from orchestrator.services.nodes import set_unschedulable
from tests.fakes import Stage
from tests.integration.command import Running, Vmherd
from tests.waiting import wait_until


@pytest.fixture
def stage(redis_url: str) -> Iterator[Stage]:
    stage = Stage(redis_url)
    stage.add_nodes("n1", "n2", "n3")
    yield stage
    stage.close()


@pytest.fixture
def vmherd(redis_url: str) -> Iterator[Vmherd]:
    herd = Vmherd(redis_url)
    yield herd
    herd.store.close()


def close_others(stage: Stage) -> None:
    for name in ("n2", "n3"):
        set_unschedulable(stage.ctx, name, unschedulable=True)


def drain_of(stage: Stage) -> NodeDrain:
    return stage.store.get(NodeDrain, "n1")


def one_round(stage: Stage) -> int:
    """What may begin does, and comes to its end: a command in another process wakes nobody here. Gives what is left."""
    for message in stage.grant():
        stage.deliver(message)
    stage.read()
    stage.grant_and_deliver()
    for node in stage.nodes.values():
        node.answer()
    stage.read()
    return len(drain_of(stage).left())


def is_over(stage: Stage) -> bool:
    """Whether the drain is, after one more look at what is due."""
    stage.reconcile()
    return not drain_of(stage).is_open


class TestDrain:
    def test_it_says_what_is_left_and_how_long_that_takes(self, stage: Stage, vmherd: Vmherd) -> None:
        stage.add_vm("large", "n1", memory="4Gi")
        stage.add_vm("small", "n1", memory="2Gi")
        with Running(vmherd, "drain", "n1", "--ignore-daemonsets") as drain:
            drain.wait(lambda lines: "n1: Draining: 2 of 2 VMs to go, 6.0 GiB" in lines)
            assert drain.lines[0] == "node/n1 cordoned"
            wait_until(lambda: one_round(stage) == 1, 30, "one is gone")
            drain.wait(lambda lines: any("1 of 2 VMs to go, 2.0 GiB" in line for line in lines))
            line = next(line for line in drain.lines if "1 of 2 VMs to go" in line)
            assert re.search(r"; about \d+\w+ left$", line), line
            wait_until(lambda: one_round(stage) >= 0 and not stage.world.hosts["n1"], 30, "both are gone")
            stage.nodes["n1"].list_all()
            stage.read()
            assert drain.ended() == 0, drain.errors
        assert drain.lines[-1] == "node/n1 drained"

    def test_no_wait_leaves_it_to_the_control_plane(self, stage: Stage, vmherd: Vmherd) -> None:
        stage.add_vm("a", "n1")
        assert vmherd.ok("drain", "n1", "--no-wait") == "node/n1 cordoned\n"
        assert drain_of(stage).status.phase is DrainPhase.DRAINING
        wait_until(lambda: one_round(stage) >= 0 and not stage.world.hosts["n1"], 30, "it is gone")
        stage.nodes["n1"].list_all()
        stage.read()
        assert drain_of(stage).status.phase is DrainPhase.DRAINED

    def test_what_has_no_place_is_refused_unless_partial_and_ctrl_c_leaves_it_cordoned(
        self, stage: Stage, vmherd: Vmherd
    ) -> None:
        stage.add_vm("a", "n1")
        close_others(stage)
        said = vmherd.refused("drain", "n1", "--no-wait")
        assert said.startswith("n1 can't be emptied: the rest of the herd has no place for 1 VMs: a (")
        assert not stage.store.get(Node, "n1").spec.unschedulable
        with Running(vmherd, "drain", "n1", "--partial") as drain:
            drain.wait(lambda lines: any("1 of 1 VMs to go" in line for line in lines))
            assert drain.interrupt() == 130
        assert any("It stays cordoned: vmherd uncordon n1" in line for line in drain.errors), drain.errors
        assert drain_of(stage).status.phase is DrainPhase.CANCELLED
        assert stage.operations() == [], "it had not begun"
        assert stage.store.get(Node, "n1").spec.unschedulable
        vmherd.ok("uncordon", "n1")
        assert not stage.store.get(Node, "n1").spec.unschedulable

    def test_a_timeout_ends_it_with_what_is_left(self, stage: Stage, vmherd: Vmherd) -> None:
        stage.add_vm("a", "n1")
        with Running(vmherd, "drain", "n1", "--timeout", "1s") as drain:
            drain.wait(lambda lines: any("1 of 1 VMs to go" in line for line in lines))
            wait_until(lambda: is_over(stage), 30, "its time is over")
            assert drain.ended() == 1
        assert len(drain.errors) == 1
        assert drain.errors[0].startswith("vmherd: node/n1: drain-failed: not empty after 1 s: 1 of 1 VMs to go")
        assert drain_of(stage).status.phase is DrainPhase.FAILED
        assert stage.store.get(Node, "n1").spec.unschedulable

    def test_uncordon_drops_what_has_not_begun(self, stage: Stage, vmherd: Vmherd) -> None:
        stage.add_vm("a", "n1")
        drains.begin(stage.ctx, "n1", DrainSpec(requested_by="the test"))
        assert len(stage.operations()) == 1
        vmherd.ok("uncordon", "n1")
        assert stage.operations() == []
        assert drain_of(stage).status.phase is DrainPhase.CANCELLED


class TestMaintenance:
    def stage_of(self, stage: Stage, node: str) -> NodeStage:
        return stage.store.get(Maintenance, "m").node(node).stage

    def test_paused_nothing_is_begun_until_it_is_resumed(self, stage: Stage, vmherd: Vmherd) -> None:
        maintenances.begin(stage.ctx, "m", MaintenanceSpec(nodes=("n1", "n2"), hook="true"))
        assert vmherd.ok("maintenance", "pause", "m") == "maintenance/m paused\n"
        stage.reconcile()
        assert self.stage_of(stage, "n1") is NodeStage.WAITING
        assert not stage.store.get(Node, "n1").spec.unschedulable
        resumed = json.loads(vmherd.ok("maintenance", "resume", "m", "-o", "json"))
        assert (resumed["kind"], resumed["status"]["phase"]) == ("Maintenance", "Running")
        assert vmherd.ok("maintenance", "resume", "m") == "maintenance/m running\n"
        stage.reconcile()
        assert stage.store.get(Node, "n1").spec.unschedulable

    def test_stopped_it_gives_the_node_back_and_begins_with_no_other(self, stage: Stage, vmherd: Vmherd) -> None:
        stage.add_vm("a", "n1")
        maintenances.begin(stage.ctx, "m", MaintenanceSpec(nodes=("n1", "n2"), hook="true"))
        stage.reconcile()
        assert self.stage_of(stage, "n1") is NodeStage.DRAINING
        assert vmherd.ok("maintenance", "stop", "m") == "maintenance/m stopping\n"
        for _ in range(2):
            stage.reconcile()
        found = stage.store.get(Maintenance, "m")
        assert found.status.phase is MaintenancePhase.STOPPED
        assert found.node("n2").stage is NodeStage.SKIPPED
        assert not stage.store.get(Node, "n1").spec.unschedulable
        assert stage.operations() == [], "what had not begun is dropped"
        said = vmherd.refused("maintenance", "resume", "m")
        assert said == "Maintenance 'm' is Stopped, not Paused"

    def test_one_that_is_not_there(self, vmherd: Vmherd) -> None:
        assert "'m' not found" in vmherd.refused("maintenance", "stop", "m")
