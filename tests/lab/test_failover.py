"""A host dies: evidence from its BMC, by the real fence_ipmilan, and then its guests answer from other hosts.

What is no evidence starts nothing: a BMC that can't be read, or that is another host's. A person's word ends the wait.
"""

import time
from collections.abc import Iterator

import pytest

from orchestrator.resources import RunPolicy, VirtualMachine
from orchestrator.resources.fencing import FenceLevel, FencePhase
from orchestrator.services.vms import update_vm
from tests.lab import fences, outside
from tests.lab.fences import bmcs, starts_after
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.host import LabHost
from tests.lab.lab import Lab
from tests.lab.observer import DoubleRunObserver
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

SETTINGS = {
    **fences.SETTINGS,
    "BMC_WRONG": "not-the-password",
    # Of three hosts, two are lost below: the reason that is looked for is another one.
    "VMHERD_MAX_UNHEALTHY": "70",
}


@pytest.fixture(autouse=True)
def _never_twice(lab: Lab, herd: LabHerd) -> Iterator[None]:
    """No VM runs twice, from before the test on; and each host has power after it."""
    doubles = DoubleRunObserver(lab)
    yield
    for host in lab.hosts:
        if not host.is_on:
            host.power_on()
    herd.wait_ready([host.name for host in lab.hosts], 90)
    doubles.check()


def start_blank(lab: Lab, herd: LabHerd, node: str, name: str = "protected") -> Guest:
    """Start a machine without an operating system, which is protected."""
    machine = lab.blank(name)
    herd.start_guests((machine, node), up=False, runPolicy=RunPolicy.ALWAYS_ON.value)
    return machine


def start_what_stays_off(lab: Lab, herd: LabHerd, node: str) -> list[Guest]:
    """Start three VMs that are to start nowhere when their node is lost: Manual, AlwaysOff, and stopped by hand."""
    manual, off, stopped = (lab.blank(name) for name in ("manual", "always-off", "stopped"))
    herd.cluster.create(herd.manifest(manual, node=node, runPolicy=RunPolicy.MANUAL.value))
    herd.cluster.start(manual.name).wait(60)
    herd.free(manual.name)
    herd.start_guests((off, node), (stopped, node), up=False)
    herd.cluster.stop(stopped.name, force=True).wait(60)
    return [manual, off, stopped]


def set_policy(herd: LabHerd, machine: Guest, policy: RunPolicy) -> None:
    """Change a VM's runPolicy."""
    vm = herd.cluster.store.get(VirtualMachine, herd.cluster.vm(machine.name).key)
    update_vm(herd.cluster.context, vm.with_(spec=vm.spec.with_(run_policy=policy)))


def boot(herd: LabHerd, *hosts: LabHost) -> None:
    """Give hosts their power back; returns once they are in the herd, with no guest."""
    for host in hosts:
        host.power_on()
    herd.wait_ready([host.name for host in hosts], 90)
    for host in hosts:
        assert not host.connect().listAllDomains()


def test_the_guests_of_a_dead_host_answer_elsewhere(lab: Lab, herd: LabHerd) -> None:
    dead = lab.hosts[0]
    guests = [lab.guest(f"g-{number}", address=f"192.0.2.{120 + number}") for number in range(2)]
    policies = (RunPolicy.ALWAYS_ON, RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY)
    with bmcs(lab, herd) as found:
        stay_off = start_what_stays_off(lab, herd, dead.name)
        for guest, policy in zip(guests, policies, strict=True):
            herd.start_guests((guest, dead.name), runPolicy=policy.value)
        # It does not heed the power button, so that it runs when its host dies.
        set_policy(herd, stay_off[1], RunPolicy.ALWAYS_OFF)
        assert outside.states(lab, stay_off[1]) == {dead.name: "running"}
        died_at = time.time()
        dead.power_cut()  # its BMC still reads as on

        evidence = fences.wait_evidence(herd, dead.name)
        assert evidence.level is FenceLevel.BMC
        assert "read back as off" in evidence.text
        for guest in guests:
            vm = herd.wait_vm(guest.name, starts_after(1))
            assert vm.status.node_name != dead.name
            guest.wait_up(60)
        wait_until(lambda: dead.name not in {n.name for n in herd.cluster.nodes()}, 30, "the node leaves")
        wait_until(lambda: found[dead.name].power == "1", 30, "its power is switched on again")
        assert "NodeFenced" in fences.events(herd, dead.name)
        boot(herd, dead)
        for guest in guests:
            outside.assert_runs_once(herd, guest, herd.cluster.vm(guest.name).status.node_name)
        for machine in stay_off:
            herd.wait_vm(machine.name, lambda vm: vm.status.phase == "Stopped")
            assert fences.lives(lab, machine, since=died_at) == []


def test_a_wrong_password_is_no_evidence_and_a_person_ends_the_wait(lab: Lab, herd: LabHerd) -> None:
    dead = lab.hosts[0]
    with bmcs(lab, herd, password_env="BMC_WRONG"):
        # It is told while all is well.
        wait_until(lambda: "BmcUnreadable" in fences.events(herd, dead.name), 60, "it is told that it can't be read")
        machine = start_blank(lab, herd, dead.name)
        dead.power_cut()

        unconfirmed = (FencePhase.UNCONFIRMED, "BmcUnreadable")
        fences.wait_status(herd, dead.name, "no evidence", lambda s: (s.phase, s.reason) == unconfirmed)
        said = fences.events(herd, dead.name)["FenceUnconfirmed"]
        assert f"vmherd fence confirm {dead.name}" in said
        assert SETTINGS["BMC_WRONG"] not in said
        assert herd.cluster.vm(machine.name).status.node_name == dead.name

        confirmed_at = time.time()
        herd.vmherd("fence", "confirm", dead.name, "--yes")
        moved = herd.wait_vm(machine.name, starts_after(1))
        assert [run.host for run in fences.lives(lab, machine, since=confirmed_at)] == [moved.status.node_name]
        assert len(fences.lives(lab, machine)) == 2, "none between its host's death and the person's word"
        boot(herd, dead)


def test_swapped_bmc_addresses_are_no_evidence(lab: Lab, herd: LabHerd) -> None:
    dead, healthy = lab.hosts[0], lab.hosts[1]
    with bmcs(lab, herd, {dead.name: healthy.name, healthy.name: dead.name}) as found:
        machines = [start_blank(lab, herd, host.name, f"on-{host.name}") for host in (dead, healthy)]
        dead.power_cut()

        wait_until(lambda: not healthy.is_on, 60, "the power is cut of the wrong host")
        unconfirmed = (FencePhase.UNCONFIRMED, "BmcOfAnother")
        fences.wait_status(herd, dead.name, "the reason", lambda s: (s.phase, s.reason) == unconfirmed, 90)
        said = fences.events(herd, dead.name)["FenceUnconfirmed"]
        assert f"{healthy.name} fell silent too" in said
        assert "swapped" in said
        # The other one's is none either: the first had been lost before, and by a BMC that is not trusted.
        others = (FencePhase.UNCONFIRMED, "OthersLost")
        fences.wait_status(herd, healthy.name, "its reason", lambda s: (s.phase, s.reason) == others, 90)

        confirmed_at = time.time()
        for host in (dead, healthy):
            herd.vmherd("fence", "confirm", host.name, "--yes")
        for machine in machines:
            herd.wait_vm(machine.name, starts_after(1))
            (life,) = fences.lives(lab, machine, since=confirmed_at)
            assert life.host == lab.hosts[2].name
            assert len(fences.lives(lab, machine)) == 2, "none before the person's word"
        for bmc in found.values():
            bmc.power = "1"  # the person presses both buttons
        boot(herd, dead, healthy)
