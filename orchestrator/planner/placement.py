"""Where one VM may run: filters that say why a node is refused, then a score.

A node that is disliked (an earlier attempt failed there, or a taint PreferNoSchedule) comes last, then preferences
decide, then the share of CPU that is reserved after the VM has come: the lowest wins, names break ties.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.planner.neighbours import Neighbours
from orchestrator.planner.rules import Whereabouts, whereabouts
from orchestrator.planner.snapshot import NodeState
from orchestrator.resources import Key, VirtualMachine, VirtualMachineClass
from orchestrator.resources.cpu import CpuRequest, NodeCpu, is_same, lacking
from orchestrator.resources.domain_xml import wanted_cpu
from orchestrator.resources.scheduling import untolerated


@dataclass(frozen=True, slots=True)
class Company:
    """The other VMs, as one VM's rules and theirs see them; asked at once, since the picture changes as plans grow."""

    key: Key
    neighbours: Neighbours

    def obstacle(self, node: str) -> str:
        """Say which rule keeps the VM off a node; empty when none does."""
        return self.neighbours.obstacle(self.key, node)

    def has_wishes(self) -> bool:
        """Whether `liking` tells nodes apart."""
        return self.neighbours.has_wishes(self.key)

    def liking(self, node: str) -> int:
        """Sum the weights that speak for a node."""
        return self.neighbours.liking(self.key, node)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a VM needs of a node.

    Attributes:
        memory_mib: With QEMU's overhead.
        where: What the node must be like.
        node_name: The only node allowed, or empty.
        exclude: Nodes that are out of the question (its own), with the reason.
        avoid: Nodes taken only when nothing else is left.
        inbound: Migrations that the node may receive at a time, this one included; 0 means no limit.
        starting: VMs that the node may start at a time, this one included; 0 means no limit.
        cpu: That the node must be able to give; None: any.
        like: Of a running guest that sees its host's own CPU: that host's.
        kvm: Whether the node must run domains by KVM.
        company: The rules between VMs; None where none concerns it.
    """

    memory_mib: int
    cpu_millicores: int
    where: Whereabouts
    node_name: str = ""
    exclude: Mapping[str, str] | None = None
    avoid: frozenset[str] = frozenset()
    inbound: int = 0
    starting: int = 0
    cpu: CpuRequest | None = None
    like: NodeCpu | None = None
    kvm: bool = False
    company: Company | None = None


def start_demand(vm: VirtualMachine, vm_class: VirtualMachineClass | None, overhead_mib: int) -> Demand:
    """Give what a VM needs of the node that is to start it.

    Args:
        vm: What is started is its spec.
        vm_class: The class that its spec names, with its CPU known.
        overhead_mib: QEMU's own memory.
    """
    wanted, machine = wanted_cpu(vm.spec, vm_class), vm.status.machine
    if machine is not None and machine.cpu is not None and wanted is not None and machine.cpu_from == str(wanted):
        wanted = machine.cpu.request  # it is to see the CPU that it saw before
    return Demand(
        memory_mib=vm.spec.memory_mib + overhead_mib,
        cpu_millicores=vm.spec.cpu_millicores,
        where=whereabouts(vm, vm_class),
        cpu=wanted,
    )


def move_demand(
    vm: VirtualMachine, vm_class: VirtualMachineClass | None, overhead_mib: int, source: NodeState
) -> Demand:
    """Give what a running VM needs of the node that it is to move to.

    Where it may be follows from its spec as it is now, what it takes along from the machine that runs.
    """
    spec, machine = vm.running_spec, vm.status.machine
    seen = machine.cpu.request if machine is not None and machine.cpu is not None else None
    if machine is not None and machine.domain_type not in {"", source.domain_type}:
        seen = None  # nodes tell of the CPUs that they give to the other kind of domain: libvirt refuses what can't be
    return Demand(
        memory_mib=spec.memory_mib + overhead_mib,
        cpu_millicores=spec.cpu_millicores,
        where=whereabouts(vm, vm_class),
        cpu=seen,
        like=source.cpu if seen is not None and seen.mode == "host-passthrough" else None,
        kvm=machine is not None and machine.domain_type == "kvm" and spec.domain_template is None,
    )


def class_obstacle(vm: VirtualMachine, vm_class: VirtualMachineClass | None) -> str:
    """Say why a VM can't be started for the sake of its class; empty when it can."""
    name = vm.spec.virtual_machine_class_name
    if name is None:
        return ""
    if vm_class is None:
        return f"VirtualMachineClass {name!r} not found"
    if vm_class.status.cpu is None or vm_class.status.observed_generation != vm_class.metadata.generation:
        told = next((c.message for c in vm_class.status.conditions if c.type == "Ready" and c.message), "")
        return f"VirtualMachineClass {name!r} has no CPU yet" + (f": {told}" if told else "")
    return ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The node chosen, or None; and why other nodes were refused, by name.

    Attributes:
        full: How many nodes fit, and receive as many migrations, or start as many VMs, as they may.
    """

    node: str | None
    refused: Mapping[str, str]
    full: int = 0

    def explain(self) -> str:
        """Say it as `0/3 nodes: 1 cordoned, 2 short of 512 MiB memory`."""
        counts = Counter(self.refused.values())
        parts = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        fitting = 0 if self.node is None else 1
        return f"{fitting}/{len(self.refused) + fitting} nodes: {parts}" if parts else "there is no node"


def refusal(node: NodeState, demand: Demand) -> str:
    """Say why a node can't take the VM; empty when it can.

    The reason names what is demanded, not how much is missing here: equal reasons can be counted, and one does not
    change with each VM that comes or goes.
    """
    if demand.exclude and node.name in demand.exclude:
        return demand.exclude[node.name]
    if not node.ready:
        return "not Ready"
    if node.shutting_down:
        return "shutting down"
    if node.cordoned:
        return "cordoned"
    if demand.node_name and node.name != demand.node_name:
        return f"not node {demand.node_name}"
    if reason := unsuited(node, demand):
        return reason
    if demand.company is not None and (reason := demand.company.obstacle(node.name)):
        return reason
    if node.memory_used_mib + demand.memory_mib > node.memory_mib:
        return f"short of {demand.memory_mib} MiB memory"
    if node.cpu_used_millicores + demand.cpu_millicores > node.cpu_millicores:
        return f"short of {demand.cpu_millicores} millicores CPU"
    return ""


def unsuited(node: NodeState, demand: Demand) -> str:
    """Say why a node is none for the VM by what it is, however empty; the empty string when it is one."""
    if reason := demand.where.unmet(node.name, node.labels) or demand.where.repelled(node.taints):
        return reason
    if demand.kvm and node.domain_type != "kvm":
        return "without KVM"
    if demand.like is not None and not is_same(node.cpu, demand.like):
        return "without an identical CPU"
    return lacking(node.cpu, demand.cpu)


def liking(node: NodeState, demand: Demand) -> int:
    """Sum the weights of the preferences that speak for a node."""
    company = demand.company.liking(node.name) if demand.company is not None else 0
    return demand.where.liking(node.name, node.labels) + company


def choose_node(nodes: Mapping[str, NodeState], demand: Demand) -> Choice:
    """Choose the node that is liked best, and of those the one on which the least share of CPU is reserved afterwards.

    Args:
        nodes: By name.
        demand: Memory and CPU in MiB and millicores.

    Returns:
        The choice, with a reason for every node that was refused.
    """
    refused: dict[str, str] = {}
    best: tuple[bool, int, int, float, str] | None = None
    full = 0
    for name in sorted(nodes):
        node = nodes[name]
        reason = refusal(node, demand)
        if reason:
            refused[name] = reason
            continue
        if 0 < demand.inbound <= node.inbound or 0 < demand.starting <= node.starting:
            full += 1
            continue
        share = (node.cpu_used_millicores + demand.cpu_millicores) / max(node.cpu_millicores, 1)
        disliked = len(untolerated(node.taints, demand.where.tolerations)) if node.taints else 0
        rank = (name in demand.avoid, disliked, -liking(node, demand), share, name)
        if best is None or rank < best:
            best = rank
    return Choice(best[-1] if best else None, refused, full)
