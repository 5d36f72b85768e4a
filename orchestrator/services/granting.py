"""Grants: what the planner chose is taken in one Lua call, then sent to its node.

The call checks again, in Redis, all that the plan rests on: that this Redis is the one on record, the slots (with the
schedulable nodes counted there and then), that the target may take VMs, and that it has the room.
"""

from collections.abc import Iterator

from orchestrator.errors import Conflict
from orchestrator.planner.flow import failed, granted, is_said, nothing_to_move, nothing_to_stop, say
from orchestrator.planner.migration import (
    NO_NODE_FITS,
    WITHOUT_TARGET,
    Check,
    Fail,
    Go,
    NothingToMove,
    NothingToStop,
    Wait,
    plan_grants,
)
from orchestrator.planner.preflight import copied_disks
from orchestrator.planner.progress import forecast
from orchestrator.planner.snapshot import Snapshot
from orchestrator.queues import Task
from orchestrator.resources import (
    Action,
    Grant,
    OrderKind,
    Reason,
    RenderHost,
    VirtualMachine,
    VirtualMachineOperation,
    render_domain,
)
from orchestrator.resources.drain import DRAIN_ANNOTATION
from orchestrator.services import drains, preflight
from orchestrator.services.context import (
    Context,
    log,
    put_timers,
    put_transition,
    send_grant,
    wake_grant,
)
from orchestrator.services.contradiction import check_evidence
from orchestrator.services.herd import Herd
from orchestrator.services.migrations import foreseen, migration_terms
from orchestrator.services.policies import keep
from orchestrator.services.results import publish_result
from orchestrator.store import Refusal, keys
from orchestrator.store.connection import redis_errors

_EPOCHS_AT_A_TIME = 64
_TOLD_AT_A_TIME = 100


def grant_pending(ctx: Context, herd: Herd) -> int:
    """Grant what may begin now; say of the rest why it waits.

    Returns:
        How many were granted.
    """
    with redis_errors(ctx.store.redis):
        # Removed before the look: who commits after this sends a wake-up of its own.
        ctx.store.redis.delete(keys.wanted(Task.GRANT.value.rpartition(".")[2]))
    snapshot = herd.snapshot()
    epochs = _epochs(ctx, len(snapshot.pending))
    waiting: list[Wait] = []
    count, placed, is_outdated = 0, 0, False
    for decision in plan_grants(snapshot):
        try:
            match decision:
                case Go():
                    refusal = _grant(ctx, snapshot, decision, next(epochs), snapshot.placements + placed)
                    count += refusal is None
                    placed += refusal is None and decision.action is not Action.STOP
                    is_outdated |= refusal is not None and refusal.check == "placements"
                    if refusal is not None and refusal.check == "identity":
                        return count  # recovery mode: nothing is granted
                case Wait() if _has_waited_too_long(ctx, snapshot, decision):
                    _give_up(ctx, decision)
                case Wait():
                    waiting.append(decision)
                case Check(wait=wait) if _has_waited_too_long(ctx, snapshot, wait):
                    _give_up(ctx, wait)
                case Check():
                    _ask(ctx, snapshot, decision)
                case Fail():
                    _fail(ctx, decision.operation, decision.reason, decision.message)
                case NothingToStop() | NothingToMove():
                    _end_without_grant(ctx, decision)
        except Conflict:
            continue  # someone changed it meanwhile, and whoever did so wakes this task again
    _tell(ctx, snapshot, waiting)
    if is_outdated:
        wake_grant(ctx)
    return count


def _epochs(ctx: Context, most: int) -> Iterator[int]:
    """Give new epochs, taken some at a time."""
    while True:
        yield from ctx.store.next_epochs(min(most, _EPOCHS_AT_A_TIME))


def _grant(ctx: Context, snapshot: Snapshot, go: Go, epoch: int, placements: int) -> Refusal | None:
    at = ctx.now()
    target = snapshot.nodes[go.target]
    migrates = go.action is Action.MIGRATE
    grace_s = go.vm.spec.termination_grace_period_seconds
    grant = Grant(
        epoch=epoch,
        action=go.action,
        node=go.node,
        target=go.target,
        uuid=go.vm.metadata.uid,
        incarnation=go.vm.status.incarnation + (go.action is Action.START),
        memory_mib=go.spec.memory_mib + snapshot.memory_overhead_mib,
        cpu_millicores=go.spec.cpu_millicores,
        granted_at=at,
        target_uri=target.migration_uri if migrates else "",
        **(migration_terms(ctx.config, go.operation, go.vm) if migrates else {}),
        copy_disks=copied_disks(go.vm) if migrates else (),
        domain_xml=_domain_xml(snapshot, go) if go.action is Action.START else "",
        force=go.action is Action.STOP and (bool(go.operation.spec.force) or grace_s == 0),
        grace_s=grace_s if go.action is Action.STOP else 0,
    )
    transition = granted(go.operation, go.vm, grant, at)
    if migrates:
        transition = forecast(transition, foreseen(grant, go.vm))
    batch = ctx.store.batch().check("identity")
    if migrates:
        limits = snapshot.limits
        batch.check("slots", go.operation.key, go.node, go.target, limits.outbound_per_node, limits.inbound_per_node)
    if go.action is not Action.STOP:
        if go.is_bound:  # another worker may have put a VM that its rules are about where this plan did not see it
            batch.check("placements", placements)
        batch.effect("HINCRBY", keys.PLACEMENTS, "count", 1)
        batch.check("schedulable", go.target)
        # A host that was fenced and booted again renews its lease before `returning` has taken it back: what recovery
        # says of it, "it has nothing", must stay true until then.
        batch.check("value", keys.taken_over(go.target), "")
        batch.check("fits", go.target, grant.memory_mib, grant.cpu_millicores, target.memory_mib, target.cpu_millicores)
    if go.action is Action.START:
        check_evidence(ctx, batch, go.vm)
    if transition.vm is None:
        # What stopped or moved the VM since the plan's snapshot makes this a refusal.
        batch.check("unchanged", VirtualMachine.kind_name, go.vm.key, go.vm.version)
    put_transition(batch, go.operation, go.vm, transition, at)
    put_timers(ctx, batch, transition.operation)
    answer = ctx.store.commit(batch)
    if isinstance(answer, Refusal):
        log.info(
            "grant refused",
            operation=go.operation.key,
            vm=go.operation.vm_key,
            check=answer.check,
            detail=answer.detail,
        )
        return answer
    about = {"operation": go.operation.key, "vm": go.operation.vm_key}
    log.info("granted", **about, action=grant.action.value, node=go.node, target=go.target, epoch=grant.epoch)
    send_grant(ctx, transition.operation)
    return None


def _domain_xml(snapshot: Snapshot, go: Go) -> str:
    target = snapshot.nodes[go.target]
    host = RenderHost(domain_type=target.domain_type, cpu_shares=target.cpu_shares)
    return render_domain(go.vm, snapshot.class_of(go.vm), host)


def _has_waited_too_long(ctx: Context, snapshot: Snapshot, wait: Wait) -> bool:
    since = wait.operation.status.unschedulable_since
    if wait.reason not in WITHOUT_TARGET or since is None:
        return False
    return snapshot.now - since >= ctx.config.unschedulable_timeout


def _give_up(ctx: Context, wait: Wait) -> None:
    timeout = ctx.config.unschedulable_timeout
    if wait.reason in NO_NODE_FITS:
        _fail(ctx, wait.operation, wait.reason, f"no node fits for {timeout}: {wait.message}")
    else:
        _fail(ctx, wait.operation, Reason.OPERATION_FAILED, f"no target for {timeout}: it {wait.message}")


def _ask(ctx: Context, snapshot: Snapshot, check: Check) -> None:
    """Ask nodes what has to be known first, and say meanwhile why the operation waits."""
    operation = check.wait.operation
    said = _waits(check.wait, snapshot) or operation
    kind = OrderKind.DESCRIBE if check.is_about_needs else OrderKind.CHECK
    batch = ctx.store.batch()
    preflight.ask(ctx, batch, operation, said, check.vm, check.nodes, kind)
    ctx.store.must_commit(batch)


def _tell(ctx: Context, snapshot: Snapshot, waiting: list[Wait]) -> None:
    """Say why operations wait, each once; many in one commit, or else each alone where one was changed meanwhile."""
    news = [(wait, new) for wait in waiting if (new := _waits(wait, snapshot)) is not None]
    for first in range(0, len(news), _TOLD_AT_A_TIME):
        some = news[first : first + _TOLD_AT_A_TIME]
        for part in (some, *([one] for one in some)):
            batch = ctx.store.batch()
            for wait, new in part:
                batch.put(wait.operation, new)
                batch.tell("waits", operation=new.key, reason=wait.reason.value, why=wait.message)
            try:
                ctx.store.must_commit(batch)
            except Conflict:
                continue
            if part is some:
                break


def _waits(wait: Wait, snapshot: Snapshot) -> VirtualMachineOperation | None:
    """The operation that says why it waits; None when it says so already."""
    operation, at = wait.operation, snapshot.now
    is_unschedulable = wait.reason in WITHOUT_TARGET
    since = operation.status.unschedulable_since
    if is_said(operation, wait.reason, wait.message) and is_unschedulable == (since is not None):
        return None
    new = say(operation, wait.reason, wait.message, at)
    return new.with_status(unschedulable_since=(since or at) if is_unschedulable else None)


def _end_without_grant(ctx: Context, decision: NothingToStop | NothingToMove) -> None:
    at = ctx.now()
    if isinstance(decision, NothingToStop):
        transition = nothing_to_stop(decision.operation, decision.vm, at)
    else:
        transition = nothing_to_move(decision.operation, decision.vm, at)
    batch = ctx.store.batch()
    put_transition(batch, decision.operation, decision.vm, transition, at)
    ctx.store.must_commit(batch)
    publish_result(ctx, transition.operation)
    keep(ctx, decision.vm.key)  # one that was deleted goes now


def _fail(ctx: Context, operation: VirtualMachineOperation, reason: Reason, message: str) -> None:
    at = ctx.now()
    transition = failed(operation, reason, message, at)
    batch = ctx.store.batch()
    put_transition(batch, operation, None, transition, at)
    ctx.store.must_commit(batch)
    publish_result(ctx, transition.operation)
    keep(ctx, operation.vm_key)
    drains.wake_for(ctx, operation.metadata.annotations.get(DRAIN_ANNOTATION, ""))
