"""What vmherd asks of a hypervisor host.

Two rules hold for every driver. A *reading* (`domain`, `domains`, `job`) is taken from the hypervisor after the call
arrived and is never served from a copy, since settling an operation rests on it. A call whose effect is not known
raises `OutcomeUnknown` (or, from `migrate`, returns `MigrationEnd.UNKNOWN`) and never pretends to have failed.

All calls may be made from several threads at once. `migrate` and `destroy` block for long; the others answer within
seconds, also while a migration runs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from orchestrator.errors import HypervisorError


class DomainExists(HypervisorError):
    """`start` was refused as the host has a domain of that UUID already, which may well run.

    Told apart from other refusals, since this one never means that the VM may be started on another node.
    """

    reason = "AlreadyExists"


class StorageLocked(HypervisorError):
    """`start` was refused as somebody else holds the lock on an image: QEMU's own, virtlockd's, or sanlock's.

    Told apart from other refusals, since it says that the guest may run elsewhere.
    """

    reason = "StorageLocked"


_LOCKED = re.compile(
    r'Failed to get (shared )?"[^"]+" lock|Is another process using the image|Lockspace resource .* is locked'
    r"|Failed to acquire lock",
    re.DOTALL,
)
"""Of QEMU (block/file-posix.c; the second line comes by itself where the log is cut), virtlockd, sanlock's driver."""


def is_lock_refusal(words: str) -> bool:
    """Whether a hypervisor's words say that somebody else holds the lock on an image."""
    return _LOCKED.search(words) is not None


class DomainState(StrEnum):
    """What a domain does on this host, as far as vmherd's decisions need it told apart."""

    RUNNING = "running"
    PAUSED = "paused"
    """Paused by a person, by an I/O error, or by the guest's own watchdog: it exists and may be resumed."""
    INCOMING = "incoming"
    """The receiving side of a live migration that has not switched over; libvirt shows it as paused."""
    PAUSED_MIGRATED = "paused-migrated"
    """The source's copy after switch-over (libvirt: PAUSED/MIGRATION). It must not be resumed unless the
    target's copy is known to be gone."""
    POSTCOPY = "postcopy"
    """Either side of a migration in post-copy."""
    POSTCOPY_FAILED = "postcopy-failed"
    SHUTDOWN = "shutdown"
    """On its way down; still there."""
    CRASHED = "crashed"
    """The process is there, the guest is not (on_crash=preserve)."""
    SHUTOFF = "shutoff"
    """Defined, not running. vmherd's own domains are transient and never show this."""


@dataclass(frozen=True, slots=True)
class Marker:
    """What vmherd writes into a domain's metadata: whose it is.

    Attributes:
        project: The namespace of the VirtualMachine.
        name: The name of the VirtualMachine.
        incarnation: The VM's start counter at the start that made this domain, >= 1.
        epoch: The epoch of the grant under which it was started, >= 1.
    """

    project: str
    name: str
    incarnation: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Job:
    """A running live migration's figures, as its source host sees them.

    Attributes:
        outgoing: False on the receiving side.
        elapsed_ms: Since the job began.
        total_bytes, processed_bytes, remaining_bytes: Of memory and disks together.
        memory_bps: Bytes per second sent over the last interval.
        dirty_pages_per_s: Unique pages an iteration; **not** the guest's dirty rate (libvirt.md, section 7).
        iteration: Passes over memory so far.
        throttle_percent: Auto-converge's throttle, 0 when off.
    """

    outgoing: bool = True
    elapsed_ms: int = 0
    total_bytes: int = 0
    processed_bytes: int = 0
    remaining_bytes: int = 0
    memory_bps: int = 0
    dirty_pages_per_s: int = 0
    iteration: int = 0
    throttle_percent: int = 0


@dataclass(frozen=True, slots=True)
class Domain:
    """One reading of one domain on one host.

    Attributes:
        uuid: Lower-case, with dashes.
        name: The hypervisor's name for it.
        state: See `DomainState`.
        reason: The hypervisor's own word for why it is in that state, lower-case (`booted`, `migrated`, `destroyed`).
        marker: None for a domain that vmherd does not manage.
        memory_mib: What it may take of the host at most, overhead not counted.
        vcpus: >= 1.
        persistent: Whether the host would still know it after a reboot.
        job: The migration job that is active on it here, or None.
        has_job: Whether any job is active, also where its figures can't be read.
        agent: Whether the guest's agent is connected; None where it has no channel for one.
    """

    uuid: str
    name: str
    state: DomainState
    reason: str
    marker: Marker | None
    memory_mib: int
    vcpus: int
    persistent: bool = False
    job: Job | None = None
    has_job: bool = False
    agent: bool | None = None


@dataclass(frozen=True, slots=True)
class Definition:
    """How a host has a domain configured.

    Attributes:
        live_xml: Of the running domain, from which it could be started again as the same machine; empty when it does
            not run.
        inactive_xml: Of its persistent definition; empty for a transient one.
        autostart: Whether the host starts it by itself.
        snapshots: Snapshots and checkpoints that the host keeps of it: they are lost when it is undefined.
        secrets: Whether the two XMLs hold its secrets (passwords of consoles).
    """

    live_xml: str
    inactive_xml: str
    autostart: bool = False
    snapshots: int = 0
    secrets: bool = False


@dataclass(frozen=True, slots=True)
class HostCpu:
    """What CPU a host can give its guests, for the kind of domain that it runs.

    Attributes:
        vendor: `Intel`, `AMD`; empty where it is not told.
        model: libvirt's name of the model that comes nearest to it.
        features: All features of that CPU as a guest gets them and may take along on a migration, sorted; those of the
            model included. Empty: not known.
        disabled: Features of the model that a guest does not get here, sorted.
        models: Models that can be given whole, sorted.
    """

    vendor: str = ""
    model: str = ""
    features: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Host:
    """What a host is.

    Attributes:
        hostname: As the hypervisor tells it.
        uuid: The host's own, unique in the herd (libvirt refuses to migrate between equal ones).
        cpus: Logical CPUs online.
        memory_mib: Physical memory (from getMemoryStats: getInfo is wrong with hot-added memory).
        cpu_model: libvirt's name of the host's CPU model.
        hypervisor_version: For example `QEMU 7.2.22`.
        libvirt_version: For example `9.0.0`.
        domain_type: What domains run by here: `kvm`, or `qemu` for emulation.
        cpu: What its guests can get.
    """

    hostname: str
    uuid: str
    cpus: int
    memory_mib: int
    cpu_model: str
    hypervisor_version: str
    libvirt_version: str
    domain_type: str = "kvm"
    cpu: HostCpu = HostCpu()


@dataclass(frozen=True, slots=True)
class HostUse:
    """What is in use of a host at one moment, by its guests and by itself.

    Attributes:
        busy_s: CPU time of all CPUs since the host was booted, spent on something, seconds; it only grows.
        idle_s: Likewise, spent on nothing, or on waiting for disks.
        memory_mib: Memory that is neither free nor the page cache's.
    """

    busy_s: float
    idle_s: float
    memory_mib: int


class MigrationEnd(StrEnum):
    """How the migration call ended. None of these says where the guest runs: that is read from both hosts."""

    SUCCEEDED = "succeeded"
    ABORTED = "aborted"
    FAILED = "failed"
    """Also an abort that was asked for through another driver: libvirt may tell it as a failure."""
    NOT_STARTED = "not-started"
    """Refused before anything was done (target not reachable, another job active, guest not migratable)."""
    UNKNOWN = "unknown"
    """The connection to one of the two daemons was lost in the middle."""


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """What the migration call returned.

    Attributes:
        end: See `MigrationEnd`.
        message: The hypervisor's own words; empty on success.
    """

    end: MigrationEnd
    message: str = ""


@dataclass(frozen=True, slots=True)
class MigrationRequest:
    """One live migration to be run.

    Attributes:
        uuid: The domain.
        target_uri: Where the source's daemon connects to, for example `qemu+tcp://192.0.2.12/system`.
        bandwidth_mib_s: Cap on pre-copy, on post-copy and on the copy of disks, each, >= 1.
        auto_converge: Throttle the guest's CPU when it dirties memory faster than the link carries it away.
        post_copy: Allow `start_post_copy` during it.
        channels: Parallel connections (multifd); 1 is one plain connection. With `post_copy` it is always one: QEMU
            can't have both.
        copy_disks: Target names (`vda`) of disks that are not shared and are copied with the guest; empty: none. The
            target's `preflight` says whether it has a place for them. No image is deleted: neither the source's
            afterwards, nor the target's when the migration fails.
    """

    uuid: str
    target_uri: str
    bandwidth_mib_s: int
    auto_converge: bool = False
    post_copy: bool = False
    channels: int = 1
    copy_disks: tuple[str, ...] = ()


class EventKind(StrEnum):
    """What a `DomainEvent` tells."""

    STARTED = "started"
    SUSPENDED = "suspended"
    RESUMED = "resumed"
    STOPPED = "stopped"
    REBOOTED = "rebooted"
    CHANGED = "changed"
    """Anything else that may have changed the domain (defined, undefined, agent, metadata)."""
    RESYNC = "resync"
    """The connection was lost and is back: events in between are lost, so everything has to be listed anew."""
    LOST = "lost"
    """The connection to the daemon is gone."""


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """Something happened to a domain.

    Attributes:
        kind: See `EventKind`.
        uuid: Empty for RESYNC and LOST.
        detail: The hypervisor's detail, lower-case: for STOPPED one of `shutdown` (the guest powered off, or QEMU got
            SIGTERM: see `reason`), `destroyed`, `crashed`, `migrated`, `failed`, `saved`.
        reason: For STOPPED/shutdown: `guest` or `host`, as the SHUTDOWN event before it told, else empty.
    """

    kind: EventKind
    uuid: str = ""
    detail: str = ""
    reason: str = ""


class Hypervisor(Protocol):
    """One host's hypervisor. See the module's docstring for the rules that hold for every driver.

    Raises (every method):
        HypervisorUnavailable: The daemon does not answer.
    """

    def host(self) -> Host:
        """Read what the host is."""
        ...

    def use(self) -> HostUse:
        """Read what is in use of the host; a few milliseconds."""
        ...

    def domains(self) -> list[Domain]:
        """Read all domains, active and inactive, ordered by name. 200 domains take well under a second."""
        ...

    def domain(self, uuid: str) -> Domain | None:
        """Read one domain; None when the host does not have it."""
        ...

    def start(self, domain_xml: str, marker: Marker) -> Domain:
        """Start a transient domain from `domain_xml` with `marker` written into its metadata.

        Raises:
            DomainExists: It was not started by this call: a domain of that UUID was there before. Also for a moment
                after its process died.
            StorageLocked: It was not started, as an image is locked by somebody else.
            HypervisorError: It was not started; no such domain is left.
            OutcomeUnknown: It may have been started.
        """
        ...

    def destroy(self, uuid: str) -> None:
        """Stop a domain at once, as by pulling the plug; a domain that is not there is no error.

        A persistent one stays defined. Returns once the process is gone.
        """
        ...

    def shutdown(self, uuid: str) -> None:
        """Ask the guest to power off, and return at once. A guest may ignore it.

        Raises:
            DomainNotFound: The host does not have it, or it does not run.
            HypervisorError: It can't be asked now (it is paused, say).
        """
        ...

    def resume(self, uuid: str) -> None:
        """Let a paused domain run.

        Raises:
            HypervisorError: Refused (a lock is held elsewhere, no such domain).
        """
        ...

    def migrate(self, request: MigrationRequest) -> MigrationResult:
        """Live-migrate a domain peer-to-peer; blocks until the call ends. Never raises for what went wrong with it.

        The domain arrives transient and leaves no definition here.
        """
        ...

    def job(self, uuid: str) -> Job | None:
        """Read the job active on a domain of this host, or None."""
        ...

    def abort(self, uuid: str) -> bool:
        """Ask that the active migration be aborted.

        Returns:
            Whether the request was accepted; False in post-copy. True does **not** mean that it will be aborted: asked
            at the moment of switch-over, the migration still succeeds. Only the end of `migrate` and a reading of both
            sides tell.
        """
        ...

    def start_post_copy(self, uuid: str) -> bool:
        """Switch the active migration, which allowed it, to post-copy.

        Returns:
            Whether it was accepted; False also when there is no such job any more.
        """
        ...

    def dirty_rate(self, uuid: str, seconds: float) -> float | None:
        """Measure how fast a running guest dirties memory; blocks for `seconds` (0.5 to 10) and a little.

        Returns:
            MiB/s, about 20 % low and at most the working set over `seconds` (libvirt.md, section 7); None where the
            hypervisor can't tell, or a job keeps it from being asked.
        """
        ...

    def completed_job(self, uuid: str) -> dict[str, int]:
        """Read, on the target, the figures of the last completed migration (downtime, time, bytes), without consuming
        them; empty when there are none, as after post-copy. Keys: `downtime_ms`, `elapsed_ms`, `total_bytes`,
        `processed_bytes`; and, where it tells them, `iterations` and `throttle_percent`.
        """  # noqa: D205
        ...

    def addresses(self, uuid: str) -> list[str]:
        """IP addresses of a running guest from its agent, a DHCP lease or ARP, in that order; empty if not known."""
        ...

    def preflight(self, domain_xml: str, copied_disks: tuple[str, ...] = ()) -> list[str]:
        """Say why a machine could not arrive here by live migration, as far as this host can tell beforehand.

        Args:
            domain_xml: As `definition().live_xml` of the source gives it.
            copied_disks: Target names of disks that are copied with it: they need not be there, but a place for them.

        Returns:
            One problem an entry, for people (`CPU model Haswell: this host lacks avx2, bmi2`, `disk vda: no such file
            /srv/vm/web.qcow2`, `bridge br7 is not there`, `network lab is not active`); empty when it fits.
        """
        ...

    def definition(self, uuid: str, *, secrets: bool = False) -> Definition | None:
        """Read how a domain is configured; None when the host does not have it.

        Args:
            uuid: Of the domain.
            secrets: Include the secrets in the XML.
        """
        ...

    def mark(self, uuid: str, marker: Marker) -> None:
        """Write `marker` into a running domain's live metadata, replacing one that is there.

        Raises:
            DomainNotFound: The host does not have it, or it does not run.
            HypervisorError: Refused, for example while a job is active on it.
            OutcomeUnknown: It may have been written.
        """
        ...

    def unmark(self, uuid: str) -> None:
        """Remove the marker from a running domain's live metadata; nothing where there is none. Raises as `mark`."""
        ...

    def define(self, domain_xml: str, *, autostart: bool) -> None:
        """Make a domain persistent (it may run or not) with this configuration.

        Raises:
            HypervisorError: Refused.
            OutcomeUnknown: It may have been defined.
        """
        ...

    def undefine(self, uuid: str) -> None:
        """Make a running persistent domain transient: it runs on, and the host forgets it when it stops.

        NVRAM, managed save and TPM state are kept. A domain that is transient already, or not there, is no error.

        Raises:
            HypervisorError: Refused: it does not run (what it is would be lost), or it has snapshots.
            OutcomeUnknown: It may have been undefined.
        """
        ...

    def watch(self, callback: Callable[[DomainEvent], None]) -> None:
        """Call `callback` for every event from now on, from a thread of the driver's; one watcher a driver.

        Survives the daemon's restart: LOST is told at once, RESYNC when the connection is back.
        """
        ...

    def close(self) -> None:
        """Close the connection. Idempotent."""
        ...
