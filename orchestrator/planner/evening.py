"""Evening out: moves that make the nodes' shares more alike, for the least memory.

The measure is the weighted sum of the squares of each node's distance from the herd's own share, of CPU and of memory.
What one move does to it has a closed form, so all VMs of a node are weighed against all targets in one operation. The
node that is the furthest above is looked at first, and what gains the most for each MiB is done: one VM leaves, or,
where none is of the right size, two change places. That is the shape of the optimum of a liquid: the same peak is taken
off by many small VMs for less than by few large ones.

Only where a VM ends counts: one that was moved before is moved on for nothing, and back for less than nothing. In the
end each goes to its last place at once, as far as an order is found in which every step is legal.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.planner.table import Table
from orchestrator.resources.rebalancing import RebalanceSpec

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_LEAST_GAIN = 1e-6
"""Of the measure, for any move: a thousandth of a node's share."""
_TARGETS = 32
"""So many of the emptiest nodes are looked at first; the others only where these are refused, and not too full."""
_PARTNERS = 4
"""So many of the emptiest nodes are looked at for VMs to change places with."""


@dataclass(frozen=True, slots=True)
class Step:
    """A VM, its source and its target."""

    number: int
    source: int
    target: int


def even_out(table: Table, policy: RebalanceSpec, most: int, most_mib: int) -> list[Step]:
    """Make moves that even a herd out, on the table itself.

    Args:
        table: As it is; the moves are made on it.
        policy: Its weights and its deadband.
        most: So many VMs are moved at most, >= 0.
        most_mib: So much is sent at most, >= 0.

    Returns:
        The moves in order; each legal in its turn, and leaving its target within its limits.
    """
    evening = _Evening(table, policy, most, most_mib)
    made: list[Step] = []
    while moves := evening.next_moves():
        for number, target in moves:
            made.append(Step(number, table.at[number], target))
            evening.make(number, target)
    return _direct(table, made)


def _direct(table: Table, made: list[Step]) -> list[Step]:
    """Let each VM go to its last place at once, if there is an order in which that is legal; on the table too."""
    ends = {step.number: step.target for step in made}
    for step in reversed(made):
        table.move(step.number, step.source)
    left = [number for number, target in ends.items() if table.at[number] != target]
    steps: list[Step] = []
    while left:
        before = len(left)
        for number in list(left):
            target = ends[number]
            if table.targets(number, below_limits=True)[target] and not table.objection(number, target):
                steps.append(Step(number, table.at[number], target))
                table.move(number, target)
                left.remove(number)
        if len(left) == before:  # in a ring: the way round that was found first is legal
            for step in reversed(steps):
                table.move(step.number, step.source)
            for step in made:
                table.move(step.number, step.target)
            return made
    return steps


class _Evening:
    def __init__(self, table: Table, policy: RebalanceSpec, most: int, most_mib: int) -> None:
        self._table = table
        board = table.board
        self._left, self._left_mib = most, most_mib
        self._origin = np.array(table.at, dtype=np.int64)
        self._at = self._origin.copy()
        masks = {id(piece.suited): piece.suited for piece in table.pieces}
        rows = {name: row for row, name in enumerate(masks)}
        self._masks = np.array(list(masks.values()), dtype=np.bool_).reshape(len(masks), len(board.names)) & board.open
        self._mask_of = np.array([rows[id(piece.suited)] for piece in table.pieces], dtype=np.int64)
        self._weights = (policy.weights.cpu, policy.weights.memory)
        self._whole = (np.maximum(board.cpu_millicores, 1).astype(float), np.maximum(board.memory_mib, 1).astype(float))
        self._ideal = tuple(
            float(used[board.open].sum() / max(float(whole[board.open].sum()), 1.0))
            for used, whole in zip(self._used(), self._whole, strict=True)
        )
        self._distances = (np.zeros(len(board.names)), np.zeros(len(board.names)))
        self._measure(list(range(len(board.names))))
        self._deadband = policy.deadband_percent / 100
        self._exhausted = np.zeros(len(board.names), dtype=np.bool_)
        self._is_better = True

    def next_moves(self) -> list[tuple[int, int]]:
        """Give the next moves: one, or two that change places; none where nothing gains any more."""
        while True:
            source = self._fullest()
            if source is None:
                if not self._is_better:
                    return []
                self._exhausted[:] = False  # what was refused may be allowed since others have moved
                self._is_better = False
                continue
            numbers = self._movable(source)
            if len(numbers) and (moves := self._one_leaves(source, numbers) or self._two_change(source, numbers)):
                return moves
            self._exhausted[source] = True

    def make(self, number: int, target: int) -> None:
        """Make a move."""
        source = self._table.at[number]
        self._left_mib -= int(self._extra(np.array([number]), target)[0])
        self._left += int(target == self._origin[number]) - int(source == self._origin[number])
        self._table.move(number, target)
        self._at[number] = target
        self._measure([source, target])
        self._exhausted[[source, target]] = False
        self._is_better = True

    def _used(self) -> tuple[Ints, Ints]:
        return self._table.board.cpu_used_millicores, self._table.board.memory_used_mib

    def _measure(self, nodes: list[int]) -> None:
        """Measure anew how far some nodes are from the herd's own share."""
        for distance, used, whole, ideal in zip(self._distances, self._used(), self._whole, self._ideal, strict=True):
            distance[nodes] = used[nodes] / whole[nodes] - ideal

    def _fullest(self) -> int | None:
        """Give the node furthest above the mean that may have a move left."""
        above = [
            np.where(distance > self._deadband, distance, 0.0) * weight
            for distance, weight in zip(self._distances, self._weights, strict=True)
        ]
        height = np.where(self._table.board.open & ~self._exhausted, above[0] + above[1], 0.0)
        node = int(np.argmax(height))
        return node if height[node] > 0 else None

    def _movable(self, node: int) -> Ints:
        pieces = self._table.pieces
        return np.array([n for n in sorted(self._table.on[node]) if not pieces[n].pinned], dtype=np.int64)

    def _extra(self, numbers: Ints, targets: int | Ints) -> Ints:
        """Give what is sent more if VMs end on some nodes, and not where they are now; negative where it is less."""
        origin = self._origin[numbers]
        away = (origin != targets).astype(np.int64)
        return np.asarray(self._table.cost[numbers] * (away - (self._at[numbers] != origin)), dtype=np.int64)

    def _worth(self, gain: Floats, extra: Ints) -> Floats:
        """Give what is gained for each MiB, of what may be done at all; 0 otherwise."""
        worth = gain / np.maximum(extra, 1)
        return np.where((gain > _LEAST_GAIN) & (extra <= self._left_mib), worth, 0.0)

    def _one_leaves(self, source: int, numbers: Ints) -> list[tuple[int, int]]:
        heights = self._heights(source)
        nearest = np.argpartition(heights, _TARGETS)[:_TARGETS] if len(heights) > _TARGETS else np.arange(len(heights))
        found, may_gain = self._best_of(source, numbers, np.sort(nearest))
        if not found and may_gain and len(nearest) < len(heights):
            found, _ = self._best_of(source, numbers, np.arange(len(heights)))
        return found

    def _heights(self, source: int) -> Floats:
        """Give how full the nodes are that something may move to; others are infinitely high."""
        cpu, memory = self._distances
        heights = np.where(self._table.board.open, self._weights[0] * cpu + self._weights[1] * memory, np.inf)
        heights[source] = np.inf
        return heights

    def _best_of(self, source: int, numbers: Ints, nodes: Ints) -> tuple[list[tuple[int, int]], bool]:
        """Give the best move of a node's VMs to some nodes, and whether one would gain if it were allowed."""
        table = self._table
        gain = np.zeros((len(numbers), len(nodes)))
        amounts = (table.cpu[numbers], table.memory[numbers])
        for weight, whole, distance, amount in zip(self._weights, self._whole, self._distances, amounts, strict=True):
            out, into = amount / whole[source], amount[:, None] / whole[None, nodes]
            left = distance[source] ** 2 - (distance[source] - out) ** 2
            gain += weight * (left[:, None] - into * (2 * distance[None, nodes] + into))
        if not (gain > _LEAST_GAIN).any():
            return [], False
        origin, cost = self._origin[numbers][:, None], table.cost[numbers][:, None]
        extra = cost * ((origin != nodes[None, :]).astype(np.int64) - (origin != source))
        worth = self._worth(gain, extra)
        worth[~self._allowed(numbers, source, nodes)] = 0.0
        if self._left <= 0:
            worth[self._origin[numbers] == source] = 0.0
        while True:
            row, column = divmod(int(np.argmax(worth)), worth.shape[1])
            if worth[row, column] <= 0:
                return [], True
            if not table.objection(int(numbers[row]), int(nodes[column])):
                return [(int(numbers[row]), int(nodes[column]))], True
            worth[row, column] = 0.0

    def _allowed(self, numbers: Ints, source: int, nodes: Ints) -> npt.NDArray[np.bool_]:
        """Say where the VMs of a node may go for the nodes' sake (`Table.targets`), a row for each."""
        table, board = self._table, self._table.board
        allowed = self._masks[self._mask_of[numbers]][:, nodes]
        allowed &= table.cpu[numbers][:, None] <= (table.cpu_limit - board.cpu_used_millicores)[nodes]
        allowed &= table.memory[numbers][:, None] <= (table.memory_limit_mib - board.memory_used_mib)[nodes]
        allowed[:, nodes == source] = False
        return np.asarray(allowed, dtype=np.bool_)

    def _two_change(self, source: int, numbers: Ints) -> list[tuple[int, int]]:
        heights = self._heights(source)
        found: list[tuple[float, int, int, int]] = []
        for target in np.argsort(heights, kind="stable")[:_PARTNERS].tolist():
            others = self._movable(target) if np.isfinite(heights[target]) else np.zeros(0, dtype=np.int64)
            if not len(others):
                continue
            worth = self._worth_of_change(source, target, numbers, others)
            row, column = divmod(int(np.argmax(worth)), worth.shape[1])
            if worth[row, column] > 0:
                found.append((-float(worth[row, column]), int(numbers[row]), int(others[column]), target))
        for _, number, other, target in sorted(found):
            for moves in ([(number, target), (other, source)], [(other, source), (number, target)]):
                if self._is_legal(moves):
                    return moves
        return []

    def _worth_of_change(self, source: int, target: int, numbers: Ints, others: Ints) -> Floats:
        table = self._table
        gain = np.zeros((len(numbers), len(others)))
        amounts = ((table.cpu[numbers], table.cpu[others]), (table.memory[numbers], table.memory[others]))
        for weight, whole, distance, (mine, its) in zip(
            self._weights, self._whole, self._distances, amounts, strict=True
        ):
            out = (mine[:, None] - its[None, :]) / whole[source]
            into = (mine[:, None] - its[None, :]) / whole[target]
            gain += weight * (out * (2 * distance[source] - out) - into * (2 * distance[target] + into))
        extra = self._extra(numbers, target)[:, None] + self._extra(others, source)[None, :]
        worth = self._worth(gain, extra)
        worth[[not table.pieces[int(n)].suited[target] for n in numbers]] = 0.0
        worth[:, [not table.pieces[int(n)].suited[source] for n in others]] = 0.0
        fresh = (self._origin[numbers] == source).astype(int)[:, None] + (self._origin[others] == target).astype(int)
        worth[fresh > self._left] = 0.0
        return worth

    def _is_legal(self, moves: list[tuple[int, int]]) -> bool:
        """Whether two moves may be made one after the other."""
        table = self._table
        (first, target), (second, back) = moves
        home = table.at[first]
        if not table.targets(first, below_limits=True)[target] or table.objection(first, target):
            return False
        table.move(first, target)
        is_legal = bool(table.targets(second, below_limits=True)[back]) and not table.objection(second, back)
        table.move(first, home)
        return is_legal
