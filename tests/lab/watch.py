"""What libvirt itself says: domain events, and the jobs of domains, on all hosts of a lab.

It is a process of its own, with its own libvirt event loop: a test that drives libvirt, or the product in the test's
process, is not disturbed by it (the event loop is one per process, and events are registered once per connection).
It costs some percent of a core, so it runs when a test asks for it only.

A job is looked for every 20 ms; one that is shorter may be missed. A job is taken to last while its host's libvirtd is
down: QEMU carries it on.

    python -m tests.lab.watch LAB_DIRECTORY HOST...     (writes to LAB_DIRECTORY/libvirt.jsonl)
"""

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import libvirt

from tests.lab.namespaces import REPOSITORY, LabError

if TYPE_CHECKING:  # the watching process has no use for it
    from tests.lab.lab import Lab

_POLL_S = 0.02
_EVENTS = ("DEFINED", "UNDEFINED", "STARTED", "SUSPENDED", "RESUMED", "STOPPED", "SHUTDOWN", "PMSUSPENDED", "CRASHED")


@dataclass(frozen=True)
class DomainEvent:
    """A lifecycle event, in the words of reference/libvirt.md: `what` is "SUSPENDED/MIGRATED" and the like."""

    at: float
    host: str
    domain: str
    what: str


@dataclass(frozen=True)
class ObservedJob:
    """A migration job on its source, as `jobStats` shows it; `ended_at` is `math.inf` if it has not ended."""

    host: str
    domain: str
    began_at: float
    ended_at: float


class LibvirtWatch:
    """Watches all hosts of a lab from its creation until `stop`; a context manager.

    Args:
        lab: The lab.
    """

    def __init__(self, lab: "Lab", timeout: float = 20.0) -> None:
        self._file = lab.directory / "libvirt.jsonl"
        self._file.unlink(missing_ok=True)
        argv = [sys.executable, "-m", "tests.lab.watch", str(lab.directory), *(host.name for host in lab.hosts)]
        self._process: subprocess.Popen[bytes] = lab.switch.popen(
            argv, env={"PYTHONPATH": str(REPOSITORY)}, log="watch", cwd=REPOSITORY
        )
        deadline = time.monotonic() + timeout
        expected = {host.name for host in lab.hosts if host.has_socket()}
        while not expected <= {entry["host"] for entry in self._records() if entry["kind"] == "connected"}:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise LabError("the libvirt watch does not connect; see logs/watch.log")
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop watching; what was seen can still be asked for."""
        self._process.terminate()
        self._process.wait(10)

    def events(self) -> list[DomainEvent]:
        """Return the lifecycle events up to now, by their arrival."""
        return [
            DomainEvent(entry["at"], entry["host"], entry["domain"], entry["what"])
            for entry in self._records()
            if entry["kind"] == "event"
        ]

    def jobs(self) -> list[ObservedJob]:
        """Return the migration jobs up to now, by their begin."""
        found: list[ObservedJob] = []
        open_jobs: dict[tuple[str, str], float] = {}
        for entry in self._records():
            if entry["kind"] == "job":
                open_jobs[entry["host"], entry["domain"]] = entry["at"]
            elif entry["kind"] == "job-over":
                key = (entry["host"], entry["domain"])
                found.append(ObservedJob(*key, open_jobs.pop(key), entry["at"]))
        found += [ObservedJob(*key, began_at, math.inf) for key, began_at in open_jobs.items()]
        return sorted(found, key=lambda job: job.began_at)

    def _records(self) -> list[dict[str, Any]]:
        text = self._file.read_text() if self._file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


class _HostWatch:
    """Watches one host, for ever, in a thread."""

    def __init__(self, directory: Path, host: str, write: Callable[..., None]) -> None:
        self._socket = directory / host / "run/libvirt/libvirt-sock"
        self._host = host
        self._write = write
        self._jobs: set[str] = set()

    def run(self) -> None:
        while True:
            connection = None
            try:
                connection = libvirt.open(f"qemu:///system?socket={self._socket}")
                self._write("connected", host=self._host)
                self._watch(connection)
            except libvirt.libvirtError:
                if connection is not None:
                    self._write("disconnected", host=self._host)
                    # Or its callback would go on, beside the next connection's.
                    connection.close()
            time.sleep(_POLL_S)

    def _watch(self, connection: Any) -> None:
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle, None)
        while connection.isAlive():
            jobs = {
                domain.name()
                for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
                if self._migrates_out(domain)
            }
            for domain in sorted(jobs - self._jobs):
                self._write("job", host=self._host, domain=domain)
            for domain in sorted(self._jobs - jobs):
                self._write("job-over", host=self._host, domain=domain)
            self._jobs = jobs
            time.sleep(_POLL_S)

    def _migrates_out(self, domain: Any) -> bool:
        gone = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_OPERATION_UNSUPPORTED)
        try:
            stats = domain.jobStats()
        except libvirt.libvirtError as error:
            if error.get_error_code() in gone:
                return False  # it ended between the list and this call, or is arriving
            # Its monitor is busy or just broke; and if the connection did, the caller will see.
            return domain.name() in self._jobs
        active = stats["type"] in (libvirt.VIR_DOMAIN_JOB_BOUNDED, libvirt.VIR_DOMAIN_JOB_UNBOUNDED)
        return bool(active and stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)

    def _lifecycle(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: object) -> None:
        self._write("event", host=self._host, domain=domain.name(), what=event_name(event, detail))


def event_name(event: int, detail: int) -> str:
    for name in _EVENTS:
        if getattr(libvirt, f"VIR_DOMAIN_EVENT_{name}") == event:
            prefix = f"VIR_DOMAIN_EVENT_{name}_"
            details = [k.removeprefix(prefix) for k, v in vars(libvirt).items() if k.startswith(prefix) and v == detail]
            return f"{name}/{details[0] if details else detail}"
    return f"{event}/{detail}"


def watch(directory: Path, hosts: list[str]) -> None:
    """Watch for ever."""
    # Errors are part of this job; by default libvirt prints each.
    libvirt.registerErrorHandler(lambda *_: None, None)
    libvirt.virEventRegisterDefaultImpl()
    lock = threading.Lock()
    with (directory / "libvirt.jsonl").open("a", buffering=1) as output:

        def write(kind: str, **more: str) -> None:
            with lock:
                output.write(json.dumps({"at": time.time(), "kind": kind, **more}) + "\n")

        for host in hosts:
            threading.Thread(target=_HostWatch(directory, host, write).run, daemon=True).start()
        while True:
            libvirt.virEventRunDefaultImpl()


if __name__ == "__main__":
    watch(Path(sys.argv[1]), sys.argv[2:])
