"""The pair of hosts of the libvirt driver: two of the lab's, with guests that need no operating system."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

import libvirt

from tests.contract.hypervisor_hosts import BUSY_MIB, CONSOLE_PASSWORD, LOCAL_DISK_MIB, RESTLESS_MIB_S, Lack, Side
from tests.contract.tiny_guest import Behaviour, write_kernel
from tests.lab.host import LabHost
from tests.lab.image import emulator
from tests.lab.lab import Lab
from tests.lab.network import GUEST_BRIDGE
from tests.waiting import wait_until
from workers.hypervisor.domain_xml import with_marker
from workers.hypervisor.libvirt_driver import LibvirtHypervisor
from workers.hypervisor.port import Marker

_LOOK: Final = """
import sys
from orchestrator.errors import HypervisorUnavailable
from workers.hypervisor.drivers import look_by_libvirt
from workers.orders import guests_of
try:
    print(*(guest["vm"] for guest in guests_of(look_by_libvirt(sys.argv[1]))))
except HypervisorUnavailable as error:
    print(error)
"""
_LOCAL: Final = Path("/var/lib/libvirt/images")
"""A folder that each host has for itself."""
_POOL: Final = "local"
_LAN: Final = "lan"
_UNFIT: Final[Mapping[Lack, str | tuple[str, str]]] = {
    "cpu": (">qemu64<", ">Nowhere-Server<"),
    "machine": ("machine='pc'", "machine='pc-nowhere'"),
    "disk": ("equipped.raw", "nowhere.raw"),
    "cdrom": ("equipped.iso", "nowhere.iso"),
    "bridge": (f"bridge='{GUEST_BRIDGE}'", "bridge='nowhere'"),
    "network": (f"network='{_LAN}'", "network='nowhere'"),
    "hostdev": (
        "<hostdev mode='subsystem' type='pci' managed='yes'><source>"
        "<address domain='0x0000' bus='0x03' slot='0x00' function='0x1'/></source></hostdev>"
    ),
    "tpm": "<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>",
}


class LibvirtHostPair:
    """Two hosts of a lab."""

    def __init__(self, lab: Lab) -> None:
        self._hosts: dict[Side, LabHost] = {"source": lab.hosts[0], "target": lab.hosts[1]}
        self._kernels = lab.directory / "disks"
        self.source = LibvirtHypervisor(self._hosts["source"].libvirt_uri)
        self.target = LibvirtHypervisor(self._hosts["target"].libvirt_uri)
        self.target_uri = self._hosts["target"].migration_uri
        for side in self._hosts:
            self._ensure_network_and_pool(side)
        self.away_uri = f"qemu+tcp://{self._hosts['target'].address}:9/system"

    def _ensure_network_and_pool(self, side: Side) -> None:
        self._local_disk(side, "none").parent.mkdir(exist_ok=True)
        with self._connection(side) as connection:
            if _LAN not in connection.listNetworks():
                connection.networkCreateXML(
                    f"<network><name>{_LAN}</name><forward mode='bridge'/><bridge name='{GUEST_BRIDGE}'/></network>"
                )
            if _POOL not in connection.listStoragePools():
                connection.storagePoolCreateXML(
                    f"<pool type='dir'><name>{_POOL}</name><target><path>{_LOCAL}</path></target></pool>"
                )

    def blank_xml(self, name: str, uuid: str) -> str:
        return _domain_xml(name, uuid, memory_mib=16)

    def busy_xml(self, name: str, uuid: str) -> str:
        return self._tiny_xml(name, uuid, Behaviour(fill_mib=BUSY_MIB, dirty_mib_s=1))

    def restless_xml(self, name: str, uuid: str) -> str:
        return self._tiny_xml(name, uuid, Behaviour(fill_mib=BUSY_MIB, dirty_mib_s=RESTLESS_MIB_S))

    def poweroff_xml(self, name: str, uuid: str) -> str:
        return self._tiny_xml(name, uuid, Behaviour(poweroff_after_s=1))

    def panic_xml(self, name: str, uuid: str) -> str:
        xml = self._tiny_xml(name, uuid, Behaviour(poweroff_after_s=1, panics=True))
        xml = _with_devices(xml, "<panic model='isa'/>")
        return xml.replace("<devices>", "<on_crash>preserve</on_crash><devices>", 1)

    def obedient_xml(self, name: str, uuid: str) -> str:
        return self._tiny_xml(name, uuid, Behaviour(heeds_button=True))

    def rebooting_xml(self, name: str, uuid: str) -> str:
        return self._tiny_xml(name, uuid, Behaviour(reboot_after_s=1))

    def agent_xml(self, name: str, uuid: str) -> str:
        return _with_devices(
            self.blank_xml(name, uuid),
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
        )

    def secret_xml(self, name: str, uuid: str) -> str:
        socket = "<listen type='socket'/>"
        return _with_devices(
            self.blank_xml(name, uuid), f"<graphics type='vnc' passwd='{CONSOLE_PASSWORD}'>{socket}</graphics>"
        )

    def equipped_xml(self, name: str, uuid: str) -> str:
        disk, cdrom = (self._kernels / f"equipped.{suffix}" for suffix in ("raw", "iso"))
        for image in (disk, cdrom):
            image.write_bytes(bytes(2**20))
        return _with_devices(
            self.blank_xml(name, uuid),
            _disk("vda", disk),
            f"<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{cdrom}'/>"
            "<target dev='hda' bus='ide'/><readonly/></disk>",
            f"<interface type='bridge'><source bridge='{GUEST_BRIDGE}'/><model type='virtio'/><rom enabled='no'/>"
            "</interface>",
            f"<interface type='network'><source network='{_LAN}'/><model type='virtio'/><rom enabled='no'/>"
            "</interface>",
        )

    def unfit_xml(self, name: str, uuid: str, lack: Lack) -> str:
        xml = self.equipped_xml(name, uuid)
        change = _UNFIT[lack]
        return _with_devices(xml, change) if isinstance(change, str) else xml.replace(*change)

    def local_disk_xml(self, name: str, uuid: str) -> str:
        self._local_disk("source", uuid).write_bytes(_local_content(uuid))
        return _with_devices(self.blank_xml(name, uuid), _disk("vda", _LOCAL / f"{uuid}.raw"))

    def has_local_disk(self, side: Side, uuid: str) -> bool:
        disk = self._local_disk(side, uuid)
        return disk.exists() and disk.read_bytes() == _local_content(uuid)

    def _local_disk(self, side: Side, uuid: str) -> Path:
        return self._hosts[side].directory / _LOCAL.relative_to("/") / f"{uuid}.raw"

    def refused_xml(self, name: str, uuid: str) -> str:
        return self.blank_xml(name, uuid).replace("machine='pc'", "machine='no-such-machine'")

    def _tiny_xml(self, name: str, uuid: str, behaviour: Behaviour) -> str:
        kernel = write_kernel(behaviour, self._kernels)
        return _domain_xml(name, uuid, memory_mib=behaviour.fill_mib + 16, kernel=kernel)

    def start_persistent(self, side: Side, domain_xml: str, marker: Marker | None) -> None:
        with self._connection(side) as connection:
            domain = connection.defineXML(domain_xml if marker is None else with_marker(domain_xml, marker)[0])
            domain.setAutostart(1)
            domain.create()

    def add_snapshot(self, side: Side, uuid: str) -> None:
        with self._connection(side) as connection:
            handle = connection.lookupByUUIDString(uuid)
            was = handle.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
            handle.snapshotCreateXML(  # as a backup restores one: there is no disk to take one of
                "<domainsnapshot><name>before-the-upgrade</name><state>shutoff</state>"
                f"<creationTime>1700000000</creationTime>{was}</domainsnapshot>",
                libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE,
            )

    def pause(self, side: Side, uuid: str) -> None:
        with self._connection(side) as connection:
            connection.lookupByUUIDString(uuid).suspend()

    def kill_daemon(self, side: Side) -> None:
        self._hosts[side].kill_libvirtd()

    def start_daemon(self, side: Side) -> None:
        self._hosts[side].start_libvirtd()

    def kill_machine(self, side: Side, uuid: str) -> None:
        self._hosts[side].kill_qemu(uuid)

    def terminate_machine(self, side: Side, uuid: str) -> None:
        self._hosts[side].kill_qemu(uuid, signal.SIGTERM)

    def freeze_machine(self, side: Side, uuid: str) -> None:
        self._hosts[side].kill_qemu(uuid, signal.SIGSTOP)

    def thaw_machine(self, side: Side, uuid: str) -> None:
        self._hosts[side].kill_qemu(uuid, signal.SIGCONT)

    def freeze_daemon(self, side: Side) -> None:
        """Stop the daemon, so that it accepts connections and answers nothing."""
        self._hosts[side].kill_libvirtd(signal.SIGSTOP)

    def thaw_daemon(self, side: Side) -> None:
        """Undo `freeze_daemon`."""
        self._hosts[side].kill_libvirtd(signal.SIGCONT)

    def set_metadata(self, side: Side, uuid: str, element: str, namespace: str) -> None:
        """Write into a machine's live metadata, as a person may."""
        kind, live = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE
        with self._connection(side) as connection:
            connection.lookupByUUIDString(uuid).setMetadata(kind, element, "person", namespace, live)

    def local_kernel(self, side: Side) -> Path:
        """Write a kernel that only this side has."""
        written = write_kernel(Behaviour(), self._local_disk(side, "none").parent)
        return _LOCAL / written.name

    @contextmanager
    def without_pool(self, side: Side) -> Iterator[None]:
        """The side without the storage pool of the folder that it has for itself."""
        with self._connection(side) as connection:
            connection.storagePoolLookupByName(_POOL).destroy()
            try:
                yield
            finally:
                self._ensure_network_and_pool(side)

    def look_from_source(self, uri: str) -> str:
        """Look at another host from the source, as its agent does: give the guests seen, or why none."""
        return self._hosts["source"].run([sys.executable, "-c", _LOOK, uri], timeout=60).stdout.strip()

    def uri(self, side: Side) -> str:
        """The URI for a driver of the test's own."""
        return self._hosts[side].libvirt_uri

    def definitions(self, side: Side) -> list[str]:
        """Names of the files that would bring a machine back after a reboot."""
        folder = self._hosts[side].directory / "etc/libvirt/qemu"
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.xml"))

    def clear(self) -> None:
        """End the test's drivers and machines, whatever state it left things in."""
        self.source.close()
        self.target.close()
        for host in self._hosts.values():
            for pid, line in host.processes().items():
                if "qemu-system" in line:
                    _signal(pid, signal.SIGCONT)
                    _signal(pid, signal.SIGKILL)  # libvirt's own way takes 1.4 s each
            if host.libvirtd is not None and host.libvirtd.poll() is None:
                host.kill_libvirtd(signal.SIGCONT)
            else:
                host.start_libvirtd()
        for side in self._hosts:
            with self._connection(side) as connection:
                wait_until(partial(_is_cleared, connection), 40, f"an empty {side}")

    @contextmanager
    def _connection(self, side: Side) -> Iterator[Any]:
        connection = self._hosts[side].connect()
        try:
            yield connection
        finally:
            connection.close()


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _is_cleared(connection: Any) -> bool:
    domains = connection.listAllDomains()
    for domain in domains:
        with contextlib.suppress(libvirt.libvirtError):
            if domain.isPersistent():
                domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
    return not domains


def _with_devices(domain_xml: str, *devices: str) -> str:
    return domain_xml.replace("</devices>", "".join(devices) + "</devices>")


def _disk(target: str, image: Path) -> str:
    return (
        "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>"
        f"<source file='{image}'/><target dev='{target}' bus='virtio'/></disk>"
    )


def _local_content(uuid: str) -> bytes:
    return uuid.encode().ljust(4096, b".") * (LOCAL_DISK_MIB * 256)


def _domain_xml(name: str, uuid: str, *, memory_mib: int, kernel: Path | None = None) -> str:
    boot = "" if kernel is None else f"<kernel>{escape(str(kernel))}</kernel>"
    return f"""\
<domain type='qemu'>
  <name>{escape(name)}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>{boot}</os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
  <devices>
    <emulator>{escape(str(emulator()))}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""
