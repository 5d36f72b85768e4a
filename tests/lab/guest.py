"""A lab guest: what its domain looks like, and how it does, as seen over the network.

python -m tests.lab.guest build     build the guests' images (tests do it by themselves, once)
"""

import re
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from tests.lab.image import emulator, image
from tests.lab.namespaces import LabError, Namespace
from tests.lab.network import GUEST_BRIDGE
from tests.lab.watchdog_image import watchdog_image

# What a kernel prints when memory is no longer what it wrote. A stall alone is no fault: two cores emulate it all.
_TROUBLE = re.compile(r"Oops|BUG: (?!soft)|Kernel panic|general protection|segfault|Bad page|invalid opcode")


class GuestUnreachable(LabError):
    """The guest did not answer in time; that says nothing of whether it runs."""


@dataclass(frozen=True)
class GuestStatus:
    """What a guest says of itself.

    Attributes:
        ticks: Counted ten times a second (at most) since its kernel booted.
        uptime_s: Seconds since its kernel booted, by its own clock.
        boot_id: Random, new with each boot: while it stays the same, it is the same running machine.
        faults: Lines of its kernel log that show corruption.
        lost_writes: Times that a page did not hold what was written to it.
    """

    ticks: int
    uptime_s: float
    boot_id: str
    faults: int
    lost_writes: int


class Guest:
    """A machine that is described, not started: give `xml` to the product, or to libvirt's createXML.

    Attributes:
        name: The VM's name; its domain is called `namespace.name`.
        domain: The domain's name.
        uuid: The domain's UUID; the same for the same lab and name.
        address: Its IPv4 address, or "" for a machine without a network.
        memory_mib: Its memory.
        xml: Its domain's XML, for any host of the lab.
        console: The file with its serial console's output, whichever host it is on.
        disk: Its disk's file, or None.
    """

    def __init__(
        self,
        name: str,
        xml: str,
        *,
        domain: str,
        uuid: str,
        address: str,
        memory_mib: int,
        console: Path,
        disk: Path | None,
        control: Namespace,
    ) -> None:
        self.name = name
        self.xml = xml
        self.domain = domain
        self.uuid = uuid
        self.address = address
        self.memory_mib = memory_mib
        self.console = console
        self.disk = disk
        self._control = control

    def __repr__(self) -> str:
        return f"Guest({self.domain})"

    def http(self, path: str, *, timeout: float = 5.0) -> str:
        """Return what the guest serves at `path`: /ticks, /uptime, /boot_id, /health or /status.

        It is asked from the control plane.

        Raises:
            GuestUnreachable: No answer in `timeout` seconds.
        """
        try:
            return self._control.http_get(self.address, path, timeout=timeout)
        except OSError as error:
            raise GuestUnreachable(f"{self.domain} at {self.address}: {error}") from error

    def status(self, *, timeout: float = 5.0) -> GuestStatus:
        """Return how the guest is.

        Raises:
            GuestUnreachable: No answer in `timeout` seconds.
        """
        words = self.http("/status", timeout=timeout).split()
        if len(words) != 5:
            raise GuestUnreachable(f"{self.domain} is not up yet: {words}")
        return GuestStatus(int(words[0]), float(words[1]), words[2], int(words[3]), int(words[4]))

    def is_up(self, *, timeout: float = 1.0) -> bool:
        """Return whether the guest answers."""
        try:
            self.status(timeout=timeout)
        except GuestUnreachable:
            return False
        return True

    def wait_up(self, timeout: float = 60.0) -> GuestStatus:
        """Return the guest's status as soon as it has one.

        Raises:
            GuestUnreachable: It does not answer in `timeout` seconds; the message holds its console's last lines.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self.status(timeout=1.0)
            except GuestUnreachable as error:
                if time.monotonic() > deadline:
                    raise GuestUnreachable(f"{error}; console: {self.console_text()[-1000:]}") from error
            time.sleep(0.1)

    def wait_ticks(self, more: int, timeout: float = 30.0) -> GuestStatus:
        """Return the guest's status once it has ticked `more` times from now on.

        Raises:
            GuestUnreachable: It did not, in `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        first = self.wait_up(timeout).ticks
        while (status := self.wait_up(max(0.0, deadline - time.monotonic()))).ticks < first + more:
            if time.monotonic() > deadline:
                raise GuestUnreachable(f"{self.domain} ticks no more: {status}")
            time.sleep(0.05)
        return status

    def trouble(self) -> str:
        """Return what is wrong with the guest, or "" if it ticks and nothing shows corruption.

        Ask after each migration: QEMU reports success for a guest that it has broken.
        """
        try:
            status = self.wait_ticks(12, timeout=40.0)  # more than a second, the period of the guest's own checks
        except GuestUnreachable as error:
            return str(error)
        if status.faults or status.lost_writes:
            return f"{status}; console: {self.console_text()[-2000:]}"
        if found := _TROUBLE.search(self.console_text()):
            return f"console says {found[0]!r}: {self.console_text()[-2000:]}"
        return ""

    def healthy(self) -> bool:
        """Return whether `trouble` finds none."""
        return not self.trouble()

    def set_dirty_rate(self, mib_s: int) -> None:
        """Let the running guest dirty this much memory per second from now on (it stays so over migrations)."""
        self.http(f"/cgi-bin/dirty?{mib_s}")

    def press(self, button: str) -> None:
        """Make the guest do something to itself: "poweroff", "reboot" or "panic"; it may be gone before it answers."""
        if button not in ("poweroff", "reboot", "panic"):
            raise ValueError(f"no such button: {button}")
        try:
            self.http(f"/cgi-bin/{button}", timeout=2.0)
        except GuestUnreachable as error:
            # A refused connection is a guest that is not there; anything later may be one that did as it was told.
            if isinstance(error.__cause__, ConnectionRefusedError):
                raise

    def console_text(self) -> str:
        """Return what the guest's serial console has printed."""
        return self.console.read_text(errors="replace") if self.console.exists() else ""


@dataclass(frozen=True)
class GuestSpec:
    """What `describe` makes a domain of; see `Lab.guest` for the meaning of each."""

    name: str
    namespace: str
    address: str
    memory_mib: int
    vcpus: int = 1
    dirty_mib_s: int = 0
    working_set_mib: int = 32
    acpi: bool = False
    agent: str = ""
    boots: bool = True

    @property
    def domain(self) -> str:
        """The domain's name."""
        return f"{self.namespace}.{self.name}"


def describe(spec: GuestSpec, *, lab: str, directory: Path, control: Namespace, disk: Path | None = None) -> Guest:
    """Return the guest of a description.

    Args:
        spec: What it is like.
        lab: The lab's name.
        directory: The lab's folder.
        control: Whence it is watched.
        disk: An existing raw image, or None.
    """
    identity = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{spec.domain}.{lab}.lab.vmherd.example"))
    console = directory / "console" / f"{spec.domain}.log"
    return Guest(
        spec.name,
        _domain_xml(spec, identity, console=console, disk=disk),
        domain=spec.domain,
        uuid=identity,
        address=spec.address,
        memory_mib=spec.memory_mib,
        console=console,
        disk=disk,
        control=control,
    )


def _domain_xml(spec: GuestSpec, identity: str, *, console: Path, disk: Path | None) -> str:
    """Return the XML of a transient TCG domain.

    qemu64 is the one CPU that each host offers without KVM. `cache='none'` makes a disk safe to migrate. The network
    card has no boot ROM, which would cost a second of each boot.
    """
    boot, devices = "", ""
    if spec.boots:
        files = image()
        words = ["console=ttyS0", "quiet", "loglevel=4", f"lab.dirty={spec.dirty_mib_s}"]
        words += [f"lab.ws={spec.working_set_mib}", f"lab.acpi={int(spec.acpi)}"]
        words += [f"lab.ip={spec.address}/24"] if spec.address else []
        words += [f"lab.agent={spec.agent}"] if spec.agent else []
        boot = (
            f"<kernel>{escape(str(files.kernel))}</kernel><initrd>{escape(str(files.initrd))}</initrd>"
            f"<cmdline>{escape(' '.join(words))}</cmdline>"
        )
    if spec.address:
        last = [int(part) for part in spec.address.split(".")][1:]
        mac = "52:54:00:" + ":".join(f"{part:02x}" for part in last)
        devices += (
            f"<interface type='bridge'><source bridge='{GUEST_BRIDGE}'/><mac address='{mac}'/>"
            "<model type='virtio'/><rom enabled='no'/></interface>\n    "
        )
    if spec.agent:
        devices += "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\n    "
    if disk is not None:
        devices += (
            "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>"
            f"<source file={quoteattr(str(disk))}/><target dev='vda' bus='virtio'/></disk>\n    "
        )
    return f"""\
<domain type='qemu'>
  <name>{spec.domain}</name>
  <uuid>{identity}</uuid>
  <memory unit='MiB'>{spec.memory_mib}</memory>
  <vcpu>{spec.vcpus}</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>{boot}</os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{escape(str(emulator()))}</emulator>
    {devices}<serial type='file'><source path={quoteattr(str(console))} append='on'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""


def main() -> int:
    """Build the images, as the command line asks."""
    actions: dict[str, Callable[[], object]] = {"build": lambda: (image(), watchdog_image())}
    if len(sys.argv) != 2 or sys.argv[1] not in actions:
        print("usage: python -m tests.lab.guest build", file=sys.stderr)
        return 2
    try:
        print(actions[sys.argv[1]]())
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
