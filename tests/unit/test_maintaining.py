"""What a rolling maintenance comes to next."""

from datetime import timedelta
from typing import Any

import pytest

from orchestrator.planner.maintaining import (
    MaintenanceStep,
    claimed,
    hook_ended,
    in_sight,
    next_maintenance,
    resumed,
)
from orchestrator.resources import Maintenance, Node, NodeDrain, ObjectMeta
from orchestrator.resources.drain import DrainPhase, DrainStatus
from orchestrator.resources.maintenance import MaintenancePhase, MaintenanceSpec, NodeMaintenance, NodeStage
from tests.builders import NOW, a_node

LEASE = timedelta(seconds=60)


def a_maintenance(nodes: dict[str, NodeMaintenance] | None = None, names: str = "n1 n2 n3", **spec: Any) -> Maintenance:
    made = Maintenance(
        metadata=ObjectMeta(name="m"), spec=MaintenanceSpec(nodes=tuple(names.split()), hook="true", **spec)
    )
    return made.with_status(nodes=nodes or {})


def at(stage: NodeStage, **more: Any) -> NodeMaintenance:
    return NodeMaintenance(stage=stage, since=NOW, **more)


def look(
    maintenance: Maintenance,
    *nodes: Node,
    drains: dict[str, DrainPhase] | None = None,
    refuse: str = "",
    after_s: float = 0,
) -> MaintenanceStep:
    known = {node.name: node for node in nodes} or {name: a_node(name) for name in maintenance.spec.nodes}
    made = {
        name: NodeDrain(
            metadata=ObjectMeta(name=name), status=DrainStatus(phase=phase, started_at=NOW, message="it says")
        )
        for name, phase in (drains or {}).items()
    }
    now = NOW + timedelta(seconds=after_s)
    return next_maintenance(maintenance, known, made, lambda _, name: refuse if name != "n1" else "", now)


def cordoned(name: str, **more: Any) -> Node:
    return a_node(name, cordoned=True, **more)


class TestBeginning:
    def test_one_at_a_time(self) -> None:
        step = look(a_maintenance())
        assert step.drain == ("n1",)
        assert step.maintenance.away == ("n1",)
        assert look(step.maintenance, drains={"n1": DrainPhase.DRAINING}).drain == ()

    def test_as_many_as_can_be_spared(self) -> None:
        assert look(a_maintenance(parallel=0)).drain == ("n1", "n2", "n3")
        step = look(a_maintenance(parallel=0), refuse="no place for 1 VMs")
        assert step.drain == ("n1",)
        assert step.maintenance.node("n2").message == "waits: no place for 1 VMs"

    @pytest.mark.parametrize(("parallel", "begun"), [(2, 1), (0, 35)])
    def test_a_look_is_about_those_away_and_the_next_ones(self, parallel: int, begun: int) -> None:
        names = [f"n{number}" for number in range(1000)]
        over = {name: at(NodeStage.DONE) for name in names[:100]}
        one = a_maintenance({**over, "n500": at(NodeStage.HOOK)}, " ".join(names), parallel=parallel)
        sight = in_sight(one)
        assert sight == (*names[100 : 100 + len(sight) - 1], "n500")
        assert len(sight) < 50
        drained = look(one, *(a_node(name) for name in sight)).drain
        assert drained == tuple(names[100 : 100 + begun])

    def test_not_one_that_is_not_ready(self) -> None:
        step = look(a_maintenance(), a_node("n1", ready=False), a_node("n2"), a_node("n3"))
        assert step.drain == ("n2",)

    def test_none_while_it_is_paused(self) -> None:
        assert look(a_maintenance().with_status(phase=MaintenancePhase.PAUSED)).drain == ()

    def test_a_drain_that_was_to_be_begun_is_begun(self) -> None:
        """Whoever recorded that has died before."""
        assert look(a_maintenance({"n1": at(NodeStage.DRAINING)})).drain == ("n1",)


class TestTurn:
    def test_an_empty_node_is_ready_for_its_hook(self) -> None:
        step = look(a_maintenance({"n1": at(NodeStage.DRAINING)}), drains={"n1": DrainPhase.DRAINED})
        assert step.maintenance.node("n1").stage is NodeStage.DRAINED

    @pytest.mark.parametrize("phase", [DrainPhase.FAILED, DrainPhase.CANCELLED, DrainPhase.UNCORDONED])
    def test_one_that_was_not_emptied_pauses_it_all(self, phase: DrainPhase) -> None:
        step = look(a_maintenance({"n1": at(NodeStage.DRAINING)}), drains={"n1": phase})
        assert step.maintenance.node("n1").stage is NodeStage.FAILED
        assert step.maintenance.status.phase is MaintenancePhase.PAUSED
        assert step.drain == ()
        again = resumed(step.maintenance, NOW)
        assert again.node("n1").stage is NodeStage.DRAINING

    def test_one_that_somebody_uncordoned_gets_no_hook(self) -> None:
        step = look(a_maintenance({"n1": at(NodeStage.DRAINED)}))
        assert step.maintenance.node("n1").stage is NodeStage.FAILED

    def test_a_hook_is_on_record_before_and_after(self) -> None:
        begun = claimed(a_maintenance({"n1": at(NodeStage.DRAINED)}), "n1", cordoned("n1"), "me", NOW, LEASE)
        node = begun.node("n1")
        assert (node.stage, node.attempts, node.holder, node.lease_until) == (NodeStage.HOOK, 1, "me", NOW + LEASE)
        ended = hook_ended(begun, "n1", 0, "fine", NOW).node("n1")
        assert (ended.stage, ended.exit_code, ended.output, ended.holder) == (NodeStage.RETURNING, 0, "fine", "")

    def test_one_whose_runner_is_gone_is_run_again(self) -> None:
        begun = claimed(a_maintenance({"n1": at(NodeStage.DRAINED)}), "n1", cordoned("n1"), "me", NOW, LEASE)
        assert look(begun, cordoned("n1"), after_s=59).maintenance.node("n1").stage is NodeStage.HOOK
        lost = look(begun, cordoned("n1"), after_s=60)
        assert lost.maintenance.node("n1").stage is NodeStage.DRAINED
        assert [note.reason for _, note in lost.notes] == ["HookAbandoned"]
        second = claimed(lost.maintenance, "n1", cordoned("n1"), "you", NOW, LEASE)
        assert second.node("n1").attempts == 2

    def test_a_hook_that_fails_pauses_it_all(self) -> None:
        begun = claimed(a_maintenance({"n1": at(NodeStage.DRAINED)}), "n1", cordoned("n1"), "me", NOW, LEASE)
        step = look(hook_ended(begun, "n1", 3, "no", NOW), cordoned("n1"))
        assert step.maintenance.status.phase is MaintenancePhase.PAUSED
        assert resumed(step.maintenance, NOW).node("n1").stage is NodeStage.DRAINED


class TestReturn:
    def back(
        self, node: Node, *, after_s: float = 0, before: NodeMaintenance | None = None, **spec: Any
    ) -> NodeMaintenance:
        entry = before or at(NodeStage.RETURNING, exit_code=0, hook_ended_at=NOW, boot_id="one")
        maintenance = a_maintenance({"n1": entry}, names="n1", **spec)
        return look(maintenance, node, after_s=after_s).maintenance.node("n1")

    def booted(self, boot_id: str, **more: Any) -> Node:
        return cordoned("n1", **more).with_status(boot_id=boot_id)

    def test_a_host_that_has_booted_is_back_at_once(self) -> None:
        assert self.back(self.booted("two")).stage is NodeStage.UNCORDONING

    def test_one_that_has_booted_and_is_not_ready_is_not(self) -> None:
        node = self.booted("two").with_status(conditions=a_node("n1", ready=False).status.conditions)
        assert self.back(node).stage is NodeStage.RETURNING

    def test_one_that_does_not_reboot_is_back_when_it_was_ready_for_a_while(self) -> None:
        assert self.back(self.booted("one"), after_s=29).stage is NodeStage.RETURNING
        assert self.back(self.booted("one"), after_s=30).stage is NodeStage.UNCORDONING
        assert self.back(self.booted("one"), after_s=3600, reboots=True).stage is NodeStage.RETURNING

    def test_one_that_was_away_begins_its_while_anew(self) -> None:
        away = at(
            NodeStage.RETURNING, exit_code=0, hook_ended_at=NOW, boot_id="one", away_at=NOW + timedelta(seconds=20)
        )
        again = self.back(self.booted("one"), after_s=40, before=away)
        assert again.stage is NodeStage.RETURNING
        assert self.back(self.booted("one"), after_s=69, before=again).stage is NodeStage.RETURNING
        assert self.back(self.booted("one"), after_s=70, before=again).stage is NodeStage.UNCORDONING

    def test_one_that_stays_away_has_failed_in_the_end(self) -> None:
        node = a_node("n1", ready=False, cordoned=True)
        first = self.back(node, ready_timeout_s=100)
        assert first.stage is NodeStage.RETURNING
        assert self.back(node, before=first, after_s=100, ready_timeout_s=100).stage is NodeStage.FAILED
        assert self.back(node, before=first, after_s=10**6).stage is NodeStage.RETURNING

    def test_it_takes_vms_again_and_is_done(self) -> None:
        maintenance = a_maintenance({"n1": at(NodeStage.UNCORDONING, exit_code=0)}, names="n1")
        step = look(maintenance, cordoned("n1"))
        assert step.uncordon == ("n1",)
        done = look(step.maintenance, a_node("n1"))
        assert done.maintenance.node("n1").stage is NodeStage.DONE
        assert done.maintenance.status.phase is MaintenancePhase.COMPLETED

    def test_one_that_was_cordoned_before_stays_so(self) -> None:
        maintenance = a_maintenance({"n1": at(NodeStage.UNCORDONING, exit_code=0, was_cordoned=True)}, names="n1")
        step = look(maintenance, cordoned("n1"))
        assert step.uncordon == ()
        assert step.maintenance.status.phase is MaintenancePhase.COMPLETED


class TestStop:
    def stopping(self, **nodes: NodeMaintenance) -> MaintenanceStep:
        maintenance = a_maintenance(nodes).with_status(phase=MaintenancePhase.STOPPING)
        return look(maintenance, cordoned("n1"), a_node("n2"), a_node("n3"), drains={"n1": DrainPhase.DRAINING})

    def test_what_has_not_begun_is_skipped_and_a_drain_is_ended(self) -> None:
        step = self.stopping(n1=at(NodeStage.DRAINING))
        assert step.cancel == ("n1",)
        assert step.maintenance.node("n1").stage is NodeStage.UNCORDONING
        assert step.maintenance.node("n2").stage is NodeStage.SKIPPED
        assert step.maintenance.is_open

    def test_a_hook_that_runs_comes_to_its_end(self) -> None:
        running = at(NodeStage.HOOK, holder="me", lease_until=NOW + LEASE)
        assert self.stopping(n1=running).maintenance.node("n1") == running

    def test_a_node_that_failed_stays_cordoned_and_is_named(self) -> None:
        failed = at(NodeStage.FAILED, failed_at=NodeStage.DRAINED, message="its hook ended with code 3")
        step = self.stopping(n1=failed, n2=at(NodeStage.DONE), n3=at(NodeStage.DONE))
        assert step.uncordon == ()
        assert step.maintenance.node("n1").message == "left cordoned: its hook ended with code 3"
        assert step.maintenance.status.phase is MaintenancePhase.STOPPED
