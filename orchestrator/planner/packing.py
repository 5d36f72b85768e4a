"""Where several VMs go together: after a node is emptied, or has died.

Large ones are placed first, each on the node that is left with the largest share free; one that finds no place is tried
again after the others, since their coming may be what its affinity waits for. Where that strands a VM, all are placed
again by priority, so that what is left out is what matters least, and filling nodes up, so that more fit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from orchestrator.planner.neighbours import Neighbours
from orchestrator.planner.placement import (
    Choice,
    Company,
    Demand,
    choose_node,
    class_obstacle,
    liking,
    move_demand,
    refusal,
    start_demand,
)
from orchestrator.planner.preflight import home_of, immovable
from orchestrator.planner.rules import resident
from orchestrator.planner.snapshot import NodeState, Snapshot
from orchestrator.resources import Key, VirtualMachine


@dataclass(frozen=True, slots=True)
class Placement:
    """Where VMs go.

    Attributes:
        targets: Node by VM. Carried out in this order, each holds all rules and fits when its turn comes; and any that
            are carried out at once do, for VMs whose nodes are excluded.
        stranded: VMs that find no place, with the reason.
    """

    targets: Mapping[Key, str] = field(default_factory=dict)
    stranded: Mapping[Key, str] = field(default_factory=dict)


def place_all(
    snapshot: Snapshot,
    vms: Iterable[VirtualMachine],
    *,
    excluded: frozenset[str],
    starting: bool = False,
) -> Placement:
    """Place VMs together.

    Args:
        snapshot: With all residents.
        vms: In any order.
        excluded: Nodes on which none of them may land.
        starting: They run nowhere, or on nodes that are lost, and are started; otherwise they move away from where they
            run, by live migration.

    Returns:
        Every VM is among the targets or stranded. Deterministic.
    """
    wanted = sorted(vms, key=lambda vm: vm.key)
    tries = [_Try(snapshot, excluded, starting).run(wanted, by_priority=False)]
    if tries[0].stranded:
        tries.append(_Try(snapshot, excluded, starting).run(wanted, by_priority=True))
        tries.append(_Try(snapshot, excluded, starting, is_tight=True).run(wanted, by_priority=True))
    priorities = {vm.key: vm.spec.priority or 0 for vm in wanted}
    # What is stranded by priority, highest first: the first try that leaves out the least important ones.
    return min(tries, key=lambda placed: sorted((priorities[key] for key in placed.stranded), reverse=True))


@dataclass(slots=True)
class _Try:
    snapshot: Snapshot
    excluded: frozenset[str]
    starting: bool
    is_tight: bool = False
    _nodes: dict[str, NodeState] = field(init=False)
    _neighbours: Neighbours = field(init=False)

    def __post_init__(self) -> None:
        self._nodes = dict(self.snapshot.nodes)
        self._neighbours = Neighbours(self.snapshot.nodes, self.snapshot.residents.values())

    def run(self, vms: list[VirtualMachine], *, by_priority: bool) -> Placement:
        targets: dict[Key, str] = {}
        stranded: dict[Key, str] = {}
        demands: dict[Key, Demand] = {}
        for vm in vms:
            if why := self._obstacle(vm):
                stranded[vm.key] = why
            else:
                demands[vm.key] = self._demand(vm)
        ordered = sorted(
            (vm for vm in vms if vm.key in demands),
            key=lambda vm: (-(vm.spec.priority or 0) if by_priority else 0, -self._size(demands[vm.key]), vm.key),
        )
        while ordered:
            left = []
            for vm in ordered:
                choice = self._choose(demands[vm.key])
                if choice.node is None:
                    left.append(vm)
                    stranded[vm.key] = choice.explain()
                else:
                    stranded.pop(vm.key, None)
                    targets[vm.key] = choice.node
                    self._take(vm, demands[vm.key], choice.node)
            if len(left) == len(ordered):
                break
            ordered = left
        return Placement(targets, dict(sorted(stranded.items())))

    def _obstacle(self, vm: VirtualMachine) -> str:
        if self.starting:
            return class_obstacle(vm, self.snapshot.class_of(vm))
        tie = immovable(vm)
        return f"{tie[1]} ({tie[0]})" if tie is not None else ""

    def _demand(self, vm: VirtualMachine) -> Demand:
        snapshot, vm_class = self.snapshot, self.snapshot.class_of(vm)
        exclude = dict.fromkeys(self.excluded, "excluded")
        nodes = () if self.starting else self._residence(vm)
        self._neighbours.add(resident(vm, vm_class, nodes))
        company = Company(vm.key, self._neighbours) if self._neighbours.is_bound(vm.key) else None
        if self.starting:
            demand = start_demand(vm, vm_class, snapshot.memory_overhead_mib)
            return replace(demand, exclude=exclude, company=company, node_name=home_of(vm))
        source = snapshot.nodes.get(vm.status.node_name)
        if source is None:
            demand = start_demand(vm, vm_class, snapshot.memory_overhead_mib)
        else:
            demand = move_demand(vm, vm_class, snapshot.memory_overhead_mib, source)
        return replace(demand, exclude={**exclude, vm.status.node_name: "where it runs"}, company=company)

    def _residence(self, vm: VirtualMachine) -> tuple[str, ...]:
        known = self.snapshot.residents.get(vm.key)
        return known.nodes if known is not None else (vm.status.node_name,)

    def _size(self, demand: Demand) -> float:
        """Give the larger of the shares that a VM takes of the largest node."""
        memory = max((node.memory_mib for node in self._nodes.values()), default=0)
        cpu = max((node.cpu_millicores for node in self._nodes.values()), default=0)
        return max(demand.memory_mib / max(memory, 1), demand.cpu_millicores / max(cpu, 1))

    def _choose(self, demand: Demand) -> Choice:
        if not self.is_tight:
            return choose_node(self._nodes, demand)
        refused = {name: refusal(node, demand) for name, node in sorted(self._nodes.items())}
        fitting = [self._nodes[name] for name, why in refused.items() if not why]
        best = min(
            fitting,
            key=lambda node: (-liking(node, demand), node.memory_mib - node.memory_used_mib, node.name),
            default=None,
        )
        return Choice(best.name if best else None, {name: why for name, why in refused.items() if why})

    def _take(self, vm: VirtualMachine, demand: Demand, node: str) -> None:
        target = self._nodes[node]
        self._nodes[node] = replace(
            target,
            memory_used_mib=target.memory_used_mib + demand.memory_mib,
            cpu_used_millicores=target.cpu_used_millicores + demand.cpu_millicores,
        )
        source = self._nodes.get(vm.status.node_name)
        if not self.starting and source is not None:
            self._nodes[source.name] = replace(
                source,
                memory_used_mib=source.memory_used_mib - demand.memory_mib,
                cpu_used_millicores=source.cpu_used_millicores - demand.cpu_millicores,
            )
        self._neighbours.put(vm.key, (node,))
