"""How a node's domains are configured: a question to its agent, and the answers, one report for each domain.

Whoever asked waits on a list of its own, which nothing else reads and which is gone after minutes. No secret is in it.
"""

import json
from typing import Any, cast
from uuid import uuid4

from orchestrator.errors import Invalid, Refused, WaitTimeout
from orchestrator.resources import Node
from orchestrator.resources.adoption import DEFINITIONS_PREFIX, AdoptionOrder, AdoptionOrderKind, FoundDomain
from orchestrator.services.context import Context
from orchestrator.store import Batch, keys
from orchestrator.store.connection import redis_errors

_BLOCK_S = 1.0


def ask_definitions(ctx: Context, node: str, names: tuple[str, ...] = (), timeout_s: float = 30.0) -> list[FoundDomain]:
    """Ask a node for all its domains, by its agent's word after this call.

    Args:
        node: Its name.
        names: Names and UUIDs of domains whose XML is wanted too; empty: of all that bear no mark of ours.
        timeout_s: More than 0.

    Raises:
        NotFound: No such node.
        Refused: It is not Ready.
        WaitTimeout: Its agent does not answer.
    """
    if not ctx.store.get(Node, node).is_ready:
        raise Refused(f"node {node!r} is not Ready: its domains can't be read")
    order = AdoptionOrder(id=f"{DEFINITIONS_PREFIX}{uuid4().hex}", kind=AdoptionOrderKind.DEFINITIONS, names=names)
    batch = ctx.store.batch().effect("HSET", keys.orders(node), order.id, order.model_dump_json(by_alias=True))
    ctx.store.must_commit(batch.wake(node, "order"))
    try:
        return _collect(ctx, order.id, node, timeout_s)
    finally:
        with redis_errors(ctx.store.redis):
            ctx.store.redis.hdel(keys.orders(node), order.id)
            ctx.store.redis.delete(keys.answers(order.id))


def _collect(ctx: Context, order_id: str, node: str, timeout_s: float) -> list[FoundDomain]:
    deadline = ctx.clock.monotonic() + timeout_s
    found: dict[str, FoundDomain] = {}
    while (left := deadline - ctx.clock.monotonic()) > 0:
        with redis_errors(ctx.store.redis):
            item = cast(
                "list[str] | None", ctx.store.redis.blpop([keys.answers(order_id)], timeout=min(_BLOCK_S, left))
            )
        if item is None:
            continue
        body = json.loads(item[1])
        if "count" in body:
            if len(found) >= body["count"]:
                return list(found.values())
            continue  # it was asked twice, and this answer's first part was read before: the other one is to come
        domain = FoundDomain.model_validate(body)
        found[domain.uuid] = domain
    raise WaitTimeout(f"the agent of node {node!r} did not say in {timeout_s:g} s what domains it has")


def take_definitions(ctx: Context, batch: Batch, node: str, body: dict[str, Any]) -> None:
    """Pass on what an agent answers to whoever asked, as long as the question stands.

    Raises:
        Invalid: It can't be read.
    """
    order_id = str(body["order"])
    with redis_errors(ctx.store.redis):
        asked = cast("str | None", ctx.store.redis.hget(keys.orders(node), order_id))
    if asked is None:
        return
    batch.check("field", keys.orders(node), order_id, asked)
    if "domain" in body:
        try:
            found = FoundDomain.model_validate(body["domain"])
        except ValueError:
            raise Invalid("the definition of a domain can't be read") from None  # the error would repeat its XML
        batch.effect("RPUSH", keys.answers(order_id), found.model_dump_json(by_alias=True))
    else:
        batch.effect("RPUSH", keys.answers(order_id), json.dumps({"count": int(body["count"])}))
        batch.effect("HDEL", keys.orders(node), order_id)
    batch.effect("PEXPIRE", keys.answers(order_id), keys.ANSWERS_TTL_MS)
