"""What is said of a move: what is wrong, what it does about it, and what was found of the other nodes."""

from collections import Counter

import numpy as np

from orchestrator.planner.table import Table

_NAMED_NODES = 10
"""In herds of up to so many nodes each is named with its reason; in larger ones they are counted."""
_ASKED_NODES = 8


def load_of(table: Table, node: int, more_cpu: int = 0, more_memory_mib: int = 0) -> str:
    """Say what a node has reserved, or would with more: `93 % of its CPU and 40 % of its memory reserved`."""
    board = table.board
    cpu = percent(int(board.cpu_used_millicores[node]) + more_cpu, int(board.cpu_millicores[node]))
    memory = percent(int(board.memory_used_mib[node]) + more_memory_mib, int(board.memory_mib[node]))
    return f"{cpu} % of its CPU and {memory} % of its memory reserved"


def percent(used: int, whole: int) -> int:
    """Give a share in per cent, rounded up: what is over a threshold never reads as if it met it."""
    return -(-100 * used // max(whole, 1))


def reason_for(table: Table, number: int, target: int) -> str:
    """Say what a move for load does to both nodes."""
    board, source, demand = table.board, table.at[number], table.pieces[number].demand
    cpu, memory_mib = demand.cpu_millicores, demand.memory_mib
    before, after = load_of(table, source), load_of(table, source, -cpu, -memory_mib)
    there = load_of(table, target, cpu, memory_mib)
    return f"node {board.names[source]} has {before}, and then {after}; node {board.names[target]} then has {there}"


def considered(table: Table, number: int, *, below_limits: bool) -> str:
    """Say what was found of the nodes other than a VM's own: `1/3 nodes would do; n2: cordoned, n3: ...`.

    Args:
        table: As it is before the move.
        number: The VM.
        below_limits: Whether the target must stay below the thresholds.
    """
    board = table.board
    others = len(board.names) - 1
    if others <= _NAMED_NODES:
        reasons = {
            board.names[node]: _refusal(table, number, node, below_limits=below_limits)
            for node in range(len(board.names))
            if node != table.at[number]
        }
        told = ", ".join(f"{name}: {why}" for name, why in reasons.items() if why)
        fitting = sum(not why for why in reasons.values())
    else:
        counts = _counts(table, number, below_limits=below_limits)
        fitting = counts.pop("", 0)
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if count)
    return f"{fitting}/{others} nodes would do" + (f"; {told}" if told else "")


def _refusal(table: Table, number: int, node: int, *, below_limits: bool) -> str:
    board, piece = table.board, table.pieces[number]
    if (why := board.refusal(node, piece.demand)) or (why := table.objection(number, node)):
        return why
    if not piece.suited[node]:
        return "unfit"
    if below_limits and not table.targets(number, below_limits=True)[node]:
        return "would be over a threshold"
    return ""


def _counts(table: Table, number: int, *, below_limits: bool) -> Counter[str]:
    """Count the reasons in a herd of many nodes; the rules between VMs are asked of the first ones only."""
    board, piece = table.board, table.pieces[number]
    left = np.ones(len(board.names), dtype=np.bool_)
    left[table.at[number]] = False
    counts: Counter[str] = Counter()
    filters = [
        ("closed", board.open),
        ("not suited", piece.suited),
        ("short of room", board.with_room(piece.demand)),
    ]
    if below_limits:
        filters.append(("that would be over a threshold", table.targets(number, below_limits=True)))
    count = len(board.names) - 1
    for reason, mask in filters:
        left &= mask
        before, count = count, int(np.count_nonzero(left))
        counts[reason] = before - count
    if piece.is_bound:
        asked = np.flatnonzero(left)[:_ASKED_NODES].tolist()
        counts["against a rule"] = sum(bool(table.objection(number, node)) for node in asked)
    counts[""] = count - counts["against a rule"]
    return counts
