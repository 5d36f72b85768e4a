"""`VirtualMachineClass`: a kind of machine, shared by all projects: which CPU its VMs see, and on which nodes they run.

`Discovery` takes the CPU that all matching nodes can give. It follows the nodes until the first VM of the class was
started; from then on it stays as it is, since a VM must find the same CPU again. A change of `spec` begins it anew.
"""

from enum import StrEnum
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from orchestrator.resources.cpu import CpuRequest, CpuWord
from orchestrator.resources.meta import GROUP_VERSION, Condition, Model, Resource, is_stored, misplaced
from orchestrator.resources.scheduling import NodeLabels, Toleration


class CpuType(StrEnum):
    """Where the CPU of a class comes from."""

    HOST = "Host"
    """As near to the host's as libvirt can describe it: a VM can move to nodes that have all of its features."""
    HOST_PASSTHROUGH = "HostPassthrough"
    """The host's own: a VM can move to nodes with an identical CPU only."""
    DISCOVERY = "Discovery"
    """What the nodes have in common."""
    MODEL = "Model"
    """A named model of libvirt's."""
    FEATURES = "Features"
    """A generic model with the features listed."""


class Discovery(Model):
    """How a CPU is discovered."""

    node_selector: NodeLabels = NodeLabels()


class ClassCpu(Model):
    """The CPU of a class.

    Attributes:
        model: With type Model.
        features: With type Features.
        discovery: With type Discovery; without it, all nodes of the class are looked at.
    """

    type: CpuType
    model: CpuWord | None = None
    features: Annotated[tuple[CpuWord, ...], Field(max_length=256)] = ()
    discovery: Discovery | None = None

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        if is_stored(info):
            return self
        causes = []
        for field, owner, given in (
            ("model", CpuType.MODEL, self.model is not None),
            ("features", CpuType.FEATURES, bool(self.features)),
            ("discovery", CpuType.DISCOVERY, self.discovery is not None),
        ):
            if given and self.type is not owner:
                causes.append((field, f"is only for type {owner}"))
            if not given and self.type is owner and owner is not CpuType.DISCOVERY:
                causes.append((field, f"is required for type {owner}"))
        repeated = [name for number, name in enumerate(self.features) if name in self.features[:number]]
        if repeated:
            causes.append(("features", f"{repeated[0]} is there twice"))
        if causes:
            raise misplaced(*causes)
        return self


class VirtualMachineClassSpec(Model):
    """What VMs of the class have in common.

    Attributes:
        node_selector: Nodes that they may run on; what it says wins over a VM's own nodeSelector.
        tolerations: Added to those of a VM.
    """

    cpu: ClassCpu
    node_selector: NodeLabels = NodeLabels()
    tolerations: tuple[Toleration, ...] = Field((), max_length=64)


class ClassPhase(StrEnum):
    """Whether VMs of a class can run."""

    PENDING = "Pending"
    READY = "Ready"


class VirtualMachineClassStatus(Model):
    """What is known.

    Attributes:
        cpu: What VMs of the class ask for; None while that is not known.
        observed_generation: Of the spec that `cpu` was made from.
        available_nodes: That match and can give the CPU, by name.
        discovered_from: Nodes whose CPUs were looked at, of a discovered or generic CPU.
    """

    phase: ClassPhase = ClassPhase.PENDING
    cpu: CpuRequest | None = None
    observed_generation: int = 0
    available_nodes: tuple[str, ...] = ()
    discovered_from: tuple[str, ...] = ()
    conditions: tuple[Condition, ...] = ()


class VirtualMachineClass(Resource):
    """A kind of machine."""

    kind_name: ClassVar[str] = "VirtualMachineClass"
    group_version: ClassVar[str] = GROUP_VERSION
    plural: ClassVar[str] = "virtualmachineclasses"
    short: ClassVar[str] = "vmclass"
    namespaced: ClassVar[bool] = False

    api_version: Literal["virtualization.deckhouse.io/v1alpha2"] = GROUP_VERSION
    kind: Literal["VirtualMachineClass"] = "VirtualMachineClass"
    spec: VirtualMachineClassSpec
    status: VirtualMachineClassStatus = VirtualMachineClassStatus()

    def with_status(self, **changes: object) -> "VirtualMachineClass":
        """Give a copy with some of its status changed."""
        return self.with_(status=self.status.with_(**changes))
