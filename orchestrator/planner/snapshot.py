"""What a plan is made from: one instant of the herd, immutable."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from orchestrator.resources import Key, VirtualMachine, VirtualMachineOperation


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
    migration_uri: str = ""

    @property
    def schedulable(self) -> bool:
        """Whether VMs may start or land on it."""
        return self.ready and not self.cordoned


@dataclass(frozen=True, slots=True)
class Limits:
    """How many migrations may run at a time; inbound 0 means no limit."""

    outbound_per_node: int = 1
    inbound_per_node: int = 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The herd at one instant.

    Attributes:
        pending: Operations without a grant, in the order in which they are to be served.
        migrating: Migrations that hold a slot.
        busy: VMs that must not be touched now, with the reason (an unknown migration of theirs runs).
    """

    now: datetime
    nodes: Mapping[str, NodeState]
    vms: Mapping[Key, VirtualMachine]
    pending: tuple[VirtualMachineOperation, ...] = ()
    migrating: int = 0
    busy: Mapping[Key, str] = field(default_factory=dict)
    memory_overhead_mib: int = 0
    limits: Limits = Limits()

    @property
    def cap(self) -> int:
        """The herd's cap on migrations: its schedulable nodes."""
        return sum(node.schedulable for node in self.nodes.values())
