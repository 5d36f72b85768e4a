"""Rolling maintenance: what `planner.maintaining` decides is committed, and then done; hooks are claimed and recorded.

Reconcile looks at every open maintenance, with its copy of the herd: whether one more node can be spared is a question
to the whole of it. Whoever runs hooks (`vmherd maintain`) claims one, says that it goes on, and records its end.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import cast

from orchestrator.errors import AlreadyExists, Conflict, Invalid, NotFound, Refused
from orchestrator.logs import logger
from orchestrator.planner.drain import plan_drain
from orchestrator.planner.draining import is_on
from orchestrator.planner.flow import Note
from orchestrator.planner.maintaining import MaintenanceStep, claimed, hook_ended, in_sight, next_maintenance, resumed
from orchestrator.planner.snapshot import Snapshot
from orchestrator.resources import Maintenance, Node, NodeDrain, ObjectMeta, VirtualMachine, new_metadata
from orchestrator.resources.drain import DrainCause, DrainPhase, DrainSpec
from orchestrator.resources.maintenance import (
    LONGEST_OUTPUT,
    MaintenancePhase,
    MaintenanceSpec,
    MaintenanceStatus,
    NodeStage,
)
from orchestrator.services import drains
from orchestrator.services.classes import check_version
from orchestrator.services.context import Context, add_notes, deciding
from orchestrator.services.herd import Herd

log = logger(__name__)

_STEPS_AT_ONCE = 5
"""A node that is back is uncordoned, is done, and lets the next one begin, in one round of reconcile."""
LEASE = timedelta(seconds=60)
"""For so long a hook's claim counts; whoever runs it renews it three times as often."""


# --- what is asked for ------------------------------------------------------------------------------------------------


def begin(ctx: Context, name: str, spec: MaintenanceSpec) -> Maintenance:
    """Begin a maintenance, or give the one of that name, which goes on. Raises as `create` and `check_same`."""

    def decide() -> Maintenance:
        found = ctx.store.find(Maintenance, name)
        if found is not None:
            return check_same(found, spec)
        try:
            return create(ctx, ObjectMeta(name=name), spec)
        except AlreadyExists as error:
            raise Conflict(str(error)) from error

    return deciding(decide)


def check_same(found: Maintenance, spec: MaintenanceSpec) -> Maintenance:
    """Give a maintenance that is there, if it is the one that is meant.

    Raises:
        Refused: It is about something else.
    """
    if (found.spec.nodes, found.spec.hook) != (tuple(dict.fromkeys(spec.nodes)), spec.hook):
        raise Refused(f"Maintenance {found.name!r} is there already, and about other nodes or another hook")
    return found


def create(ctx: Context, meta: ObjectMeta, spec: MaintenanceSpec) -> Maintenance:
    """Begin a maintenance.

    Args:
        ctx: To work with.
        meta: Its name, labels and annotations.
        spec: What is asked.

    Raises:
        AlreadyExists: There is one of that name.
        NotFound: A node is not in the herd.
        Refused: A node is in another one that is open.
        Invalid: The name can't be one.
    """

    def decide() -> Maintenance:
        now = ctx.store.now()
        own = new_metadata(meta, namespaced=False, now=now)
        if ctx.store.find(Maintenance, own.name) is not None:
            raise AlreadyExists(f"Maintenance {own.name!r} already exists")
        known = ctx.store.many(Node, spec.nodes)
        if missing := [node for node in spec.nodes if node not in known]:
            raise NotFound(f"Node {', '.join(map(repr, missing))} not found")
        for other in ctx.store.all(Maintenance):
            if other.is_open and (both := set(other.spec.nodes) & set(spec.nodes)):
                raise Refused(f"node {min(both)!r} is in Maintenance {other.name!r}, which is {other.status.phase}")
        status = MaintenanceStatus(started_at=now, message="begins")
        new = Maintenance(metadata=own, spec=spec.with_(nodes=tuple(dict.fromkeys(spec.nodes))), status=status)
        batch = ctx.store.batch().create(new)
        add_notes(batch, (new,), (Note("MaintenanceStarted", f"asked for by {spec.requested_by}"),), ctx.now())
        return cast("Maintenance", ctx.store.must_commit(batch)[0])

    return deciding(decide)


def pause(ctx: Context, name: str, why: str) -> Maintenance:
    """Let no node and no hook be begun; what has begun comes to its end.

    Raises:
        NotFound: No such maintenance.
    """
    return _set_phase(ctx, name, {MaintenancePhase.RUNNING}, MaintenancePhase.PAUSED, why)


def stop(ctx: Context, name: str, why: str) -> Maintenance:
    """End a maintenance: a hook that runs comes to its end, and its node takes VMs again; nothing else is begun."""
    running = {MaintenancePhase.RUNNING, MaintenancePhase.PAUSED}
    return _set_phase(ctx, name, running, MaintenancePhase.STOPPING, why)


def resume(ctx: Context, name: str) -> Maintenance:
    """Let a paused maintenance go on; a node that failed goes on from where it did.

    Raises:
        NotFound: No such maintenance.
        Refused: It is not paused.
    """

    def decide() -> Maintenance:
        old = ctx.store.get(Maintenance, name)
        if old.status.phase is MaintenancePhase.RUNNING:
            return old
        if old.status.phase is not MaintenancePhase.PAUSED:
            raise Refused(f"Maintenance {name!r} is {old.status.phase}, not Paused")
        new = resumed(old, ctx.store.now())
        batch = ctx.store.batch().put(old, new)
        add_notes(batch, (new,), (Note("MaintenanceResumed", ""),), ctx.now())
        return cast("Maintenance", ctx.store.must_commit(batch)[0])

    return deciding(decide)


def update(ctx: Context, wanted: Maintenance, *, paused: bool, who: str) -> Maintenance:
    """Replace what may be changed of a maintenance: its labels and annotations, and whether it is paused.

    Args:
        ctx: To work with.
        wanted: Its status counts for nothing.
        paused: Whether it is to be.
        who: For people.

    Raises:
        NotFound: No such maintenance.
        Invalid: Another field of its spec differs.
        ChangedMeanwhile: `metadata.resourceVersion` is given, and another one is stored.
        Refused: It has ended, or is about to.
    """

    def decide() -> Maintenance:
        old = ctx.store.get(Maintenance, wanted.name)
        check_version(old, wanted)
        before = old.spec.model_dump(by_alias=True)
        after = wanted.spec.with_(requested_by=old.spec.requested_by).model_dump(by_alias=True)
        causes = tuple((f"spec.{name}", "can't be changed") for name in before if before[name] != after[name])
        if causes:
            raise Invalid("; ".join(f"{path}: {why}" for path, why in causes), causes)
        phase = old.status.phase
        if paused and phase not in {MaintenancePhase.RUNNING, MaintenancePhase.PAUSED}:
            raise Refused(f"Maintenance {old.name!r} is {phase}: it can't be paused")
        meta = old.metadata.with_(labels=wanted.metadata.labels, annotations=wanted.metadata.annotations)
        if meta == old.metadata:
            return old
        return cast("Maintenance", ctx.store.must_commit(ctx.store.batch().put(old, old.with_(metadata=meta)))[0])

    found = deciding(decide)
    if paused:
        return pause(ctx, found.name, f"paused by {who}")
    return resume(ctx, found.name) if found.status.phase is MaintenancePhase.PAUSED else found


def remove(ctx: Context, name: str, why: str) -> Maintenance:
    """End a maintenance as `stop` does, and forget it once it has ended.

    Returns:
        The maintenance; as it was at its end, when it is forgotten already.

    Raises:
        NotFound: No such maintenance.
    """
    stop(ctx, name, why)

    def decide() -> Maintenance:
        old = ctx.store.get(Maintenance, name)
        batch = ctx.store.batch()
        if not old.is_open:
            ctx.store.must_commit(batch.delete(old))
            return old
        if old.metadata.deletion_timestamp is not None:
            return old
        new = old.with_(metadata=old.metadata.with_(deletion_timestamp=ctx.now()))
        return cast("Maintenance", ctx.store.must_commit(batch.put(old, new))[0])

    return deciding(decide)


def _set_phase(ctx: Context, name: str, when: set[MaintenancePhase], phase: MaintenancePhase, why: str) -> Maintenance:
    def decide() -> Maintenance:
        old = ctx.store.get(Maintenance, name)
        if old.status.phase not in when:
            return old
        batch = ctx.store.batch().put(old, old.with_status(phase=phase, message=why))
        add_notes(batch, (old,), (Note(f"Maintenance{phase.value}", why),), ctx.now())
        return cast("Maintenance", ctx.store.must_commit(batch)[0])

    return deciding(decide)


# --- hooks ------------------------------------------------------------------------------------------------------------


def claim_hook(ctx: Context, name: str, holder: str) -> str | None:
    """Claim the next hook that is to be run; that is on record before it runs.

    Returns:
        The node's name; None when none is to be run now.
    """

    def decide() -> str | None:
        old = ctx.store.get(Maintenance, name)
        if old.status.phase is not MaintenancePhase.RUNNING:
            return None
        ready = [node for node in old.spec.nodes if old.node(node).stage is NodeStage.DRAINED]
        found = ctx.store.many(Node, ready)
        for node in ready:
            if node not in found or not found[node].spec.unschedulable:  # type: ignore[index] # a node's key is its name
                continue
            present = found[node]  # type: ignore[index]
            new = claimed(old, node, present, holder, ctx.store.now(), LEASE)
            batch = ctx.store.batch().put(old, new).check("unchanged", Node.kind_name, node, present.version)
            add_notes(batch, (present,), (Note("HookStarted", new.node(node).message),), ctx.now())
            ctx.store.must_commit(batch)
            return node
        return None

    return deciding(decide)


def renew_hook(ctx: Context, name: str, node: str, holder: str) -> bool:
    """Say that a hook is being run still; tells whether it is still this holder's."""

    def decide() -> bool:
        old = ctx.store.get(Maintenance, name)
        if (before := old.node(node)).holder != holder:
            return False
        new = old.with_node(node, before.with_(lease_until=ctx.store.now() + LEASE))
        ctx.store.must_commit(ctx.store.batch().put(old, new))
        return True

    return deciding(decide)


def end_hook(ctx: Context, name: str, node: str, holder: str, exit_code: int, output: str) -> bool:
    """Record how a hook ended; False where its claim had run out, and another runs it, or will."""

    def decide() -> bool:
        old = ctx.store.get(Maintenance, name)
        if old.node(node).holder != holder:
            return False
        new = hook_ended(old, node, exit_code, output[-LONGEST_OUTPUT:], ctx.store.now())
        batch = ctx.store.batch().put(old, new)
        note = Note("HookEnded", f"with code {exit_code}", warning=exit_code != 0)
        add_notes(batch, (ctx.store.find(Node, node),), (note,), ctx.now())
        ctx.store.must_commit(batch)
        return True

    return deciding(decide)


# --- what follows -----------------------------------------------------------------------------------------------------


def keep_maintenances(ctx: Context, herd: Herd) -> None:
    """Take each open maintenance as far as it goes now."""
    every = herd.follower.all(Maintenance)
    open_ones = sorted(m.name for m in every if m.is_open or m.metadata.deletion_timestamp is not None)
    for name in open_ones:
        try:
            for _ in range(_STEPS_AT_ONCE):
                if not deciding(lambda name=name: _step(ctx, herd, name)):  # type: ignore[misc]
                    break
        except Conflict as error:
            log.warning("a maintenance lost a race too often", maintenance=name, error=str(error))


def _step(ctx: Context, herd: Herd, name: str) -> bool:
    """Take one step; tells whether something was done that another step may follow from at once."""
    old = ctx.store.find(Maintenance, name)
    if old is None:
        return False
    if not old.is_open:
        if old.metadata.deletion_timestamp is not None:
            ctx.store.must_commit(ctx.store.batch().delete(old))
        return False
    now = ctx.store.now()
    names = in_sight(old)
    nodes = {str(key): node for key, node in ctx.store.many(Node, names).items()}
    known = {str(key): drain for key, drain in ctx.store.many(NodeDrain, names).items()}
    step = next_maintenance(old, nodes, known, _Room(herd, old).admit, now)
    if step.maintenance != old:
        _commit(ctx, old, step, nodes)
    spec = old.spec
    for node in step.drain:  # state first: whoever finds the stage does this again
        wanted = DrainSpec(
            cause=DrainCause.MAINTENANCE, requested_by=f"maintenance {name}", timeout_s=spec.drain_timeout_s
        )
        _drain(ctx, node, wanted)
    for node in step.cancel:
        _try_cancel(ctx, node, name)
    for node in step.uncordon:
        drains.uncordon(ctx, node, bring_back=spec.bring_back)
    return bool(step.drain or step.cancel or step.uncordon or step.maintenance.away != old.away)


def _drain(ctx: Context, node: str, spec: DrainSpec) -> None:
    try:
        drains.begin(ctx, node, spec)
    except NotFound as error:  # it was taken out of the herd meanwhile: it is looked at again
        log.warning("not drained", node=node, error=str(error))


def _try_cancel(ctx: Context, node: str, name: str) -> None:
    try:
        drains.cancel(ctx, node, f"maintenance {name} was stopped")
    except NotFound:
        return


def _commit(ctx: Context, old: Maintenance, step: MaintenanceStep, nodes: dict[str, Node]) -> None:
    batch = ctx.store.batch().put(old, step.maintenance)
    for name, note in step.notes:
        subject = nodes.get(name) if name else step.maintenance
        add_notes(batch, (subject,), (note,), ctx.now())
    batch.tell("maintenance", name=old.name, phase=step.maintenance.status.phase.value, message=old.status.message)
    ctx.store.must_commit(batch)


class _Room:
    """Answers whether one more node can be spared; the herd is looked at when that is asked first."""

    def __init__(self, herd: Herd, maintenance: Maintenance) -> None:
        self.herd = herd
        self.maintenance = maintenance
        self._snapshot: Snapshot | None = None

    def admit(self, away: Iterable[str], candidate: str) -> str:
        """Say why a node can't be emptied besides those that are away; empty when it can."""
        if self._snapshot is None:
            self._snapshot = self.herd.snapshot()
        follower = self.herd.follower
        draining = [d.name for d in follower.all(NodeDrain) if d.status.phase is DrainPhase.DRAINING]
        gone = {*away, *draining}
        vms = follower.all(VirtualMachine)
        plan = plan_drain(
            self._snapshot,
            [vm for vm in vms if is_on(vm, candidate)],
            away=frozenset({*gone, candidate}),
            bandwidth_mib_s=self.herd.store.config.bandwidth_mib_s,
            besides=[vm for vm in vms if vm.status.node_name in gone and vm.status.phase.occupies_node],
        )
        return plan.problem()
