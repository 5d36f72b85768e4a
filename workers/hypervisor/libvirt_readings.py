"""Translate what libvirt says into the port's values, without talking to it.

libvirt's numbers are part of its ABI and never change, so they stand here as tables of words, and this module imports
no libvirt. A number that is newer than the tables reads as `unknown`.

Telling INCOMING from PAUSED_MIGRATED: libvirt shows both as PAUSED/MIGRATION, and no call of its stable API says which.
It is told by the job, in this order (measured at each moment, also over restarts of either daemon):

1. jobStats refused with "operation unsupported" (84): an incoming job, always and at once, from the first moment of the
   target's copy to some milliseconds after it has begun to run.
2. jobStats answered (with or without a job): the source's copy. Also after a restart of the source's daemon, where it
   stays for ever.
3. jobStats silent: a *guess* by the CPU time of the vCPUs, which is zero in a process that never ran its guest. That is
   seen on a target whose daemon was restarted in mid-migration, for the 1 to 3 s (30 s if its QEMU hangs) until libvirt
   has thrown the half-made copy away. `has_job` is true then, so that nobody acts on the guess alone.
"""

import xml.etree.ElementTree as ET  # what is parsed comes from libvirtd
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from workers.hypervisor.port import DomainState, EventKind, Job, MigrationEnd

# virDomainState
_RUNNING, _PAUSED, _SHUTDOWN, _SHUTOFF, _CRASHED, _PMSUSPENDED = 1, 3, 4, 5, 6, 7

_REASONS: Final[Mapping[int, Sequence[str]]] = {
    _RUNNING: (
        *("unknown", "booted", "migrated", "restored", "from-snapshot", "unpaused", "migration-canceled"),
        *("save-canceled", "wakeup", "crashed", "postcopy", "postcopy-failed"),
    ),
    _PAUSED: (
        *("unknown", "user", "migration", "save", "dump", "ioerror", "watchdog", "from-snapshot", "shutting-down"),
        *("snapshot", "crashed", "starting-up", "postcopy", "postcopy-failed", "api-error"),
    ),
    _SHUTDOWN: ("unknown", "user"),
    _SHUTOFF: (
        *("unknown", "shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from-snapshot", "daemon"),
    ),
    _CRASHED: ("unknown", "panicked"),
}

# Running, blocked, and what libvirt doesn't know (0) are taken as alive.
_PLAIN_STATES: Final[Mapping[int, DomainState]] = {
    _SHUTDOWN: DomainState.SHUTDOWN,
    _SHUTOFF: DomainState.SHUTOFF,
    _CRASHED: DomainState.CRASHED,
    _PMSUSPENDED: DomainState.PAUSED,
}

# virDomainEventType and its details.
_LIFECYCLE: Final[Sequence[tuple[EventKind, str, Sequence[str]]]] = (
    (EventKind.CHANGED, "defined", ("added", "updated", "renamed", "from-snapshot")),
    (EventKind.CHANGED, "undefined", ("removed", "renamed")),
    (EventKind.STARTED, "", ("booted", "migrated", "restored", "from-snapshot", "wakeup", "recovered")),
    (
        EventKind.SUSPENDED,
        "",
        (
            *("paused", "migrated", "ioerror", "watchdog", "restored", "from-snapshot", "api-error", "postcopy"),
            "postcopy-failed",
        ),
    ),
    (EventKind.RESUMED, "", ("unpaused", "migrated", "from-snapshot", "postcopy", "postcopy-failed")),
    (
        EventKind.STOPPED,
        "",
        ("shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from-snapshot", "recreated"),
    ),
    (EventKind.CHANGED, "shutdown", ("finished", "guest", "host")),
    (EventKind.CHANGED, "pmsuspended", ("memory", "disk")),
    (EventKind.CHANGED, "crashed", ("panicked", "crashloaded")),
)
_LIFECYCLE_SHUTDOWN: Final = 6

# virDomainJobOperation
_MIGRATION_IN, _MIGRATION_OUT = 4, 5
# virDomainJobType
_JOB_NONE, _JOB_COMPLETED = 0, 3

# virErrorNumber and virErrorDomain, as far as the result of a migration is told by them.
_FROM_RPC = 7
_TRANSPORT_CODES: Final = frozenset({1, 38, 39})
_OPERATION_ABORTED = 78
# Not supported, invalid argument, no domain, authentication (45, 66), operation invalid (another job is active, the
# guest can't be migrated), configuration and operation unsupported (67, 84), unsafe, CPU incompatible.
_REFUSED_CODES: Final = frozenset({3, 8, 42, 45, 55, 66, 67, 81, 84, 91})
_MIGRATE_UNSAFE = 81
# libvirt may speak another language, if its daemon was started so: then these read as UNKNOWN, which is safe.
_TARGET_AWAY: Final = ("unable to connect to server", "unable to resolve address")
_SAME_HOST: Final = "attempt to migrate guest to the same host"


class JobKind(StrEnum):
    """What is known of the job on a domain."""

    NONE = "none"
    OUTGOING = "outgoing"
    INCOMING = "incoming"
    OTHER = "other"
    """Of no migration: a start, a save, a dump."""
    SILENT = "silent"
    """libvirt did not answer in time, as something else keeps the domain busy."""


@dataclass(frozen=True, slots=True)
class JobReading:
    """What was read of the job on a domain.

    Attributes:
        kind: See `JobKind`.
        job: The figures of a migration job, if they can be read.
    """

    kind: JobKind
    job: Job | None = None


def domain_state(state: int, reason: int, job: JobKind, *, has_run: bool = True) -> DomainState:
    """Translate virDomainState and its reason; the module's docstring says how the two kinds of paused are told.

    Args:
        state: virDomainState.
        reason: The reason that goes with it.
        job: What is known of the job, read between two equal readings of the state.
        has_run: Whether its vCPUs ever used CPU time here; counts only if `job` is SILENT.
    """
    word = reason_word(state, reason)
    if state in (_RUNNING, _PAUSED) and word in ("postcopy", "postcopy-failed"):
        return DomainState(word)
    if state == _PAUSED:
        return _paused_state(word, job, has_run=has_run)
    return _PLAIN_STATES.get(state, DomainState.RUNNING)


def _paused_state(word: str, job: JobKind, *, has_run: bool) -> DomainState:
    if job is JobKind.INCOMING:  # also as "starting-up", before QEMU listens
        return DomainState.INCOMING
    match word:
        case "migration":
            return DomainState.INCOMING if job is JobKind.SILENT and not has_run else DomainState.PAUSED_MIGRATED
        case "crashed":
            return DomainState.CRASHED
        case "shutting-down":
            return DomainState.SHUTDOWN
        case _:
            return DomainState.PAUSED


def needs_cpu_time(state: int, reason: int, job: JobKind) -> bool:
    """Whether `domain_state` has to guess, and so needs `has_run`."""
    return job is JobKind.SILENT and state == _PAUSED and reason_word(state, reason) == "migration"


def is_shutoff(state: int) -> bool:
    """Whether a domain of that state has no process. A transient one is about to vanish then."""
    return state == _SHUTOFF


def reason_word(state: int, reason: int) -> str:
    """Give libvirt's word for the reason of a state, lower-case with dashes."""
    words = _REASONS.get(state, ())
    return words[reason] if 0 <= reason < len(words) else "unknown"


def job_reading(stats: Mapping[str, Any]) -> JobReading:
    """Translate the answer of virDomainGetJobStats."""
    if stats.get("type", _JOB_NONE) == _JOB_NONE:
        return JobReading(JobKind.NONE)
    if stats.get("operation") != _MIGRATION_OUT:
        return JobReading(JobKind.OTHER)
    job = Job(
        outgoing=True,
        elapsed_ms=stats.get("time_elapsed", 0),
        total_bytes=stats.get("data_total", 0),
        processed_bytes=stats.get("data_processed", 0),
        remaining_bytes=stats.get("data_remaining", 0),
        memory_bps=stats.get("memory_bps", 0),
        dirty_pages_per_s=stats.get("memory_dirty_rate", 0),
        iteration=stats.get("memory_iteration", 0),
        throttle_percent=stats.get("auto_converge_throttle", 0),
    )
    return JobReading(JobKind.OUTGOING, job)


INCOMING_JOB: Final = JobReading(JobKind.INCOMING, Job(outgoing=False))
"""The receiving side: libvirt tells that it is there, and no figures."""


def completed_figures(stats: Mapping[str, Any]) -> dict[str, int]:
    """Translate the answer of virDomainGetJobStats for the last completed job; empty if that was no migration."""
    if stats.get("type") != _JOB_COMPLETED or stats.get("operation") not in (_MIGRATION_IN, _MIGRATION_OUT):
        return {}
    keys = {
        "downtime_ms": "downtime",
        "elapsed_ms": "time_elapsed",
        "total_bytes": "data_total",
        "processed_bytes": "data_processed",
        "iterations": "memory_iteration",
        "throttle_percent": "auto_converge_throttle",
    }
    return {key: int(stats[theirs]) for key, theirs in keys.items() if theirs in stats}


def is_transport_error(domain: int, code: int) -> bool:
    """Whether an error tells of a broken connection to a daemon and not of what was asked of it."""
    return domain == _FROM_RPC and code in _TRANSPORT_CODES


def migration_end(domain: int, code: int, message: str, *, connected: bool) -> MigrationEnd:
    """Translate the error of a migration call.

    Args:
        domain: virErrorDomain.
        code: virErrorNumber.
        message: The error's text. The source's daemon reports a lost target with the words and numbers in which our own
            connection reports a lost source: both mean that the outcome is not known.
        connected: Whether our connection to the source's daemon still stands.
    """
    text = message.lower()
    if not connected:
        return MigrationEnd.UNKNOWN
    if code == _OPERATION_ABORTED:
        return MigrationEnd.ABORTED
    if any(words in text for words in _TARGET_AWAY) or _SAME_HOST in text or code in _REFUSED_CODES:
        return MigrationEnd.NOT_STARTED
    if is_transport_error(domain, code):
        return MigrationEnd.UNKNOWN
    return MigrationEnd.FAILED


def is_unsafe_refusal(code: int) -> bool:
    """Whether libvirt refused a migration since it takes a disk's storage for not shared, or its cache for unsafe."""
    return code == _MIGRATE_UNSAFE


@dataclass(frozen=True, slots=True)
class LifecycleEvent:
    """A lifecycle event of libvirt's, translated.

    Attributes:
        kind: What it is for the port.
        detail: libvirt's word.
        shutdown_by: `guest` or `host` for the event that precedes STOPPED/shutdown, else empty.
    """

    kind: EventKind
    detail: str
    shutdown_by: str = ""


def lifecycle_event(event: int, detail: int) -> LifecycleEvent:
    """Translate virDomainEventType and its detail; CHANGED tells what changed in the detail (`defined-added`)."""
    if not 0 <= event < len(_LIFECYCLE):
        return LifecycleEvent(EventKind.CHANGED, "unknown")
    kind, prefix, words = _LIFECYCLE[event]
    word = words[detail] if 0 <= detail < len(words) else "unknown"
    by = word if event == _LIFECYCLE_SHUTDOWN and word in ("guest", "host") else ""
    return LifecycleEvent(kind, f"{prefix}-{word}" if prefix else word, by)


def parse_capabilities(capabilities_xml: str) -> tuple[str, str]:
    """Read a host's UUID and CPU model (empty if libvirt names none) from its capabilities."""
    root = ET.fromstring(capabilities_xml)  # noqa: S314  libvirtd wrote it
    return root.findtext("host/uuid", "").lower(), root.findtext("host/cpu/model", "")


def version_text(version: int) -> str:
    """Translate libvirt's version number: 7002022 is `7.2.22`."""
    return f"{version // 1_000_000}.{version // 1_000 % 1_000}.{version % 1_000}"
