"""Stops, restarts, deletion, and what takes the place of what, on real hosts: the riskiest cells of the two tables.

Machines that boot nothing heed no power button; nor do Linux guests without `acpi`.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import Operation
from orchestrator.errors import Refused
from orchestrator.resources import GrantState, OperationPhase, VirtualMachine, find_condition
from tests.lab import outside
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.mutants import replaced
from tests.lab.observer import DoubleRunObserver, ObservedMigration, QemuRun, qemu_runs, stream_migrations
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(180)

SETTINGS = {"VMHERD_BANDWIDTH_MIB_S": "1"}
"""A migration is always in mid-copy: it would take longer than any test waits."""

BALLAST_MIB = 120
LONG_S = 600
"""A grace period that no test waits for."""


@pytest.fixture(autouse=True)
def never_twice(herd: LabHerd) -> Iterator[None]:
    """Whatever is asked for, no guest runs twice, and nothing is left of it."""
    doubles = DoubleRunObserver(herd.lab)
    yield
    doubles.check()
    wait_until(lambda: not herd.leftovers(), 30, lambda: str(herd.leftovers()))


def qemus(herd: LabHerd, guest: Guest) -> list[QemuRun]:
    """The QEMUs that a VM has had, by the lab's own record."""
    return [run for run in qemu_runs(herd.lab.recorder.records()) if run.uuid == guest.uuid]


def reason_of(resource: Operation | VirtualMachine, kind: str) -> str:
    conditions = (resource.resource if isinstance(resource, Operation) else resource).status.conditions
    condition = find_condition(conditions, kind)
    assert condition is not None
    return condition.reason


def asked(herd: LabHerd, operation: Operation, guest: Guest) -> None:
    """Wait until the guest was asked to power off; it runs on in its grace period."""
    herd.wait_operation(
        operation.name, lambda op: op.status.grant is not None and op.status.grant.state is GrantState.ASKED
    )
    assert reason_of(operation.refresh(), "Completed") in {"StopInProgress", "RestartInProgress"}
    assert herd.cluster.vm(guest.name).status.phase == "Stopping"
    assert list(outside.states(herd.lab, guest).values()) == ["running"]


def copying(herd: LabHerd, guest: Guest) -> Operation:
    """Evict a laden VM from h1; returns once some of it was sent."""
    operation = herd.cluster.evict(guest.name)
    source = herd.lab.host("h1")
    wait_until(lambda: outside.job(source, guest).get("data_processed", 0) > 0, 40, "it is being sent")
    shown = operation.refresh().resource.status
    assert shown.phase is OperationPhase.IN_PROGRESS
    assert outside.states(herd.lab, guest) == {"h1": "running", shown.target_node: "paused"}
    return operation


def assert_superseded(old: Operation, by: Operation) -> None:
    """At once, and for good."""
    status = old.refresh().resource.status
    assert (status.phase, status.superseded_by) == (OperationPhase.SUPERSEDED, by.name)
    assert reason_of(old, "Completed") == "Superseded"


def assert_completed(operation: Operation, *, timeout: float = 60) -> None:
    operation.wait(timeout)
    assert operation.phase is OperationPhase.COMPLETED, operation.message
    assert (operation.resource.status.progress, operation.resource.status.grant) == (100, None)
    assert reason_of(operation, "Completed") == "OperationCompleted"


def assert_stopped(herd: LabHerd, guest: Guest) -> None:
    """Off by somebody's wish, on no host."""
    vm = herd.cluster.vm(guest.name)
    assert vm.status.phase == "Stopped"
    assert reason_of(vm, "Running") == "StoppedByOperation"
    assert outside.states(herd.lab, guest) == {}


def assert_runs_anew(herd: LabHerd, guest: Guest) -> None:
    """The second incarnation of the same machine runs, once."""
    vm = herd.cluster.vm(guest.name)
    assert (vm.status.incarnation, vm.metadata.uid) == (2, guest.uuid)
    assert reason_of(vm, "Running") == "Running"
    outside.assert_runs_once(herd, guest, vm.status.node_name)


class TestStop:
    def test_a_guest_obeys(self, herd: LabHerd) -> None:
        guest = herd.lab.guest("obedient", address="192.0.2.101", acpi=True, memory_mib=128)
        herd.start_guests((guest, "h1"), terminationGracePeriodSeconds=LONG_S)
        stop = herd.cluster.stop(guest.name)
        assert_completed(stop)
        assert stop.message == "stopped on node h1: the guest powered off"
        assert_stopped(herd, guest)
        ends = [
            r["data"] for r in herd.lab.recorder.records() if r.get("event") == "SHUTDOWN" and r["uuid"] == guest.uuid
        ]
        assert [end["reason"] for end in ends[:1]] == ["guest-shutdown"], "QEMU says who ended it first"

    def test_one_that_does_not_has_its_plug_pulled_when_its_time_is_over(self, herd: LabHerd) -> None:
        vm = herd.lab.blank("deaf")
        herd.start_guests((vm, "h1"), up=False, terminationGracePeriodSeconds=4)
        stop = herd.cluster.stop(vm.name)
        asked(herd, stop, vm)
        assert_completed(stop)
        assert stop.message.endswith("it did not power off within 4 s: its plug was pulled")
        assert_stopped(herd, vm)

    def test_by_force_nobody_is_asked(self, herd: LabHerd) -> None:
        guest = herd.lab.blank("forced")
        herd.start_guests((guest, "h1"), up=False, terminationGracePeriodSeconds=LONG_S)
        stop = herd.cluster.stop(guest.name, force=True)
        assert_completed(stop)
        assert stop.message == "stopped on node h1: its plug was pulled"
        assert_stopped(herd, guest)

    def test_of_a_vm_that_is_starting(self, herd: LabHerd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VMHERD_FAULT_DIR", str(tmp_path))
        vm = herd.lab.blank("starting")
        with replaced(herd, "h1/lifecycle", fault="hold:start"):
            herd.cluster.create(herd.manifest(vm, node="h1", terminationGracePeriodSeconds=LONG_S))
            herd.wait_vm(vm.name, lambda seen: seen.status.phase == "Starting")
            (start,) = herd.cluster.operations()
            herd.wait_operation(
                start.name, lambda op: op.status.grant is not None and op.status.grant.state is GrantState.RUNNING
            )
            stop = herd.cluster.stop(vm.name, force=True)
            assert_superseded(herd.cluster.operation(start.name), stop)
            assert outside.states(herd.lab, vm) == {}
            (tmp_path / "go").touch()
            assert_completed(stop)
        assert_superseded(herd.cluster.operation(start.name), stop)
        assert_stopped(herd, vm)
        assert len(qemus(herd, vm)) <= 1


def test_a_restart_is_a_new_incarnation_of_the_same_machine(herd: LabHerd) -> None:
    guest = herd.lab.guest("again", address="192.0.2.102", acpi=True, memory_mib=128)
    herd.start_guests((guest, "h1"), terminationGracePeriodSeconds=LONG_S)
    before = guest.wait_ticks(30)
    assert_completed(herd.cluster.restart(guest.name), timeout=90)
    assert_runs_anew(herd, guest)
    after = guest.wait_up(90)
    assert after.boot_id != before.boot_id
    assert after.ticks < before.ticks
    assert len(qemus(herd, guest)) == 2


class TestForceSupersedesAPlainStop:
    def test_by_a_stop(self, herd: LabHerd) -> None:
        vm = herd.lab.blank("impatient")
        herd.start_guests((vm, "h1"), up=False, terminationGracePeriodSeconds=LONG_S)
        plain = herd.cluster.stop(vm.name)
        asked(herd, plain, vm)
        forced = herd.cluster.stop(vm.name, force=True)
        assert_superseded(plain, forced)
        assert_completed(forced)
        assert_superseded(plain, forced)
        assert_stopped(herd, vm)

    def test_by_a_restart(self, herd: LabHerd) -> None:
        vm = herd.lab.blank("changed-mind")
        herd.start_guests((vm, "h1"), up=False, terminationGracePeriodSeconds=LONG_S)
        plain = herd.cluster.stop(vm.name)
        asked(herd, plain, vm)
        forced = herd.cluster.restart(vm.name, force=True)
        assert_superseded(plain, forced)
        assert_completed(forced)
        assert_superseded(plain, forced)
        assert_runs_anew(herd, vm)
        assert len(qemus(herd, vm)) == 2


def test_a_plain_restart_gives_way_to_a_forced_stop(herd: LabHerd) -> None:
    vm = herd.lab.blank("restarting")
    herd.start_guests((vm, "h1"), up=False, terminationGracePeriodSeconds=LONG_S)
    plain = herd.cluster.restart(vm.name)
    asked(herd, plain, vm)
    with pytest.raises(Refused, match=f"operation '{plain.name}' should finish first"):
        herd.cluster.stop(vm.name)
    forced = herd.cluster.stop(vm.name, force=True)
    assert_superseded(plain, forced)
    assert_completed(forced)
    assert_stopped(herd, vm)
    assert len(qemus(herd, vm)) == 1


def test_a_paused_vm_is_not_moved_and_its_plug_can_be_pulled(herd: LabHerd) -> None:
    vm = herd.lab.blank("paused")
    herd.start_guests((vm, "h1"), up=False, terminationGracePeriodSeconds=LONG_S)
    herd.lab.host("h1").connect().lookupByUUIDString(vm.uuid).suspend()
    herd.wait_vm(vm.name, lambda seen: seen.status.phase == "Pause")
    for refused in (herd.cluster.evict, herd.cluster.start):
        with pytest.raises(Refused, match="NotApplicableForVirtualMachinePhase"):
            refused(vm.name)
    assert_completed(herd.cluster.restart(vm.name, force=True))
    assert_runs_anew(herd, vm)
    assert len(qemus(herd, vm)) == 2


class TestAMigrationGivesWay:
    def test_to_a_stop(self, herd: LabHerd) -> None:
        vm = outside.laden(herd.lab, "leaving-1", ballast_mib=BALLAST_MIB)
        herd.start_guests((vm, "h1"), up=False, terminationGracePeriodSeconds=3)
        evict = copying(herd, vm)
        for refused in (herd.cluster.evict, herd.cluster.start):
            with pytest.raises(Refused, match=f"operation '{evict.name}' should finish first"):
                refused(vm.name)
        stop = herd.cluster.stop(vm.name)
        assert_superseded(evict, stop)
        assert_completed(stop)
        assert_superseded(evict, stop)
        assert_stopped(herd, vm)
        assert [seen.outcome for seen in migrations(herd, vm)] == ["cancelled"]
        assert_slot_is_free(herd)

    def test_to_a_restart(self, herd: LabHerd) -> None:
        vm = outside.laden(herd.lab, "leaving-2", ballast_mib=BALLAST_MIB)
        herd.start_guests((vm, "h1"), up=False, terminationGracePeriodSeconds=LONG_S)
        evict = copying(herd, vm)
        restart = herd.cluster.restart(vm.name, force=True)
        assert_superseded(evict, restart)
        assert_completed(restart)
        assert_superseded(evict, restart)
        assert_runs_anew(herd, vm)
        assert [seen.outcome for seen in migrations(herd, vm)] == ["cancelled"]
        assert [run.incoming for run in qemus(herd, vm)] == [False, True, False]


def migrations(herd: LabHerd, guest: Guest) -> list[ObservedMigration]:
    return [seen for seen in stream_migrations(herd.lab) if seen.domain == guest.domain]


def assert_slot_is_free(herd: LabHerd) -> None:
    """The next migration from the same node begins."""
    vm = herd.lab.blank("next")
    herd.start_guests((vm, "h1"), up=False)
    assert_completed(herd.cluster.evict(vm.name))


def test_a_vm_that_runs_is_deleted(herd: LabHerd) -> None:
    vm = herd.lab.blank("unwanted")
    herd.start_guests((vm, "h1"), up=False, runPolicy="AlwaysOn", terminationGracePeriodSeconds=3)
    deleted = herd.cluster.delete_vm(vm.name)
    assert deleted.status.phase == "Terminating"
    phases = [seen.status.phase.value for seen in herd.cluster.follow(deleted, time.monotonic() + 60) if seen]
    assert phases[0] == "Terminating"
    assert set(phases) - {"Stopped"} == {"Terminating"}, "Stopped is how it looks just before it is removed"
    assert herd.cluster.store.find(VirtualMachine, deleted.key) is None
    assert outside.states(herd.lab, vm) == {}
    assert len(qemus(herd, vm)) == 1, "AlwaysOn does not bring it back"
