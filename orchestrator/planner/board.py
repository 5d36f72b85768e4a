"""The herd as arrays: what nodes have left, which of them suit a VM, and where it goes best.

A plan of many moves asks the same of all nodes again and again. Here each question is one operation on arrays of all
nodes. `placement` says the same of one node in words; the tests hold the two together. What runs where, and what is
taken, changes as a plan grows (`take`, `give`, `put`).
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from orchestrator.planner.neighbours import Neighbours
from orchestrator.planner.placement import Choice, Company, Demand, liking, refusal
from orchestrator.planner.rules import EVERY_NODE, Resident
from orchestrator.planner.snapshot import NodeState, Snapshot
from orchestrator.resources import Key
from orchestrator.resources.cpu import is_same, lacking
from orchestrator.resources.scheduling import NodeLabels, TaintEffect, Toleration, untolerated

Mask: TypeAlias = npt.NDArray[np.bool_]
Amounts: TypeAlias = npt.NDArray[np.int64]


class Board:
    """A working picture of the herd.

    Args:
        snapshot: Its nodes, with what they take.
        residents: VMs as the rules between them see them; by default all of the snapshot.

    Attributes:
        names: Of the nodes, sorted; all arrays are in this order.
        states: As they were.
        open: Ready and not cordoned.
        memory_mib, cpu_millicores: What VMs may take.
        memory_used_mib, cpu_used_millicores: What is taken; change them by `take` and `give`.
    """

    def __init__(self, snapshot: Snapshot, residents: Iterable[Resident] | None = None) -> None:
        self.names = sorted(snapshot.nodes)
        self.index = {name: number for number, name in enumerate(self.names)}
        self.states = [snapshot.nodes[name] for name in self.names]
        self.open = self._each(lambda node: node.schedulable)
        self.memory_mib = self._amount(lambda node: node.memory_mib)
        self.cpu_millicores = self._amount(lambda node: node.cpu_millicores)
        self.memory_used_mib = self._amount(lambda node: node.memory_used_mib)
        self.cpu_used_millicores = self._amount(lambda node: node.cpu_used_millicores)
        self.neighbours = Neighbours(snapshot.nodes, snapshot.residents.values() if residents is None else residents)
        self._masks: dict[Hashable, Mask] = {}
        self._kept: list[NodeLabels] = []  # their ids are keys of masks

    def take(self, node: int, demand: Demand) -> None:
        """Count a VM on a node."""
        self.memory_used_mib[node] += demand.memory_mib
        self.cpu_used_millicores[node] += demand.cpu_millicores

    def give(self, node: int, demand: Demand) -> None:
        """Count a VM on a node no more."""
        self.memory_used_mib[node] -= demand.memory_mib
        self.cpu_used_millicores[node] -= demand.cpu_millicores

    def company(self, key: Key) -> Company | None:
        """Give the other VMs as a VM's rules see them; None where no rule concerns it."""
        return Company(key, self.neighbours) if self.neighbours.is_bound(key) else None

    def suited(self, demand: Demand) -> Mask:
        """Say which nodes suit a VM by what they are, however full (`placement.unsuited`). Not to be changed."""
        where = demand.where
        parts = [self._tolerated(where.tolerations)]
        parts += [self._labelled(key, value) for key, value in where.labels.items()]
        if where.class_labels is not EVERY_NODE:
            parts.append(self._of_class(where.class_labels))
        if where.affinity is not None:
            affinity = where.affinity
            parts.append(self._mask(affinity, lambda node: affinity.holds(node.name, node.labels)))
        if demand.kvm:
            parts.append(self._mask("kvm", lambda node: node.domain_type == "kvm"))
        if demand.like is not None:
            like = demand.like
            parts.append(self._mask(("like", like), lambda node: is_same(node.cpu, like)))
        if demand.cpu is not None and demand.cpu.mode == "custom":
            wanted = demand.cpu
            parts.append(self._mask(("cpu", wanted), lambda node: not lacking(node.cpu, wanted)))
        if len(parts) == 1:
            return parts[0]
        key = tuple(id(part) for part in parts)
        return self._masks.setdefault(key, np.logical_and.reduce(parts)) if key not in self._masks else self._masks[key]

    def with_room(self, demand: Demand) -> Mask:
        """Say which nodes have the memory and the CPU."""
        has_memory = self.memory_used_mib + demand.memory_mib <= self.memory_mib
        has_cpu = self.cpu_used_millicores + demand.cpu_millicores <= self.cpu_millicores
        return has_memory & has_cpu

    def shares_with(self, demand: Demand) -> npt.NDArray[np.float64]:
        """Give the larger of the shares of memory and CPU that each node would have taken with the VM."""
        memory = (self.memory_used_mib + demand.memory_mib) / np.maximum(self.memory_mib, 1)
        cpu = (self.cpu_used_millicores + demand.cpu_millicores) / np.maximum(self.cpu_millicores, 1)
        return np.maximum(memory, cpu)

    def choose(self, demand: Demand, among: Mask, *, is_tight: bool = False) -> int | None:
        """Choose a node for a VM.

        Args:
            demand: Of the VM.
            among: Nodes that may be chosen, of those that are open, suit it, and have the room.
            is_tight: Prefer the fullest node instead of the one with the smallest share taken afterwards.

        Returns:
            The node; None where none is left. Names break ties.
        """
        fitting = np.flatnonzero(among & self.open & self.suited(demand) & self.with_room(demand))
        if not len(fitting):
            return None
        shares = self.shares_with(demand)[fitting] * (-1 if is_tight else 1)
        if demand.company is None and not self._has_wishes(demand):
            return int(fitting[np.argmin(shares)])
        order = fitting[np.argsort(shares, kind="stable")]
        if self._has_wishes(demand):
            wishes = {node: self._wish(self.states[node], demand) for node in order.tolist()}
            order = np.array(sorted(order.tolist(), key=wishes.__getitem__))
        if demand.company is None:
            return int(order[0])
        return next((node for node in order.tolist() if not demand.company.obstacle(self.names[node])), None)

    def refusal(self, node: int, demand: Demand) -> str:
        """Say why a node can't take a VM as things stand now; empty when it can."""
        memory, cpu = int(self.memory_used_mib[node]), int(self.cpu_used_millicores[node])
        return refusal(replace(self.states[node], memory_used_mib=memory, cpu_used_millicores=cpu), demand)

    def explain(self, demand: Demand) -> Choice:
        """Say of each node why it is refused, as things stand now."""
        refused = {name: self.refusal(node, demand) for node, name in enumerate(self.names)}
        return Choice(None, {name: why or "passed over" for name, why in refused.items()})

    def mask_of(self, names: Iterable[str]) -> Mask:
        """Give the mask of some nodes; those that are not there count for nothing."""
        mask = np.zeros(len(self.names), dtype=np.bool_)
        mask[[self.index[name] for name in names if name in self.index]] = True
        return mask

    def _has_wishes(self, demand: Demand) -> bool:
        has_company = demand.company is not None and demand.company.has_wishes()
        return bool(demand.where.preferred) or has_company or self._are_disliked()

    def _are_disliked(self) -> bool:
        return bool(self._mask("soft taints", lambda node: any(t.effect is _SOFT for t in node.taints)).any())

    def _wish(self, node: NodeState, demand: Demand) -> tuple[int, int]:
        return len(untolerated(node.taints, demand.where.tolerations)), -liking(node, demand)

    def _tolerated(self, tolerations: tuple[Toleration, ...]) -> Mask:
        def is_open(node: NodeState) -> bool:
            return not untolerated((taint for taint in node.taints if taint.effect is not _SOFT), tolerations)

        return self._mask(("taints", tolerations), is_open)

    def _labelled(self, key: str, value: str) -> Mask:
        return self._mask(("label", key, value), lambda node: node.labels.get(key) == value)

    def _of_class(self, wanted: NodeLabels) -> Mask:
        if ("class", id(wanted)) not in self._masks:
            self._kept.append(wanted)
        return self._mask(("class", id(wanted)), lambda node: wanted.holds(node.labels))

    def _mask(self, key: Hashable, holds: Callable[[NodeState], bool]) -> Mask:
        found = self._masks.get(key)
        if found is None:
            found = self._masks[key] = self._each(holds)
        return found

    def _each(self, holds: Callable[[NodeState], bool]) -> Mask:
        return np.array([holds(node) for node in self.states], dtype=np.bool_)

    def _amount(self, amount: Callable[[NodeState], int]) -> Amounts:
        return np.array([amount(node) for node in self.states], dtype=np.int64)


_SOFT = TaintEffect.PREFER_NO_SCHEDULE
