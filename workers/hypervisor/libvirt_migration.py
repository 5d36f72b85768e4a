"""Live migrations: run, followed, switched to post-copy, aborted; and the dirty rate, which tells how one would go.

Measured with libvirt 9.0 and QEMU 7.2:

- *Post-copy* is allowed at the start or never. Once it has begun, no way leads back: libvirt refuses to abort, and the
  guest is lost if either side dies. Of a migration that ended in post-copy the target keeps no figures.
- *Parallel connections* and post-copy don't go together: newer QEMU (8.0 and on) refuses. So a migration that may be
  switched to post-copy has one connection.
- *Disks that are not shared* are copied before memory, on a connection of the two QEMUs' own, and written on both sides
  until switch-over. The target's image must be there and have the same size, or its folder must be an active storage
  pool there: then libvirt makes it. It arrives flat, without backing files. Nobody deletes an image: neither the
  source's after success, nor the target's after a failure or an abort. The cap holds, in bursts of 16 MiB.
- All files that the guest was started from (kernel, initrd, firmware) must be on the target, though it has long booted.
"""

import math
import time
from functools import partial
from typing import Any, Final

import libvirt

from orchestrator.errors import DomainNotFound, HypervisorError, HypervisorUnavailable
from workers.hypervisor.libvirt_changes import CHANGE_DEADLINE_S, Changes
from workers.hypervisor.libvirt_connection import is_alive, is_lost, message_of, run_apart
from workers.hypervisor.libvirt_domains import DomainReader
from workers.hypervisor.libvirt_readings import JobKind, is_unsafe_refusal, migration_end
from workers.hypervisor.port import Job, MigrationEnd, MigrationRequest, MigrationResult

_DIRTY_RATE_POLL_S: Final = 0.05
_FIGURES_DEADLINE_S: Final = 4.0
"""Longer than the end of a migration keeps the source's domain busy: until its QEMU is reaped, 0.2 to 2 s."""


class Migrations:
    """Live migrations from one host.

    Args:
        changes: To make the calls with.
        domains: Reads the jobs.
        allow_unsafe: Migrate also what libvirt takes for unsafe.
    """

    def __init__(self, changes: Changes, domains: DomainReader, *, allow_unsafe: bool) -> None:
        self._changes = changes
        self._domains = domains
        self._allow_unsafe = allow_unsafe
        self._aborting: set[str] = set()

    def migrate(self, request: MigrationRequest) -> MigrationResult:
        """Live-migrate a domain peer-to-peer; blocks until the call ends. Never raises for what went wrong with it."""
        if request.bandwidth_mib_s < 1:
            # libvirt reads 0 as "no limit", and a negative number as a huge one.
            return MigrationResult(MigrationEnd.NOT_STARTED, "a migration needs a bandwidth of at least 1 MiB/s")
        try:
            connection = self._changes.connect()
        except HypervisorError as error:
            return MigrationResult(MigrationEnd.NOT_STARTED, str(error))
        try:
            handle = connection.lookupByUUIDString(request.uuid)
        except libvirt.libvirtError as error:
            return MigrationResult(MigrationEnd.NOT_STARTED, message_of(error))
        self._aborting.discard(request.uuid)
        try:
            handle.migrateToURI3(request.target_uri, _parameters(request), self._flags(request))
        except libvirt.libvirtError as error:
            result = _migration_result(connection, error)
            if result.end is MigrationEnd.FAILED and request.uuid in self._aborting:
                # An abort makes the target's QEMU fail too, and libvirt may tell that failure in place of the abort
                # (8 of 41 aborts in the first tenth of a second).
                return MigrationResult(MigrationEnd.ABORTED, result.message)
            return result
        return MigrationResult(MigrationEnd.SUCCEEDED)

    def _flags(self, request: MigrationRequest) -> int:
        # UNDEFINE_SOURCE without PERSIST_DEST: a persistent domain too arrives transient and leaves no definition.
        # Not ABORT_ON_ERROR: an I/O error of the guest's would then be the migration's failure, while moving the paused
        # guest to a host that reaches its storage is the cure.
        wanted = {
            libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE: True,
            libvirt.VIR_MIGRATE_AUTO_CONVERGE: request.auto_converge,
            libvirt.VIR_MIGRATE_POSTCOPY: request.post_copy,
            libvirt.VIR_MIGRATE_PARALLEL: _channels(request) > 1,
            libvirt.VIR_MIGRATE_NON_SHARED_DISK: bool(request.copy_disks),
            libvirt.VIR_MIGRATE_UNSAFE: self._allow_unsafe,
        }
        return sum(flag for flag, is_wanted in wanted.items() if is_wanted)

    def job(self, uuid: str) -> Job | None:
        """Read the job active on a domain of this host, or None."""
        reading = self._domains.read_jobs([uuid], _FIGURES_DEADLINE_S)[uuid]
        if reading.kind is JobKind.SILENT:
            raise HypervisorUnavailable(
                f"libvirt at {self._changes.uri} says nothing about the job of domain {uuid}: something else keeps the "
                "domain busy, or its QEMU hangs"
            )
        return reading.job

    def abort(self, uuid: str) -> bool:
        """Ask that the active migration be aborted."""
        # abortJob ends whatever job there is, so another kind is looked for first. Between the two a job may end and
        # another begin: then that one is ended, as if a person had.
        job = self._domains.read_jobs([uuid])[uuid]
        if job.kind not in (JobKind.OUTGOING, JobKind.SILENT):
            return False
        self._aborting.add(uuid)  # before the call: the migration may end before it returns
        try:
            accepted = self._ask(uuid, "abort of the migration", lambda handle: handle.abortJob())
        except HypervisorError:
            self._aborting.discard(uuid)
            raise
        if not accepted:
            self._aborting.discard(uuid)
        return accepted

    def start_post_copy(self, uuid: str) -> bool:
        """Switch the active migration, which allowed it, to post-copy."""
        if self._domains.read_jobs([uuid])[uuid].kind not in (JobKind.OUTGOING, JobKind.SILENT):
            return False
        return self._ask(uuid, "switch to post-copy", lambda handle: handle.migrateStartPostCopy())

    def dirty_rate(self, uuid: str, seconds: float) -> float | None:
        """Measure how fast a running guest dirties memory, by sampling pages; blocks for `seconds` and a little."""
        connection = self._changes.connect()
        # libvirt takes whole seconds only.
        measuring = run_apart(partial(_measure_dirty_rate, connection, uuid, max(1, math.ceil(seconds))))
        try:
            return measuring.result(seconds + 1 + CHANGE_DEADLINE_S)
        except TimeoutError:
            return None  # its QEMU hangs
        except libvirt.libvirtError as error:
            if is_lost(connection, error):
                raise HypervisorUnavailable(f"libvirt at {self._changes.uri} is gone: {message_of(error)}") from error
            return None  # no such domain, too old a QEMU, another measurement

    def _ask(self, uuid: str, what: str, call: Any) -> bool:
        """Ask something of a job; False if there is no such job (any more), or it can't be asked of it."""
        try:
            self._changes.make(uuid, what, call)
        except DomainNotFound:
            return False
        except libvirt.libvirtError as error:
            if error.get_error_code() in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
                return False
            raise HypervisorError(f"{what} of domain {uuid} was refused: {message_of(error)}") from error
        return True


def _measure_dirty_rate(connection: Any, uuid: str, seconds: int) -> float | None:
    handle = connection.lookupByUUIDString(uuid)
    # Page sampling, which only reads. The mode by dirty bitmap kills a guest under emulation (libvirt.md, section 0).
    handle.startDirtyRateCalc(seconds, libvirt.VIR_DOMAIN_DIRTYRATE_MODE_PAGE_SAMPLING)
    nowait = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
    deadline = time.monotonic() + seconds + CHANGE_DEADLINE_S
    time.sleep(seconds)
    while time.monotonic() < deadline:
        ((_, figures),) = connection.domainListGetStats([handle], libvirt.VIR_DOMAIN_STATS_DIRTYRATE, nowait)
        if figures.get("dirtyrate.calc_status") == libvirt.VIR_DOMAIN_DIRTYRATE_MEASURED:
            return float(figures["dirtyrate.megabytes_per_second"])
        time.sleep(_DIRTY_RATE_POLL_S)
    return None


def _channels(request: MigrationRequest) -> int:
    return 1 if request.post_copy else request.channels


def _parameters(request: MigrationRequest) -> dict[str, Any]:
    parameters: dict[str, Any] = {libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: request.bandwidth_mib_s}
    if request.post_copy:
        parameters[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH_POSTCOPY] = request.bandwidth_mib_s
    if _channels(request) > 1:
        parameters[libvirt.VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS] = _channels(request)
    if request.copy_disks:
        parameters[libvirt.VIR_MIGRATE_PARAM_MIGRATE_DISKS] = list(request.copy_disks)
    return parameters


def _migration_result(connection: Any, error: Any) -> MigrationResult:
    code, words = error.get_error_code(), message_of(error)
    end = migration_end(error.get_error_domain(), code, words, connected=is_alive(connection))
    if is_unsafe_refusal(code):
        words += (
            " (if all nodes share the storage by a file system that libvirt does not know,"
            " set VMHERD_ASSUME_SHARED_STORAGE=true on them)"
        )
    return MigrationResult(end, words)
