"""The herd on the table: every VM that could be moved, where it is, and which moves are allowed.

A move is legal when its target is open, suits the VM, has the room while the VM is on both nodes, holds the VM's rules,
and when no rule of another VM that holds now is broken by it. Plans are made of legal moves, one after the other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from orchestrator.planner.board import Amounts, Board, Mask
from orchestrator.planner.placement import Demand, move_demand
from orchestrator.planner.preflight import GOOD_FOR, copied_mib, immovable, question_about
from orchestrator.planner.snapshot import Snapshot
from orchestrator.resources import Key, VirtualMachine, VmPhase
from orchestrator.resources.rebalancing import REBALANCE_ANNOTATION, RebalanceSpec


@dataclass(frozen=True, slots=True)
class Piece:
    """One VM that runs.

    Attributes:
        cost_mib: What is sent when it moves: its memory, and disks that are copied.
        pinned: Why it may not be moved; empty when it may.
        is_bound: Whether rules between VMs concern it.
    """

    key: Key
    demand: Demand
    suited: Mask
    cost_mib: int
    pinned: str
    is_bound: bool


class Table:
    """What is where.

    Attributes:
        pieces: By number; all arrays of VMs are in this order.
        at: The node of each.
        on: The VMs of each node.
        cpu_limit, memory_limit_mib: Of each node, what may be taken without its being over a threshold.
    """

    def __init__(
        self, snapshot: Snapshot, policy: RebalanceSpec, resting: Mapping[Key, str] = MappingProxyType({})
    ) -> None:
        self.board = board = Board(snapshot)
        self.cpu_limit = board.cpu_millicores * policy.thresholds.cpu // 100
        self.memory_limit_mib = board.memory_mib * policy.thresholds.memory // 100
        self.pieces: list[Piece] = []
        self.at: list[int] = []
        self._numbers: dict[Key, int] = {}
        self.on: list[set[int]] = [set() for _ in board.names]
        self._leaving_cpu = np.zeros(len(board.names), dtype=np.int64)
        self._leaving_memory = np.zeros(len(board.names), dtype=np.int64)
        for key in sorted(snapshot.vms):
            vm = snapshot.vms[key]
            node = board.index.get(vm.status.node_name)
            if node is not None and vm.status.phase.occupies_node and key in snapshot.residents:
                self._add(snapshot, vm, node)
        self._let_rest(resting)
        self.cpu = np.array([piece.demand.cpu_millicores for piece in self.pieces], dtype=np.int64)
        self.memory = np.array([piece.demand.memory_mib for piece in self.pieces], dtype=np.int64)
        self.cost = np.array([piece.cost_mib for piece in self.pieces], dtype=np.int64)

    def _add(self, snapshot: Snapshot, vm: VirtualMachine, node: int) -> None:
        board, key, state = self.board, vm.key, self.board.states[node]
        demand = move_demand(vm, snapshot.class_of(vm), snapshot.memory_overhead_mib, state)
        company = board.company(key)
        demand = demand if company is None else replace(demand, company=company)
        suited = board.suited(demand)
        if unfit := _unfit(snapshot, vm, board):
            suited = suited.copy()
            suited[unfit] = False
        number = self._numbers[key] = len(self.pieces)
        self.pieces.append(
            Piece(
                key=key,
                demand=demand,
                suited=suited,
                cost_mib=vm.running_spec.memory_mib + copied_mib(vm),
                pinned=_pinned(snapshot, vm) or ("" if state.ready else f"node {state.name} is not Ready"),
                is_bound=company is not None,
            )
        )
        self.at.append(node)
        self.on[node].add(number)
        if len(snapshot.residents[key].nodes) > 1:
            self._leaving_cpu[node] += demand.cpu_millicores
            self._leaving_memory[node] += demand.memory_mib

    def _let_rest(self, resting: Mapping[Key, str]) -> None:
        """Pin VMs that have moved lately, unless they must not stay where they are."""
        for number, piece in enumerate(self.pieces):
            if piece.key in resting and not piece.pinned and not self.wrong(number):
                self.pieces[number] = replace(piece, pinned=resting[piece.key])

    def over(self) -> tuple[Amounts, Amounts]:
        """Give by how much each node is over its limits once those that leave it now are gone: millicores, MiB.

        Negative where it is below.
        """
        cpu = self.board.cpu_used_millicores - self._leaving_cpu - self.cpu_limit
        memory = self.board.memory_used_mib - self._leaving_memory - self.memory_limit_mib
        return cpu, memory

    def overloaded(self) -> list[int]:
        """Give the nodes over a threshold that VMs may land on, those that are the most over first."""
        board = self.board
        cpu, memory = self.over()
        excess = np.maximum(cpu / np.maximum(board.cpu_millicores, 1), memory / np.maximum(board.memory_mib, 1))
        found = np.flatnonzero((np.maximum(cpu, memory) > 0) & board.open)
        return [int(node) for node in found[np.argsort(-excess[found], kind="stable")]]

    def is_over(self, node: int) -> bool:
        """Whether a node is over a threshold once those that leave it now are gone."""
        board = self.board
        cpu = board.cpu_used_millicores[node] - self._leaving_cpu[node] > self.cpu_limit[node]
        memory = board.memory_used_mib[node] - self._leaving_memory[node] > self.memory_limit_mib[node]
        return bool(cpu or memory)

    def targets(self, number: int, *, below_limits: bool) -> Mask:
        """Say which nodes a VM may move to, as far as no other VM's rule, or its own about others, is against it."""
        piece, board = self.pieces[number], self.board
        mask = piece.suited & board.open
        if below_limits:
            mask &= board.memory_used_mib + piece.demand.memory_mib <= self.memory_limit_mib
            mask &= board.cpu_used_millicores + piece.demand.cpu_millicores <= self.cpu_limit
        else:
            mask &= board.with_room(piece.demand)
        mask[self.at[number]] = False
        return mask

    def has_room_beside(self, number: int, node: int, others: list[int]) -> bool:
        """Whether a VM that fits on a node would fit as well if some others were there too.

        To fit within the limits where it does so now, or else within what there is.
        """
        board = self.board
        for cpu, memory in ((self.cpu_limit, self.memory_limit_mib), (board.cpu_millicores, board.memory_mib)):
            cpu_left = int(cpu[node] - board.cpu_used_millicores[node] - self.cpu[number])
            memory_left = int(memory[node] - board.memory_used_mib[node] - self.memory[number])
            if cpu_left >= 0 and memory_left >= 0:
                return cpu_left >= int(self.cpu[others].sum()) and memory_left >= int(self.memory[others].sum())
        return False

    def objection(self, number: int, node: int) -> str:
        """Say which rule between VMs is against a move; empty when none is."""
        piece, name = self.pieces[number], self.board.names[node]
        if not piece.is_bound:
            return ""
        neighbours = self.board.neighbours
        return neighbours.obstacle(piece.key, name) or neighbours.breaks(piece.key, name, self._is_misplaced)

    def legal_targets(self, number: int, *, below_limits: bool) -> Iterator[int]:
        """Give the nodes that a VM may move to, those that stay the emptiest first."""
        fitting = np.flatnonzero(self.targets(number, below_limits=below_limits))
        shares = self.board.shares_with(self.pieces[number].demand)[fitting]
        for node in fitting[np.argsort(shares, kind="stable")].tolist():
            if not self.objection(number, node):
                yield node

    def move(self, number: int, node: int) -> None:
        """Carry a move out; also to take one back."""
        piece, old = self.pieces[number], self.at[number]
        self.board.give(old, piece.demand)
        self.board.take(node, piece.demand)
        if piece.is_bound:
            self.board.neighbours.put(piece.key, (self.board.names[node],))
        self.on[old].discard(number)
        self.on[node].add(number)
        self.at[number] = node

    def wrong(self, number: int) -> str:
        """Say why a VM must not be where it is; empty when it may, or is on its way."""
        piece, node = self.pieces[number], self.at[number]
        neighbours, name = self.board.neighbours, self.board.names[node]
        if len(neighbours.where(piece.key)) > 1:
            return ""
        if reason := self.misplaced(number, node):
            return reason
        return neighbours.obstacle(piece.key, name) if piece.is_bound else ""

    def misplaced(self, number: int, node: int) -> str:
        """Say why a VM must not be on a node for what that is; what a host lacks of a CPU is no matter once it runs."""
        piece = self.pieces[number]
        if piece.suited[node]:
            return ""
        state, where = self.board.states[node], piece.demand.where
        return where.unmet(state.name, state.labels) or where.repelled(state.taints)

    def _is_misplaced(self, key: Key) -> bool:
        number, nodes = self._numbers.get(key), self.board.neighbours.where(key)
        return number is not None and len(nodes) == 1 and bool(self.misplaced(number, self.board.index[nodes[0]]))


def _pinned(snapshot: Snapshot, vm: VirtualMachine) -> str:
    if vm.key in snapshot.busy:
        return snapshot.busy[vm.key]
    if vm.status.phase is not VmPhase.RUNNING or vm.metadata.deletion_timestamp is not None:
        return f"it is {vm.status.phase}"
    if vm.metadata.annotations.get(REBALANCE_ANNOTATION) == "false":
        return f"its annotation {REBALANCE_ANNOTATION} says so"
    if (tie := immovable(vm)) is not None:
        return tie[1]
    return ""


def _unfit(snapshot: Snapshot, vm: VirtualMachine, board: Board) -> list[int]:
    """Number the nodes that have answered that the VM can't arrive there."""
    if not vm.status.arrivals:
        return []
    about = question_about(vm)
    return [
        board.index[name]
        for name, arrival in sorted(vm.status.arrivals.items())
        if name in board.index
        and arrival.problems
        and (arrival.about, arrival.generation) == (about, snapshot.nodes[name].generation)
        and snapshot.now - arrival.answered_at < GOOD_FOR
    ]
