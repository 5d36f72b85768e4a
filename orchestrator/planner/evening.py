"""Evening out: moves that make the nodes' shares more alike, for the least memory.

The measure is the weighted sum of the squares of each node's distance from the herd's own share, of CPU and of memory.
What one move does to it has a closed form, so all VMs of a node are weighed against all targets in one operation. The
node that is the furthest above is looked at first, and the move that gains the most for each MiB is made. That is the
shape of the optimum of a liquid: the same peak is taken off by many small VMs for less than by few large ones.
"""

import numpy as np
import numpy.typing as npt

from orchestrator.planner.table import Table
from orchestrator.resources.rebalancing import RebalanceSpec

Floats = npt.NDArray[np.float64]
_LEAST_GAIN = 1e-9
"""Of the measure; keeps rounding from passing for a gain."""


def even_out(table: Table, policy: RebalanceSpec, most: int) -> list[tuple[int, int, int]]:
    """Make moves that even a herd out, on the table itself.

    Args:
        table: As it is; the moves are made on it.
        policy: Its weights and its deadband.
        most: So many moves at most, >= 0.

    Returns:
        Triples of a VM, its source and its target, in order; each legal, and leaving its target within its limits.
    """
    evening = _Evening(table, policy)
    made: list[tuple[int, int, int]] = []
    while len(made) < most and (move := evening.next_move()) is not None:
        number, target = move
        made.append((number, table.at[number], target))
        evening.make(number, target)
    return made


class _Evening:
    def __init__(self, table: Table, policy: RebalanceSpec) -> None:
        self._table = table
        board = table.board
        self._open = board.open
        self._weights = (policy.weights.cpu, policy.weights.memory)
        self._whole = (np.maximum(board.cpu_millicores, 1).astype(float), np.maximum(board.memory_mib, 1).astype(float))
        self._ideal = tuple(
            float(used[board.open].sum() / max(float(whole[board.open].sum()), 1.0))
            for used, whole in zip(self._used(), self._whole, strict=True)
        )
        self._deadband = policy.deadband_percent / 100
        self._exhausted = np.zeros(len(board.names), dtype=np.bool_)
        self._progress = True

    def next_move(self) -> tuple[int, int] | None:
        """Give the next move; None where no VM of a node above the mean gains by any."""
        while True:
            source = self._fullest()
            if source is None:
                if not self._progress:
                    return None
                self._exhausted[:] = False  # what was refused may be allowed since others have moved
                self._progress = False
                continue
            if (move := self._best_from(source)) is not None:
                return move
            self._exhausted[source] = True

    def make(self, number: int, target: int) -> None:
        """Make a move."""
        source = self._table.at[number]
        self._table.move(number, target)
        self._exhausted[[source, target]] = False
        self._progress = True

    def _used(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return self._table.board.cpu_used_millicores, self._table.board.memory_used_mib

    def _distances(self) -> tuple[Floats, Floats]:
        cpu, memory = (
            used / whole - ideal for used, whole, ideal in zip(self._used(), self._whole, self._ideal, strict=True)
        )
        return cpu, memory

    def _fullest(self) -> int | None:
        """Give the node furthest above the mean that may have a move left."""
        above = [
            np.where(distance > self._deadband, distance, 0.0) * weight
            for distance, weight in zip(self._distances(), self._weights, strict=True)
        ]
        height = np.where(self._open & ~self._exhausted, above[0] + above[1], 0.0)
        node = int(np.argmax(height))
        return node if height[node] > 0 else None

    def _best_from(self, source: int) -> tuple[int, int] | None:
        table = self._table
        numbers = np.array([n for n in sorted(table.on[source]) if not table.pieces[n].pinned], dtype=np.int64)
        if not len(numbers):
            return None
        gain = np.zeros((len(numbers), len(self._open)))
        amounts = (table.cpu[numbers], table.memory[numbers])
        for weight, whole, distance, amount in zip(self._weights, self._whole, self._distances(), amounts, strict=True):
            out = amount / whole[source]
            into = amount[:, None] / whole[None, :]
            before, after = distance[source], distance[source] - out
            gain += weight * ((before**2 - after**2)[:, None] - into * (2 * distance[None, :] + into))
        worth = np.where(gain > _LEAST_GAIN, gain / table.cost[numbers][:, None], 0.0)
        worth[~self._allowed(numbers, source)] = 0.0
        while True:
            best = int(np.argmax(worth))
            row, target = divmod(best, worth.shape[1])
            if worth[row, target] <= 0:
                return None
            if not table.objection(int(numbers[row]), target):
                return int(numbers[row]), target
            worth[row, target] = 0.0

    def _allowed(self, numbers: npt.NDArray[np.int64], source: int) -> npt.NDArray[np.bool_]:
        """Say where the VMs of a node may go for the nodes' sake (`Table.targets`), a row for each."""
        table, board = self._table, self._table.board
        allowed = np.array([table.pieces[int(number)].suited for number in numbers]) & board.open
        allowed &= table.cpu[numbers][:, None] <= table.cpu_limit - board.cpu_used_millicores
        allowed &= table.memory[numbers][:, None] <= table.memory_limit_mib - board.memory_used_mib
        allowed[:, source] = False
        return allowed
