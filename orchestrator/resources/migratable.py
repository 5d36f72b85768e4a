"""Whether a VM can migrate, whatever the target, as far as its spec tells: the condition `Migratable`.

It is judged so while nobody has told of the running machine itself (`resources.needs`), which counts for more.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Final

from orchestrator.resources.domain_xml import local_disks
from orchestrator.resources.meta import Condition
from orchestrator.resources.needs import DISK_PROBLEM, STORAGE_COPY_ANNOTATION
from orchestrator.resources.vm import VirtualMachine

MIGRATABLE: Final = "VirtualMachineMigratable"
NON_MIGRATABLE: Final = "VirtualMachineNonMigratable"
DISKS_NOT_MIGRATABLE: Final = "VirtualMachineDisksNotMigratable"
HOST_DEVICES_NOT_MIGRATABLE: Final = "VirtualMachineHostDevicesNotMigratable"
_HOST_DEVICE: Final = "host device"


def migratable(vm: VirtualMachine) -> Condition:
    """Say whether a VM can migrate, and if not, which device or disk is in the way."""
    reasons = list(_host_bound(vm))
    for reason in (HOST_DEVICES_NOT_MIGRATABLE, DISKS_NOT_MIGRATABLE, NON_MIGRATABLE):
        told = [why for kind, why in reasons if kind == reason]
        if told:
            return Condition(type="Migratable", status="False", reason=reason, message="; ".join(told))
    return Condition(type="Migratable", status="True", reason=MIGRATABLE)


def _host_bound(vm: VirtualMachine) -> Iterator[tuple[str, str]]:
    """Name what ties it to its host, with the condition's reason."""
    if vm.running_spec.domain_template is not None:
        yield from _template_obstacles(vm.running_spec.domain_template)
    if vm.metadata.annotations.get(STORAGE_COPY_ANNOTATION) != "true":
        for target in local_disks(vm):
            why = f'is not shared; annotation {STORAGE_COPY_ANNOTATION}: "true" lets it be copied'
            yield DISKS_NOT_MIGRATABLE, f"{DISK_PROBLEM}{target} {why}"


def _template_obstacles(template: str) -> Iterator[tuple[str, str]]:
    root = ET.fromstring(template)  # noqa: S314 - checked at admission
    for device in root.iterfind("devices/hostdev"):
        yield HOST_DEVICES_NOT_MIGRATABLE, f"{_HOST_DEVICE} {_host_device(device)}: it can't leave its host"
    for interface in root.iterfind("devices/interface"):
        if interface.get("type") in {"hostdev", "vdpa"} and interface.find("teaming") is None:
            mac = interface.find("mac")
            name = "" if mac is None else f" {mac.get('address')}"
            yield HOST_DEVICES_NOT_MIGRATABLE, f"interface{name} is a {_HOST_DEVICE}: it can't leave its host"
    for disk in root.iterfind("devices/disk"):
        target = disk.find("target")
        name = "" if target is None else target.get("dev", "")
        if disk.get("type") == "nvme":
            yield HOST_DEVICES_NOT_MIGRATABLE, f"disk {name} is a {_HOST_DEVICE}: it can't leave its host"
        if disk.find("transient") is not None:
            yield DISKS_NOT_MIGRATABLE, f"{DISK_PROBLEM}{name} is transient: what is written to it is on its host only"
    for share in root.iterfind("devices/filesystem"):
        target = share.find("target")
        name = "" if target is None else target.get("dir", "")
        yield NON_MIGRATABLE, f"file system {name} is shared with its host: it can't leave it"
    for tpm in root.iterfind("devices/tpm/backend"):
        if tpm.get("type") != "emulator":
            yield HOST_DEVICES_NOT_MIGRATABLE, f"TPM: it is its host's own, a {_HOST_DEVICE}, and can't leave it"
    if root.find("launchSecurity") is not None:
        yield NON_MIGRATABLE, "memory encryption (launchSecurity) is bound to its host"


def _host_device(device: ET.Element) -> str:
    source = device.find("source")
    parts = [] if source is None else [part for part in source.iter() if part is not source]
    words = " ".join(value for part in parts for value in part.attrib.values())
    return f"{device.get('type', device.get('mode', ''))} {words}".strip()
