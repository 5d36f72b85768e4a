"""What the libvirt driver promises beyond the port: daemons that freeze, forks, unsafe storage, and no leaks."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from orchestrator.errors import HypervisorUnavailable
from tests.contract.libvirt_hosts import LibvirtHostPair
from tests.contract.machines import (
    MARKER,
    Machine,
    Watcher,
    in_background,
    migration,
    new_machine,
    promptly,
    read,
    state,
)
from tests.lab.lab import Lab
from tests.waiting import wait_until
from workers.hypervisor.domain_xml import MARKER_NAMESPACE
from workers.hypervisor.drivers import look_by_libvirt
from workers.hypervisor.libvirt_driver import LibvirtHypervisor
from workers.hypervisor.port import DomainState, EventKind, MigrationEnd, MigrationRequest, StorageLocked

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

REPOSITORY = Path(__file__).parents[2]


def test_a_frozen_daemon_is_unavailable(libvirt_pair: LibvirtHostPair, machine: Machine) -> None:
    pair = libvirt_pair
    watcher = Watcher(pair.source)
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    pair.freeze_daemon("source")
    fresh = LibvirtHypervisor(pair.uri("source"))
    try:
        # Two ways to notice: keepalive on an open connection, the deadline of opening a new one.
        known, unknown = in_background(pair.source.domains), in_background(fresh.domains)
        for asked in (known, unknown):
            with pytest.raises(HypervisorUnavailable):
                asked.result(30)
        watcher.wait_for(EventKind.LOST)
    finally:
        pair.thaw_daemon("source")
    assert state(pair.source, machine) is DomainState.RUNNING
    assert state(fresh, machine) is DomainState.RUNNING
    watcher.wait_for(EventKind.RESYNC)
    fresh.close()


def test_a_targets_copy_is_never_taken_for_a_sources(libvirt_pair: LibvirtHostPair, machine: Machine) -> None:
    """The one case in which libvirt does not say which it is: the daemon restarted, and the copy's QEMU hangs."""
    pair = libvirt_pair
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine):
        pair.freeze_machine("target", machine.uuid)
        pair.kill_daemon("target")
    pair.start_daemon("target")
    for _ in range(3):
        copy = promptly(lambda: read(pair.target, machine))
        assert (copy.state, copy.has_job, copy.marker) == (DomainState.INCOMING, True, MARKER)
        (listed,) = promptly(pair.target.domains)
        assert (listed.state, listed.has_job) == (DomainState.INCOMING, True)
    pair.thaw_machine("target", machine.uuid)
    wait_until(lambda: pair.target.domain(machine.uuid) is None, 40, "the copy to be gone")
    assert state(pair.source, machine) is DomainState.RUNNING


def test_the_lock_on_an_image_is_told_apart(libvirt_pair: LibvirtHostPair, machine: Machine) -> None:
    """QEMU's own words, as a second one on another host finds the image of the first."""
    pair, second = libvirt_pair, new_machine()
    pair.source.start(pair.equipped_xml(machine.name, machine.uuid), MARKER)
    with pytest.raises(StorageLocked, match=second.uuid):
        pair.target.start(pair.equipped_xml(second.name, second.uuid), MARKER)
    assert pair.target.domain(second.uuid) is None
    pair.source.destroy(machine.uuid)
    assert pair.target.start(pair.equipped_xml(second.name, second.uuid), MARKER).state is DomainState.RUNNING


def test_another_host_is_looked_at_by_its_daemon(libvirt_pair: LibvirtHostPair, machine: Machine) -> None:
    pair = libvirt_pair
    pair.target.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    assert [domain.marker for domain in look_by_libvirt(pair.target_uri)] == [MARKER]
    with pytest.raises(HypervisorUnavailable):
        look_by_libvirt(pair.away_uri)
    pair.freeze_daemon("target")
    try:
        with pytest.raises(HypervisorUnavailable):
            look_by_libvirt(pair.target_uri)
    finally:
        pair.thaw_daemon("target")


def test_a_starting_machine_is_read(libvirt_pair: LibvirtHostPair, machine: Machine) -> None:
    pair = libvirt_pair
    starting = in_background(lambda: pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER))
    seen = set()
    while not starting.done():
        domain = promptly(lambda: pair.source.domain(machine.uuid))
        if domain is not None:
            assert domain.marker == MARKER
            seen.add(domain.state)
    assert starting.result().state is DomainState.RUNNING
    assert seen <= {DomainState.PAUSED, DomainState.RUNNING}


def test_no_definition_is_left_of_a_persistent_machine(libvirt_pair: LibvirtHostPair, machine: Machine) -> None:
    pair = libvirt_pair
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), MARKER)
    assert pair.definitions("source") == [f"autostart/{machine.name}.xml", f"{machine.name}.xml"]
    result = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, 596))
    assert result.end is MigrationEnd.SUCCEEDED
    assert pair.definitions("source") == pair.definitions("target") == []


def test_storage_that_libvirt_does_not_know_as_shared(
    libvirt_pair: LibvirtHostPair, machine: Machine, tmp_path: Path
) -> None:
    pair = libvirt_pair
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(2**20))
    xml = pair.blank_xml(machine.name, machine.uuid).replace(
        "</devices>",
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='{disk}'/><target dev='vda' bus='virtio'/></disk></devices>",
    )
    request = MigrationRequest(machine.uuid, pair.target_uri, 596)
    pair.source.start(xml, MARKER)
    refused = pair.source.migrate(request)
    assert refused.end is MigrationEnd.NOT_STARTED
    assert "unsafe" in refused.message
    assert "VMHERD_ASSUME_SHARED_STORAGE" in refused.message
    assert state(pair.source, machine) is DomainState.RUNNING
    trusting = LibvirtHypervisor(pair.uri("source"), allow_unsafe=True)
    assert trusting.migrate(request).end is MigrationEnd.SUCCEEDED
    trusting.close()


def test_what_is_started_from_a_live_definition_is_the_same_machine(
    libvirt_pair: LibvirtHostPair, machine: Machine
) -> None:
    pair = libvirt_pair
    pair.source.start(pair.equipped_xml(machine.name, machine.uuid), MARKER)
    first = live_xml(pair.source, machine)
    assert "machine='pc'" not in first, "a versioned one"
    assert "<mac address=" in first
    pair.source.destroy(machine.uuid)
    pair.target.start(first, MARKER)
    assert without_the_run(live_xml(pair.target, machine)) == without_the_run(first)
    parsed = ET.fromstring(first)  # noqa: S314  libvirtd wrote it
    assert [interface.get("type") for interface in parsed.iterfind("devices/interface")] == ["bridge", "network"]
    assert parsed.find("cpu[@check='full']") is not None


def live_xml(host: LibvirtHypervisor, machine: Machine) -> str:
    definition = host.definition(machine.uuid)
    assert definition is not None
    return definition.live_xml


def without_the_run(xml: str) -> str:
    """Leave out what is of one run and passed over by a start: the run's number, names of taps."""
    without_id = re.sub(r"""( id=["']\d+["']|\bvnet\d+)""", "", xml)
    return ET.canonicalize(without_id, strip_text=True)


def test_a_marker_that_somebody_damaged_is_removed(libvirt_pair: LibvirtHostPair, machine: Machine) -> None:
    pair = libvirt_pair
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    pair.set_metadata("source", machine.uuid, "<vm project='shop'/>", MARKER_NAMESPACE)
    assert read(pair.source, machine).marker is None
    assert MARKER_NAMESPACE in live_xml(pair.source, machine)
    pair.source.unmark(machine.uuid)
    assert MARKER_NAMESPACE not in live_xml(pair.source, machine)
    pair.source.unmark(machine.uuid)


def test_files_that_the_guest_was_started_from_are_needed(libvirt_pair: LibvirtHostPair, machine: Machine) -> None:
    pair = libvirt_pair
    kernel = pair.local_kernel("source")
    xml = pair.blank_xml(machine.name, machine.uuid).replace("hvm</type>", f"hvm</type><kernel>{kernel}</kernel>")
    started = pair.source.start(xml, MARKER)
    (problem,) = pair.target.preflight(live_xml(pair.source, machine))
    assert problem == f"kernel: no such file {kernel}"
    result = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, 596))
    assert result.end is MigrationEnd.FAILED, "so this is worth a preflight, though the guest has long booted"
    assert pair.source.domain(machine.uuid) == started


def test_a_copied_disk_needs_a_storage_pool_or_its_image(libvirt_pair: LibvirtHostPair, machine: Machine) -> None:
    pair = libvirt_pair
    xml = pair.local_disk_xml(machine.name, machine.uuid)
    pair.source.start(xml, MARKER)
    request = MigrationRequest(machine.uuid, pair.target_uri, 596, copy_disks=("vda",))
    with pair.without_pool("target"):
        (problem,) = pair.target.preflight(xml, ("vda",))
        assert "storage pool" in problem
        assert pair.source.migrate(request).end is MigrationEnd.FAILED
        assert state(pair.source, machine) is DomainState.RUNNING
    assert pair.target.preflight(xml, ("vda",)) == []


@pytest.mark.parametrize("agent", ["works", "hangs"])
def test_a_guests_agent(libvirt_pair: LibvirtHostPair, hypervisor_lab: Lab, agent: str) -> None:
    """One that works heeds no power button here, so it was the agent; one that hangs is passed over."""
    host, address = libvirt_pair.source, "192.0.2.201"
    guest = hypervisor_lab.guest(f"agent-{agent}", address=address, memory_mib=128, agent=agent, acpi=agent == "hangs")
    watcher = Watcher(host)
    machine = Machine(guest.domain, guest.uuid)
    assert host.start(guest.xml, MARKER).agent is False
    guest.wait_up()
    wait_until(lambda: read(host, machine).agent, 20, "the agent to be connected")
    wait_until(lambda: (EventKind.CHANGED, "agent-connected") in watcher.of(machine))
    if agent == "works":
        assert promptly(lambda: host.addresses(guest.uuid)) == [address]
    promptly(lambda: host.shutdown(guest.uuid))
    wait_until(lambda: host.domain(guest.uuid) is None, 30, "the guest to power off")
    stopped = watcher.wait_for(EventKind.STOPPED, machine)
    assert (stopped.detail, stopped.reason) == ("shutdown", "guest")


def test_restarts_of_the_daemon_leak_nothing(libvirt_pair: LibvirtHostPair, machine: Machine) -> None:
    pair = libvirt_pair
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    watcher = Watcher(pair.source)

    def restart_and_count() -> int:
        resyncs = len(watcher.events)
        pair.kill_daemon("source")
        pair.start_daemon("source")
        for _ in range(8):  # so that each lane that asks has reconnected
            pair.source.domains()
            pair.source.addresses(machine.uuid)
        wait_until(lambda: len(watcher.events) >= resyncs + 2)
        return sum(1 for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    counts = [restart_and_count() for _ in range(4)]
    assert counts[-1] <= counts[0] + 2, counts


FORKS = """
import os, sys
from orchestrator.errors import InvariantBroken
from workers.hypervisor.libvirt_driver import LibvirtHypervisor

def in_child(call):
    pid = os.fork()
    if pid == 0:
        try:
            call()
            os._exit(0)
        except InvariantBroken:
            os._exit(3)
        finally:
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

host = LibvirtHypervisor(sys.argv[1])
before = in_child(host.domains)
host.domains()
print(before, in_child(host.host), in_child(LibvirtHypervisor(sys.argv[1]).domains))
"""


def test_a_driver_may_be_made_before_a_fork_and_not_used(libvirt_pair: LibvirtHostPair) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS, libvirt_pair.uri("source")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["0", "3", "3"]
    assert done.stderr == ""
