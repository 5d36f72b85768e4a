"""How an operation ended, read from both hypervisors (DESIGN.md's table).

The two readings are facts about different moments: between them a migration may have switched over. So a pair that can
be such a moment (any active job on the source whose target is not plainly incoming; a copy that is on its way) is asked
again, and a conclusion that destroys a *running* copy is drawn only when two rounds give it.

Nothing here acts. A `Repair` names the orders to give, after which both sides are read again.
"""

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.resources import Reading

RUNNING, INCOMING, PAUSED_MIGRATED = "running", "incoming", "paused-migrated"
PAUSED, POSTCOPY, POSTCOPY_FAILED = "paused", "postcopy", "postcopy-failed"
ALIVE = (RUNNING, PAUSED, POSTCOPY_FAILED, "shutdown", "crashed")
"""States in which a domain that is to be stopped is destroyed; not those of a migration that is under way."""


class Verdict(StrEnum):
    """What is to be done."""

    DONE = "done"
    """It runs on the target, and on the target only."""
    BACK = "back"
    """It runs on the source, and on the source only: failed, or aborted."""
    ADOPT = "adopt"
    """libvirtd carries the migration on by itself: watch it, go on."""
    ASK_AGAIN = "ask-again"
    REPAIR = "repair"
    GONE = "gone"
    """It runs nowhere: the guest, or its QEMU, ended in the middle."""
    PERSON = "person"
    """Nothing can be decided by these rules."""


@dataclass(frozen=True, slots=True)
class Settled:
    """A verdict, why, and for REPAIR: what to do on which side, in which states it may be done.

    Attributes:
        verdict: See `Verdict`.
        why: For people.
        on_source: Whether the repair is for the source, else for the target.
        resume: Resume the copy; else destroy it.
        expect: States in which the repair may be done.
        critical: A person should look: the VM ran twice.
        confirm: The conclusion must be drawn twice in a row before it is acted on.
    """

    verdict: Verdict
    why: str
    on_source: bool = False
    resume: bool = False
    expect: tuple[str, ...] = ()
    critical: bool = False
    confirm: bool = False


def settle_migration(  # noqa: C901, PLR0912 - a table, one row a branch
    source: Reading, target: Reading, *, target_ran: bool = False, source_fenced: bool = False
) -> Settled:
    """Decide what a migration came to.

    Args:
        source: Read from the source's hypervisor after the operation's call had ended, or its holder was killed.
        target: Likewise from the target's.
        target_ran: Whether the target reported, under this grant, that its copy ran; or may have, and was fenced.
        source_fenced: Whether the source's reading is evidence that it runs nothing: what has not arrived never will.
    """
    s, t = _state(source), _state(target)
    pair = f"source {s or 'absent'}, target {t or 'absent'}"
    if source_fenced and not s and t in {INCOMING, POSTCOPY, POSTCOPY_FAILED}:
        why = f"{pair}: the source was fenced before the guest had arrived; clean the target"
        return Settled(Verdict.REPAIR, why, expect=(INCOMING, POSTCOPY, POSTCOPY_FAILED), confirm=True)
    if POSTCOPY_FAILED in {s, t} or (s == POSTCOPY and not source.job):
        return Settled(Verdict.PERSON, f"{pair}: post-copy failed; the guest is split between both hosts")
    match s, t:
        case "running", "incoming" if source.job:
            return Settled(Verdict.ADOPT, f"{pair}: the migration goes on by itself")
        case _ if source.job:
            return Settled(Verdict.ASK_AGAIN, f"{pair}: the job is at its switch-over")
        case ("running", "") | ("crashed", ""):
            return Settled(Verdict.BACK, pair)
        case ("running", "incoming") | ("crashed", "incoming"):
            return Settled(Verdict.REPAIR, f"{pair}, no job: clean the target", expect=(INCOMING,))
        case ("", "running") | ("", "paused"):
            return Settled(Verdict.DONE, pair)
        case "paused-migrated", "running":
            return Settled(
                Verdict.REPAIR,
                f"{pair}: switched over, destroy the source's copy",
                on_source=True,
                expect=(PAUSED_MIGRATED,),
            )
        case "running", "running":
            return Settled(
                Verdict.REPAIR,
                f"{pair}: it runs twice; the source's copy was resumed from older memory",
                on_source=True,
                expect=(RUNNING, PAUSED_MIGRATED),
                critical=True,
                confirm=True,
            )
        case "paused-migrated", "incoming":
            return Settled(Verdict.REPAIR, f"{pair}, no job: clean the target", expect=(INCOMING,), confirm=True)
        case "paused-migrated", "" if target_ran:
            return Settled(
                Verdict.REPAIR,
                f"{pair}: the target's copy ran and is gone; the source's is older, destroy it",
                on_source=True,
                expect=(PAUSED_MIGRATED,),
                confirm=True,
            )
        case ("paused-migrated", "") | ("paused", ""):
            return Settled(
                Verdict.REPAIR,
                f"{pair}: resume on the source",
                on_source=True,
                resume=True,
                expect=(PAUSED_MIGRATED, PAUSED),
                confirm=True,
            )
        case "", "":
            return Settled(Verdict.GONE, f"{pair}: it ended in the middle", confirm=True)
        case _:
            return Settled(Verdict.ASK_AGAIN, pair)


def settle_start(reading: Reading, incarnation: int) -> Settled:
    """Decide what a start came to; BACK means that it did not take place.

    Args:
        reading: Read from its node after the call had ended, or its holder was killed.
        incarnation: The one that this start was to make.
    """
    if not reading.present or reading.state == "shutoff":
        return Settled(Verdict.BACK, "the domain is absent")
    if reading.incarnation != incarnation:
        return Settled(Verdict.PERSON, f"the host has incarnation {reading.incarnation} of it, expected {incarnation}")
    return Settled(Verdict.DONE, f"the domain is {reading.state}")


def settle_stop(reading: Reading, incarnation: int, *, force: bool) -> Settled:
    """Decide what a stop came to; BACK means that the guest runs on and was not, or not surely, asked.

    Args:
        reading: Read from its node after the call had ended, its grace period was over, or its holder was killed.
        incarnation: The one that is to stop.
        force: Whether its plug is to be pulled.
    """
    if not reading.present or reading.state == "shutoff":
        return Settled(Verdict.DONE, "the domain is absent")
    if reading.incarnation > incarnation:
        return Settled(Verdict.PERSON, f"the host has incarnation {reading.incarnation} of it, expected {incarnation}")
    if not force:
        return Settled(Verdict.BACK, f"the domain is {reading.state}")
    if reading.state not in ALIVE:
        return Settled(Verdict.ASK_AGAIN, f"the domain is {reading.state}")
    return Settled(Verdict.REPAIR, f"the domain is {reading.state}: destroy it", expect=ALIVE)


def _state(reading: Reading) -> str:
    """A copy that is only defined, or that is on its way out, runs nothing."""
    if not reading.present or reading.state == "shutoff":
        return ""
    return reading.state
