"""CPUs: what a node offers, what a guest is to see, and the CPU that several nodes have in common.

A guest's CPU must not lose a feature while it runs, so where a VM may go follows from features. A model is libvirt's
name for a set of them. Which models a node can offer (`models`) and all features of its best one (`features`) come from
libvirt on that node (`domcapabilities`), for the kind of virtualisation that it uses: emulation offers less than KVM.
"""

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import Field, PlainSerializer

from orchestrator.resources.meta import Model

CpuWord = Annotated[str, Field(pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.+]{0,63}$")]
"""libvirt's name of a model, a vendor or a feature."""
CpuWords = Annotated[frozenset[CpuWord], Field(max_length=1000), PlainSerializer(sorted, return_type=list[str])]

GENERIC_MODELS: Final = ("kvm64", "qemu64")
"""Models that every x86 host offers under KVM, and under emulation: what features are added to."""


class NodeCpu(Model):
    """What a node's hypervisor can give a guest.

    Attributes:
        vendor: `Intel`, `AMD`; empty where it is not told.
        model: The model that comes nearest to the host's CPU.
        features: All features of that CPU as a guest gets it, those of the model included.
        disabled: Features of the model that a guest does not get here.
        models: Models that can be given whole.
    """

    vendor: str = Field("", max_length=64)
    model: str = Field("", max_length=64)
    features: CpuWords = frozenset()
    disabled: CpuWords = frozenset()
    models: CpuWords = frozenset()


class CpuRequest(Model):
    """The CPU that a guest is to see.

    Attributes:
        mode: `custom` is made of the model and the features; the other two take the host's own.
        features: Added to the model.
        disabled: Taken from the model.
    """

    mode: Literal["custom", "host-model", "host-passthrough"] = "custom"
    model: str = ""
    vendor: str = ""
    features: CpuWords = frozenset()
    disabled: CpuWords = frozenset()

    def __str__(self) -> str:
        """In one line: equal requests give equal lines."""
        words = [self.mode, self.model, self.vendor]
        words += [f"+{name}" for name in sorted(self.features)] + [f"-{name}" for name in sorted(self.disabled)]
        return " ".join(word for word in words if word)


DEFAULT_CPU: Final = CpuRequest(mode="custom", model="Nehalem")
"""Of a VM that names neither a class nor a model: what the platform's class `generic` gives. Every x86 server since
2008 has it, of either vendor, so such a VM can go anywhere."""


def lacking(cpu: NodeCpu | None, wanted: CpuRequest | None) -> str:
    """Say why a node can't give that CPU, as `without CPU features avx2`; empty when it can.

    A node that has not told its CPU, or a VM that does not say which it needs, is no obstacle here: the hypervisor
    itself refuses what does not fit.
    """
    if cpu is None or wanted is None or wanted.mode != "custom":
        return ""
    if wanted.vendor and cpu.vendor and wanted.vendor != cpu.vendor:
        return f"without a CPU of {wanted.vendor}"
    if missing := sorted(wanted.features - cpu.features):
        return f"without CPU features {', '.join(missing)}"
    if wanted.model and wanted.model != cpu.model and wanted.model not in cpu.models:
        return f"without CPU model {wanted.model}"
    return ""


def is_same(one: NodeCpu | None, other: NodeCpu | None) -> bool:
    """Whether a guest that sees its host's own CPU can't tell these two apart; False when one is not known."""
    return one is not None and other is not None and one == other


def baseline(cpus: Mapping[str, NodeCpu]) -> CpuRequest | str:
    """Find the CPU that all of these nodes can give: what they all have, and no more.

    Where all nodes have the same model, it is that one. Otherwise it is a generic model with all the features that the
    nodes share: no model of libvirt's is taken for another here, since which is the lesser one is libvirt's to say, and
    the features decide what a guest can use. CPUs of several vendors have no baseline (libvirt says so too): their
    guests' kernels choose code by the vendor.

    Args:
        cpus: By node.

    Returns:
        The CPU; or why there is none.
    """
    if not cpus:
        return "no node matches"
    unknown = sorted(name for name, cpu in cpus.items() if not cpu.features)
    if unknown:
        return f"the CPU of node {', '.join(unknown)} is not known yet"
    vendors: dict[str, list[str]] = {}
    for name, cpu in sorted(cpus.items()):
        vendors.setdefault(cpu.vendor, []).append(name)
    if len(vendors) > 1:
        told = "; ".join(f"{vendor or 'unknown'}: {', '.join(names)}" for vendor, names in sorted(vendors.items()))
        return f"the nodes' CPUs are of several vendors ({told}): narrow spec.cpu.discovery.nodeSelector"
    (vendor,) = vendors
    features = frozenset[str].intersection(*(cpu.features for cpu in cpus.values()))
    models = {cpu.model for cpu in cpus.values()}
    if len(models) == 1 and models != {""}:
        disabled = frozenset[str]().union(*(cpu.disabled for cpu in cpus.values()))
        return CpuRequest(model=models.pop(), vendor=vendor, features=features - disabled, disabled=disabled)
    generic = generic_model(cpus)
    if not generic:
        return f"no generic CPU model ({', '.join(GENERIC_MODELS)}) is offered by all nodes"
    return CpuRequest(model=generic, vendor=vendor, features=features)


def generic_model(cpus: Mapping[str, NodeCpu]) -> str:
    """Give the generic model that all of these nodes offer; empty where there is none."""
    return next((name for name in GENERIC_MODELS if all(name in cpu.models for cpu in cpus.values())), "")
