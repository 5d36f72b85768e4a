"""Evidence that a lock on storage contradicts: it is marked, and nothing that rests on it starts any more.

The start that met the lock ends in the commit that marks the fencing (`planner.locks` has the rules). What else waits
to be started on the same evidence is held back by the recovery that follows, which every reconcile repeats.
"""

from dataclasses import replace

from orchestrator.planner.flow import Note, Transition
from orchestrator.planner.locks import held_back, held_vm, recovered
from orchestrator.planner.policy import EVIDENCE_CONTRADICTED
from orchestrator.resources import Node, NodeFencing, OperationType, VirtualMachine, VirtualMachineOperation
from orchestrator.services.context import Context, add_notes, deciding, put_transition
from orchestrator.services.herd import Herd
from orchestrator.store import Batch, keys
from orchestrator.store.connection import redis_errors

_STARTS = frozenset({OperationType.START, OperationType.RESTART})


def on_evidence(ctx: Context, transition: Transition, *nodes: str) -> Transition:
    """Note on a VM that runs nowhere any more, as one of its nodes was fenced, on which evidence it starts next."""
    vm = transition.vm
    if vm is None or not transition.ended or vm.status.phase.occupies_node:
        return transition
    for fencing in ctx.store.many(NodeFencing, nodes).values():
        if fencing.status.phase.has_evidence:
            vm = recovered(vm, fencing)
    return replace(transition, vm=vm)


def contradict(ctx: Context, batch: Batch, transition: Transition) -> None:
    """Mark a fencing whose evidence a start has just contradicted."""
    recovery = transition.vm.status.recovery if transition.vm is not None else None
    if recovery is None or recovery.held != EVIDENCE_CONTRADICTED:
        return
    fencing = ctx.store.find(NodeFencing, recovery.node)
    evidence = fencing.status.evidence if fencing is not None else None
    if fencing is None or evidence is None or evidence.epoch != recovery.epoch or fencing.status.contradicted:
        return
    text = f"{transition.operation.vm_key} found its storage locked: node {fencing.name} may run it still"
    batch.put(fencing, fencing.with_status(contradicted=text))
    note = Note(EVIDENCE_CONTRADICTED, f"{text}; nothing of it starts elsewhere any more", warning=True)
    add_notes(batch, (ctx.store.find(Node, fencing.name) or fencing,), (note,), ctx.now())


def hold_back(vm: VirtualMachine, fencing: NodeFencing, ctx: Context) -> VirtualMachine:
    """Give a VM as it is when the evidence on which it would start was contradicted; otherwise as it is."""
    return held_vm(vm, EVIDENCE_CONTRADICTED, _why(vm, fencing), ctx.now()) if fencing.status.contradicted else vm


def hold_back_all(ctx: Context, herd: Herd, fencing: NodeFencing) -> None:
    """Hold back what waits to be started on evidence that was contradicted; what is granted already goes on."""
    evidence = fencing.status.evidence
    if evidence is None or not fencing.status.contradicted:
        return
    for found in herd.follower.all(VirtualMachine):
        recovery = found.status.recovery
        if recovery is not None and recovery.epoch == evidence.epoch and not recovery.held:
            deciding(lambda key=found.key: _hold_back_one(ctx, key, fencing))  # type: ignore[misc]


def _hold_back_one(ctx: Context, key: str, fencing: NodeFencing) -> None:
    vm = ctx.store.find(VirtualMachine, key)
    recovery = vm.status.recovery if vm is not None else None
    if vm is None or recovery is None or recovery.held or vm.status.phase.occupies_node:
        return
    batch = ctx.store.batch().check("field", keys.OPEN_GRANTS, key, "")
    with redis_errors(ctx.store.redis):
        active = ctx.store.redis.hget(keys.ACTIVE_OPERATIONS, key)
    operation = ctx.store.find(VirtualMachineOperation, str(active)) if active else None
    if operation is not None and operation.spec.type in _STARTS:
        transition = held_back(operation, vm, EVIDENCE_CONTRADICTED, _why(vm, fencing), ctx.now())
        put_transition(batch, operation, vm, transition, ctx.now())
    else:
        batch.check("field", keys.ACTIVE_OPERATIONS, key, str(active or ""))
        batch.put(vm, hold_back(vm, fencing, ctx))
    ctx.store.must_commit(batch)


def _why(vm: VirtualMachine, fencing: NodeFencing) -> str:
    why = fencing.status.contradicted
    return f"the evidence about node {fencing.name} is contradicted ({why}): look at it, then vmherd start {vm.name}"


__all__ = ["contradict", "hold_back", "hold_back_all", "on_evidence"]
