"""The rounds of a settlement: what the hosts of a grant are asked, and how an operation goes from round to round.

`planner.settlement` says what a pair of answers means; these are the transitions that lead to it and away from it.
"""

from datetime import datetime

from orchestrator.planner.flow import Note, Transition, open_grant, say
from orchestrator.resources import GrantState, Order, OrderKind, Reason, Settlement, VirtualMachineOperation

HASTY_ROUNDS = 6
"""So many rounds of a settlement follow each other as fast as the hosts answer: a switch-over takes fewer."""
RESTS_S = (2, 5, 10, 30)
"""Waits before each later round; the last one goes on, until the world or a person has changed something."""


def settling(
    operation: VirtualMachineOperation,
    cause: str,
    *,
    kill: bool,
    rounds: int = 1,
    confirming: str = "",
    repair: tuple[str, OrderKind, tuple[str, ...]] | None = None,
) -> VirtualMachineOperation:
    """Ask every node of the grant what is there, or have one node repair something first.

    Args:
        operation: With an open grant.
        cause: For people.
        kill: Whether the holder is killed before its node answers.
        rounds: Number of this round; makes the orders' ids new.
        confirming: See `Settlement`.
        repair: Node, what to do, and the states in which it may be done.
    """
    grant = open_grant(operation)
    nodes = [grant.node] if grant.target == grant.node else [grant.node, grant.target]
    orders: dict[str, Order] = {}
    for node in nodes if repair is None else [repair[0]]:
        kind = OrderKind.KILL_AND_READ if kill and node == grant.node else OrderKind.READ
        orders[node] = Order(
            id=f"{operation.key}#{grant.epoch}.{rounds}.{node}",
            kind=kind if repair is None else repair[1],
            uuid=grant.uuid,
            epoch=grant.epoch,
            incarnation=grant.incarnation,
            action=grant.action,
            expect=() if repair is None else repair[2],
        )
    settlement = Settlement(orders=orders, cause=cause, rounds=rounds, confirming=confirming)
    return operation.with_grant(state=GrantState.SETTLING, settlement=settlement)


def next_round(operation: VirtualMachineOperation, why: str, now: datetime, *, confirming: str = "") -> Transition:
    """Ask both hosts again, at once or after a rest; the settlement's orders are empty while it rests."""
    grant = open_grant(operation)
    assert grant.settlement is not None  # noqa: S101 - it is being settled
    cause, rounds = grant.settlement.cause, grant.settlement.rounds + 1
    new = settling(operation, cause, kill=False, rounds=rounds, confirming=confirming)
    if rounds > HASTY_ROUNDS and not confirming:
        new = new.with_grant(settlement=Settlement(cause=cause, rounds=rounds))
    return Transition(say(new, Reason.OUTCOME_UNKNOWN, why, now))


def rest_s(settlement: Settlement) -> float:
    """How long a settlement rests before its round begins; 0 when it does not rest."""
    if settlement.orders:
        return 0
    return RESTS_S[min(settlement.rounds - HASTY_ROUNDS, len(RESTS_S)) - 1]


def adopted(operation: VirtualMachineOperation, epoch: int, now: datetime) -> Transition:
    """The migration goes on without its holder: the same grant, a new epoch, and a worker that only watches."""
    grant = open_grant(operation)
    new = operation.with_grant(
        epoch=epoch,
        state=GrantState.GRANTED,
        adopt=True,
        settlement=None,
        granted_at=now,
        end="",
        message="",
        timed_out=False,
    )
    note = Note("MigrationAdopted", f"its worker on node {grant.node} is gone, the migration goes on; watching it")
    return Transition(say(new, Reason.SYNCING, note.message, now), notes=(note,))
