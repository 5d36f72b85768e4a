"""Evening out: moves that make the nodes' shares more alike, for the least memory.

The measure is the weighted sum of the squares of each node's distance from the herd's own share, of CPU and of memory.
What one move does to it has a closed form, so all VMs of a node are weighed against all targets in one operation. The
node that is the furthest above is looked at first, and what gains the most for each MiB is done: one VM leaves, or,
where none is of the right size, two change places. As long as neither node gets past the mean by it, each MiB counts
alike, and a large VM goes before a small one: the small ones are left for the end, where only they are of the right
size. In a large herd one operation does so for many full nodes: each
of them takes part in one move a round, and so does each of their targets.

Only where a VM ends counts: one that was moved before is moved on for nothing, and back for less than nothing. In the
end each goes to its last place at once, as far as an order is found in which every step is legal.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.planner.table import Table
from orchestrator.resources.rebalancing import RebalanceSpec

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_LEAST_GAIN = 1e-6
"""Of the measure, for any move: a thousandth of a node's share."""
_TARGETS = 32
"""So many of the emptiest nodes are looked at first; the others only where these are refused, and not too full."""
_PARTNERS = 8
"""So many of the emptiest nodes are looked at for VMs to change places with."""
_LARGE_FIRST = 0.001
"""By so much, at most, a large VM is preferred to a small one from and to the same nodes."""
_NODES_A_SOURCE = 64
"""One node of so many is looked at in the same round."""


@dataclass(frozen=True, slots=True)
class Step:
    """A VM, its source and its target."""

    number: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class _Rows:
    """VMs that may be moved, by node.

    Attributes:
        nodes: In order.
        numbers: Of the VMs of the first node, of the second, and so on; by number within one.
        at: The node of each.
        ends: After which row each node's end, and 0 before all.
    """

    nodes: Ints
    numbers: Ints
    at: Ints
    ends: list[int]

    def of(self, place: int) -> slice:
        """Give the rows of one of the nodes."""
        return slice(self.ends[place], self.ends[place + 1])


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
    return _direct(table, list(_Evening(table, policy, most, most_mib).steps()))


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
        self._is_movable = np.array([not piece.pinned for piece in table.pieces], dtype=np.bool_)
        masks = {id(piece.suited): piece.suited for piece in table.pieces}
        rows = {name: row for row, name in enumerate(masks)}
        self._masks = np.array(list(masks.values()), dtype=np.bool_).reshape(len(masks), len(board.names)) & board.open
        self._mask_of = np.array([rows[id(piece.suited)] for piece in table.pieces], dtype=np.int64)
        self._weights = (policy.weights.cpu, policy.weights.memory)
        self._amounts = (table.cpu, table.memory)
        self._whole = (np.maximum(board.cpu_millicores, 1).astype(float), np.maximum(board.memory_mib, 1).astype(float))
        self._used = (board.cpu_used_millicores, board.memory_used_mib)
        self._ideal = tuple(
            float(used[board.open].sum() / max(float(whole[board.open].sum()), 1.0))
            for used, whole in zip(self._used, self._whole, strict=True)
        )
        self._distances = tuple(
            used / whole - ideal for used, whole, ideal in zip(self._used, self._whole, self._ideal, strict=True)
        )
        self._deadband = policy.deadband_percent / 100
        self._exhausted = np.zeros(len(board.names), dtype=np.bool_)
        self._at_once = max(1, len(board.names) // _NODES_A_SOURCE)
        self._is_better = True

    def steps(self) -> Iterator[Step]:
        """Make moves on the table, as long as one gains."""
        while True:
            sources = self._fullest()
            if len(sources):
                yield from self._round(sources)
            elif self._is_better:
                self._exhausted[:] = False  # what was refused may be allowed since others have moved
                self._is_better = False
            else:
                return

    def _round(self, sources: Ints) -> list[Step]:
        """Have one VM leave each of some nodes, or change its place with another; each node takes part once at most."""
        rows = self._rows(sources)
        made, stuck = self._leave(rows)
        if len(stuck):
            changed, stuck = self._change(rows, stuck, {step.target for step in made})
            made += changed
        self._exhausted[stuck] = True
        touched = [node for step in made for node in (step.source, step.target)]
        self._exhausted[touched] = False
        return made

    def _make(self, number: int, target: int) -> Step:
        source = self._table.at[number]
        origin = int(self._origin[number])
        self._left_mib -= int(self._table.cost[number]) * ((origin != target) - (origin != source))
        self._left += int(target == origin) - int(source == origin)
        self._table.move(number, target)
        self._at[number] = target
        for distance, used, whole, ideal in zip(self._distances, self._used, self._whole, self._ideal, strict=True):
            distance[source] = used[source] / whole[source] - ideal
            distance[target] = used[target] / whole[target] - ideal
        self._is_better = True
        return Step(number, source, target)

    def _fullest(self) -> Ints:
        """Give the nodes furthest above the mean that may have a move left, the fullest first."""
        above = [
            np.where(distance > self._deadband, distance, 0.0) * weight
            for distance, weight in zip(self._distances, self._weights, strict=True)
        ]
        height = np.where(self._table.board.open & ~self._exhausted, above[0] + above[1], 0.0)
        if self._at_once == 1:
            nodes = np.array([np.argmax(height)])
        else:
            nodes = np.argpartition(-height, self._at_once)[: self._at_once]
            nodes = nodes[np.lexsort((nodes, -height[nodes]))]
        return np.asarray(nodes[height[nodes] > 0], dtype=np.int64)

    def _rows(self, nodes: Ints) -> _Rows:
        places = np.full(len(self._exhausted), -1, dtype=np.int64)
        places[nodes] = np.arange(len(nodes))
        place_of = places[self._at]
        numbers = np.flatnonzero((place_of >= 0) & self._is_movable)
        numbers = numbers[np.argsort(place_of[numbers], kind="stable")]
        ends = np.cumsum(np.bincount(place_of[numbers], minlength=len(nodes)))
        return _Rows(nodes, numbers, self._at[numbers], [0, *ends.tolist()])

    def _heights(self) -> Floats:
        """Give how full the nodes are that something may move to; others are infinitely high."""
        cpu, memory = self._distances
        return np.where(self._table.board.open, self._weights[0] * cpu + self._weights[1] * memory, np.inf)

    # --- one VM leaves ------------------------------------------------------------------------------------------------

    def _leave(self, rows: _Rows) -> tuple[list[Step], list[int]]:
        """Have a VM leave each node, the fullest first; gives the moves, and the nodes that none may leave."""
        heights = self._heights()
        count = _TARGETS + len(rows.nodes)
        is_all = len(heights) <= count
        targets = np.arange(len(heights)) if is_all else np.sort(np.argpartition(heights, count)[:count])
        worth, may_gain = self._worth_of_leaving(rows, targets)
        made: list[Step] = []
        stuck: list[int] = []
        used: set[int] = set()
        for place, source in enumerate(rows.nodes.tolist()):
            there = rows.of(place)
            if source in used:
                continue
            step = self._best(rows.numbers[there], targets, worth[there], used)
            if step is None and made and may_gain[there].any():
                continue  # one that others have taken may be left to it in the next round
            if step is None and not is_all and may_gain[there].any():
                step = self._leave_for_any(source)
            if step is None:
                stuck.append(source)
                continue
            made.append(step)
            used |= {step.source, step.target}
            worth[:, targets == step.target] = 0.0
        return made, stuck

    def _leave_for_any(self, source: int) -> Step | None:
        rows, targets = self._rows(np.array([source])), np.arange(len(self._exhausted))
        worth, _ = self._worth_of_leaving(rows, targets)
        return self._best(rows.numbers, targets, worth, set())

    def _best(self, numbers: Ints, targets: Ints, worth: Floats, used: set[int]) -> Step | None:
        """Make the best of some moves that no rule is against."""
        while worth.size:
            row, column = divmod(int(worth.argmax()), worth.shape[1])
            if worth[row, column] <= 0:
                return None
            number, target = int(numbers[row]), int(targets[column])
            if target not in used and self._is_paid(number, target) and not self._table.objection(number, target):
                return self._make(number, target)
            worth[row, column] = 0.0
        return None

    def _is_paid(self, number: int, target: int) -> bool:
        """Whether a move is within what is left to be moved, now that others of its round were made."""
        origin, at = int(self._origin[number]), int(self._at[number])
        extra = int(self._table.cost[number]) * ((origin != target) - (origin != at))
        return extra <= self._left_mib and (self._left > 0 or origin != at)

    def _worth_of_leaving(self, rows: _Rows, targets: Ints) -> tuple[Floats, Bools]:
        """Give what is gained for each MiB by VMs (rows) on nodes (columns), and who would gain, were it allowed."""
        table, numbers, at = self._table, rows.numbers, rows.at
        gain, slope = np.zeros((2, len(numbers), len(targets)))
        is_short = np.ones_like(gain, dtype=np.bool_)
        for weight, whole, distance, amounts in zip(
            self._weights, self._whole, self._distances, self._amounts, strict=True
        ):
            out = amounts[numbers] / whole[at]
            into = amounts[numbers][:, None] / whole[None, targets]
            slope += weight * 2 * ((out * distance[at])[:, None] - into * distance[None, targets])
            is_short &= (out <= distance[at])[:, None] & (into <= -distance[None, targets])
            gain += (weight * out * (2 * distance[at] - out))[:, None]
            gain -= weight * into * (2 * distance[None, targets] + into)
        may_gain = np.asarray((gain > _LEAST_GAIN).any(axis=1), dtype=np.bool_)
        origin = self._origin[numbers]
        extra = table.cost[numbers][:, None] * (
            (origin[:, None] != targets[None, :]).astype(np.int64) - (origin != at)[:, None]
        )
        worth = self._worth(gain, extra)
        is_short &= worth > 0
        size = 1 + _LARGE_FIRST * table.cost[numbers] / max(int(table.cost.max(initial=1)), 1)
        np.copyto(worth, slope * size[:, None] / np.maximum(extra, 1), where=is_short)
        board = table.board
        worth[~self._masks[self._mask_of[numbers][:, None], targets[None, :]]] = 0.0
        worth[table.cpu[numbers][:, None] > (table.cpu_limit - board.cpu_used_millicores)[targets]] = 0.0
        worth[table.memory[numbers][:, None] > (table.memory_limit_mib - board.memory_used_mib)[targets]] = 0.0
        worth[at[:, None] == targets[None, :]] = 0.0
        if self._left <= 0:
            worth[origin == at] = 0.0
        return worth, may_gain

    def _worth(self, gain: Floats, extra: Ints) -> Floats:
        """Give what is gained for each MiB, of what may be done at all; 0 otherwise."""
        worth = gain / np.maximum(extra, 1)
        worth[(gain <= _LEAST_GAIN) | (extra > self._left_mib)] = 0.0
        return worth

    # --- two change places --------------------------------------------------------------------------------------------

    def _change(self, rows: _Rows, sources: list[int], used: set[int]) -> tuple[list[Step], list[int]]:
        """Have a VM of each node change its place with one of the emptiest; gives the moves, and the nodes without."""
        heights = self._heights()
        emptiest = np.argsort(heights, kind="stable")[: _PARTNERS + 1]
        partners = self._rows(emptiest[np.isfinite(heights[emptiest])])
        rows = self._rows(np.array(sources)) if len(sources) < len(rows.nodes) else rows
        worth = self._worth_of_change(rows, partners)
        made: list[Step] = []
        stuck: list[int] = []
        for place, source in enumerate(sources):
            if source in used:
                continue
            found: list[tuple[float, int, int]] = []
            others = [which for which, partner in enumerate(partners.nodes.tolist()) if partner != source][:_PARTNERS]
            is_late = False
            for which in others:
                block = worth[rows.of(place), partners.of(which)]
                row, column = divmod(int(block.argmax()), block.shape[1]) if block.size else (0, 0)
                if block.size and block[row, column] > 0:
                    pair = rows.numbers[rows.of(place)][row], partners.numbers[partners.of(which)][column]
                    is_late |= int(partners.nodes[which]) in used
                    found.append((-float(block[row, column]), int(pair[0]), int(pair[1])))
            steps = self._change_one(sorted(found), used)
            made += steps
            used |= {node for step in steps for node in (step.source, step.target)}
            if not steps and not is_late:
                stuck.append(source)
        return made, stuck

    def _change_one(self, found: list[tuple[float, int, int]], used: set[int]) -> list[Step]:
        """Make the first of some changes of place that may be made."""
        for _, number, other in found:
            source, target = self._table.at[number], self._table.at[other]
            if target in used or not self._is_change_paid(number, other):
                continue
            for moves in ([(number, target), (other, source)], [(other, source), (number, target)]):
                if self._is_legal(moves):
                    return [self._make(*move) for move in moves]
        return []

    def _is_change_paid(self, number: int, other: int) -> bool:
        extra, fresh = 0, 0
        for one, target in ((number, int(self._at[other])), (other, int(self._at[number]))):
            origin, at = int(self._origin[one]), int(self._at[one])
            extra += int(self._table.cost[one]) * ((origin != target) - (origin != at))
            fresh += origin == at
        return extra <= self._left_mib and fresh <= self._left

    def _worth_of_change(self, rows: _Rows, partners: _Rows) -> Floats:
        """Give what is gained for each MiB if a VM of a node (rows) and one of another (columns) change places."""
        table, mine, its, home, there = self._table, rows.numbers, partners.numbers, rows.at, partners.at
        gain = np.zeros((len(mine), len(its)))
        for weight, whole, distance, amounts in zip(
            self._weights, self._whole, self._distances, self._amounts, strict=True
        ):
            amount = (amounts[mine][:, None] - amounts[its][None, :]).astype(float)
            out, into = amount / whole[home][:, None], amount / whole[there][None, :]
            gain += weight * (out * (2 * distance[home][:, None] - out) - into * (2 * distance[there][None, :] + into))
        if not (gain > _LEAST_GAIN).any():
            return np.zeros_like(gain)
        origin, its_origin = self._origin[mine], self._origin[its]
        extra = table.cost[mine][:, None] * (
            (origin[:, None] != there[None, :]).astype(int) - (origin != home)[:, None]
        )
        extra += table.cost[its] * ((its_origin[None, :] != home[:, None]).astype(int) - (its_origin != there))
        worth = self._worth(gain, extra)
        worth[~self._masks[self._mask_of[mine][:, None], there[None, :]]] = 0.0
        worth[~self._masks[self._mask_of[its][None, :], home[:, None]]] = 0.0
        worth[(origin == home).astype(int)[:, None] + (its_origin == there).astype(int) > self._left] = 0.0
        worth[home[:, None] == there[None, :]] = 0.0
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
