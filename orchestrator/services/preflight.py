"""Questions before a grant: what a VM needs of a host, and whether a host has it.

The questions are part of the operation's document, and orders to nodes are indexes of it (`store.batch`): they come
with one commit, and none is left once the operation is granted or has ended. What was answered is kept on the VM, for
the next operation too. An answer counts once, and only to the question that is open: a late one, or one that is told
twice, changes nothing.
"""

from dataclasses import replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from orchestrator.logs import logger
from orchestrator.planner.flow import Note, Transition
from orchestrator.planner.preflight import GOOD_FOR, asked, known_needs, migratable_condition, question_about
from orchestrator.resources import Grant, Node, OrderKind, VirtualMachine, VirtualMachineOperation, with_condition
from orchestrator.resources.needs import DISK_PROBLEM, LONGEST_LINE, MOST_LINES, Arrival, MachineNeeds
from orchestrator.services.context import Context, load_pair
from orchestrator.store import Batch, keys
from orchestrator.store.node_store import Report

log = logger(__name__)


def ask(
    ctx: Context,
    batch: Batch,
    operation: VirtualMachineOperation,
    said: VirtualMachineOperation,
    vm: VirtualMachine,
    nodes: tuple[str, ...],
    kind: OrderKind,
) -> None:
    """Add to a batch that nodes are asked before an operation is granted, and that their agents are woken.

    Args:
        operation: As it is stored.
        said: As it is to be, but for the questions.
        vm: Its VM.
        nodes: Who is asked.
        kind: CHECK: whether it can arrive there; DESCRIBE: what it needs.
    """
    new = asked(said, vm, nodes, ctx.store.now(), is_about_needs=kind is OrderKind.DESCRIBE)
    batch.put(operation, new)
    batch.tell("asked", operation=new.key, kind=kind.value, nodes=nodes)
    press(ctx, batch, new)


def press(ctx: Context, batch: Batch, operation: VirtualMachineOperation) -> None:
    """Add to a batch that the agents with an open question are woken, and will be again if they stay silent."""
    questions = operation.status.questions
    if questions is None or not operation.awaits_answers:
        batch.effect("ZREM", keys.AWAITING, operation.key)
        return
    batch.effect("DEADLINE", keys.AWAITING, operation.key, int(ctx.config.ask_again_after * 1000))
    for node in questions.open:
        batch.wake(node, "order")


def take_answer(ctx: Context, batch: Batch, node: str, report: Report, at: datetime) -> bool:
    """Take a node's answer to a question.

    Returns:
        Whether it was asked for: then the operation may go on.
    """
    body = report.body
    order_id = str(body["order"])
    operation, vm = load_pair(ctx.store, order_id.partition("#")[0])
    questions = operation.status.questions if operation is not None else None
    question = questions.open.get(node) if questions is not None else None
    if operation is None or questions is None or question is None or question.id != order_id:
        return False  # answered before, or asked no more
    new = _learned(ctx, vm, node, questions.about, report, at) if vm is not None else None
    if vm is not None and new is None:
        return False  # it stays open, and is pressed again
    others = {name: q for name, q in questions.open.items() if name != node}
    batch.put(operation, operation.with_status(questions=questions.with_(open=others)))
    if not others:
        batch.effect("ZREM", keys.AWAITING, operation.key)
    if vm is not None and new is not None and new is not vm:
        batch.put(vm, new)
    batch.tell("answered", operation=operation.key, node=node, kind=report.kind, problems=body.get("problems"))
    return True


def _learned(
    ctx: Context, vm: VirtualMachine, node: str, about: str, report: Report, at: datetime
) -> VirtualMachine | None:
    """Give a VM with what a node answered about it; None where that is no answer: then the node is asked on.

    A node that does not have the VM (any more), and one whose agent was started anew since, would otherwise be asked
    the same again at once, and again.
    """
    body = report.body
    if report.kind == "Described":
        new = with_needs(vm, body.get("needs"), node, at) if vm.status.node_name == node else vm
        return new if known_needs(new) is not None else None
    generation = str(body.get("generation", ""))
    present = ctx.store.find(Node, node)
    if present is None or present.status.generation != generation:
        return None
    arrival = Arrival(about=about, generation=generation, answered_at=at, problems=_lines(body.get("problems")))
    return _with_arrival(vm, node, arrival, at)


def with_needs(vm: VirtualMachine, told: Any, node: str, at: datetime) -> VirtualMachine:
    """Give a VM with the needs that its node told (the same VM where that is no news), and the condition they imply."""
    if told is None:
        return vm
    try:
        needs = MachineNeeds.model_validate(told).at_home(node)
    except ValidationError as error:
        log.warning("unreadable needs dropped", vm=vm.key, error=str(error))
        return vm
    if needs.incarnation != vm.status.incarnation or needs == vm.status.needs:
        return vm
    return with_migratable(vm.with_status(needs=needs), at)


def with_copies_told(transition: Transition, grant: Grant, *, arrived: bool) -> Transition:
    """Give the end of a migration with a note about images that it left behind: none is deleted without a person.

    Args:
        transition: The end.
        grant: Of the migration.
        arrived: Whether the VM runs on the target.
    """
    if not grant.copy_disks:
        return transition
    disks = ", ".join(f"{DISK_PROBLEM}{target}" for target in grant.copy_disks)
    if arrived:
        text = f"node {grant.node} keeps the images of {disks} as they were: they are not used any more"
        note = Note("DiskImagesLeft", text)
    else:
        text = f"node {grant.target} may hold an incomplete copy of {disks}: a later migration to it writes over it"
        note = Note("DiskCopyLeft", text, warning=True)
    return replace(transition, notes=(*transition.notes, note))


def with_migratable(vm: VirtualMachine, at: datetime) -> VirtualMachine:
    """Give a VM with its condition Migratable as its needs and its leave to copy disks imply."""
    return vm.with_status(conditions=with_condition(vm.status.conditions, migratable_condition(vm), at))


def _with_arrival(vm: VirtualMachine, node: str, arrival: Arrival, at: datetime) -> VirtualMachine:
    about = question_about(vm)
    if arrival.about != about:
        return vm  # the machine was changed since it was asked
    kept = {
        name: known
        for name, known in vm.status.arrivals.items()
        if known.about == about and at - known.answered_at < GOOD_FOR
    }
    return vm.with_status(arrivals={**kept, node: arrival})


def _lines(told: Any) -> tuple[str, ...]:
    """Read a node's problems, cut to what is kept of them."""
    if not isinstance(told, list):
        return ("its answer can't be read",)
    return tuple(str(line)[:LONGEST_LINE] for line in told[:MOST_LINES])
