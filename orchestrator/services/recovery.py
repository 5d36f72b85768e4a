"""Recovery mode: Redis restarted or failed over, so its last writes may be missing.

Until every live node has listed its domains anew, nothing is granted (`lua/commit.lua`, check `identity`). The counters
of versions and epochs skip ahead by 2^20, past anything that was handed out and then lost.

An open grant survives a plain restart, and its worker goes on meanwhile; its timers begin anew, so that an outage makes
no grant suspect.
"""

from typing import cast

from orchestrator.logs import logger
from orchestrator.resources import Node, NodeInventory, VirtualMachineOperation
from orchestrator.services.context import Context, deciding, put_timers, wake_grant
from orchestrator.store import Batch, keys
from orchestrator.store.connection import redis_errors

log = logger(__name__)

SKIP = 2**20
NORMAL, ENTERING, RECOVERING = "normal", "entering", "recovering"


def identity(ctx: Context) -> dict[str, str]:
    """Read which Redis answers now: `run_id` and `replid`."""
    with redis_errors(ctx.store.redis):
        server = cast("dict[str, str]", ctx.store.redis.info("server"))
        replication = cast("dict[str, str]", ctx.store.redis.info("replication"))
    return {"run_id": str(server["run_id"]), "replid": str(replication["master_replid"])}


def check_identity(ctx: Context) -> bool:
    """Compare Redis with the one on record; enter, continue or leave recovery mode.

    Returns:
        Whether the herd is in its normal state.
    """
    actual = identity(ctx)
    with redis_errors(ctx.store.redis):
        record = cast("dict[str, str]", ctx.store.redis.hgetall(keys.IDENTITY))
    if {k: record.get(k) for k in actual} == actual and record.get("state") == NORMAL:
        return True
    if {k: record.get(k) for k in actual} != actual:
        _enter(ctx, actual, record.get("run_id", ""))
        _order_listings(ctx, actual)
    elif record.get("state") == ENTERING:
        _order_listings(ctx, actual)
    return _leave_if_read(ctx, actual)


def _enter(ctx: Context, actual: dict[str, str], before: str) -> None:
    """Enter recovery. Without a record this Redis is new, or lost everything: then there is nothing to skip.

    The skip is a commit of its own, before anything is written: no version that was handed out is handed out again.
    """
    batch = ctx.store.batch()
    batch.tell("recovery mode: Redis restarted or failed over", warning=True, before=before, run_id=actual["run_id"])
    batch.check("field", keys.IDENTITY, "run_id", before)
    _put_record(batch, actual, ENTERING, ctx.now().isoformat())
    if before:
        batch.effect("SKIP", SKIP).effect("INCRBY", keys.EPOCH, SKIP)
    ctx.store.must_commit(batch)


def _order_listings(ctx: Context, actual: dict[str, str]) -> None:
    """Have every node list its domains anew, and let the timers of open grants begin anew."""
    batch = ctx.store.batch()
    batch.check("field", keys.IDENTITY, "state", ENTERING)
    _put_record(batch, actual, RECOVERING, ctx.now().isoformat())
    inventories = ctx.store.many(NodeInventory, [node.name for node in ctx.store.all(Node)])
    for inventory in inventories.values():
        batch.put(inventory, inventory.with_(listing_order=f"recovery-{actual['run_id'][:12]}"))
        batch.wake(inventory.name, "recovery")
    for operation in ctx.store.all(VirtualMachineOperation):
        put_timers(ctx, batch, operation)
    ctx.store.must_commit(batch)


def _leave_if_read(ctx: Context, actual: dict[str, str]) -> bool:
    """Leave recovery when each node that is Ready has listed its domains since."""
    wanted = f"recovery-{actual['run_id'][:12]}"
    nodes = {node.name: node for node in ctx.store.all(Node)}
    inventories = ctx.store.many(NodeInventory, nodes)
    silent = [i.name for i in inventories.values() if i.listing_order == wanted and nodes[i.name].is_ready]
    if silent:
        log.info("recovery mode: waits for listings", nodes=sorted(silent))
        batch = ctx.store.batch()
        for name in silent:
            batch.wake(name, "recovery")
        ctx.store.commit(batch)
        return False

    highest = max(
        (d.epoch for i in inventories.values() for d in i.domains.values()),
        default=0,
    )
    batch = ctx.store.batch()
    batch.check("field", keys.IDENTITY, "run_id", actual["run_id"])
    batch.check("field", keys.IDENTITY, "state", RECOVERING)
    _put_record(batch, actual, NORMAL, ctx.now().isoformat())
    current = ctx.store.next_epochs(1)[0]
    if highest >= current:
        batch.effect("INCRBY", keys.EPOCH, highest - current + SKIP)
    batch.tell("recovery mode ended", warning=True, run_id=actual["run_id"])
    ctx.store.must_commit(batch)
    wake_grant(ctx)
    return True


def _put_record(batch: Batch, actual: dict[str, str], state: str, since: str) -> None:
    batch.effect(
        "HSET", keys.IDENTITY, "run_id", actual["run_id"], "replid", actual["replid"], "state", state, "since", since
    )


def recover(ctx: Context) -> bool:
    """As `check_identity`, deciding again when another worker was faster."""
    return deciding(lambda: check_identity(ctx))
