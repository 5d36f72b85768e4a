"""Evidence that a lock on storage contradicts: it is marked, and nothing that rests on it starts any more.

The start that met the lock ends in the commit that marks the fencing (`planner.locks` has the rules). What else waits
to be started on the same evidence is held back by the recovery that follows, which every reconcile repeats; no grant is
given meanwhile, and one that its node has not claimed is called back. `tests/model/locks.py` searches this.
"""

from dataclasses import replace

from orchestrator.errors import Conflict
from orchestrator.logs import logger
from orchestrator.planner.flow import Note, Transition
from orchestrator.planner.locks import held_back, held_vm, recovered
from orchestrator.planner.policy import EVIDENCE_CONTRADICTED
from orchestrator.resources import (
    Action,
    GrantState,
    Node,
    NodeFencing,
    OperationType,
    VirtualMachine,
    VirtualMachineOperation,
)
from orchestrator.services.context import Context, add_notes, deciding, put_transition
from orchestrator.services.herd import Herd
from orchestrator.store import Batch, Refusal, keys
from orchestrator.store.connection import redis_errors

log = logger(__name__)

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


def check_evidence(ctx: Context, batch: Batch, vm: VirtualMachine) -> None:
    """Let a grant to start a VM be given only while the evidence that this rests on stands, if it rests on any.

    Raises:
        Conflict: It is contradicted; recovery is about to hold the VM back.
    """
    recovery = vm.status.recovery
    if recovery is None or recovery.held:  # a person, who has looked, starts it
        return
    fencing = ctx.store.find(NodeFencing, recovery.node)
    if fencing is not None and fencing.status.contradicted:
        raise Conflict(_why(vm, fencing))
    batch.check("unchanged", NodeFencing.kind_name, recovery.node, fencing.version if fencing is not None else 0)


def hold_back_all(ctx: Context, herd: Herd, fencing: NodeFencing) -> None:
    """Hold back what waits to be started on evidence that was contradicted; what a node has claimed already goes on."""
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
    if vm is None or recovery is None or recovery.held:
        return
    with redis_errors(ctx.store.redis):
        active = ctx.store.redis.hget(keys.ACTIVE_OPERATIONS, key)
    operation = ctx.store.find(VirtualMachineOperation, str(active)) if active else None
    batch = ctx.store.batch()
    grant = operation.status.grant if operation is not None else None
    if grant is not None:
        if grant.action is not Action.START or grant.state is not GrantState.GRANTED:
            return
        # The same commit takes the node's copy away: who comes for it after this finds nothing.
        batch.check("identity").check("value", keys.claim(grant.node, grant.epoch), "")
    elif vm.status.phase.occupies_node:
        return
    else:
        batch.check("field", keys.OPEN_GRANTS, key, "")
    if operation is not None and operation.spec.type in _STARTS:
        transition = held_back(operation, vm, EVIDENCE_CONTRADICTED, _why(vm, fencing), ctx.now())
        put_transition(batch, operation, vm, transition, ctx.now())
    else:
        batch.check("field", keys.ACTIVE_OPERATIONS, key, str(active or ""))
        batch.put(vm, hold_back(vm, fencing, ctx))
    answer = ctx.store.commit(batch)
    if isinstance(answer, Refusal):
        log.info("not held back now", vm=key, why=f"{answer.check}: {answer.detail}")


def _why(vm: VirtualMachine, fencing: NodeFencing) -> str:
    why = fencing.status.contradicted
    return f"the evidence about node {fencing.name} is contradicted ({why}): look at it, then vmherd start {vm.name}"


__all__ = ["check_evidence", "contradict", "hold_back", "hold_back_all", "on_evidence"]
