"""A host dies: evidence from its BMC, by the real fence_ipmilan, and then its guests answer from other hosts.

The hosts' BMCs are OpenIPMI's ipmi_sim in the control plane's namespace. What a BMC is told goes to a file; a thread of
the test cuts the host's power, or gives it back, as it says.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from orchestrator.resources import Event, NodeFencing, RunPolicy, VirtualMachine
from orchestrator.resources.fencing import FenceLevel
from orchestrator.services.fencing import set_fencing
from tests.ipmi import SimulatedBmc
from tests.lab import outside
from tests.lab.herd import LabHerd
from tests.lab.host import LabHost
from tests.lab.lab import Lab
from tests.lab.observer import DoubleRunObserver
from tests.requirements import need_program
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(240)

SETTINGS = {"BMC_PASSWORD": SimulatedBmc.password}


@contextmanager
def bmcs(lab: Lab, herd: LabHerd, **cables: str) -> Iterator[dict[str, SimulatedBmc]]:
    """Give each host a BMC, and say so to the herd; `h1="h2"`: what is on record for h1 is h2's."""
    need_program("fence_ipmilan", "fence-agents")
    need_program("ipmitool", "ipmitool")
    program = need_program("ipmi_sim", "openipmi")
    found: dict[str, SimulatedBmc] = {}
    stop = threading.Event()

    def obey() -> None:
        while not stop.wait(0.05):
            for name, bmc in found.items():
                host = lab.host(name)
                if bmc.power == "0" and host.is_on:
                    host.power_cut()

    with ExitStack() as stack:
        for number, host in enumerate(lab.hosts):
            bmc = SimulatedBmc(
                lab.directory / f"bmc-{host.name}",
                program,
                port=9001 + number,
                prefix=("ip", "netns", "exec", lab.control.name),
            )
            found[host.name] = stack.enter_context(bmc)
        thread = threading.Thread(target=obey)
        thread.start()
        try:
            for host in lab.hosts:
                config = found[cables.get(host.name, host.name)].config(password_env="BMC_PASSWORD")
                set_fencing(
                    herd.cluster.context,
                    host.name,
                    lambda spec, config=config: spec.with_(enabled=True, bmc=config),  # type: ignore[misc]
                )
            yield found
        finally:
            stop.set()
            thread.join()


def starts_after(incarnation: int) -> Callable[[VirtualMachine], bool]:
    """Whether a VM runs as a later incarnation."""
    return lambda vm: vm.status.phase == "Running" and vm.status.incarnation > incarnation


def kill(host: LabHost) -> None:
    """All of a host's processes die at once; its BMC still reads as on."""
    host.power_cut()


def test_the_guests_of_a_dead_host_answer_elsewhere(lab: Lab, herd: LabHerd) -> None:
    doubles = DoubleRunObserver(lab)
    dead = lab.hosts[0]
    guests = {
        policy: lab.guest(f"g-{number}", address=f"192.0.2.{120 + number}")
        for number, policy in enumerate((RunPolicy.ALWAYS_ON, RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY))
    }
    with bmcs(lab, herd) as found:
        for policy, guest in guests.items():
            herd.start_guests((guest, dead.name), runPolicy=policy.value)
        before = {policy: herd.cluster.vm(guests[policy].name) for policy in guests}
        kill(dead)

        def evidence() -> bool:
            fencing = herd.cluster.store.find(NodeFencing, dead.name)
            return fencing is not None and fencing.status.evidence is not None

        wait_until(evidence, 60, lambda: f"evidence: {herd.vmherd('fence', 'status')}")
        status = herd.cluster.store.get(NodeFencing, dead.name).status
        assert status.evidence is not None
        assert status.evidence.level is FenceLevel.BMC
        assert "read back as off" in status.evidence.text
        for policy, vm in before.items():
            moved = herd.wait_vm(vm.name, starts_after(vm.status.incarnation))
            assert moved.status.node_name != dead.name
            guests[policy].wait_up(60)
        wait_until(lambda: dead.name not in {n.name for n in herd.cluster.nodes()}, 30, "the node leaves")
        wait_until(lambda: found[dead.name].power == "1", 30, "its power is switched on again")
        assert doubles.found() == []
        reasons = [e.reason for e in herd.cluster.store.all(Event) if e.involved_object.name == dead.name]
        assert "NodeFenced" in reasons
        dead.power_on()  # it boots; its processes are started by themselves
        herd.wait_ready([dead.name], 90)
        assert not dead.connect().listAllDomains()
        for policy, vm in before.items():
            outside.assert_runs_once(herd, guests[policy], herd.cluster.vm(vm.name).status.node_name)
