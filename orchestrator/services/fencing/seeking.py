"""One attempt to find evidence by a node's BMC, in a worker of the fencing queue.

What a BMC says counts under the conditions of docs/adr/0019-fencing.md: read back as off; off already, only if it was
read as on within ten minutes while the lease was fresh; and never while another member, which was there before, fell
silent with it: addresses that were swapped cut a healthy host's power, and prove nothing about the lost one.
"""

from dataclasses import dataclass

from orchestrator.errors import Conflict
from orchestrator.fencing.agents import Power
from orchestrator.lease import Lease
from orchestrator.logs import logger
from orchestrator.planner.flow import Note
from orchestrator.resources import Node, NodeFencing
from orchestrator.resources.fencing import Bmc, FenceLevel, FencePhase
from orchestrator.services import looking
from orchestrator.services.context import Context, deciding
from orchestrator.services.fencing.readings import away_when_on
from orchestrator.services.fencing.state import (
    BMC_OF_ANOTHER,
    LOOK_EVERY_S,
    change_fencing,
    distrust,
    identity,
    lease_of,
    leases_of,
    say_unconfirmed,
)
from orchestrator.services.fencing.tools import Tools, alone, hold_on, is_answering
from orchestrator.services.takeover import commit_evidence

log = logger(__name__)

_READ_BACK_TRIES = 10


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
    with alone(ctx, name) as is_ours:
        if not is_ours:
            return f"{name}: another worker is at it"
        found = _seek(ctx, tools, name, fencing)
    if isinstance(found, _NoEvidence):
        say_unconfirmed(ctx, name, found.reason, found.message)
        return f"{name}: {found.message}"
    return f"{name}: {found}"


def _seek(ctx: Context, tools: Tools, name: str, fencing: NodeFencing) -> "_NoEvidence | str":
    node = ctx.store.find(Node, name)
    stored = lease_of(ctx, name)
    lease = stored.lease if stored is not None else None
    if not _is_same(fencing, lease):
        return "its lease was renewed"
    if node is not None and (lease is None or not lease.armed):
        alive = _is_seen_alive(ctx, tools, node)
        if alive:
            return _NoEvidence("HypervisorAnswers", alive)
    bmc = fencing.spec.bmc
    if bmc is None:
        waits = "its watchdog's deadline is waited for" if lease is not None and lease.armed else "it has no watchdog"
        return _NoEvidence("NoBmc", f"it has no BMC, and {waits}")
    if fencing.status.bmc_distrust:
        return _NoEvidence(BMC_OF_ANOTHER, fencing.status.bmc_distrust)
    away = away_when_on(ctx, name, bmc)
    how = _read_or_cut(ctx, tools, name, fencing, bmc, is_known=away is not None)
    if isinstance(how, _NoEvidence):
        return how
    silent = _silent_others(ctx, name, away or frozenset())
    if silent:
        text = f"{', '.join(silent)} fell silent too: whose power was cut is not known (are BMC addresses swapped?)"
        distrust(ctx, name, bmc, text)
        return _NoEvidence(BMC_OF_ANOTHER, text)
    current = ctx.store.find(NodeFencing, name)
    if current is None or not current.status.phase.is_open:
        return "ended meanwhile"
    try:
        refused = commit_evidence(ctx, current, lease, FenceLevel.BMC, how)
    except Conflict:
        return "changed meanwhile"
    return f"no evidence: {refused.check} {refused.detail}" if refused is not None else how


def _is_seen_alive(ctx: Context, tools: Tools, node: Node) -> str:
    """Say by what a host without a watchdog is known to live, though its heartbeat is dead; empty: by nothing.

    What agents see by its libvirt daemon decides. Where none of them can say, it is enough that the daemon's port takes
    connections, as tried from here: a daemon that hangs does so too.
    """
    wanted = looking.vms_of(ctx, node.name)
    asked = looking.ask(ctx, node)
    is_open = is_answering(tools, node)
    wait_s = looking.OPEN_WAIT_S if is_open else looking.CLOSED_WAIT_S
    seen = looking.collect(ctx, asked, wait_s, lambda look: looking.shows(look, wanted))
    for name, look in seen.items():
        if looking.shows(look, wanted):
            count = sum(guest.vm in wanted for guest in look.guests)
            return f"its libvirt daemon answers node {name}, and shows {count} of its {len(wanted)} VMs: the host lives"
    return "its libvirt daemon takes connections: the host lives" if is_open and not seen else ""


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
    hold_on(ctx, name)
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


def _cut(ctx: Context, tools: Tools, name: str, fencing: NodeFencing, bmc: Bmc) -> "_NoEvidence | None":
    """Cut the power, and read it back."""
    problem = ""
    for _ in range(bmc.attempts):
        stored = lease_of(ctx, name)  # read again before each `off`
        if not _is_same(fencing, stored.lease if stored is not None else None):
            return _NoEvidence("LeaseRenewed", "its lease was renewed")
        if not deciding(lambda: _remember_cut(ctx, name, fencing)):
            return _NoEvidence("Ended", "the fencing ended meanwhile")
        log.warning("power is cut", node=name, agent=bmc.agent)
        hold_on(ctx, name)
        problem = tools.switch.switch(bmc, on=False)
        for _ in range(_READ_BACK_TRIES):
            hold_on(ctx, name)
            answer = tools.switch.status(bmc)
            if answer.power is Power.OFF:
                return None
            if answer.power is Power.UNKNOWN:
                problem = problem or answer.problem
                break
            ctx.clock.sleep(LOOK_EVERY_S)
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
    waiting = {other: lease_of(ctx, other) for other in others if other not in fenced}
    until = ctx.clock.monotonic() + max(
        (s.lease.timing.lease_ttl for s in waiting.values() if s is not None), default=ctx.config.lease_ttl
    )
    while waiting:
        now = leases_of(ctx, list(waiting))
        waiting = {other: before for other, before in waiting.items() if identity(now[other]) == identity(before)}
        if not waiting or ctx.clock.monotonic() >= until:
            break
        ctx.clock.sleep(LOOK_EVERY_S)
    return sorted(waiting)


def power_on_again(ctx: Context, tools: Tools, name: str) -> str:
    """Power a node on again that we cut, once: it was recovered, and comes back empty."""

    def take(old: NodeFencing) -> NodeFencing | None:
        return old.with_status(powered_off=False) if old.status.powered_off else None

    taken = change_fencing(ctx, name, take)
    if taken is None or taken.spec.bmc is None or taken.status.phase is not FencePhase.RECOVERED:
        return f"{name}: nothing to do"
    with alone(ctx, name) as is_ours:
        problem = tools.switch.switch(taken.spec.bmc, on=True) if is_ours else "another worker is at it"
    note = Note("NodePowerOn", problem or "its power was switched on again", warning=bool(problem))
    change_fencing(ctx, name, lambda old: old.with_status(message=note.message), note)
    return f"{name}: {note.message}"
