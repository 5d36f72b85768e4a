"""`Node`: a hypervisor host, in the shape of Kubernetes' own; and what its inventory last said."""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from orchestrator.resources.cpu import NodeCpu
from orchestrator.resources.meta import Condition, Model, Resource, Timestamp, find_condition, is_stored, misplaced
from orchestrator.resources.scheduling import Taint

_VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,3}")
HYPERVISOR_LABEL = "vmherd.dev/hypervisor-version"
"""Of each node: its QEMU's version, as its agent tells it. The node's own, as its name is."""

Count = Annotated[int, Field(ge=0, le=2**40)]
"""What a node counts. Bounded, as scripts and other nodes' counters go on from it."""


class NodeSpec(Model):
    """What people say of a node.

    Attributes:
        unschedulable: Cordoned: no VM starts or lands there.
        taints: Marks that keep VMs off it that don't tolerate them; a key has each effect once.
        witness: A machine without VMs, which holds a lease and votes (docs/heartbeat.md). Said when it is enrolled.
    """

    unschedulable: bool = False
    witness: bool = False
    taints: tuple[Taint, ...] = Field((), max_length=64)

    @model_validator(mode="after")
    def _check_taints(self, info: ValidationInfo) -> Self:
        seen: set[tuple[str, str]] = set()
        for number, taint in enumerate(() if is_stored(info) else self.taints):
            if (taint.key, taint.effect) in seen:
                raise misplaced((f"taints[{number}].key", f"{taint.key} has effect {taint.effect} already"))
            seen.add((taint.key, taint.effect))
        return self


class Capacity(Model):
    """What the host has.

    Attributes:
        cpu: Logical CPUs.
        memory_mib: Physical memory.
    """

    cpu: Count = 0
    memory_mib: Count = 0


class HypervisorInfo(Model):
    """How other hosts reach it, and what it runs.

    Attributes:
        domain_type: What domains run by there: `kvm`, or `qemu` for emulation.
        cpu_shares: Whether it can weigh domains by the CPU that they reserve.
        cpu: What its guests can get; None where it has not told.
    """

    migration_uri: str = ""
    host_uuid: str = ""
    cpu_model: str = ""
    version: str = ""
    libvirt_version: str = ""
    domain_type: Literal["kvm", "qemu"] = "kvm"
    cpu_shares: bool = True
    cpu: NodeCpu | None = None

    @property
    def number(self) -> str:
        """The number alone of its version, which can be a label: `7.2.22` of `QEMU 7.2.22`; empty if not known."""
        found = _VERSION.search(self.version)
        return found[0] if found else ""

    @property
    def platform(self) -> str:
        """Equal for hosts with the same CPU and the same hypervisor; empty where that is not known."""
        parts = (self.cpu_model, self.version, self.libvirt_version)
        return "/".join(parts) if all(parts) else ""


class NodeStatus(Model):
    """What is known of a node."""

    capacity: Capacity = Capacity()
    hypervisor: HypervisorInfo = HypervisorInfo()
    conditions: tuple[Condition, ...] = ()
    boot_id: str = ""
    generation: str = ""


class Node(Resource):
    """One hypervisor host."""

    kind_name: ClassVar[str] = "Node"
    group_version: ClassVar[str] = "v1"
    plural: ClassVar[str] = "nodes"
    short: ClassVar[str] = "no"
    namespaced: ClassVar[bool] = False

    api_version: Literal["v1"] = "v1"
    kind: Literal["Node"] = "Node"
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def is_ready(self) -> bool:
        """Whether its lease is renewed and its hypervisor answers."""
        condition = find_condition(self.status.conditions, "Ready")
        return condition is not None and condition.status == "True"

    @property
    def is_shutting_down(self) -> bool:
        """Whether its host has begun an orderly shutdown: its VMs leave, or are stopped as its doing."""
        condition = find_condition(self.status.conditions, "ShuttingDown")
        return condition is not None and condition.status == "True"

    @property
    def is_schedulable(self) -> bool:
        """Whether VMs may start or land on it. Their number is the herd's cap on migrations."""
        may_take = not self.spec.unschedulable and not self.spec.witness
        return self.is_ready and may_take and not self.is_shutting_down

    def with_status(self, **changes: object) -> "Node":
        """Give a copy with some of its status changed."""
        return self.with_(status=self.status.with_(**changes))


class SeenDomain(Model):
    """One domain as its host last reported it.

    Attributes:
        state: A `workers.hypervisor.port.DomainState`; empty for one that ran and went before it was ever read.
        vm: `namespace/name` from the domain's own metadata, empty for what we don't manage.
        ran: Whether it ran here since it came. So a copy that is gone is told from one that never ran: the first has
            changed its disk, and the source's older copy must not be resumed.
        persistent: Whether its host has a definition of it. Not of ours, unless somebody defined it behind our back.
        agent: Whether its guest's agent is connected; None: it has no channel for one, or does not run.
        by_host: Whether it went while its host was being shut down: the node's doing, not the guest's.
        counter: The number of the report.
        began: The node's counter when it was read: the report may have been overtaken by those since. An event's own
            number, as nothing was read.
    """

    name: str
    state: str
    reason: str = ""
    vm: str = ""
    incarnation: Count = 0
    epoch: Count = 0
    memory_mib: Count = 0
    vcpus: Count = 0
    job: bool = False
    addresses: tuple[str, ...] = ()
    ran: bool = False
    persistent: bool = False
    agent: bool | None = None
    by_host: bool = False
    counter: int = 0
    began: Count = 0


class NodeInventory(Resource):
    """What a node's hypervisor has, by domain UUID. Internal: written by intake only.

    Attributes:
        counter: The number of the last report that changed it.
        full_counter: The node's counter when the last full listing began.
        listing_order: Id of the order to list everything anew that it has not answered yet.
    """

    kind_name: ClassVar[str] = "NodeInventory"
    group_version: ClassVar[str] = "vmherd.dev/v1"
    plural: ClassVar[str] = "nodeinventories"
    short: ClassVar[str] = "inventory"
    namespaced: ClassVar[bool] = False

    api_version: Literal["vmherd.dev/v1"] = "vmherd.dev/v1"
    kind: Literal["NodeInventory"] = "NodeInventory"
    domains: dict[str, SeenDomain] = Field(default_factory=dict)
    counter: int = 0
    full_counter: int = 0
    listed_at: Timestamp | None = None
    listing_order: str = ""
