"""Where several VMs go together: after a node is emptied, or has died.

Large ones are placed first, each on the node that is left with the largest share free; one that finds no place is tried
again after the others, since their coming may be what its affinity waits for. Where that strands a VM, all are placed
again by priority, so that what is left out is what matters least, and filling nodes up, so that more fit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from orchestrator.planner.board import Board
from orchestrator.planner.placement import Demand, class_obstacle, move_demand, start_demand
from orchestrator.planner.preflight import home_of, immovable
from orchestrator.planner.rules import resident
from orchestrator.planner.snapshot import Snapshot
from orchestrator.resources import Key, VirtualMachine


@dataclass(frozen=True, slots=True)
class Placement:
    """Where VMs go.

    Attributes:
        targets: Node by VM. Carried out in this order, each holds all rules and fits when its turn comes; and any that
            are carried out at once do, for VMs whose nodes are excluded.
        stranded: VMs that find no place, with the reason.
        after: Of VMs that rules concern, the earlier ones that their place depends on.
    """

    targets: Mapping[Key, str] = field(default_factory=dict)
    stranded: Mapping[Key, str] = field(default_factory=dict)
    after: Mapping[Key, frozenset[Key]] = field(default_factory=dict)


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
    first = _Try(snapshot, excluded, starting).run(wanted, by_priority=False)
    if not first.stranded:
        return first
    tries = (
        first,
        _Try(snapshot, excluded, starting).run(wanted, by_priority=True),
        _Try(snapshot, excluded, starting, is_tight=True).run(wanted, by_priority=True),
    )
    priorities = {vm.key: vm.spec.priority or 0 for vm in wanted}
    # By the priorities of what is stranded, highest first: the first try that leaves out the least important.
    return min(tries, key=lambda placed: sorted((priorities[key] for key in placed.stranded), reverse=True))


class _Try:
    def __init__(self, snapshot: Snapshot, excluded: frozenset[str], starting: bool, *, is_tight: bool = False) -> None:
        self._snapshot = snapshot
        self._excluded = excluded
        self._starting = starting
        self._is_tight = is_tight
        self._board = Board(snapshot)
        self._after: dict[Key, frozenset[Key]] = {}
        self._largest = (int(self._board.memory_mib.max(initial=1)), int(self._board.cpu_millicores.max(initial=1)))

    def run(self, vms: list[VirtualMachine], *, by_priority: bool) -> Placement:
        targets: dict[Key, str] = {}
        stranded: dict[Key, str] = {}
        demands: dict[Key, Demand] = {}
        for vm in vms:
            nodes = () if self._starting else self._residence(vm)
            self._board.neighbours.add(resident(vm, self._snapshot.class_of(vm), nodes))
        for vm in vms:
            if why := self._obstacle(vm):
                stranded[vm.key] = why
            else:
                demands[vm.key] = self._demand(vm)
        left = sorted(
            (vm for vm in vms if vm.key in demands),
            key=lambda vm: (-(vm.spec.priority or 0) if by_priority else 0, -self._size(demands[vm.key]), vm.key),
        )
        while left:
            before = len(left)
            left = [vm for vm in left if not self._place(vm, demands[vm.key], targets)]
            if len(left) == before:
                break
        stranded |= {vm.key: self._board.explain(demands[vm.key]).explain() for vm in left}
        return Placement(targets, dict(sorted(stranded.items())), self._after)

    def _place(self, vm: VirtualMachine, demand: Demand, targets: dict[Key, str]) -> bool:
        board = self._board
        among = ~board.mask_of(demand.exclude or ())
        if demand.node_name:
            among = board.mask_of([demand.node_name]) & among
        node = board.choose(demand, among, is_tight=self._is_tight)
        if node is None:
            return False
        if demand.company is not None and (earlier := board.neighbours.related(vm.key) & targets.keys()):
            self._after[vm.key] = frozenset(earlier)
        targets[vm.key] = board.names[node]
        board.take(node, demand)
        source = board.index.get(vm.status.node_name)
        if not self._starting and source is not None:
            board.give(source, demand)
        board.neighbours.put(vm.key, (board.names[node],))
        return True

    def _obstacle(self, vm: VirtualMachine) -> str:
        if self._starting:
            return class_obstacle(vm, self._snapshot.class_of(vm))
        tie = immovable(vm)
        return f"{tie[1]} ({tie[0]})" if tie is not None else ""

    def _demand(self, vm: VirtualMachine) -> Demand:
        snapshot, vm_class = self._snapshot, self._snapshot.class_of(vm)
        exclude = dict.fromkeys(sorted(self._excluded), "excluded")
        company = self._board.company(vm.key)
        source = snapshot.nodes.get(vm.status.node_name)
        if self._starting or source is None:
            demand = start_demand(vm, vm_class, snapshot.memory_overhead_mib)
            return replace(demand, exclude=exclude, company=company, node_name=home_of(vm))
        demand = move_demand(vm, vm_class, snapshot.memory_overhead_mib, source)
        return replace(demand, exclude={**exclude, source.name: "where it runs"}, company=company)

    def _residence(self, vm: VirtualMachine) -> tuple[str, ...]:
        known = self._snapshot.residents.get(vm.key)
        return known.nodes if known is not None else (vm.status.node_name,)

    def _size(self, demand: Demand) -> float:
        """Give the larger of the shares that a VM takes of the largest node."""
        memory, cpu = self._largest
        return max(demand.memory_mib / max(memory, 1), demand.cpu_millicores / max(cpu, 1))
