"""Asked before a slot is spent: targets that lack something are passed by, and disks are copied where that is allowed.

The hosts share one folder, which libvirt and the agents can't know: with VMHERD_ASSUME_SHARED_STORAGE off, whatever is
written counts as each host's own. What is really each host's own is `/var/lib/libvirt`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import Refused
from orchestrator.resources import OperationPhase, VirtualMachine, VirtualMachineOperation
from orchestrator.resources.meta import find_condition
from orchestrator.resources.needs import STORAGE_COPY_ANNOTATION, MachineNeeds
from tests.lab import outside
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.host import LabHost

SETTINGS = {"VMHERD_ASSUME_SHARED_STORAGE": "false"}

IMAGES = "/var/lib/libvirt/images"
POOL = f"<pool type='dir'><name>images</name><target><path>{IMAGES}</path></target></pool>"
SECTOR = 512
"""The guest writes its ticks to the first one."""
READ_ONLY = (
    f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{IMAGES}/iso.raw'/>"
    "<target dev='vda' bus='virtio'/><readonly/></disk>"
)
BRIDGED = "<interface type='bridge'><source bridge='br7'/><model type='virtio'/><rom enabled='no'/></interface>"


def image(host: LabHost, name: str) -> Path:
    """A file in a host's own folder of images, seen from here."""
    path = host.directory / IMAGES.removeprefix("/") / name
    path.parent.mkdir(exist_ok=True)
    return path


def with_device(guest: Guest, device: str) -> Guest:
    guest.xml = guest.xml.replace("<controller", f"{device}<controller", 1)
    return guest


def move(herd: LabHerd, vm: str, timeout: float = 60.0) -> VirtualMachineOperation:
    operation = herd.cluster.evict(vm).wait(timeout=timeout)
    assert operation.phase is OperationPhase.COMPLETED, operation.message
    return operation.resource


def needs(vm: VirtualMachine) -> MachineNeeds:
    assert vm.status.needs is not None
    return vm.status.needs


def change(herd: LabHerd, vm: VirtualMachine, new: VirtualMachine) -> None:
    herd.cluster.store.must_commit(herd.cluster.store.batch().put(vm, new))


def test_a_disk_that_is_missing_on_one_host(herd: LabHerd) -> None:
    for name in ("h1", "h3"):
        image(herd.lab.host(name), "iso.raw").write_bytes(bytes(2**20))
    guest = with_device(herd.lab.blank("reader"), READ_ONLY)
    herd.start_guests((guest, "h1"), up=False)
    assert needs(herd.cluster.vm("reader")).local_disks == ()
    # Left to itself it would go to h2, the first of two equals.
    assert move(herd, "reader").status.attempts == 1
    outside.assert_runs_once(herd, guest, "h3")
    assert f"{IMAGES}/iso.raw" in herd.cluster.vm("reader").status.arrivals["h2"].problems[0]


@pytest.fixture
def bridges(herd: LabHerd) -> Iterator[None]:
    """A bridge that h2 lacks."""
    hosts = [herd.lab.host(name) for name in ("h1", "h3")]
    for host in hosts:
        host.run(["ip", "link", "add", "br7", "type", "bridge"])
        host.run(["ip", "link", "set", "br7", "up"])
    yield
    for host in hosts:
        host.run(["ip", "link", "del", "br7"])


def test_a_bridge_that_is_missing_on_one_host(herd: LabHerd, bridges: None) -> None:
    guest = with_device(herd.lab.blank("bridged"), BRIDGED)
    herd.start_guests((guest, "h1"), up=False)
    assert move(herd, "bridged").status.attempts == 1
    outside.assert_runs_once(herd, guest, "h3")
    assert herd.cluster.vm("bridged").status.arrivals["h2"].problems == ("bridge br7 is not there",)


def test_a_cpu_that_no_other_host_has_and_no_slot_is_spent(herd: LabHerd) -> None:
    """All hosts are one machine. So the VM is put on record with a CPU that no emulated machine has here."""
    guest = herd.lab.blank("modern")
    herd.start_guests((guest, "h1"), up=False)
    vm = herd.cluster.vm("modern")
    machine = needs(vm).machine.replace("qemu64", "EPYC")
    assert machine != needs(vm).machine
    other = needs(vm).with_(machine=machine, plain=False, fingerprint="epyc")
    change(herd, vm, vm.with_status(needs=other))
    operation = herd.cluster.evict("modern")
    waiting = herd.wait_operation(
        operation.name, lambda found: "unfit" in found.message and "2 unfit" in found.message, 30
    )
    condition = find_condition(waiting.status.conditions, "Completed")
    assert condition is not None
    assert condition.reason == "TargetUnschedulable"
    assert "2 unfit (CPU model EPYC: this host lacks" in waiting.message
    assert waiting.status.attempts == 0
    assert "slots:cluster" not in herd.leftovers()
    operation.abort()
    outside.assert_runs_once(herd, guest, "h1")


@pytest.fixture
def pools(herd: LabHerd) -> Iterator[None]:
    """Storage pools, in which libvirt makes the images to copy to."""
    pools: list[Any] = []
    for host in herd.lab.hosts:
        image(host, "keeper.raw")
        pools.append(host.connect().storagePoolCreateXML(POOL))
    yield
    for pool in pools:
        pool.destroy()


def test_a_disk_of_its_hosts_own_is_copied_where_that_is_allowed(herd: LabHerd, pools: None) -> None:
    guest = herd.lab.guest("keeper", address="192.0.2.107", disk_mib=16)
    assert guest.disk is not None
    guest.xml = guest.xml.replace(str(guest.disk), f"{IMAGES}/keeper.raw")
    content = os.urandom(16 * 2**20)
    h1, h2, h3 = (image(host, "keeper.raw") for host in herd.lab.hosts)
    h1.write_bytes(content)
    h2.write_bytes(b"someone else's")
    herd.start_guests((guest, "h1"))
    vm = herd.wait_vm("keeper", lambda found: found.status.needs is not None)
    assert [(disk.target, disk.size_mib) for disk in needs(vm).local_disks] == [("vda", 16)]
    condition = find_condition(vm.status.conditions, "Migratable")
    assert condition is not None
    assert (condition.status, condition.reason) == ("False", "VirtualMachineDisksNotMigratable")
    with pytest.raises(Refused, match="VirtualMachineDisksNotMigratable"):
        herd.cluster.evict("keeper")

    vm = herd.cluster.vm("keeper")
    change(herd, vm, vm.with_(metadata=vm.metadata.with_(annotations={STORAGE_COPY_ANNOTATION: "true"})))
    before = guest.wait_ticks(1)
    # On h2 the copy would overwrite a file that is nobody's copy; so it goes to h3.
    assert move(herd, "keeper", 90).status.attempts == 1
    outside.assert_runs_once(herd, guest, "h3")
    assert h2.read_bytes() == b"someone else's"
    assert "is here already" in herd.cluster.vm("keeper").status.arrivals["h2"].problems[0]
    after = guest.wait_ticks(2)
    assert (after.boot_id, guest.trouble()) == (before.boot_id, "")
    copied = h3.read_bytes()
    assert copied[SECTOR:] == content[SECTOR:]
    assert int(copied[:SECTOR].split()[0]) > before.ticks
    assert h1.read_bytes()[SECTOR:] == content[SECTOR:]
    herd.wait_vm("keeper", lambda found: needs(found).home == "h3")

    # And back: what h1 has is known as this disk's own, left behind.
    move(herd, "keeper", 90)
    outside.assert_runs_once(herd, guest, "h1")
    last = guest.wait_ticks(2)
    assert (last.boot_id, guest.trouble()) == (before.boot_id, "")
    assert int(h1.read_bytes()[:SECTOR].split()[0]) > after.ticks
