"""What CPU a libvirt host can give its guests: libvirt's answer for the kind of domain that runs there.

libvirt's host-model is the model that comes nearest, and a list of what is added and taken away; which features the
model itself has, libvirt tells when it is asked for the baseline of that one CPU. Both come from what libvirtd has
cached of its QEMU: half a second the first time, a millisecond later.
"""

import xml.etree.ElementTree as ET  # what is parsed comes from libvirtd
from typing import Any, Final

import libvirt

from workers.hypervisor.port import HostCpu

_TYPES: Final = ("kvm", "qemu")
_EXPAND: Final = libvirt.VIR_CONNECT_BASELINE_CPU_EXPAND_FEATURES | libvirt.VIR_CONNECT_BASELINE_CPU_MIGRATABLE


def read_cpu(connection: Any, domain_type: str = "") -> tuple[str, HostCpu]:
    """Read the kind of domain that a host runs, and what CPU its guests can get.

    Args:
        connection: To the host's libvirtd.
        domain_type: `kvm` or `qemu`; empty takes the first of these that libvirt offers.

    Returns:
        The kind, and the CPU; one without features where libvirt does not offer the kind, or can't tell.

    Raises:
        libvirt.libvirtError: The connection broke.
    """
    for wanted in (domain_type,) if domain_type else _TYPES:
        try:
            capabilities = connection.getDomainCapabilities(None, None, None, wanted)
        except libvirt.libvirtError:
            if not connection.isAlive():
                raise
            continue
        return wanted, _read(connection, ET.fromstring(capabilities), wanted)  # noqa: S314  see the import
    return domain_type or _TYPES[-1], HostCpu()


def _read(connection: Any, capabilities: ET.Element, domain_type: str) -> HostCpu:
    models = sorted(
        model.text
        for model in capabilities.iterfind("cpu/mode[@name='custom']/model[@usable='yes']")
        if model.text is not None
    )
    host_model = capabilities.find("cpu/mode[@name='host-model']")
    if host_model is None or host_model.get("supported") != "yes":
        return HostCpu(models=tuple(models))
    cpu = ET.Element("cpu", mode="custom", match="exact")
    cpu.extend(part for part in host_model if part.tag in {"model", "vendor", "feature"})
    asked = (None, capabilities.findtext("arch"), None, domain_type)
    try:
        expanded = connection.baselineHypervisorCPU(*asked, [ET.tostring(cpu, encoding="unicode")], _EXPAND)
    except libvirt.libvirtError:
        if not connection.isAlive():
            raise
        return HostCpu(models=tuple(models))
    root = ET.fromstring(expanded)  # noqa: S314  see the import
    return HostCpu(
        vendor=root.findtext("vendor", ""),
        model=root.findtext("model", ""),
        features=_features(root, "require"),
        disabled=_features(root, "disable"),
        models=tuple(models),
    )


def _features(cpu: ET.Element, policy: str) -> tuple[str, ...]:
    found = (feature.get("name", "") for feature in cpu.iterfind("feature") if feature.get("policy") == policy)
    return tuple(sorted(found))
