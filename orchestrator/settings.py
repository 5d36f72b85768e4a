"""Settings, each from the environment (`VMHERD_REDIS_URL`) or its documented default.

One frozen object is read when a process starts. What is per VM or per operation is in resources, not here.
"""

from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from orchestrator.errors import Invalid
from orchestrator.lease import DEFAULT_PROFILE, LATENCY_S, PROFILES, Timing

FIVE_GBIT_IN_MIB_S = 5_000_000_000 // 8 // 2**20
"""596 MiB/s: 5 Gbit/s rounded down, the platform's promise for one migration."""

_LEAST_GRANT_TTL_S = 3
_LEAST_SAMPLE_S = 0.5

Seconds = Annotated[float, Field(gt=0)]


def _of_profile(attribute: str) -> Any:
    """A field whose default is the chosen profile's; a profile that is none is the profile's own error."""
    return Field(
        default_factory=lambda chosen: getattr(PROFILES[chosen.get("profile", DEFAULT_PROFILE)], attribute),
        validate_default=False,
    )


class Settings(BaseSettings):
    """All settings of all processes.

    Attributes:
        redis_url: Where Redis is: `redis://[user:password@]host:port/db`, `rediss://` or `unix://...?db=0`.
        node: This node's name; only on nodes.
        worker_role: What a Celery worker is; set by `vmherd run`.
        libvirt_uri: This host's hypervisor; only on nodes.
        assume_shared_storage: Migrate disks whose file system libvirt does not know as shared; only on nodes. On
            only where every image lies on storage that all nodes share: on any other, a guest is lost.
        domain_type: `kvm`, or `qemu` for emulation, by which this node runs VMs that have no domain template; `auto` is
            kvm where libvirt offers it. Only on nodes.
        cpu_shares: Weigh VMs against each other by the CPU that they reserve; off where libvirt has no cgroup
            controller for CPU. Only on nodes.
        migration_uri: Where other hosts' daemons reach this one's, for example `qemu+tcp://192.0.2.11/system`; only
            on nodes. Default: `qemu+tls://<hostname>/system`, libvirt's own secure default.
        state_dir: Where a node keeps pid files, on a file system that a reboot empties.
        bandwidth_mib_s: Cap on one migration, MiB/s.
        completion_timeout_per_gib: A migration that is not complete after so many seconds for each GiB of memory and
            copied disks (one GiB at least) is ended: aborted, or switched to post-copy where that is allowed.
        progress_timeout: Likewise one of which what is left to send has not shrunk from one second to the next for so
            many seconds.
        allow_post_copy: Let migrations that reach a deadline end by post-copy: the guest goes on at the target at once
            and fetches what it lacks. It then always ends, but if the network between the hosts breaks meanwhile, the
            guest is lost. A VM's annotation `vmherd.dev/allow-post-copy` (`true`, `false`) goes before this.
        parallel_migration_channels: TCP connections of one migration (multifd), for links that one connection does
            not fill. The bandwidth is the cap on all together. One where post-copy is allowed, which QEMU does not
            combine.
        dirty_rate_sample: For so many seconds a guest's dirty rate is measured before its migration, to foresee how
            that goes; 0: never. Some more seconds even out a guest that writes in bursts. Skipped where the migration
            should take less than three times as long.
        inbound_per_node: Migrations that one node receives at a time; 0 means no limit.
        outbound_per_node: Migrations that one node sends at a time. One, because the node's queue has one worker.
        cpu_ratio: vCPUs that may be reserved for each of a host's CPUs.
        system_reserved_cpus: CPUs of each host that VMs don't get.
        system_reserved_memory_mib: Memory of each host that VMs don't get.
        memory_overhead_mib: What QEMU takes besides a guest's own memory.
        profile: How fast a lost node is found: `critical`, `medium`, `moderate`, `slow` (docs/heartbeat.md). Each of
            the following five is the profile's unless it is set; what breaks a rule of TAKEOVER.md is refused.
        lease_ttl: T: a node whose lease was not renewed for so long is lost, seconds.
        watchdog_timeout: W: a node's watchdog resets it when it is not fed for so long, whole seconds.
        heartbeat: H: how often a node renews its lease, seconds.
        poll_validity: S: how long a node may go by its peers' word that they have no Redis either, seconds.
        watchdog_latency: L: from a watchdog's expiry to the last instruction or I/O of a guest, seconds.
        takeover_margin: M: how much later than T a lost node may be taken over by its watchdog's deadline, seconds. The
            least that is safe, unless it is set.
        ack_wait: A: how long its peers must have acknowledged that it is suspect before that, seconds. Likewise.
        redis_failover_wait: Q: how long a Redis that was replaced may still accept writes, seconds. Never less than its
            own min-replicas-max-lag and one second, where that can be read.
        redis_replicas: So many replicas must have a start's grant, a registration and the evidence about a lost node
            before they count; a start is held until then. 0: one, while one is connected.
        max_unhealthy: When more of the members than this look lost, percent, nothing is fenced by itself. A single
            loss is never held up by it.
        remove_lost_nodes: Take a node that was fenced out of the herd; it gets its labels, annotations, cordon and
            taints back when it joins again.
        correlation_labels: Labels that tell of what nodes share, the narrowest first; a loss of all nodes of one value
            is named as such.
        failsafe: Let the watchdog be fed while Redis is away and more than half of the members say so too. Off, an
            outage of Redis that is longer than `lease_ttl` resets the node. Only on nodes.
        watchdog: `auto` arms `/dev/watchdog0`, or `/dev/watchdog`, where there is one; a path arms that and fails
            without it; `off`: never armed. Only on nodes.
        watchdog_mode: `Watchdog` resets a host that is lost; `Notify` tells of it and never resets. Only on nodes.
        peer_address: `host:port`, UDP, where other members ask this one; by default port 7949 of the address from which
            this host speaks to Redis. Only on nodes and witnesses.
        grant_ttl: A grant that was not renewed for this long is suspect, seconds. Progress renews it once a second.
        host_shutdown_timeout: How long a host that shuts down waits for its VMs to leave, seconds.
        host_shutdown_grace: How long those that could not leave are then given to power off, seconds.
        resend_after: A granted operation that its node has not reported by then is sent again.
        ask_again_after: A question that was not answered by then is asked again.
        unschedulable_after: A person's operation for which no node fits fails after this long.
        bring_back: Whether uncordoning a node moves home what its drain moved.
        firmware_update: Move VMs that run on an outdated QEMU to nodes with the newest, once half of the nodes have it.
        retry_limit: Attempts at one migration before it fails for good.
        log_format: `console`, `json` or `auto` (console on a terminal).
        log_level: Of the standard library's names.
        metrics_address: Where each process's listener for Prometheus is, for example `127.0.0.1`; empty: there is none.
            Plain HTTP, for whoever reaches it (ADR 0021).
        metrics_port: Its port; 0: the one of that kind of process (`metrics.PORTS`).
        flower_password: Of user `vmherd` in Flower. Without one Flower doesn't start.
        flower_password_file: A file that holds it.
        flower_address: Where Flower listens; loopback, since it speaks plain HTTP.
        flower_port: Its port.
        api_address: Where the API listens; loopback unless others are to reach it.
        api_port: Its port.
        api_tls: Serve it by TLS. Off only behind something that does, or on loopback: tokens go over the wire.
        api_history: So many changes are kept in the memory of each server, to answer for versions of the past.
        api_body_mib: The largest request, MiB.
        api_request_timeout: A request that is no watch is given up after so many seconds.
        api_watches_per_client: Watches that one token may have open at one server.
        api_requests_per_client: Other requests of one token that one server works on at a time.
        api_watch_queue: So many changes may wait for a watch's client; one that reads more slowly has to list again.
        api_send_timeout: Seconds for which a client may take nothing of a watch or a long list; then it is hung up on.
        console: Serve the web console too, at `/console` of the API.
        flower_url: Where people's browsers reach Flower; the console links to it. Empty: it does not.
        server: Where commands and `Cluster` find the API: `https://host:port`. Empty: they work on Redis itself.
        token: Who they are to the API.
        token_file: A file that holds it.
        ca_file: The CA's certificate by which they know the API; without one, the system's CAs count.
        kubeconfig: A kubeconfig file, from whose current context all four are taken that are not given.
        audit_log: Where the API writes its audit log: a file, `-` for standard output, or empty for no lines.
        audit_reads: Whether reads stand in it too, besides changes and refusals.
        tls_dir: Where the API keeps its CA and its certificate; of the API's user alone.
        tls_names: Names and addresses under which clients reach the API, besides this host's own, with commas between.
        tls_cert_file: A certificate (with its chain) of your own, in place of one of the generated CA.
        tls_key_file: Its key.
        tls_ca_file: The CA's certificate that goes with it; `vmherd kubeconfig` puts it into what it writes.
    """

    model_config = SettingsConfigDict(env_prefix="VMHERD_", frozen=True, extra="ignore")

    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    node: str = ""
    worker_role: str = Field("migrate", pattern="^(migrate|lifecycle|control|liveness|fencing)$")
    libvirt_uri: str = "qemu:///system"
    assume_shared_storage: bool = False
    domain_type: str = Field("auto", pattern="^(auto|kvm|qemu)$")
    cpu_shares: bool = True
    migration_uri: str = ""
    state_dir: Path = Path("/run/vmherd")

    bandwidth_mib_s: int = Field(FIVE_GBIT_IN_MIB_S, ge=1)
    completion_timeout_per_gib: Seconds = 800
    progress_timeout: Seconds = 150
    allow_post_copy: bool = False
    parallel_migration_channels: int = Field(1, ge=1, le=64)
    dirty_rate_sample: float = Field(1, ge=0, le=10)
    inbound_per_node: int = Field(1, ge=0)
    outbound_per_node: int = Field(1, ge=1, le=1)
    cpu_ratio: float = Field(4.0, gt=0)
    system_reserved_cpus: float = Field(0.0, ge=0)
    system_reserved_memory_mib: int = Field(512, ge=0)
    memory_overhead_mib: int = Field(64, ge=0)

    profile: str = Field(DEFAULT_PROFILE, pattern=f"^({'|'.join(PROFILES)})$")
    lease_ttl: Seconds = _of_profile("lease_ttl")
    watchdog_timeout: Seconds = _of_profile("watchdog_timeout")
    heartbeat: Seconds = _of_profile("heartbeat")
    poll_validity: Seconds = _of_profile("poll_validity")
    watchdog_latency: float = LATENCY_S
    takeover_margin: Seconds | None = None
    ack_wait: Seconds | None = None
    redis_failover_wait: float = Field(15, ge=0)
    redis_replicas: int = Field(0, ge=0, le=100)
    max_unhealthy: int = Field(49, ge=0, le=100)
    remove_lost_nodes: bool = True
    correlation_labels: tuple[str, ...] = (
        "vmherd.dev/switch",
        "topology.kubernetes.io/rack",
        "vmherd.dev/rack",
        "topology.kubernetes.io/zone",
    )
    failsafe: bool = True
    watchdog: str = "auto"
    watchdog_mode: str = Field("Watchdog", pattern="^(Watchdog|Notify)$")
    peer_address: str = ""
    grant_ttl: Seconds = 10
    host_shutdown_timeout: Seconds = 300
    host_shutdown_grace: Seconds = 60
    resend_after: Seconds = 2
    ask_again_after: Seconds = 2
    unschedulable_after: Seconds = 300
    retry_limit: int = Field(5, ge=1)
    bring_back: bool = False
    firmware_update: bool = True

    log_format: str = Field("auto", pattern="^(auto|console|json)$")
    log_level: str = "INFO"
    metrics_address: str = ""
    metrics_port: int = Field(0, ge=0, le=65535)
    flower_password: SecretStr = SecretStr("")
    flower_password_file: Path | None = None
    flower_address: str = "127.0.0.1"
    flower_port: int = 5555
    api_address: str = "127.0.0.1"
    api_port: int = Field(8080, ge=0, le=65_535)
    api_tls: bool = True
    api_history: int = Field(10_000, ge=100, le=1_000_000)
    api_body_mib: float = Field(1, gt=0, le=64)
    api_request_timeout: Seconds = 60
    api_watches_per_client: int = Field(100, ge=1)
    api_requests_per_client: int = Field(100, ge=1)
    api_watch_queue: int = Field(1_000, ge=10)
    api_send_timeout: float = Field(30, gt=0)
    console: bool = True
    flower_url: Annotated[str, Field(pattern=r"^(https?://\S+)?$")] = ""
    server: str = ""
    token: SecretStr = SecretStr("")
    token_file: Path | None = None
    ca_file: Path | None = None
    kubeconfig: Path | None = None
    audit_log: str = ""
    audit_reads: bool = False
    tls_dir: Path = Path("/var/lib/vmherd/tls")
    tls_names: str = ""
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    tls_ca_file: Path | None = None

    @model_validator(mode="after")
    def _check_intervals(self) -> Self:
        try:
            self.timing.check(margin=self.takeover_margin, ack_wait=self.ack_wait)
        except Invalid as error:
            raise ValueError(str(error)) from error
        if self.grant_ttl < _LEAST_GRANT_TTL_S:
            raise ValueError("VMHERD_GRANT_TTL must be at least 3 seconds: progress renews a grant once a second")
        if 0 < self.dirty_rate_sample < _LEAST_SAMPLE_S:
            raise ValueError("VMHERD_DIRTY_RATE_SAMPLE must be 0 (never) or 0.5 to 10 seconds")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("VMHERD_TLS_CERT_FILE and VMHERD_TLS_KEY_FILE go together")
        return self

    @property
    def timing(self) -> Timing:
        """The times of this node's lease."""
        return Timing(self.lease_ttl, self.watchdog_timeout, self.heartbeat, self.poll_validity, self.watchdog_latency)

    @property
    def unschedulable_timeout(self) -> timedelta:
        """`unschedulable_after` as a duration."""
        return timedelta(seconds=self.unschedulable_after)


@cache
def settings() -> Settings:
    """Read the settings once for this process.

    Raises:
        Invalid: A variable has a value that can't be used.
    """
    try:
        return Settings()
    except ValidationError as error:
        causes = tuple(
            ("VMHERD_" + "_".join(str(part) for part in e["loc"]).upper() if e["loc"] else "settings", e["msg"])
            for e in error.errors()
            if e["type"] != "default_factory_not_called"  # the profile is wrong, and said to be
        )
        raise Invalid("settings: " + "; ".join(f"{name}: {why}" for name, why in causes), causes) from error
