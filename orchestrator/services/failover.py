"""ColdStandby: once there is evidence about a node, its VMs start elsewhere, and it leaves the herd.

`recover_node` runs right after the evidence, and again by every reconcile until all is done. It goes by the documents
only, so it may stop anywhere and be run again:

1. Grants that are open on the node are settled as ever, by both hosts' word, where the evidence speaks for the node: it
   has nothing (`answer_for`). So a VM that was migrating is not started before the other host has answered too.
2. Every VM that is on record there, and on which nothing is open, has stopped, as the node's doing. Those whose policy
   wants it get their Start in the same commit; all of them are placed together, the most important first.
3. The node is removed: its labels, annotations, cordon and taints stay in its `NodeFencing`; its queues are emptied.
4. If we cut its power, it is to be switched on again. That is asked for until the power was read as on, or the node is
   back: messages get lost, and BMCs fail.

Every step looks for the evidence itself: without it nothing of a node is touched.
"""

from datetime import timedelta

from orchestrator.errors import Conflict
from orchestrator.logs import logger
from orchestrator.planner.flow import Note
from orchestrator.planner.locks import recovered
from orchestrator.planner.packing import place_all
from orchestrator.planner.policy import NODE_FENCED, is_to_start
from orchestrator.planner.standing import stopped_vm
from orchestrator.queues import FENCING, Message, Task, lifecycle_queue, migrate_queue
from orchestrator.resources import (
    GrantState,
    Node,
    NodeFencing,
    NodeInventory,
    OperationType,
    Reading,
    VirtualMachine,
    VirtualMachineOperation,
)
from orchestrator.resources.fencing import FencePhase, KeptNode
from orchestrator.services import settling
from orchestrator.services.context import Context, add_notes, deciding, load_pair, send_grant, send_orders, wake_grant
from orchestrator.services.contradiction import hold_back, hold_back_all
from orchestrator.services.herd import Herd
from orchestrator.services.policies import keep, policy_operation
from orchestrator.services.reports import after_end
from orchestrator.store import Batch, Refusal, keys
from orchestrator.store.connection import redis_errors

log = logger(__name__)

_AT_A_TIME = 50
_POWER_ON_AGAIN = timedelta(seconds=10)
_POWER_ON_AT_LEAST_EVERY = timedelta(minutes=5)
_DOUBLED_AT_MOST = 8


def recover_fenced(ctx: Context, herd: Herd) -> None:
    """Recover all nodes about which there is evidence."""
    for fencing in herd.follower.all(NodeFencing):
        if fencing.status.phase.has_evidence:
            recover_node(ctx, herd, fencing.name)


def recover_node(ctx: Context, herd: Herd, name: str) -> bool:
    """Recover a node as far as possible now.

    Returns:
        Whether all that was there is settled.
    """
    fencing = _fenced(ctx, name)
    if fencing is None:
        return False
    if not ctx.store.is_replicated():
        log.warning("recovery waits: the evidence is on too few replicas", node=name)
        return False
    herd.follower.sync()
    for operation in herd.open_operations():
        grant = operation.status.grant
        if grant is not None and name in {grant.node, grant.target}:
            _settle(ctx, operation.key, name)
    herd.follower.sync()
    hold_back_all(ctx, herd, fencing)
    is_done = _restart(ctx, herd, fencing)
    if is_done and fencing.status.phase is FencePhase.FENCED:
        _finish(ctx, name)
    if is_done:
        _ask_for_power(ctx, name)
    return is_done


def _fenced(ctx: Context, name: str) -> NodeFencing | None:
    """Read a node's fencing; None when there is no evidence (any more): it came back."""
    fencing = ctx.store.find(NodeFencing, name)
    return fencing if fencing is not None and fencing.status.phase.has_evidence else None


# --- 1. open grants ---------------------------------------------------------------------------------------------------


def _settle(ctx: Context, key: str, name: str) -> None:
    """Have an open grant on a fenced node settled, and answer its questions in the node's place."""
    try:
        deciding(lambda: _begin_settlement(ctx, key, name))
        deciding(lambda: answer_for(ctx, key, name))
    except Conflict as error:
        log.warning("recovery lost a race too often", operation=key, error=str(error))


def _begin_settlement(ctx: Context, key: str, name: str) -> None:
    operation = ctx.store.find(VirtualMachineOperation, key)
    grant = operation.status.grant if operation is not None else None
    if operation is None or grant is None or grant.state is GrantState.SETTLING:
        return
    batch = ctx.store.batch()
    # The other host's holder is killed where it holds the grant: what it was about to do must not come later.
    settling.begin(ctx, batch, operation, f"node {name} was fenced", kill=True, message=f"node {name} was fenced")
    _must_hold(ctx, batch, name)


def answer_for(ctx: Context, key: str, name: str) -> None:
    """Answer an order to a fenced node: by the evidence, it has nothing. Rounds follow each other until the end."""
    operation, vm = load_pair(ctx.store, key)
    grant = operation.status.grant if operation is not None else None
    order = grant.settlement.orders.get(name) if grant is not None and grant.settlement is not None else None
    if operation is None or grant is None or order is None:
        return
    batch, at = ctx.store.batch(), ctx.store.now()
    # The evidence is later than all that the node reported.
    inventory = ctx.store.find(NodeInventory, name)
    nothing = Reading(present=False, counter=inventory.counter if inventory is not None else 0)
    transition = settling.answered(ctx, batch, operation, vm, name, order.id, nothing, at)
    _must_hold(ctx, batch, name)
    if transition is None:
        return
    if transition.ended:
        for after in after_end(ctx, transition.operation, grant):
            after()
        return
    send_orders(ctx, transition.operation)
    new = transition.operation.status.grant
    if new is not None and new.state is GrantState.GRANTED:
        send_grant(ctx, transition.operation)
    answer_for(ctx, key, name)


def _must_hold(ctx: Context, batch: Batch, name: str) -> None:
    """Commit while the evidence stands.

    Raises:
        Conflict: Something changed, or the evidence is gone.
    """
    fencing = _fenced(ctx, name)
    if fencing is None:
        raise Conflict(f"there is no evidence about node {name} any more")
    batch.check("unchanged", NodeFencing.kind_name, name, fencing.version)
    ctx.store.must_commit(batch)


# --- 2. its VMs -------------------------------------------------------------------------------------------------------


def _restart(ctx: Context, herd: Herd, fencing: NodeFencing) -> bool:
    """Stop on record what was on the node, and ask for its starts.

    Returns:
        Whether nothing is left on record there.
    """
    name, evidence = fencing.name, fencing.status.evidence
    assert evidence is not None  # noqa: S101 - the caller looked
    here = [
        vm for vm in herd.follower.all(VirtualMachine) if vm.status.node_name == name and vm.status.phase.occupies_node
    ]
    if not here:
        return True
    held = {operation.vm_key for operation in herd.open_operations() if operation.status.grant is not None}
    active = {operation.vm_key for operation in herd.active_operations()}
    free = [vm for vm in here if vm.key not in held and vm.status.adoption is None]
    at = ctx.now()
    why = f"node {name} was fenced: {evidence.text}"
    stopped = {
        vm.key: hold_back(recovered(stopped_vm(vm, NODE_FENCED, why, vm.status.counter, at), fencing), fencing, ctx)
        for vm in free
    }
    starting = [vm for vm in free if is_to_start(stopped[vm.key]) and vm.key not in active]
    placement = place_all(herd.snapshot(), starting, excluded=frozenset({name}), starting=True)
    starts = {vm.key for vm in starting}
    # The most important first: of those that wait for a place, or for a node's turn, they are served first.
    ordered = sorted(free, key=lambda vm: (-(vm.spec.priority or 0), vm.key))
    for first in range(0, len(ordered), _AT_A_TIME):
        part = ordered[first : first + _AT_A_TIME]
        for some in (part, *([vm] for vm in part)):
            batch = ctx.store.batch().check("unchanged", NodeFencing.kind_name, name, fencing.version)
            for vm in some:
                batch.put(vm, stopped[vm.key])
                batch.check("field", keys.OPEN_GRANTS, vm.key, "")
                notes = [Note("NodeFenced", why, warning=True)]
                if vm.key in starts:
                    target = placement.targets.get(vm.key, "")
                    start = policy_operation(vm, OperationType.START, at)
                    batch.create(start.with_status(planned=target))
                    told = f"is started on node {target}" if target else f"waits: {placement.stranded.get(vm.key, '')}"
                    notes.append(Note("FailedOver", told))
                add_notes(batch, (vm,), notes, at)
            batch.tell("failover", node=name, vms=len(some), starts=sum(vm.key in starts for vm in some))
            try:
                answer = ctx.store.commit(batch)
            except Conflict as error:
                log.info("failover decided again", node=name, why=str(error))
                continue
            if isinstance(answer, Refusal):
                log.info("failover decided again", node=name, why=f"{answer.check}: {answer.detail}")
                continue
            for vm in some:
                if vm.key not in starts:
                    keep(ctx, vm.key)  # one that is being deleted goes now
            if some is part:
                break
    wake_grant(ctx)
    herd.follower.sync()
    return not any(
        vm.status.node_name == name and vm.status.phase.occupies_node for vm in herd.follower.all(VirtualMachine)
    )


# --- 3. the node ------------------------------------------------------------------------------------------------------


def _finish(ctx: Context, name: str) -> None:
    """Remove the node, where that is the policy, and say that its recovery is done."""

    def decide() -> None:
        fencing, node = _fenced(ctx, name), ctx.store.find(Node, name)
        if fencing is None or fencing.status.phase is not FencePhase.FENCED:
            return
        at, batch = ctx.now(), ctx.store.batch()
        assert fencing.status.evidence is not None  # noqa: S101 - FENCED has it
        listing = f"return-{fencing.status.evidence.epoch}"
        new = fencing.with_status(phase=FencePhase.RECOVERED, since=at, listing_order=listing)
        if ctx.config.remove_lost_nodes and node is not None:
            meta, spec = node.metadata, node.spec
            kept = KeptNode(
                labels=meta.labels,
                annotations=meta.annotations,
                unschedulable=spec.unschedulable,
                taints=spec.taints,
            )
            new = new.with_status(kept=kept)
            batch.delete(node)
            inventory = ctx.store.find(NodeInventory, name)
            if inventory is not None:
                batch.delete(inventory)
        batch.put(fencing, new)
        told = Note("NodeRecovered", f"nothing of node {name} is left on record; its VMs start elsewhere")
        add_notes(batch, (new,), (told,), at)
        batch.tell("fencing", node=name, phase=f"{FencePhase.FENCED} => {FencePhase.RECOVERED}")
        ctx.store.must_commit(batch)
        with redis_errors(ctx.store.redis):
            ctx.store.redis.delete(migrate_queue(name), lifecycle_queue(name))

    deciding(decide)


# --- 4. its power -----------------------------------------------------------------------------------------------------


def _ask_for_power(ctx: Context, name: str) -> None:
    """Have the power of a recovered node switched on again, if that is due. Next time after twice as long."""

    def decide() -> bool:
        fencing, at = _fenced(ctx, name), ctx.store.now()
        if fencing is None or not fencing.awaits_power:
            return False
        tries, after = fencing.status.power_on_tries, fencing.status.power_on_after
        if after is not None and at < after:
            return False
        wait = min(_POWER_ON_AGAIN * 2 ** min(tries, _DOUBLED_AT_MOST), _POWER_ON_AT_LEAST_EVERY)
        asked = fencing.with_status(power_on_tries=tries + 1, power_on_after=at + wait)
        ctx.store.must_commit(ctx.store.batch().put(fencing, asked))
        return True

    if deciding(decide):
        ctx.messenger.send(Message(Task.POWER_ON, FENCING, (name,)))


__all__ = ["answer_for", "recover_fenced", "recover_node"]
