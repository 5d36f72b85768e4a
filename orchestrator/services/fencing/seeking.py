"""One attempt to find evidence by a node's BMC, in a worker of the fencing queue.

What a BMC says counts under the conditions of docs/adr/0019-fencing.md: read back as off; off already, only if it was
read as on within ten minutes while the lease was fresh; and never while another member's silence is unexplained
(`services.fencing.silence`): swapped addresses cut a healthy host's power, and prove nothing about the lost one.
"""

from dataclasses import dataclass

from orchestrator.errors import Conflict
from orchestrator.fencing.agents import Answer, Power
from orchestrator.logs import logger
from orchestrator.planner.flow import Note
from orchestrator.resources import Node, NodeFencing
from orchestrator.resources.fencing import Bmc, FenceLevel
from orchestrator.services import looking
from orchestrator.services.context import Context, deciding
from orchestrator.services.fencing.readings import away_when_on
from orchestrator.services.fencing.silence import others, silent_before, unexplained
from orchestrator.services.fencing.state import (
    BMC_OF_ANOTHER,
    LOOK_EVERY_S,
    change_fencing,
    distrust,
    is_of_lease,
    lease_of,
    say_unconfirmed,
)
from orchestrator.services.fencing.tools import Tools, alone, hold_on, is_answering
from orchestrator.services.inventory import on_record
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
    beside, since = others(ctx, name), ctx.clock.monotonic()
    node = ctx.store.find(Node, name)
    stored = lease_of(ctx, name)
    lease = stored.lease if stored is not None else None
    if not is_of_lease(fencing.status, lease):
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
    lost = silent_before(ctx, beside, since)
    how = _read_or_cut(ctx, tools, name, fencing, bmc, lost, is_known=away is not None)
    if isinstance(how, _NoEvidence):
        return how
    goes_on = deciding(lambda: _remember(ctx, name, fencing, lost, is_off=True))
    if not goes_on and not ctx.store.get(NodeFencing, name).status.cut_epoch:
        return "ended meanwhile"
    # Whom a cut has silenced is to be known, whether the fencing goes on or not.
    with_it, before = unexplained(ctx, fencing, beside, away or frozenset())
    if with_it:
        text = f"{', '.join(with_it)} fell silent too: whose power was cut is not known (are BMC addresses swapped?)"
        distrust(ctx, name, bmc, text)
        return _NoEvidence(BMC_OF_ANOTHER, text)
    if before:
        text = f"{', '.join(before)} had been lost before, and not known to be off: whose power is off is not known"
        return _NoEvidence("OthersLost", text)
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
    wanted = frozenset(on_record(ctx, node.name))
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
    ctx: Context, tools: Tools, name: str, fencing: NodeFencing, bmc: Bmc, lost: frozenset[str], *, is_known: bool
) -> "_NoEvidence | str":
    """Have the power off, and say how that is known.

    Args:
        ctx: To work with.
        tools: Likewise.
        name: The node's.
        fencing: Its own.
        bmc: Likewise.
        lost: Members that are silent already.
        is_known: The BMC was read as on a short while ago, while the node lived.
    """
    hold_on(ctx, name)
    answer = tools.switch.status(bmc)
    if answer.power is Power.UNKNOWN:
        return _NoEvidence("BmcUnreadable", answer.problem)
    if answer.power is Power.ON:
        return _cut(ctx, tools, name, fencing, bmc, lost) or "the power was cut, and read back as off by its BMC"
    if fencing.status.cut_epoch:
        return "the power was cut by an attempt before, and read back as off by its BMC"
    if is_known:
        return "the power was off already, read by its BMC"
    return _NoEvidence(
        "PowerWasOff",
        "its power is off already, but this BMC was not read as on within the last 10 minutes while the node "
        "lived: it may be another host's",
    )


def _cut(
    ctx: Context, tools: Tools, name: str, fencing: NodeFencing, bmc: Bmc, lost: frozenset[str]
) -> "_NoEvidence | None":
    """Cut the power, and read it back."""
    problem = ""
    for _ in range(bmc.attempts):
        stored = lease_of(ctx, name)  # read again before each `off`
        if not is_of_lease(fencing.status, stored.lease if stored is not None else None):
            return _NoEvidence("LeaseRenewed", "its lease was renewed")
        if not deciding(lambda: _remember(ctx, name, fencing, lost)):
            return _NoEvidence("Ended", "the fencing ended meanwhile")
        log.warning("power is cut", node=name, agent=bmc.agent)
        hold_on(ctx, name)
        problem = tools.switch.switch(bmc, on=False)
        answer = _read_back(ctx, tools, name, bmc, Power.OFF)
        if answer.power is Power.OFF:
            return None
        problem = problem or answer.problem
    return _NoEvidence("PowerStaysOn", f"its power could not be read back as off{': ' + problem if problem else ''}")


def _read_back(ctx: Context, tools: Tools, name: str, bmc: Bmc, wanted: Power) -> Answer:
    """Read a power until it is as it was switched, or can't be read, or has had its time; give the last answer."""
    answer = Answer(Power.UNKNOWN)
    for _ in range(_READ_BACK_TRIES):
        hold_on(ctx, name)
        answer = tools.switch.status(bmc)
        if answer.power in {wanted, Power.UNKNOWN}:
            break
        ctx.clock.sleep(LOOK_EVERY_S)
    return answer


def _remember(ctx: Context, name: str, fencing: NodeFencing, lost: frozenset[str], *, is_off: bool = False) -> bool:
    """Write down that the power is about to be cut, or (`is_off`) was read as off: this process may die at any time.

    What is said first of the others' silence stays: after a cut it is too late to say.

    Returns:
        Whether the fencing goes on.
    """
    current = ctx.store.find(NodeFencing, name)
    if current is None or not current.status.phase.is_open or current.status.bmc_distrust:
        return False
    was, now = fencing.status, current.status
    if fencing.spec.bmc is None or not fencing.spec.bmc.is_as(current.spec.bmc):
        return False
    if (was.generation, was.sequence) != (now.generation, now.sequence):
        return False
    new = current
    if not now.cut_epoch and not now.bmc_off:
        new = new.with_status(lost_before=tuple(sorted(lost)))
    if is_off:
        new = new.with_status(bmc_off=True)
    elif not now.cut_epoch:
        new = new.with_status(powered_off=True, cut_epoch=ctx.store.next_epochs(1)[0])
    if new != current:
        ctx.store.must_commit(ctx.store.batch().put(current, new))
    return True


def power_on_again(ctx: Context, tools: Tools, name: str) -> str:
    """Power a node on again that we cut: it was recovered, and comes back empty.

    That it is to be done is on record until the power was read as on; until then it is asked for again
    (`services.failover`). A node that is back has nothing of this on record any more.
    """
    with alone(ctx, name) as is_ours:
        if not is_ours:
            return f"{name}: another worker is at it"
        fencing = ctx.store.find(NodeFencing, name)  # read under the right: what comes before may have ended it
        bmc = fencing.spec.bmc if fencing is not None and fencing.awaits_power else None
        if fencing is None or bmc is None:
            return f"{name}: nothing to do"
        problem = _power_on(ctx, tools, name, bmc)
    text = f"its power is not on again yet: {problem}" if problem else "its power was switched on again"

    def change(old: NodeFencing) -> NodeFencing | None:
        if not old.awaits_power or old.status.evidence != fencing.status.evidence or not bmc.is_as(old.spec.bmc):
            return None
        return old.with_status(message=text, powered_off=bool(problem))  # the same problem again is said no more

    change_fencing(ctx, name, change, Note("NodePowerOn", text, warning=bool(problem)))
    return f"{name}: {text}"


def _power_on(ctx: Context, tools: Tools, name: str, bmc: Bmc) -> str:
    """Switch a power on, unless it is, and read it back; give why it is not known to be on."""
    hold_on(ctx, name)
    answer = tools.switch.status(bmc)
    if answer.power is not Power.OFF:
        return answer.problem
    hold_on(ctx, name)
    problem = tools.switch.switch(bmc, on=True)
    answer = _read_back(ctx, tools, name, bmc, Power.ON)
    if answer.power is Power.ON:
        return ""
    return problem or answer.problem or "it could not be read back as on"
