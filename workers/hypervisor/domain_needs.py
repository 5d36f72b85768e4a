"""What a machine needs of the host on which it is to run, as its domain XML tells.

Pure: what a host has of it, a driver finds out. Only what stops a live migration counts: an NVRAM's file is made from
its template on the target, a console's log is made anew, and a CD that may be missing may be missing.
"""

import xml.etree.ElementTree as ET  # what is parsed comes from libvirtd, or from an administrator's VirtualMachine
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from orchestrator.errors import HypervisorError

_MAY_BE_MISSING: Final = ("optional", "requisite")
"""Values of `startupPolicy` with which libvirt drops a source that the target has not."""


@dataclass(frozen=True, slots=True)
class FileNeed:
    """A file or block device that has to be there.

    Attributes:
        what: What it is to the machine: `disk vda`.
        path: Absolute.
        is_block: Whether it has to be a block device.
        is_copied: Whether it is the place to which a disk is copied: the hypervisor makes an image that is missing, if
            it manages the folder (libvirt: as a storage pool).
    """

    what: str
    path: str
    is_block: bool = False
    is_copied: bool = False


@dataclass(frozen=True, slots=True)
class VolumeNeed:
    """A volume of a storage pool that has to be there and active.

    Attributes:
        what: What it is to the machine: `disk vda`.
        pool: The pool's name.
        volume: The volume's name.
        is_copied: Whether a disk is copied there: the hypervisor makes a volume that is missing.
    """

    what: str
    pool: str
    volume: str
    is_copied: bool = False


@dataclass(frozen=True, slots=True)
class Needs:
    """All that a machine needs of a host.

    Attributes:
        name: The domain's.
        uuid: The domain's, lower-case.
        virt_type: `kvm` or `qemu`.
        arch: `x86_64`; empty for the host's own.
        machine: The machine type, `pc-q35-7.2`; empty for the emulator's default.
        emulator: Its path; empty for the host's own.
        cpu_mode: `custom`, `host-passthrough`, `maximum`, `host-model`; empty if it names no CPU.
        cpu_model: For `custom`.
        cpu_xml: The `<cpu>` element; empty if it names no CPU.
        files: In the XML's order.
        volumes: In the XML's order.
        bridges: Sorted.
        parents: Network devices under its macvtap interfaces, sorted.
        networks: libvirt's networks; sorted.
        has_emulated_tpm: Whether it has a TPM that the host emulates.
        problems: What keeps it where it is, on whichever host it is to run: host devices and the like.
    """

    name: str
    uuid: str
    virt_type: str
    arch: str
    machine: str
    emulator: str
    cpu_mode: str
    cpu_model: str
    cpu_xml: str
    files: tuple[FileNeed, ...]
    volumes: tuple[VolumeNeed, ...]
    bridges: tuple[str, ...]
    parents: tuple[str, ...]
    networks: tuple[str, ...]
    has_emulated_tpm: bool
    problems: tuple[str, ...]


def needs_of(domain_xml: str, copied_disks: tuple[str, ...] = ()) -> Needs:
    """Read what a machine needs.

    Args:
        domain_xml: A domain's live XML.
        copied_disks: Target names of disks that are copied with it. Their images need not be there, nor those below
            them (backing files), as what arrives is flat.

    Raises:
        HypervisorError: The XML is broken, or is no domain.
    """
    try:
        root = ET.fromstring(domain_xml)  # noqa: S314  see the import
    except ET.ParseError as error:
        raise HypervisorError(f"the domain XML is broken: {error}") from error
    if root.tag != "domain":
        raise HypervisorError(f"the domain XML is no <domain> but a <{root.tag}>")
    os_type, cpu = root.find("os/type"), root.find("cpu")
    interfaces, images = root.findall("devices/interface"), list(_images(root, copied_disks))
    return Needs(
        name=root.findtext("name", ""),
        uuid=root.findtext("uuid", "").lower(),
        virt_type=root.get("type", ""),
        arch="" if os_type is None else os_type.get("arch", ""),
        machine="" if os_type is None else os_type.get("machine", ""),
        emulator=root.findtext("devices/emulator", ""),
        cpu_mode="" if cpu is None else cpu.get("mode", "custom"),
        cpu_model="" if cpu is None else cpu.findtext("model", ""),
        cpu_xml="" if cpu is None else ET.tostring(cpu, encoding="unicode"),
        files=(*_boot_files(root), *_files(images)),
        volumes=tuple(_volumes(images)),
        bridges=tuple(sorted(_sources(interfaces, "bridge", "bridge"))),
        parents=tuple(sorted(_sources(interfaces, "direct", "dev"))),
        networks=tuple(sorted({_network_of(interface) for interface in interfaces} - {""})),
        has_emulated_tpm=root.find("devices/tpm/backend[@type='emulator']") is not None,
        problems=(*_unknown_disks(root, copied_disks), *_own_problems(root)),
    )


def _boot_files(root: ET.Element) -> Iterator[FileNeed]:
    # QEMU loads them anew when it is started on the target, though the guest has long done with them.
    for tag in ("kernel", "initrd", "dtb", "loader"):
        path = root.findtext(f"os/{tag}", "").strip()
        if path:
            yield FileNeed({"loader": "firmware"}.get(tag, tag), path)


@dataclass(frozen=True, slots=True)
class _Image:
    """One image of a disk that must be there."""

    what: str
    kind: str
    source: ET.Element
    is_copied: bool


def _images(root: ET.Element, copied_disks: tuple[str, ...]) -> Iterator[_Image]:
    """Give the images of all disks, backing files included."""
    for disk in root.iterfind("devices/disk"):
        device, name = disk.get("device", "disk"), _target(disk)
        what = f"{'CD-ROM' if device == 'cdrom' else device} {name}"
        is_copied = name in copied_disks
        source = disk.find("source")
        if source is not None and source.get("startupPolicy") not in _MAY_BE_MISSING:
            yield _Image(what, disk.get("type", "file"), source, is_copied)
        below = None if is_copied else disk.find("backingStore")
        while below is not None:
            source = below.find("source")
            if source is not None:
                yield _Image(f"{what} (backing file)", below.get("type", "file"), source, is_copied)
            below = below.find("backingStore")


def _target(device: ET.Element) -> str:
    target = device.find("target")
    return "" if target is None else target.get("dev") or target.get("dir") or ""


def _files(images: list[_Image]) -> Iterator[FileNeed]:
    for image in images:
        attribute = {"file": "file", "block": "dev", "dir": "dir"}.get(image.kind, "")
        path = image.source.get(attribute)
        if path:
            yield FileNeed(image.what, path, is_block=image.kind == "block", is_copied=image.is_copied)


def _volumes(images: list[_Image]) -> Iterator[VolumeNeed]:
    for image in images:
        if image.kind == "volume":
            source = image.source
            yield VolumeNeed(image.what, source.get("pool", ""), source.get("volume", ""), is_copied=image.is_copied)


def _network_of(interface: ET.Element) -> str:
    """Name libvirt's network of an interface; the live XML tells what the network made of it (a bridge) as its type."""
    source = interface.find("source")
    return "" if source is None else source.get("network", "")


def _sources(interfaces: list[ET.Element], kind: str, attribute: str) -> set[str]:
    own = (interface for interface in interfaces if interface.get("type") == kind and not _network_of(interface))
    sources = (interface.find("source") for interface in own)
    return {source.get(attribute, "") for source in sources if source is not None} - {""}


def _unknown_disks(root: ET.Element, copied_disks: tuple[str, ...]) -> Iterator[str]:
    disks = {_target(disk) for disk in root.iterfind("devices/disk")}
    for name in copied_disks:
        if name not in disks:
            yield f"disk {name} is to be copied, and there is none of that name"


def _own_problems(root: ET.Element) -> Iterator[str]:
    for device in root.iterfind("devices/hostdev"):
        yield f"host device {_device_name(device)}: it can't leave its host"
    for interface in root.iterfind("devices/interface"):
        if interface.get("type") in ("hostdev", "vdpa"):
            mac = interface.find("mac")
            name = "" if mac is None else f" {mac.get('address')}"
            yield f"interface{name} is a host device: it can't leave its host"
    for disk in root.iterfind("devices/disk"):
        if disk.get("type") == "nvme":
            yield f"disk {_target(disk)} is a host device: it can't leave its host"
    for share in root.iterfind("devices/filesystem"):
        yield f"file system {_target(share)} is shared with its host: it can't leave it"
    for tpm in root.iterfind("devices/tpm/backend"):
        if tpm.get("type") != "emulator":
            yield "TPM: it is its host's own, a host device, and can't leave it"
        elif tpm.get("persistent_state") != "yes":
            yield "TPM: persistent_state is not set, so what it holds would be lost with the next stop"


def _device_name(device: ET.Element) -> str:
    """Name a host device as people know it: `pci 0000:03:00.0`, `usb 046d:c52b`, `mdev c2177883-...`."""
    kind = device.get("type") or device.get("mode") or ""
    source = device.find("source")
    if source is None:
        return kind
    address, vendor, product = source.find("address"), source.find("vendor"), source.find("product")
    if vendor is not None and product is not None:
        return f"{kind} {_hex(vendor, 'id')}:{_hex(product, 'id')}"
    if address is None:
        return kind
    if kind == "pci":
        place = f"{_hex(address, 'domain'):0>4}:{_hex(address, 'bus'):0>2}:{_hex(address, 'slot'):0>2}"
        return f"pci {place}.{_hex(address, 'function')}"
    return f"{kind} {address.get('uuid') or ':'.join(address.attrib.values())}"


def _hex(element: ET.Element, name: str) -> str:
    return element.get(name, "0").removeprefix("0x")
