"""The hypervisor port over libvirt.

Three kinds of calls, on connections that don't get into each other's way (see `libvirt_connection`):

- *Readings* share one connection and ask only what libvirt answers without a domain's job lock and without QEMU:
  state, XML, lists. They answer in milliseconds also while a migration runs or a QEMU hangs (measured: 0.3 ms each).
- *Job figures and guests' addresses* can hang with a stuck QEMU. They are asked with a deadline, and silence is an
  answer: `has_job` without figures, or no address.
- *Calls that change something* open a connection of their own, which costs 1 ms, and may take as long as they need.

A call is refused, done, or of unknown outcome; it is of unknown outcome just when its connection broke while it ran.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

import libvirt

from orchestrator.errors import DomainNotFound, HypervisorError, HypervisorUnavailable, OutcomeUnknown
from workers.hypervisor.libvirt_connection import (
    Asks,
    SharedConnection,
    is_alive,
    is_lost,
    message_of,
    open_connection,
    run_apart,
)
from workers.hypervisor.libvirt_domains import DomainReader, read_addresses
from workers.hypervisor.libvirt_events import EventTeller
from workers.hypervisor.libvirt_readings import (
    JobKind,
    completed_figures,
    is_unsafe_refusal,
    migration_end,
    parse_capabilities,
    version_text,
    with_marker,
)
from workers.hypervisor.port import (
    Domain,
    DomainEvent,
    DomainExists,
    DomainState,
    Host,
    Job,
    Marker,
    MigrationEnd,
    MigrationRequest,
    MigrationResult,
)

T = TypeVar("T")

_FIGURES_DEADLINE_S: Final = 4.0
"""Longer than the end of a migration keeps the source's domain busy: until its QEMU is reaped, 0.2 to 2 s."""
_CHANGE_DEADLINE_S: Final = 5.0
"""Of resume and abort, which wait for QEMU. Later they may still take effect."""
_ADDRESSES_DEADLINE_S: Final = 4.0
_ADDRESS_LANES: Final = 2


class LibvirtHypervisor:
    """One libvirt host with QEMU. Connects at first use, and again after the daemon's return.

    Not connected when made, so it may be made before a fork and used after it.

    Args:
        uri: The daemon, by default this machine's.
        allow_unsafe: Migrate also what libvirt takes for unsafe: a disk on a file system that it does not know as
            shared, or with a cache that the target may not see. NFS, CephFS, OCFS2, GFS2 and the like it knows, and
            block devices and network disks it trusts. So leave this off unless every image lies on a shared file
            system that libvirt does not recognise (a FUSE client). If the storage is not shared in truth, or caches
            on its own, a migration then loses the guest's writes.
    """

    def __init__(self, uri: str = "qemu:///system", *, allow_unsafe: bool = False) -> None:
        self.uri = uri
        self._allow_unsafe = allow_unsafe
        self._lock = threading.Lock()
        self._events: EventTeller | None = None
        self._closed = False
        self._aborting: set[str] = set()
        self._readings = SharedConnection(uri, self._wake_events)
        self._domains = DomainReader(uri)
        self._addresses = Asks(uri, _ADDRESS_LANES)

    def __repr__(self) -> str:
        return f"LibvirtHypervisor({self.uri!r})"

    # --- readings -------------------------------------------------------------------------------------------------

    def host(self) -> Host:
        """Read what the host is."""
        return self._read(_read_host)

    def domains(self) -> list[Domain]:
        """Read all domains, active and inactive, ordered by name."""
        found = self._read(self._domains.read_all)
        return sorted(found, key=lambda domain: (domain.name, domain.uuid))

    def domain(self, uuid: str) -> Domain | None:
        """Read one domain; None when the host does not have it."""
        return self._read(lambda connection: self._domains.read(connection, uuid))

    def _read(self, reading: Callable[[Any], T]) -> T:
        connection = self._readings.get()
        try:
            return reading(connection)
        except libvirt.libvirtError as error:
            if not is_lost(connection, error):
                raise HypervisorError(f"libvirt at {self.uri}: {message_of(error)}") from error
            self._readings.discard(connection)
            raise self._unavailable(error) from error

    # --- jobs -----------------------------------------------------------------------------------------------------

    def job(self, uuid: str) -> Job | None:
        """Read the job active on a domain of this host, or None.

        Raises:
            HypervisorUnavailable: Also if libvirt does not answer about this domain, since its QEMU hangs or is being
                ended.
        """
        reading = self._domains.read_jobs([uuid], _FIGURES_DEADLINE_S)[uuid]
        if reading.kind is JobKind.SILENT:
            raise HypervisorUnavailable(
                f"libvirt at {self.uri} says nothing about the job of domain {uuid}: something else keeps the domain "
                "busy, or its QEMU hangs"
            )
        return reading.job

    def completed_job(self, uuid: str) -> dict[str, int]:
        """Read the figures of the last completed migration, without consuming them; empty when there are none."""
        flags = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED | libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED

        def reading(connection: Any) -> dict[str, int]:
            try:
                return completed_figures(connection.lookupByUUIDString(uuid).jobStats(flags))
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    return {}
                raise

        return self._read(reading)

    def abort(self, uuid: str) -> bool:
        """Ask that the active migration be aborted.

        Returns:
            Whether the request was accepted, which does not mean that it will be aborted.

        Raises:
            OutcomeUnknown: libvirt did not answer the request, since QEMU hangs; it may still carry it out.
        """
        # abortJob ends whatever job there is, so another kind is looked for first. Between the two a job may end and
        # another begin: then that one is ended, as if a person had.
        job = self._domains.read_jobs([uuid])[uuid]
        if job.kind not in (JobKind.OUTGOING, JobKind.SILENT):
            return False
        self._aborting.add(uuid)  # before the call: the migration may end before it returns
        try:
            self._change(uuid, "abort of the migration", lambda handle: handle.abortJob())
        except DomainNotFound:
            self._aborting.discard(uuid)
            return False
        except libvirt.libvirtError as error:
            self._aborting.discard(uuid)
            if error.get_error_code() in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
                return False  # no job any more, or no domain
            raise HypervisorError(f"the migration of {uuid} was not aborted: {message_of(error)}") from error
        return True

    # --- changes --------------------------------------------------------------------------------------------------

    def start(self, domain_xml: str, marker: Marker) -> Domain:
        """Start a transient domain from `domain_xml` with `marker` written into its metadata.

        Raises:
            DomainExists: The host has a domain of that UUID, which was not started by this call. One whose QEMU just
                died still counts, until libvirt has noticed (0.25 s after PID 1 has reaped it).
            HypervisorError: It was not started; no such domain is left.
            OutcomeUnknown: It may have been started.
        """
        marked_xml, uuid = with_marker(domain_xml, marker)
        connection = self._connect()
        try:
            connection.createXML(marked_xml, 0)
        except libvirt.libvirtError as error:
            raise self._start_failure(connection, uuid, error) from error
        try:
            domain = self._domains.read(connection, uuid)
        except (libvirt.libvirtError, HypervisorError) as error:
            raise OutcomeUnknown(f"domain {uuid} was started, and then could not be read: {error}") from error
        if domain is None:
            raise HypervisorError(f"domain {uuid} was started and stopped at once: see its log on {self.uri}")
        return domain

    def _start_failure(self, connection: Any, uuid: str, error: Any) -> HypervisorError | OutcomeUnknown:
        words = message_of(error)
        if is_lost(connection, error):
            return OutcomeUnknown(f"the connection to {self.uri} broke while domain {uuid} was being started: {words}")
        # libvirt says "already exists" with the code of any failed operation and in several ways, so it's looked up.
        try:
            connection.lookupByUUIDString(uuid)
        except libvirt.libvirtError as lookup_error:
            if is_lost(connection, lookup_error):
                return OutcomeUnknown(f"domain {uuid} failed to start ({words}), and then {self.uri} was gone")
            return HypervisorError(f"domain {uuid} was not started: {words}")
        return DomainExists(f"domain {uuid} was not started, as {self.uri} already has it: {words}")

    def destroy(self, uuid: str) -> None:
        """Stop a domain at once; a domain that is not there is no error. Returns once the process is gone.

        Raises:
            HypervisorError: Its process can't be ended (it hangs in the kernel).
            OutcomeUnknown: The connection broke meanwhile.
        """
        # Without GRACEFUL, which gives up on a QEMU that ignores SIGTERM. So: SIGTERM, and SIGKILL after 10 s. It takes
        # 0.2 s, more where PID 1 is slow to reap QEMU, and 12 s for a stopped QEMU. Two at once: the second waits for
        # the first, and finds nothing.
        connection = self._connect()
        try:
            connection.lookupByUUIDString(uuid).destroy()
        except libvirt.libvirtError as error:
            if is_lost(connection, error):
                raise OutcomeUnknown(f"the connection to {self.uri} broke while {uuid} was destroyed") from error
            if self._is_active(uuid):
                raise HypervisorError(f"domain {uuid} was not destroyed: {message_of(error)}") from error

    def _is_active(self, uuid: str) -> bool:
        domain = self.domain(uuid)
        return domain is not None and domain.state is not DomainState.SHUTOFF

    def resume(self, uuid: str) -> None:
        """Let a paused domain run; one that runs is left alone.

        Raises:
            DomainNotFound: The host does not have it.
            HypervisorError: Refused: a lock is held elsewhere, or a job is active on it.
            OutcomeUnknown: The connection broke meanwhile, or QEMU did not answer.
        """
        domain = self.domain(uuid)
        if domain is None:
            raise DomainNotFound(f"{self.uri} has no domain {uuid}")
        if domain.state is DomainState.RUNNING:
            return
        if domain.has_job:
            # libvirt would wait for the job's end, up to 30 s, and then resume what may by then run elsewhere.
            raise HypervisorError(f"domain {uuid} is not resumed while a job is active on it ({domain.state})")
        try:
            self._change(uuid, "resume", lambda handle: handle.resume())
        except libvirt.libvirtError as error:
            raise HypervisorError(f"domain {uuid} was not resumed: {message_of(error)}") from error

    def _change(self, uuid: str, what: str, call: Callable[[Any], object]) -> None:
        """Make a call that changes a domain and waits for its QEMU; an error of libvirt's means that it was refused."""
        connection = self._connect()
        try:
            handle = connection.lookupByUUIDString(uuid)
            run_apart(partial(call, handle)).result(_CHANGE_DEADLINE_S)
        except TimeoutError as error:
            raise OutcomeUnknown(
                f"{what} of domain {uuid}: no answer for {_CHANGE_DEADLINE_S:g} s, its QEMU may hang"
            ) from error
        except libvirt.libvirtError as error:
            if is_lost(connection, error):
                raise OutcomeUnknown(f"{what} of domain {uuid}: the connection to {self.uri} broke") from error
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                raise DomainNotFound(f"{self.uri} has no domain {uuid}") from error
            raise

    # --- migration ------------------------------------------------------------------------------------------------

    def migrate(self, request: MigrationRequest) -> MigrationResult:
        """Live-migrate a domain peer-to-peer; blocks until the call ends. Never raises for what went wrong with it."""
        # UNDEFINE_SOURCE without PERSIST_DEST: a persistent domain too arrives transient and leaves no definition.
        # Not ABORT_ON_ERROR: an I/O error of the guest's would then be the migration's failure, while moving the paused
        # guest to a host that reaches its storage is the cure.
        flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
        if request.auto_converge:
            flags |= libvirt.VIR_MIGRATE_AUTO_CONVERGE
        if self._allow_unsafe:
            flags |= libvirt.VIR_MIGRATE_UNSAFE
        parameters = {libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: request.bandwidth_mib_s}
        if request.bandwidth_mib_s < 1:
            # libvirt reads 0 as "no limit", and a negative number as a huge one.
            return MigrationResult(MigrationEnd.NOT_STARTED, "a migration needs a bandwidth of at least 1 MiB/s")
        try:
            connection = self._connect()
        except HypervisorError as error:
            return MigrationResult(MigrationEnd.NOT_STARTED, str(error))
        try:
            handle = connection.lookupByUUIDString(request.uuid)
        except libvirt.libvirtError as error:
            return MigrationResult(MigrationEnd.NOT_STARTED, message_of(error))
        self._aborting.discard(request.uuid)
        try:
            handle.migrateToURI3(request.target_uri, parameters, flags)
        except libvirt.libvirtError as error:
            result = _migration_result(connection, error)
            if result.end is MigrationEnd.FAILED and request.uuid in self._aborting:
                # An abort makes the target's QEMU fail too, and libvirt may tell that failure in place of the abort
                # (8 of 41 aborts in the first tenth of a second).
                return MigrationResult(MigrationEnd.ABORTED, result.message)
            return result
        return MigrationResult(MigrationEnd.SUCCEEDED)

    # --- guests ---------------------------------------------------------------------------------------------------

    def addresses(self, uuid: str) -> list[str]:
        """IP addresses of a running guest from its agent, a DHCP lease or ARP, in that order; empty if not known."""
        answer = self._addresses.ask(uuid, partial(read_addresses, uuid=uuid), _ADDRESSES_DEADLINE_S)
        try:
            return [] if answer is None else answer.result()
        except libvirt.libvirtError:
            return []  # it is gone

    # --- events and the connection --------------------------------------------------------------------------------

    def watch(self, callback: Callable[[DomainEvent], None]) -> None:
        """Call `callback` for every event from now on, from a thread of the driver's; one watcher a driver.

        The callback may make calls of this driver; while it runs further events wait.

        Raises:
            HypervisorUnavailable: The daemon does not answer now; nothing is watched.
        """
        with self._lock:
            if self._closed:
                raise HypervisorError(f"the driver of {self.uri} was closed")
            if self._events is not None:
                raise HypervisorError(f"{self.uri} has a watcher already")
            self._events = EventTeller(self.uri, callback)

    def close(self) -> None:
        """Close the connection. Idempotent. A migration that runs goes on, and its call returns at its end."""
        with self._lock:
            self._closed = True
            events, self._events = self._events, None
        if events is not None:
            events.close()
        self._readings.close()
        self._addresses.close()
        self._domains.close()

    def _connect(self) -> Any:
        if self._closed:
            raise HypervisorError(f"the driver of {self.uri} was closed")
        connection = open_connection(self.uri)
        self._wake_events()
        return connection

    def _wake_events(self) -> None:
        events = self._events
        if events is not None:
            events.wake()

    def _unavailable(self, error: Any) -> HypervisorUnavailable:
        return HypervisorUnavailable(f"libvirt at {self.uri} is gone: {message_of(error)}")


def _read_host(connection: Any) -> Host:
    uuid, cpu_model = parse_capabilities(connection.getCapabilities())
    memory_kib = connection.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS)["total"]
    return Host(
        hostname=connection.getHostname(),
        uuid=uuid,
        cpus=connection.getCPUMap()[2],
        memory_mib=memory_kib // 1024,
        cpu_model=cpu_model,
        hypervisor_version=f"{connection.getType()} {version_text(connection.getVersion())}",
        libvirt_version=version_text(connection.getLibVersion()),
    )


def _migration_result(connection: Any, error: Any) -> MigrationResult:
    code, words = error.get_error_code(), message_of(error)
    end = migration_end(error.get_error_domain(), code, words, connected=is_alive(connection))
    if is_unsafe_refusal(code):
        words += (
            " (if all nodes share the storage by a file system that libvirt does not know,"
            " set VMHERD_ASSUME_SHARED_STORAGE=true on them)"
        )
    return MigrationResult(end, words)
