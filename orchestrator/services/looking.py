"""Other nodes' agents are asked to look at a silent host through its libvirt daemon.

A host without a watchdog whose heartbeat alone is dead lives, and is not to be cut: its daemon answers, and shows its
VMs. The control plane has no libvirt, so agents of nodes that are Ready look, each by itself: what one does not reach
another may. Whoever asked waits on lists of its own; a question that nobody waits for any more is dropped by its timer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

from orchestrator.errors import Invalid
from orchestrator.resources import Node
from orchestrator.resources.looking import LOOK_PREFIX, Look, LookOrder
from orchestrator.services.context import Context
from orchestrator.store import Batch, keys
from orchestrator.store.connection import redis_errors

ASKED_AT_ONCE = 3
_LOOK_EVERY_S = 0.1
_DROPPED_AFTER_MS = 30_000
OPEN_WAIT_S = 6.0
"""For answers, where the daemon's port takes connections: a daemon that hangs is given up by an agent after 5 s."""
CLOSED_WAIT_S = 1.0
"""Where it takes none: trying that took up to 1 s already; the agents try for twice as long."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Questions under way: by node that is asked, the order's id."""

    orders: dict[str, str]


def ask(ctx: Context, suspect: Node) -> Asked:
    """Ask some nodes' agents to look at a host."""
    uri = suspect.status.hypervisor.migration_uri
    ready = [n.name for n in ctx.store.all(Node) if n.is_ready and not n.spec.witness and n.name != suspect.name]
    if not uri or not ready:
        return Asked({})
    orders = {name: f"{LOOK_PREFIX}{name}/{uuid4().hex}" for name in ready[:ASKED_AT_ONCE]}
    batch = ctx.store.batch()
    for name, order_id in orders.items():
        body = LookOrder(id=order_id, uri=uri).model_dump_json(by_alias=True)
        batch.effect("HSET", keys.orders(name), order_id, body)
        batch.effect("DEADLINE", keys.AWAITING, order_id, _DROPPED_AFTER_MS)
        batch.wake(name, "order")
    ctx.store.must_commit(batch)
    return Asked(orders)


def collect(ctx: Context, asked: Asked, wait_s: float, is_enough: Callable[[Look], bool]) -> dict[str, Look]:
    """Wait for what was seen, until all have answered, one answer is enough, or the time is over."""
    until = ctx.clock.monotonic() + wait_s
    found: dict[str, Look] = {}
    while True:
        waiting = {name: order_id for name, order_id in asked.orders.items() if name not in found}
        found |= _read(ctx, waiting)
        is_over = len(found) == len(asked.orders) or ctx.clock.monotonic() >= until
        if is_over or any(is_enough(look) for look in found.values()):
            break
        ctx.clock.sleep(_LOOK_EVERY_S)
    drop(ctx, asked)
    return found


def _read(ctx: Context, waiting: dict[str, str]) -> dict[str, Look]:
    with redis_errors(ctx.store.redis):
        pipe = ctx.store.redis.pipeline(transaction=False)
        for order_id in waiting.values():
            pipe.lindex(keys.answers(order_id), 0)
        texts = cast("list[str | None]", pipe.execute()) if waiting else []
    return {name: Look.model_validate_json(text) for name, text in zip(waiting, texts, strict=True) if text}


def drop(ctx: Context, asked: Asked) -> None:
    """Take questions back: what is answered from here on counts for nothing."""
    if not asked.orders:
        return
    batch = ctx.store.batch()
    for name, order_id in asked.orders.items():
        batch.effect("HDEL", keys.orders(name), order_id).effect("ZREM", keys.AWAITING, order_id)
        batch.effect("DEL", keys.answers(order_id))
    ctx.store.must_commit(batch)


def is_timer(key: str) -> bool:
    """Whether something that is awaited is the answer to a question of this module."""
    return key.startswith(LOOK_PREFIX)


def drop_overdue(ctx: Context, key: str) -> None:
    """Drop a question whose asker has died."""
    node = key.removeprefix(LOOK_PREFIX).partition("/")[0]
    batch = ctx.store.batch().check("due", keys.AWAITING, key)
    batch.effect("HDEL", keys.orders(node), key).effect("ZREM", keys.AWAITING, key)
    ctx.store.commit(batch)  # refused: it was answered meanwhile


def take_answer(ctx: Context, batch: Batch, node: str, body: dict[str, Any]) -> None:
    """Pass on what an agent saw to whoever asked, as long as the question stands.

    Raises:
        Invalid: It can't be read.
    """
    order_id = str(body["order"])
    with redis_errors(ctx.store.redis):
        asked = cast("str | None", ctx.store.redis.hget(keys.orders(node), order_id))
    if asked is None or not order_id.startswith(LOOK_PREFIX):
        return
    try:
        look = Look.model_validate({"problem": body.get("problem", ""), "guests": body.get("guests", ())})
    except ValueError as error:
        raise Invalid(f"what node {node} saw can't be read") from error
    batch.check("field", keys.orders(node), order_id, asked)
    batch.effect("RPUSH", keys.answers(order_id), look.model_dump_json(by_alias=True))
    batch.effect("PEXPIRE", keys.answers(order_id), keys.ANSWERS_TTL_MS)
    batch.effect("HDEL", keys.orders(node), order_id).effect("ZREM", keys.AWAITING, order_id)


def shows(look: Look, wanted: frozenset[str]) -> bool:
    """Whether a host lives, as was seen: its daemon answered, and showed one of its VMs, if it has any."""
    return not look.problem and (not wanted or any(guest.vm in wanted for guest in look.guests))


__all__ = ["Asked", "ask", "collect", "drop", "drop_overdue", "is_timer", "shows", "take_answer"]
