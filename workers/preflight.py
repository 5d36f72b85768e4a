"""What a machine needs of a host to which it migrates, and whether this host has it.

The needs are told with the inventory, once for each machine and again when they change; the question whether a machine
can arrive here comes as an order. Where libvirt's own view is not enough, this looks at the host itself: whether an
image lies on storage that other hosts share, and whether a copy would overwrite one that is nobody's copy.
"""

import hashlib
import json
import threading
import xml.etree.ElementTree as ET  # what is parsed comes from libvirtd, or from the control plane
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import HypervisorError
from orchestrator.logs import logger
from orchestrator.resources import Order
from orchestrator.resources.needs import DISK_PROBLEM, LONGEST_LINE, MOST_LINES
from workers.hypervisor.domain_needs import needs_of
from workers.hypervisor.port import Domain, DomainState, Hypervisor

log = logger(__name__)

SHARED_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "ceph", "cifs", "smb3", "smbfs", "afs", "gfs", "gfs2", "ocfs2", "gpfs", "acfs"}
    | {"fuse.glusterfs", "fuse.quobyte"}
)
"""Those that libvirt knows as shared (virFileIsSharedFS): of others it refuses to migrate a disk."""

_HEADER = 32
_KEPT = ("emulator", "disk", "interface", "hostdev", "filesystem", "tpm")
_ALWAYS_THERE = ("emulator",)
_BOOT = ("type", "loader", "kernel", "initrd", "dtb")
_OF_THIS_HOST = frozenset({"alias", "address", "seclabel", "privateData", "mirror", "mac", "boot", "virtualport"})
"""Children of devices that say nothing of what another host needs, or differ from host to host."""
_OF_THIS_RUN = frozenset({"index", "portid"})


class Storage(Protocol):
    """What is asked of a host's file systems."""

    def is_shared(self, path: str) -> bool:
        """Whether other hosts see the same file."""
        ...

    def size_mib(self, path: str) -> int:
        """Give the size of an image as a guest sees it, rounded up; 0 if that can't be told."""
        ...

    def note_disk(self, uuid: str, path: str) -> None:
        """Remember that an image is, or was, a disk of a machine on this host."""
        ...

    def copy_problem(self, uuid: str, path: str) -> str:
        """Say why a machine's disk can't be copied to that path; empty when it can."""
        ...


class SharedStorage:
    """Every image is seen by every host."""

    def is_shared(self, path: str) -> bool:
        """It is."""
        del path
        return True

    def size_mib(self, path: str) -> int:
        """Not looked at: nothing is copied."""
        del path
        return 0

    def note_disk(self, uuid: str, path: str) -> None:
        """There is nothing to remember."""

    def copy_problem(self, uuid: str, path: str) -> str:
        """Nothing is copied."""
        del uuid
        return f"{path} is on storage that all hosts share"


class HostStorage:
    """This host's file systems, as its mounts tell.

    A migration that copies a disk writes over whatever lies at the disk's path. So a file there is let be overwritten
    only if it is known to be that machine's own, left behind when it was copied away, or by a copy that failed. After a
    reboot nothing is known: then a person decides.

    Args:
        record: A file in which to remember, on a file system that a reboot empties.
        mounts: Linux's list of mounts.
    """

    def __init__(self, record: Path, mounts: Path = Path("/proc/self/mountinfo")) -> None:
        self._record = record
        self._mounts = mounts
        self._lock = threading.Lock()

    def is_shared(self, path: str) -> bool:
        """Whether its file system is one that libvirt knows as shared; a file that is not there is not."""
        return file_system(str(Path(path).resolve()), self._mounts.read_text()) in SHARED_FILE_SYSTEMS

    def size_mib(self, path: str) -> int:
        """Give the size of an image as a guest sees it, rounded up; 0 if that can't be told."""
        try:
            with Path(path).open("rb") as image:
                return -(-virtual_bytes(image.read(_HEADER), Path(path).stat().st_size) // 2**20)
        except OSError as error:
            log.warning("image not looked at", path=path, error=str(error))
            return 0

    def note_disk(self, uuid: str, path: str) -> None:
        """Remember that an image is, or was, a disk of a machine on this host."""
        with self._lock:
            known = self._read()
            if known.get(path) == uuid:
                return
            self._record.parent.mkdir(parents=True, exist_ok=True)
            new = self._record.with_suffix(".new")
            new.write_text(json.dumps({**known, path: uuid}))
            new.replace(self._record)

    def copy_problem(self, uuid: str, path: str) -> str:
        """Say why a machine's disk can't be copied to that path; empty when it can."""
        try:
            Path(path).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            return f"{path} can't be looked at: {error.strerror}"
        with self._lock:
            owner = self._read().get(path)
        if owner == uuid:
            return ""
        return f"{path} is here already, and would be overwritten: move it away if it is not needed"

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self._record.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:  # cut off by a crash of the host: nothing is known
            return {}
        return found if isinstance(found, dict) else {}


def virtual_bytes(header: bytes, file_bytes: int) -> int:
    """Read the size of an image's disk from its first bytes: of a qcow2 image what it says, of others their own."""
    if header[:4] == b"QFI\xfb" and len(header) >= _HEADER:
        return int.from_bytes(header[24:32], "big")  # QEMU's docs/interop/qcow2.txt
    return file_bytes


def file_system(path: str, mounts: str) -> str:
    """Name the type of the file system on which a path lies.

    Args:
        path: Absolute, without symbolic links.
        mounts: As in `/proc/self/mountinfo`.
    """
    best, found = "", ""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        place = _unescaped(fields.split()[4])
        inside = path == place or path.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= len(best):  # of two at the same place, the later one hides the other
            best, found = place, rest.split()[0]
    return found


def _unescaped(text: str) -> str:
    """Read the octal escapes of spaces and the like."""
    for character in " \t\n\\":
        text = text.replace(f"\\{ord(character):03o}", character)
    return text


class Needs:
    """Tells what the machines of this host need of another.

    Args:
        hypervisor: This node's.
        storage: This host's.
    """

    def __init__(self, hypervisor: Hypervisor, storage: Storage) -> None:
        self._hypervisor = hypervisor
        self._storage = storage
        self._told: dict[str, tuple[int, str]] = {}

    def forget(self) -> None:
        """Tell everything again."""
        self._told.clear()

    def news(self, domain: Domain, *, is_new: bool) -> dict[str, Any] | None:
        """Give what a domain needs, if it was not told before.

        Args:
            domain: As just read.
            is_new: It did not run here when it was last reported: whatever was told of it is told again.
        """
        is_incoming = domain.state is DomainState.INCOMING
        is_at_rest = domain.state is DomainState.RUNNING and not domain.has_job
        if domain.marker is None or not (is_incoming or is_at_rest):
            return None
        try:
            needs = self.read(domain)  # of one that comes in, its disks are noted: a copy that fails leaves its image
        except HypervisorError as error:
            log.warning("needs not read", uuid=domain.uuid, error=str(error))
            return None
        if needs is None or is_incoming:
            return None
        mark = (needs["incarnation"], needs["fingerprint"])
        if self._told.get(domain.uuid) == mark and not is_new:
            return None
        self._told[domain.uuid] = mark
        return needs

    def read(self, domain: Domain) -> dict[str, Any] | None:
        """Give what a domain needs, as the control plane's `MachineNeeds` takes it; None when it does not run here.

        Raises:
            HypervisorError: It can't be read.
        """
        definition = self._hypervisor.definition(domain.uuid)
        if definition is None or not definition.live_xml:
            return None
        root = ET.fromstring(definition.live_xml)  # noqa: S314  libvirtd wrote it
        paths = {target: path for target, path in _own_disks(root) if not self._storage.is_shared(path)}
        for path in paths.values():
            self._storage.note_disk(domain.uuid, path)
        machine = _needed_parts(root)
        kept = [device.tag for device in machine.iterfind("devices/*")]
        needs: dict[str, Any] = {
            "machine": ET.tostring(machine, encoding="unicode"),
            "plain": all(tag in _ALWAYS_THERE for tag in kept) and len(machine.findall("os/*")) <= 1,
            "localDisks": [
                {"target": target, "path": path, "sizeMib": self._storage.size_mib(path)}
                for target, path in paths.items()
            ],
            "obstacles": [text[:LONGEST_LINE] for text in needs_of(definition.live_xml).problems[:MOST_LINES]],
        }
        text = json.dumps(needs, sort_keys=True)
        needs["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()[:16]
        needs["incarnation"] = domain.marker.incarnation if domain.marker else 0
        return needs


def describe(hypervisor: Hypervisor, needs: Needs, order: Order) -> dict[str, Any]:
    """Answer what a machine needs.

    Raises:
        HypervisorError: It can't be told now; the order stays.
    """
    domain = hypervisor.domain(order.uuid)
    return {"order": order.id, "needs": None if domain is None else needs.read(domain)}


def check(hypervisor: Hypervisor, storage: Storage, order: Order) -> list[str]:
    """Say why a machine could not arrive here, one problem an entry.

    Raises:
        HypervisorUnavailable: It can't be told now; the order stays.
    """
    problems = hypervisor.preflight(order.machine, order.copied_disks)
    root = ET.fromstring(order.machine)  # noqa: S314  the driver has parsed it before
    for target, path in _own_disks(root):
        if target in order.copied_disks and (why := storage.copy_problem(order.uuid, path)):
            problems.append(f"{DISK_PROBLEM}{target}: {why}")
    return [text[:LONGEST_LINE] for text in problems[:MOST_LINES]]


def _own_disks(root: ET.Element) -> Iterator[tuple[str, str]]:
    """Give target and path of the disks that a guest writes to a file of; others libvirt takes for shared."""
    for disk in root.iterfind("devices/disk"):
        source, target = disk.find("source"), disk.find("target")
        path = source.get("file", "") if source is not None else ""
        if disk.get("type") == "file" and path and target is not None and disk.find("readonly") is None:
            yield target.get("dev", ""), path


def _needed_parts(root: ET.Element) -> ET.Element:
    """Give a domain's XML with nothing but what another host may lack."""
    machine = ET.Element("domain", {"type": root.get("type", "")})
    for tag in ("name", "uuid"):
        ET.SubElement(machine, tag).text = root.findtext(tag, "")
    boot = ET.SubElement(machine, "os")
    for tag in _BOOT:
        for element in root.iterfind(f"os/{tag}"):
            boot.append(_bare(element))
    for cpu in root.iterfind("cpu"):
        machine.append(_bare(cpu))
    devices = ET.SubElement(machine, "devices")
    for device in root.iterfind("devices/*"):
        if device.tag in _KEPT:
            devices.append(_bare(device))
    return machine


def _bare(element: ET.Element) -> ET.Element:
    """Copy an element without what belongs to this host, or to this run."""
    bare = ET.Element(element.tag, {name: value for name, value in element.attrib.items() if name not in _OF_THIS_RUN})
    bare.text = element.text if element.text and element.text.strip() else None
    for child in element:
        is_tap = element.tag == "interface" and child.tag == "target"
        is_device = element.tag == "source" and child.tag == "address"  # of a host device; not where it is plugged in
        if is_device or not (is_tap or child.tag in _OF_THIS_HOST):
            bare.append(_bare(child))
    return bare
