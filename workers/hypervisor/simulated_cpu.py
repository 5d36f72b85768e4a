"""CPUs of simulated hosts: some of libvirt's models with some of their features, and what a machine asks of them."""

import xml.etree.ElementTree as ET  # what is parsed comes from an administrator's VirtualMachine, or was written here
from collections.abc import Mapping
from typing import Final

from workers.hypervisor.domain_needs import Needs
from workers.hypervisor.port import HostCpu

_FEATURES: Final[Mapping[str, tuple[str, frozenset[str]]]] = {
    "kvm64": ("", frozenset()),
    "qemu64": ("", frozenset()),
    "Nehalem": ("Intel", frozenset({"sse4.2", "popcnt"})),
    "SandyBridge": ("Intel", frozenset({"sse4.2", "popcnt", "avx", "xsave"})),
    "Haswell": ("Intel", frozenset({"sse4.2", "popcnt", "avx", "xsave", "avx2", "bmi2"})),
    "Skylake-Server": ("Intel", frozenset({"sse4.2", "popcnt", "avx", "xsave", "avx2", "bmi2", "avx512f"})),
    "EPYC": ("AMD", frozenset({"sse4.2", "popcnt", "avx", "xsave", "avx2", "bmi2", "sse4a"})),
}
CPU_MODELS: Final = tuple(_FEATURES)
"""What a simulated host's `cpu_model` may be."""


def host_cpu(model: str) -> HostCpu:
    """Give what a host with a CPU of that model can give its guests."""
    vendor, features = _FEATURES[model]
    models = [name for name, (of, needed) in _FEATURES.items() if of in ("", vendor) and needed <= features]
    return HostCpu(vendor=vendor, model=model, features=tuple(sorted(features)), models=tuple(sorted(models)))


def cpu_problems(model: str, needs: Needs) -> list[str]:
    """Say what a machine's CPU asks for that a host with a CPU of that model has not."""
    if needs.cpu_mode != "custom" or not needs.cpu_model:
        return []
    known = _FEATURES.get(needs.cpu_model)
    if known is None:
        return [f"CPU model {needs.cpu_model}: internal error: Unknown CPU model {needs.cpu_model}"]
    wanted = set(known[1])
    for feature in ET.fromstring(needs.cpu_xml).iterfind("feature"):  # noqa: S314  see the import
        if feature.get("policy", "require") in ("require", "force"):
            wanted.add(feature.get("name", ""))
        else:
            wanted.discard(feature.get("name", ""))
    missing = sorted(wanted - _FEATURES[model][1])
    return [f"CPU model {needs.cpu_model}: this host lacks {', '.join(missing)}"] if missing else []
