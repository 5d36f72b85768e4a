"""A simulated machine as its domain XML describes it, and how the guest in it behaves.

The behaviour stands in the domain's metadata, in a namespace of its own, and goes along wherever the XML goes:

    <metadata>
      <simulated:guest xmlns:simulated="https://vmherd.dev/simulated/1" dirty-mib-s="120" ignores-shutdown="yes"/>
    </metadata>

Without the element it is a well-behaved guest that boots in two seconds.
"""

import uuid as uuids
import xml.etree.ElementTree as ET  # what is parsed comes from an administrator's VirtualMachine, or was written here
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final

from orchestrator.errors import HypervisorError
from workers.hypervisor.domain_xml import identity_of
from workers.hypervisor.simulated_precopy import Load

NAMESPACE: Final = "https://vmherd.dev/simulated/1"
_TAG: Final = f"{{{NAMESPACE}}}guest"
_AGENT: Final = "org.qemu.guest_agent.0"
_UNIT_KIB: Final = {"b": 1 / 1024, "bytes": 1 / 1024, "KB": 1000 / 1024, "k": 1, "KiB": 1, "MB": 1e6 / 1024, "M": 1024}
_UNIT_KIB_2: Final = {"MiB": 1024, "GB": 1e9 / 1024, "G": 1024**2, "GiB": 1024**2, "T": 1024**3, "TiB": 1024**3}


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a guest behaves. Each attribute is one of the XML element's, with dashes.

    Attributes:
        used_mib: Memory that is not zero; 0: all of it.
        working_set_mib: Memory that it goes on writing to; 0: an eighth of what it uses.
        dirty_mib_s: How much of that it rewrites a second.
        boot_s: Until it is up: then its agent answers, it has an address and hears the power button.
        ignores_shutdown: Whether it does nothing when asked to power off.
        shutdown_s: How long it takes to power off when asked to.
        poweroff_after_s: It powers itself off so long after each boot's begin; 0: never.
        reboot_after_s: It reboots itself so long after each boot's begin; 0: never.
        crash_after_s: It panics so long after each boot's begin; 0: never.
        has_agent: Whether an agent runs in it, for which the XML must have a channel.
        address: Its address; empty: one is made up if it has an interface.
        disk_mib: The size of each of its disks.
    """

    used_mib: float = 0
    working_set_mib: float = 0
    dirty_mib_s: float = 5
    boot_s: float = 2
    ignores_shutdown: bool = False
    shutdown_s: float = 1
    poweroff_after_s: float = 0
    reboot_after_s: float = 0
    crash_after_s: float = 0
    has_agent: bool = True
    address: str = ""
    disk_mib: float = 1024

    def element(self) -> str:
        """Write it as the XML element."""
        default = Behaviour()
        told = {
            field.name.replace("_", "-"): _written(getattr(self, field.name))
            for field in fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        }
        ET.register_namespace("simulated", NAMESPACE)
        return ET.tostring(ET.Element(_TAG, told), encoding="unicode")


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


@dataclass(frozen=True, slots=True)
class Description:
    """What a simulated host reads from a domain's XML.

    Attributes:
        uuid: Lower-case, with dashes.
        name: The domain's.
        memory_mib: All its memory.
        machine: Its machine type; empty for the default.
        behaviour: Of its guest.
        has_agent_channel: Whether an agent could be reached.
        has_interface: Whether it has a network interface.
        disks: Paths of its disks by target name.
        on_reboot: `restart` or `destroy`.
        on_crash: `destroy`, `restart` or `preserve`.
    """

    uuid: str
    name: str
    memory_mib: int
    machine: str
    behaviour: Behaviour
    has_agent_channel: bool
    has_interface: bool
    disks: dict[str, str]
    on_reboot: str
    on_crash: str

    @property
    def load(self) -> Load:
        """What its migration has to carry."""
        told = self.behaviour
        used = min(told.used_mib or self.memory_mib, self.memory_mib)
        return Load(used, min(told.working_set_mib or used / 8, used), told.dirty_mib_s)

    @property
    def address(self) -> str:
        """The guest's address once it is up; empty if it has no interface."""
        if not self.has_interface:
            return ""
        made_up = uuids.UUID(self.uuid).int
        return self.behaviour.address or f"10.{made_up % 254 + 1}.{made_up // 254 % 256}.{made_up // 65024 % 254 + 1}"


def describe(domain_xml: str) -> Description:
    """Read a domain's XML.

    Raises:
        HypervisorError: It is broken, or says something of the simulated guest that can't be.
    """
    uuid = identity_of(domain_xml)
    root = ET.fromstring(domain_xml)  # noqa: S314  see the import
    disks = {}
    for disk in root.iterfind("devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        if target is not None and source is not None and disk.get("device", "disk") == "disk":
            disks[target.get("dev", "")] = source.get("file") or source.get("dev") or ""
    os_type = root.find("os/type")
    return Description(
        uuid=uuid,
        name=root.findtext("name", "").strip(),
        memory_mib=max(1, _kib(root.find("memory"), uuid) // 1024),
        machine="" if os_type is None else os_type.get("machine", ""),
        behaviour=_behaviour(root.find(f"metadata/{_TAG}")),
        has_agent_channel=any(t.get("name") == _AGENT for t in root.iterfind("devices/channel/target")),
        has_interface=root.find("devices/interface") is not None,
        disks=disks,
        on_reboot=root.findtext("on_reboot", "restart"),
        on_crash=root.findtext("on_crash", "destroy"),
    )


def _kib(element: ET.Element | None, uuid: str) -> int:
    if element is None:
        raise HypervisorError(f"domain {uuid}: the domain XML has no <memory>")
    unit = (_UNIT_KIB | _UNIT_KIB_2).get(element.get("unit", "KiB"))
    text = (element.text or "").strip()
    if unit is None or not text.isdecimal():
        raise HypervisorError(
            f"domain {uuid}: the domain XML's <memory> is no amount: {text!r} {element.get('unit')!r}"
        )
    return int(int(text) * unit)


def normalised(domain_xml: str) -> str:
    """Write amounts of memory in KiB, as libvirt answers them."""
    root = ET.fromstring(domain_xml)  # noqa: S314  see the import
    uuid = root.findtext("uuid", "")
    for tag in ("memory", "currentMemory"):
        element = root.find(tag)
        if element is not None:
            element.text, element.attrib["unit"] = str(_kib(element, uuid)), "KiB"
    return ET.tostring(root, encoding="unicode")


def without_secrets(domain_xml: str) -> str:
    """Leave out the consoles' passwords, as libvirt does unless it is asked for them."""
    root = ET.fromstring(domain_xml)  # noqa: S314  see the import
    for graphics in root.iterfind("devices/graphics"):
        graphics.attrib.pop("passwd", None)
    return ET.tostring(root, encoding="unicode")


def _behaviour(element: ET.Element | None) -> Behaviour:
    if element is None:
        return Behaviour()
    known: dict[str, Any] = {field.name: field.default for field in fields(Behaviour)}
    told: dict[str, Any] = {}
    for attribute, text in element.attrib.items():
        name = attribute.replace("-", "_")
        if name not in known:
            raise HypervisorError(f"the simulated guest has no attribute {attribute!r}")
        told[name] = _read(attribute, text, known[name])
    return Behaviour(**told)


def _read(attribute: str, text: str, default: object) -> object:
    if isinstance(default, str):
        return text
    try:
        read: Callable[[str], object] = {"yes": True, "no": False}.__getitem__ if isinstance(default, bool) else _amount
        return read(text)
    except (KeyError, ValueError) as error:
        wanted = "yes or no" if isinstance(default, bool) else "a number from 0 on"
        raise HypervisorError(f"the simulated guest's {attribute} is {text!r}, and not {wanted}") from error


def _amount(text: str) -> float:
    amount = float(text)
    if not 0 <= amount < float("inf"):
        raise ValueError(text)
    return amount
