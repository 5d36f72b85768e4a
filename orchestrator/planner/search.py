"""The cheapest sequence of legal moves to a goal, by A*, in a small part of the herd.

What single moves can't reach takes a sequence: one VM makes room for another, two change places through a third node.
The number of arrangements grows as nodes to the power of VMs, so the part of the herd that is looked at is small, and
the search ends after so many arrangements. Within them it misses nothing: where it ends by itself, its answer is the
cheapest, and no answer means that there is none.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from orchestrator.planner.table import Table

_EXACT_COVER = 10
_NEVER = 2**62


@dataclass(frozen=True, slots=True)
class Goal:
    """When it is reached.

    Attributes:
        right: VMs that must be where they may be.
        relieved: Nodes that must be within their limits.
        below_limits: Whether moves must leave their targets within their limits, and not only within what there is.
    """

    right: tuple[int, ...] = ()
    relieved: tuple[int, ...] = ()
    below_limits: bool = True


@dataclass(slots=True)
class Budget:
    """How many arrangements may still be looked at."""

    states: int


def cheapest_sequence(
    table: Table,
    pieces: Sequence[int],
    nodes: Sequence[int],
    goal: Goal,
    budget: Budget,
    *,
    cheaper_than_mib: int | None = None,
) -> list[tuple[int, int]] | None:
    """Find the cheapest moves to a goal.

    Args:
        table: As it is; it is the same afterwards.
        pieces: VMs that may be moved; each is on one of the nodes.
        nodes: Where they may go.
        goal: Of this part of the herd.
        budget: Is used up; nothing is found with none left.
        cheaper_than_mib: What costs as much or more is no answer.

    Returns:
        Pairs of a VM and the node that it moves to, in order, each legal in its turn; None where none was found.
    """
    search = _Search(table, tuple(pieces), tuple(nodes), goal)
    bound = _NEVER if cheaper_than_mib is None else cheaper_than_mib
    try:
        return search.run(budget, bound)
    finally:
        search.restore()


_State = tuple[int, ...]


class _Search:
    def __init__(self, table: Table, pieces: tuple[int, ...], nodes: tuple[int, ...], goal: Goal) -> None:
        self._table = table
        self._pieces = pieces
        self._nodes = nodes
        self._goal = goal
        self._start: _State = tuple(table.at[number] for number in pieces)
        self._now = self._start
        board = table.board
        self._cpu = [int(table.cpu[number]) for number in pieces]
        self._memory = [int(table.memory[number]) for number in pieces]
        self._cost = [int(table.cost[number]) for number in pieces]
        self._bound = [place for place, number in enumerate(pieces) if table.pieces[number].is_bound]
        self._open = {
            node: [bool(board.open[node] and table.pieces[number].suited[node]) for number in pieces] for node in nodes
        }
        cpu_limit = table.cpu_limit if goal.below_limits else board.cpu_millicores
        memory_limit = table.memory_limit_mib if goal.below_limits else board.memory_mib
        # What is left of each node without these VMs: to land on it, and to be relieved.
        self._left = {
            node: (
                int(cpu_limit[node] - board.cpu_used_millicores[node]) + self._sum(self._cpu, node),
                int(memory_limit[node] - board.memory_used_mib[node]) + self._sum(self._memory, node),
            )
            for node in nodes
        }
        cpu_over, memory_over = table.over()
        self._relief = {
            node: (
                self._sum(self._cpu, node) - int(cpu_over[node]),
                self._sum(self._memory, node) - int(memory_over[node]),
            )
            for node in goal.relieved
        }
        self._covers: dict[tuple[int, tuple[int, ...]], int] = {}

    def _sum(self, amounts: list[int], node: int) -> int:
        return sum(amount for amount, at in zip(amounts, self._start, strict=True) if at == node)

    def run(self, budget: Budget, bound: int) -> list[tuple[int, int]] | None:
        start = self._start
        best: dict[_State, int] = {start: 0}
        came: dict[_State, tuple[_State, int, int]] = {}
        heap = [(self._least(start), 0, 0, start)]
        pushed = 0
        while heap and budget.states:
            estimate, steps, _, state = heapq.heappop(heap)
            if estimate >= bound:
                return None
            cost = best[state]
            if estimate > cost + self._least(state):
                continue  # a cheaper way to it was found since
            budget.states -= 1
            self._become(state)
            if self._is_goal(state):
                return self._way(state, came)
            for place, node in self._successors(state):
                after = (*state[:place], node, *state[place + 1 :])
                reached = cost + self._cost[place]
                if reached >= best.get(after, _NEVER):
                    continue
                least = self._least(after)
                if reached + least >= bound:
                    continue
                best[after] = reached
                came[after] = (state, place, node)
                pushed += 1
                heapq.heappush(heap, (reached + least, steps + 1, pushed, after))
        return None

    def restore(self) -> None:
        """Put the rules' picture back as it was."""
        self._become(self._start)

    def _become(self, state: _State) -> None:
        """Have the rules' picture show an arrangement."""
        table = self._table
        for place in self._bound:
            if self._now[place] != state[place]:
                key = table.pieces[self._pieces[place]].key
                table.board.neighbours.put(key, (table.board.names[state[place]],))
        self._now = state

    def _successors(self, state: _State) -> Iterator[tuple[int, int]]:
        left = {}
        for node in self._nodes:
            cpu, memory = self._left[node]
            for place, at in enumerate(state):
                if at == node:
                    cpu -= self._cpu[place]
                    memory -= self._memory[place]
            left[node] = cpu, memory
        for place, number in enumerate(self._pieces):
            for node in self._nodes:
                cpu, memory = left[node]
                if state[place] == node or not self._open[node][place]:
                    continue
                has_room = self._cpu[place] <= cpu and self._memory[place] <= memory
                if has_room and not self._table.objection(number, node):
                    yield place, node

    def _is_goal(self, state: _State) -> bool:
        if any(self._cover(node, state) for node in self._goal.relieved):
            return False
        return not any(self._is_wrong(number, state) for number in self._goal.right)

    def _is_wrong(self, number: int, state: _State) -> bool:
        place = self._pieces.index(number) if number in self._pieces else -1
        node = state[place] if place >= 0 else self._table.at[number]
        piece = self._table.pieces[number]
        if self._table.misplaced(number, node):
            return True
        board = self._table.board
        return piece.is_bound and bool(board.neighbours.obstacle(piece.key, board.names[node]))

    def _least(self, state: _State) -> int:
        """Give what the rest costs at least: what must leave its node has to move once."""
        relief = sum(self._cover(node, state) for node in self._goal.relieved)
        repair = sum(
            self._cost[place]
            for place, number in enumerate(self._pieces)
            if number in self._goal.right and self._table.misplaced(number, state[place])
        )
        return max(relief, repair)

    def _cover(self, node: int, state: _State) -> int:
        """Give the least cost of VMs that must leave a node so that it is within its limits."""
        there = tuple(place for place, at in enumerate(state) if at == node)
        found = self._covers.get((node, there))
        if found is None:
            cpu, memory = self._relief[node]
            cpu = sum(self._cpu[place] for place in there) - cpu
            memory = sum(self._memory[place] for place in there) - memory
            found = self._covers[node, there] = self._cheapest_cover(there, cpu, memory)
        return found

    def _cheapest_cover(self, there: tuple[int, ...], cpu: int, memory: int) -> int:
        if cpu <= 0 and memory <= 0:
            return 0
        if len(there) > _EXACT_COVER:
            cpu_price = min((self._cost[p] / self._cpu[p] for p in there), default=0)
            memory_price = min((self._cost[p] / self._memory[p] for p in there), default=0)
            return int(max(cpu * cpu_price, memory * memory_price))
        costs = (
            sum(self._cost[p] for p in chosen)
            for count in range(1, len(there) + 1)
            for chosen in combinations(there, count)
            if sum(self._cpu[p] for p in chosen) >= cpu and sum(self._memory[p] for p in chosen) >= memory
        )
        return min(costs, default=_NEVER)

    def _way(self, state: _State, came: dict[_State, tuple[_State, int, int]]) -> list[tuple[int, int]]:
        moves = []
        while state in came:
            before, place, node = came[state]
            moves.append((self._pieces[place], node))
            state = before
        return moves[::-1]
