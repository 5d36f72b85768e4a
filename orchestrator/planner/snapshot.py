"""What a plan is made from: one instant of the herd, immutable."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from orchestrator.planner.rules import Resident
from orchestrator.resources import Key, VirtualMachine, VirtualMachineClass, VirtualMachineOperation
from orchestrator.resources.cpu import NodeCpu
from orchestrator.resources.scheduling import Taint


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node.

    Attributes:
        memory_mib: What VMs may take of its memory.
        cpu_millicores: What VMs may reserve of its CPU.
        memory_used_mib: Taken, incoming migrations and unmanaged domains included.
        cpu_used_millicores: Likewise reserved.
        outbound: Migrations that leave it.
        inbound: Migrations that reach it.
        starting: VMs that are being started on it.
        generation: Of its agent, new at each of its starts.
        shutting_down: Whether its host is on its way down.
        platform: Tells hosts with the same CPU and hypervisor; empty if not known.
        domain_type: What domains run by on it: `kvm` or `qemu`.
        cpu_shares: Whether it can weigh domains against each other.
        cpu: What its guests can get; None where it has not told.
    """

    name: str
    labels: Mapping[str, str]
    ready: bool
    cordoned: bool
    memory_mib: int
    cpu_millicores: int
    memory_used_mib: int = 0
    cpu_used_millicores: int = 0
    outbound: int = 0
    inbound: int = 0
    starting: int = 0
    migration_uri: str = ""
    generation: str = ""
    platform: str = ""
    shutting_down: bool = False
    taints: tuple[Taint, ...] = ()
    domain_type: str = "kvm"
    cpu_shares: bool = True
    cpu: NodeCpu | None = None

    @property
    def schedulable(self) -> bool:
        """Whether VMs may start or land on it."""
        return self.ready and not self.cordoned and not self.shutting_down


@dataclass(frozen=True, slots=True)
class Limits:
    """How many migrations and starts may run at a time; 0 means no limit, but for outbound."""

    outbound_per_node: int = 1
    inbound_per_node: int = 1
    starts_per_node: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The herd at one instant.

    Attributes:
        pending: Operations without a grant, in the order in which they are to be served.
        migrating: Migrations that hold a slot.
        busy: VMs that must not be touched now, with the reason (an unknown migration of theirs runs).
        held: Operations that wait for the end of one that they superseded, or of an adoption, with the reason.
        vms: At least those of the pending operations.
        placements: Grants that placed a VM, ever; all of them are in `residents`.
        residents: All VMs that take room of a node, as the rules between VMs see them.
    """

    now: datetime
    nodes: Mapping[str, NodeState]
    vms: Mapping[Key, VirtualMachine]
    pending: tuple[VirtualMachineOperation, ...] = ()
    migrating: int = 0
    busy: Mapping[Key, str] = field(default_factory=dict)
    held: Mapping[Key, str] = field(default_factory=dict)
    memory_overhead_mib: int = 0
    limits: Limits = Limits()
    classes: Mapping[str, VirtualMachineClass] = field(default_factory=dict)
    placements: int = 0
    residents: Mapping[Key, Resident] = field(default_factory=dict)

    def class_of(self, vm: VirtualMachine) -> VirtualMachineClass | None:
        """Give the class that a VM's spec names; None where it names none, or one that is not there."""
        return self.classes.get(vm.spec.virtual_machine_class_name or "")

    @property
    def cap(self) -> int:
        """The herd's cap on migrations: its schedulable nodes."""
        return sum(node.schedulable for node in self.nodes.values())
