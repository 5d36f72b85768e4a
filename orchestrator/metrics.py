"""What a process measures of itself, and the listener that gives it to Prometheus.

Each process has a listener of its own (a port for each kind of process), off unless `VMHERD_METRICS_ADDRESS` is set.
It speaks plain HTTP to whoever asks, so it gives names, numbers and words of fixed lists, never a spec, a message or an
address of Redis (ADR 0021). A listener that can't be had is said in the log, and stops no process.

Labels are bounded: names of tasks, outcomes; of what is one a VM or a node, only the herd's own collector has more
(`services.herd_metrics`), which forgets what was deleted.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import Any, Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from orchestrator.logs import logger
from orchestrator.settings import settings

log = logger(__name__)

PORTS: Final = {
    "control": 9641,
    "liveness": 9642,
    "fencing": 9643,
    "intake": 9644,
    "agent": 9645,
    "migrate": 9646,
    "lifecycle": 9647,
    "beat": 9648,
    "api": 9649,
}
"""By process: where its listener is unless `VMHERD_METRICS_PORT` says another port."""

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_READ_TIMEOUT_S = 5.0

REGISTRY: Final = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
_BUILD = Gauge("vmherd_build_info", "1; the version that runs", ["version"], registry=REGISTRY)
_BUILD.labels(version("vmherd")).set(1)

TASKS: Final = Counter("vmherd_tasks", "Celery tasks that ended here", ["task", "state"], registry=REGISTRY)
TASK_SECONDS: Final = Histogram(
    "vmherd_task_seconds",
    "How long they took",
    ["task"],
    buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60, 600),
    registry=REGISTRY,
)
TASK_ENDED_AT: Final = Gauge(
    "vmherd_task_ended_timestamp_seconds",
    "When one ended here last, by this machine's clock",
    ["task"],
    registry=REGISTRY,
)
LOOKED_AT: Final = Gauge(
    "vmherd_liveness_looked_timestamp_seconds",
    "When this process last came to the end of a look at the nodes' leases, by this machine's clock; 0: it never did",
    registry=REGISTRY,
)
COMMITS: Final = Counter(
    "vmherd_commits",
    "Commits to the store: done, refused (a check did not hold), conflict",
    ["outcome"],
    registry=REGISTRY,
)
COMMIT_SECONDS: Final = Histogram(
    "vmherd_commit_seconds",
    "How long Redis took for one",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1, 5),
    registry=REGISTRY,
)
TICKS: Final = Counter(
    "vmherd_ticks",
    "Ticks whose time came at this beat: sent, other (a second beat sent it), failed",
    ["tick", "outcome"],
    registry=REGISTRY,
)
REPORTS: Final = Counter("vmherd_reports", "Nodes' reports: taken, unreadable", ["outcome"], registry=REGISTRY)
REPORTS_LOST: Final = Counter(
    "vmherd_reports_lost", "Gaps in nodes' reports, which only a full listing makes up for", registry=REGISTRY
)

REQUESTS: Final = Counter(
    "vmherd_api_requests", "Requests that the API answered", ["verb", "resource", "code"], registry=REGISTRY
)
REQUEST_SECONDS: Final = Histogram(
    "vmherd_api_request_seconds",
    "How long an answer took; of a watch, until it began",
    ["verb"],
    buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60),
    registry=REGISTRY,
)
WATCHES: Final = Gauge("vmherd_api_watches", "Watches that are open", registry=REGISTRY)

_MIGRATION_LABELS: Final = ("name", "namespace", "node")
MIGRATION_PROCESSED: Final = Gauge(
    "d8_virtualization_virtualmachine_migration_data_processed_bytes",
    "Sent so far by the migration that runs on this node",
    _MIGRATION_LABELS,
    registry=REGISTRY,
)
MIGRATION_REMAINING: Final = Gauge(
    "d8_virtualization_virtualmachine_migration_data_remaining_bytes",
    "Left to send in the present pass over its memory",
    _MIGRATION_LABELS,
    registry=REGISTRY,
)
MIGRATION_DIRTY_RATE: Final = Gauge(
    "d8_virtualization_virtualmachine_migration_dirty_memory_rate_bytes",
    "Memory that the guest rewrites a second, as measured before its migration began; absent where it was not",
    _MIGRATION_LABELS,
    registry=REGISTRY,
)
MIGRATION_SPEED: Final = Gauge(
    "vmherd_virtualmachine_migration_sent_bytes_per_second",
    "Memory sent a second, over the hypervisor's last interval",
    _MIGRATION_LABELS,
    registry=REGISTRY,
)
MIGRATION_THROTTLE: Final = Gauge(
    "vmherd_virtualmachine_migration_throttle_percent",
    "How far auto-converge slows the guest down",
    _MIGRATION_LABELS,
    registry=REGISTRY,
)
_OF_A_MIGRATION: Final = (
    MIGRATION_PROCESSED,
    MIGRATION_REMAINING,
    MIGRATION_DIRTY_RATE,
    MIGRATION_SPEED,
    MIGRATION_THROTTLE,
)


@dataclass(frozen=True, slots=True)
class Family:
    """One metric of the herd's collector: a gauge, written by `line`.

    Attributes:
        labels: Their names, in the order in which `line` takes their values.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()

    def line(self, value: float, *labels: str) -> str:
        """Give one sample."""
        shown = ",".join(f'{name}="{escaped(text)}"' for name, text in zip(self.labels, labels, strict=True))
        return f"{self.name}{{{shown}}} {number(value)}" if shown else f"{self.name} {number(value)}"

    def block(self, lines: list[str]) -> str:
        """Give all its samples with its head; empty without samples."""
        if not lines:
            return ""
        return f"# HELP {self.name} {self.help}\n# TYPE {self.name} gauge\n" + "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Give a label's value as the text format wants it."""
    if "\\" in text or '"' in text or "\n" in text:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return text


def number(value: float) -> str:
    """Give a number without a needless `.0`."""
    return str(int(value)) if value == int(value) else repr(float(value))


class JobFigures(Protocol):
    """What is shown of a migration's job (`workers.hypervisor.port.Job`)."""

    @property
    def processed_bytes(self) -> int:
        """Sent so far."""
        ...

    @property
    def remaining_bytes(self) -> int:
        """Left in this pass."""
        ...

    @property
    def memory_bps(self) -> int:
        """Bytes sent a second."""
        ...

    @property
    def throttle_percent(self) -> int:
        """How far the guest is slowed down."""
        ...


_migrating: set[tuple[str, str, str]] = set()
_migrating_lock = threading.Lock()


@contextmanager
def migration_shown(vm: str, node: str) -> Iterator[None]:
    """Show a migration's figures while it runs here, and none of it afterwards: a watcher may be late.

    Args:
        vm: `namespace/name`.
    """
    labels = _migration_labels(vm, node)
    with _migrating_lock:
        _migrating.add(labels)
    try:
        yield
    finally:
        with _migrating_lock:
            _migrating.discard(labels)
            for gauge in _OF_A_MIGRATION:
                gauge.remove_by_labels(dict(zip(_MIGRATION_LABELS, labels, strict=True)))


def show_migration(vm: str, node: str, job: JobFigures) -> None:
    """Show a job's figures."""
    figures = (
        (MIGRATION_PROCESSED, job.processed_bytes),
        (MIGRATION_REMAINING, job.remaining_bytes),
        (MIGRATION_SPEED, job.memory_bps),
        (MIGRATION_THROTTLE, job.throttle_percent),
    )
    _show(_migration_labels(vm, node), figures)


def show_dirty_rate(vm: str, node: str, mib_s: float) -> None:
    """Show what was measured of a guest before its migration."""
    _show(_migration_labels(vm, node), ((MIGRATION_DIRTY_RATE, mib_s * 2**20),))


def _show(labels: tuple[str, str, str], figures: Iterable[tuple[Gauge, float]]) -> None:
    with _migrating_lock:
        if labels in _migrating:
            for gauge, value in figures:
                gauge.labels(*labels).set(value)


def _migration_labels(vm: str, node: str) -> tuple[str, str, str]:
    namespace, _, name = vm.rpartition("/")
    return name, namespace, node


def watch_tasks() -> None:
    """Count and time each Celery task of this process from now on."""
    from celery.signals import task_postrun, task_prerun  # noqa: PLC0415 - the CLI needs metrics' names, not Celery

    began: dict[str, float] = {}

    def note_begin(task_id: str = "", **_: Any) -> None:
        began[task_id] = time.monotonic()

    def note_end(task_id: str = "", task: Any = None, state: str | None = None, **_: Any) -> None:
        name = str(getattr(task, "name", ""))
        TASKS.labels(name, state or "UNKNOWN").inc()
        TASK_ENDED_AT.labels(name).set(time.time())
        if (at := began.pop(task_id, None)) is not None:
            TASK_SECONDS.labels(name).observe(time.monotonic() - at)

    task_prerun.connect(note_begin, weak=False)
    task_postrun.connect(note_end, weak=False)


class Listener:
    """Answers `GET /metrics`, and `GET /healthz` with 200 while the process can answer at all.

    Args:
        address: Where; port 0 takes a free one.
        more: What is given besides this process's own metrics, made anew for each scrape.
    """

    def __init__(self, address: str, port: int, more: Callable[[], str] | None = None) -> None:
        scraping = threading.Lock()  # several scrapers wait for each other: one scrape of a large herd is work

        class Handler(BaseHTTPRequestHandler):
            timeout = _READ_TIMEOUT_S

            def do_GET(self) -> None:
                if self.path == "/healthz":
                    self._answer(200, "ok\n")
                elif self.path.partition("?")[0] == "/metrics":
                    try:
                        with scraping:
                            body = render(more)
                    except Exception:  # the thread's entry point
                        log.exception("metrics could not be made")
                        self._answer(500, "metrics could not be made; the log says why\n")
                    else:
                        self._answer(200, body)
                else:
                    self._answer(404, "/metrics and /healthz are here\n")

            def _answer(self, status: int, text: str) -> None:
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                log.debug("metrics", request=format % args)

        self._server = ThreadingHTTPServer((address, port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()


def render(more: Callable[[], str] | None = None) -> str:
    """Give this process's metrics in Prometheus's text format, and what `more` gives."""
    return generate_latest(REGISTRY).decode() + (more() if more is not None else "")


def serve(process: str, more: Callable[[], str] | None = None) -> Listener | None:
    """Start this process's listener where the settings say; None where they say nothing, or it can't be had.

    Args:
        process: One of `PORTS`.
        more: As `Listener`.
    """
    config = settings()
    if not config.metrics_address:
        return None
    port = config.metrics_port or PORTS[process]
    try:
        listener = Listener(config.metrics_address, port, more)
    except OSError as error:
        log.warning(
            "no metrics: set VMHERD_METRICS_PORT where two of a kind run on one machine",
            address=config.metrics_address,
            port=port,
            error=str(error),
        )
        return None
    log.info("metrics", address=config.metrics_address, port=listener.port)
    return listener
