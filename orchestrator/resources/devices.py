"""A VM's disks and network interfaces, as its spec describes them."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from orchestrator.resources.meta import Model, is_stored, misplaced
from orchestrator.resources.names import Name, shown

_LONGEST_PATH = 1024
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_BRIDGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
_SERIAL = re.compile(r"[A-Za-z0-9_.+ -]{1,20}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _check_path(value: str) -> str:
    if not value.startswith("/") or not value.isprintable() or len(value) > _LONGEST_PATH:
        raise ValueError(f"{shown(value)} is not an absolute path of printable characters, at most {_LONGEST_PATH}")
    if ".." in value.split("/"):
        raise ValueError(f"{shown(value)} has '..' in it")
    return value


def _check_is_text(value: object) -> object:
    if isinstance(value, int):
        raise ValueError("is a number: put it in quotes, since YAML reads 52:54:00:12:34:56 as one")  # noqa: TRY004
    return value


def check_mac(value: str) -> str:
    """Accept a unicast MAC address; upper-case letters are made lower-case."""
    lower = value.lower()
    if not _MAC.fullmatch(lower) or int(lower[:2], 16) & 1 or lower == "00:00:00:00:00:00":
        raise ValueError(f"{shown(value)} is not a unicast MAC address such as 52:54:00:12:34:56")
    return lower


def _check_plain(value: str) -> str:
    if not value.isprintable() or value != value.strip() or not value:
        raise ValueError(f"{shown(value)} is empty, or has spaces around it or characters that can't be printed")
    return value


def _check_bridge(value: str) -> str:
    if not _BRIDGE.fullmatch(value):
        raise ValueError(f"{shown(value)} is not the name of a bridge: at most 15 letters, digits, '-', '_', '.'")
    return value


def _check_serial(value: str) -> str:
    if not _SERIAL.fullmatch(value):
        raise ValueError(
            f"{shown(value)} is not a serial number: at most 20 letters, digits, '-', '_', '.', '+', spaces"
        )
    return value


Path = Annotated[str, AfterValidator(_check_path)]
Mac = Annotated[str, BeforeValidator(_check_is_text), AfterValidator(check_mac)]
Plain = Annotated[str, Field(max_length=255), AfterValidator(_check_plain)]
Bridge = Annotated[str, AfterValidator(_check_bridge)]
Serial = Annotated[str, AfterValidator(_check_serial)]
BootOrder = Annotated[int, Field(ge=1, le=1000)]


class PathSource(Model):
    """An image file, or a block device, at the same path on every node that is to run the VM."""

    path: Path


class NetworkHost(Model):
    """A server of a network disk."""

    name: Plain
    port: int | None = Field(None, ge=1, le=65535)


class NetworkAuth(Model):
    """How QEMU shows who it is; the secret itself lies in libvirt on each node."""

    username: Plain
    secret_uuid: Annotated[str, Field(pattern=f"^{_UUID.pattern}$")]


class NetworkSource(Model):
    """A disk that QEMU reaches over the network by itself.

    Attributes:
        name: For rbd `pool/image`, for iscsi `iqn.../lun`, for nbd the export.
        hosts: Servers; rbd may leave them to the node's ceph.conf.
    """

    protocol: Literal["rbd", "iscsi", "nbd"]
    name: Plain
    hosts: tuple[NetworkHost, ...] = Field((), max_length=16)
    auth: NetworkAuth | None = None

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        if is_stored(info):
            return self
        if self.protocol != "rbd" and len(self.hosts) != 1:
            raise misplaced(("hosts", f"must be one host for {self.protocol}"))
        if self.protocol == "nbd" and self.auth is not None:
            raise misplaced(("auth", "nbd has none"))
        return self


class Disk(Model):
    """One disk.

    Attributes:
        name: Its name within the VM: what is recorded of it, and changes of it, go by this name.
        file: Where it is; one of `file`, `block` and `network`. A cdrom may have none.
        bus: By default virtio, or sata without paravirtualization and for cdroms (ide for osType Legacy).
        shared: Whether every node that may run the VM reaches it. What is not shared has to be copied by a migration,
            if the annotation `vmherd.dev/allow-storage-copy` lets it.
        boot_order: 1 is tried first.
        serial: As the guest sees it.
    """

    name: Name
    file: PathSource | None = None
    block: PathSource | None = None
    network: NetworkSource | None = None
    bus: Literal["virtio", "scsi", "sata", "ide"] | None = None
    format: Literal["raw", "qcow2"] = "raw"
    shared: bool = True
    read_only: bool = False
    cdrom: bool = False
    boot_order: BootOrder | None = None
    serial: Serial | None = None

    @property
    def source(self) -> PathSource | NetworkSource | None:
        """Where it is."""
        return self.file or self.block or self.network

    @property
    def is_copied(self) -> bool:
        """Whether a migration has to take its content along; what is only read must be on every node anyway."""
        return not self.shared and not self.cdrom and not self.read_only

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        if is_stored(info):
            return self
        given = [field for field in ("file", "block", "network") if getattr(self, field) is not None]
        if len(given) > 1:
            raise misplaced((given[1], f"conflicts with {given[0]}: a disk has one source"))
        if not given and not self.cdrom:
            raise misplaced(("file", "is required (or block, or network)"))
        if self.cdrom and self.bus == "virtio":
            raise misplaced(("bus", "a cdrom can't be virtio: sata, scsi or ide"))
        if self.cdrom and self.network is not None:
            raise misplaced(("network", "a cdrom is a file or a block device"))
        if self.format == "qcow2" and self.file is None and self.cdrom:
            raise misplaced(("format", "an empty cdrom has none"))
        return self


class Interface(Model):
    """One network card.

    Attributes:
        name: Its name within the VM: what is recorded of it, and changes of it, go by this name.
        bridge: A bridge of that name on every node; or `network`, one of libvirt's.
        model: By default virtio, or e1000e without paravirtualization.
        mac: By default one that follows from the VM's uid and the interface's name.
    """

    name: Name
    bridge: Bridge | None = None
    network: Plain | None = None
    model: Literal["virtio", "e1000e", "e1000", "rtl8139"] | None = None
    mac: Mac | None = None
    boot_order: BootOrder | None = None

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        if is_stored(info):
            return self
        if self.bridge is not None and self.network is not None:
            raise misplaced(("network", "conflicts with bridge: an interface is on one of both"))
        if self.bridge is None and self.network is None:
            raise misplaced(("bridge", "is required (or network)"))
        return self


def duplicates(disks: tuple[Disk, ...], interfaces: tuple[Interface, ...]) -> list[tuple[str, str]]:
    """Find what two devices of a VM can't both have: names, boot orders, MACs, serials. As paths and reasons."""
    found: list[tuple[str, str]] = []
    seen: dict[tuple[str, object], str] = {}
    rows = [
        (f"disks[{n}]", "disk", {"name": d.name, "bootOrder": d.boot_order, "serial": d.serial})
        for n, d in enumerate(disks)
    ]
    rows += [
        (f"interfaces[{n}]", "interface", {"name": i.name, "bootOrder": i.boot_order, "mac": i.mac})
        for n, i in enumerate(interfaces)
    ]
    for place, kind, values in rows:
        for field, value in values.items():
            if value is None:
                continue
            group = field if field == "bootOrder" else f"{kind}.{field}"
            first = seen.setdefault((group, value), place)
            if first != place:
                found.append((f"{place}.{field}", f"{value!r} is that of {first} too"))
    return found
