"""The pair of hosts of the libvirt driver: two of the lab's, with guests that need no operating system."""

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import libvirt

from tests.contract.hypervisor_hosts import BUSY_CAP_MIB_S, BUSY_MIB, Side
from tests.contract.tiny_guest import Behaviour, write_kernel
from tests.lab.host import LabHost
from tests.lab.image import emulator
from tests.lab.lab import Lab
from tests.waiting import wait_until
from workers.hypervisor.libvirt_driver import LibvirtHypervisor
from workers.hypervisor.libvirt_readings import with_marker
from workers.hypervisor.port import Marker


class LibvirtHostPair:
    """Two hosts of a lab."""

    def __init__(self, lab: Lab) -> None:
        self._hosts: dict[Side, LabHost] = {"source": lab.hosts[0], "target": lab.hosts[1]}
        self._kernels = lab.directory / "disks"
        self.source = LibvirtHypervisor(self._hosts["source"].libvirt_uri)
        self.target = LibvirtHypervisor(self._hosts["target"].libvirt_uri)
        self.target_uri = self._hosts["target"].migration_uri
        self.away_uri = f"qemu+tcp://{self._hosts['target'].address}:9/system"

    def blank_xml(self, name: str, uuid: str) -> str:
        return _domain_xml(name, uuid, memory_mib=16)

    def busy_xml(self, name: str, uuid: str) -> str:
        return self._tiny_xml(name, uuid, Behaviour(fill_mib=BUSY_MIB, dirty_mib_s=1))

    def restless_xml(self, name: str, uuid: str) -> str:
        return self._tiny_xml(name, uuid, Behaviour(fill_mib=BUSY_MIB, dirty_mib_s=3 * BUSY_CAP_MIB_S))

    def poweroff_xml(self, name: str, uuid: str) -> str:
        return self._tiny_xml(name, uuid, Behaviour(poweroff_after_s=1))

    def refused_xml(self, name: str, uuid: str) -> str:
        return self.blank_xml(name, uuid).replace("machine='pc'", "machine='no-such-machine'")

    def _tiny_xml(self, name: str, uuid: str, behaviour: Behaviour) -> str:
        kernel = write_kernel(behaviour, self._kernels)
        return _domain_xml(name, uuid, memory_mib=behaviour.fill_mib + 16, kernel=kernel)

    def start_persistent(self, side: Side, domain_xml: str, marker: Marker) -> None:
        with self._connection(side) as connection:
            domain = connection.defineXML(with_marker(domain_xml, marker)[0])
            domain.setAutostart(1)
            domain.create()

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
                domain.undefine()
    return not domains


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
