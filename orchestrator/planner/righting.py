"""The steps that put a herd right, on a table that shows it as it will be after the steps so far.

Single moves are tried first: they are found at once, however large the herd. Where they don't help, a sequence is
searched for; in a small herd also where they do, since the cheapest plan may be another one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from orchestrator.planner.evening import even_out
from orchestrator.planner.relief import relieve
from orchestrator.planner.search import Budget, Goal, cheapest_sequence
from orchestrator.planner.table import Table
from orchestrator.planner.telling import considered, load_of
from orchestrator.resources.rebalancing import RebalanceSpec

_MOST_STATES = 4_000
"""Arrangements that are looked at in one plan; some seconds at the very worst."""
_SMALL_NODES, _SMALL_PIECES = 6, 16
"""A herd of this size, as far as its VMs may be moved, is searched as a whole."""
_NEARBY_NODES, _NEARBY_PIECES = 5, 14
_MOST_SEARCHES = 4
"""In a larger one, so many searches in a part of this size, at most, in one plan."""


class Cause(StrEnum):
    """Why a VM is moved."""

    PLACEMENT = "placement"
    LOAD = "load"
    EVENNESS = "evenness"


@dataclass(frozen=True, slots=True)
class Step:
    """One move as it is planned; `note` is why it is made, where what is wrong is not with itself or its node."""

    number: int
    source: int
    target: int
    cause: Cause
    note: str = ""


class Righting:
    """One plan in the making, on a table that shows the herd as it will be after the steps so far."""

    def __init__(self, table: Table, policy: RebalanceSpec, patient_with: frozenset[str]) -> None:
        self.table = table
        self._policy = policy
        self._patient = {table.board.index[name] for name in patient_with if name in table.board.index}
        self._steps: list[Step] = []
        movable = [number for number, piece in enumerate(table.pieces) if not piece.pinned]
        self._is_small = len(table.board.names) <= _SMALL_NODES and len(movable) <= _SMALL_PIECES
        self._movable = movable
        self._searches = _MOST_SEARCHES
        self._budget = Budget(_MOST_STATES)

    def run(self) -> None:
        """Look for steps until there are none, or more than one scan may make."""
        if not self._policy.even_out:
            self._put_right()
            self._search_all()
            return
        self._repair()
        while not self._is_full():
            before = len(self._steps)
            sent_mib = sum(self.table.pieces[step.number].cost_mib for step in self._steps)
            left_mib = max(self._policy.max_gib * 1024 - sent_mib, 0)
            found = even_out(self.table, self._policy, self._policy.max_moves + 1 - before, left_mib)
            self._steps += [Step(step.number, step.source, step.target, Cause.EVENNESS) for step in found]
            self._put_right()  # what evening out leaves: it takes off peaks by itself, and with them most of the load
            if len(self._steps) == before:
                return

    def taken_back(self) -> list[Step]:
        """Give the steps, with the table as it was before the first."""
        for step in reversed(self._steps):
            self.table.move(step.number, step.source)
        return self._steps

    def unresolved(self) -> dict[str, str]:
        """Say what is still wrong."""
        table, told = self.table, {}
        for number, why in self._wrong().items():
            piece, name = table.pieces[number], table.board.names[table.at[number]]
            stays = piece.pinned or considered(table, number, below_limits=False)
            told[f"vm/{piece.key}"] = f"on node {name} it is {why}, and stays there: {stays}"
        for node in self._over():
            told[f"node/{table.board.names[node]}"] = f"{load_of(table, node)}, and nothing helps that may be moved"
        return told

    def _is_full(self) -> bool:
        return len(self._steps) > self._policy.max_moves

    def _wrong(self) -> dict[int, str]:
        """Give the VMs that are where they must not be, the cheapest to move first, with the reason."""
        table = self.table
        asked = (n for n, piece in enumerate(table.pieces) if piece.is_bound or not piece.suited[table.at[n]])
        found = {number: why for number in asked if (why := table.wrong(number))}
        return dict(sorted(found.items(), key=lambda item: (table.pieces[item[0]].cost_mib, item[0])))

    def _over(self) -> list[int]:
        return [node for node in self.table.overloaded() if node not in self._patient]

    def _make(self, moves: Iterable[tuple[int, int]], cause: Cause, note: str = "") -> bool:
        made = False
        for number, target in moves:
            self._steps.append(Step(number, self.table.at[number], target, cause, note))
            self.table.move(number, target)
            made = True
        return made

    def _put_right(self) -> None:
        """Repair and relieve, by single moves as long as they help, and then by sequences."""
        while not self._is_full():
            is_better = self._repair()
            is_better |= self._relieve()
            # Half measures last: what they take up may be what a whole one needs.
            if not is_better and not self._search() and not self._relieve(partly=True):
                return

    def _repair(self) -> bool:
        is_better = False
        for number in self._wrong():
            if self._is_full():
                break
            if self.table.pieces[number].pinned or not self.table.wrong(number):
                continue
            target = next(self.table.legal_targets(number, below_limits=True), None)
            if target is None:
                target = next(self.table.legal_targets(number, below_limits=False), None)
            if target is not None:
                is_better |= self._make([(number, target)], Cause.PLACEMENT)
        return is_better

    def _relieve(self, *, partly: bool = False) -> bool:
        is_better = False
        for node in self._over():
            if self._is_full():
                break
            is_better |= self._make(relieve(self.table, node, partly=partly), Cause.LOAD)
        return is_better

    def _search(self) -> bool:
        """Find a sequence of moves for the first thing that single moves don't put right."""
        names = self.table.board.names
        for number in self._wrong():
            note = f"makes room for {self.table.pieces[number].key} on the way to a node that it may be on"
            goal = Goal(right=(number,), below_limits=False)
            if self._make(self._sequence(goal, self.table.at[number], number), Cause.PLACEMENT, note):
                return True
        for node in self._over():
            note = f"makes room, so that node {names[node]} can be relieved"
            if self._make(self._sequence(Goal(relieved=(node,)), node), Cause.LOAD, note):
                return True
        return False

    def _sequence(self, goal: Goal, node: int, wrong: int | None = None) -> list[tuple[int, int]]:
        """Search for the cheapest sequence to a goal: in the whole of a small herd, or else near a node."""
        if self._is_small:
            pieces, nodes = self._movable, list(range(len(self.table.board.names)))
        elif self._searches:
            self._searches -= 1
            nodes = self._nearby_nodes(node, wrong)
            pieces = self._nearby_pieces(nodes, wrong)
        else:
            return []
        return cheapest_sequence(self.table, pieces, nodes, goal, self._budget) or []

    def _nearby_nodes(self, node: int, wrong: int | None) -> list[int]:
        """Give a node and those that have the most left; for a VM, of those that suit it."""
        board = self.table.board
        cpu = (board.cpu_millicores - board.cpu_used_millicores) / np.maximum(board.cpu_millicores, 1)
        memory = (board.memory_mib - board.memory_used_mib) / np.maximum(board.memory_mib, 1)
        by_room = np.argsort(-np.minimum(cpu, memory), kind="stable")
        suited = board.open if wrong is None else board.open & self.table.pieces[wrong].suited
        found = [node, *(int(other) for other in by_room[suited[by_room]] if other != node)][: _NEARBY_NODES - 1]
        spare = next((int(other) for other in by_room[board.open[by_room]] if other not in found), None)
        return found if spare is None else [*found, spare]

    def _nearby_pieces(self, nodes: list[int], wrong: int | None) -> list[int]:
        """Give VMs on some nodes: first those that the rules of the one that is wrong concern, then the cheapest."""
        table = self.table
        there = [n for node in nodes for n in table.on[node] if not table.pieces[n].pinned]
        key = table.pieces[wrong].key if wrong is not None else None
        related = table.board.neighbours.related(key) if key is not None else frozenset()
        there.sort(key=lambda n: (n != wrong, table.pieces[n].key not in related, table.pieces[n].cost_mib, n))
        return sorted(there[:_NEARBY_PIECES])

    def _search_all(self) -> None:
        """See whether all that was wrong in a small herd can be put right for less, or where it could not so far.

        Where nothing could be done at all, each search for a part of it has failed, and there is no way to the whole.
        """
        if not self._is_small or not self._steps:
            return
        is_whole = not self._wrong() and not self._over()
        cost_mib = sum(self.table.pieces[step.number].cost_mib for step in self._steps)
        found_so_far = self.taken_back()
        self._steps = []
        wrong, over = tuple(self._wrong()), tuple(self._over())
        goals = [Goal(wrong, over)] if is_whole else [Goal(wrong, over), Goal(wrong, below_limits=False)]
        cause = Cause.LOAD if over else Cause.PLACEMENT
        nodes = list(range(len(self.table.board.names)))
        for goal in goals:
            bound = cost_mib if is_whole else None
            found = cheapest_sequence(self.table, self._movable, nodes, goal, self._budget, cheaper_than_mib=bound)
            if self._make(found or (), cause, "makes room for other moves of this plan"):
                self._put_right()
                return
        for step in found_so_far:
            self._make([(step.number, step.target)], step.cause, step.note)
