"""Whether a VM can arrive at a node: what is asked, when, and what follows from the answers."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from orchestrator.planner.migration import ASKED_AHEAD_PER_SOURCE, Check, Decision, Fail, Go, Wait, plan_grants
from orchestrator.planner.preflight import (
    BAD_FOR,
    GOOD_FOR,
    PATIENCE,
    asked,
    copied_disks,
    copied_mib,
    immovable,
    migratable_condition,
    question_about,
)
from orchestrator.planner.snapshot import NodeState, Snapshot
from orchestrator.resources import OperationType, Reason, VirtualMachine, VirtualMachineOperation
from orchestrator.resources.needs import STORAGE_COPY_ANNOTATION, Arrival, LocalDisk
from orchestrator.resources.vmop import MigrateTo
from tests.builders import NOW, a_node_state, a_snapshot, a_vm, an_operation, some_needs

THREE = (a_node_state("n1"), a_node_state("n2"), a_node_state("n3", cpu_used_millicores=1000))
LOCAL = (LocalDisk(target="vda", path="/srv/a.raw", size_mib=100), LocalDisk(target="vdb", path="/srv/b.raw"))
COPY = {STORAGE_COPY_ANNOTATION: "true"}


def picky(name: str = "linux-vm", **status: Any) -> VirtualMachine:
    """A VM on node n1 of which each target has to be asked."""
    return a_vm(name, **{"needs": some_needs(), **status})


def answered(vm: VirtualMachine, age: timedelta = timedelta(), **problems: str) -> VirtualMachine:
    """The VM once these nodes have answered; empty: no problem."""
    arrivals = {
        node: Arrival(
            about=question_about(vm), generation="g1", answered_at=NOW - age, problems=(problem,) if problem else ()
        )
        for node, problem in problems.items()
    }
    return vm.with_status(arrivals={**vm.status.arrivals, **arrivals})


def waiting(
    vm: VirtualMachine, *nodes: str, age: timedelta = timedelta(), operation: VirtualMachineOperation | None = None
) -> VirtualMachineOperation:
    """An operation for which nodes were asked so long ago."""
    return asked(operation or an_operation(vm=vm.name), vm, nodes, NOW - age)


def decide(
    vm: VirtualMachine,
    operation: VirtualMachineOperation | None = None,
    nodes: tuple[NodeState, ...] = THREE,
    **more: Any,
) -> Decision:
    (decision,) = plan_grants(a_snapshot(nodes, [vm], [operation or an_operation(vm=vm.name)], **more))
    return decision


def reason_of(decision: Decision) -> Reason:
    wait = decision.wait if isinstance(decision, Check) else decision
    assert isinstance(wait, Wait)
    return wait.reason


class TestOneTarget:
    def test_the_best_node_is_asked_before_it_is_granted(self) -> None:
        decision = decide(picky())
        assert isinstance(decision, Check)
        assert decision.nodes == ("n2",)
        assert decision.wait.reason is Reason.TARGET_PREPARING
        assert "answer of node n2" in decision.wait.message

    def test_who_was_asked_is_not_asked_again(self) -> None:
        vm = picky()
        decision = decide(vm, waiting(vm, "n2"))
        assert isinstance(decision, Wait)
        assert decision.reason is Reason.TARGET_PREPARING

    def test_who_fits_is_granted(self) -> None:
        decision = decide(answered(picky(), n2=""))
        assert isinstance(decision, Go)
        assert decision.target == "n2"

    def test_another_best_one_is_asked_though_a_lesser_one_is_known_to_fit(self) -> None:
        decision = decide(answered(picky(), n3=""))
        assert isinstance(decision, Check)
        assert decision.nodes == ("n2",)

    def test_who_has_a_problem_is_passed_by(self) -> None:
        decision = decide(answered(picky(), n2="bridge br7 is not there", n3=""))
        assert isinstance(decision, Go)
        assert decision.target == "n3"

    def test_where_all_have_problems_they_are_counted(self) -> None:
        decision = decide(answered(picky(), n2="bridge br7 is not there", n3="bridge br7 is not there"))
        assert isinstance(decision, Wait)
        assert decision.reason is Reason.TARGET_UNSCHEDULABLE
        assert decision.message == "0/3 nodes: 2 unfit (bridge br7 is not there), 1 where it runs"

    def test_a_disk_that_is_missing_has_a_reason_of_its_own(self) -> None:
        vm = answered(picky(), n2="disk vda: no such file /srv/a.raw", n3="bridge br7 is not there")
        assert reason_of(decide(vm)) is Reason.TARGET_DISK_ERROR

    def test_a_disk_on_a_node_that_would_not_do_anyway_is_not_the_reason(self) -> None:
        vm = answered(picky(), n2="disk vda: no such file /srv/a.raw", n3="bridge br7 is not there")
        nodes = (THREE[0], replace(THREE[1], cordoned=True), THREE[2])
        assert reason_of(decide(vm, nodes=nodes)) is Reason.TARGET_UNSCHEDULABLE

    def test_a_node_named_by_a_person_waits_until_it_fits(self) -> None:
        operation = an_operation(kind=OperationType.MIGRATE, to=MigrateTo(node_name="n3"))
        decision = decide(answered(picky(), n2="", n3="bridge br7 is not there"), operation)
        assert reason_of(decision) is Reason.TARGET_UNSCHEDULABLE

    def test_a_full_node_that_fits_is_waited_for(self) -> None:
        nodes = (THREE[0], replace(THREE[1], inbound=1))
        assert reason_of(decide(answered(picky(), n2=""), nodes=nodes)) is Reason.MIGRATION_PENDING


class TestWhatNeedsNoQuestion:
    def test_nothing_but_a_cpu_on_equal_hosts(self) -> None:
        assert isinstance(decide(a_vm()), Go)

    @pytest.mark.parametrize("platform", ["EPYC/fake/fake", ""])
    def test_a_host_that_is_another_or_unknown_is_asked(self, platform: str) -> None:
        nodes = (THREE[0], replace(THREE[1], platform=platform))
        assert isinstance(decide(a_vm(), nodes=nodes), Check)

    def test_two_unknown_hosts_are_not_equal(self) -> None:
        nodes = tuple(replace(node, platform="") for node in THREE)
        assert isinstance(decide(a_vm(), nodes=nodes), Check)


class TestOutdated:
    @pytest.mark.parametrize(
        "change",
        [
            pytest.param({"generation": "g0"}, id="an earlier run of the agent"),
            pytest.param({"about": "f0"}, id="another machine"),
            pytest.param({"about": "f1+vda"}, id="with a disk copied"),
            pytest.param({"answered_at": NOW - GOOD_FOR}, id="too old"),
        ],
    )
    def test_an_answer_that_counts_no_more_is_asked_for_again(self, change: dict[str, Any]) -> None:
        vm = answered(picky(), n2="")
        vm = vm.with_status(arrivals={"n2": vm.status.arrivals["n2"].with_(**change)})
        decision = decide(vm)
        assert isinstance(decision, Check)
        assert decision.nodes == ("n2",)

    def test_a_question_about_another_machine_is_dropped(self) -> None:
        old = waiting(picky(), "n2")
        vm = picky(needs=some_needs("f2"))
        decision = decide(vm, old)
        assert isinstance(decision, Check)
        new = asked(old, vm, decision.nodes, NOW)
        assert new.status.questions is not None
        assert old.status.questions is not None
        assert new.status.questions.about == "f2"
        assert new.status.questions.open["n2"].id != old.status.questions.open["n2"].id

    def test_ids_are_never_used_twice(self) -> None:
        vm, operation = picky(), an_operation()
        ids = []
        for node in ("n2", "n3", "n2"):
            operation = asked(operation, vm, (node,), NOW)
            assert operation.status.questions is not None
            ids.append(operation.status.questions.open[node].id)
        assert len(set(ids)) == 3

    def test_a_node_with_problems_is_asked_again_before_it_is_given_up(self) -> None:
        vm = answered(picky(), BAD_FOR, n2="bridge br7 is not there", n3="bridge br7 is not there")
        decision = decide(vm)
        assert isinstance(decision, Check)
        assert decision.nodes == ("n2", "n3")
        assert decision.wait.reason is Reason.TARGET_UNSCHEDULABLE
        again = decide(vm, waiting(vm, "n2", "n3"))
        assert isinstance(again, Wait)
        assert (again.reason, again.message) == (decision.wait.reason, decision.wait.message)

    def test_and_is_not_while_another_fits(self) -> None:
        vm = answered(answered(picky(), BAD_FOR, n2="bridge br7 is not there"), n3="")
        assert isinstance(decide(vm), Go)

    def test_nor_at_once(self) -> None:
        vm = answered(picky(), BAD_FOR - timedelta(seconds=1), n2="x", n3="y")
        assert isinstance(decide(vm), Wait)

    def test_nor_one_that_would_not_do_anyway(self) -> None:
        vm = answered(picky(), BAD_FOR, n2="x", n3="y")
        decision = decide(vm, nodes=(THREE[0], replace(THREE[1], cordoned=True), THREE[2]))
        assert isinstance(decision, Check)
        assert decision.nodes == ("n3",)


class TestSilence:
    def test_a_silent_node_gives_way_to_the_next(self) -> None:
        vm = picky()
        decision = decide(vm, waiting(vm, "n2", age=PATIENCE))
        assert isinstance(decision, Check)
        assert decision.nodes == ("n3",)
        assert "n2, n3" in decision.wait.message

    def test_its_late_answer_counts(self) -> None:
        vm = picky()
        operation = waiting(vm, "n3", operation=waiting(vm, "n2", age=PATIENCE))
        decision = decide(answered(vm, n2=""), operation)
        assert isinstance(decision, Go)
        assert decision.target == "n2"

    def test_when_all_are_silent_it_says_for_whom_it_waits(self) -> None:
        vm = picky()
        decision = decide(vm, waiting(vm, "n2", "n3", age=PATIENCE))
        assert isinstance(decision, Wait)
        assert decision.reason is Reason.TARGET_PREPARING
        assert "node n2, n3" in decision.message


class TestNeedsUnknown:
    @pytest.mark.parametrize("needs", [None, some_needs(incarnation=7)], ids=["none", "of another incarnation"])
    def test_its_own_node_is_asked(self, needs: Any) -> None:
        vm = picky(needs=needs)
        decision = decide(vm)
        assert isinstance(decision, Check)
        assert (decision.nodes, decision.is_about_needs) == (("n1",), True)
        assert decision.wait.reason is Reason.WAITING_FOR_VM_TO_BE_READY_TO_MIGRATE
        operation = asked(an_operation(), vm, decision.nodes, NOW, is_about_needs=True)
        assert isinstance(decide(vm, operation), Wait)


class TestQueues:
    """Who waits for a slot has its targets asked meanwhile; who waits for an answer holds no slot."""

    def names(self, count: int) -> list[str]:
        return [f"vm{number}" for number in range(count)]

    def herd(self, vms: list[VirtualMachine], **more: Any) -> Snapshot:
        pending = [an_operation(f"op-{vm.name}", vm.name, created=number) for number, vm in enumerate(vms)]
        return a_snapshot(THREE, vms, pending, **more)

    def test_the_first_of_each_queue_are_asked_ahead(self) -> None:
        vms = [answered(picky("vm0"), n2=""), *(picky(name) for name in ("vm1", "vm2", "vm3", "vm4"))]
        first, *others = plan_grants(self.herd(vms))
        assert isinstance(first, Go)
        ahead = [decision for decision in others if isinstance(decision, Check)]
        assert [d.operation.name for d in ahead] == ["op-vm1", "op-vm2"]
        assert len(ahead) == ASKED_AHEAD_PER_SOURCE
        assert {d.nodes for d in ahead} == {("n2", "n3")}
        assert {reason_of(d) for d in others} == {Reason.MIGRATION_PENDING}

    def test_and_not_again_while_asked_or_once_one_is_known_to_fit(self) -> None:
        vm = picky("vm1")
        operations = [an_operation("op0", "vm0"), waiting(vm, "n2", "n3", operation=an_operation("op1", "vm1"))]
        going = answered(picky("vm0"), n2="")
        assert isinstance(list(plan_grants(a_snapshot(THREE, [going, vm], operations)))[1], Wait)
        known = [an_operation("op0", "vm0"), an_operation("op1", "vm1")]
        snapshot = a_snapshot(THREE, [going, answered(vm, n2="")], known)
        assert isinstance(list(plan_grants(snapshot))[1], Wait)

    def test_no_later_one_takes_the_slot_of_one_that_goes_in_a_moment(self) -> None:
        first, second = plan_grants(self.herd([picky("vm0"), a_vm("vm1")]))
        assert isinstance(first, Check)
        assert isinstance(second, Wait)
        assert "outbound slot of node n1" in second.message

    def test_but_passes_one_whose_targets_are_silent(self) -> None:
        vm = picky("vm0")
        silent = waiting(vm, "n2", "n3", age=PATIENCE, operation=an_operation("op0", "vm0"))
        snapshot = a_snapshot(THREE, [vm, a_vm("vm1")], [silent, an_operation("op1", "vm1")])
        first, second = plan_grants(snapshot)
        assert isinstance(first, Wait)
        assert isinstance(second, Go)

    def test_another_source_goes_its_way(self) -> None:
        first, second = plan_grants(self.herd([picky("vm0"), a_vm("vm1", node="n2")]))
        assert isinstance(first, Check)
        assert isinstance(second, Go)

    def test_a_queue_of_many_sources_asks_no_more_than_some_at_a_time(self) -> None:
        nodes = [a_node_state(f"n{number:02}", outbound=1) for number in range(60)]
        vms = [picky(f"vm{number}", node=f"n{number:02}") for number in range(60)]
        pending = [an_operation(f"op{number}", vm.name) for number, vm in enumerate(vms)]
        decisions = list(plan_grants(a_snapshot(nodes, vms, pending)))
        assert sum(isinstance(decision, Check) for decision in decisions) == 32


class TestImmovable:
    def test_a_host_device_ties_it(self) -> None:
        vm = a_vm(needs=some_needs(obstacles=("host device pci 0000:03:00.0: it can't leave its host",)))
        found = immovable(vm)
        assert found is not None
        assert found[0] == "VirtualMachineHostDevicesNotMigratable"
        decision = decide(vm)
        assert isinstance(decision, Fail)
        assert "0000:03:00.0" in decision.message

    def test_something_else_ties_it(self) -> None:
        vm = a_vm(needs=some_needs(obstacles=("file system share is shared with its host: it can't leave it",)))
        assert migratable_condition(vm).reason == "VirtualMachineNonMigratable"

    def test_disks_that_only_its_host_has_tie_it_without_leave(self) -> None:
        vm = a_vm(needs=some_needs(local_disks=LOCAL))
        condition = migratable_condition(vm)
        assert (condition.status, condition.reason) == ("False", "VirtualMachineDisksNotMigratable")
        assert "vda (/srv/a.raw)" in condition.message
        assert STORAGE_COPY_ANNOTATION in condition.message
        assert copied_disks(vm) == ()
        assert isinstance(decide(vm), Fail)

    def test_with_leave_they_are_copied(self) -> None:
        vm = a_vm(needs=some_needs(local_disks=LOCAL))
        vm = vm.with_(metadata=vm.metadata.with_(annotations=COPY))
        condition = migratable_condition(vm)
        assert (condition.status, condition.reason) == ("True", "VirtualMachineDisksShouldBeMigrating")
        assert copied_disks(vm) == ("vda", "vdb")
        assert copied_mib(vm) == 100
        decision = decide(vm)
        assert isinstance(decision, Check)
        operation = asked(an_operation(), vm, decision.nodes, NOW)
        assert operation.status.questions is not None
        assert operation.status.questions.copied_disks == ("vda", "vdb")

    def test_leave_that_is_taken_back_outdates_the_answer(self) -> None:
        vm = a_vm(needs=some_needs(local_disks=LOCAL))
        allowed = answered(vm.with_(metadata=vm.metadata.with_(annotations=COPY)), n2="")
        assert isinstance(decide(allowed), Go)
        assert isinstance(decide(allowed.with_(metadata=vm.metadata)), Fail)

    def test_what_nothing_ties(self) -> None:
        assert immovable(a_vm()) is None
        assert migratable_condition(a_vm()).reason == "VirtualMachineMigratable"
