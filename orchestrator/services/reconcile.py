"""Reconcile: what messages and wake-ups were to bring about, and did not.

It sends again what was granted and never reported, presses questions that were not answered, settles suspect grants,
stores results, starts VMs that are to run, has outdated copies destroyed, goes on with drains and maintenances, removes
operations whose deletion waited, and wakes `grant` for what is pending. Each of these may be done at any time and any
number of times.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

from orchestrator.errors import Conflict
from orchestrator.logs import logger
from orchestrator.planner.policy import next_step
from orchestrator.queues import Message, Task, lifecycle_queue
from orchestrator.resources import GrantState, VirtualMachine, VirtualMachineOperation
from orchestrator.resources.outdated import outdated_orders
from orchestrator.services import adoption_orders, drains, looking, maintenances, policies, preflight, settling
from orchestrator.services.arming import keep_arming
from orchestrator.services.classes import keep_classes
from orchestrator.services.context import Context, deciding, grant_queue, send_grant, send_orders, wake_grant
from orchestrator.services.failover import recover_fenced
from orchestrator.services.herd import Herd
from orchestrator.services.membership import keep_membership
from orchestrator.services.recovery import recover
from orchestrator.services.reports import remove_deleted
from orchestrator.services.results import publish_result
from orchestrator.store import Batch, Refusal, keys
from orchestrator.store.connection import redis_errors

log = logger(__name__)

_AT_A_TIME = 1000


def reconcile(ctx: Context, herd: Herd) -> None:
    """Do one round."""
    if not recover(ctx):
        return
    due = _due(ctx)
    for key in due[keys.DEADLINES]:
        _try(partial(_settle_suspect, ctx, key), key)
    for key in due[keys.AWAITING]:
        _try(partial(_press, ctx, key), key)
    herd.follower.sync()
    recover_fenced(ctx, herd)
    active = herd.active_operations()
    operations = herd.follower.all(VirtualMachineOperation)
    _keep_policies(ctx, herd)
    drains.keep_drains(ctx, herd)
    maintenances.keep_maintenances(ctx, herd)
    keep_classes(ctx, herd)
    keep_arming(ctx, herd)  # before it is a member: a member arms, unless it is told not to
    _try(partial(_keep_membership, ctx, herd), "membership")
    for operation in operations:
        if operation.metadata.deletion_timestamp is not None and operation.status.grant is None:
            remove_deleted(ctx, operation.key)
    if any(operation.status.grant is None for operation in active):
        wake_grant(ctx)


def _keep_membership(ctx: Context, herd: Herd) -> None:
    keep_membership(ctx, herd)


def _try(decide: Callable[[], None], key: str) -> None:
    """Decide on one operation or VM; one that is always changed meanwhile does not hold up the others."""
    try:
        deciding(decide)
    except Conflict as error:
        log.warning("reconcile lost a race too often", about=key, error=str(error))


def _due(ctx: Context) -> dict[str, list[str]]:
    with redis_errors(ctx.store.redis):
        seconds, micros = ctx.store.redis.time()
        at_ms = seconds * 1000 + micros // 1000
        pipe = ctx.store.redis.pipeline(transaction=False)
        for key in (keys.DEADLINES, keys.AWAITING):
            pipe.zrangebyscore(key, "-inf", at_ms, 0, _AT_A_TIME)
        found = cast("list[list[str]]", pipe.execute())
    return dict(zip((keys.DEADLINES, keys.AWAITING), found, strict=True))


def _settle_suspect(ctx: Context, key: str) -> None:
    """An expired grant is suspect, not free: its holder is killed, and both hosts are asked."""
    operation, batch = _look(ctx, keys.DEADLINES, key)
    grant = operation.status.grant if operation else None
    if operation is None or grant is None or grant.state is GrantState.SETTLING:
        _commit(ctx, batch.effect("ZREM", keys.DEADLINES, key))
        return
    if _has_unread(ctx, grant.node):
        # Intake is slow or away, and what renews the grant may be among them: no holder is killed for that.
        _commit(ctx, batch.effect("DEADLINE", keys.DEADLINES, key, int(ctx.config.grant_ttl * 1000)))
        return
    cause = f"its grant was not renewed for {ctx.config.grant_ttl:g} s"
    settling.begin(ctx, batch, operation, cause, kill=True)
    _commit(ctx, batch)


def _look(ctx: Context, timers: str, key: str) -> tuple[VirtualMachineOperation | None, Batch]:
    """Read an operation, and begin a commit that holds only while its timer is over: progress renews it unseen."""
    operation = ctx.store.find(VirtualMachineOperation, key)
    return operation, ctx.store.batch().check("due", timers, key)


def _commit(ctx: Context, batch: Batch) -> bool:
    """Commit, unless the timer was set anew meanwhile; tells which.

    Raises:
        Conflict: Something else changed.
    """
    answer = ctx.store.commit(batch)
    if isinstance(answer, Refusal) and answer.check != "due":
        raise Conflict(f"{answer.check}: {answer.detail}")
    return not isinstance(answer, Refusal)


def _has_unread(ctx: Context, node: str) -> bool:
    """Whether there are reports of a node that nobody has taken in."""
    redis = ctx.store.redis
    with redis_errors(redis):
        cursor = cast("str | None", redis.hget(keys.CURSORS, node))
        return bool(redis.xread({keys.reports(node): cursor or "0-0"}, count=1))


def _press(ctx: Context, key: str) -> None:
    if adoption_orders.is_timer(key):
        adoption_orders.press(ctx, key)
        return
    if looking.is_timer(key):
        looking.drop_overdue(ctx, key)
        return
    if drains.is_timer(key):
        drains.press(ctx, key)
        return
    operation, batch = _look(ctx, keys.AWAITING, key)
    grant = operation.status.grant if operation else None
    if operation is not None and operation.awaits_answers:
        preflight.press(ctx, batch, operation)
        _commit(ctx, batch)
        return
    if operation is None or grant is None or grant.state is GrantState.RUNNING:
        if _commit(ctx, batch.effect("ZREM", keys.AWAITING, key)) and operation is not None:
            publish_result(ctx, operation)  # once more: who ended it may have died before
        return
    if grant.state is GrantState.ASKED:
        operation = settling.enforce_grace(ctx, batch, operation)
        if _commit(ctx, batch):
            send_orders(ctx, operation)
        return
    if grant.state is GrantState.SETTLING:
        operation = settling.ask_again(ctx, batch, operation, ctx.now())
        if _commit(ctx, batch) and not any(_is_waiting(ctx, lifecycle_queue(node)) for node in _asked(operation)):
            send_orders(ctx, operation)
        return
    batch.effect("DEADLINE", keys.AWAITING, key, int(ctx.config.resend_after * 1000))
    if _commit(ctx, batch) and not _is_waiting(ctx, grant_queue(grant)):
        log.info("sent again", operation=key, vm=operation.vm_key, node=grant.node, epoch=grant.epoch)
        send_grant(ctx, operation)


def _asked(operation: VirtualMachineOperation) -> list[str]:
    grant = operation.status.grant
    return list(grant.settlement.orders) if grant and grant.settlement else []


def _is_waiting(ctx: Context, queue: str) -> bool:
    """Whether a queue has messages that nobody has taken: what is still there was not lost."""
    with redis_errors(ctx.store.redis):
        return bool(ctx.store.redis.llen(queue))


def _press_outdated(ctx: Context, vm: VirtualMachine) -> None:
    """Have the nodes that show an outdated copy of a VM destroy it. Its orders go when no such copy is shown."""
    for node, order in outdated_orders(vm).items():
        queue = lifecycle_queue(node)
        if not _is_waiting(ctx, queue):
            ctx.messenger.send(Message(Task.NODE_SETTLE, queue, (vm.key, order.id, order.kind.value)))


def _keep_policies(ctx: Context, herd: Herd) -> None:
    """Look at each VM on which nothing is open: its policy may ask for something whose time has come."""
    at = ctx.store.now()
    held = {operation.vm_key for operation in herd.open_operations()}
    for vm in herd.follower.all(VirtualMachine):
        if vm.key in held:
            continue
        _press_outdated(ctx, vm)
        step = next_step(vm)
        if policies.is_to_be_removed(vm) or (step is not None and policies.is_due(step, at)):
            _try(partial(policies.keep, ctx, vm.key), vm.key)
