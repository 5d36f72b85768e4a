"""The machine that a VM was given at its start, so that each later start gives it the same one.

libvirt chooses what a domain's XML leaves open: PCI addresses, a versioned machine type, the features of the CPU. What
it chose is read from the live XML after a start and kept in the VM's status. The next start's XML is rendered from the
spec as before, and then what it leaves open is filled in from here: `with_machine`. A device that the spec has changed
or added gets what libvirt chooses; the others keep what they had.

A device is known again by its key: the alias that we gave it (`ua-...`, from its name in the spec), or what tells it
from others in a person's own XML. Everything is taken over as checked words and never as XML: a node wrote it.
"""

import hashlib
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Final

from pydantic import Field, StringConstraints, ValidationError

from orchestrator.errors import Invalid
from orchestrator.resources.cpu import CpuRequest, CpuWord
from orchestrator.resources.meta import Model

RENDERED: Final = "{https://vmherd.dev/rendered/1}rendered"
"""In a domain's metadata: what its CPU was made from (`cpu`). A start's XML carries it, and so the live XML does."""
ET.register_namespace("vmherd-rendered", RENDERED[1:].partition("}")[0])

_MOST_CHARACTERS = 1024 * 1024
_KEPT_CPU_PARTS: Final = ("topology", "numa", "cache", "maxphysaddr")
"""Parts of a CPU that follow from the spec and not from the host."""

Word = Annotated[str, StringConstraints(pattern=r"^[-A-Za-z0-9_.:]{0,64}$")]
Address = Annotated[dict[Word, Word], Field(max_length=12)]
DeviceKey = Annotated[str, StringConstraints(max_length=512)]
Index = Annotated[int, Field(ge=0, le=255)]


class DeviceRecord(Model):
    """What one device was given.

    Attributes:
        key: By which it is known again.
        kind: Its bus or model: with another one it is another device.
        address: Attributes of libvirt's `<address>`.
        target: A disk's name on the host's side (`vda`).
        mac: Of an interface.
    """

    key: DeviceKey
    kind: Word = ""
    address: Address = Field(default_factory=dict)
    target: Word = ""
    mac: Word = ""


class ControllerRecord(Model):
    """A controller, most of which libvirt adds by itself.

    Attributes:
        name: Of the device that is its model, for PCI.
        target: Attributes of libvirt's `<target>`: chassis, port and the like.
    """

    type: Word
    index: Index
    model: Word = ""
    name: Word = ""
    target: Address = Field(default_factory=dict)
    address: Address = Field(default_factory=dict)


class CpuFeature(Model):
    """One feature of a CPU, and what is made of it."""

    name: CpuWord
    policy: Annotated[str, StringConstraints(pattern="^(force|require|optional|disable|forbid)$")] = "require"


class MachineCpu(Model):
    """The CPU that the guest saw, by libvirt's words."""

    mode: Annotated[str, StringConstraints(pattern="^(custom|host-model|host-passthrough|maximum)$")] = "custom"
    match: Word = ""
    check: Word = ""
    migratable: Word = ""
    model: Annotated[str, StringConstraints(max_length=64)] = ""
    fallback: Word = ""
    vendor: Word = ""
    features: tuple[CpuFeature, ...] = Field((), max_length=1000)

    @property
    def request(self) -> CpuRequest:
        """What a host must have to give just this CPU."""
        if self.mode in {"host-passthrough", "maximum"}:
            return CpuRequest(mode="host-passthrough")
        return CpuRequest(
            mode="custom" if self.mode == "custom" else "host-model",
            model=self.model,
            vendor=self.vendor,
            features=frozenset(f.name for f in self.features if f.policy in {"require", "force"}),
            disabled=frozenset(f.name for f in self.features if f.policy in {"disable", "forbid"}),
        )


class Machine(Model):
    """What a VM was given at a start.

    Attributes:
        type: The versioned machine type: `pc-q35-7.2`.
        domain_type: `kvm` or `qemu`.
        cpu: None where the domain names no CPU.
        cpu_from: What the CPU was asked for as; while the spec asks for the same, the CPU stays.
    """

    type: Word = ""
    arch: Word = ""
    domain_type: Word = ""
    cpu: MachineCpu | None = None
    cpu_from: Annotated[str, StringConstraints(max_length=65_536)] = ""
    controllers: tuple[ControllerRecord, ...] = Field((), max_length=256)
    devices: tuple[DeviceRecord, ...] = Field((), max_length=512)

    def device(self, key: str) -> DeviceRecord | None:
        """Find what a device was given."""
        return next((device for device in self.devices if device.key == key), None)


def record_machine(live_xml: str) -> Machine:
    """Read what a domain was given from its live XML.

    Args:
        live_xml: As libvirt tells it of a running domain; with or without what only a running one has.

    Raises:
        Invalid: It is not such an XML. A node told it, so whoever takes its report has to expect that.
    """
    if len(live_xml) > _MOST_CHARACTERS or "<!" in live_xml:
        raise Invalid("the XML of a running domain is too long, or has a document type")
    try:
        root = ET.fromstring(live_xml)  # noqa: S314 - without a document type there are no entities
        os_type = root.find("os/type")
        rendered = root.find(f"metadata/{RENDERED}")
        return Machine(
            type="" if os_type is None else os_type.get("machine", ""),
            arch="" if os_type is None else os_type.get("arch", ""),
            domain_type=root.get("type", ""),
            cpu=_read_cpu(root.find("cpu")),
            cpu_from="" if rendered is None else rendered.get("cpu", ""),
            controllers=tuple(
                _read_controller(element)
                for element in root.iterfind("devices/controller")
                if element.find("master") is None  # a companion's place follows from its master's
            ),
            devices=tuple(record for key, element in keyed(root) if (record := _read_device(key, element)) is not None),
        )
    except ET.ParseError as error:
        raise Invalid(f"the XML of a running domain is broken: {error}") from error
    except (ValidationError, ValueError) as error:
        words = error.errors(include_url=False, include_input=False)[0] if isinstance(error, ValidationError) else error
        raise Invalid(f"the XML of a running domain has what no domain has: {words}") from error


def _read_cpu(element: ET.Element | None) -> MachineCpu | None:
    if element is None:
        return None
    model = element.find("model")
    return MachineCpu(
        mode=element.get("mode", "custom"),
        match=element.get("match", ""),
        check=element.get("check", ""),
        migratable=element.get("migratable", ""),
        model="" if model is None else model.text or "",
        fallback="" if model is None else model.get("fallback", ""),
        vendor=element.findtext("vendor", ""),
        features=tuple(
            CpuFeature(name=feature.get("name", ""), policy=feature.get("policy", "require"))
            for feature in element.iterfind("feature")
        ),
    )


def _read_controller(element: ET.Element) -> ControllerRecord:
    model, target = element.find("model"), element.find("target")
    return ControllerRecord(
        type=element.get("type", ""),
        index=int(element.get("index", "0")),
        model=element.get("model", ""),
        name="" if model is None else model.get("name", ""),
        target={} if target is None else dict(target.attrib),
        address=_address(element),
    )


def _read_device(key: str, element: ET.Element) -> DeviceRecord | None:
    mac, target = element.find("mac"), element.find("target")
    record = DeviceRecord(
        key=key,
        kind=_kind(element),
        address=_address(element),
        target=target.get("dev", "") if element.tag == "disk" and target is not None else "",
        mac=mac.get("address", "") if element.tag == "interface" and mac is not None else "",
    )
    return record if record.address or record.mac else None


def _address(element: ET.Element) -> dict[str, str]:
    found = element.find("address")
    return {} if found is None or found.get("type") in {None, "unassigned"} else dict(found.attrib)


def _kind(element: ET.Element) -> str:
    if element.tag == "disk":
        target = element.find("target")
        return "" if target is None else target.get("bus", "")
    return element.get("model", "") if element.tag == "memballoon" else ""


def keyed(root: ET.Element) -> Iterator[tuple[str, ET.Element]]:
    """Give each device but controllers with its key, which is the same in a rendered XML and in the live one."""
    met: Counter[str] = Counter()
    for element in root.iterfind("devices/*"):
        if element.tag in {"controller", "emulator"}:
            continue
        alias = element.find("alias")
        name = "" if alias is None else alias.get("name", "")
        if name.startswith("ua-"):
            yield name, element
            continue
        key = _natural_key(element)
        met[key] += 1
        yield (f"{key}#{met[key]}" if met[key] > 1 else key), element


def _natural_key(element: ET.Element) -> str:
    """What tells a device of a person's own XML from others of its sort; equal ones are told by their order."""
    target, source = element.find("target"), element.find("source")
    match element.tag:
        case "disk":
            return f"disk/{'' if target is None else target.get('dev', '')}"
        case "interface":
            names = [] if source is None else [source.get(name, "") for name in ("network", "bridge", "dev", "path")]
            return f"interface/{element.get('type', '')}/{next((name for name in names if name), '')}"
        case "channel":
            return f"channel/{'' if target is None else target.get('name', '') or target.get('type', '')}"
        case "filesystem":
            return f"filesystem/{'' if target is None else target.get('dir', '')}"
        case "hostdev":
            place = None if source is None else source.find("address")
            return "hostdev/" + ("" if place is None else ":".join(value for _, value in sorted(place.attrib.items())))
        case "input":
            return f"input/{element.get('type', '')}/{element.get('bus', '')}"
        case _:
            return element.tag


def requested_cpu(element: ET.Element | None) -> str:
    """Name the CPU of a person's own XML, so that it can be told whether it is still the same."""
    if element is None:
        return "template"
    parts = [ET.tostring(part, encoding="unicode").strip() for part in element if part.tag not in _KEPT_CPU_PARTS]
    text = "\n".join([*(f"{name}={value}" for name, value in sorted(element.attrib.items())), *parts])
    return f"template {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def family(machine_type: str) -> str:
    """Give the sort of a machine type, whatever its version: `pc-q35-7.2` is `q35`, `pc-i440fx-7.2` is `pc`."""
    if machine_type == "q35" or machine_type.startswith("pc-q35-"):
        return "q35"
    if machine_type == "pc" or machine_type.startswith("pc-i440fx-"):
        return "pc"
    return machine_type


def with_machine(root: ET.Element, machine: Machine, cpu_from: str) -> None:
    """Fill in what a rendered domain leaves open from what the VM was given before.

    Args:
        root: Rendered; changed in place. What it says by itself stays.
        machine: Of an earlier start.
        cpu_from: What the CPU is asked for as now.
    """
    os_type = root.find("os/type")
    wanted = "" if os_type is None else os_type.get("machine", "")
    is_same_family = family(wanted) in {"", family(machine.type)}
    if os_type is not None and wanted in {"", family(machine.type)} and machine.type:
        os_type.set("machine", machine.type)
    if machine.cpu is not None and machine.cpu_from and machine.cpu_from == cpu_from:
        _put_cpu(root, machine.cpu)
    for key, element in keyed(root):
        record = machine.device(key)
        if element.tag == "interface" and record is not None and record.mac and element.find("mac") is None:
            ET.SubElement(element, "mac", address=record.mac)
    if is_same_family:
        _put_addresses(root, machine)


def _put_cpu(root: ET.Element, cpu: MachineCpu) -> None:
    old = root.find("cpu")
    new = ET.Element("cpu", {"mode": cpu.mode})
    for name, value in (("match", cpu.match), ("check", cpu.check), ("migratable", cpu.migratable)):
        if value:
            new.set(name, value)
    if cpu.model:
        ET.SubElement(new, "model", {"fallback": cpu.fallback} if cpu.fallback else {}).text = cpu.model
    if cpu.vendor:
        ET.SubElement(new, "vendor").text = cpu.vendor
    new.extend([] if old is None else [part for part in old if part.tag in _KEPT_CPU_PARTS])
    for feature in cpu.features:
        ET.SubElement(new, "feature", policy=feature.policy, name=feature.name)
    position = len(root) if old is None else list(root).index(old)
    if old is not None:
        root.remove(old)
    root.insert(position, new)


def _put_addresses(root: ET.Element, machine: Machine) -> None:
    devices = root.find("devices")
    if devices is None:
        devices = ET.SubElement(root, "devices")
    taken = {place for element in devices if (place := _place(_address(element)))}
    for record in machine.controllers:
        controller = _controller(devices, record)
        if controller is not None:
            _put_address(controller, record.address, taken)
    for key, element in keyed(root):
        known = machine.device(key)
        if known is not None and known.kind == _kind(element):
            _put_address(element, known.address, taken)
    balloon = machine.device("memballoon")
    if balloon is not None and root.find("devices/memballoon") is None:  # libvirt adds one, and last
        _put_address(ET.SubElement(devices, "memballoon", model=balloon.kind), balloon.address, taken)


def _put_address(element: ET.Element, address: dict[str, str], taken: set[str]) -> None:
    """Give a device its address again, unless it has one, or another device was given that one since."""
    place = _place(address)
    if not address or element.find("address") is not None or place in taken:
        return
    if place:
        taken.add(place)
    ET.SubElement(element, "address", address)


def _controller(devices: ET.Element, record: ControllerRecord) -> ET.Element | None:
    """Find the controller of a record, or add it as libvirt did; None where the XML now has another in its place."""
    same = [
        element
        for element in devices.iterfind("controller")
        if (element.get("type"), element.get("index", "0")) == (record.type, str(record.index))
    ]
    alike = [element for element in same if element.get("model", record.model) == record.model]
    if same and not alike:
        return None
    element = alike[0] if alike else ET.SubElement(devices, "controller", type=record.type, index=str(record.index))
    if record.model:
        element.set("model", record.model)
    if record.name and element.find("model") is None:
        ET.SubElement(element, "model", name=record.name)
    if record.target and element.find("target") is None:
        ET.SubElement(element, "target", record.target)
    return element


def _place(address: dict[str, str]) -> str:
    """Write a place on a PCI bus, which one device only may have; empty for other addresses."""
    if address.get("type") != "pci":
        return ""
    return " ".join(_plain(address.get(name, "0")) for name in ("domain", "bus", "slot", "function"))


def _plain(text: str) -> str:
    """Write a number in one way, whether it came as `0x05` or as `5`."""
    try:
        return f"{int(text, 0):x}"
    except ValueError:
        return text
