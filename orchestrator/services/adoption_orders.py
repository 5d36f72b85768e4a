"""The orders of adoptions and releases: put, dropped, pressed; and those that remove a definition made behind our back.

Unlike a settlement's, such an order is no index of a document: it may hold secrets, and documents go to all who watch.
So each commit that changes a VM's step says itself which order goes and which one comes.
"""

from datetime import datetime
from typing import cast

from orchestrator.queues import Message, Task, lifecycle_queue
from orchestrator.resources import Condition, SeenDomain, VirtualMachine, VmPhase, with_condition
from orchestrator.resources.adoption import (
    ADOPTION_PREFIX,
    UNDEFINE_PREFIX,
    Adoption,
    AdoptionOrder,
    AdoptionOrderKind,
    AdoptionStep,
    RecordedDefinition,
    adoption_order_id,
    fingerprint,
)
from orchestrator.services.context import Context
from orchestrator.store import Batch, Refusal, keys
from orchestrator.store.connection import redis_errors

ADOPTING, RELEASING = "Adopting", "Releasing"
"""Conditions of a VM: True while it is under way; False, with the reason, in what watchers are shown of its end."""
RUNS = frozenset({VmPhase.RUNNING, VmPhase.PAUSE, VmPhase.DEGRADED})

_GONE_STATES = frozenset({"absent", "shutoff"})
_SAID = {
    AdoptionStep.RECORDING: "node {node} is asked for its definition",
    AdoptionStep.TAKING_OVER: "its definition is on record; node {node} takes it over",
    AdoptionStep.RELEASING: "node {node} defines it as it was",
}
_Sent = tuple[str, str, str, AdoptionOrderKind]
"""Node, VM, order and kind of a message that is sent after the commit."""


def with_adoption(vm: VirtualMachine, adoption: Adoption, at: datetime) -> VirtualMachine:
    """Give a VM whose adoption or release has come to a step."""
    kind = RELEASING if adoption.step is AdoptionStep.RELEASING else ADOPTING
    message = _SAID[adoption.step].format(node=adoption.node)
    condition = Condition(type=kind, status="True", reason=adoption.step.value, message=message)
    return vm.with_status(adoption=adoption, conditions=with_condition(vm.status.conditions, condition, at))


def find_record(ctx: Context, vm: VirtualMachine) -> RecordedDefinition | None:
    """Read how an adopted VM was defined, secrets included; None for one that was not adopted."""
    with redis_errors(ctx.store.redis):
        text = cast("str | None", ctx.store.redis.hget(keys.ADOPTED, vm.metadata.uid))
    return RecordedDefinition.model_validate_json(text) if text else None


_KINDS = {
    AdoptionStep.RECORDING: AdoptionOrderKind.RECORD,
    AdoptionStep.TAKING_OVER: AdoptionOrderKind.TAKE_OVER,
    AdoptionStep.RELEASING: AdoptionOrderKind.RELEASE,
}


def put_order(ctx: Context, batch: Batch, vm: VirtualMachine, record: RecordedDefinition | None = None) -> None:
    """Add to a batch the order that an open adoption or release awaits the answer to, and when it is pressed."""
    adoption = vm.status.adoption
    assert adoption is not None  # noqa: S101 - the caller looked
    order = AdoptionOrder(
        id=adoption_order_id(vm.key, adoption),
        kind=_KINDS[adoption.step],
        vm=vm.key,
        uuid=vm.metadata.uid,
        incarnation=vm.status.incarnation,
        epoch=adoption.epoch,
    )
    if record is not None and adoption.step is AdoptionStep.TAKING_OVER:
        order = order.with_(fingerprint=fingerprint(record.inactive_xml))
    if record is not None and adoption.step is AdoptionStep.RELEASING:
        runs = vm.status.phase in RUNS
        order = order.with_(inactive_xml=record.inactive_xml, autostart=record.autostart, runs=runs)
    batch.effect("HSET", keys.orders(adoption.node), order.id, order.model_dump_json(by_alias=True))
    batch.effect("DEADLINE", keys.AWAITING, _timer(vm), int(ctx.config.ask_again_after * 1000))
    if not order.kind.changes_domain:
        batch.wake(adoption.node, "order")


def drop_order(batch: Batch, vm: VirtualMachine) -> None:
    """Add to a batch that the order of a VM's adoption or release is answered."""
    adoption = vm.status.adoption
    assert adoption is not None  # noqa: S101 - the caller looked
    batch.effect("HDEL", keys.orders(adoption.node), adoption_order_id(vm.key, adoption))
    batch.effect("ZREM", keys.AWAITING, _timer(vm))


def send_order(ctx: Context, vm: VirtualMachine) -> None:
    """Send the message for an order that goes to a worker. Sending it again does no harm."""
    adoption = vm.status.adoption
    if adoption is not None and _KINDS[adoption.step].changes_domain:
        _send(ctx, adoption.node, vm.key, adoption_order_id(vm.key, adoption), _KINDS[adoption.step])


def _send(ctx: Context, node: str, vm: str, order_id: str, kind: AdoptionOrderKind) -> None:
    ctx.messenger.send(Message(Task.NODE_ADOPT, lifecycle_queue(node), (vm, order_id, kind.value)))


def _timer(vm: VirtualMachine) -> str:
    return f"{ADOPTION_PREFIX}{vm.key}"


def is_timer(key: str) -> bool:
    """Whether something that is awaited is the answer to an order of this module."""
    return key.startswith((ADOPTION_PREFIX, UNDEFINE_PREFIX))


def press(ctx: Context, key: str) -> None:
    """Ask again for an answer that did not come by its time."""
    batch = ctx.store.batch().check("due", keys.AWAITING, key)
    after = (_press_undefine if key.startswith(UNDEFINE_PREFIX) else _press_adoption)(ctx, batch, key)
    answer = ctx.store.commit(batch)
    if not isinstance(answer, Refusal) and after is not None and not _is_waiting(ctx, after[0]):
        _send(ctx, *after)


def _press_adoption(ctx: Context, batch: Batch, key: str) -> _Sent | None:
    vm = ctx.store.find(VirtualMachine, key.removeprefix(ADOPTION_PREFIX))
    adoption = vm.status.adoption if vm is not None else None
    if vm is None or adoption is None:
        batch.effect("ZREM", keys.AWAITING, key)
        return None
    batch.check("unchanged", VirtualMachine.kind_name, vm.key, vm.version)
    put_order(ctx, batch, vm, find_record(ctx, vm))
    kind = _KINDS[adoption.step]
    return (adoption.node, vm.key, adoption_order_id(vm.key, adoption), kind) if kind.changes_domain else None


def _is_waiting(ctx: Context, node: str) -> bool:
    """Whether a node's worker has messages that it has not taken: what is still there was not lost."""
    with redis_errors(ctx.store.redis):
        return bool(ctx.store.redis.llen(lifecycle_queue(node)))


def order_undefine(batch: Batch, node: str, vm: VirtualMachine, seen: SeenDomain) -> None:
    """Have a definition removed that somebody gave a domain of ours behind our back; reconcile sends the message.

    Nothing is asked for where the domain does not run there as the VM that is on record: what is defined and does not
    run may be all that is left of something else.
    """
    status = vm.status
    is_ours = status.node_name == node and seen.incarnation == status.incarnation and status.adoption is None
    if not seen.persistent or not is_ours or seen.state in _GONE_STATES or seen.job:
        return
    order = AdoptionOrder(
        id=_undefine_id(node, vm),
        kind=AdoptionOrderKind.UNDEFINE,
        vm=vm.key,
        uuid=vm.metadata.uid,
        incarnation=status.incarnation,
    )
    batch.effect("HSET", keys.orders(node), order.id, order.model_dump_json(by_alias=True))
    batch.effect("DEADLINE", keys.AWAITING, order.id, 0)


def drop_undefine(batch: Batch, vm: VirtualMachine) -> None:
    """Add to a batch that a VM's definition on its node is not removed any more."""
    if vm.status.node_name:
        batch.effect("HDEL", keys.orders(vm.status.node_name), _undefine_id(vm.status.node_name, vm))
        batch.effect("ZREM", keys.AWAITING, _undefine_id(vm.status.node_name, vm))


def _undefine_id(node: str, vm: VirtualMachine) -> str:
    return f"{UNDEFINE_PREFIX}{node}/{vm.key}"


def _press_undefine(ctx: Context, batch: Batch, key: str) -> _Sent | None:
    node, _, vm_key = key.removeprefix(UNDEFINE_PREFIX).partition("/")
    vm = ctx.store.find(VirtualMachine, vm_key)
    with redis_errors(ctx.store.redis):
        is_open = ctx.store.redis.hexists(keys.orders(node), key)
    if vm is None or vm.status.node_name != node or vm.status.adoption is not None or not is_open:
        batch.effect("HDEL", keys.orders(node), key).effect("ZREM", keys.AWAITING, key)
        return None
    batch.effect("DEADLINE", keys.AWAITING, key, int(ctx.config.ask_again_after * 1000))
    return node, vm_key, key, AdoptionOrderKind.UNDEFINE


def still_claimed(ctx: Context, seen: SeenDomain, known: SeenDomain | None) -> SeenDomain:
    """A report on a domain that is being adopted or released: it counts as its VM's, though it bears no mark (yet)."""
    if known is None or not known.vm or seen.vm:
        return seen
    vm = ctx.store.find(VirtualMachine, known.vm)
    if vm is None or vm.status.adoption is None:
        return seen
    return seen.with_(vm=known.vm, incarnation=known.incarnation)


def find_vm(ctx: Context, order_id: str) -> VirtualMachine | None:
    """Find the VM whose open adoption or release awaits the answer to an order; None when none does."""
    vm_key = order_id.removeprefix(ADOPTION_PREFIX).partition("#")[0]
    vm = ctx.store.find(VirtualMachine, vm_key)
    adoption = vm.status.adoption if vm is not None else None
    return vm if vm is not None and adoption is not None and adoption_order_id(vm.key, adoption) == order_id else None
