"""What a drain comes to next: pure, from what is on record of its node and its VMs.

A drain is a wish ("no VM here, and nothing on its way here") that is looked at again whenever something changes, and at
the moments that it names itself (`DrainStep.next_at`). So it needs no process of its own, and looking too often does no
harm: the same state gives the same answer, and an answer that says nothing new is not committed.

It ends only when neither a record nor the host shows a VM of ours, and no grant to bring one is open. Until then the
node is cordoned; should somebody uncordon it, the drain is over, and what has not begun is dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from orchestrator.planner.applicability import inapplicable
from orchestrator.planner.flow import Note
from orchestrator.planner.preflight import immovable
from orchestrator.resources import (
    Action,
    GrantState,
    Key,
    Node,
    OperationPhase,
    OperationType,
    Priority,
    Reason,
    RunPolicy,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
    find_condition,
)
from orchestrator.resources.drain import (
    DRAIN_ANNOTATION,
    STRATEGY_ANNOTATION,
    DrainCause,
    DrainPhase,
    NodeDrain,
    Strategy,
    VmDrain,
    VmState,
)
from orchestrator.resources.selectors import parse_selector, pod_labels
from orchestrator.resources.vmop import OperationSpec

BACKOFF_FIRST = timedelta(seconds=10)
BACKOFF_MOST = timedelta(minutes=5)
STUCK_AFTER = timedelta(hours=1)
"""A drain that takes longer is told as a warning, once (the platform's alert NodeEvacuationStuck)."""
_NAMED_AT_MOST = 5
_NO_ROOM = frozenset({Reason.TARGET_UNSCHEDULABLE.value, Reason.TARGET_DISK_ERROR.value})
_POLICY_RANK = {
    RunPolicy.ALWAYS_ON: 0,
    RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY: 1,
    RunPolicy.MANUAL: 2,
    RunPolicy.ALWAYS_OFF: 3,
}
_ON_THE_WAY = frozenset({VmState.MOVING, VmState.RETURNING})


@dataclass(frozen=True, slots=True)
class Scene:
    """What a drain is decided from.

    Attributes:
        drain: As it is on record.
        node: None while the node is not in the herd.
        vms: Those of the drain, those that are on record on the node, and those that its host shows.
        operations: Of these VMs, the ones that are not finished, by VM.
        ended: Those that the drain names and that are finished, by VM.
        inbound: Migrations whose grant names the node as target.
        shown: VMs (keys) whose domain the node's host shows; their copy there may be an outdated one.
        now: By Redis's clock.
    """

    drain: NodeDrain
    node: Node | None
    vms: Mapping[Key, VirtualMachine]
    operations: Mapping[str, VirtualMachineOperation]
    ended: Mapping[str, VirtualMachineOperation]
    inbound: tuple[VirtualMachineOperation, ...]
    shown: frozenset[str]
    now: datetime


@dataclass(frozen=True, slots=True)
class Begin:
    """An operation to be made; `to` is a node, where only that one will do."""

    vm: VirtualMachine
    type: OperationType
    to: str = ""


@dataclass(frozen=True, slots=True)
class DrainStep:
    """What is to be committed, and then sent.

    Attributes:
        drain: As it is to be; the operations of `begin` are to be named in it.
        begin: In the order in which they are to be served: what takes longest, and is hardest to place, goes first.
        revoke: Whose grants are taken back.
        drop: Not begun, and not wanted any more.
        next_at: When to look again though nothing changed.
    """

    drain: NodeDrain
    begin: tuple[Begin, ...] = ()
    revoke: tuple[VirtualMachineOperation, ...] = ()
    drop: tuple[VirtualMachineOperation, ...] = ()
    notes: tuple[Note, ...] = ()
    next_at: datetime | None = None


@dataclass(slots=True)
class _Found:
    """What the look at each VM collects."""

    vms: dict[str, VmDrain] = field(default_factory=dict)
    begin: list[Begin] = field(default_factory=list)
    revoke: list[VirtualMachineOperation] = field(default_factory=list)
    drop: list[VirtualMachineOperation] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def next_step(scene: Scene) -> DrainStep:
    """Decide what a drain comes to now."""
    drain = scene.drain
    if scene.node is None:
        return DrainStep(drain)  # its host was taken out of the herd; it is still to be empty when it comes back
    match drain.status.phase:
        case DrainPhase.DRAINING if not _is_wanted(scene.node, drain):
            over = "its host is up again" if drain.spec.cause is DrainCause.HOST_SHUTDOWN else "its node was uncordoned"
            return _winding_down(scene, ended(drain, DrainPhase.CANCELLED, over, scene.now))
        case DrainPhase.DRAINING:
            return _draining(scene)
        case DrainPhase.RETURNING if not scene.node.spec.unschedulable:
            return _returning(scene)
        case DrainPhase.RETURNING:
            return _winding_down(scene, ended(drain, DrainPhase.CANCELLED, "its node was cordoned", scene.now))
        case DrainPhase.DRAINED if not _is_wanted(scene.node, drain):
            return DrainStep(drain.with_status(phase=DrainPhase.UNCORDONED))
        case _:
            return _winding_down(scene, drain)


def ended(drain: NodeDrain, phase: DrainPhase, message: str, now: datetime) -> NodeDrain:
    """Give a drain that is over; what it had begun is wound down."""
    return drain.with_status(phase=phase, message=message, finished_at=now)


def backoff(failures: int) -> timedelta:
    """Give the wait before the next evacuation after so many that failed in a row, >= 1: 10 s, doubled up to 5 min."""
    return min(BACKOFF_FIRST * (1 << min(failures - 1, 10)), BACKOFF_MOST)


def strategy_of(vm: VirtualMachine) -> Strategy:
    """Give what is to be done about a VM that can't leave; what can't be read is the cautious one."""
    word = vm.metadata.annotations.get(STRATEGY_ANNOTATION, "")
    return Strategy.SHUT_DOWN if word == Strategy.SHUT_DOWN else Strategy.WAIT


def is_to_leave(drain: NodeDrain, vm: VirtualMachine) -> bool:
    """Whether a drain is about a VM that is on its node."""
    if vm.key in drain.spec.vms:
        return True
    return drain.spec.every and parse_selector(drain.spec.selector, "spec.selector").matches(pod_labels(vm))


def is_on(vm: VirtualMachine, node: str) -> bool:
    """Whether a VM is on record on a node, running or being started."""
    return vm.status.node_name == node and vm.status.phase.occupies_node


def describe_left(drain: NodeDrain) -> str:
    """Name the VMs that are left, with what each waits for: `a (host device pci ...), b`."""
    left = sorted(drain.left().items())
    parts = [
        key.partition("/")[2] + (f" ({vm.message})" if vm.message and vm.state is not VmState.MOVING else "")
        for key, vm in left
    ]
    more = len(parts) - _NAMED_AT_MOST
    return ", ".join(parts[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _is_wanted(node: Node, drain: NodeDrain) -> bool:
    if drain.spec.cause is DrainCause.HOST_SHUTDOWN:
        return node.is_shutting_down
    return node.spec.unschedulable or node.is_shutting_down


# --- draining ---------------------------------------------------------------------------------------------------------


def _draining(scene: Scene) -> DrainStep:
    drain, now, name = scene.drain, scene.now, scene.drain.name
    found = _Found()
    keys = {*drain.vms, *(key for key, vm in scene.vms.items() if is_on(vm, name) and is_to_leave(drain, vm))}
    for key in sorted(keys):
        found.vms[key] = _look(scene, key, found)
    found.revoke += [op for op in scene.inbound if _is_revocable(op, name)]
    found.revoke += [
        op
        for key, op in scene.operations.items()
        if key in scene.vms and is_on(scene.vms[Key(key)], name) and _is_unbegun_start(op, name)
    ]
    new = drain.with_status(vms=found.vms)
    waits = _waits_for(scene, new)
    if not new.left() and not waits:
        new = ended(new, DrainPhase.DRAINED, _summary(new), now)
        found.notes.append(Note("NodeDrained", new.status.message))
        return _step(scene, new, found)
    new = new.with_status(message=_progress(new, waits))
    deadline = drain.status.deadline_at
    if deadline is not None and now >= deadline:
        text = f"drain-failed: not empty after {drain.spec.timeout_s:g} s: {new.status.message}"
        new = ended(new, DrainPhase.FAILED, text, now)
        failed = _winding_down(_with(scene, new), new)
        notes = (Note("NodeDrainFailed", text, warning=True),)
        return DrainStep(failed.drain, drop=failed.drop, revoke=tuple(found.revoke), notes=notes)
    started = drain.status.started_at
    if started is not None and not drain.status.stuck_told and now - started >= STUCK_AFTER:
        found.notes.append(Note("NodeEvacuationStuck", f"for an hour by now: {new.status.message}", warning=True))
        new = new.with_status(stuck_told=True)
    return _step(scene, new, found)


def _step(scene: Scene, new: NodeDrain, found: _Found) -> DrainStep:
    begin = sorted(found.begin, key=lambda one: _rank(new, one))
    moments = [vm.not_before for vm in new.vms.values() if vm.not_before is not None]
    if new.status.phase is DrainPhase.DRAINING:
        stuck = None if new.status.stuck_told or new.status.started_at is None else new.status.started_at + STUCK_AFTER
        moments += [moment for moment in (new.status.deadline_at, stuck) if moment is not None]
    coming = [moment for moment in moments if moment > scene.now]
    return DrainStep(
        new,
        tuple(begin),
        tuple(found.revoke),
        tuple(found.drop),
        tuple(found.notes),
        min(coming) if coming and new.is_open else None,
    )


def _rank(drain: NodeDrain, one: Begin) -> tuple[int, int, str]:
    """Order: largest machine first. A host that shuts down has little time: as many as possible that are to run on."""
    memory_mib = one.vm.running_spec.memory_mib
    if drain.spec.cause is DrainCause.HOST_SHUTDOWN:
        return _POLICY_RANK[one.vm.spec.run_policy], memory_mib, one.vm.key
    return 0, -memory_mib, one.vm.key


def _look(scene: Scene, key: str, found: _Found) -> VmDrain:
    """Say what becomes of one VM."""
    before = scene.drain.vms.get(key, VmDrain())
    vm = scene.vms.get(Key(key))
    if vm is None:
        return before if before.state is VmState.LEFT else _gone(before, "was deleted", scene.now)
    before = before.with_(memory_mib=vm.running_spec.memory_mib)
    operation = scene.operations.get(key)
    if not is_on(vm, scene.drain.name):
        if before.state is VmState.RETURNING:
            return _called_back(scene, before, operation, found)
        return _left(scene, before, vm)
    if operation is not None:
        return _under_way(scene, before, operation, found)
    if before.state is VmState.MOVING and (failed := _failed(scene, before, vm, found)) is not None:
        return failed
    if before.not_before is not None and before.not_before > scene.now:
        return before
    return _begun(scene, before, vm, found)


def _called_back(scene: Scene, before: VmDrain, operation: VirtualMachineOperation | None, found: _Found) -> VmDrain:
    """Say what becomes of one that was on its way home when this drain began.

    What has a grant is aborted as any migration to the node. It is kept in sight until it has ended, since it may be
    too late for that; the VM may still be brought home later.
    """
    if operation is None or operation.name != before.operation:
        return before.with_(state=VmState.LEFT, left_at=scene.now, message="")
    if operation.status.grant is None and operation.metadata.deletion_timestamp is None:
        found.drop.append(operation)
    return before.with_(message=f"{operation.name}, which would bring it here, is aborted")


def _gone(before: VmDrain, why: str, now: datetime) -> VmDrain:
    return before.with_(state=VmState.LEFT, not_before=None, left_at=now, message=why)


def _left(scene: Scene, before: VmDrain, vm: VirtualMachine) -> VmDrain:
    if before.state is VmState.LEFT:
        return before
    last = scene.ended.get(vm.key)
    moved = vm.status.phase.occupies_node
    ours = moved and last is not None and last.spec.type.is_migration and last.status.phase is OperationPhase.COMPLETED
    if ours and last is not None and last.status.target_node != vm.status.node_name:
        ours = False  # somebody moved it on since
    why = f"moved to node {vm.status.node_name}" if moved else f"is {vm.status.phase.value}"
    target = vm.status.node_name if moved else ""
    return _gone(before, why, scene.now).with_(target=target, moved=ours, failures=0)


def _under_way(scene: Scene, before: VmDrain, operation: VirtualMachineOperation, found: _Found) -> VmDrain:
    is_ours = operation.metadata.annotations.get(DRAIN_ANNOTATION) == scene.drain.name
    if operation.spec.type.is_migration and not is_ours and _gives_way(operation):
        if operation.metadata.deletion_timestamp is None:
            found.drop.append(operation)
        text = f"{operation.name} gives way to its evacuation"
        return before.with_(state=VmState.WAITING, operation="", not_before=None, message=text)
    if operation.spec.type.is_migration or is_ours:
        return before.with_(state=VmState.MOVING, operation=operation.name, not_before=None, message="")
    text = f"waits for the end of {operation.name} ({operation.spec.type.value})"
    return before.with_(state=VmState.WAITING, operation="", not_before=None, message=text)


def _gives_way(operation: VirtualMachineOperation) -> bool:
    """Whether another's migration is dropped for an evacuation: no person asked for it, and it has no grant.

    It would wait behind all evacuations, perhaps for a certain node that has no room, and nobody who ends the drain
    would end it. One with a grant goes on: the VM is moved once.
    """
    return operation.priority is not Priority.PERSON and operation.status.grant is None


def _failed(scene: Scene, before: VmDrain, vm: VirtualMachine, found: _Found) -> VmDrain | None:
    """Say what follows from the end of an evacuation that left the VM where it is; None: it may be made anew."""
    if not before.operation:
        return None  # it was never made
    last = scene.ended.get(vm.key)
    if last is not None and last.status.phase in {OperationPhase.SUPERSEDED, OperationPhase.COMPLETED}:
        return None
    why = last.message if last is not None else f"{before.operation} was deleted"
    if last is not None and _is_without_room(last) and _is_shut_down(scene, vm):
        return None
    failures = before.failures + 1
    wait = backoff(failures)
    text = f"{failures} failed: {why}; tried again after {wait.total_seconds():g} s"
    found.notes.append(Note("EvacuationFailed", f"{vm.key}: {text}", warning=True))
    return before.with_(
        state=VmState.WAITING, operation="", failures=failures, not_before=scene.now + wait, message=text
    )


def _begun(scene: Scene, before: VmDrain, vm: VirtualMachine, found: _Found) -> VmDrain:
    """Begin its evacuation, or say why that can't be."""
    tie = immovable(vm)
    last = scene.ended.get(vm.key)
    no_room = last is not None and before.state is VmState.MOVING and _is_without_room(last)
    kind = OperationType.EVICT
    if (tie is not None or no_room) and _is_shut_down(scene, vm):
        kind = OperationType.RESTART
    elif tie is not None:
        text = f"can't migrate: {tie[1]} ({tie[0]})"
        if (before.state, before.message) != (VmState.STAYS, text):
            found.notes.append(Note("EvacuationBlocked", f"{vm.key} {text}", warning=True))
        return before.with_(state=VmState.STAYS, operation="", not_before=None, message=text)
    if vm.status.phase is not VmPhase.RUNNING:
        text = f"is {vm.status.phase.value}: only a Running VM migrates"
        return before.with_(state=VmState.WAITING, operation="", not_before=None, message=text)
    obstacle = inapplicable(OperationSpec(type=kind, virtual_machine_name=vm.name), vm)
    if obstacle is not None:
        return before.with_(state=VmState.WAITING, operation="", not_before=None, message=obstacle[1])
    found.begin.append(Begin(vm, kind))
    return before.with_(state=VmState.MOVING, operation="", not_before=None, message="")


def _is_shut_down(scene: Scene, vm: VirtualMachine) -> bool:
    """Whether it may be powered off to be rid of it. A host that shuts down does that itself, when its time is over."""
    return strategy_of(vm) is Strategy.SHUT_DOWN and scene.drain.spec.cause is not DrainCause.HOST_SHUTDOWN


def _is_without_room(operation: VirtualMachineOperation) -> bool:
    condition = find_condition(operation.status.conditions, "Completed")
    return condition is not None and condition.reason in _NO_ROOM


def _is_revocable(operation: VirtualMachineOperation, node: str) -> bool:
    grant = operation.status.grant
    return grant is not None and grant.target == node and grant.action is Action.MIGRATE and not grant.cancel


def _is_unbegun_start(operation: VirtualMachineOperation, node: str) -> bool:
    """Whether it is a start that its node has not begun. One that has comes to its end, and its VM leaves then."""
    grant = operation.status.grant
    if grant is None or grant.node != node or grant.action is not Action.START or grant.cancel:
        return False
    return grant.state is GrantState.GRANTED


def _waits_for(scene: Scene, new: NodeDrain) -> str:
    """Say what besides the VMs of the drain keeps the node from being empty."""
    if scene.inbound:
        names = ", ".join(sorted(op.vm_key.partition("/")[2] for op in scene.inbound))
        return f"migrations to it are being aborted ({names})"
    if not new.spec.every or new.spec.selector:
        shown = sorted(key for key in scene.shown if key in new.vms)
    else:
        shown = sorted(scene.shown)
    here = [key for key in shown if (vm := scene.vms.get(Key(key))) is None or not is_on(vm, new.name)]
    if here:
        return f"its host still shows {', '.join(key.partition('/')[2] for key in here[:_NAMED_AT_MOST])}"
    return ""


def _progress(new: NodeDrain, waits: str) -> str:
    left = new.left()
    parts = []
    if left:
        gib = sum(vm.memory_mib for vm in left.values()) / 1024
        parts.append(f"{len(left)} of {len(new.vms)} VMs to go, {gib:.1f} GiB")
        waiting = {key: vm for key, vm in left.items() if vm.state is not VmState.MOVING}
        if waiting:
            parts.append(describe_left(new.with_status(vms=waiting)))
    if waits:
        parts.append(waits)
    return "; ".join(parts)


def _summary(new: NodeDrain) -> str:
    moved = sum(vm.moved for vm in new.vms.values())
    other = len(new.vms) - moved
    return f"{moved} VMs moved" + (f", {other} gone otherwise" if other else "") if new.vms else "no VM was there"


# --- the end, and the way back ----------------------------------------------------------------------------------------


def _with(scene: Scene, drain: NodeDrain) -> Scene:
    return Scene(drain, scene.node, scene.vms, scene.operations, scene.ended, scene.inbound, scene.shown, scene.now)


def _winding_down(scene: Scene, drain: NodeDrain) -> DrainStep:
    """Drop what has not begun; what has comes to its end, and is kept on record until then."""
    found = _Found(vms=dict(drain.vms))
    for key, before in drain.vms.items():
        if before.state not in _ON_THE_WAY:
            continue
        vm, operation = scene.vms.get(Key(key)), scene.operations.get(key)
        if vm is None:
            found.vms[key] = _gone(before, "was deleted", scene.now)
        elif operation is not None and operation.name == before.operation:
            if _is_unbegun(operation) and operation.metadata.annotations.get(DRAIN_ANNOTATION) == drain.name:
                found.drop.append(operation)
        elif before.state is VmState.RETURNING:
            is_back = is_on(vm, drain.name)
            found.vms[key] = before.with_(state=VmState.BACK if is_back else VmState.LEFT, message="")
        elif is_on(vm, drain.name):
            found.vms[key] = before.with_(state=VmState.WAITING, operation="", message="stays: the drain is over")
        else:
            found.vms[key] = _left(_with(scene, drain), before, vm)
    return DrainStep(drain.with_status(vms=found.vms), drop=tuple(found.drop))


def _is_unbegun(operation: VirtualMachineOperation) -> bool:
    """Whether it can be dropped without touching a guest; one that is being dropped already is not dropped again."""
    is_marked = operation.metadata.deletion_timestamp is not None
    return operation.status.phase is OperationPhase.PENDING and not is_marked


def sent_home(drain: NodeDrain, now: datetime) -> NodeDrain:
    """Give a drain whose VMs are to come back: those that it moved, and that have not come back yet."""
    vms = {
        key: vm.with_(state=VmState.RETURNING, operation="", message="") if vm.moved and vm.target else vm
        for key, vm in drain.vms.items()
    }
    return drain.with_status(phase=DrainPhase.RETURNING, vms=vms, started_at=now, finished_at=None, message="")


def _returning(scene: Scene) -> DrainStep:
    found = _Found(vms=dict(scene.drain.vms))
    for key, before in scene.drain.vms.items():
        if before.state is VmState.RETURNING:
            found.vms[key] = _look_home(scene, key, before, found)
    new = scene.drain.with_status(vms=found.vms)
    if any(vm.state is VmState.RETURNING for vm in found.vms.values()):
        return _step(scene, new, found)
    back = sum(vm.state is VmState.BACK for vm in found.vms.values())
    stay = [f"{key.partition('/')[2]} ({vm.message})" for key, vm in found.vms.items() if vm.state is VmState.STAYS]
    text = f"{back} VMs are back" + (f"; {len(stay)} are not: {', '.join(stay)}" if stay else "")
    found.notes.append(Note("VirtualMachinesReturned", text, warning=bool(stay)))
    return _step(scene, ended(new, DrainPhase.RETURNED, text, scene.now), found)


def _look_home(scene: Scene, key: str, before: VmDrain, found: _Found) -> VmDrain:
    vm, operation = scene.vms.get(Key(key)), scene.operations.get(key)
    if vm is None:
        return before.with_(state=VmState.STAYS, message="was deleted")
    if operation is not None:
        if operation.name == before.operation:
            return before
        return before.with_(operation="", message=f"waits for the end of {operation.name}")
    if is_on(vm, scene.drain.name):
        return before.with_(state=VmState.BACK, moved=False, message="")
    if before.operation:
        last = scene.ended.get(key)
        return before.with_(state=VmState.STAYS, message=last.message if last else f"{before.operation} was deleted")
    if vm.status.node_name != before.target:
        return before.with_(state=VmState.STAYS, message=f"went to node {vm.status.node_name or '(none)'} since")
    obstacle = inapplicable(OperationSpec(type=OperationType.MIGRATE, virtual_machine_name=vm.name), vm)
    if obstacle is None and (tie := immovable(vm)) is not None:
        obstacle = (Reason.OPERATION_FAILED, f"can't migrate: {tie[1]}")
    if obstacle is not None:
        return before.with_(state=VmState.STAYS, message=obstacle[1])
    found.begin.append(Begin(vm, OperationType.MIGRATE, scene.drain.name))
    return before.with_(message="")
