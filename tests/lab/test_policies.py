"""What each runPolicy does when a guest ends in a way that no operation asked for, on real hosts.

Four VMs, one for each policy, meet each event side by side. The one that is AlwaysOff was running by hand when its
policy was changed: its guest heeds no power button, so that the event finds it still running, in its grace period.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from orchestrator.errors import Refused
from orchestrator.resources import (
    Event,
    GrantState,
    OperationPhase,
    OperationType,
    RunPolicy,
    VirtualMachine,
    find_condition,
)
from orchestrator.services import policies
from orchestrator.services.vms import update_vm
from tests.lab import outside
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.host import LabHost
from tests.lab.observer import DoubleRunObserver, QemuRun, qemu_runs
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(240)

ALWAYS_ON, UNLESS_STOPPED = RunPolicy.ALWAYS_ON, RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY
MANUAL, ALWAYS_OFF = RunPolicy.MANUAL, RunPolicy.ALWAYS_OFF
BY_HAND = "StoppedByOperation"


@dataclass(frozen=True)
class Four:
    """One VM for each policy, all of them running."""

    herd: LabHerd
    guests: dict[RunPolicy, Guest]
    doubles: DoubleRunObserver
    began_at: float

    def name(self, policy: RunPolicy) -> str:
        return self.guests[policy].name

    def befall(self, event: Callable[[LabHost, Guest], None]) -> None:
        """Let each meet an event; first the one whose time is running out."""
        for policy in (ALWAYS_OFF, ALWAYS_ON, UNLESS_STOPPED, MANUAL):
            guest = self.guests[policy]
            event(self.herd.lab.host(self.herd.cluster.vm(guest.name).status.node_name), guest)

    def runs(self, policy: RunPolicy) -> list[QemuRun]:
        """The QEMUs that this VM has had in this test, by the lab's own record (a name's UUID is always the same)."""
        uuid = self.guests[policy].uuid
        found = qemu_runs(self.herd.lab.recorder.records())
        return [run for run in found if run.uuid == uuid and run.began_at >= self.began_at]

    def assert_runs(self, policy: RunPolicy, incarnation: int) -> None:
        """It runs in this incarnation, its one QEMU on the node on record, and it had as many QEMUs as incarnations."""
        vm = self.herd.wait_vm(
            self.name(policy), lambda vm: vm.status.phase == "Running" and vm.status.incarnation == incarnation
        )
        outside.assert_runs_once(self.herd, self.guests[policy], vm.status.node_name)
        assert len(self.runs(policy)) == incarnation

    def assert_stopped(self, policy: RunPolicy, reason: str) -> None:
        """It is off, says so with this reason, and is on no host."""
        vm = self.herd.wait_vm(self.name(policy), lambda vm: vm.status.phase == "Stopped")
        running = find_condition(vm.status.conditions, "Running")
        assert running is not None
        assert (running.status, running.reason, vm.status.incarnation) == ("False", reason, 1)
        assert outside.states(self.herd.lab, self.guests[policy]) == {}

    def assert_at_rest(self) -> None:
        """Nothing is under way or held, no policy wants any more, and none ran twice."""
        wait_until(lambda: not self.herd.leftovers(), 30, lambda: str(self.herd.leftovers()))
        before = [operation.name for operation in self.herd.cluster.operations()]
        for guest in self.guests.values():
            policies.keep(self.herd.cluster.context, f"default/{guest.name}")
        assert [operation.name for operation in self.herd.cluster.operations()] == before
        with pytest.raises(Refused, match="NotApplicableForVirtualMachineRunPolicy"):
            self.herd.cluster.start(self.name(ALWAYS_OFF))
        stops = {o.vm_key for o in self.herd.cluster.operations() if o.spec.type is OperationType.STOP}
        assert stops == {f"default/{self.name(ALWAYS_OFF)}"}
        self.doubles.check()


def four(herd: LabHerd, *, boots: bool, grace_s: int, node: str = "") -> Four:
    """Start one VM for each policy, and change the last one's to AlwaysOff.

    Args:
        herd: Empty.
        boots: Whether they are real guests, or machines that idle in their firmware.
        grace_s: How long AlwaysOff waits for its guest.
        node: The only one on which they may run; empty: any.
    """
    lab = herd.lab
    doubles, began_at = DoubleRunObserver(lab), time.time()
    guests = {}
    for number, policy in enumerate((ALWAYS_ON, UNLESS_STOPPED, MANUAL, ALWAYS_OFF)):
        name = policy.value.lower()[:20]
        guest = lab.guest(name, address=f"192.0.2.{101 + number}", memory_mib=128) if boots else lab.blank(name)
        guests[policy] = guest
        given = MANUAL if policy is ALWAYS_OFF else policy
        spec: dict[str, Any] = {"runPolicy": given.value, "terminationGracePeriodSeconds": grace_s}
        herd.cluster.create(herd.manifest(guest, node=node, **spec))
        if given is MANUAL:
            assert herd.cluster.vm(name).status.phase == "Stopped"
            herd.cluster.start(name)
    for guest in guests.values():
        herd.wait_vm(guest.name, lambda vm: vm.status.phase == "Running")
    if boots:
        for guest in guests.values():
            guest.wait_up(90)
    turn_off(herd, guests[ALWAYS_OFF])
    return Four(herd, guests, doubles, began_at)


def turn_off(herd: LabHerd, guest: Guest) -> None:
    """Make a VM AlwaysOff; returns once its guest was asked to power off."""
    vm = herd.cluster.vm(guest.name)
    meta = vm.metadata.with_(resource_version="")
    update_vm(herd.cluster.context, vm.with_(metadata=meta, spec=vm.spec.with_(run_policy=ALWAYS_OFF)))

    def is_asked() -> bool:
        grants = [o.status.grant for o in herd.cluster.operations() if o.vm_key == vm.key]
        return any(grant is not None and grant.state is GrantState.ASKED for grant in grants)

    wait_until(is_asked, 30, f"the guest of {guest.name} was asked to power off")
    assert herd.cluster.vm(guest.name).status.phase == "Stopping"
    assert list(outside.states(herd.lab, guest).values()) == ["running"]


def waits_for_its_host(herd: LabHerd, vm: str) -> bool:
    starts = [o for o in herd.cluster.operations() if o.vm_key == vm and o.is_active]
    return any(o.spec.type is OperationType.START and "1 shutting down" in o.message for o in starts)


def running_reason(vm: VirtualMachine) -> str:
    running = find_condition(vm.status.conditions, "Running")
    return running.reason if running is not None else ""


def has_event(herd: LabHerd, guest: Guest, reason: str) -> bool:
    return any(e.involved_object.name == guest.name and e.reason == reason for e in herd.cluster.store.all(Event))


def test_a_guest_that_powers_itself_off(herd: LabHerd) -> None:
    vms = four(herd, boots=True, grace_s=60)
    before = vms.guests[ALWAYS_ON].status()
    vms.befall(lambda _, guest: guest.press("poweroff"))
    vms.assert_runs(ALWAYS_ON, 2)
    for policy, reason in ((UNLESS_STOPPED, "GuestPoweredOff"), (MANUAL, "GuestPoweredOff"), (ALWAYS_OFF, BY_HAND)):
        vms.assert_stopped(policy, reason)
    assert vms.guests[ALWAYS_ON].wait_up().boot_id != before.boot_id
    vms.assert_at_rest()
    for policy in (UNLESS_STOPPED, MANUAL, ALWAYS_OFF):
        assert len(vms.runs(policy)) == 1


def test_a_guest_that_reboots(herd: LabHerd) -> None:
    vms = four(herd, boots=True, grace_s=15)
    stay = (ALWAYS_ON, UNLESS_STOPPED, MANUAL)
    before = {policy: vms.guests[policy].status().boot_id for policy in stay}
    vms.befall(lambda _, guest: guest.press("reboot"))
    for guest in vms.guests.values():
        wait_until(lambda guest=guest: has_event(herd, guest, "GuestRebooted"), 30, f"{guest} reboots")  # type: ignore[misc]

    def is_new(policy: RunPolicy) -> bool:
        guest = vms.guests[policy]
        return guest.is_up() and guest.status().boot_id != before[policy]

    for policy in stay:
        wait_until(lambda policy=policy: is_new(policy), 60, f"{policy} is up again")  # type: ignore[misc]
        vms.assert_runs(policy, 1)
    vms.assert_stopped(ALWAYS_OFF, BY_HAND)  # when its time was over: what booted anew knows of no button
    vms.assert_at_rest()
    assert len(vms.runs(ALWAYS_OFF)) == 1


@pytest.mark.parametrize("reason", ["Crashed", "Destroyed"])
def test_a_guest_that_is_killed(herd: LabHerd, reason: str) -> None:
    """Its QEMU gets SIGKILL, or somebody says `virsh destroy` behind our back."""
    vms = four(herd, boots=False, grace_s=60)
    if reason == "Crashed":
        vms.befall(lambda host, guest: host.kill_qemu(guest.uuid))
    else:
        vms.befall(lambda host, guest: host.connect().lookupByUUIDString(guest.uuid).destroy())
    vms.assert_runs(ALWAYS_ON, 2)
    vms.assert_runs(UNLESS_STOPPED, 2)
    vms.assert_stopped(MANUAL, reason)
    vms.assert_stopped(ALWAYS_OFF, BY_HAND)
    vms.assert_at_rest()
    for policy in (MANUAL, ALWAYS_OFF):
        assert len(vms.runs(policy)) == 1


def test_a_host_that_shuts_down(herd: LabHerd) -> None:
    """What can leave leaves, the rest is stopped as the node's doing; both run again, by their policies."""
    vms = four(herd, boots=False, grace_s=60, node="h1")
    mobile = herd.lab.blank("mobile")
    herd.start_guests((mobile, "h1"), up=False)
    herd.shut_down("h1", timeout_s=15, grace_s=3)
    moved = herd.cluster.vm(mobile.name)
    assert (moved.status.incarnation, moved.status.node_name in {"h2", "h3"}) == (1, True)
    outside.assert_runs_once(herd, mobile, moved.status.node_name)
    assert herd.lab.host("h1").connect().listAllDomains() == [], "it goes down once nothing runs there"
    for policy in (ALWAYS_ON, UNLESS_STOPPED):  # nowhere else may they run
        vm = herd.wait_vm(vms.name(policy), lambda vm: vm.status.phase == "Pending")
        assert running_reason(vm) == "StoppedByNode"
        wait_until(lambda key=vm.key: waits_for_its_host(herd, key), 30, f"{vm.name} waits for h1")  # type: ignore[misc]
    vms.assert_stopped(MANUAL, "StoppedByNode")
    vms.assert_stopped(ALWAYS_OFF, BY_HAND)
    herd.lab.host("h1").power_cut()
    herd.boot("h1")
    vms.assert_runs(ALWAYS_ON, 2)
    vms.assert_runs(UNLESS_STOPPED, 2)
    vms.assert_stopped(MANUAL, "StoppedByNode")
    vms.assert_stopped(ALWAYS_OFF, BY_HAND)
    assert [herd.cluster.vm(vms.name(policy)).status.failures for policy in (ALWAYS_ON, UNLESS_STOPPED)] == [0, 0]
    vms.assert_at_rest()
    failed = [o.name for o in herd.cluster.operations() if o.status.phase is OperationPhase.FAILED]
    assert failed == [], "an evacuation of what was stopped is no failure"
