"""What failover tests share: BMCs that switch the lab's hosts, and how the herd's fencing of them stands."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from orchestrator.resources import Event, NodeFencing, VirtualMachine
from orchestrator.resources.fencing import Bmc, Evidence, NodeFencingStatus
from orchestrator.services.fencing import set_fencing
from tests.ipmi import SimulatedBmc
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.lab import Lab
from tests.lab.observer import QemuRun, qemu_runs
from tests.requirements import need_program
from tests.waiting import wait_until

PASSWORD_ENV = "BMC_PASSWORD"
SETTINGS = {PASSWORD_ENV: SimulatedBmc.password}


@contextmanager
def bmcs(
    lab: Lab, herd: LabHerd, cables: Mapping[str, str] | None = None, **config: Any
) -> Iterator[dict[str, SimulatedBmc]]:
    """Give each host a BMC (OpenIPMI's ipmi_sim in the control plane's namespace), and say so to the herd.

    What a BMC is told goes to a file; a thread cuts the host's power as it says.

    Args:
        lab: Whose hosts.
        herd: On them, with `SETTINGS`.
        cables: By host, whose BMC is on record for it; by default its own.
        config: More of what is on record of each (`Bmc`).
    """
    need_program("fence_ipmilan", "fence-agents")
    need_program("ipmitool", "ipmitool")
    program = need_program("ipmi_sim", "openipmi")
    found: dict[str, SimulatedBmc] = {}
    stop = threading.Event()

    def obey() -> None:
        while not stop.wait(0.05):
            for name, bmc in list(found.items()):
                host = lab.host(name)
                if bmc.power == "0" and host.is_on:
                    host.power_cut()

    with ExitStack() as stack:
        for number, host in enumerate(lab.hosts):
            space = ("ip", "netns", "exec", lab.control.name)
            bmc = SimulatedBmc(lab.directory / f"bmc-{host.name}", program, port=9001 + number, prefix=space)
            found[host.name] = stack.enter_context(bmc)
        thread = threading.Thread(target=obey)
        thread.start()
        try:
            for host in lab.hosts:
                cable = found[(cables or {}).get(host.name, host.name)]
                set_bmc(herd, host.name, cable.config(**{"password_env": PASSWORD_ENV, **config}))
            yield found
        finally:
            stop.set()
            thread.join()
            for host in lab.hosts:
                set_bmc(herd, host.name, None)


def set_bmc(herd: LabHerd, node: str, bmc: Bmc | None) -> None:
    """Put a node's BMC on record, and enable its fencing."""
    set_fencing(herd.cluster.context, node, lambda spec: spec.with_(enabled=True, bmc=bmc))


def status(herd: LabHerd, node: str) -> NodeFencingStatus:
    """How a node's fencing stands."""
    return herd.cluster.store.get(NodeFencing, node).status


def wait_status(
    herd: LabHerd, node: str, what: str, predicate: Callable[[NodeFencingStatus], bool], timeout: float = 60
) -> NodeFencingStatus:
    """Wait until a node's fencing is as wanted."""
    seen: list[NodeFencingStatus] = []

    def found() -> bool:
        seen[:] = [status(herd, node)]
        return predicate(seen[0])

    wait_until(found, timeout, lambda: f"{what}: {herd.vmherd('fence', 'status')}", interval=0.1)
    return seen[0]


def wait_evidence(herd: LabHerd, node: str, timeout: float = 90) -> Evidence:
    """Wait until there is evidence about a node."""
    evidence = wait_status(herd, node, "evidence", lambda s: s.evidence is not None, timeout).evidence
    assert evidence is not None
    return evidence


def events(herd: LabHerd, node: str) -> dict[str, str]:
    """The last message of each reason of a node's events."""
    found = [event for event in herd.cluster.store.all(Event) if event.involved_object.name == node]
    return {event.reason: event.message for event in sorted(found, key=lambda event: event.last_timestamp)}


def starts_after(incarnation: int) -> Callable[[VirtualMachine], bool]:
    """Whether a VM runs as a later incarnation."""
    return lambda vm: vm.status.phase == "Running" and vm.status.incarnation > incarnation


def lives(lab: Lab, guest: Guest, since: float = 0.0) -> list[QemuRun]:
    """The QEMUs that a guest has had, by the lab's own record, from their begin."""
    return [run for run in qemu_runs(lab.recorder.records()) if run.uuid == guest.uuid and run.began_at >= since]
