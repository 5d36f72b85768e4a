"""What a host's report means for its VM while no grant is open on it (DESIGN.md: "what an inventory means")."""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner.observation import ABSENT, Observation, observe
from orchestrator.planner.policy import next_step
from orchestrator.resources import VirtualMachine, VmPhase, find_condition
from tests.builders import NOW, a_vm, seen


def reasons(observation: Observation) -> list[str]:
    return [note.reason for note in observation.notes]


def after(vm: VirtualMachine, node: str, state: str, counter: int = 10, **more: Any) -> VirtualMachine:
    """The VM after one report."""
    return observe(vm, node, seen(state, counter, **more), NOW).vm or vm


def running_reason(vm: VirtualMachine) -> str:
    condition = find_condition(vm.status.conditions, "Running")
    return condition.reason if condition else ""


class TestItsOwnNode:
    def test_the_same_again_changes_nothing(self) -> None:
        assert observe(a_vm(counter=5), "n1", seen("running", 9), NOW) == Observation()

    @pytest.mark.parametrize(
        ("state", "phase"),
        [
            ("paused", VmPhase.PAUSE),
            ("incoming", VmPhase.MIGRATING),
            ("paused-migrated", VmPhase.MIGRATING),
            ("postcopy", VmPhase.MIGRATING),
            ("postcopy-failed", VmPhase.PAUSE),
            ("shutdown", VmPhase.STOPPING),
            ("crashed", VmPhase.DEGRADED),
            ("something new", VmPhase.DEGRADED),
        ],
    )
    def test_the_phase_follows_the_state(self, state: str, phase: VmPhase) -> None:
        vm = after(a_vm(), "n1", state)
        assert (vm.status.phase, vm.status.counter) == (phase, 10)
        assert after(vm, "n1", "running", 11).status.phase is VmPhase.RUNNING

    def test_an_older_report_counts_for_nothing(self) -> None:
        for state in ("paused", ABSENT, "running"):
            assert observe(a_vm(counter=50), "n1", seen(state, 49), NOW) == Observation()

    def test_addresses_are_taken_and_a_fixed_one_stays(self) -> None:
        assert after(a_vm(), "n1", "running", addresses=("10.0.0.7", "10.0.0.8")).status.ip_address == "10.0.0.7"
        fixed = a_vm()
        fixed = fixed.with_(spec=fixed.spec.with_(ip_address="10.0.0.1"))
        assert after(fixed, "n1", "running", addresses=("10.0.0.7",)).status.ip_address == "10.0.0.1"

    def test_an_address_that_is_not_seen_now_is_kept(self) -> None:
        vm = after(a_vm(), "n1", "running", addresses=("10.0.0.7",))
        assert after(vm, "n1", "running", 11).status.ip_address == "10.0.0.7"


class TestAbsence:
    @pytest.mark.parametrize(
        ("how", "reason", "warning"),
        [
            ("shutdown/guest", "GuestPoweredOff", False),
            ("shutdown/host", "StoppedByNode", False),
            ("destroyed", "Destroyed", False),
            ("crashed", "Crashed", True),
            ("failed", "Crashed", True),
            ("", "Crashed", True),
        ],
    )
    def test_how_it_stopped_is_told_and_no_known_reason_is_a_crash(self, how: str, reason: str, warning: bool) -> None:
        observation = observe(a_vm(), "n1", seen(ABSENT, reason=how), NOW)
        assert observation.vm is not None
        is_to_start = reason != "GuestPoweredOff"
        assert observation.vm.status.phase is (VmPhase.PENDING if is_to_start else VmPhase.STOPPED)
        assert running_reason(observation.vm) == reason
        assert [note.warning for note in observation.notes] == [warning]

    def test_migrated_is_not_stopped(self) -> None:
        vm = after(a_vm(), "n1", ABSENT, reason="migrated")
        assert vm.status.phase is VmPhase.RUNNING  # it takes its place until it is found
        assert running_reason(vm) == "OutcomeUnknown"

    def test_after_that_it_is_where_it_is_seen(self) -> None:
        left = after(a_vm(counter=80), "n1", ABSENT, 81, reason="migrated")
        vm = after(left, "n2", "running", 3)  # each node counts for itself
        assert (vm.status.node_name, vm.status.phase, vm.status.counter) == ("n2", VmPhase.RUNNING, 3)
        assert running_reason(vm) == "Running"

    def test_or_where_it_was_if_it_came_back(self) -> None:
        left = after(a_vm(), "n1", ABSENT, 9, reason="migrated")
        vm = after(left, "n1", "running", 11)
        assert running_reason(vm) == "Running"
        assert after(vm, "n2", "running").status.node_name == "n1"  # another one is no longer expected

    def test_absence_elsewhere_means_nothing(self) -> None:
        assert observe(a_vm(), "n2", seen(ABSENT), NOW) == Observation()

    def test_what_was_read_before_its_stop_was_told_does_not_bring_it_back(self) -> None:
        stopped = after(a_vm(), "n1", ABSENT, 12)
        assert observe(stopped, "n1", seen("running", 13, began=11), NOW) == Observation()
        assert after(stopped, "n1", "running", 13, began=12).status.phase is VmPhase.RUNNING

    @pytest.mark.parametrize("phase", [VmPhase.RUNNING, VmPhase.STOPPED])
    def test_a_copy_that_went_before_it_was_ever_read_is_told_of_by_its_stop_event(self, phase: VmPhase) -> None:
        assert observe(a_vm(phase=phase), "n1", seen("", ran=True), NOW) == Observation()

    @pytest.mark.parametrize("how", ["shutdown/guest", "shutdown/host", "destroyed", "crashed", ""])
    def test_whatever_stops_while_its_host_shuts_down_is_the_nodes_doing(self, how: str) -> None:
        stopped = after(a_vm(), "n1", ABSENT, reason=how, by_host=True)
        assert (running_reason(stopped), stopped.status.failures) == ("StoppedByNode", 0)

    def test_a_stopped_vm_does_not_stop_again(self) -> None:
        stopped = after(a_vm(), "n1", ABSENT)
        assert observe(stopped, "n1", seen(ABSENT, 12), NOW) == Observation()


class TestACrashWhoseDomainIsKept:
    def test_it_is_a_crash_and_the_vm_stays_on_its_node(self) -> None:
        observation = observe(a_vm(), "n1", seen("crashed"), NOW)
        assert observation.vm is not None
        assert (observation.vm.status.node_name, observation.vm.status.phase) == ("n1", VmPhase.DEGRADED)
        assert (running_reason(observation.vm), observation.vm.status.failures) == ("Crashed", 1)
        assert reasons(observation) == ["Crashed"]

    def test_it_is_counted_once(self) -> None:
        vm = after(a_vm(), "n1", "crashed")
        assert observe(vm, "n1", seen("crashed", 11), NOW) == Observation()

    def test_the_next_one_in_a_row_waits(self) -> None:
        observation = observe(a_vm(failures=1), "n1", seen("crashed"), NOW)
        assert reasons(observation) == ["Crashed", "BackOff"]
        assert observation.vm is not None
        assert observation.vm.status.not_before == NOW + timedelta(seconds=10)

    def test_once_its_domain_is_gone_it_has_stopped(self) -> None:
        vm = after(a_vm(), "n1", "crashed")
        gone = after(vm, "n1", ABSENT, 11, reason="destroyed")
        assert not gone.status.phase.occupies_node

    def test_one_that_runs_again_after_all_runs(self) -> None:
        vm = after(after(a_vm(), "n1", "crashed"), "n1", "running", 11)
        assert (vm.status.phase, running_reason(vm)) == (VmPhase.RUNNING, "Running")

    def test_one_that_runs_elsewhere_meanwhile_is_not_restarted(self) -> None:
        """Else it would be started besides the copy that somebody migrated behind our back."""
        vm = after(after(a_vm(), "n2", "running"), "n1", "crashed", 11)
        assert (vm.status.elsewhere, running_reason(vm)) == ("n2", "Degraded")
        later = after(after(a_vm(), "n1", "crashed"), "n2", "running", 11)
        assert (later.status.elsewhere, next_step(later)) == ("n2", None)


class TestTwoNodes:
    def test_a_migration_behind_our_back_is_followed_when_its_source_says_that_it_left(self) -> None:
        vm = after(a_vm(), "n2", "running")
        assert (vm.status.node_name, vm.status.elsewhere) == ("n1", "n2")
        observation = observe(vm, "n1", seen(ABSENT, reason="migrated"), NOW)
        assert observation.vm is not None
        assert (observation.vm.status.node_name, observation.vm.status.elsewhere) == ("n2", "")
        assert reasons(observation) == ["Moved"]

    def test_the_receiving_side_alone_says_nothing(self) -> None:
        for state in ("incoming", "paused"):
            assert observe(a_vm(), "n2", seen(state), NOW) == Observation()

    def test_running_on_both_is_told(self) -> None:
        vm = after(a_vm(), "n2", "running")
        assert reasons(observe(vm, "n1", seen("running"), NOW)) == ["VirtualMachineRunsTwice"]

    def test_when_the_second_copy_is_gone_so_is_its_mark(self) -> None:
        vm = after(a_vm(), "n2", "running")
        assert after(vm, "n2", ABSENT).status.elsewhere == ""

    def test_a_second_copy_takes_over_when_the_first_ends_in_whatever_way(self) -> None:
        vm = after(a_vm(), "n2", "running")
        vm = after(vm, "n1", ABSENT, reason="crashed")
        assert (vm.status.node_name, vm.status.phase) == ("n2", VmPhase.RUNNING)


class TestIncarnations:
    def test_an_outdated_copy_is_told_of_once_and_changes_nothing_else(self) -> None:
        vm = a_vm(incarnation=2)
        observation = observe(vm, "n2", seen("running", incarnation=1), NOW)
        assert reasons(observation) == ["OutdatedCopySeen"]
        assert observation.vm is not None
        assert (observation.vm.status.node_name, observation.vm.status.incarnation) == ("n1", 2)
        assert observe(observation.vm, "n2", seen("running", 11, incarnation=1), NOW) == Observation()

    def test_the_vm_never_becomes_its_outdated_copy(self) -> None:
        vm = after(a_vm(incarnation=2), "n2", "running", incarnation=1)
        for how in ("shutdown/guest", "crashed", ""):
            stopped = after(vm, "n1", ABSENT, incarnation=2, reason=how)
            assert not stopped.status.phase.occupies_node
            assert stopped.status.node_name == "n1"

    def test_nor_on_its_own_node(self) -> None:
        """It was started anew on the node where an older copy still shows."""
        vm = a_vm(incarnation=2, phase=VmPhase.STOPPED)
        assert after(vm, "n1", "running", incarnation=1).status.phase is VmPhase.STOPPED

    def test_an_outdated_copy_that_goes_does_not_stop_the_vm(self) -> None:
        vm = after(a_vm(incarnation=2), "n2", "running", incarnation=1)
        vm = after(vm, "n2", ABSENT, incarnation=1)
        assert (vm.status.phase, vm.status.node_name, vm.status.elsewhere) == (VmPhase.RUNNING, "n1", "")

    def test_and_is_told_of_again_when_it_comes_again(self) -> None:
        vm = after(a_vm(incarnation=2), "n2", "running", incarnation=1)
        vm = after(vm, "n2", ABSENT, incarnation=1)
        assert reasons(observe(vm, "n2", seen("running", incarnation=1), NOW)) == ["OutdatedCopySeen"]

    @pytest.mark.parametrize("phase", [VmPhase.RUNNING, VmPhase.STOPPED])
    def test_a_higher_one_raises_the_record(self, phase: VmPhase) -> None:
        """The record lost a start (a failover of Redis): what runs is right."""
        vm = after(a_vm(incarnation=1, phase=phase, node="n1"), "n1", "running", incarnation=3)
        assert (vm.status.incarnation, vm.status.phase) == (3, VmPhase.RUNNING)

    def test_a_higher_one_on_another_node_is_where_it_runs(self) -> None:
        vm = after(a_vm(incarnation=1), "n2", "running", incarnation=2)
        assert (vm.status.node_name, vm.status.incarnation, vm.status.elsewhere) == ("n2", 2, "")
        # What its old node says of the old copy is news of an outdated copy.
        assert after(vm, "n1", ABSENT, 99, incarnation=1, reason="crashed").status.phase is VmPhase.RUNNING
        assert reasons(observe(vm, "n1", seen("running", incarnation=1), NOW)) == ["OutdatedCopySeen"]

    def test_a_higher_one_that_is_gone_raises_it_too(self) -> None:
        """Else the next start would be given the same number again."""
        stopped = a_vm(incarnation=1, phase=VmPhase.STOPPED)
        assert after(stopped, "n2", ABSENT, incarnation=2).status.incarnation == 2
        vm = after(a_vm(incarnation=1), "n2", ABSENT, incarnation=2, reason="shutdown/guest")
        assert (vm.status.incarnation, vm.status.phase) == (2, VmPhase.STOPPED)


states = st.sampled_from(["running", "paused", "incoming", "paused-migrated", "shutdown", "crashed", "shutoff", ABSENT])
how = st.sampled_from(["", "migrated", "shutdown/guest", "crashed", "destroyed"])
reports = st.lists(st.tuples(st.sampled_from(["n1", "n2", "n3"]), states, how, st.integers(1, 3)), max_size=12)


@given(reports)
def test_over_any_reports(story: list[tuple[str, str, str, int]]) -> None:
    """The incarnation never falls; a report twice is a report once; what counts as running was seen running."""
    vm = a_vm(incarnation=2)
    numbers = {"n1": 0, "n2": 0, "n3": 0}
    running_at: set[tuple[str, int]] = {("n1", 2)}
    for node, state, why, incarnation in story:
        numbers[node] += 1
        report = seen(state, numbers[node], reason=why, incarnation=incarnation)
        if state == "running":
            running_at.add((node, incarnation))
        new = observe(vm, node, report, NOW).vm or vm
        assert new.status.incarnation >= vm.status.incarnation
        assert observe(new, node, report, NOW).vm in (None, new)
        if new.status.phase is VmPhase.RUNNING and running_reason(new) != "OutcomeUnknown":
            assert (new.status.node_name, new.status.incarnation) in running_at
        vm = new
