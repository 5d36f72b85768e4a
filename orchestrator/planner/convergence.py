"""Whether and when a live migration of a busy guest comes to its end: foreseen before it begins, told while it runs.

Pre-copy sends the guest's memory in passes. What the guest writes during one pass is sent in the next; when what is
left can be sent within the downtime limit, the guest is stopped for that long and goes on at the target. So a guest
that dirties `r` MiB/s over a link of `B` MiB/s leaves `memory * (r / B) ** n` after `n` passes: it converges by itself
when, and only when, `r < B`.

What this can't know, and how it errs:

- The working set. A guest that rewrites the same few pages leaves no more than these, however fast it is; if they fit
  into the downtime limit, it converges though it is foreseen that it does not.
- Pages of zeros travel for nothing: a guest that has touched little of its memory is done sooner.
- Dirty rates are measured by page sampling, which misses about a fifth (libvirt.md, section 7: 16 of 20 MiB/s, 32 of
  40) and sees no more than the working set once per sample. So the true rate is taken to lie between what was measured
  and a quarter more. Durations are foreseen for the upper end; between the two ends nothing is said about convergence.
- Auto-converge, post-copy and the deadlines: it is said what the guest does if it is left alone.
"""

import math
from dataclasses import dataclass

from orchestrator.resources.grant import Reading
from orchestrator.resources.vm import LiveMigrationPolicy
from orchestrator.resources.vmop import MigrationOutcome, Prediction

DOWNTIME_S = 0.3
"""QEMU's default downtime limit."""
SAMPLING_SEES = 0.8
"""Share of the dirtied memory that page sampling sees (libvirt.md, section 7)."""
WORTH_SAMPLES = 3
"""A migration is worth a sample when its first pass takes at least so many times as long as the sample."""
FULL_THROTTLE_PERCENT = 99
STALLED_S = 10.0
"""The platform's: without a new minimum of the data left for so long, a migration does not converge."""
_MOST_S = 10_000_000.0
"""Nothing is foreseen beyond: 115 days."""
_FORCED = frozenset({LiveMigrationPolicy.ALWAYS_FORCED, LiveMigrationPolicy.PREFER_FORCED})


@dataclass(frozen=True, slots=True)
class PolicyConflict:
    """An operation's `force` asks for what its VM's liveMigrationPolicy rules out; the message is for people."""

    message: str


def throttles(policy: LiveMigrationPolicy, force: bool | None) -> bool | PolicyConflict:
    """Say whether a migration may throttle the guest (auto-converge).

    Args:
        policy: The VM's.
        force: The operation's; None leaves it to the policy, which is not what False does.
    """
    match policy, force:
        case (LiveMigrationPolicy.ALWAYS_SAFE, True):
            return PolicyConflict("force: true is not applicable: liveMigrationPolicy is AlwaysSafe, no throttling")
        case (LiveMigrationPolicy.ALWAYS_FORCED, False):
            return PolicyConflict("force: false is not applicable: liveMigrationPolicy is AlwaysForced")
        case (_, None):
            return policy in _FORCED
        case _:
            return bool(force)


def predict(
    memory_mib: float,
    dirty_rate_mib_s: float | None,
    bandwidth_mib_s: float,
    *,
    disks_mib: float = 0,
    downtime_s: float = DOWNTIME_S,
) -> Prediction:
    """Foresee a live migration that is neither throttled nor stopped by a deadline.

    Args:
        memory_mib: Of the guest, > 0.
        dirty_rate_mib_s: As page sampling measured it; None where it was not measured. Then the duration is that of
            one pass, and whether it converges is not known (but for a guest that fits into the downtime limit).
        bandwidth_mib_s: What the link carries, > 0.
        disks_mib: Of disks that are copied before the memory.
        downtime_s: For so long the guest may be stopped.
    """
    fits = bandwidth_mib_s * downtime_s
    copying = disks_mib / bandwidth_mib_s
    first = memory_mib / bandwidth_mib_s
    if memory_mib <= fits:
        return Prediction(dirty_rate_mib_s=dirty_rate_mib_s, duration_s=_tenths(copying + first), converges=True)
    if dirty_rate_mib_s is None:
        return Prediction(duration_s=_tenths(copying + first))
    ratio = dirty_rate_mib_s / SAMPLING_SEES / bandwidth_mib_s
    if ratio >= 1:
        converges = None if dirty_rate_mib_s < bandwidth_mib_s else False
        return Prediction(dirty_rate_mib_s=dirty_rate_mib_s, converges=converges)
    duration_s = copying + first * _passes_sum(ratio, fits / memory_mib)
    return Prediction(dirty_rate_mib_s=dirty_rate_mib_s, duration_s=_tenths(duration_s), converges=True)


def _passes_sum(ratio: float, small: float) -> float:
    """How many times the whole memory is sent: 1 + ratio + ratio**2 ... until a term is at most `small`, it included.

    The last term is what is sent while the guest is stopped. `ratio` and `small` are less than 1.
    """
    if ratio <= 0:
        return 1
    passes = max(1, math.ceil(math.log(small) / math.log(ratio)))
    return float((1 - ratio ** (passes + 1)) / (1 - ratio))


def _tenths(seconds: float) -> float:
    return round(min(seconds, _MOST_S), 1)


def sample_s(memory_mib: float, bandwidth_mib_s: float, wanted_s: float) -> float:
    """For how long the dirty rate is measured before a migration: 0 where that would be a large part of it."""
    return wanted_s if memory_mib / bandwidth_mib_s >= WORTH_SAMPLES * wanted_s else 0


def is_converging(*, stalled_s: float, throttle_percent: int, auto_converge: bool) -> bool:
    """Whether a migration that runs still has a way to its end: it informs, it ends nothing.

    Args:
        stalled_s: For how long the data left has not reached a new minimum.
        throttle_percent: Auto-converge's.
        auto_converge: Whether the guest may be throttled. Until the throttle is at its end there is hope.
    """
    return stalled_s < STALLED_S or (auto_converge and throttle_percent < FULL_THROTTLE_PERCENT)


@dataclass(frozen=True, slots=True)
class CompletionTime:
    """How long a migration may take: so many seconds for each GiB of memory and copied disks, and for one at least."""

    per_gib_s: float
    gib: float

    @property
    def seconds(self) -> int:
        """In all, >= 1."""
        return max(1, math.ceil(self.per_gib_s * self.gib))

    def __str__(self) -> str:
        """For people."""
        return f"{self.per_gib_s:g} s per GiB x {self.gib:g} GiB"


def completion_time(memory_mib: float, per_gib_s: float, *, disks_mib: float = 0) -> CompletionTime:
    """Give the time that a migration of so much may take."""
    return CompletionTime(per_gib_s, max(1.0, round((memory_mib + disks_mib) / 1024, 2)))


def measured(so_far: MigrationOutcome | None, now: MigrationOutcome) -> MigrationOutcome:
    """Add newer figures of the same migration to what is known of it: no figure falls."""
    if so_far is None:
        return now
    return MigrationOutcome(
        duration_s=max(so_far.duration_s, now.duration_s),
        downtime_ms=so_far.downtime_ms if now.downtime_ms is None else now.downtime_ms,
        transferred_mib=max(so_far.transferred_mib, now.transferred_mib),
        iterations=max(so_far.iterations, now.iterations),
        throttle_percent=max(so_far.throttle_percent, now.throttle_percent),
        post_copy=so_far.post_copy or now.post_copy,
    )


def measured_at_end(so_far: MigrationOutcome | None, reading: Reading) -> MigrationOutcome | None:
    """Add what the target tells of the completed migration; its duration and bytes are exact, so they replace ours."""
    if reading.downtime_ms is None and reading.elapsed_ms is None:
        return so_far
    told = MigrationOutcome(
        downtime_ms=reading.downtime_ms,
        transferred_mib=reading.transferred_mib or 0,
        iterations=reading.iterations or 0,
        throttle_percent=reading.throttle_percent or 0,
    )
    known = measured(so_far, told)
    return known if reading.elapsed_ms is None else known.with_(duration_s=reading.elapsed_ms / 1000)


def describe_prediction(prediction: Prediction) -> str:
    """What was foreseen, for people."""
    rate = prediction.dirty_rate_mib_s
    dirties = "its dirty rate is not known" if rate is None else f"it dirties {rate:.1f} MiB/s"
    match prediction.converges:
        case True:
            return f"{prediction.duration_s:.1f} s; {dirties}"
        case False:
            return f"does not converge by itself; {dirties}"
        case None if prediction.duration_s is None:
            return f"may not converge by itself; {dirties}, about as much as the link carries"
        case None:
            return f"{prediction.duration_s:.1f} s or more; {dirties}"


def describe_outcome(outcome: MigrationOutcome) -> str:
    """What was measured, for people."""
    parts = [f"{outcome.duration_s:.1f} s", f"{outcome.transferred_mib} MiB sent in {outcome.iterations} passes"]
    if outcome.downtime_ms is not None:
        parts.append(f"guest stopped for {outcome.downtime_ms} ms")
    if outcome.throttle_percent:
        parts.append(f"throttled by up to {outcome.throttle_percent}%")
    if outcome.post_copy:
        parts.append("ended by post-copy")
    return ", ".join(parts)
