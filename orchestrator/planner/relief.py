"""Which VMs leave a node that has too much reserved, so that the least memory is moved.

Which of them is a covering problem: the cheapest set that frees enough. It is solved by branch and bound, as far as so
many steps carry, and then each of the set is given a node. Where nothing else helps, the VMs that free the most for
what they cost go one by one, as far as they find a place: less than enough is better than nothing.
"""

import math

from orchestrator.planner.table import Table

_MOST_STEPS = 2_000
_NEVER = float("inf")


def relieve(table: Table, node: int, *, partly: bool = False) -> list[tuple[int, int]]:
    """Choose moves that bring a node within its limits; each leaves its target within its own.

    Args:
        table: As it is; it is the same afterwards.
        node: Is over a limit.
        partly: Choose moves that bring it nearer to them.

    Returns:
        Pairs of a VM and the node that it moves to, in order; empty where there are none.
    """
    need = (int(table.over()[0][node]), int(table.over()[1][node]))
    items = [number for number in sorted(table.on[node]) if not table.pieces[number].pinned]
    items = [number for number in items if bool(table.targets(number, below_limits=True).any())]
    if partly:
        return _one_by_one(table, node, items, need)
    cover = _Cover(table, items).cheapest(*need)
    return _assigned(table, node, cover) if cover is not None else []


def _assigned(table: Table, home: int, cover: list[int]) -> list[tuple[int, int]]:
    """Give each of some VMs of a node another one, the largest first; nothing where one of them finds none."""
    moves: list[tuple[int, int]] = []
    for number in sorted(cover, key=lambda number: (-int(table.memory[number]), -int(table.cpu[number]), number)):
        target = next(table.legal_targets(number, below_limits=True), None)
        if target is None:
            break
        moves.append((number, target))
        table.move(number, target)
    for number, _ in reversed(moves):
        table.move(number, home)
    return moves if len(moves) == len(cover) else []


def _one_by_one(table: Table, home: int, items: list[int], need: tuple[int, int]) -> list[tuple[int, int]]:
    cpu, memory = need
    moves: list[tuple[int, int]] = []
    for number in sorted(items, key=lambda number: (_price(table, number, need), number)):
        if cpu <= 0 and memory <= 0:
            break
        target = next(table.legal_targets(number, below_limits=True), None)
        if target is not None:
            moves.append((number, target))
            table.move(number, target)
            cpu -= int(table.cpu[number])
            memory -= int(table.memory[number])
    for number, _ in reversed(moves):
        table.move(number, home)
    return moves


def _price(table: Table, number: int, need: tuple[int, int]) -> float:
    """Give what a VM costs for each part of what is to be freed that it frees."""
    freed = (int(table.cpu[number]), int(table.memory[number]))
    parts = [min(amount / wanted, 1.0) for amount, wanted in zip(freed, need, strict=True) if wanted > 0]
    return int(table.cost[number]) / sum(parts)


class _Cover:
    """Branch and bound for the cheapest set of VMs that frees enough of both."""

    def __init__(self, table: Table, items: list[int]) -> None:
        self._table = table
        self._items = items
        self._best: tuple[float, list[int]] | None = None
        self._steps = 0

    def cheapest(self, cpu: int, memory: int) -> list[int] | None:
        """Find it; None where all of them together free too little."""
        table, need = self._table, (cpu, memory)
        self._items.sort(key=lambda number: (_price(table, number, need), number))
        self._cpu = [int(table.cpu[number]) for number in self._items]
        self._memory = [int(table.memory[number]) for number in self._items]
        self._cost = [int(table.cost[number]) for number in self._items]
        self._cpu_price = self._least_prices(self._cpu)
        self._memory_price = self._least_prices(self._memory)
        self._unit = math.gcd(*self._cost)  # sizes are mostly round: sums fall on few values, and bounds between two
        if sum(self._cpu) < cpu or sum(self._memory) < memory:
            return None
        self._look(0, [], 0, cpu, memory)
        return self._best[1] if self._best is not None else None

    def _least_prices(self, amounts: list[int]) -> list[float]:
        """Give the least cost of a unit among the VMs from each place on."""
        prices = [_NEVER]
        for cost, amount in zip(reversed(self._cost), reversed(amounts), strict=True):
            prices.append(min(prices[-1], cost / amount if amount else _NEVER))
        return prices[::-1]

    def _look(self, place: int, chosen: list[int], cost: int, cpu: int, memory: int) -> None:
        if cpu <= 0 and memory <= 0:
            if self._best is None or cost < self._best[0]:
                self._best = cost, list(chosen)
            return
        self._steps += 1
        if place == len(self._items) or (self._steps > _MOST_STEPS and self._best is not None):
            return
        least = max(
            cpu * self._cpu_price[place] if cpu > 0 else 0, memory * self._memory_price[place] if memory > 0 else 0
        )
        if self._best is not None and cost + math.ceil(least / self._unit) * self._unit >= self._best[0]:
            return
        chosen.append(self._items[place])
        self._look(place + 1, chosen, cost + self._cost[place], cpu - self._cpu[place], memory - self._memory[place])
        chosen.pop()
        after = place + 1
        while after < len(self._items) and self._is_alike(place, after):
            after += 1  # without this one, others like it would only be the same again
        self._look(after, chosen, cost, cpu, memory)

    def _is_alike(self, one: int, other: int) -> bool:
        same = (self._cpu[one], self._memory[one], self._cost[one]) == (
            self._cpu[other],
            self._memory[other],
            self._cost[other],
        )
        pieces = self._table.pieces
        mine, its = pieces[self._items[one]], pieces[self._items[other]]
        return same and not mine.is_bound and not its.is_bound and mine.suited is its.suited
