"""The membership as it is published: nodes and witnesses that beat, for their peers and for takeover.

Written by one script call against the version that was read, so of several workers one is first. Members see it with
their next renewal, and acknowledge it with the one after that.

A failover must not lose one that somebody has read: rule 10 would count by another than that node goes by. So it is
prepared first (`membership-next`), and published once replicas have that. What is prepared is published, whatever came
since; until then nothing is taken over by a deadline.
"""

import secrets
from typing import cast

from orchestrator.lease import Membership, read_lease, read_membership
from orchestrator.logs import logger
from orchestrator.planner.membership import plan_membership
from orchestrator.resources import Node
from orchestrator.services.context import Context
from orchestrator.services.herd import Herd
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors

log = logger(__name__)


def keep_membership(ctx: Context, herd: Herd) -> Membership | None:
    """Bring the membership one step on, where it should change and may.

    Returns:
        What was published; None when nothing was.
    """
    names = sorted(node.name for node in herd.follower.all(Node))
    redis = ctx.store.redis
    with redis_errors(redis):
        pipe = redis.pipeline(transaction=False)
        pipe.get(keys.MEMBERSHIP)
        pipe.set(keys.PEER_KEY, secrets.token_hex(32), nx=True)
        pipe.get(keys.MEMBERSHIP_NEXT)
        found = cast("list[str | None]", pipe.execute())
        current, prepared = read_membership(found[0]), read_membership(found[2])
        if prepared.version > current.version:
            return _publish(ctx, found[0], prepared)
        asked = sorted({*names, *current.members})
        if not asked:
            return None
        leases = cast("list[str | None]", redis.mget([keys.lease(name) for name in asked]))
        taken = cast("list[str | None]", redis.mget([keys.taken_over(name) for name in asked]))
    held, wanted, fenced = {}, {}, set()
    for name, text, boot in zip(asked, leases, taken, strict=True):
        stored = read_lease(text)
        if stored is not None:
            held[name] = stored.lease.membership
        if boot is not None and (stored is None or boot.partition(" ")[0] == stored.lease.boot_id):
            fenced.add(name)
        if name in names:
            address = stored.lease.address if stored is not None else current.members.get(name, "")
            if address:  # who never beat can neither vote nor be asked
                wanted[name] = address
    plan = plan_membership(current, wanted, held, fenced)
    if plan.next is None:
        return None
    batch = ctx.store.batch()
    batch.check("value", keys.MEMBERSHIP, found[0] or "").check("value", keys.MEMBERSHIP_NEXT, found[2] or "")
    batch.effect("SET", keys.MEMBERSHIP_NEXT, plan.next.text())
    ctx.store.must_commit(batch)
    return _publish(ctx, found[0], plan.next)


def _publish(ctx: Context, before: str | None, prepared: Membership) -> Membership | None:
    """Publish what is prepared, once replicas have it."""
    if not ctx.store.is_replicated():
        log.warning("a membership waits: it is on too few replicas", version=prepared.version)
        return None
    batch = ctx.store.batch()
    batch.check("value", keys.MEMBERSHIP, before or "").check("value", keys.MEMBERSHIP_NEXT, prepared.text())
    batch.effect("SET", keys.MEMBERSHIP, prepared.text())
    batch.tell("membership", version=prepared.version, members=len(prepared.members), changed=prepared.changed)
    ctx.store.must_commit(batch)
    return prepared
