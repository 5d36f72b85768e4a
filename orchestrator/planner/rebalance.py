"""How a herd is put right by live migration: rules first, then load; and why each move is made.

1. VMs that are where they must not be (rules or labels were changed after they came) move to where they may be.
2. Nodes over a threshold are relieved, at the least memory moved, onto nodes that stay at or below it.
3. If asked for, the rest is evened out.

Thresholds are per node, so that a large herd is treated like a small one, and a herd that meets them is left alone.
Every step makes the herd better by a measure (rules broken, then load over the thresholds, then unevenness), and steps
are looked for until there is none: so a plan for its own result is empty.

Each move is legal when its turn comes. It says which earlier ones it needs (`after`): without those, it is not to be
made; all others may be made at the same time, and any of them may fail.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from orchestrator.planner.righting import Cause, Righting, Step
from orchestrator.planner.snapshot import Snapshot
from orchestrator.planner.table import Table
from orchestrator.planner.telling import considered, reason_for
from orchestrator.resources import Key
from orchestrator.resources.rebalancing import RebalanceSpec

LEAST_NODES = 2


@dataclass(frozen=True, slots=True)
class Move:
    """One migration of a plan.

    Attributes:
        cost_mib: What is sent: memory, and disks that are copied.
        why: What is wrong, and what the move does about it.
        considered: What was found of the other nodes.
        after: Numbers of earlier moves of the plan that it needs.
    """

    vm: Key
    source: str
    target: str
    cause: Cause
    cost_mib: int
    why: str
    considered: str = ""
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Moves in order.

    Attributes:
        over: Nodes over a threshold before the plan.
        unresolved: What no move can put right, by VM or node, with the reason; not known of a plan that was cut.
        is_cut: Whether there would be more moves than one scan may make.
    """

    moves: tuple[Move, ...] = ()
    over: tuple[str, ...] = ()
    unresolved: Mapping[str, str] = field(default_factory=dict)
    is_cut: bool = False


def plan_rebalance(
    snapshot: Snapshot,
    policy: RebalanceSpec,
    *,
    patient_with: frozenset[str] = frozenset(),
    resting: Mapping[Key, str] = MappingProxyType({}),
) -> Plan:
    """Plan the moves of one scan.

    Args:
        snapshot: With all VMs and residents. Those in `busy` are not moved.
        policy: Whether it is enabled is not looked at here.
        patient_with: Nodes that are not relieved yet, though they are over a threshold.
        resting: VMs that are not moved for load, with the reason.

    Returns:
        The plan; for its own result, if that was not cut, it is empty. Deterministic.
    """
    if sum(node.ready for node in snapshot.nodes.values()) < LEAST_NODES:
        return Plan()
    table = Table(snapshot, policy, resting)
    over = tuple(table.board.names[node] for node in table.overloaded())
    righting = Righting(table, policy, patient_with)
    righting.run()
    unresolved = righting.unresolved()
    steps = righting.taken_back()
    kept = _within_budget(table, steps, policy)
    is_cut = len(kept) < len(steps)
    return Plan(_told(table, kept), over, {} if is_cut else unresolved, is_cut)


def _within_budget(table: Table, steps: list[Step], policy: RebalanceSpec) -> list[Step]:
    """Cut a plan to what one scan may move; the first move is always made, however large."""
    left_mib = policy.max_gib * 1024
    for count, step in enumerate(steps):
        left_mib -= table.pieces[step.number].cost_mib
        if count == policy.max_moves or (left_mib < 0 and count):
            return steps[:count]
    return steps


def _told(table: Table, steps: list[Step]) -> tuple[Move, ...]:
    """Give a plan's moves with their reasons, by going through them once more."""
    moves: list[Move] = []
    from_node: dict[int, list[int]] = defaultdict(list)
    of_piece: dict[Key, list[int]] = defaultdict(list)
    for number, step in enumerate(steps):
        piece, names = table.pieces[step.number], table.board.names
        cause, why = step.cause, step.note
        if wrong := table.wrong(step.number):
            cause, why = Cause.PLACEMENT, f"on node {names[step.source]} it is {wrong}"
        elif not step.note or table.is_over(step.source):
            why = reason_for(table, step.number, step.target)
        related = table.board.neighbours.related(piece.key) if piece.is_bound else frozenset()
        left = [earlier for earlier in from_node[step.target] if table.at[steps[earlier].number] != step.target]
        needed = {*of_piece[piece.key], *(earlier for key in related for earlier in of_piece.get(key, ()))}
        if left and not table.has_room_beside(step.number, step.target, [steps[earlier].number for earlier in left]):
            needed |= set(left)
        from_node[step.source].append(number)
        of_piece[piece.key].append(number)
        moves.append(
            Move(
                vm=piece.key,
                source=names[step.source],
                target=names[step.target],
                cause=cause,
                cost_mib=piece.cost_mib,
                why=why,
                considered=considered(table, step.number, below_limits=cause is not Cause.PLACEMENT),
                after=tuple(sorted(needed)),
            )
        )
        table.move(step.number, step.target)
    return tuple(moves)
