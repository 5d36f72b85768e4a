"""The herd at a glance, taken from its copy in memory: nodes with their reservations, slots, operations.

The figures are those by which grants are decided: reservations count VMs that are on their way, and domains that are
not ours.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.resources import Node, VirtualMachine, VirtualMachineOperation
from orchestrator.services.herd import Herd, node_capacity
from orchestrator.services.use import Use, read_uses
from orchestrator.store import Store, keys


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """One node.

    Attributes:
        status: `Ready`, `NotReady`, either with `,SchedulingDisabled`.
        cpu_millicores: That VMs may reserve.
        memory_mib: That VMs may take.
        outbound: Migrations that leave it.
        inbound: Migrations that reach it.
        use: Of its host; None: it has not told.
        host_memory_mib: All that its host has.
    """

    name: str
    status: str
    vms: int
    cpu_millicores: int
    cpu_reserved_millicores: int
    memory_mib: int
    memory_reserved_mib: int
    outbound: int
    inbound: int
    use: Use | None = None
    host_memory_mib: int = 0

    @property
    def cpu_used(self) -> float | None:
        """The share of its host's CPUs that is busy; None: it has not told."""
        return self.use.cpu if self.use is not None else None

    @property
    def memory_used(self) -> float | None:
        """The share of its host's memory that is in use; None: it has not told."""
        return _share(self.use.memory_mib, self.host_memory_mib) if self.use is not None else None

    @property
    def cpu_share(self) -> float:
        """Of its CPU that is reserved; 1 is all, and more is possible."""
        return _share(self.cpu_reserved_millicores, self.cpu_millicores)

    @property
    def memory_share(self) -> float:
        """Likewise of its memory."""
        return _share(self.memory_reserved_mib, self.memory_mib)


@dataclass(frozen=True, slots=True)
class OperationLine:
    """One operation that has not ended."""

    name: str
    namespace: str
    virtual_machine: str
    type: str
    phase: str
    progress: int
    source: str
    target: str
    message: str


@dataclass(frozen=True, slots=True)
class Overview:
    """The herd at one instant.

    Attributes:
        nodes: The fullest first.
        operations: Those under way first, then those that wait, in the order in which they are served.
        phases: Number of VMs by phase.
        slots_used: Migrations that run.
        slots_cap: Migrations that may: the schedulable nodes.
    """

    nodes: tuple[NodeLoad, ...]
    operations: tuple[OperationLine, ...]
    phases: dict[str, int]
    slots_used: int
    slots_cap: int

    def manifest(self) -> dict[str, Any]:
        """Give it as JSON-able data."""
        return asdict(self)


def overview(herd: Herd) -> Overview:
    """Look at the copy now, and at what is in use."""
    follower = herd.follower
    uses = read_uses(herd.store, [node.name for node in follower.all(Node)])
    with follower.lock:
        vms = follower.all(VirtualMachine)
        on_node = Counter(vm.status.node_name for vm in vms if vm.status.phase.occupies_node)
        nodes = [
            node_load(herd.store, follower.index, node, on_node[node.name], uses.get(node.name))
            for node in follower.all(Node)
        ]
        active = sorted(herd.active_operations(), key=lambda o: (o.status.grant is None, o.priority, o.created_version))
        return Overview(
            nodes=tuple(sorted(nodes, key=lambda node: (-node.cpu_share, -node.memory_share, node.name))),
            operations=tuple(_operation(operation) for operation in active),
            phases=dict(sorted(Counter(vm.status.phase.value for vm in vms).items())),
            slots_used=len(follower.index.get(keys.SLOTS_CLUSTER, {})),
            slots_cap=len(follower.index.get(keys.SCHEDULABLE, {})),
        )


def node_load(
    store: Store, index: Mapping[str, Mapping[str, str | None]], node: Node, vms: int, use: Use | None = None
) -> NodeLoad:
    """Say what is reserved of a node, and in use.

    Args:
        store: For its settings.
        index: A follower's; held still by the caller.
        node: Which.
        vms: How many take room of it.
        use: Of its host.
    """
    claims = [(value or "0 0").split() for value in index.get(keys.claims(node.name), {}).values()]
    memory_mib, millicores = node_capacity(store, node)
    return NodeLoad(
        name=node.name,
        status=("Ready" if node.is_ready else "NotReady") + (",SchedulingDisabled" if node.spec.unschedulable else ""),
        vms=vms,
        cpu_millicores=millicores,
        cpu_reserved_millicores=sum(int(claim[1]) for claim in claims),
        memory_mib=memory_mib,
        memory_reserved_mib=sum(int(claim[0]) for claim in claims),
        outbound=len(index.get(keys.slots_outbound(node.name), {})),
        inbound=len(index.get(keys.slots_inbound(node.name), {})),
        use=use,
        host_memory_mib=node.status.capacity.memory_mib,
    )


def _operation(operation: VirtualMachineOperation) -> OperationLine:
    status = operation.status
    return OperationLine(
        name=operation.name,
        namespace=operation.metadata.namespace,
        virtual_machine=operation.spec.virtual_machine_name,
        type=operation.spec.type.value,
        phase=status.phase.value,
        progress=status.progress,
        source=status.source_node,
        target=status.target_node,
        message=operation.message,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole > 0 else float(part > 0)
