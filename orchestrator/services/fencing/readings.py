"""BMCs are read while all is well: so that each is known to be its node's own, and a fault is seen before the day."""

import json
from hashlib import sha256
from typing import cast

from orchestrator.fencing.agents import Power
from orchestrator.planner.flow import Note
from orchestrator.queues import FENCING, Message, Task
from orchestrator.resources import Node, NodeFencing
from orchestrator.resources.fencing import Bmc, FenceLevel, FencePhase
from orchestrator.services.context import Context
from orchestrator.services.fencing.state import (
    BMC_CONTRADICTS,
    LOOK_EVERY_S,
    change_fencing,
    distrust,
    identity,
    is_fresh,
    lease_of,
)
from orchestrator.services.fencing.tools import Tools
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors

_READ_POWER_AFTER_MS = 120_000


def read_powers(ctx: Context) -> int:
    """Have each BMC read that was not read for two minutes; give how many. Not while a node is being fenced.

    One that stays unconfirmed does not count: what is known of the others' BMCs would run out.
    """
    fencings = ctx.store.all(NodeFencing)
    if any(fencing.status.phase is FencePhase.FENCING for fencing in fencings):
        return 0
    names = [fencing.name for fencing in fencings if fencing.spec.bmc is not None]
    with redis_errors(ctx.store.redis):
        pipe = ctx.store.redis.pipeline(transaction=False)
        for name in names:
            pipe.pttl(keys.bmc_on(name))
        left = cast("list[int]", pipe.execute())
    due = [name for name, ms in zip(names, left, strict=True) if ms < keys.BMC_ON_TTL_MS - _READ_POWER_AFTER_MS]
    for name in due:
        ctx.messenger.send(Message(Task.READ_POWER, FENCING, (name,)))
    return len(due)


def read_power(ctx: Context, tools: Tools, name: str) -> str:
    """Read one BMC while its node's lease is fresh, so that it is known to be the node's own."""
    fencing, node = ctx.store.find(NodeFencing, name), ctx.store.find(Node, name)
    if fencing is None or node is None or fencing.spec.bmc is None or fencing.status.phase is not FencePhase.IDLE:
        return f"{name}: not now"
    before = lease_of(ctx, name)
    if before is None or not is_fresh(node):
        return f"{name}: its lease is not fresh"
    answer = tools.switch.status(fencing.spec.bmc)
    if answer.power is Power.ON:
        if fencing.status.bmc_distrust:
            return f"{name}: on, and not trusted: {fencing.status.bmc_distrust}"
        away = sorted(other.name for other in ctx.store.all(NodeFencing) if _is_off_by_word(other))
        value = json.dumps({"bmc": _fingerprint(fencing.spec.bmc), "away": away})
        with redis_errors(ctx.store.redis):
            ctx.store.redis.set(keys.bmc_on(name), value, px=keys.BMC_ON_TTL_MS)
        _say_idle(ctx, name, "", "")
        return f"{name}: on"
    if answer.power is Power.OFF:
        # Off, and the node lives: only if it renews once more after this was read.
        after = lease_of(ctx, name)
        until = ctx.clock.monotonic() + before.lease.timing.lease_ttl
        while identity(lease_of(ctx, name)) == identity(after) and ctx.clock.monotonic() < until:
            ctx.clock.sleep(LOOK_EVERY_S)
        if identity(lease_of(ctx, name)) == identity(after):
            return f"{name}: off, and silent since"
        message = "its BMC says that its power is off, and it runs: the BMC is another host's"
        with redis_errors(ctx.store.redis):
            ctx.store.redis.delete(keys.bmc_on(name))
        distrust(ctx, name, fencing.spec.bmc, message)
        _say_idle(ctx, name, BMC_CONTRADICTS, message)
        return f"{name}: {message}"
    _say_idle(ctx, name, "BmcUnreadable", answer.problem)
    return f"{name}: {answer.problem}"


def _say_idle(ctx: Context, name: str, reason: str, message: str) -> None:
    """Show what is wrong with a BMC before it is needed; an empty reason: nothing is."""

    def change(old: NodeFencing) -> NodeFencing | None:
        status = old.status
        if status.phase is not FencePhase.IDLE or status.reason == reason:
            return None
        if not reason and status.reason not in {"BmcUnreadable", BMC_CONTRADICTS}:
            return None
        return old.with_status(reason=reason, message=message, since=ctx.now())

    note = Note(reason, message, warning=True) if reason else Note("BmcReadable", "its BMC says that its power is on")
    change_fencing(ctx, name, change, note)


def _is_off_by_word(fencing: NodeFencing) -> bool:
    """Whether a person said that a node is off, and it is not back: then a power that reads as on is not its own.

    Silence is no such word: a host that is cut off, or whose agent is stopped, has power.
    """
    evidence = fencing.status.evidence
    return fencing.status.phase.has_evidence and evidence is not None and evidence.level is FenceLevel.PERSON


def _fingerprint(bmc: Bmc) -> str:
    return sha256(bmc.model_dump_json().encode()).hexdigest()


def away_when_on(ctx: Context, name: str, bmc: Bmc) -> frozenset[str] | None:
    """Members that were off, by a person's word, when this BMC was last read as on; None: not within ten minutes."""
    with redis_errors(ctx.store.redis):
        text = cast("str | None", ctx.store.redis.get(keys.bmc_on(name)))
    found = json.loads(text) if text else {}
    return frozenset(found["away"]) if found.get("bmc") == _fingerprint(bmc) else None
