"""What the libvirt driver promises beyond the port: daemons that freeze, forks, unsafe storage, and no leaks."""

import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator.errors import HypervisorUnavailable
from tests.contract.libvirt_hosts import LibvirtHostPair
from tests.contract.test_hypervisor import (
    MARKER,
    Machine,
    Watcher,
    in_background,
    migration,
    promptly,
    read,
    state,
)
from tests.waiting import wait_until
from workers.hypervisor.libvirt_driver import LibvirtHypervisor
from workers.hypervisor.port import DomainState, EventKind, MigrationEnd, MigrationRequest

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def machine() -> Machine:
    uuid = str(uuid4())
    return Machine(f"shop.vm-{uuid[:8]}", uuid)


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
