"""What emptying nodes will come to: where each VM goes, in which order, how long it takes, and what finds no place.

The order is that of the grants themselves (`by_remaining_work`). A source sends one VM at a time, so no drain is done
before its fullest node is: whenever a slot is free, the node with the most left to send goes first, and of one node the
largest VM. That keeps the whole near its lower bound, the larger of what the fullest node has to send and what all have
to send together over the herd's slots.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import MappingProxyType

from orchestrator.planner.convergence import predict
from orchestrator.planner.draining import strategy_of
from orchestrator.planner.packing import place_all
from orchestrator.planner.preflight import copied_mib, immovable
from orchestrator.planner.snapshot import Snapshot
from orchestrator.resources import Key, Priority, VirtualMachine, VirtualMachineOperation
from orchestrator.resources.drain import NodeDrain, Strategy, VmState

_NONE: frozenset[Key] = frozenset()


@dataclass(frozen=True, slots=True)
class Job:
    """One migration as it is foreseen.

    Attributes:
        seconds: That it takes.
    """

    vm: Key
    source: str
    target: str
    memory_mib: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Planned:
    """A job, and when it runs: seconds from the beginning; `after` those that it needs to have ended."""

    job: Job
    begins_s: float
    ends_s: float
    after: frozenset[Key] = frozenset()


@dataclass(frozen=True, slots=True)
class DrainPlan:
    """What emptying nodes comes to.

    Attributes:
        moves: In the order in which they begin.
        without_place: VMs for which the rest of the herd has no place, with the reason: the plan can't be carried out.
        stay: VMs that can't migrate, and for which the drain will wait, with the reason.
        shut_down: VMs that can't leave otherwise and may be powered off, with the reason.
    """

    moves: tuple[Planned, ...] = ()
    without_place: Mapping[Key, str] = field(default_factory=dict)
    stay: Mapping[Key, str] = field(default_factory=dict)
    shut_down: Mapping[Key, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """When the last move ends."""
        return max((move.ends_s for move in self.moves), default=0.0)

    def problem(self) -> str:
        """Say what is missing; empty when all have a place."""
        if not self.without_place:
            return ""
        named = ", ".join(f"{key.partition('/')[2]} ({why})" for key, why in self.without_place.items())
        return f"the rest of the herd has no place for {len(self.without_place)} VMs: {named}"


def plan_drain(
    snapshot: Snapshot,
    vms: Iterable[VirtualMachine],
    *,
    away: frozenset[str],
    bandwidth_mib_s: float,
    besides: Iterable[VirtualMachine] = (),
) -> DrainPlan:
    """Plan how nodes are emptied.

    Args:
        snapshot: With all residents.
        vms: That are to leave.
        away: The nodes that are being emptied: nothing lands there.
        bandwidth_mib_s: As measured in migrations before, or the cap on one.
        besides: VMs that leave other nodes meanwhile: they have to find their place too, and are not told of.
    """
    wanted = {vm.key: vm for vm in vms}
    others = {vm.key: vm for vm in besides if vm.key not in wanted}
    movable = [vm for vm in (*wanted.values(), *others.values()) if immovable(vm) is None]
    placed = place_all(snapshot, movable, excluded=away)
    tied = {key: f"{tie[1]} ({tie[0]})" for key, vm in wanted.items() if (tie := immovable(vm)) is not None}
    stranded = {key: why for key, why in placed.stranded.items() if key in wanted}
    off = {key: why for key, why in {**tied, **stranded}.items() if strategy_of(wanted[key]) is Strategy.SHUT_DOWN}
    jobs = [_job(wanted[key], target, bandwidth_mib_s) for key, target in placed.targets.items() if key in wanted]
    cap = sum(node.schedulable and node.name not in away for node in snapshot.nodes.values())
    limits = snapshot.limits
    return DrainPlan(
        moves=schedule(
            jobs, outbound=limits.outbound_per_node, inbound=limits.inbound_per_node, cap=cap, after=placed.after
        ),
        without_place={key: why for key, why in sorted(stranded.items()) if key not in off},
        stay={key: why for key, why in sorted(tied.items()) if key not in off},
        shut_down=dict(sorted(off.items())),
    )


def _job(vm: VirtualMachine, target: str, bandwidth_mib_s: float) -> Job:
    memory_mib = vm.running_spec.memory_mib
    foreseen = predict(memory_mib, None, bandwidth_mib_s, disks_mib=copied_mib(vm))
    return Job(vm.key, vm.status.node_name, target, memory_mib, foreseen.duration_s or 0.0)


def schedule(
    jobs: Sequence[Job],
    *,
    outbound: int,
    inbound: int,
    cap: int,
    after: Mapping[Key, frozenset[Key]] = MappingProxyType({}),
) -> tuple[Planned, ...]:
    """Foresee when each job runs, if each that may begin does so at once.

    Args:
        jobs: In any order.
        outbound: That may leave a node at a time, >= 1.
        inbound: That may reach one; 0: any number.
        cap: That may run in the herd, >= 1 where there is a job.
        after: By VM, those whose jobs have to end before its own begins; in no ring.

    Returns:
        All of them, in the order in which they begin.
    """
    waiting: dict[str, list[Job]] = defaultdict(list)
    work: Counter[str] = Counter()
    for job in sorted(jobs, key=lambda job: (job.memory_mib, job.vm)):
        waiting[job.source].append(job)  # the largest is at the end
        work[job.source] += max(1, round(job.seconds * 1000))
    leaving: Counter[str] = Counter()
    reaching: Counter[str] = Counter()
    running: list[tuple[float, int, Job]] = []
    planned: list[Planned] = []
    to_end = {job.vm for job in jobs}
    needs = {vm: others & to_end for vm, others in after.items()}
    numbers, now = count(), 0.0
    while running or any(waiting.values()):
        for source in sorted((s for s, left in waiting.items() if left), key=lambda s: (-work[s], s)):
            while len(running) < max(cap, 1) and leaving[source] < outbound:
                free = [j for j in waiting[source] if not inbound or reaching[j.target] < inbound]
                free = [j for j in free if needs.get(j.vm, _NONE).isdisjoint(to_end)]
                if not free:
                    break
                job = free[-1]
                waiting[source].remove(job)
                work[source] -= max(1, round(job.seconds * 1000))
                leaving[source] += 1
                reaching[job.target] += 1
                planned.append(Planned(job, now, now + job.seconds, needs.get(job.vm, _NONE)))
                heapq.heappush(running, (now + job.seconds, next(numbers), job))
            if len(running) >= max(cap, 1):
                break
        now, _, ended = heapq.heappop(running)
        to_end.discard(ended.vm)
        leaving[ended.source] -= 1
        reaching[ended.target] -= 1
    return tuple(planned)


def by_remaining_work(
    pending: Sequence[VirtualMachineOperation], vms: Mapping[Key, VirtualMachine]
) -> tuple[VirtualMachineOperation, ...]:
    """Give pending operations in the order of service: the node with the most left to send goes first.

    Only operations of maintenance change places among each other, and those of one node keep their order. What moves
    nothing (a restart of a VM that can't migrate) goes before them: it takes no slot.

    Args:
        pending: By priority, and within one by arrival.
        vms: Theirs, as far as there are any.
    """
    left: Counter[str] = Counter()
    for operation in pending:
        if operation.priority is Priority.MAINTENANCE and operation.spec.type.is_migration:
            vm = vms.get(Key(operation.vm_key))
            if vm is not None:
                left[vm.status.node_name] += vm.running_spec.memory_mib
    if len(left) <= 1:
        return tuple(pending)

    def rank(operation: VirtualMachineOperation) -> tuple[int, int, int]:
        vm = vms.get(Key(operation.vm_key))
        if operation.priority is not Priority.MAINTENANCE or vm is None:
            return operation.priority, 0, operation.created_version
        moves = operation.spec.type.is_migration
        return operation.priority, -left[vm.status.node_name] if moves else -(2**62), operation.created_version

    return tuple(sorted(pending, key=rank))


def lower_bound_s(jobs: Iterable[Job], *, outbound: int, cap: int) -> float:
    """Give the time below which no order of these jobs comes: what the fullest source sends, or all over the slots."""
    by_source: defaultdict[str, float] = defaultdict(float)
    for job in jobs:
        by_source[job.source] += job.seconds
    if not by_source:
        return 0.0
    return max(max(by_source.values()) / outbound, sum(by_source.values()) / max(cap, 1))


def measured_rate_mib_s(operations: Iterable[VirtualMachineOperation]) -> float | None:
    """Give the rate at which migrations moved guests so far, MiB of guest a second; None before the first has ended.

    Each counts from its begin to its end: what goes on between the hosts' jobs counts too.
    """
    mib = seconds = 0.0
    for operation in operations:
        status, grant_free = operation.status, operation.status.grant is None
        if not grant_free or status.started_at is None or status.finished_at is None or status.outcome is None:
            continue
        mib += status.outcome.transferred_mib
        seconds += (status.finished_at - status.started_at).total_seconds()
    return mib / seconds if mib > 0 and seconds > 0 else None


def eta_s(drain: NodeDrain, operations: Mapping[str, VirtualMachineOperation]) -> float | None:
    """Foresee when a drain ends, from the rates measured in it; None where that can't be said.

    Args:
        drain: That is open.
        operations: Those that it names, by name.
    """
    left = drain.left().values()
    if any(vm.state is not VmState.MOVING for vm in left):
        return None  # something is waited for, and nobody knows for how long
    moved = [(vm, operations[vm.operation]) for vm in drain.vms.values() if vm.operation in operations and vm.moved]
    mib = seconds = 0.0
    for vm, operation in moved:
        began, ended = operation.status.started_at, operation.status.finished_at
        if began is not None and ended is not None:
            mib += vm.memory_mib
            seconds += (ended - began).total_seconds()
    if mib <= 0 or seconds <= 0:
        return None
    done = sum(
        vm.memory_mib * operations[vm.operation].status.progress / 100 for vm in left if vm.operation in operations
    )
    return max(0.0, (sum(vm.memory_mib for vm in left) - done) * seconds / mib)
