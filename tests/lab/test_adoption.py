"""Adoption on real libvirt: a domain that runs is taken over, moves, and is given back as it was, ticking all along."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from orchestrator.resources import Event, NodeInventory
from tests.contract.tiny_guest import Behaviour, write_kernel
from tests.lab import outside
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.host import LabHost
from tests.lab.observer import DoubleRunObserver
from tests.waiting import wait_until
from tests.xml_paths import differences

SECRET = "pa55word"
SECURE = libvirt.VIR_DOMAIN_XML_SECURE
INACTIVE = SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE
CONSOLE = f"<graphics type='vnc' port='-1' autoport='yes' listen='127.0.0.1' passwd='{SECRET}'/>"

DIFFERS_LIVE = {
    "/domain/@id",  # counted by each host, as are its tap devices
    "/domain/devices/interface/target/@dev",
    "/domain/metadata",  # libvirt leaves the element that held the mark, with nothing in it
}
"""Where the XML of the running domain may differ after it was taken over, migrated and given back."""


@pytest.fixture(autouse=True)
def quiet() -> None:
    libvirt.registerErrorHandler(lambda *_: None, None)


def plain(guest: Guest, name: str, devices: str = "") -> str:
    """The XML of a guest as a person without vmherd has it: under a name of its own."""
    xml = guest.xml.replace(f"<name>{guest.domain}</name>", f"<name>{name}</name>")
    return xml.replace("<devices>", f"<devices>{devices}")


def define(herd: LabHerd, host: LabHost, xml: str) -> Any:
    """Define a domain and start it; returns when the herd has seen it."""
    domain = host.connect().defineXML(xml)
    domain.create()
    wait_seen(herd, host, domain)
    return domain


def wait_seen(herd: LabHerd, host: LabHost, domain: Any, state: str = "running") -> None:
    def seen() -> bool:
        known = herd.cluster.store.get(NodeInventory, host.name).domains.get(domain.UUIDString())
        return known is not None and known.state == state

    wait_until(seen, 30, f"{domain.name()} is seen on {host.name}")


def on(host: LabHost, guest: Guest) -> Any:
    return host.connect().lookupByUUIDString(guest.uuid)


def told(herd: LabHerd, reason: str) -> list[str]:
    events = herd.cluster.store.all(Event)
    return [event.message for event in events if event.reason == reason]


def test_taken_over_moved_and_given_back(herd: LabHerd) -> None:
    source, target = herd.lab.hosts[:2]
    herd.cluster.cordon("h3")
    guest = herd.lab.guest("linux-vm", address="192.0.2.101", memory_mib=160, disk_mib=8)
    domain = define(herd, source, plain(guest, "Linux_VM", CONSOLE))
    domain.setAutostart(1)
    first = guest.wait_up()
    before = {"live": domain.XMLDesc(SECURE), "inactive": domain.XMLDesc(INACTIVE)}
    observer = DoubleRunObserver(herd.lab)

    (_, row) = herd.vmherd("adopt", "--dry-run", "h1").splitlines()
    assert row.split()[:5] == ["Linux_VM", "linux-vm", "1", "100%", "160Mi"]
    assert f"vda={guest.disk}" in row
    assert domain.isPersistent()
    assert not herd.cluster.vms()

    lines = herd.vmherd("adopt", "h1", "Linux_VM").splitlines()
    assert lines[-1] == "Linux_VM: adopted as default/linux-vm, Running on node h1"
    assert (domain.isActive(), domain.isPersistent()) == (1, 0)
    assert not [d for d in source.connect().listAllDomains() if d.isPersistent()]
    assert "incarnation=" in domain.XMLDesc()
    assert guest.wait_ticks(3).boot_id == first.boot_id
    check_secret(herd)

    herd.cluster.evict("linux-vm").wait(60)
    assert herd.cluster.vm("linux-vm").status.node_name == "h2"
    assert guest.wait_ticks(3).boot_id == first.boot_id

    moved = on(target, guest)
    target.connect().defineXML(moved.XMLDesc(INACTIVE))
    moved.setAutostart(1)
    wait_until(lambda: not on(target, guest).isPersistent(), 30, "what was defined behind our back is removed")
    wait_until(lambda: told(herd, "PersistentDefinitionRemoved"), 30, "it is told")
    assert moved.isActive()
    assert not target.connect().listDefinedDomains()

    (line,) = herd.vmherd("release", "linux-vm").splitlines()[-1:]
    assert line == (
        "linux-vm: released: defined on node h2 as domain Linux_VM (it was adopted on node h1), and runs on"
    )
    last = guest.wait_ticks(3)
    assert last.boot_id == first.boot_id
    assert last.ticks > first.ticks
    back = on(target, guest)
    assert (back.isActive(), back.isPersistent(), back.autostart()) == (1, 1, 1)
    assert differences(before["inactive"], back.XMLDesc(INACTIVE)) == set()
    live = back.XMLDesc(SECURE)
    assert differences(before["live"], live) - DIFFERS_LIVE == set()
    assert "vmherd.dev" not in live
    assert not source.connect().listAllDomains()
    assert not herd.cluster.vms()
    assert guest.healthy(), guest.trouble()
    observer.check()
    back.setAutostart(0)


def check_secret(herd: LabHerd) -> None:
    """The console's password is in nothing that people are shown, and in no log."""
    shown = [herd.vmherd("get", kind, "-o", "yaml") for kind in ("vm", "vmop", "events")]
    redis = herd.cluster.store.redis
    shown.append(json.dumps(redis.xrange("changes")))
    logs = [path.read_text(errors="replace") for path in herd.lab.logs.iterdir() if "libvirtd" not in path.name]
    assert not [text for text in (*shown, *logs) if SECRET in text]
    assert SECRET in str(redis.hvals("adopted"))


def test_started_anew_it_is_the_same_machine_with_a_closed_console(herd: LabHerd) -> None:
    host = herd.lab.hosts[0]
    for name in ("h2", "h3"):
        herd.cluster.cordon(name)
    guest = herd.lab.blank("box")
    domain = define(herd, host, plain(guest, "box", CONSOLE))
    before = domain.XMLDesc(SECURE)
    assert [planned.is_refused for planned in herd.cluster.adopt("h1", timeout=60)] == [False]
    domain.destroy()
    herd.wait_vm("box", lambda vm: vm.status.phase == "Running" and vm.status.incarnation == 2, 60)
    again = on(host, guest)
    changed = differences(before, again.XMLDesc(SECURE))
    assert not [path for path in changed if path.endswith(("/address/@slot", "/address/@bus", "/type/@machine"))]
    assert not [path for path in changed if path.startswith("/domain/cpu")]
    assert "<listen type='none'/>" in again.XMLDesc()
    assert again.name() == "default.box"
    message = herd.cluster.release("box", 60)
    assert message == "defined on node h1 as domain default.box, and runs on"
    assert (again.isActive(), again.isPersistent()) == (1, 1)
    assert SECRET in again.XMLDesc(INACTIVE)


@pytest.fixture
def snapshotted(herd: LabHerd) -> Iterator[Any]:
    """A domain with a snapshot, which keeps it from being undefined."""
    host = herd.lab.hosts[0]
    disk = herd.lab.directory / "disks" / "snapshotted.qcow2"
    host.run(["qemu-img", "create", "-f", "qcow2", str(disk), "1M"])
    device = (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>"
        "<target dev='vda' bus='virtio'/></disk>"
    )
    domain = define(herd, host, plain(herd.lab.blank("snapshotted"), "snapshotted", device))
    snapshot = domain.snapshotCreateXML("<domainsnapshot><name>s1</name></domainsnapshot>")
    yield domain
    snapshot.delete()


def test_what_would_lose_something_is_refused(herd: LabHerd, snapshotted: Any) -> None:
    host = herd.lab.hosts[0]
    paused = define(herd, host, plain(herd.lab.blank("paused"), "paused"))
    paused.suspend()
    wait_seen(herd, host, paused, "paused")
    shutoff = host.connect().defineXML(plain(herd.lab.blank("shutoff"), "shutoff"))
    transient = host.connect().createXML(plain(herd.lab.blank("transient"), "transient"))
    good = define(herd, host, plain(herd.lab.blank("good"), "good"))
    done = herd.lab.control.run(
        [*herd_command(), "adopt", "h1"],
        env=herd.environment(VMHERD_REDIS_URL=herd.redis.url_for_hosts),
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "good: adopted as default/good, Running on node h1"
    refused = dict(line.removeprefix("vmherd: ").split(": not adopted: ") for line in done.stderr.splitlines())
    assert refused == {
        "paused": "it does not run: it is paused",
        "shutoff": "it does not run: it is shutoff",
        "snapshotted": "it has 1 snapshots or checkpoints, which go with its definition",
        "transient": "it is transient: its host has no definition of it that could be given back",
    }
    assert [domain.isPersistent() for domain in (paused, shutoff, snapshotted, good)] == [1, 1, 1, 0]
    assert transient.isActive()
    assert [vm.name for vm in herd.cluster.vms()] == ["good"]


def herd_command() -> list[str]:
    return [sys.executable, "-m", "orchestrator.cli"]


def test_what_a_crash_leaves_of_an_adopted_domain_is_destroyed_before_the_next_start(
    herd: LabHerd, tmp_path: Path
) -> None:
    """It runs on as its host had started it, with on_crash=preserve: its QEMU is still there after the panic."""
    host, guest = herd.lab.hosts[0], herd.lab.blank("linux-vm")
    kernel = write_kernel(Behaviour(poweroff_after_s=40, panics=True), tmp_path)
    xml = plain(guest, "Linux_VM", "<panic model='isa'/>").replace("</type>", f"</type><kernel>{kernel}</kernel>", 1)
    xml = xml.replace("<on_crash>destroy<", "<on_crash>preserve<")
    domain = define(herd, host, xml)
    observer = DoubleRunObserver(herd.lab)
    (_, row) = herd.vmherd("adopt", "--dry-run", "h1").splitlines()
    assert "its on_crash is preserve" in row
    herd.vmherd("adopt", "h1", "Linux_VM")
    assert domain.isActive()

    vm = herd.wait_vm("linux-vm", lambda vm: vm.status.incarnation == 2 and vm.status.phase == "Running", 90)
    assert told(herd, "Crashed") == ["its guest crashed; node h1 keeps its domain (on_crash=preserve)"]
    assert vm.status.failures == 1
    outside.assert_runs_once(herd, guest, vm.status.node_name)
    live = on(herd.lab.host(vm.status.node_name), guest).XMLDesc()
    assert "<on_crash>destroy</on_crash>" in live
    observer.check()
