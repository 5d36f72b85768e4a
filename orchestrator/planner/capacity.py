"""Whether the herd could lose a node, or a whole rack, now: would all VMs that are to be restarted find a place?

It is the recovery that is planned here, before it is needed: the same filters, and all of one failure placed together.
What other nodes have left is one picture for all questions; each takes from it and gives back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from orchestrator.planner.board import Board, Mask
from orchestrator.planner.placement import Demand, class_obstacle, start_demand
from orchestrator.planner.preflight import home_of
from orchestrator.planner.snapshot import Snapshot
from orchestrator.resources import Condition, Key, RunPolicy, VirtualMachine

PROTECTED: Final = frozenset({RunPolicy.ALWAYS_ON, RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY})
DOMAIN_LABELS: Final = ("topology.kubernetes.io/zone", "topology.kubernetes.io/rack", "zone", "rack")
"""Labels whose nodes may fail together."""
FAILOVER_READY: Final = "FailoverReady"
DOMAIN_READY: Final = "FailureDomainReady"
_NAMED_AT_MOST = 3


@dataclass(frozen=True, slots=True)
class Failure:
    """What would come of the loss of some nodes.

    Attributes:
        nodes: Lost together.
        protected: How many VMs would have to be restarted.
        stranded: Those that would find no place, in order, with the reason; the reason of the first ones only.
    """

    nodes: tuple[str, ...]
    protected: int = 0
    stranded: Mapping[Key, str] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """Say it in one line."""
        if not self.protected:
            return "no VM would have to be restarted"
        if not self.stranded:
            return f"all {self.protected} VMs that would have to be restarted fit elsewhere"
        named = [f"{key} ({why})" if why else str(key) for key, why in list(self.stranded.items())[:_NAMED_AT_MOST]]
        more = len(self.stranded) - len(named)
        told = ", ".join(named) + (f" and {more} more" if more > 0 else "")
        return f"{len(self.stranded)} of {self.protected} VMs would find no place: {told}"


def single_failures(snapshot: Snapshot) -> dict[str, tuple[str, ...]]:
    """Give the loss of each node, by its name."""
    return {name: (name,) for name in sorted(snapshot.nodes)}


def domain_failures(snapshot: Snapshot) -> dict[str, tuple[str, ...]]:
    """Give the loss of each rack and zone that is not the whole herd, by `label=value`."""
    found: dict[str, list[str]] = {}
    for name in sorted(snapshot.nodes):
        for label in DOMAIN_LABELS:
            if (value := snapshot.nodes[name].labels.get(label)) is not None:
                found.setdefault(f"{label}={value}", []).append(name)
    return {domain: tuple(nodes) for domain, nodes in sorted(found.items()) if len(nodes) < len(snapshot.nodes)}


def plan_failures(snapshot: Snapshot, failures: Mapping[str, tuple[str, ...]]) -> dict[str, Failure]:
    """Say what would come of each of some losses, each by itself.

    Args:
        snapshot: With all VMs and residents.
        failures: Nodes that are lost together, by any name.

    Returns:
        By the same names.
    """
    watch = _Watch(snapshot)
    return {name: watch.lose(nodes) for name, nodes in failures.items()}


class _Watch:
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._board = Board(snapshot)
        self._on: dict[str, list[VirtualMachine]] = {}
        self._demands: dict[Key, Demand] = {}
        self._obstacles: dict[Key, str] = {}
        for key in sorted(snapshot.residents):
            vm = snapshot.vms.get(key)
            if vm is not None and vm.spec.run_policy in PROTECTED and vm.metadata.deletion_timestamp is None:
                self._on.setdefault(vm.status.node_name, []).append(vm)
        self._largest = (int(self._board.memory_mib.max(initial=1)), int(self._board.cpu_millicores.max(initial=1)))

    def lose(self, nodes: tuple[str, ...]) -> Failure:
        """Say what would come of the loss of some nodes."""
        vms = [vm for node in nodes for vm in self._on.get(node, ())]
        if not vms:
            return Failure(nodes)
        stranded = self._place(vms, nodes, is_tight=False)
        if stranded:
            stranded = min((stranded, self._place(vms, nodes, is_tight=True)), key=len)
        return Failure(nodes, len(vms), dict(sorted(stranded.items())))

    def _place(self, vms: list[VirtualMachine], nodes: tuple[str, ...], *, is_tight: bool) -> dict[Key, str]:
        """Place VMs together, and put the picture back; gives those that find no place."""
        board, neighbours = self._board, self._board.neighbours
        among = ~board.mask_of(nodes)
        lost = {key: neighbours.where(key) for key in (vm.key for vm in vms)}
        for key in lost:
            neighbours.put(key, ())
        taken: list[tuple[int, Demand]] = []
        left = [vm for vm in vms if not self._obstacle(vm)]
        left.sort(key=lambda vm: (-self._size(self._demand(vm)), vm.key))
        while left:
            before = len(left)
            left = [vm for vm in left if not self._put(vm, among, taken, is_tight=is_tight)]
            if len(left) == before:
                break
        stranded = {vm.key: why for vm in vms if (why := self._obstacle(vm))}
        for count, vm in enumerate(left):
            exclude = dict.fromkeys(nodes, "lost")
            demand = replace(self._demand(vm), exclude=exclude)
            stranded[vm.key] = board.explain(demand).explain() if count < _NAMED_AT_MOST else ""
        for node, demand in taken:
            board.give(node, demand)
        for key, where in lost.items():
            neighbours.put(key, where)
        return stranded

    def _put(self, vm: VirtualMachine, among: Mask, taken: list[tuple[int, Demand]], *, is_tight: bool) -> bool:
        board, demand = self._board, self._demand(vm)
        if demand.node_name:
            among = among & board.mask_of([demand.node_name])
        node = board.choose(demand, among, is_tight=is_tight)
        if node is None:
            return False
        board.take(node, demand)
        board.neighbours.put(vm.key, (board.names[node],))
        taken.append((node, demand))
        return True

    def _obstacle(self, vm: VirtualMachine) -> str:
        if vm.key not in self._obstacles:
            self._obstacles[vm.key] = class_obstacle(vm, self._snapshot.class_of(vm))
        return self._obstacles[vm.key]

    def _demand(self, vm: VirtualMachine) -> Demand:
        found = self._demands.get(vm.key)
        if found is None:
            snapshot = self._snapshot
            found = start_demand(vm, snapshot.class_of(vm), snapshot.memory_overhead_mib)
            found = replace(found, company=self._board.company(vm.key), node_name=home_of(vm))
            self._demands[vm.key] = found
        return found

    def _size(self, demand: Demand) -> float:
        memory, cpu = self._largest
        return max(demand.memory_mib / max(memory, 1), demand.cpu_millicores / max(cpu, 1))


def failover_condition(kind: str, failures: list[Failure]) -> Condition:
    """Make a node's condition of what would come of its loss, or of the loss of what it is in."""
    bad = [failure for failure in failures if failure.stranded]
    told = bad or failures
    return Condition(
        type=kind,
        status="False" if bad else "True",
        reason="VirtualMachinesStranded" if bad else "VirtualMachinesFit",
        message="; ".join(dict.fromkeys(failure.message for failure in told)),
    )
