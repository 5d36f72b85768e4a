"""What libvirt says, as the port's values."""

import pytest

from workers.hypervisor.libvirt_readings import (
    JobKind,
    completed_figures,
    domain_state,
    job_reading,
    lifecycle_event,
    migration_end,
    needs_cpu_time,
    parse_capabilities,
    reason_word,
    version_text,
)
from workers.hypervisor.port import DomainState, EventKind, MigrationEnd

RUNNING, PAUSED, SHUTDOWN, SHUTOFF, CRASHED, PMSUSPENDED = 1, 3, 4, 5, 6, 7


@pytest.mark.parametrize(
    ("state", "reason", "job", "expected"),
    [
        (RUNNING, 1, JobKind.NONE, DomainState.RUNNING),
        (RUNNING, 2, JobKind.INCOMING, DomainState.RUNNING),
        (RUNNING, 1, JobKind.OUTGOING, DomainState.RUNNING),
        (RUNNING, 10, JobKind.INCOMING, DomainState.POSTCOPY),
        (RUNNING, 11, JobKind.NONE, DomainState.POSTCOPY_FAILED),
        (2, 0, JobKind.NONE, DomainState.RUNNING),
        (0, 0, JobKind.NONE, DomainState.RUNNING),
        (PAUSED, 1, JobKind.NONE, DomainState.PAUSED),
        (PAUSED, 1, JobKind.OUTGOING, DomainState.PAUSED),
        (PAUSED, 5, JobKind.NONE, DomainState.PAUSED),
        (PAUSED, 2, JobKind.INCOMING, DomainState.INCOMING),
        (PAUSED, 11, JobKind.INCOMING, DomainState.INCOMING),
        (PAUSED, 11, JobKind.SILENT, DomainState.PAUSED),
        (PAUSED, 2, JobKind.NONE, DomainState.PAUSED_MIGRATED),
        (PAUSED, 2, JobKind.OUTGOING, DomainState.PAUSED_MIGRATED),
        (PAUSED, 2, JobKind.SILENT, DomainState.PAUSED_MIGRATED),
        (PAUSED, 8, JobKind.NONE, DomainState.SHUTDOWN),
        (PAUSED, 10, JobKind.NONE, DomainState.CRASHED),
        (PAUSED, 12, JobKind.OUTGOING, DomainState.POSTCOPY),
        (PAUSED, 13, JobKind.OUTGOING, DomainState.POSTCOPY_FAILED),
        (SHUTDOWN, 1, JobKind.NONE, DomainState.SHUTDOWN),
        (SHUTOFF, 4, JobKind.NONE, DomainState.SHUTOFF),
        (CRASHED, 1, JobKind.NONE, DomainState.CRASHED),
        (PMSUSPENDED, 0, JobKind.NONE, DomainState.PAUSED),
        (99, 0, JobKind.NONE, DomainState.RUNNING),
    ],
)
def test_states(state: int, reason: int, job: JobKind, expected: DomainState) -> None:
    assert domain_state(state, reason, job) is expected


def test_a_silent_job_is_guessed_by_cpu_time() -> None:
    assert needs_cpu_time(PAUSED, 2, JobKind.SILENT)
    assert domain_state(PAUSED, 2, JobKind.SILENT, has_run=False) is DomainState.INCOMING
    assert domain_state(PAUSED, 2, JobKind.NONE, has_run=False) is DomainState.PAUSED_MIGRATED
    assert not needs_cpu_time(PAUSED, 2, JobKind.NONE)
    assert not needs_cpu_time(RUNNING, 2, JobKind.SILENT)


@pytest.mark.parametrize(
    ("state", "reason", "word"),
    [
        (RUNNING, 1, "booted"),
        (RUNNING, 6, "migration-canceled"),
        (PAUSED, 2, "migration"),
        (PAUSED, 14, "api-error"),
        (SHUTOFF, 4, "migrated"),
        (CRASHED, 1, "panicked"),
        (PAUSED, 99, "unknown"),
        (RUNNING, -1, "unknown"),
        (0, 0, "unknown"),
    ],
)
def test_reasons(state: int, reason: int, word: str) -> None:
    assert reason_word(state, reason) == word


QEMU, RPC = 10, 7


@pytest.mark.parametrize(
    ("domain", "code", "message", "end"),
    [
        (QEMU, 78, "operation aborted: job 'migration out' canceled by client", MigrationEnd.ABORTED),
        (QEMU, 9, "operation failed: job 'migration out' failed: Unable to write to socket", MigrationEnd.FAILED),
        (QEMU, 9, "operation failed: domain is not running", MigrationEnd.FAILED),
        (QEMU, 38, "Unable to read from monitor: Connection reset by peer", MigrationEnd.FAILED),
        (QEMU, 1, "internal error: qemu unexpectedly closed the monitor", MigrationEnd.FAILED),
        (RPC, 1, "internal error: client socket is closed", MigrationEnd.UNKNOWN),
        (RPC, 1, "internal error: connection closed due to keepalive timeout", MigrationEnd.UNKNOWN),
        (RPC, 38, "End of file while reading data: Input/output error", MigrationEnd.UNKNOWN),
        (RPC, 38, "unable to connect to server at '192.0.2.13:16509': No route to host", MigrationEnd.NOT_STARTED),
        (RPC, 38, "Unable to resolve address 'x' service '16509': no such name", MigrationEnd.NOT_STARTED),
        (RPC, 38, "Verbindung zu '192.0.2.13:16509' nicht möglich", MigrationEnd.UNKNOWN),
        (QEMU, 1, "internal error: Attempt to migrate guest to the same host x", MigrationEnd.NOT_STARTED),
        (QEMU, 55, "another migration job is already running for domain 'x'", MigrationEnd.NOT_STARTED),
        (QEMU, 81, "Unsafe migration: Migration without shared storage is unsafe", MigrationEnd.NOT_STARTED),
        (QEMU, 42, "Domain not found", MigrationEnd.NOT_STARTED),
    ],
)
def test_ends_of_migrations(domain: int, code: int, message: str, end: MigrationEnd) -> None:
    assert migration_end(domain, code, message, connected=True) is end


def test_without_a_connection_nothing_is_known() -> None:
    assert migration_end(QEMU, 78, "operation aborted", connected=False) is MigrationEnd.UNKNOWN


@pytest.mark.parametrize(
    ("event", "detail", "expected"),
    [
        (0, 0, (EventKind.CHANGED, "defined-added", "")),
        (1, 0, (EventKind.CHANGED, "undefined-removed", "")),
        (2, 1, (EventKind.STARTED, "migrated", "")),
        (3, 2, (EventKind.SUSPENDED, "ioerror", "")),
        (4, 1, (EventKind.RESUMED, "migrated", "")),
        (5, 0, (EventKind.STOPPED, "shutdown", "")),
        (5, 5, (EventKind.STOPPED, "failed", "")),
        (6, 0, (EventKind.CHANGED, "shutdown-finished", "")),
        (6, 1, (EventKind.CHANGED, "shutdown-guest", "guest")),
        (6, 2, (EventKind.CHANGED, "shutdown-host", "host")),
        (8, 0, (EventKind.CHANGED, "crashed-panicked", "")),
        (5, 77, (EventKind.STOPPED, "unknown", "")),
        (77, 0, (EventKind.CHANGED, "unknown", "")),
    ],
)
def test_lifecycle_events(event: int, detail: int, expected: tuple[EventKind, str, str]) -> None:
    told = lifecycle_event(event, detail)
    assert (told.kind, told.detail, told.shutdown_by) == expected


def test_jobs() -> None:
    assert job_reading({"type": 0}).kind is JobKind.NONE
    assert job_reading({"type": 1, "operation": 8}).kind is JobKind.OTHER
    reading = job_reading({"type": 2, "operation": 5, "time_elapsed": 7, "data_total": 9, "memory_iteration": 2})
    assert reading.kind is JobKind.OUTGOING
    assert reading.job is not None
    assert (reading.job.elapsed_ms, reading.job.total_bytes, reading.job.iteration) == (7, 9, 2)


def test_completed_jobs() -> None:
    assert completed_figures({"type": 0}) == {}
    assert completed_figures({"type": 3, "operation": 8, "downtime": 1}) == {}
    assert completed_figures({"type": 3, "operation": 4, "downtime": 5, "time_elapsed": 9}) == {
        "downtime_ms": 5,
        "elapsed_ms": 9,
    }


def test_hosts() -> None:
    xml = "<capabilities><host><uuid>ABC</uuid><cpu><model>kvm64</model></cpu></host></capabilities>"
    assert parse_capabilities(xml) == ("abc", "kvm64")
    assert version_text(7002022) == "7.2.22"
