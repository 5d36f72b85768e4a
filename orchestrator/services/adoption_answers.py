"""What nodes answer about definitions: an adoption goes on to its next step, comes to its end, or is given up.

The first answer to an order counts, and only its node's. What is given up leaves the domain as it was found, and no VM.
"""

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

from orchestrator.errors import Invalid
from orchestrator.logs import logger
from orchestrator.planner.flow import Note
from orchestrator.planner.observation import ABSENT, observe
from orchestrator.resources import (
    Condition,
    Node,
    NodeInventory,
    VirtualMachine,
    VmPhase,
    with_condition,
)
from orchestrator.resources.adoption import (
    DEFINITIONS_PREFIX,
    UNDEFINE_PREFIX,
    XML_MOST,
    AdoptionStep,
    RecordedDefinition,
)
from orchestrator.services import adoption_orders as orders
from orchestrator.services.context import Context, add_notes, wake_grant
from orchestrator.services.definitions import take_definitions
from orchestrator.services.policies import keep
from orchestrator.store import Batch, keys
from orchestrator.store.node_store import Report

log = logger(__name__)

After = Callable[[], None]


def take_answer(ctx: Context, batch: Batch, node: str, report: Report, at: datetime) -> list[After]:
    """Take an answer into account.

    Returns:
        What is to be done once it is committed.
    """
    body = report.body
    order_id = str(body["order"])
    if order_id.startswith(DEFINITIONS_PREFIX):
        take_definitions(ctx, batch, node, body)
        return []
    if order_id.startswith(UNDEFINE_PREFIX):
        return _undefined(ctx, batch, node, order_id, body, at)
    vm = orders.find_vm(ctx, order_id)
    under_way = vm.status.adoption if vm is not None else None
    if vm is None or under_way is None or under_way.node != node:
        return []
    match under_way.step:
        case AdoptionStep.RECORDING:
            return _recorded(ctx, batch, vm, body, at)
        case AdoptionStep.TAKING_OVER if body.get("outcome") in {"taken", "gone"}:
            return _taken(ctx, batch, vm, body, at)
        case AdoptionStep.TAKING_OVER:
            return _give_up(ctx, batch, vm, str(body.get("message", "")), at)
        case AdoptionStep.RELEASING if body.get("outcome") == "released":
            return _released(ctx, batch, vm, body, at)
        case AdoptionStep.RELEASING:
            return _not_released(ctx, batch, vm, body, at)


def _recorded(ctx: Context, batch: Batch, vm: VirtualMachine, body: dict[str, Any], at: datetime) -> list[After]:
    """The definition is put on record, and the domain is taken over: now that nothing can be lost by it."""
    under_way = vm.status.adoption
    assert under_way is not None  # noqa: S101 - the caller looked
    problem = str(body.get("problem", ""))
    if not problem and body.get("plain") != under_way.fingerprint:
        problem = "its definition was changed since it was looked at"
    if problem:
        return _give_up(ctx, batch, vm, problem, at)
    record = _read_record(vm, body)
    orders.drop_order(batch, vm)
    taking = orders.with_adoption(vm, under_way.with_(step=AdoptionStep.TAKING_OVER), at)
    batch.put(vm, taking)
    batch.effect("HSET", keys.ADOPTED, vm.metadata.uid, record.model_dump_json(by_alias=True))
    orders.put_order(ctx, batch, taking, record)
    return [partial(orders.send_order, ctx, taking)]


def _read_record(vm: VirtualMachine, body: dict[str, Any]) -> RecordedDefinition:
    inactive, live = str(body["inactive_xml"]), str(body["live_xml"])
    if not inactive or max(len(inactive), len(live)) > XML_MOST:
        raise Invalid(f"the definition of VirtualMachine {vm.key!r} is empty, or too long")
    return RecordedDefinition(
        vm=vm.key,
        node=vm.status.node_name,
        domain=str(body["domain"]),
        inactive_xml=inactive,
        live_xml=live,
        autostart=body.get("autostart") is True,
    )


def _taken(ctx: Context, batch: Batch, vm: VirtualMachine, body: dict[str, Any], at: datetime) -> list[After]:
    """It is ours: transient and marked. Or it has ended since, and what is on record is all that there is of it."""
    node = vm.status.node_name
    adopted = _ended(ctx, batch, vm, body, at)
    note = Note("Adopted", f"it was domain {_domain_name(ctx, vm)} of node {node}, and runs on")
    if body["outcome"] == "gone":
        note = Note("Adopted", f"it ended on node {node} while it was adopted", warning=True)
    batch.put(vm, adopted)
    add_notes(batch, (adopted,), (note,), at)
    return [partial(keep, ctx, vm.key), partial(wake_grant, ctx)]


def _domain_name(ctx: Context, vm: VirtualMachine) -> str:
    record = orders.find_record(ctx, vm)
    return record.domain if record is not None else vm.name


def _ended(ctx: Context, batch: Batch, vm: VirtualMachine, body: dict[str, Any], at: datetime) -> VirtualMachine:
    """The VM without the open step, as its node reported it meanwhile: such reports were only recorded.

    What the node reported after it began to carry out the order may be newer than what it read for its answer.
    """
    node = vm.status.node_name
    under_way = vm.status.adoption
    assert under_way is not None  # noqa: S101 - the caller looked
    orders.drop_order(batch, vm)
    kind = orders.RELEASING if under_way.step is AdoptionStep.RELEASING else orders.ADOPTING
    conditions = tuple(c for c in vm.status.conditions if c.type != kind)
    open_again = vm.with_status(adoption=None, conditions=conditions)
    if vm.status.phase.occupies_node:
        phase = VmPhase.PAUSE if body.get("state") == "paused" else VmPhase.RUNNING
        open_again = open_again.with_status(phase=phase, counter=int(body["began"]))
    inventory = ctx.store.find(NodeInventory, node)
    batch.check("unchanged", NodeInventory.kind_name, node, inventory.version if inventory is not None else 0)
    seen = inventory.domains.get(vm.metadata.uid) if inventory is not None else None
    if seen is None:
        return open_again
    if seen.state == ABSENT and not body.get("state"):
        seen = seen.with_(counter=max(seen.counter, open_again.status.counter))  # both say so, whichever came first
    if seen.counter < open_again.status.counter:
        return open_again
    observation = observe(open_again, node, seen, at)
    new = observation.vm or open_again
    add_notes(batch, (new,), observation.notes, at)
    return new


def _give_up(ctx: Context, batch: Batch, vm: VirtualMachine, why: str, at: datetime) -> list[After]:
    """Nothing was changed on the node, or it was undone: the domain is its host's, as before."""
    text = f"not adopted: {why}; node {vm.status.node_name} has it as it was"
    _remove(ctx, batch, vm, Condition(type=orders.ADOPTING, status="False", reason="AdoptionFailed", message=text), at)
    subjects = (vm, ctx.store.find(Node, vm.status.node_name))
    add_notes(batch, subjects, (Note("AdoptionFailed", f"{vm.key}: {text}", warning=True),), at)
    return [partial(wake_grant, ctx)]


def _released(ctx: Context, batch: Batch, vm: VirtualMachine, body: dict[str, Any], at: datetime) -> list[After]:
    under_way = vm.status.adoption
    record = orders.find_record(ctx, vm)
    assert under_way is not None  # noqa: S101 - the caller looked
    text = f"defined on node {under_way.node} {body.get('message', '')}".rstrip()
    if record is not None and record.node != under_way.node:
        text += f" (it was adopted on node {record.node})"
    text += ", and runs on" if body.get("state") not in {"shutoff", ""} else "; it does not run"
    _remove(ctx, batch, vm, Condition(type=orders.RELEASING, status="False", reason="Released", message=text), at)
    subjects = (vm, ctx.store.find(Node, under_way.node))
    add_notes(batch, subjects, (Note("Released", f"{vm.key}: {text}"),), at)
    return [partial(wake_grant, ctx)]


def _not_released(ctx: Context, batch: Batch, vm: VirtualMachine, body: dict[str, Any], at: datetime) -> list[After]:
    """It stays a VM, and says why."""
    why = str(body.get("message", ""))
    text = f"not released: {why}"
    failed = Condition(type=orders.RELEASING, status="False", reason="ReleaseFailed", message=text)
    kept = _ended(ctx, batch, vm, body, at)
    kept = kept.with_status(conditions=with_condition(kept.status.conditions, failed, at))
    batch.put(vm, kept)
    add_notes(batch, (kept,), (Note("ReleaseFailed", text, warning=True),), at)
    return [partial(keep, ctx, vm.key), partial(wake_grant, ctx)]


def _remove(ctx: Context, batch: Batch, vm: VirtualMachine, said: Condition, at: datetime) -> None:
    """Remove a VM and its record; from the same commit on its domain counts as one that is not ours."""
    under_way = vm.status.adoption
    assert under_way is not None  # noqa: S101 - the caller looked
    orders.drop_order(batch, vm)
    batch.delete(vm.with_status(conditions=with_condition(vm.status.conditions, said, at)))
    inventory = ctx.store.find(NodeInventory, under_way.node)
    seen = inventory.domains.get(vm.metadata.uid) if inventory is not None else None
    if inventory is None or seen is None:
        return
    domains = {uuid: domain for uuid, domain in inventory.domains.items() if uuid != vm.metadata.uid}
    if seen.state != ABSENT:
        domains[vm.metadata.uid] = seen.with_(vm="", incarnation=0, epoch=0)
    batch.put(inventory, inventory.with_(domains=domains))


def _undefined(ctx: Context, batch: Batch, node: str, order_id: str, body: dict[str, Any], at: datetime) -> list[After]:
    place, _, vm_key = order_id.removeprefix(UNDEFINE_PREFIX).partition("/")
    if place != node:
        return []
    batch.effect("HDEL", keys.orders(node), order_id).effect("ZREM", keys.AWAITING, order_id)
    vm = ctx.store.find(VirtualMachine, vm_key)
    message = str(body.get("message", ""))
    if body.get("outcome") == "removed" and vm is not None:
        text = f"somebody had defined it on node {node}; the definition and its autostart are removed, it runs on"
        add_notes(batch, (vm,), (Note("PersistentDefinitionRemoved", text, warning=True),), at)
    elif message:
        batch.tell("a definition stays", warning=True, vm=vm_key, node=node, why=message)
    return []
