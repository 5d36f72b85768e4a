"""The domain XML of a VM: rendered from its structured spec, or from its template.

Whatever the spec says, a guest's poweroff and crash end the domain and a reboot restarts it in place: what follows from
that is decided by the VM's runPolicy, in the control plane. The name is `project.vm`, the UUID the resource's uid.

What was recorded at an earlier start is filled in at the end (`resources.machine`), so a VM is the same machine at each
start.
"""

import hashlib
import string
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final

from orchestrator.errors import InvariantBroken
from orchestrator.resources.cpu import DEFAULT_CPU, CpuRequest
from orchestrator.resources.devices import Disk, Interface, NetworkSource
from orchestrator.resources.machine import RENDERED, Machine, requested_cpu, with_machine
from orchestrator.resources.vm import VirtualMachine
from orchestrator.resources.vm_spec import Bootloader, OsType, VirtualMachineSpec
from orchestrator.resources.vmclass import VirtualMachineClass

_TARGET_PREFIX: Final = {"virtio": "vd", "scsi": "sd", "sata": "sd", "ide": "hd"}
_ENDS: Final = {"on_poweroff": "destroy", "on_reboot": "restart", "on_crash": "destroy"}
_AGENT_CHANNEL: Final = "org.qemu.guest_agent.0"
_MILLICORES_A_SHARE: Final = 10
"""One whole core weighs 100, which is also what a machine without a weight has (systemd's CPUWeight)."""
_MOST_SHARES: Final = 10_000


@dataclass(frozen=True, slots=True)
class RenderHost:
    """What a domain's XML depends on of the node that is to start it.

    Attributes:
        domain_type: `kvm`, or `qemu` for emulation.
        cpu_shares: Whether its libvirt can weigh domains against each other (the cgroup controller `cpu`).
    """

    domain_type: str = "kvm"
    cpu_shares: bool = True


def render_domain(
    vm: VirtualMachine, vm_class: VirtualMachineClass | None = None, host: RenderHost | None = None
) -> str:
    """Make the domain XML that starts a VM.

    Args:
        vm: Its recorded machine is used where there is one.
        vm_class: The class that its spec names; its CPU must be known (`status.cpu`).
        host: Where it is to start; a template keeps its own domain type.
    """
    host = host or RenderHost()
    wanted = wanted_cpu(vm.spec, vm_class)
    if vm.spec.domain_template is not None:
        root = ET.fromstring(vm.spec.domain_template)  # noqa: S314 - checked at admission
        cpu_from = requested_cpu(root.find("cpu")) if wanted is None else str(wanted)
        if wanted is not None:
            _replace_cpu(root, wanted)
    else:
        assert wanted is not None  # noqa: S101 - only a template may leave its CPU open
        root, cpu_from = _structured(vm, wanted, host), str(wanted)
    _put_identity(root, vm, cpu_from)
    if vm.status.machine is not None:
        with_machine(root, vm.status.machine, cpu_from)
    return ET.tostring(root, encoding="unicode")


def wanted_cpu(spec: VirtualMachineSpec, vm_class: VirtualMachineClass | None) -> CpuRequest | None:
    """Give the CPU that a VM asks for; None for a template that has no class: its own says it.

    Raises:
        InvariantBroken: The spec names a class, and that is not the one given, or its CPU is not known.
    """
    if spec.virtual_machine_class_name is not None:
        if vm_class is None or vm_class.name != spec.virtual_machine_class_name or vm_class.status.cpu is None:
            raise InvariantBroken(f"the CPU of VirtualMachineClass {spec.virtual_machine_class_name!r} is not known")
        return vm_class.status.cpu
    if spec.domain_template is not None:
        return None
    return CpuRequest(model=spec.cpu.model) if spec.cpu.model is not None else DEFAULT_CPU


def disk_targets(spec: VirtualMachineSpec, machine: Machine | None = None) -> dict[str, str]:
    """Give the target names (`vda`) of a structured spec's disks, by their names; recorded ones stay."""
    targets: dict[str, str] = {}
    for disk in spec.disks:
        record = machine.device(f"ua-disk-{disk.name}") if machine else None
        if record is not None and record.target and record.kind == _bus(spec, disk):
            targets[disk.name] = record.target
    for disk in spec.disks:
        if disk.name not in targets:
            taken = set(targets.values())
            targets[disk.name] = next(t for t in _targets(_TARGET_PREFIX[_bus(spec, disk)]) if t not in taken)
    return targets


def local_disks(vm: VirtualMachine) -> tuple[str, ...]:
    """Give the target names of the running machine's disks that its spec declares as not shared, sorted."""
    if vm.running_spec.domain_template is not None:
        return ()
    targets = disk_targets(vm.running_spec, vm.status.machine)
    now = {disk.name: disk for disk in vm.spec.disks}  # whether one is shared is no part of the machine
    return tuple(sorted(targets[d.name] for d in vm.running_spec.disks if now.get(d.name, d).is_copied))


def _targets(prefix: str) -> Iterator[str]:
    for length in (1, 2):
        for letters in product(string.ascii_lowercase, repeat=length):
            yield prefix + "".join(letters)


def _bus(spec: VirtualMachineSpec, disk: Disk) -> str:
    if disk.bus is not None:
        return disk.bus
    if spec.enable_paravirtualization and not disk.cdrom:
        return "virtio"
    return "ide" if spec.os_type is OsType.LEGACY else "sata"


def _put_identity(root: ET.Element, vm: VirtualMachine, cpu_from: str) -> None:
    """Put in what is the resource's own, whatever a template says."""
    values = {
        "name": vm.domain_name,
        "uuid": vm.metadata.uid,
        "memory": str(vm.spec.memory_mib * 1024),
        "currentMemory": str(vm.spec.memory_mib * 1024),
        "vcpu": str(vm.spec.cpu.cores),
        **_ENDS,
    }
    for tag, value in values.items():
        element = root.find(tag)
        if element is None:
            element = ET.SubElement(root, tag)
        element.text = value
        if tag in {"memory", "currentMemory"}:
            element.attrib["unit"] = "KiB"
        if tag == "vcpu":
            element.attrib.pop("current", None)
    metadata = root.find("metadata")
    if metadata is None:
        metadata = ET.SubElement(root, "metadata")
    for old in metadata.findall(RENDERED):
        metadata.remove(old)
    ET.SubElement(metadata, RENDERED, cpu=cpu_from)


def _structured(vm: VirtualMachine, cpu: CpuRequest, host: RenderHost) -> ET.Element:
    spec = vm.spec
    root = ET.Element("domain", type=host.domain_type)
    for tag in ("name", "uuid", "metadata", "memory", "currentMemory", "vcpu"):
        ET.SubElement(root, tag)
    if host.cpu_shares:
        shares = max(1, min(_MOST_SHARES, spec.cpu_millicores // _MILLICORES_A_SHARE))
        ET.SubElement(ET.SubElement(root, "cputune"), "shares").text = str(shares)
    _add_firmware(root, spec)
    is_hyperv = spec.os_type is OsType.WINDOWS and host.domain_type == "kvm"
    _add_features(root, spec, is_hyperv=is_hyperv)
    element = _cpu_element(cpu)
    cores = spec.cpu.cores // spec.cpu.sockets
    ET.SubElement(element, "topology", sockets=str(spec.cpu.sockets), dies="1", cores=str(cores), threads="1")
    _sort_topology(element)
    root.append(element)
    clock = ET.SubElement(root, "clock", offset="localtime" if spec.os_type is OsType.WINDOWS else "utc")
    ET.SubElement(clock, "timer", name="rtc", tickpolicy="catchup")
    ET.SubElement(clock, "timer", name="pit", tickpolicy="delay")
    ET.SubElement(clock, "timer", name="hpet", present="no")
    if is_hyperv:
        ET.SubElement(clock, "timer", name="hypervclock", present="yes")
    for tag in _ENDS:
        ET.SubElement(root, tag)
    power = ET.SubElement(root, "pm")  # a guest that sleeps can't be migrated
    ET.SubElement(power, "suspend-to-mem", enabled="no")
    ET.SubElement(power, "suspend-to-disk", enabled="no")
    _add_devices(ET.SubElement(root, "devices"), vm)
    return root


def _add_firmware(root: ET.Element, spec: VirtualMachineSpec) -> None:
    os = ET.SubElement(root, "os")
    machine = "pc" if spec.os_type is OsType.LEGACY else "q35"
    ET.SubElement(os, "type", arch="x86_64", machine=machine).text = "hvm"
    if spec.bootloader is Bootloader.BIOS:
        return
    os.set("firmware", "efi")
    is_secure = "yes" if spec.bootloader is Bootloader.EFI_WITH_SECURE_BOOT else "no"
    firmware = ET.SubElement(os, "firmware")
    ET.SubElement(firmware, "feature", enabled=is_secure, name="secure-boot")
    ET.SubElement(firmware, "feature", enabled=is_secure, name="enrolled-keys")
    if spec.bootloader is Bootloader.EFI_WITH_SECURE_BOOT:
        ET.SubElement(os, "loader", secure="yes")


def _add_features(root: ET.Element, spec: VirtualMachineSpec, *, is_hyperv: bool) -> None:
    features = ET.SubElement(root, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    if spec.bootloader is Bootloader.EFI_WITH_SECURE_BOOT:
        ET.SubElement(features, "smm", state="on")
    if is_hyperv:
        hyperv = ET.SubElement(features, "hyperv", mode="custom")
        for name in ("relaxed", "vapic", "vpindex", "runtime", "synic"):
            ET.SubElement(hyperv, name, state="on")
        ET.SubElement(hyperv, "spinlocks", state="on", retries="8191")


def _replace_cpu(root: ET.Element, cpu: CpuRequest) -> None:
    """Put the class's CPU into a template; what follows from the number of cores stays."""
    new, old = _cpu_element(cpu), root.find("cpu")
    if old is not None:
        new.extend([part for part in old if part.tag in {"topology", "numa"}])
        root.remove(old)
        _sort_topology(new)
    root.append(new)


def _cpu_element(cpu: CpuRequest) -> ET.Element:
    if cpu.mode == "host-passthrough":
        return ET.Element("cpu", mode="host-passthrough", check="none", migratable="on")
    if cpu.mode == "host-model":
        return ET.Element("cpu", mode="host-model", check="partial")
    element = ET.Element("cpu", mode="custom", match="exact", check="partial")
    ET.SubElement(element, "model", fallback="forbid").text = cpu.model
    if cpu.vendor:
        ET.SubElement(element, "vendor").text = cpu.vendor
    for policy, names in (("require", cpu.features), ("disable", cpu.disabled)):
        for name in sorted(names):
            ET.SubElement(element, "feature", policy=policy, name=name)
    return element


def _sort_topology(element: ET.Element) -> None:
    """Put the parts of a CPU into libvirt's order, so that what it shows is easily compared."""
    order = {"model": 0, "vendor": 1, "topology": 2, "feature": 4}
    element[:] = sorted(element, key=lambda part: order.get(part.tag, 3))


def _add_devices(devices: ET.Element, vm: VirtualMachine) -> None:
    spec = vm.spec
    ET.SubElement(devices, "controller", type="usb", model="none")
    if any(_bus(spec, disk) == "scsi" for disk in spec.disks):
        ET.SubElement(devices, "controller", type="scsi", index="0", model="virtio-scsi")
    orders = _boot_orders(spec)
    targets = disk_targets(spec, vm.status.machine)
    for disk in spec.disks:
        _add_disk(devices, spec, disk, target=targets[disk.name], order=orders.get(f"disk/{disk.name}"))
    for interface in spec.interfaces:
        _add_interface(devices, vm, interface, order=orders.get(f"interface/{interface.name}"))
    serial = ET.SubElement(devices, "serial", type="pty")
    ET.SubElement(serial, "target", type="isa-serial", port="0")
    console = ET.SubElement(devices, "console", type="pty")
    ET.SubElement(console, "target", type="serial", port="0")
    if not spec.enable_paravirtualization:
        ET.SubElement(devices, "memballoon", model="none")
        return
    channel = ET.SubElement(devices, "channel", type="unix")
    ET.SubElement(channel, "target", type="virtio", name=_AGENT_CHANNEL)
    _alias(channel, "agent")
    rng = ET.SubElement(devices, "rng", model="virtio")
    ET.SubElement(rng, "backend", model="random").text = "/dev/urandom"
    _alias(rng, "rng")
    _alias(ET.SubElement(devices, "memballoon", model="virtio"), "balloon")


def _alias(device: ET.Element, name: str) -> None:
    """Name a device, so that it is known again in the live XML; libvirt keeps names that begin so."""
    ET.SubElement(device, "alias", name=f"ua-{name}")


def _boot_orders(spec: VirtualMachineSpec) -> dict[str, int]:
    """Give the boot order: as the spec says; or, where it says none, the disks in their order, else the interfaces."""
    disks = [(f"disk/{disk.name}", disk.boot_order) for disk in spec.disks]
    interfaces = [(f"interface/{interface.name}", interface.boot_order) for interface in spec.interfaces]
    said = {name: order for name, order in (*disks, *interfaces) if order is not None}
    return said or {name: order for order, (name, _) in enumerate(disks or interfaces, start=1)}


def _add_disk(devices: ET.Element, spec: VirtualMachineSpec, disk: Disk, *, target: str, order: int | None) -> None:
    kind = "block" if disk.block is not None else "network" if disk.network is not None else "file"
    element = ET.SubElement(devices, "disk", type=kind, device="cdrom" if disk.cdrom else "disk")
    driver = ET.SubElement(element, "driver", name="qemu", type=disk.format, cache="none")
    if not disk.cdrom:
        driver.set("discard", "unmap")
    if disk.network is not None:
        _add_network_source(element, disk.network)
    elif disk.block is not None:
        ET.SubElement(element, "source", dev=disk.block.path)
    elif disk.file is not None:
        ET.SubElement(element, "source", file=disk.file.path)
    ET.SubElement(element, "target", dev=target, bus=_bus(spec, disk))
    if disk.cdrom or disk.read_only:
        ET.SubElement(element, "readonly")
    if disk.serial is not None:
        ET.SubElement(element, "serial").text = disk.serial
    if order is not None:
        ET.SubElement(element, "boot", order=str(order))
    _alias(element, f"disk-{disk.name}")


def _add_network_source(disk: ET.Element, network: NetworkSource) -> None:
    source = ET.SubElement(disk, "source", protocol=network.protocol, name=network.name)
    for host in network.hosts:
        element = ET.SubElement(source, "host", name=host.name)
        if host.port is not None:
            element.set("port", str(host.port))
    if network.auth is not None:
        auth = ET.SubElement(source, "auth", username=network.auth.username)
        kind = "ceph" if network.protocol == "rbd" else "iscsi"
        ET.SubElement(auth, "secret", type=kind, uuid=network.auth.secret_uuid)


def _add_interface(devices: ET.Element, vm: VirtualMachine, interface: Interface, *, order: int | None) -> None:
    kind = "bridge" if interface.bridge is not None else "network"
    element = ET.SubElement(devices, "interface", type=kind)
    ET.SubElement(element, "source", {kind: interface.bridge or interface.network or ""})
    recorded = vm.status.machine.device(f"ua-net-{interface.name}") if vm.status.machine else None
    mac = interface.mac or (recorded.mac if recorded else "") or default_mac(vm.metadata.uid, interface.name)
    ET.SubElement(element, "mac", address=mac)
    default = "virtio" if vm.spec.enable_paravirtualization else "e1000e"
    if vm.spec.os_type is OsType.LEGACY and not vm.spec.enable_paravirtualization:
        default = "e1000"
    ET.SubElement(element, "model", type=interface.model or default)
    if order is not None:
        ET.SubElement(element, "boot", order=str(order))
    else:
        ET.SubElement(element, "rom", enabled="no")  # it costs a second of each boot, and is for booting from it
    _alias(element, f"net-{interface.name}")


def default_mac(uid: str, interface: str) -> str:
    """Give the MAC of an interface that names none: the same at every start, even before anything was recorded.

    40 bits of a hash under a locally administered prefix: among 10,000 interfaces two are equal once in 20,000 herds.
    """
    digest = hashlib.sha256(f"{uid}/{interface}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))
