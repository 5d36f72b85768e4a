"""The pairs of hosts of the simulated driver: of a world that is a process of its own, and of one in this process.

Their time runs five times as fast as ours.
"""

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

from orchestrator.errors import HypervisorUnavailable
from tests.contract.hypervisor_hosts import BUSY_MIB, CONSOLE_PASSWORD, LOCAL_DISK_MIB, RESTLESS_MIB_S, Lack, Side
from tests.contract.shared_world import SharedWorld
from tests.requirements import need_program
from tests.waiting import wait_until
from workers.hypervisor.domain_xml import with_marker
from workers.hypervisor.port import Marker
from workers.hypervisor.simulated import SimulatedHypervisor
from workers.hypervisor.simulated_guest import Behaviour
from workers.hypervisor.simulated_socket import SocketLink
from workers.hypervisor.simulated_spec import HostSpec
from workers.hypervisor.simulated_world import World

REPOSITORY: Final = Path(__file__).parents[2]
SPEED_UP: Final = 5.0
_NAMES: Final[Mapping[Side, str]] = {"source": "h1", "target": "h2"}
_SHARED: Final = "/srv/shared"
_WORLD = f"""
import sys, time
from pathlib import Path
from tests.contract.simulated_hosts import SPECS
from workers.hypervisor.simulated_world import World
from workers.simulation import run
run(World(time.monotonic, {SPEED_UP}, SPECS), Path(sys.argv[1]))
"""
SPECS: Final = tuple(
    HostSpec(name, bridges=("brvm",), networks=("lan",), shared_paths=(f"{_SHARED}/",)) for name in _NAMES.values()
)
_IDLE: Final = Behaviour(dirty_mib_s=0, boot_s=0.1, ignores_shutdown=True, has_agent=False)
_UNFIT: Final[Mapping[Lack, str | tuple[str, str]]] = {
    "cpu": (">qemu64<", ">Nowhere-Server<"),
    "machine": ("machine='pc'", "machine='pc-nowhere'"),
    "disk": (f"{_SHARED}/equipped.raw", "/nowhere.raw"),
    "cdrom": (f"{_SHARED}/equipped.iso", "/nowhere.iso"),
    "bridge": ("bridge='brvm'", "bridge='nowhere'"),
    "network": ("network='lan'", "network='nowhere'"),
    "hostdev": (
        "<hostdev mode='subsystem' type='pci' managed='yes'><source>"
        "<address domain='0x0000' bus='0x03' slot='0x00' function='0x1'/></source></hostdev>"
    ),
    "tpm": "<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>",
}


class WorldProcess:
    """A world in a process of its own."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        setpriv = need_program("setpriv", "util-linux")
        self._process = subprocess.Popen(
            [setpriv, "--pdeathsig", "KILL", sys.executable, "-c", _WORLD, str(socket)], cwd=REPOSITORY
        )
        wait_until(self._answers, 20, "the world to answer")

    def _answers(self) -> bool:
        try:
            self.hypervisor("h1").host()
        except HypervisorUnavailable:
            return False
        return True

    def hypervisor(self, host: str) -> SimulatedHypervisor:
        """Make a driver to one host."""
        return SimulatedHypervisor(SocketLink(self.socket, host), host)

    def cause(self, fault: str, **arguments: Any) -> None:
        """Cause a fault: a method of `Faults`."""
        SocketLink(self.socket, "").request({"fault": fault, "arguments": arguments})

    def files(self, host: str) -> list[str]:
        """Name the files that a host has for itself."""
        looked = SocketLink(self.socket, "").request({"look": True})
        found: list[str] = looked["hosts"][host]["files"]
        return found

    def end(self) -> None:
        """End the process."""
        self._process.terminate()
        assert self._process.wait(10) == 0
        assert not self.socket.exists()


class WorldHere:
    """A world in this process."""

    def __init__(self) -> None:
        self._shared = SharedWorld(World(time.monotonic, SPEED_UP, SPECS))
        self.hypervisor = self._shared.hypervisor
        self.cause = self._shared.cause
        self.end = self._shared.close

    def files(self, host: str) -> list[str]:
        """Name the files that a host has for itself."""
        found: list[str] = self._shared.look(lambda world: sorted(world.host(host).files))
        return found


class SimulatedHostPair:
    """Two hosts of a world."""

    def __init__(self, world: WorldProcess | WorldHere) -> None:
        self._world = world
        self.source = world.hypervisor(_NAMES["source"])
        self.target = world.hypervisor(_NAMES["target"])
        self.target_uri = f"simulated://{_NAMES['target']}"
        self.away_uri = "simulated://nowhere"

    def blank_xml(self, name: str, uuid: str) -> str:
        return _domain_xml(name, uuid)

    def busy_xml(self, name: str, uuid: str) -> str:
        return _domain_xml(name, uuid, BUSY_MIB + 16, used_mib=BUSY_MIB, working_set_mib=BUSY_MIB, dirty_mib_s=1)

    def restless_xml(self, name: str, uuid: str) -> str:
        return _domain_xml(
            name, uuid, BUSY_MIB + 16, used_mib=BUSY_MIB, working_set_mib=BUSY_MIB, dirty_mib_s=RESTLESS_MIB_S
        )

    def poweroff_xml(self, name: str, uuid: str) -> str:
        return _domain_xml(name, uuid, poweroff_after_s=1)

    def panic_xml(self, name: str, uuid: str) -> str:
        xml = _domain_xml(name, uuid, crash_after_s=1)
        return xml.replace("<devices>", "<on_crash>preserve</on_crash><devices>", 1)

    def obedient_xml(self, name: str, uuid: str) -> str:
        return _domain_xml(name, uuid, boot_s=1, shutdown_s=0.1, ignores_shutdown=False)

    def rebooting_xml(self, name: str, uuid: str) -> str:
        return _domain_xml(name, uuid, reboot_after_s=1)

    def agent_xml(self, name: str, uuid: str) -> str:
        return _with_devices(
            self.blank_xml(name, uuid),
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
        )

    def secret_xml(self, name: str, uuid: str) -> str:
        return _with_devices(self.blank_xml(name, uuid), f"<graphics type='vnc' passwd='{CONSOLE_PASSWORD}'/>")

    def equipped_xml(self, name: str, uuid: str) -> str:
        return _with_devices(
            self.blank_xml(name, uuid),
            _disk("vda", f"{_SHARED}/equipped.raw"),
            f"<disk type='file' device='cdrom'><source file='{_SHARED}/equipped.iso'/><target dev='hda'/></disk>",
            "<interface type='bridge'><source bridge='brvm'/></interface>",
            "<interface type='network'><source network='lan'/></interface>",
        )

    def unfit_xml(self, name: str, uuid: str, lack: Lack) -> str:
        xml = self.equipped_xml(name, uuid)
        change = _UNFIT[lack]
        return _with_devices(xml, change) if isinstance(change, str) else xml.replace(*change)

    def local_disk_xml(self, name: str, uuid: str) -> str:
        self._world.cause("add_file", host=_NAMES["source"], path=_local(uuid))
        return _with_devices(_domain_xml(name, uuid, disk_mib=LOCAL_DISK_MIB), _disk("vda", _local(uuid)))

    def has_local_disk(self, side: Side, uuid: str) -> bool:
        return _local(uuid) in self._world.files(_NAMES[side])

    def refused_xml(self, name: str, uuid: str) -> str:
        return self.blank_xml(name, uuid).replace("machine='pc'", "machine='no-such-machine'")

    def start_persistent(self, side: Side, domain_xml: str, marker: Marker | None) -> None:
        xml = domain_xml if marker is None else with_marker(domain_xml, marker)[0]
        self._world.cause("start_persistent", host=_NAMES[side], domain_xml=xml)

    def add_snapshot(self, side: Side, uuid: str) -> None:
        self._cause("add_snapshot", side, uuid)

    def pause(self, side: Side, uuid: str) -> None:
        self._cause("pause", side, uuid)

    def kill_daemon(self, side: Side) -> None:
        self._world.cause("kill_daemon", host=_NAMES[side])

    def start_daemon(self, side: Side) -> None:
        self._world.cause("start_daemon", host=_NAMES[side])

    def kill_machine(self, side: Side, uuid: str) -> None:
        self._cause("kill", side, uuid)

    def terminate_machine(self, side: Side, uuid: str) -> None:
        self._cause("terminate", side, uuid)

    def freeze_machine(self, side: Side, uuid: str) -> None:
        self._cause("freeze", side, uuid)

    def thaw_machine(self, side: Side, uuid: str) -> None:
        self._cause("thaw", side, uuid)

    def _cause(self, fault: str, side: Side, uuid: str) -> None:
        self._world.cause(fault, vm=uuid, host=_NAMES[side])

    def clear(self) -> None:
        """End the test's drivers and machines."""
        self.source.close()
        self.target.close()
        for name in _NAMES.values():
            self._world.cause("reinstall", host=name)


def _local(uuid: str) -> str:
    return f"/var/local/{uuid}.raw"


def _with_devices(domain_xml: str, *devices: str) -> str:
    return domain_xml.replace("</devices>", "".join(devices) + "</devices>")


def _disk(target: str, path: str) -> str:
    return f"<disk type='file' device='disk'><source file='{path}'/><target dev='{target}' bus='virtio'/></disk>"


def _domain_xml(name: str, uuid: str, memory_mib: int = 16, **behaviour: Any) -> str:
    return f"""\
<domain type='qemu'>
  <name>{escape(name)}</name>
  <uuid>{uuid}</uuid>
  <metadata>{replace(_IDLE, **behaviour).element()}</metadata>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
  <devices></devices>
</domain>
"""
