"""Draining nodes: what `planner.draining` decides is committed, and then sent.

A drain is one document. Whatever may change what it comes to looks at it again (`step`): an operation's end, a report
on a VM of its node, a cordon, its own timer, which stands among those that reconcile looks at. Reconcile also compares
each open drain with its copy of the herd, so that a lost wake-up costs a round and no process has to stay alive.
"""

from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import cast

from orchestrator.errors import Conflict, Invalid, NotFound, Refused
from orchestrator.logs import logger
from orchestrator.planner.draining import DrainStep, Scene, ended, next_step, sent_home
from orchestrator.planner.flow import Note, revoked
from orchestrator.resources import (
    Condition,
    Node,
    NodeDrain,
    ObjectMeta,
    VirtualMachine,
    VirtualMachineOperation,
    new_metadata,
    with_condition,
)
from orchestrator.resources.drain import BRING_BACK_ANNOTATION, DrainCause, DrainPhase, DrainSpec, DrainStatus, VmState
from orchestrator.resources.selectors import parse_selector
from orchestrator.services.context import Context, add_notes, deciding, wake_grant
from orchestrator.services.drain_scenes import copied_scene, scene_of
from orchestrator.services.evacuation import evacuation
from orchestrator.services.herd import Herd
from orchestrator.services.operations import delete_operation, put_operation
from orchestrator.services.results import publish_result
from orchestrator.store import Batch, keys

log = logger(__name__)

DRAINED = "Drained"
"""Condition of a node: True once it is empty; False while it is being drained, or with the reason why it is not."""
_TIMER = "drain/"
_AT_A_TIME = 100
"""So many operations are made in one commit; the rest follow at once."""


# --- what is asked for ------------------------------------------------------------------------------------------------


def begin(ctx: Context, node: str, spec: DrainSpec, *, cordon: bool = True) -> NodeDrain:
    """Have a node emptied; returns at once. A drain of it that is open already goes on with what is asked now.

    Args:
        ctx: To work with.
        node: Its name.
        spec: What is asked.
        cordon: Whether the node is cordoned by it; else it has to be kept empty by something else.

    Raises:
        NotFound: No such node.
        Invalid: The selector is none.
    """
    parse_selector(spec.selector, "spec.selector")

    def decide() -> NodeDrain:
        found, old, now = ctx.store.get(Node, node), ctx.store.find(NodeDrain, node), ctx.store.now()
        new = _begun(node, old, spec, now)
        is_open = old is not None and old.status.phase is DrainPhase.DRAINING and new.spec == old.spec
        if old is not None and is_open and (found.spec.unschedulable or not cordon):
            return old
        batch = ctx.store.batch()
        _put(batch, old, new)
        drained = found.with_(spec=found.spec.with_(unschedulable=found.spec.unschedulable or cordon))
        batch.put(found, _with_condition(drained, new, ctx.now()))
        goes_on = old is not None and old.status.phase is DrainPhase.DRAINING
        notes = [] if goes_on else [Note("NodeDrainStarted", f"asked for by {spec.requested_by or spec.cause.value}")]
        if drained.spec.unschedulable and not found.spec.unschedulable:
            notes.insert(0, Note("NodeCordoned", "no VM starts or lands here"))
        add_notes(batch, (found,), notes, ctx.now())
        _put_timer(batch, new, now, new.status.deadline_at)
        return cast("NodeDrain", ctx.store.must_commit(batch)[0])

    drain = deciding(decide)
    step(ctx, node)
    return ctx.store.find(NodeDrain, node) or drain


def evict(ctx: Context, vm: VirtualMachine) -> NodeDrain:
    """Have one VM leave its node, which is cordoned, as `kubectl drain` asks: it is asked for until it has left.

    Several of these on one node are one drain, which ends when all of them have left, or the node is uncordoned.

    Raises:
        NotFound: Its node is not in the herd.
        Refused: Its node is not cordoned: then one operation is all that can be asked for.
    """
    node = vm.status.node_name
    if not ctx.store.get(Node, node).spec.unschedulable:
        raise Refused(f"node {node!r} is not cordoned")
    spec = DrainSpec(cause=DrainCause.EVICTION, requested_by="evictions", every=False, vms=(vm.key,))
    return begin(ctx, node, spec, cordon=False)


def _begun(node: str, old: NodeDrain | None, spec: DrainSpec, now: datetime) -> NodeDrain:
    """Give the drain that is on record from now on: a new one, or the open one with what is asked now."""
    deadline = now + timedelta(seconds=spec.timeout_s) if spec.timeout_s else None
    status = DrainStatus(started_at=now, deadline_at=deadline, message="begins")
    if old is None:
        meta = new_metadata(ObjectMeta(name=node), namespaced=False, now=now)
        return NodeDrain(metadata=meta, spec=spec, status=status)
    if old.status.phase is not DrainPhase.DRAINING:
        kept = {key: vm for key, vm in old.vms.items() if vm.state in {VmState.MOVING, VmState.RETURNING}}
        meta = old.metadata.with_(deletion_timestamp=None)
        return old.with_(metadata=meta, spec=spec, status=status.with_(vms=kept))
    wider = old.spec if _covers(old.spec, spec) else spec
    is_all = wider.every and not wider.selector
    vms = () if is_all else tuple(dict.fromkeys((*old.spec.vms, *spec.vms)))
    return old.with_(
        spec=wider.with_(vms=vms, timeout_s=spec.timeout_s or old.spec.timeout_s),
        status=old.status.with_(deadline_at=deadline or old.status.deadline_at),
    )


def _covers(old: DrainSpec, new: DrainSpec) -> bool:
    """Whether an open drain is about all that a new wish is about, and is not ended by less."""
    if new.cause is DrainCause.HOST_SHUTDOWN or new.cause is DrainCause.EVICTION:
        return not new.every or (old.every and not old.selector)
    return old == new.with_(timeout_s=old.timeout_s)


def cancel(ctx: Context, node: str, why: str) -> NodeDrain:
    """End a drain: what has not begun is dropped, what has goes on, and the node stays cordoned.

    Returns:
        The drain; VMs whose state is Moving are still under way.

    Raises:
        NotFound: The node was never drained.
    """

    def decide() -> NodeDrain:
        old = ctx.store.get(NodeDrain, node)
        if not old.is_open:
            return old
        now = ctx.store.now()
        new = ended(old, DrainPhase.CANCELLED, why, now)
        batch = ctx.store.batch()
        _put(batch, old, new)
        _put_condition(ctx, batch, new)
        _put_timer(batch, new, now, None)
        add_notes(batch, (ctx.store.find(Node, node),), (Note("NodeDrainCancelled", why),), ctx.now())
        return cast("NodeDrain", ctx.store.must_commit(batch)[0])

    drain = deciding(decide)
    step(ctx, node)
    return ctx.store.find(NodeDrain, node) or drain


def uncordon(ctx: Context, node: str, *, bring_back: bool | None = None) -> bool:
    """Let VMs start and land on a node again; evacuations that have not begun are dropped.

    Args:
        ctx: To work with.
        node: Its name.
        bring_back: Whether the VMs that its last drain moved come home, as far as rules and room allow; None: as the
            node's annotation says, or else the setting.

    Returns:
        Whether anything changed.

    Raises:
        NotFound: No such node.
    """

    def decide() -> bool:
        old, drain, now = ctx.store.get(Node, node), ctx.store.find(NodeDrain, node), ctx.store.now()
        batch, notes = ctx.store.batch(), list[Note]()
        said = old.metadata.annotations.get(BRING_BACK_ANNOTATION, str(ctx.config.bring_back).lower()) == "true"
        returns = said if bring_back is None else bring_back
        new, after = old.with_(spec=old.spec.with_(unschedulable=False)), drain
        if old.spec.unschedulable:
            notes.append(Note("NodeUncordoned", ""))
        if drain is not None and drain.status.phase is DrainPhase.DRAINING and not new.is_shutting_down:
            after = ended(drain, DrainPhase.CANCELLED, "its node was uncordoned", now)
            notes.append(Note("NodeDrainCancelled", "its node was uncordoned"))
        elif drain is not None and drain.status.phase is DrainPhase.DRAINED:
            after = drain.with_status(phase=DrainPhase.UNCORDONED)
        if returns and after is not None and any(vm.moved for vm in after.vms.values()):
            after = sent_home(after, now)
            notes.append(Note("VirtualMachinesReturn", "those that its drain moved come home"))
        if drain is not None and after is not None and after != drain:
            _put(batch, drain, after)
            _put_timer(batch, after, now, None)
        if new.spec != old.spec or after != drain:
            new = _with_condition(new, after, ctx.now()) if after is not None else new
        if new == old and after == drain:
            return False
        if new != old:
            batch.put(old, new)
        add_notes(batch, (old,), notes, ctx.now())
        ctx.store.must_commit(batch)
        return True

    changed = deciding(decide)
    if changed:
        step(ctx, node)
        wake_grant(ctx)
    return changed


def remove(ctx: Context, node: str, why: str) -> NodeDrain:
    """End a drain as `cancel` does, and forget it, and with it the way home, once what it had begun has ended.

    Returns:
        The drain; as it was at its end, when it is forgotten already.

    Raises:
        NotFound: The node was never drained.
    """
    if ctx.store.get(NodeDrain, node).is_open:
        cancel(ctx, node, why)

    def decide() -> NodeDrain:
        old = ctx.store.get(NodeDrain, node)
        if old.is_open or old.metadata.deletion_timestamp is not None:
            return old  # asked for anew since, or forgotten soon
        new = old.with_(metadata=old.metadata.with_(deletion_timestamp=ctx.now()))
        return cast("NodeDrain", ctx.store.must_commit(ctx.store.batch().put(old, new))[0])

    drain = deciding(decide)
    step(ctx, node)
    return ctx.store.find(NodeDrain, node) or drain


# --- what follows -----------------------------------------------------------------------------------------------------


def step(ctx: Context, node: str) -> None:
    """Look at a node's drain, if there is one, and do what it comes to now."""
    if ctx.store.is_dry:
        return  # nothing follows from what is only tried out, and whoever waits for it would wait for ever
    drop: list[VirtualMachineOperation] = []
    woken = False

    def decide() -> bool:
        nonlocal woken
        drop.clear()
        drain = ctx.store.find(NodeDrain, node)
        if drain is None or not _is_to_be_looked_at(drain):
            return False
        if _is_to_be_forgotten(drain):
            ctx.store.must_commit(ctx.store.batch().delete(drain))
            return False
        now = ctx.store.now()
        scene = scene_of(ctx.store, drain, now)
        decided = next_step(scene)
        more = len(decided.begin) > _AT_A_TIME
        if more:
            decided = replace(decided, begin=decided.begin[:_AT_A_TIME], next_at=now)
        drop.extend(decided.drop)
        if not _is_news(scene, decided):
            return False
        _commit(ctx, scene, decided)
        woken = woken or bool(decided.begin or decided.revoke)
        return more

    while deciding(decide):
        pass
    for operation in drop:
        try:
            delete_operation(ctx, operation.key, seen=operation)  # one that has begun since is not aborted for it
        except NotFound:
            continue
    if drop:
        step(ctx, node)
    elif woken:
        wake_grant(ctx)


def keep_drains(ctx: Context, herd: Herd) -> None:
    """Look at each drain that is not over, from the copy; only one that has something to come to is decided on."""
    every = {drain.name: drain for drain in herd.follower.all(NodeDrain)}
    for found in herd.follower.all(Node):
        drain = every.get(found.name)
        is_lost = drain is None or drain.status.phase not in {DrainPhase.DRAINING, DrainPhase.DRAINED}
        if found.is_shutting_down and found.is_ready and is_lost:
            begin_host_shutdown(ctx, found.name)  # whoever took that report in has died before
    drains = [drain for drain in every.values() if _is_to_be_looked_at(drain)]
    if not drains:
        return
    now = ctx.store.now()
    with herd.follower.lock:
        behind = []
        for drain in drains:
            scene = copied_scene(herd.follower, drain, now)
            decided = next_step(scene)
            if decided.drop or _is_news(scene, decided) or _is_to_be_forgotten(drain):
                behind.append(drain.name)
    for node in sorted(behind):
        try:
            step(ctx, node)
        except Conflict as error:
            log.warning("a drain lost a race too often", node=node, error=str(error))


def is_timer(key: str) -> bool:
    """Whether something that is awaited is the next look at a drain."""
    return key.startswith(_TIMER)


def press(ctx: Context, key: str) -> None:
    """A drain's timer is over."""
    batch = ctx.store.batch().check("due", keys.AWAITING, key).effect("ZREM", keys.AWAITING, key)
    ctx.store.commit(batch)  # a timer that was set anew meanwhile stays
    step(ctx, key.removeprefix(_TIMER))


def _is_to_be_looked_at(drain: NodeDrain) -> bool:
    is_kept = drain.is_open or drain.is_winding_down or drain.status.phase is DrainPhase.DRAINED
    return is_kept or _is_to_be_forgotten(drain)


def _is_to_be_forgotten(drain: NodeDrain) -> bool:
    """Whether a drain was deleted, and nothing of it is under way any more."""
    return drain.metadata.deletion_timestamp is not None and not (drain.is_open or drain.is_winding_down)


def _is_news(scene: Scene, decided: DrainStep) -> bool:
    return decided.drain != scene.drain or bool(decided.begin or decided.revoke)


def _commit(ctx: Context, scene: Scene, decided: DrainStep) -> None:
    """Commit a step: the drain, its operations, its node's condition, and when it is looked at next."""
    at = ctx.now()
    batch, new, ends = ctx.store.batch(), decided.drain, list[VirtualMachineOperation]()
    for one in decided.begin:
        operation = evacuation(one.vm, new.name, one.type, to=one.to)
        vms = dict(new.vms)
        try:
            superseded = put_operation(ctx, batch, operation, at)
        except (Invalid, NotFound, Refused) as error:  # it changed since it was looked at: it is looked at again
            vms[one.vm.key] = vms[one.vm.key].with_(state=_before(scene, one.vm.key), message=str(error))
        else:
            vms[one.vm.key] = vms[one.vm.key].with_(operation=operation.name)
            ends += [superseded] if superseded is not None else []
        new = new.with_status(vms=vms)
    for operation in decided.revoke:
        grant = operation.status.grant
        assert grant is not None  # noqa: S101 - what is taken back was given
        batch.put(operation, revoked(operation, f"node {new.name} is being drained", at))
        batch.wake(grant.node, "cancel")
    _put(batch, scene.drain, new)
    if new.status.phase is not scene.drain.status.phase:
        _put_condition(ctx, batch, new)
    _put_timer(batch, new, scene.now, decided.next_at)
    add_notes(batch, (scene.node,), decided.notes, at)
    batch.tell("drain", node=new.name, phase=new.status.phase.value, message=new.status.message)
    ctx.store.must_commit(batch)
    for operation in ends:
        publish_result(ctx, operation)


def _before(scene: Scene, key: str) -> VmState:
    before = scene.drain.vms.get(key)
    if before is not None and before.state is VmState.RETURNING:
        return VmState.RETURNING
    return VmState.WAITING


def _put(batch: Batch, old: NodeDrain | None, new: NodeDrain) -> None:
    if old is None:
        batch.create(new)
    elif new != old:
        batch.put(old, new)


def _put_timer(batch: Batch, drain: NodeDrain, now: datetime, at: datetime | None) -> None:
    if at is None or not drain.is_open:
        batch.effect("ZREM", keys.AWAITING, _TIMER + drain.name)
    else:
        wait_ms = max(0, int((at - now).total_seconds() * 1000) + 1)
        batch.effect("DEADLINE", keys.AWAITING, _TIMER + drain.name, wait_ms)


def _put_condition(ctx: Context, batch: Batch, drain: NodeDrain) -> None:
    """Say on the node how its drain is; the commit then also fails if somebody uncordoned it meanwhile."""
    node = ctx.store.find(Node, drain.name)
    if node is not None:
        batch.put(node, _with_condition(node, drain, ctx.now()))


def _with_condition(node: Node, drain: NodeDrain, at: datetime) -> Node:
    phase = drain.status.phase
    condition = Condition(
        type=DRAINED,
        status="True" if phase is DrainPhase.DRAINED else "False",
        reason=phase.value,
        message=drain.status.message if not drain.is_open else "",
    )
    return node.with_status(conditions=with_condition(node.status.conditions, condition, at))


def wake_for(ctx: Context, *nodes: str) -> None:
    """Look at the drains of nodes on which something has changed."""
    for node in dict.fromkeys(name for name in nodes if name):
        step(ctx, node)


def begin_host_shutdown(ctx: Context, node: str) -> None:
    """A host has begun to shut down: its VMs leave. Its own deadline ends that, not ours."""
    begin(ctx, node, DrainSpec(cause=DrainCause.HOST_SHUTDOWN, requested_by="its host, which shuts down"), cordon=False)


def after(ctx: Context, *nodes: str) -> "partial[None]":
    """Give what is to be done after a commit that may let drains go on."""
    return partial(wake_for, ctx, *nodes)
