"""Grants: what the planner chose is taken in one Lua call, then sent to its node.

The call checks again, in Redis, all that the plan rests on: that this Redis is the one on record, the slots (with the
schedulable nodes counted there and then), that the target may take VMs, and that it has the room.
"""

from collections.abc import Iterator

from orchestrator.errors import Conflict
from orchestrator.planner.flow import failed, granted, is_said, say
from orchestrator.planner.migration import Fail, Go, Wait, plan_grants
from orchestrator.planner.snapshot import Snapshot
from orchestrator.queues import Task
from orchestrator.resources import (
    Action,
    Grant,
    Reason,
    VirtualMachine,
    VirtualMachineOperation,
    render_domain,
)
from orchestrator.resources.vm import LiveMigrationPolicy
from orchestrator.services.context import (
    Context,
    log,
    now,
    put_timers,
    put_transition,
    send_grant,
)
from orchestrator.services.herd import Herd
from orchestrator.services.results import publish_result
from orchestrator.store import Refusal, keys
from orchestrator.store.connection import redis_errors

_EPOCHS_AT_A_TIME = 64
_TOLD_AT_A_TIME = 100
_FORCED = {LiveMigrationPolicy.ALWAYS_FORCED, LiveMigrationPolicy.PREFER_FORCED}


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
    count = 0
    for decision in plan_grants(snapshot):
        try:
            match decision:
                case Go():
                    refusal = _grant(ctx, snapshot, decision, next(epochs))
                    count += refusal is None
                    if refusal is not None and refusal.check == "identity":
                        return count  # recovery mode: nothing is granted
                case Wait() if _has_waited_too_long(ctx, snapshot, decision):
                    message = f"no node fits for {ctx.config.unschedulable_timeout}: {decision.message}"
                    _fail(ctx, decision.operation, decision.reason, message)
                case Wait():
                    waiting.append(decision)
                case Fail():
                    _fail(ctx, decision.operation, decision.reason, decision.message)
        except Conflict:
            continue  # someone changed it meanwhile, and whoever did so wakes this task again
    _tell(ctx, snapshot, waiting)
    return count


def _epochs(ctx: Context, most: int) -> Iterator[int]:
    """Give new epochs, taken some at a time."""
    while True:
        yield from ctx.store.next_epochs(min(most, _EPOCHS_AT_A_TIME))


def _grant(ctx: Context, snapshot: Snapshot, go: Go, epoch: int) -> Refusal | None:
    at = now()
    target = snapshot.nodes[go.target]
    migrates = go.operation.spec.type.is_migration
    grant = Grant(
        epoch=epoch,
        action=Action.MIGRATE if migrates else Action.START,
        node=go.node,
        target=go.target,
        uuid=go.vm.metadata.uid,
        incarnation=go.vm.status.incarnation + (0 if migrates else 1),
        memory_mib=go.vm.spec.memory_mib + snapshot.memory_overhead_mib,
        cpu_millicores=go.vm.spec.cpu_millicores,
        granted_at=at,
        target_uri=target.migration_uri if migrates else "",
        bandwidth_mib_s=ctx.config.bandwidth_mib_s if migrates else 0,
        auto_converge=migrates and _auto_converge(go),
        domain_xml="" if migrates else render_domain(go.vm),
    )
    transition = granted(go.operation, go.vm, grant, at)
    batch = ctx.store.batch().check("identity").check("schedulable", go.target)
    if migrates:
        limits = snapshot.limits
        batch.check("slots", go.operation.key, go.node, go.target, limits.outbound_per_node, limits.inbound_per_node)
    batch.check("fits", go.target, grant.memory_mib, grant.cpu_millicores, target.memory_mib, target.cpu_millicores)
    if transition.vm is None:
        # What stopped or moved the VM since the plan's snapshot makes this a refusal.
        batch.check("unchanged", VirtualMachine.kind_name, go.vm.key, go.vm.version)
    put_transition(batch, go.operation, go.vm, transition, at)
    put_timers(ctx, batch, transition.operation)
    answer = ctx.store.commit(batch)
    if isinstance(answer, Refusal):
        log.info("grant refused", operation=go.operation.key, check=answer.check, detail=answer.detail)
        return answer
    log.info("granted", operation=go.operation.key, node=go.node, target=go.target, epoch=grant.epoch)
    send_grant(ctx, transition.operation)
    return None


def _auto_converge(go: Go) -> bool:
    force = go.operation.spec.force
    policy = go.vm.spec.live_migration_policy
    if force is None or policy in {LiveMigrationPolicy.ALWAYS_SAFE, LiveMigrationPolicy.ALWAYS_FORCED}:
        return policy in _FORCED
    return force


def _has_waited_too_long(ctx: Context, snapshot: Snapshot, wait: Wait) -> bool:
    since = wait.operation.status.unschedulable_since
    if wait.reason is not Reason.TARGET_UNSCHEDULABLE or since is None:
        return False
    return snapshot.now - since >= ctx.config.unschedulable_timeout


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
    is_unschedulable = wait.reason is Reason.TARGET_UNSCHEDULABLE
    since = operation.status.unschedulable_since
    if is_said(operation, wait.reason, wait.message) and is_unschedulable == (since is not None):
        return None
    new = say(operation, wait.reason, wait.message, at)
    return new.with_status(unschedulable_since=(since or at) if is_unschedulable else None)


def _fail(ctx: Context, operation: VirtualMachineOperation, reason: Reason, message: str) -> None:
    at = now()
    transition = failed(operation, reason, message, at)
    batch = ctx.store.batch()
    put_transition(batch, operation, None, transition, at)
    ctx.store.must_commit(batch)
    publish_result(ctx, transition.operation)
