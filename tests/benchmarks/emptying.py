"""Emptying a host of six guests: evicts at once against a shell loop of `virsh migrate`.

Both move the same guests from the same host, in the same order and to the same targets, with the same flags and
bandwidth, in one run on one lab, and take turns at being first. While the shell loop runs, vmherd stands by: its agents
report what happens behind its back, which takes the loop some milliseconds of CPU a guest.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from orchestrator.resources import VmPhase
from orchestrator.settings import FIVE_GBIT_IN_MIB_S
from tests.benchmarks.figures import Figure, Result, spread, typical
from tests.benchmarks.joblog import Job, JobLog
from tests.benchmarks.running import Bench
from tests.benchmarks.timeline import HerdLog, Moved, gap_stages
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.lab import Lab
from tests.lab.namespaces import LabError
from tests.waiting import wait_until

GUESTS = 6
SOURCE = "h1"
_TIMEOUT_S = 180.0
_QUIET_S = 1.0
"""A rest before each round, in which the reports of the one before are worked off."""


@dataclass(frozen=True, slots=True)
class Round:
    """One emptying.

    Attributes:
        seconds: From the first call to the end of the last one.
        jobs: As libvirt recorded them, in order.
        operations: By domain name; empty for the shell loop.
        began_at: Instant of the first call.
    """

    seconds: float
    jobs: list[Job]
    operations: Mapping[str, str]
    began_at: float

    @property
    def gaps_ms(self) -> list[float]:
        """From the end of each job to the begin of the next."""
        ended = [job.ended_at for job in self.jobs[:-1]]
        return [(job.began_at - end) * 1000 for job, end in zip(self.jobs[1:], ended, strict=True)]

    @property
    def jobs_s(self) -> float:
        """The time that the jobs themselves took."""
        return sum(job.ended_at - job.began_at for job in self.jobs)


def run(bench: Bench) -> Result:
    """Measure it."""
    bench.say(f"emptying: a lab of 3 hosts and {GUESTS} guests starts")
    with (
        Lab(hosts=3) as lab,
        # Only for the way back, which isn't measured: guests return from two hosts at once.
        LabHerd(lab, env={"VMHERD_INBOUND_PER_NODE": "2"}) as herd,
    ):
        guests = [lab.guest(f"guest-{number}", address=f"192.0.2.{100 + number}") for number in range(1, GUESTS + 1)]
        herd.start_guests(*((guest, SOURCE) for guest in guests))
        emptying = _Emptying(herd, guests)
        emptying.evict()  # to warm up, and not counted
        emptying.bring_back()
        ours: list[Round] = []
        theirs: list[Round] = []
        for number in bench.track(range(bench.rounds), bench.rounds, "emptying a host"):
            ours_first = number % 2 == 0
            for is_ours in (ours_first, not ours_first):
                # The first of all rounds is ours: it chooses the targets.
                (ours if is_ours else theirs).append(emptying.evict() if is_ours else emptying.loop())
                emptying.bring_back()
        return _result(lab, ours, theirs)


class _Emptying:
    """Empties the source, and fills it again."""

    def __init__(self, herd: LabHerd, guests: Sequence[Guest]) -> None:
        self.herd = herd
        self.guests = {guest.domain: guest for guest in guests}
        self.log = JobLog(herd.lab)
        self._targets: list[tuple[str, str]] = []

    def evict(self) -> Round:
        """Evict all guests at once, and wait for all."""
        time.sleep(_QUIET_S)
        cluster, began_at, began = self.herd.cluster, time.time(), time.monotonic()
        operations = {domain: cluster.evict(guest.name) for domain, guest in self.guests.items()}
        for operation in operations.values():
            operation.wait(_TIMEOUT_S)
        seconds = time.monotonic() - began
        for operation in operations.values():
            if operation.phase != "Completed":
                raise LabError(f"{operation.name} is {operation.phase}: {operation.message}")
        jobs = self._jobs(began_at)
        self._targets = [(job.domain, self._node(job.domain)) for job in jobs]
        keys = {domain: operation.resource.key for domain, operation in operations.items()}
        return Round(seconds, jobs, keys, began_at)

    def loop(self) -> Round:
        """Do the same by a shell loop, in the order and to the targets of the last evict."""
        time.sleep(_QUIET_S)
        flags = f"--live --p2p --undefinesource --bandwidth {FIVE_GBIT_IN_MIB_S}"
        lines = [
            f"virsh --quiet migrate {flags} {domain} {self.herd.lab.host(target).migration_uri}"
            for domain, target in self._targets
        ]
        began_at, began = time.time(), time.monotonic()
        self.herd.lab.host(SOURCE).run(["bash", "-ec", "\n".join(lines)], timeout=_TIMEOUT_S)
        seconds = time.monotonic() - began
        return Round(seconds, self._jobs(began_at), {}, began_at)

    def bring_back(self) -> None:
        """Move all guests to the source again; not measured."""
        cluster = self.herd.cluster
        wait_until(self._is_settled, 60, lambda: f"guests at {self._targets}: {self._states()}", interval=0.2)
        operations = [cluster.migrate(guest.name, SOURCE) for guest in self.guests.values()]
        for operation in operations:
            operation.wait(_TIMEOUT_S)
        wait_until(lambda: set(self._nodes().values()) == {SOURCE}, 60, "the guests are back")
        for guest in self.guests.values():
            guest.wait_ticks(1)

    def _is_settled(self) -> bool:
        vms = self.herd.cluster.vms()
        wanted = {domain.partition(".")[2]: target for domain, target in self._targets}
        return all(vm.status.phase is VmPhase.RUNNING and vm.status.node_name == wanted[vm.name] for vm in vms)

    def _states(self) -> list[tuple[str, str, str]]:
        return [(vm.name, vm.status.phase.value, vm.status.node_name) for vm in self.herd.cluster.vms()]

    def _nodes(self) -> dict[str, str]:
        return {vm.name: vm.status.node_name for vm in self.herd.cluster.vms()}

    def _node(self, domain: str) -> str:
        return self._nodes()[self.guests[domain].name]

    def _jobs(self, since: float) -> list[Job]:
        def all_of_them() -> list[Job] | None:
            jobs = [job for job in self.log.jobs(since) if job.host == SOURCE]
            return jobs if len(jobs) == len(self.guests) else None

        found = wait_until(all_of_them, 10, "libvirt's record of the jobs")
        assert found is not None
        return found


def _result(lab: Lab, ours: Sequence[Round], theirs: Sequence[Round]) -> Result:
    seconds, loop_seconds = [r.seconds for r in ours], [r.seconds for r in theirs]
    ratios = [one / other for one, other in zip(seconds, loop_seconds, strict=True)]
    result = Result("emptying", f"a host of {GUESTS} guests: evicts at once / a shell loop of virsh migrate")
    result.tables["wall time"] = [
        typical("vmherd: 6 x evict(), until all are Completed", seconds, "s"),
        typical("shell: 6 x virsh migrate", loop_seconds, "s"),
        Figure("ratio of the medians", median(seconds) / median(loop_seconds), "x", "aim: at most 1.05"),
        Figure("ratio, round by round (median)", median(ratios), "x", spread(ratios, "x")),
    ]
    result.tables["of that"] = [
        typical("vmherd: libvirt's six jobs together", [r.jobs_s for r in ours], "s"),
        typical("shell: libvirt's six jobs together", [r.jobs_s for r in theirs], "s"),
        typical("vmherd: between one job and the next", [gap for r in ours for gap in r.gaps_ms], "ms"),
        typical("shell: between one job and the next", [gap for r in theirs for gap in r.gaps_ms], "ms"),
        typical("vmherd: before the first job", [(r.jobs[0].began_at - r.began_at) * 1000 for r in ours], "ms"),
        typical("vmherd: after the last job", [_after_last(r) for r in ours], "ms"),
    ]
    log = HerdLog(lab.logs, ours[0].began_at)
    stages: dict[str, list[Figure]] = {}
    moved = [[Moved(r.operations[job.domain], job) for job in r.jobs] for r in ours]
    for one in moved:
        for figure in gap_stages(log, one):
            stages.setdefault(figure.name, []).append(figure)
    result.tables["vmherd between two jobs, stage by stage"] = [
        typical(name, [figure.value for figure in figures], "ms") for name, figures in stages.items()
    ]
    result.raw = {"vmherd": [_raw(one) for one in ours], "shell": [_raw(one) for one in theirs]}
    return result


def _raw(one: Round) -> dict[str, object]:
    jobs_s = [round(job.ended_at - job.began_at, 3) for job in one.jobs]
    return {"began_at": one.began_at, "seconds": one.seconds, "jobs_s": jobs_s, "gaps_ms": one.gaps_ms}


def _after_last(one: Round) -> float:
    return (one.began_at + one.seconds - one.jobs[-1].ended_at) * 1000
