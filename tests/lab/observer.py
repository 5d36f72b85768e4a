"""What happened in the lab, concluded from the lab's own records and never from the product's.

Two records, independent of each other:

- Each QEMU's own events (`recorder`): exact times of running and of migrating, also while libvirtd is dead.
  `qemu_runs`, `DoubleRunObserver`, `stream_migrations`, `downtimes`.
- The calls of libvirt's hook on each host (`LabHost.hook_records`): a migration from the target's preparation to the
  source's cleanup, so a little wider than the stream. `observed_migrations`.

`watch.LibvirtWatch` is a third one, of libvirt's jobs, for the time that a job takes before it has a target.

All times are seconds of CLOCK_REALTIME, of this one machine; an end that has not come is `math.inf`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.lab.lab import Lab
from tests.lab.namespaces import LabError


@dataclass(frozen=True, order=True)
class Interval:
    """A time from `began_at` on, up to but without `ended_at`."""

    began_at: float
    ended_at: float

    def overlap(self, other: "Interval") -> "Interval | None":
        """Return the time that is in both, or None if there is none."""
        began_at, ended_at = max(self.began_at, other.began_at), min(self.ended_at, other.ended_at)
        return Interval(began_at, ended_at) if began_at < ended_at else None


@dataclass(frozen=True)
class ObservedMigration:
    """One migration.

    Attributes:
        domain: The domain's name.
        source: The host that it left, or was to leave; "" if nothing told.
        target: The host that it went to, or should have gone to; "" if nothing told.
        began_at: When it began.
        ended_at: When it was over, or `math.inf`.
        outcome: "completed", "failed", "cancelled", "lost" (the source's QEMU died) or "unfinished".
    """

    domain: str
    source: str
    target: str
    began_at: float
    ended_at: float
    outcome: str


@dataclass
class QemuRun:
    """The life of one QEMU process.

    Attributes:
        uuid: The domain's UUID.
        domain: The domain's name.
        host: Where it ran.
        pid: Its process id.
        incoming: Whether it was started to receive a migration.
        began_at: When it was first seen.
        ended_at: When it was gone, or `math.inf`.
        running: When its virtual CPUs were running.
        outgoing: Its outgoing migrations: begin, end and outcome.
    """

    uuid: str
    domain: str
    host: str
    pid: int
    incoming: bool
    began_at: float
    ended_at: float = math.inf
    running: list[Interval] = field(default_factory=list)
    outgoing: list[tuple[Interval, str]] = field(default_factory=list)


@dataclass(frozen=True)
class DoubleRun:
    """A domain whose virtual CPUs ran on two hosts at once."""

    uuid: str
    domain: str
    hosts: tuple[str, str]
    began_at: float
    ended_at: float


def qemu_runs(records: Iterable[dict[str, Any]]) -> list[QemuRun]:
    """Return the lives of all QEMU processes in a recorder's records, by their begin."""
    lives: dict[tuple[str, int, str], _Life] = {}
    # A process's first record may be an event of before it was `seen`.
    for entry in records:
        key = (entry["host"], entry["pid"], entry["uuid"])
        lives.setdefault(key, _Life(entry)).take(entry)
    return sorted((life.end() for life in lives.values()), key=lambda run: run.began_at)


class _Life:
    """Builds a `QemuRun` from its records."""

    def __init__(self, first: dict[str, Any]) -> None:
        self.run = QemuRun(first["uuid"], "", first["host"], first["pid"], False, first["at"])
        self._running_from: float | None = None
        self._leaving_from: float | None = None
        self._arriving = False
        self._seen = False

    def take(self, entry: dict[str, Any]) -> None:
        match entry["kind"], entry.get("event"):
            case "seen", _:
                self.run.domain = entry["domain"]
                self.run.incoming = self._arriving = entry["incoming"]
                self._set_running(entry["at"], running=entry["running"])
            case "event", "RESUME":
                self._set_running(entry["at"], running=True)
            case "event", "STOP":
                self._set_running(entry["at"], running=False)
            case "event", "MIGRATION":
                self._migration(entry["at"], entry["data"]["status"])
            case "gone", _:
                self._close(entry["at"], "lost")
                self.run.ended_at = entry["at"]
            case _:
                pass  # other events say nothing of running or migrating

    def end(self) -> QemuRun:
        """Return the run, with what has not ended left open."""
        if self.run.ended_at == math.inf:
            self._close(math.inf, "unfinished")
        return self.run

    def _set_running(self, at: float, *, running: bool) -> None:
        if running and self._running_from is None:
            self._running_from = at
        elif not running and self._running_from is not None:
            self.run.running.append(Interval(self._running_from, at))
            self._running_from = None

    def _migration(self, at: float, status: str) -> None:
        over = status in ("completed", "failed", "cancelled")
        if self._arriving:
            # The events of its own arrival. It can leave only after that is over.
            self._arriving = not over
        elif over and self._leaving_from is not None:
            self.run.outgoing.append((Interval(self._leaving_from, at), status))
            self._leaving_from = None
        elif not over and self._leaving_from is None:
            self._leaving_from = at

    def _close(self, at: float, outcome: str) -> None:
        self._set_running(at, running=False)
        if self._leaving_from is not None:
            self.run.outgoing.append((Interval(self._leaving_from, at), outcome))
            self._leaving_from = None


def observed_migrations(lab: Lab, *, since: float = 0.0) -> list[ObservedMigration]:
    """Return all migrations as the hosts' libvirt hooks saw them, by their begin.

    One begins with the target's `migrate` call, and is over when the source has released the domain, or the target has
    (it came to nothing). A host that dies says neither: then it is over when the domain next begins something. The
    outcome is taken from the stream that ran in that time; "failed" if there was none.

    Args:
        lab: The lab.
        since: Leave out what ended before.
    """
    calls = sorted((call for host in lab.hosts for call in host.hook_records()), key=lambda call: call["at"])
    streams = stream_migrations(lab)
    where: dict[str, str] = {}
    under_way: dict[str, dict[str, Any]] = {}
    found = []

    def close(domain: str, ended_at: float) -> None:
        begin = under_way.pop(domain)
        source, target = where.get(domain, ""), begin["host"]
        # Within this time there is one stream at most: libvirt allows a domain one job.
        outcomes = [s.outcome for s in streams if s.domain == domain and begin["at"] <= s.began_at <= ended_at]
        outcome = outcomes[0] if outcomes else ("failed" if ended_at < math.inf else "unfinished")
        if outcome == "completed":
            where[domain] = target
        found.append(ObservedMigration(domain, source, target, begin["at"], ended_at, outcome))

    for call in calls:
        domain, begin = call["domain"], under_way.get(call["domain"])
        match call["operation"], call["sub"]:
            case "migrate", _:
                if begin is not None:
                    close(domain, call["at"])
                under_way[domain] = call
            case "release", _ if begin is not None and call["host"] in (begin["host"], where.get(domain)):
                close(domain, call["at"])
            case "started", _ if begin is None or call["host"] != begin["host"]:
                if begin is not None:
                    close(domain, call["at"])
                where[domain] = call["host"]
    for domain in list(under_way):
        close(domain, math.inf)
    return sorted((m for m in found if m.ended_at >= since), key=lambda m: m.began_at)


def stream_migrations(lab: Lab, *, since: float = 0.0) -> list[ObservedMigration]:
    """Return all migrations as the sources' QEMUs saw them, by their begin: from the stream's set-up to its end.

    "completed" means that the stream arrived; should libvirt lose its way after that, the source may run on anyway.

    Args:
        lab: The lab.
        since: Leave out what ended before.
    """
    runs = qemu_runs(lab.recorder.records())
    found = []
    for run in runs:
        for interval, outcome in run.outgoing:
            targets = [
                other.host
                for other in runs
                if other.incoming
                and other.uuid == run.uuid
                and other.pid != run.pid
                and Interval(other.began_at, other.ended_at).overlap(interval)
            ]
            target = targets[-1] if targets else ""
            found.append(ObservedMigration(run.domain, run.host, target, interval.began_at, interval.ended_at, outcome))
    return sorted((m for m in found if m.ended_at >= since), key=lambda m: m.began_at)


def downtimes(lab: Lab) -> dict[str, list[float]]:
    """Return, by domain name, the seconds from each stop on a source to the next start on its target, in order."""
    runs = qemu_runs(lab.recorder.records())
    found: dict[str, list[float]] = {}
    for run in runs:
        for interval, outcome in run.outgoing:
            stops = [running.ended_at for running in run.running if running.ended_at >= interval.began_at]
            starts = [
                running.began_at
                for other in runs
                if other.incoming and other.uuid == run.uuid and other.began_at <= interval.ended_at
                for running in other.running
                if stops and running.began_at >= stops[0]
            ]
            if outcome == "completed" and stops and starts:
                found.setdefault(run.domain, []).append(min(starts) - stops[0])
    return found


class DoubleRunObserver:
    """Tells whether a domain ran on two hosts at once, from its creation on.

    A copy that waits for a migration, or stays paused after one, does not run and is no double.

    Args:
        lab: The lab.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._since = max((entry["at"] for entry in lab.recorder.records()), default=0.0)

    def found(self) -> list[DoubleRun]:
        """Return the double runs, by their begin.

        Raises:
            LabError: The record is not whole: the recorder died, or a QEMU runs that does not report to it.
        """
        runs = qemu_runs(self._lab.recorder.records())
        known = {run.pid for run in runs}
        for host in self._lab.hosts:
            for pid, line in host.processes().items() if host.is_on else ():
                if " -uuid " in line and "qemu" in line and pid not in known:
                    raise LabError(f"QEMU {pid} on {host.name} is not recorded (another emulator?): {line[:200]}")
        return [double for double in _doubles(runs) if double.ended_at >= self._since]

    def check(self) -> None:
        """Fail the test if there was a double run."""
        doubles = self.found()
        assert not doubles, f"ran on two hosts at once: {doubles}"


def _doubles(runs: Sequence[QemuRun]) -> list[DoubleRun]:
    found = []
    for index, first in enumerate(runs):
        for second in runs[index + 1 :]:
            if first.uuid != second.uuid or first.host == second.host:
                continue
            overlaps = [a.overlap(b) for a in first.running for b in second.running]
            found += [
                DoubleRun(first.uuid, first.domain, (first.host, second.host), both.began_at, both.ended_at)
                for both in overlaps
                if both is not None
            ]
    return sorted(found, key=lambda double: double.began_at)


def max_concurrent(
    migrations: Iterable[ObservedMigration], key: Callable[[ObservedMigration], str] | None = None
) -> int:
    """Return how many of these migrations were under way at once, at most.

    Args:
        migrations: The migrations.
        key: If given, count within groups of equal key, and return the greatest count.
    """
    return max(_concurrent(migrations, key or (lambda _: "")).values(), default=0)


def max_concurrent_per_source(migrations: Iterable[ObservedMigration]) -> dict[str, int]:
    """Return, by source, how many migrations it had under way at once, at most."""
    return _concurrent(migrations, lambda migration: migration.source)


def max_concurrent_per_target(migrations: Iterable[ObservedMigration]) -> dict[str, int]:
    """Return, by target, how many migrations it had under way at once, at most."""
    return _concurrent(migrations, lambda migration: migration.target)


def _concurrent(migrations: Iterable[ObservedMigration], key: Callable[[ObservedMigration], str]) -> dict[str, int]:
    # Ends sort before begins of the same moment: one that begins as another ends does not overlap with it.
    steps = sorted(
        step
        for migration in migrations
        for step in ((migration.began_at, 1, key(migration)), (migration.ended_at, -1, key(migration)))
    )
    now: dict[str, int] = {}
    most: dict[str, int] = {}
    for _, change, group in steps:
        now[group] = now.get(group, 0) + change
        most[group] = max(most.get(group, 0), now[group])
    return most
