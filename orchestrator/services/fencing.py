"""Fencing a node: what is tried for evidence, what a person says, and what is shown of it.

`run_fencing` is one attempt, in a worker of the fencing queue. BMC and watchdog's deadline (`services.liveness`) are
sought side by side; the first evidence that is committed ends the other. All of it may be run any number of times, by
several workers: one agent at a time works on a node, and evidence is committed against the fencing as it was read.

What a BMC says counts under the conditions of docs/adr/0019-fencing.md: read back as off; off already, only if it was
read as on within ten minutes while the lease was fresh; and never while another member, which was there before, fell
silent with it: addresses that were swapped cut a healthy host's power, and prove nothing about the lost one.
"""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import cast
from urllib.parse import urlsplit
from uuid import uuid4

from orchestrator.errors import Conflict, NotFound, Refused
from orchestrator.fencing.agents import FenceAgents, Power, PowerSwitch
from orchestrator.lease import Lease, StoredLease, read_lease
from orchestrator.logs import logger
from orchestrator.planner.flow import Note
from orchestrator.planner.liveness import Judgement
from orchestrator.queues import FENCING, Message, Task
from orchestrator.resources import Node, NodeFencing, ObjectMeta, find_condition, new_metadata
from orchestrator.resources.fencing import Bmc, FenceLevel, FencePhase, NodeFencingSpec, NodeFencingStatus
from orchestrator.services.context import Context, add_notes, deciding
from orchestrator.services.takeover import commit_evidence
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors

log = logger(__name__)

_LOOK_EVERY_S = 0.5
_READ_BACK_TRIES = 10
_READ_POWER_AFTER_MS = 120_000
_CONNECT_S = 2.0
_PORTS = {"tls": 16_514, "tcp": 16_509}
BMC_CONTRADICTS = "BmcContradicts"
"""Reason of a fencing whose BMC was read as off while the node's lease was fresh: it is another host's."""
BMC_OF_ANOTHER = "BmcOfAnother"
"""Reason of a fencing without evidence, as its BMC is taken for another host's."""


def is_listening(host: str, port: int) -> bool:
    """Whether something takes connections there."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Tools:
    """What reaches out of the herd; the scenarios hand in simulated ones.

    Attributes:
        switch: Reads and cuts power.
        is_listening: Whether a port of a host takes connections.
    """

    switch: PowerSwitch
    is_listening: Callable[[str, int], bool] = is_listening


def default_tools() -> Tools:
    """Give the fence agents of this machine."""
    return Tools(FenceAgents())


# --- the state of a fencing -------------------------------------------------------------------------------------------


def _new(ctx: Context, name: str) -> NodeFencing:
    return NodeFencing(metadata=new_metadata(ObjectMeta(name=name), namespaced=False, now=ctx.now()))


def _change(
    ctx: Context, name: str, change: Callable[[NodeFencing], NodeFencing | None], note: Note | None = None
) -> NodeFencing | None:
    """Change a node's fencing, which is made where there is none; None from `change` leaves it as it is."""

    def decide() -> NodeFencing | None:
        old = ctx.store.find(NodeFencing, name)
        base = old or _new(ctx, name)
        new = change(base)
        if new is None or new == old:
            return None
        batch = ctx.store.batch()
        if old is None:
            batch.create(new)
        else:
            batch.put(old, new)
        if note is not None:
            add_notes(batch, (ctx.store.find(Node, name) or new,), (note,), ctx.now())
        if new.status.phase is not base.status.phase:
            batch.tell("fencing", node=name, phase=f"{base.status.phase} => {new.status.phase}", why=new.status.reason)
        ctx.store.must_commit(batch)
        return new

    return deciding(decide)


def _of_lease(status: NodeFencingStatus, lease: Lease | None, at: datetime) -> dict[str, object]:
    """What a status says of the lease that ran out; of another one than before, no power was cut yet."""
    generation, sequence = lease.identity if lease is not None else ("", 0)
    new: dict[str, object] = {"generation": generation, "sequence": sequence}
    new["boot_id"] = lease.boot_id if lease is not None else ""
    is_another = (generation, sequence) != (status.generation, status.sequence)
    if is_another:
        new |= {"powered_off": False, "cut_epoch": 0}
    if is_another or status.lost_at is None:
        new["lost_at"] = at
    return new


def say_suspect(ctx: Context, name: str, judgement: Judgement, lease: Lease | None, *, is_telling: bool = True) -> None:
    """Show why a lost node is not fenced, once for each reason. A fencing under way is halted by it.

    Args:
        ctx: To work with.
        name: The node's.
        judgement: Why.
        lease: That ran out.
        is_telling: Whether there is an event about it: of a node that runs nothing, nobody need know more than that it
            is not Ready.
    """

    def change(old: NodeFencing) -> NodeFencing | None:
        status = old.status
        if status.phase.has_evidence or (status.phase is FencePhase.SUSPECT and status.reason == judgement.reason):
            return None
        return old.with_status(
            phase=FencePhase.SUSPECT,
            since=ctx.now(),
            reason=judgement.reason,
            message=judgement.message,
            **_of_lease(status, lease, ctx.now()),
        )

    _change(ctx, name, change, Note("NodeSuspect", judgement.message, warning=True) if is_telling else None)


def begin(ctx: Context, name: str, message: str, lease: Lease | None) -> None:
    """Begin to seek evidence about a lost node."""

    def change(old: NodeFencing) -> NodeFencing | None:
        if old.status.phase.has_evidence or old.status.phase.is_open:
            return None
        return old.with_status(
            phase=FencePhase.FENCING,
            since=ctx.now(),
            reason="LeaseExpired",
            message=message,
            evidence=None,
            **_of_lease(old.status, lease, ctx.now()),
        )

    _change(ctx, name, change, Note("NodeFencing", f"{message}: evidence is sought that it runs nothing", warning=True))


def end_renewed(ctx: Context, name: str, lease: Lease) -> None:
    """End a fencing that has no evidence, as the node renewed its lease: it is there."""

    def change(old: NodeFencing) -> NodeFencing | None:
        status = old.status
        if status.phase.has_evidence or status.phase is FencePhase.IDLE:
            return None
        if (status.generation, status.sequence) == lease.identity:
            return None
        at, distrust = ctx.now(), status.bmc_distrust
        back = NodeFencingStatus(since=at, reason="LeaseRenewed", message="it is back", bmc_distrust=distrust)
        return old.with_(status=back)

    _change(ctx, name, change, Note("NodeFencingEnded", "it renewed its lease: it is not fenced"))


def _say_unconfirmed(ctx: Context, name: str, reason: str, message: str) -> None:
    def change(old: NodeFencing) -> NodeFencing | None:
        status = old.status
        if not status.phase.is_open or (status.phase is FencePhase.UNCONFIRMED and status.reason == reason):
            return None
        return old.with_status(phase=FencePhase.UNCONFIRMED, since=ctx.now(), reason=reason, message=message)

    text = f"no evidence yet: {message}; nothing of it starts elsewhere (vmherd fence confirm {name}, once it is off)"
    _change(ctx, name, change, Note("FenceUnconfirmed", text, warning=True))


# --- one attempt ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _NoEvidence:
    """An attempt gave none: why."""

    reason: str
    message: str


def run_fencing(ctx: Context, tools: Tools, name: str) -> str:
    """Seek evidence about one node by its BMC; give what came of it, for Flower's list."""
    fencing = ctx.store.find(NodeFencing, name)
    if fencing is None or not fencing.status.phase.is_open:
        return f"{name}: nothing to do"
    with _alone(ctx, name) as is_ours:
        if not is_ours:
            return f"{name}: another worker is at it"
        found = _seek(ctx, tools, name, fencing)
    if isinstance(found, _NoEvidence):
        _say_unconfirmed(ctx, name, found.reason, found.message)
        return f"{name}: {found.message}"
    return f"{name}: {found}"


def _seek(ctx: Context, tools: Tools, name: str, fencing: NodeFencing) -> "_NoEvidence | str":
    node = ctx.store.find(Node, name)
    stored = _lease(ctx, name)
    lease = stored.lease if stored is not None else None
    if not _is_same(fencing, lease):
        return "its lease was renewed"
    if node is not None and (lease is None or not lease.armed) and _answers(tools, node):
        return _NoEvidence("HypervisorAnswers", "its libvirt daemon takes connections: the host lives")
    bmc = fencing.spec.bmc
    if bmc is None:
        waits = "its watchdog's deadline is waited for" if lease is not None and lease.armed else "it has no watchdog"
        return _NoEvidence("NoBmc", f"it has no BMC, and {waits}")
    if fencing.status.bmc_distrust:
        return _NoEvidence(BMC_OF_ANOTHER, fencing.status.bmc_distrust)
    away = _away(ctx, name, bmc)
    how = _read_or_cut(ctx, tools, name, fencing, bmc, is_known=away is not None)
    if isinstance(how, _NoEvidence):
        return how
    silent = _silent_others(ctx, name, away or frozenset())
    if silent:
        text = f"{', '.join(silent)} fell silent too: whose power was cut is not known (are BMC addresses swapped?)"
        _distrust(ctx, name, bmc, text)
        return _NoEvidence(BMC_OF_ANOTHER, text)
    current = ctx.store.find(NodeFencing, name)
    if current is None or not current.status.phase.is_open:
        return "ended meanwhile"
    try:
        refused = commit_evidence(ctx, current, lease, FenceLevel.BMC, how)
    except Conflict:
        return "changed meanwhile"
    return f"no evidence: {refused.check} {refused.detail}" if refused is not None else how


def _read_or_cut(
    ctx: Context, tools: Tools, name: str, fencing: NodeFencing, bmc: Bmc, *, is_known: bool
) -> "_NoEvidence | str":
    """Have the power off, and say how that is known.

    Args:
        ctx: To work with.
        tools: Likewise.
        name: The node's.
        fencing: Its own.
        bmc: Likewise.
        is_known: The BMC was read as on a short while ago, while the node lived.
    """
    _hold_on(ctx, name)
    answer = tools.switch.status(bmc)
    if answer.power is Power.UNKNOWN:
        return _NoEvidence("BmcUnreadable", answer.problem)
    if answer.power is Power.ON:
        return _cut(ctx, tools, name, fencing, bmc) or "the power was cut, and read back as off by its BMC"
    if fencing.status.cut_epoch:
        return "the power was cut by an attempt before, and read back as off by its BMC"
    if is_known:
        return "the power was off already, read by its BMC"
    return _NoEvidence(
        "PowerWasOff",
        "its power is off already, but this BMC was not read as on within the last 10 minutes while the node "
        "lived: it may be another host's",
    )


def _distrust(ctx: Context, name: str, bmc: Bmc, why: str) -> None:
    """Use a BMC for nothing any more, until another one is set."""

    def change(old: NodeFencing) -> NodeFencing | None:
        return old.with_status(bmc_distrust=why) if old.spec.bmc == bmc else None

    _change(ctx, name, change)


def _cut(ctx: Context, tools: Tools, name: str, fencing: NodeFencing, bmc: Bmc) -> "_NoEvidence | None":
    """Cut the power, and read it back."""
    problem = ""
    for _ in range(bmc.attempts):
        stored = _lease(ctx, name)  # read again before each `off`
        if not _is_same(fencing, stored.lease if stored is not None else None):
            return _NoEvidence("LeaseRenewed", "its lease was renewed")
        if not deciding(lambda: _remember_cut(ctx, name, fencing)):
            return _NoEvidence("Ended", "the fencing ended meanwhile")
        log.warning("power is cut", node=name, agent=bmc.agent)
        _hold_on(ctx, name)
        problem = tools.switch.switch(bmc, on=False)
        for _ in range(_READ_BACK_TRIES):
            _hold_on(ctx, name)
            answer = tools.switch.status(bmc)
            if answer.power is Power.OFF:
                return None
            if answer.power is Power.UNKNOWN:
                problem = problem or answer.problem
                break
            ctx.clock.sleep(_LOOK_EVERY_S)
    return _NoEvidence("PowerStaysOn", f"its power could not be read back as off{': ' + problem if problem else ''}")


def _remember_cut(ctx: Context, name: str, fencing: NodeFencing) -> bool:
    """Write down that the power is about to be cut: this process may die before it could tell.

    Returns:
        Whether it is still to be cut.
    """
    current = ctx.store.find(NodeFencing, name)
    if current is None or not current.status.phase.is_open or current.status.bmc_distrust:
        return False
    was, now = fencing.status, current.status
    if current.spec.bmc != fencing.spec.bmc or (was.generation, was.sequence) != (now.generation, now.sequence):
        return False
    if not now.cut_epoch:
        new = current.with_status(powered_off=True, cut_epoch=ctx.store.next_epochs(1)[0])
        ctx.store.must_commit(ctx.store.batch().put(current, new))
    return True


def _is_same(fencing: NodeFencing, lease: Lease | None) -> bool:
    status = fencing.status
    return (status.generation, status.sequence) == (lease.identity if lease is not None else ("", 0))


def _answers(tools: Tools, node: Node) -> bool:
    """Whether a host's libvirt daemon takes connections."""
    parts = urlsplit(node.status.hypervisor.migration_uri)
    port = parts.port or _PORTS.get(parts.scheme.partition("+")[2])
    return bool(parts.hostname) and port is not None and tools.is_listening(str(parts.hostname), port)


def _silent_others(ctx: Context, name: str, away: frozenset[str]) -> list[str]:
    """Name the members that fell silent when this node's power went.

    Each other member must renew its lease after the power was read as off, unless there was evidence about it before
    the power was cut, or it was away already when this BMC was last read as on.

    Args:
        ctx: To work with.
        name: The node whose power was read as off.
        away: Members that were silent when this BMC was read as on: it is not theirs, or they were not on it.
    """
    others = [node.name for node in ctx.store.all(Node) if node.name != name and node.name not in away]
    fencings = {f.name: f.status for f in ctx.store.all(NodeFencing)}
    cut = fencings[name].cut_epoch if name in fencings else 0
    fenced = {
        other
        for other, status in fencings.items()
        if status.phase.has_evidence and status.evidence is not None and (not cut or status.evidence.epoch < cut)
    }
    waiting = {other: _lease(ctx, other) for other in others if other not in fenced}
    until = ctx.clock.monotonic() + max(
        (s.lease.timing.lease_ttl for s in waiting.values() if s is not None), default=ctx.config.lease_ttl
    )
    while waiting:
        now = _leases(ctx, list(waiting))
        waiting = {other: before for other, before in waiting.items() if _identity(now[other]) == _identity(before)}
        if not waiting or ctx.clock.monotonic() >= until:
            break
        ctx.clock.sleep(_LOOK_EVERY_S)
    return sorted(waiting)


def _identity(stored: StoredLease | None) -> tuple[str, int]:
    return stored.lease.identity if stored is not None else ("", 0)


def _lease(ctx: Context, name: str) -> StoredLease | None:
    return _leases(ctx, [name])[name]


def _leases(ctx: Context, names: list[str]) -> dict[str, StoredLease | None]:
    with redis_errors(ctx.store.redis):
        texts = cast("list[str | None]", ctx.store.redis.mget([keys.lease(name) for name in names]))
    return {name: read_lease(text) for name, text in zip(names, texts, strict=True)}


@contextmanager
def _alone(ctx: Context, name: str) -> Iterator[bool]:
    """Hold the right to run agents for a node; it ends by itself when this process dies, after the longest agent."""
    token, redis = uuid4().hex, ctx.store.redis
    with redis_errors(redis):
        is_ours = bool(redis.set(keys.fencing(name), token, nx=True, px=keys.FENCING_TTL_MS))
    try:
        yield is_ours
    finally:
        if is_ours:
            with redis_errors(redis):
                if redis.get(keys.fencing(name)) == token:
                    redis.delete(keys.fencing(name))


def _hold_on(ctx: Context, name: str) -> None:
    """Hold the right for one agent more."""
    with redis_errors(ctx.store.redis):
        ctx.store.redis.pexpire(keys.fencing(name), keys.FENCING_TTL_MS)


def power_on_again(ctx: Context, tools: Tools, name: str) -> str:
    """Power a node on again that we cut, once: it was recovered, and comes back empty."""
    taken = _change(ctx, name, lambda old: old.with_status(powered_off=False) if old.status.powered_off else None)
    if taken is None or taken.spec.bmc is None or taken.status.phase is not FencePhase.RECOVERED:
        return f"{name}: nothing to do"
    with _alone(ctx, name) as is_ours:
        problem = tools.switch.switch(taken.spec.bmc, on=True) if is_ours else "another worker is at it"
    note = Note("NodePowerOn", problem or "its power was switched on again", warning=bool(problem))
    _change(ctx, name, lambda old: old.with_status(message=note.message), note)
    return f"{name}: {note.message}"


# --- reading BMCs while all is well -----------------------------------------------------------------------------------


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
    before = _lease(ctx, name)
    if before is None or not _is_fresh(node):
        return f"{name}: its lease is not fresh"
    answer = tools.switch.status(fencing.spec.bmc)
    if answer.power is Power.ON:
        if fencing.status.bmc_distrust:
            return f"{name}: on, and not trusted: {fencing.status.bmc_distrust}"
        away = sorted(n.name for n in ctx.store.all(Node) if n.name != name and not _is_fresh(n))
        value = json.dumps({"bmc": _fingerprint(fencing.spec.bmc), "away": away})
        with redis_errors(ctx.store.redis):
            ctx.store.redis.set(keys.bmc_on(name), value, px=keys.BMC_ON_TTL_MS)
        _say_idle(ctx, name, "", "")
        return f"{name}: on"
    if answer.power is Power.OFF:
        # Off, and the node lives: only if it renews once more after this was read.
        after = _lease(ctx, name)
        until = ctx.clock.monotonic() + before.lease.timing.lease_ttl
        while _identity(_lease(ctx, name)) == _identity(after) and ctx.clock.monotonic() < until:
            ctx.clock.sleep(_LOOK_EVERY_S)
        if _identity(_lease(ctx, name)) == _identity(after):
            return f"{name}: off, and silent since"
        message = "its BMC says that its power is off, and it runs: the BMC is another host's"
        with redis_errors(ctx.store.redis):
            ctx.store.redis.delete(keys.bmc_on(name))
        _distrust(ctx, name, fencing.spec.bmc, message)
        _say_idle(ctx, name, BMC_CONTRADICTS, message)
        return f"{name}: {message}"
    _say_idle(ctx, name, "BmcUnreadable", answer.problem)
    return f"{name}: {answer.problem}"


def _is_fresh(node: Node) -> bool:
    condition = find_condition(node.status.conditions, "LeaseFresh")
    return condition is not None and condition.status == "True"


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
    _change(ctx, name, change, note)


def _fingerprint(bmc: Bmc) -> str:
    return sha256(bmc.model_dump_json().encode()).hexdigest()


def _away(ctx: Context, name: str, bmc: Bmc) -> frozenset[str] | None:
    """Members that were silent when this BMC was last read as on; None when it was not, within ten minutes."""
    with redis_errors(ctx.store.redis):
        text = cast("str | None", ctx.store.redis.get(keys.bmc_on(name)))
    found = json.loads(text) if text else {}
    return frozenset(found["away"]) if found.get("bmc") == _fingerprint(bmc) else None


# --- people -----------------------------------------------------------------------------------------------------------


def set_fencing(ctx: Context, name: str, change: Callable[[NodeFencingSpec], NodeFencingSpec]) -> NodeFencing:
    """Change what is said of a node's fencing; it may not have joined yet."""

    def decide() -> NodeFencing:
        old = ctx.store.find(NodeFencing, name)
        base = old or _new(ctx, name)
        new = base.with_(spec=change(base.spec))
        if new.spec.bmc != base.spec.bmc:
            new = new.with_status(bmc_distrust="", cut_epoch=0)
        if new == old:
            return new
        batch = ctx.store.batch()
        if old is None:
            batch.create(new)
        else:
            batch.put(old, new)
        return cast("NodeFencing", ctx.store.must_commit(batch)[0])

    new = deciding(decide)
    if new.spec.bmc is not None and new.status.phase is FencePhase.IDLE:
        ctx.messenger.send(Message(Task.READ_POWER, FENCING, (name,)))
    return new


def confirm(ctx: Context, name: str, who: str) -> None:
    """Take a person's word that a node runs nothing any more.

    Raises:
        NotFound: No such node.
        Refused: Its lease is fresh, or there is evidence already, or the herd is in recovery.
    """

    def decide() -> None:
        node = ctx.store.get(Node, name)
        if node.spec.witness:
            raise Refused(f"node {name!r} is a witness: it runs no VMs")
        if _is_fresh(node):
            raise Refused(f"node {name!r} renews its lease: it lives (power it off, or drain it)")
        old = ctx.store.find(NodeFencing, name)
        if old is None:
            ctx.store.must_commit(ctx.store.batch().create(_new(ctx, name)))
            raise Conflict("made just now: read it")
        if old.status.phase.has_evidence:
            raise Refused(f"node {name!r} is fenced already: {old.status.message}")
        stored = _lease(ctx, name)
        lease = stored.lease if stored is not None else None
        text = f"{who} confirmed that it is off"
        refused = commit_evidence(ctx, old, lease, FenceLevel.PERSON, text)
        if refused is not None:
            raise Refused(f"node {name!r} can't be confirmed now: {refused.check}: {refused.detail}")

    deciding(decide)


def test_power(ctx: Context, tools: Tools, name: str) -> str:
    """Ask a node's BMC for the power state, and nothing else.

    Raises:
        NotFound: The node has no BMC on record.
        Refused: It can't be read.
    """
    fencing = ctx.store.find(NodeFencing, name)
    if fencing is None or fencing.spec.bmc is None:
        raise NotFound(f"node {name!r} has no BMC on record (vmherd fence set {name} --agent ...)")
    answer = tools.switch.status(fencing.spec.bmc)
    if answer.power is Power.UNKNOWN:
        raise Refused(f"node {name!r}: {answer.problem}")
    return answer.power.value


def disarm(ctx: Context, node: str, why: str) -> bool:
    """Let nothing be fenced any more, of one node or (empty) of the herd. A fencing under way goes on to its end.

    Returns:
        Whether one is under way, so that this holds once it has ended.
    """
    field = node or keys.DISARMED_ALL
    if node:
        ctx.store.get(Node, node)
    batch = ctx.store.batch().effect("HSET", keys.DISARMED, field, why)
    batch.tell("failover disarmed", warning=True, node=field, why=why)
    ctx.store.must_commit(batch)
    return any(f.status.phase.is_open for f in ctx.store.all(NodeFencing) if not node or f.name == node)


def arm(ctx: Context, node: str) -> bool:
    """Let nodes be fenced again; whether anything changed."""
    field = node or keys.DISARMED_ALL
    with redis_errors(ctx.store.redis):
        was = bool(ctx.store.redis.hexists(keys.DISARMED, field))
    batch = ctx.store.batch().effect("HDEL", keys.DISARMED, field)
    batch.tell("failover armed", node=field)
    ctx.store.must_commit(batch)
    return was
