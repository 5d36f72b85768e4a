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
from workers.hypervisor.domain_needs import needs_of
from workers.hypervisor.domain_xml import with_marker
from workers.hypervisor.libvirt_changes import Changes
from workers.hypervisor.libvirt_connection import Asks, SharedConnection, is_lost, message_of, run_apart
from workers.hypervisor.libvirt_cpu import read_cpu
from workers.hypervisor.libvirt_definitions import Definitions, read_definition
from workers.hypervisor.libvirt_domains import DomainReader, read_addresses
from workers.hypervisor.libvirt_events import EventTeller
from workers.hypervisor.libvirt_migration import Migrations
from workers.hypervisor.libvirt_preflight import find_problems
from workers.hypervisor.libvirt_readings import completed_figures, parse_capabilities, version_text
from workers.hypervisor.port import (
    Definition,
    Domain,
    DomainEvent,
    DomainExists,
    DomainState,
    Host,
    HostUse,
    Job,
    Marker,
    MigrationRequest,
    MigrationResult,
    StorageLocked,
    is_lock_refusal,
)

T = TypeVar("T")

_SHUTDOWN_ANSWER_S: Final = 1.0
"""A power button is pressed in milliseconds. What lasts longer is an agent at work, or a QEMU that hangs."""
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

    def __init__(self, uri: str = "qemu:///system", *, allow_unsafe: bool = False, domain_type: str = "") -> None:
        self.uri = uri
        self._domain_type = domain_type
        self._lock = threading.Lock()
        self._events: EventTeller | None = None
        self._closed = False
        self._readings = SharedConnection(uri, self._wake_events)
        self._domains = DomainReader(uri)
        self._addresses = Asks(uri, _ADDRESS_LANES)
        self._changes = Changes(uri, self._wake_events)
        self._migrations = Migrations(self._changes, self._domains, allow_unsafe=allow_unsafe)
        self._definitions = Definitions(self._changes, self.domain)

    def __repr__(self) -> str:
        return f"LibvirtHypervisor({self.uri!r})"

    # --- readings -------------------------------------------------------------------------------------------------

    def host(self) -> Host:
        """Read what the host is."""
        return self._read(partial(_read_host, domain_type=self._domain_type))

    def use(self) -> HostUse:
        """Read what is in use of the host."""
        return self._read(_read_use)

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
        return self._migrations.job(uuid)

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
            Whether the request was accepted, which does not mean that it will be aborted; False in post-copy, from
            which no way leads back.

        Raises:
            OutcomeUnknown: libvirt did not answer the request, since QEMU hangs; it may still carry it out.
        """
        return self._migrations.abort(uuid)

    def start_post_copy(self, uuid: str) -> bool:
        """Switch the active migration, which allowed it, to post-copy.

        Returns:
            Whether it was accepted; False also when there is no such job any more.

        Raises:
            OutcomeUnknown: libvirt did not answer the request, since QEMU hangs; it may still carry it out.
        """
        return self._migrations.start_post_copy(uuid)

    def dirty_rate(self, uuid: str, seconds: float) -> float | None:
        """Measure, over whole seconds, how fast a running guest dirties memory; None where that can't be told."""
        domain = self.domain(uuid)
        if domain is None or domain.state is not DomainState.RUNNING or domain.has_job:
            return None  # during a migration libvirt would answer at its end only
        return self._migrations.dirty_rate(uuid, seconds)

    def migrate(self, request: MigrationRequest) -> MigrationResult:
        """Live-migrate a domain peer-to-peer; blocks until the call ends. Never raises for what went wrong with it."""
        return self._migrations.migrate(request)

    # --- changes --------------------------------------------------------------------------------------------------

    def start(self, domain_xml: str, marker: Marker) -> Domain:
        """Start a transient domain from `domain_xml` with `marker` written into its metadata.

        Raises:
            DomainExists: The host has a domain of that UUID, which was not started by this call. One whose QEMU just
                died still counts, until libvirt has noticed (0.25 s after PID 1 has reaped it).
            StorageLocked: It was not started, as an image is locked by somebody else.
            HypervisorError: It was not started; no such domain is left.
            OutcomeUnknown: It may have been started.
        """
        marked_xml, uuid = with_marker(domain_xml, marker)
        connection = self._changes.connect()
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
            kind = StorageLocked if is_lock_refusal(words) else HypervisorError
            return kind(f"domain {uuid} was not started: {words}")
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
        connection = self._changes.connect()
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
            self._changes.make(uuid, "resume", lambda handle: handle.resume())
        except libvirt.libvirtError as error:
            raise HypervisorError(f"domain {uuid} was not resumed: {message_of(error)}") from error

    def shutdown(self, uuid: str) -> None:
        """Ask the guest to power off, by its agent if that is connected, else by the power button.

        Raises:
            DomainNotFound: The host does not have it, or it does not run.
            HypervisorError: It can't be asked: it is paused, or a job is active on it.
        """
        domain = self.domain(uuid)
        if domain is None or domain.state is DomainState.SHUTOFF:
            raise DomainNotFound(f"domain {uuid} does not run on {self.uri}")
        if domain.state is DomainState.SHUTDOWN:
            return
        if domain.state is not DomainState.RUNNING:
            # libvirt would press the button all the same, and a paused guest feel it whenever it is resumed.
            raise HypervisorError(f"domain {uuid} can't be asked to power off: it is {domain.state}")
        if domain.has_job:
            raise HypervisorError(f"domain {uuid} can't be asked to power off while a job is active on it")
        connection = self._changes.connect()
        try:
            # No flags: the agent, and the button if there is none or it fails. An agent's call lasts until the guest is
            # down, or for 65 s if the agent hangs; it goes on while nobody waits for it.
            handle = connection.lookupByUUIDString(uuid)
            run_apart(lambda: handle.shutdownFlags(0)).result(_SHUTDOWN_ANSWER_S)
        except TimeoutError:
            return
        except libvirt.libvirtError as error:
            if is_lost(connection, error):
                raise self._unavailable(error) from error
            if self._is_active(uuid):
                raise HypervisorError(f"domain {uuid} was not asked to power off: {message_of(error)}") from error

    # --- definitions ----------------------------------------------------------------------------------------------

    def preflight(self, domain_xml: str, copied_disks: tuple[str, ...] = ()) -> list[str]:
        """Say why a machine could not arrive here by live migration, as far as this host can tell beforehand.

        Files and block devices are looked for by this process: it has to run on the host, and to see what QEMU sees.
        """
        needs = needs_of(domain_xml, copied_disks)
        connection = self._changes.connect()
        try:
            return find_problems(connection, needs)
        except libvirt.libvirtError as error:
            raise self._unavailable(error) from error

    def definition(self, uuid: str, *, secrets: bool = False) -> Definition | None:
        """Read how a domain is configured; None when the host does not have it."""
        return self._read(lambda connection: read_definition(connection, uuid, secrets=secrets))

    def mark(self, uuid: str, marker: Marker) -> None:
        """Write `marker` into a running domain's live metadata, replacing one that is there.

        Raises:
            DomainNotFound: The host does not have it, or it does not run.
            HypervisorError: Refused, for example while a job is active on it.
            OutcomeUnknown: It may have been written.
        """
        self._definitions.mark(uuid, marker)

    def unmark(self, uuid: str) -> None:
        """Remove the marker from a running domain's live metadata; nothing where there is none. Raises as `mark`."""
        self._definitions.unmark(uuid)

    def define(self, domain_xml: str, *, autostart: bool) -> None:
        """Make a domain persistent (it may run or not) with this configuration.

        Raises:
            HypervisorError: Refused.
            OutcomeUnknown: It may have been defined.
        """
        self._definitions.define(domain_xml, autostart=autostart)

    def undefine(self, uuid: str) -> None:
        """Make a running persistent domain transient: it runs on, and the host forgets it when it stops.

        Raises:
            HypervisorError: Refused: it does not run (what it is would be lost), it has snapshots or a job is active on
                it.
            OutcomeUnknown: It may have been undefined.
        """
        self._definitions.undefine(uuid)

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
        self._changes.close()
        self._readings.close()
        self._addresses.close()
        self._domains.close()

    def _wake_events(self) -> None:
        events = self._events
        if events is not None:
            events.wake()

    def _unavailable(self, error: Any) -> HypervisorUnavailable:
        return HypervisorUnavailable(f"libvirt at {self.uri} is gone: {message_of(error)}")


def _read_use(connection: Any) -> HostUse:
    cpu = connection.getCPUStats(libvirt.VIR_NODE_CPU_STATS_ALL_CPUS)
    memory = connection.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS)
    unused_kib = sum(memory.get(kind, 0) for kind in ("free", "buffers", "cached"))
    busy_ns, idle_ns = cpu["kernel"] + cpu["user"], cpu["idle"] + cpu["iowait"]
    return HostUse(busy_ns / 1e9, idle_ns / 1e9, (memory["total"] - unused_kib) // 1024)


def _read_host(connection: Any, domain_type: str = "") -> Host:
    uuid, cpu_model = parse_capabilities(connection.getCapabilities())
    memory_kib = connection.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS)["total"]
    domain_type, cpu = read_cpu(connection, domain_type)
    return Host(
        hostname=connection.getHostname(),
        uuid=uuid,
        cpus=connection.getCPUMap()[2],
        memory_mib=memory_kib // 1024,
        cpu_model=cpu_model,
        hypervisor_version=f"{connection.getType()} {version_text(connection.getVersion())}",
        libvirt_version=version_text(connection.getLibVersion()),
        domain_type=domain_type,
        cpu=cpu,
    )
