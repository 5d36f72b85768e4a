"""The rebalancer: plans of `planner.rebalance` turned into ordinary operations of low priority.

Nothing is kept between two scans but what documents say: a VM that is being moved has its operation, one that was moved
lately its migration state, and the policy's status counts the scans that found a node over a threshold. So any worker
may do any scan. A move that needs an earlier one is left for a later scan, which plans it anew from what is then.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any, cast

from orchestrator.errors import AlreadyExists, Conflict, Invalid, NotFound, Refused
from orchestrator.logs import logger
from orchestrator.planner.flow import Note
from orchestrator.planner.placement import move_demand
from orchestrator.planner.rebalance import Move, Plan, plan_rebalance
from orchestrator.planner.righting import Cause
from orchestrator.planner.snapshot import NodeState, Snapshot
from orchestrator.resources import (
    Key,
    Node,
    NodeFencing,
    ObjectMeta,
    OperationPhase,
    OperationType,
    Priority,
    RebalancePolicy,
    VirtualMachineOperation,
    find_condition,
    new_metadata,
    parse,
    split_key,
)
from orchestrator.resources.fencing import FencePhase
from orchestrator.resources.rebalancing import (
    EXPLANATION_ANNOTATION,
    POLICY_NAME,
    REASON_ANNOTATION,
    RebalanceSpec,
)
from orchestrator.resources.vmop import PRIORITY_ANNOTATION, MigrateTo, OperationSpec
from orchestrator.services.classes import check_version
from orchestrator.services.context import Context, add_notes, deciding
from orchestrator.services.herd import Herd
from orchestrator.services.operations import create_operation
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors

log = logger(__name__)

_PRIORITIES = {
    Cause.PLACEMENT: Priority.PLACEMENT,
    Cause.LOAD: Priority.BALANCE,
    Cause.EVENNESS: Priority.BALANCE,
}
_LEAST_REST = timedelta(seconds=60)
"""After a move that failed, whatever the policy's cooldown."""
_TOLD_AT_MOST = 20
_FENCING = frozenset({FencePhase.SUSPECT, FencePhase.FENCING, FencePhase.UNCONFIRMED, FencePhase.FENCED})
_LOST_FOR = timedelta(minutes=5)
"""A node whose lease ran out, and that nobody fences, holds up the rest of the herd for so long."""


def load_policy(ctx: Context) -> RebalancePolicy:
    """Give the policy; the default one where none was stored."""
    stored = ctx.store.find(RebalancePolicy, POLICY_NAME)
    return stored or RebalancePolicy(metadata=ObjectMeta(name=POLICY_NAME))


def change_policy(ctx: Context, changes: Mapping[str, Any]) -> RebalancePolicy:
    """Change fields of the policy.

    Args:
        ctx: To work with.
        changes: Values by path in the spec's outside form: `thresholds.cpu`, `enabled`.

    Raises:
        Invalid: Names a field that is not there, or a value that it can't have.
    """

    def decide() -> RebalancePolicy:
        old = load_policy(ctx)
        new = old.with_(spec=changed_spec(old.spec, changes))
        return old if new == old else _put(ctx, old, new)

    changed = deciding(decide)
    _look_soon(ctx)
    return changed


def changed_spec(spec: RebalanceSpec, changes: Mapping[str, Any]) -> RebalanceSpec:
    """Give a spec with fields changed; `changes` and errors are `change_policy`'s."""
    wanted = spec.model_dump(mode="json", by_alias=True)
    for path, value in changes.items():
        *parents, field = path.split(".")
        place = wanted
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise Invalid(f"spec.{path}: unknown field", ((f"spec.{path}", "unknown field"),))
        place[field] = value
    return parse(RebalanceSpec, wanted)


def _look_soon(ctx: Context) -> None:
    """Let what was changed count at the next tick."""
    if not ctx.store.is_dry:
        with redis_errors(ctx.store.redis):
            ctx.store.redis.delete(keys.REBALANCE_SCAN)


def replace_policy(ctx: Context, wanted: RebalancePolicy) -> RebalancePolicy:
    """Replace the policy's spec, labels and annotations; it is made where none was stored.

    Raises:
        Invalid: It is named otherwise than the one that there is.
        ChangedMeanwhile: `metadata.resourceVersion` is given, and another one is stored.
    """
    if wanted.name != POLICY_NAME:
        why = f"there is one policy, named {POLICY_NAME!r}"
        raise Invalid(f"metadata.name: {why}", (("metadata.name", why),))

    def decide() -> RebalancePolicy:
        old = load_policy(ctx)
        check_version(old, wanted)
        meta = old.metadata.with_(labels=wanted.metadata.labels, annotations=wanted.metadata.annotations)
        new = old.with_(metadata=meta, spec=wanted.spec)
        return old if new == old and old.version else _put(ctx, old, new)

    changed = deciding(decide)
    _look_soon(ctx)
    return changed


def keep_policy(ctx: Context) -> RebalancePolicy:
    """Give the policy as it is stored; the default one is stored where there is none, so that people see it."""

    def decide() -> RebalancePolicy:
        found = load_policy(ctx)
        return found if found.version else _put(ctx, found, found)

    return deciding(decide)


def scan(ctx: Context, herd: Herd) -> int:
    """Do what is due: one scan an interval, by whichever worker comes first.

    Returns:
        How many operations were made.
    """
    policy = keep_policy(ctx)
    if not policy.spec.enabled or not _is_due(ctx, policy):
        return 0
    if why := obstacle(ctx, herd):
        log.info("no rebalancing now", why=why)
        return 0
    plan = make_plan(herd, policy)
    _tell(ctx, policy, plan)
    return len(carry_out(ctx, plan))


def obstacle(ctx: Context, herd: Herd) -> str:
    """Say why nothing may be moved for balance now, whatever the plan; empty when nothing is against it."""
    with redis_errors(ctx.store.redis):
        state = cast("str | None", ctx.store.redis.hget(keys.IDENTITY, "state"))
    if state != "normal":
        return f"the herd is in recovery ({state})"
    herd.follower.sync()
    at = ctx.store.now()
    lost = {node.name for node in herd.follower.all(Node) if _is_lost(node, at)}
    lost |= {fencing.name for fencing in herd.follower.all(NodeFencing) if fencing.status.phase in _FENCING}
    return f"node {', '.join(sorted(lost))} is lost, and its VMs come first" if lost else ""


def look(ctx: Context, herd: Herd) -> tuple[str, Plan]:
    """Say what a person would have moved now, and why nothing may be.

    Returns:
        Why (empty: nothing is against it; else the plan is empty), and the plan. The policy's `hold` is for scans.
    """
    why = obstacle(ctx, herd)
    return why, Plan() if why else make_plan(herd, load_policy(ctx), by_hand=True)


def make_plan(herd: Herd, policy: RebalancePolicy, *, by_hand: bool = False) -> Plan:
    """Plan from the herd as it is, and as it will be once what is under way has come to its end.

    Args:
        herd: The copy to plan from.
        policy: To be obeyed.
        by_hand: A person has decided that it is time: `hold` counts scans, and is not asked.
    """
    snapshot = herd.snapshot(whole=True)
    operations = herd.follower.all(VirtualMachineOperation)
    busy = dict(snapshot.busy)
    resting: dict[Key, str] = {}
    for operation in operations:
        key = Key(operation.vm_key)
        if operation.is_open:
            busy[key] = f"operation {operation.name} of it is not finished"
        elif why := _rest_after_failure(operation, policy, snapshot):
            busy[key] = why
    cooldown = timedelta(seconds=policy.spec.cooldown_seconds)
    for key, vm in snapshot.vms.items():
        migrated = vm.status.migration_state
        ended_at = migrated.end_timestamp if migrated is not None and migrated.result == "Succeeded" else None
        if ended_at is not None and snapshot.now - ended_at < cooldown:
            resting[key] = f"it migrated less than {policy.spec.cooldown_seconds} s ago"
    counts = policy.status.over
    hold = 1 if by_hand else policy.spec.hold
    patient = frozenset(name for name in snapshot.nodes if counts.get(name, 0) + 1 < hold)
    snapshot = _with_expected(replace(snapshot, busy=busy), operations)
    return plan_rebalance(snapshot, policy.spec, patient_with=patient, resting=resting)


def carry_out(ctx: Context, plan: Plan) -> list[VirtualMachineOperation]:
    """Make the operations of a plan that need no other one first."""
    made = []
    for move in plan.moves:
        if move.after:
            continue
        try:
            made.append(create_operation(ctx, _operation(move)))
        except (Conflict, Invalid, NotFound, Refused, AlreadyExists) as error:
            log.info("not rebalanced", vm=move.vm, why=str(error))  # it changed since; the next scan sees it
            continue
        log.info("rebalances", vm=move.vm, source=move.source, target=move.target, cause=move.cause, why=move.why)
    return made


def _is_due(ctx: Context, policy: RebalancePolicy) -> bool:
    with redis_errors(ctx.store.redis):
        interval_ms = policy.spec.interval_seconds * 1000 - 500  # ticks are not that exact
        return bool(ctx.store.redis.set(keys.REBALANCE_SCAN, "1", nx=True, px=interval_ms))


def _is_lost(node: Node, at: datetime) -> bool:
    """Whether a node's lease ran out so lately that it may yet be fenced; one that people cordoned is not."""
    ready = find_condition(node.status.conditions, "Ready")
    if ready is None or ready.status != "Unknown" or node.spec.unschedulable:
        return False
    return ready.last_transition_time is None or at - ready.last_transition_time < _LOST_FOR


def _rest_after_failure(operation: VirtualMachineOperation, policy: RebalancePolicy, snapshot: Snapshot) -> str:
    status = operation.status
    if EXPLANATION_ANNOTATION not in operation.metadata.annotations or status.finished_at is None:
        return ""
    rest = max(_LEAST_REST, timedelta(seconds=policy.spec.cooldown_seconds))
    if status.phase is not OperationPhase.FAILED or snapshot.now - status.finished_at >= rest:
        return ""
    return f"operation {operation.name} failed less than {rest.total_seconds():.0f} s ago"


def _with_expected(snapshot: Snapshot, operations: list[VirtualMachineOperation]) -> Snapshot:
    """Count migrations to a certain node that wait for their turn as if they had it."""
    nodes, residents = dict(snapshot.nodes), dict(snapshot.residents)
    for operation in sorted(operations, key=lambda operation: operation.key):
        key, to = Key(operation.vm_key), operation.spec.migrate
        vm, target = snapshot.vms.get(key), nodes.get(to.node_name) if to is not None else None
        waits = operation.is_active and operation.status.grant is None
        if not waits or vm is None or target is None or key not in residents or vm.status.node_name not in nodes:
            continue
        source = snapshot.nodes[vm.status.node_name]
        demand = move_demand(vm, snapshot.class_of(vm), snapshot.memory_overhead_mib, source)
        nodes[target.name] = _with_claim(target, demand.memory_mib, demand.cpu_millicores)
        residents[key] = replace(residents[key], nodes=(source.name, target.name))
    return replace(snapshot, nodes=nodes, residents=residents)


def _with_claim(node: NodeState, memory_mib: int, cpu_millicores: int) -> NodeState:
    return replace(
        node,
        memory_used_mib=node.memory_used_mib + memory_mib,
        cpu_used_millicores=node.cpu_used_millicores + cpu_millicores,
    )


def _operation(move: Move) -> VirtualMachineOperation:
    namespace, name = split_key(move.vm)
    meta = ObjectMeta(
        generate_name=f"rebalance-{name}-"[:57],
        namespace=namespace,
        annotations={
            PRIORITY_ANNOTATION: str(_PRIORITIES[move.cause].value),
            REASON_ANNOTATION: f"{move.cause}: {move.why}",
            EXPLANATION_ANNOTATION: json.dumps(asdict(move)),
        },
    )
    to = MigrateTo(node_name=move.target)
    spec = OperationSpec(type=OperationType.MIGRATE, virtual_machine_name=name, migrate=to)
    return VirtualMachineOperation(metadata=meta, spec=spec)


def _tell(ctx: Context, policy: RebalancePolicy, plan: Plan) -> None:
    """Write what a scan found, where that is news: a herd that is left alone costs no write."""
    over = {name: min(policy.status.over.get(name, 0) + 1, policy.spec.hold) for name in plan.over}
    unresolved = dict(sorted(plan.unresolved.items())[:_TOLD_AT_MOST])
    if (over, unresolved) == (policy.status.over, policy.status.unresolved):
        return

    def decide() -> None:
        old = load_policy(ctx)
        _put(ctx, old, old.with_status(over=over, unresolved=unresolved, scanned_at=ctx.now()))

    deciding(decide)


def _put(ctx: Context, old: RebalancePolicy, new: RebalancePolicy) -> RebalancePolicy:
    batch, at = ctx.store.batch(), ctx.now()
    if not old.version:
        new = new.with_(metadata=new_metadata(new.metadata, namespaced=False, now=at))
        batch.create(new)
    else:
        if new.spec != old.spec:
            new = new.with_(metadata=new.metadata.with_(generation=old.metadata.generation + 1))
        batch.put(old, new)
    news = [Note("Unresolved", f"{what}: {why}", warning=True) for what, why in new.status.unresolved.items()]
    add_notes(batch, (new,), [note for note in news if note.message not in _told(old)], at)
    return ctx.store.must_commit(batch)[0]  # type: ignore[return-value]


def _told(policy: RebalancePolicy) -> set[str]:
    return {f"{what}: {why}" for what, why in policy.status.unresolved.items()}
