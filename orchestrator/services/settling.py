"""Settling: an operation's end is read from the hypervisors of all nodes of its grant, and repaired where it is split.

It begins when a node reports that its call ended, or when a grant is suspect; in the latter case the node's agent first
kills the process that held it. It goes on in rounds: ask both, decide (`planner.settlement`), repair, ask both again.
"""

from dataclasses import replace
from datetime import datetime

from orchestrator.errors import Invalid
from orchestrator.logs import logger
from orchestrator.planner.flow import (
    Note,
    Transition,
    came_back,
    completed,
    critical,
    gone,
    is_ending,
    is_said,
    say,
)
from orchestrator.planner.locks import refused_by_lock
from orchestrator.planner.observation import observe
from orchestrator.planner.rounds import adopted, next_round, settling
from orchestrator.planner.settlement import ALIVE, Settled, Verdict, settle_migration, settle_start, settle_stop
from orchestrator.resources import (
    Action,
    GrantState,
    Key,
    Node,
    NodeFencing,
    NodeInventory,
    OrderKind,
    Reading,
    Reason,
    VirtualMachine,
    VirtualMachineOperation,
)
from orchestrator.resources.machine import record_machine
from orchestrator.services import contradiction, preflight
from orchestrator.services.context import Context, put_timers, put_transition
from orchestrator.store import Batch

log = logger(__name__)

ABSENT = Reading(present=False)


def begin(
    ctx: Context,
    batch: Batch,
    operation: VirtualMachineOperation,
    cause: str,
    *,
    kill: bool,
    end: str = "",
    message: str = "",
) -> VirtualMachineOperation:
    """Add the begin of a settlement to a batch.

    Args:
        operation: With an open grant.
        cause: For people.
        kill: The grant is suspect: its holder is killed first.
        end: How the node said that its call ended.
        message: The hypervisor's words.
    """
    new = settling(operation.with_grant(end=end, message=message), cause, kill=kill)
    batch.put(operation, new)
    _ask(ctx, batch, new)
    batch.tell("settling", operation=operation.key, cause=cause, kill=kill)
    return new


def answered(
    ctx: Context,
    batch: Batch,
    operation: VirtualMachineOperation,
    vm: VirtualMachine | None,
    node: str,
    order_id: str,
    reading: Reading,
    at: datetime,
) -> Transition | None:
    """Take a node's answer into account, and decide when it was the last one.

    Returns:
        The transition that ends the round; None when the answer counts for nothing, or others are awaited.
    """
    grant = operation.status.grant
    settlement = grant.settlement if grant else None
    if grant is None or settlement is None:
        return None
    order = settlement.orders.get(node)
    if order is None or order.id != order_id:
        return None
    orders = {name: o for name, o in settlement.orders.items() if name != node}
    readings = {**settlement.readings, node: reading}
    if orders:
        waiting = operation.with_grant(settlement=settlement.with_(orders=orders, readings=readings))
        batch.put(operation, waiting)
        return None
    if order.kind.changes_domain:
        transition = next_round(operation, f"{order.kind} on node {node} was done", at)
        put_transition(batch, operation, vm, transition, at)
        _ask(ctx, batch, transition.operation)
        return transition
    # What the hosts report while this is decided is decided on anew: the commit rests on what they have on record.
    inventories = ctx.store.many(NodeInventory, (grant.node, grant.target))
    for name in dict.fromkeys((grant.node, grant.target)):
        version = inventories[Key(name)].version if name in inventories else 0
        batch.check("unchanged", NodeInventory.kind_name, name, version)
    settled, transition = _decide(ctx, operation, vm, inventories, readings, at)
    transition = contradiction.on_evidence(ctx, transition, grant.node, grant.target)
    contradiction.contradict(ctx, batch, transition)
    batch.tell(
        "settled" if transition.ended else "settling",
        operation=operation.key,
        verdict=settled.verdict.value,
        why=settled.why,
        round=settlement.rounds,
    )
    put_transition(batch, operation, vm, transition, at)
    _ask(ctx, batch, transition.operation)
    return transition


def enforce_grace(ctx: Context, batch: Batch, operation: VirtualMachineOperation) -> VirtualMachineOperation:
    """Add to a batch that a guest which did not power off in its time has its plug pulled."""
    grant = operation.status.grant
    assert grant is not None  # noqa: S101 - the caller looked
    cause = f"it did not power off within {grant.grace_s} s: its plug was pulled"
    forced = operation.with_grant(force=True, message=cause)
    new = settling(forced, cause, kill=False, repair=(grant.node, OrderKind.DESTROY, ALIVE))
    batch.put(operation, new)
    _ask(ctx, batch, new)
    batch.tell("grace period over", warning=True, operation=operation.key, node=grant.node)
    return new


def ask_again(ctx: Context, batch: Batch, operation: VirtualMachineOperation, at: datetime) -> VirtualMachineOperation:
    """Add to a batch that unanswered orders are pressed again; says on the operation who does not answer."""
    grant = operation.status.grant
    assert grant is not None and grant.settlement is not None  # noqa: S101, PT018 - the caller looked
    settlement = grant.settlement
    if not settlement.orders:  # it has rested
        new = settling(
            operation, settlement.cause, kill=False, rounds=settlement.rounds, confirming=settlement.confirming
        )
        batch.put(operation, new)
        _ask(ctx, batch, new)
        return new
    silent = ", ".join(sorted(settlement.orders))
    message = f"{settlement.cause}; waits for an answer of node {silent}"
    new = operation
    if not is_said(operation, Reason.OUTCOME_UNKNOWN, message):
        new = say(operation, Reason.OUTCOME_UNKNOWN, message, at)
        batch.put(operation, new)
    _ask(ctx, batch, new)
    return new


def _decide(
    ctx: Context,
    operation: VirtualMachineOperation,
    vm: VirtualMachine | None,
    inventories: dict[Key, NodeInventory],
    readings: dict[str, Reading],
    at: datetime,
) -> tuple[Settled, Transition]:
    """Decide from both readings; the operation has an open grant that is being settled."""
    grant = operation.status.grant
    assert grant is not None and grant.settlement is not None  # noqa: S101, PT018 - the caller looked
    settlement = grant.settlement
    source, target = readings.get(grant.node, ABSENT), readings.get(grant.target, ABSENT)
    if grant.action is Action.START:
        settled = settle_start(target, grant.incarnation)
    elif grant.action is Action.STOP:
        settled = settle_stop(target, grant.incarnation, force=grant.force)
    else:
        seen = inventories[Key(grant.target)].domains.get(grant.uuid) if grant.target in inventories else None
        target_ran = seen is not None and seen.ran and seen.incarnation == grant.incarnation
        fencings = ctx.store.many(NodeFencing, (grant.node, grant.target))
        fenced = {name for name, fencing in fencings.items() if fencing.status.phase.has_evidence}
        # A fenced target can't say whether its copy ran: the source's, if it was handed over, may be the older one.
        settled = settle_migration(
            source,
            target,
            target_ran=target_ran or grant.target in fenced,
            source_fenced=grant.node in fenced,
        )
    # A call whose end nobody knows may have been sent just before its holder was killed, or the connection broke: its
    # host may begin what it did not show yet.
    is_early = settled.verdict is Verdict.BACK and grant.end in {"", "unknown"}
    if (settled.confirm or is_early) and settlement.confirming != settled.why:
        return settled, next_round(operation, settled.why, at, confirming=settled.why)
    words = grant.message or settlement.cause
    match settled.verdict:
        case Verdict.DONE:
            done = _with_machine(completed(operation, vm, target, at), grant.action, target)
            done = preflight.with_copies_told(_with_firmware(ctx, done, grant.target), grant, arrived=True)
            return settled, _with_later_reports(done, inventories, grant.target, target, at)
        case Verdict.BACK:
            recovery = vm.status.recovery if vm is not None else None
            if vm is not None and recovery is not None and grant.locked and not is_ending(operation):
                return settled, refused_by_lock(operation, vm, recovery, words, at)
            back = came_back(operation, vm, source, words, at, retry_limit=ctx.config.retry_limit)
            back = preflight.with_copies_told(back, grant, arrived=False)
            return settled, _with_later_reports(back, inventories, grant.node, source, at)
        case Verdict.ADOPT:
            # Where an abort was asked for, and the job has lost its worker, the one that adopts it is told to abort it.
            return settled, adopted(operation, ctx.store.next_epochs(1)[0], at)
        case Verdict.REPAIR:
            kind = OrderKind.RESUME if settled.resume else OrderKind.DESTROY
            where = grant.node if settled.on_source else grant.target
            new = settling(
                operation, settled.why, kill=False, rounds=settlement.rounds + 1, repair=(where, kind, settled.expect)
            )
            note = Note("SettlementRepair", f"{settled.why} ({kind} on node {where})", warning=True)
            transition = Transition(say(new, Reason.OUTCOME_UNKNOWN, settled.why, at), notes=(note,))
            return settled, critical(transition, settled.why) if settled.critical else transition
        case Verdict.GONE:
            node = ctx.store.find(Node, grant.node)
            by_host = node is not None and node.is_shutting_down
            return settled, gone(operation, vm, f"{settled.why} ({words})", at, by_host=by_host)
        case Verdict.ASK_AGAIN | Verdict.PERSON:
            return settled, next_round(operation, settled.why, at)


def _ask(ctx: Context, batch: Batch, operation: VirtualMachineOperation) -> None:
    """Wake the agents that have an order; repairs go as messages, after the commit."""
    grant = operation.status.grant
    if grant is None:
        return
    put_timers(ctx, batch, operation)
    if grant.state is GrantState.SETTLING and grant.settlement is not None:
        for node, order in grant.settlement.orders.items():
            if not order.kind.changes_domain:
                batch.wake(node, "order")


def _with_machine(transition: Transition, action: Action, reading: Reading) -> Transition:
    """Keep the machine that a start gave the VM, so that every later start gives it the same one."""
    vm = transition.vm
    if action is not Action.START or vm is None or not reading.live_xml:
        return transition
    try:
        machine = record_machine(reading.live_xml)
    except Invalid as error:  # what a node says is not trusted; the VM runs all the same
        log.warning("machine not recorded", vm=vm.key, error=str(error))
        return transition
    return replace(transition, vm=vm.with_status(machine=machine))


def _with_firmware(ctx: Context, transition: Transition, node: str) -> Transition:
    """Keep which hypervisor a VM runs on from now on: its node's, as that told it last."""
    found = ctx.store.find(Node, node)
    vm = transition.vm
    if vm is None or found is None or not vm.status.phase.occupies_node:
        return transition
    return replace(transition, vm=vm.with_status(firmware=found.status.hypervisor.number))


def _with_later_reports(
    transition: Transition, inventories: dict[Key, NodeInventory], node: str, reading: Reading, at: datetime
) -> Transition:
    """Apply what the node reported on the domain after the reading: while the grant was open it was only recorded."""
    vm = transition.vm
    if vm is None:
        return transition
    seen = inventories[Key(node)].domains.get(vm.metadata.uid) if node in inventories else None
    if seen is None or seen.counter <= reading.counter:
        return transition
    observation = observe(vm, node, seen, at)
    return Transition(
        transition.operation, observation.vm or vm, (*transition.notes, *observation.notes), transition.ended
    )
