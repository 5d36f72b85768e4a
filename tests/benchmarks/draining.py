"""Drains and a rolling maintenance of 1,000 nodes: how far the makespan lies above its lower bound.

In simulated time, in this one process, without Redis: the decisions are the product's own (`planner.draining`,
`planner.maintaining`, `planner.migration.plan_grants`, in the order of `planner.drain.by_remaining_work`), and a
migration takes its memory over the bandwidth, give or take a tenth, and what goes on between two jobs besides. The
lower bound knows nothing of the latter: it is the larger of what the fullest node has to send, and what all send over
the slots.
"""

import heapq
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count

from orchestrator.planner.drain import Job, by_remaining_work, lower_bound_s, plan_drain
from orchestrator.planner.draining import Scene, next_step
from orchestrator.planner.maintaining import STEADY, claimed, hook_ended, in_sight, next_maintenance
from orchestrator.planner.migration import Go, plan_grants
from orchestrator.planner.rules import Resident, resident
from orchestrator.planner.snapshot import Limits, NodeState, Snapshot
from orchestrator.resources import (
    Key,
    Maintenance,
    Node,
    NodeDrain,
    ObjectMeta,
    OperationPhase,
    Priority,
    VirtualMachine,
    VirtualMachineOperation,
)
from orchestrator.resources.drain import DrainPhase, DrainStatus
from orchestrator.resources.maintenance import MaintenancePhase, MaintenanceSpec, NodeStage
from orchestrator.services.herd import YET_TO_COME
from orchestrator.settings import FIVE_GBIT_IN_MIB_S
from tests.benchmarks.figures import Figure, Result
from tests.benchmarks.running import Bench
from tests.builders import NOW, a_node, a_node_state, a_vm, an_operation

NODES = 1_000
NODE_MIB = 262_144
SIZES_MIB = (1024, 2048, 4096, 4096, 8192, 8192, 16_384)
BETWEEN_S = 0.1
"""Between two jobs of a node; `emptying` measures 79 ms of it."""
HOOK_S = 120.0
PARALLEL = 50
_SEED = 1


@dataclass
class Model:
    """A herd in simulated time.

    Attributes:
        now: Seconds since its beginning.
        jobs: Migrations that were made.
        passes: Of `grant`, and the seconds of CPU that they took.
    """

    nodes: dict[str, NodeState]
    vms: dict[Key, VirtualMachine]
    chance: random.Random
    now: float = 0.0
    pending: dict[Key, VirtualMachineOperation] = field(default_factory=dict)
    done: dict[Key, VirtualMachineOperation] = field(default_factory=dict)
    running: dict[Key, Job] = field(default_factory=dict)
    drains: dict[str, NodeDrain] = field(default_factory=dict)
    on: defaultdict[str, set[Key]] = field(default_factory=lambda: defaultdict(set))
    residents: dict[Key, Resident] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    passes: int = 0
    planning_s: float = 0.0
    _operation_of: dict[Key, VirtualMachineOperation] = field(default_factory=dict)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: "count[int]" = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        for vm in self.vms.values():
            self.on[vm.status.node_name].add(vm.key)
            self.residents[vm.key] = resident(vm, None, (vm.status.node_name,))

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Have something done later."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), do))

    def run(self) -> float:
        """Let time pass until nothing is to come; gives when that is."""
        self.grant()
        while self._events:
            self.now = self._events[0][0]
            while self._events and self._events[0][0] <= self.now + 1e-9:
                heapq.heappop(self._events)[2]()
            self.grant()
        return self.now

    def drain(self, name: str) -> None:
        """Cordon a node, and have it emptied."""
        self.nodes[name] = replace(self.nodes[name], cordoned=True)
        at = NOW + timedelta(seconds=self.now)
        self.drains[name] = NodeDrain(metadata=ObjectMeta(name=name), status=DrainStatus(started_at=at))
        self.step(name)

    def uncordon(self, name: str) -> None:
        """Let VMs land there again."""
        self.nodes[name] = replace(self.nodes[name], cordoned=False)

    def step(self, name: str) -> None:
        """Look at a node's drain."""
        drain = self.drains[name]
        keys = {*self.on[name], *map(Key, drain.vms)}
        last = {str(key): operation for key in keys if (operation := self._operation_of.get(key)) is not None}
        scene = Scene(
            drain=drain,
            node=a_node(name, cordoned=self.nodes[name].cordoned),
            vms={key: self.vms[key] for key in keys},
            operations={key: operation for key, operation in last.items() if operation.key in self.pending},
            ended={key: self.done[o.key] for key, o in last.items() if o.key in self.done},
            inbound=(),
            shown=frozenset(),
            now=NOW + timedelta(seconds=self.now),
        )
        decided = next_step(scene)
        new = decided.drain
        for one in decided.begin:
            number = next(self._numbers)
            operation = an_operation(f"evacuation-{number}", one.vm.name, priority=Priority.MAINTENANCE)
            operation = operation.with_(created_version=number)
            self.pending[operation.key] = operation
            self._operation_of[one.vm.key] = operation
            vms = {**new.vms, one.vm.key: new.vms[one.vm.key].with_(operation=operation.name)}
            new = new.with_status(vms=vms)
        self.drains[name] = new

    def grant(self) -> None:
        """One pass of `grant`: what may begin does."""
        waiting = [o for key, o in self.pending.items() if key not in self.running]
        if not waiting:
            return
        began = time.process_time()
        vms = {Key(o.vm_key): self.vms[Key(o.vm_key)] for o in waiting}
        ordered = by_remaining_work(sorted(waiting, key=lambda o: (o.priority, o.created_version)), vms)
        for decision in plan_grants(self.snapshot(vms, ordered)):
            if isinstance(decision, Go):
                self._begin(decision)
        self.planning_s += time.process_time() - began
        self.passes += 1

    def snapshot(
        self, vms: Mapping[Key, VirtualMachine], pending: tuple[VirtualMachineOperation, ...] = ()
    ) -> Snapshot:
        """The herd as planners are shown it."""
        return Snapshot(
            now=NOW + timedelta(seconds=self.now),
            nodes=self.nodes,
            vms=vms,
            pending=pending,
            migrating=len(self.running),
            limits=Limits(outbound_per_node=1, inbound_per_node=1),
            residents=self.residents,
        )

    def admit(self, away: Iterable[str], candidate: str) -> str:
        """Say why a node can't be emptied besides those that are away, as `services.maintenances` does."""
        draining = {name for name, drain in self.drains.items() if drain.status.phase is DrainPhase.DRAINING}
        gone = {*away, *draining}
        plan = plan_drain(
            self.snapshot({}),
            [self.vms[key] for key in self.on[candidate]],
            away=frozenset({*gone, candidate}),
            bandwidth_mib_s=FIVE_GBIT_IN_MIB_S,
            besides=[self.vms[key] for name in gone for key in self.on[name]],
        )
        return plan.problem()

    def _begin(self, go: Go) -> None:
        memory_mib = go.vm.running_spec.memory_mib
        seconds = memory_mib / FIVE_GBIT_IN_MIB_S * self.chance.uniform(0.9, 1.1)
        job = Job(go.vm.key, go.node, go.target, memory_mib, seconds)
        self.running[go.operation.key] = job
        self.jobs.append(job)
        self._change(go.node, outbound=1)
        self._change(go.target, inbound=1, memory_mib=memory_mib, cpu=go.spec.cpu_millicores)
        self.after(seconds + BETWEEN_S, lambda: self._end(go, job))

    def _end(self, go: Go, job: Job) -> None:
        del self.running[go.operation.key]
        operation = self.pending.pop(go.operation.key)
        self.done[operation.key] = operation.with_status(phase=OperationPhase.COMPLETED, target_node=job.target)
        self._change(go.node, outbound=-1, memory_mib=-job.memory_mib, cpu=-go.spec.cpu_millicores)
        self._change(go.target, inbound=-1)
        vm = go.vm.with_status(node_name=job.target)
        self.vms[vm.key] = vm
        self.on[job.source].discard(vm.key)
        self.on[job.target].add(vm.key)
        self.residents[vm.key] = resident(vm, None, (job.target,))
        self.step(job.source)

    def _change(self, name: str, *, outbound: int = 0, inbound: int = 0, memory_mib: int = 0, cpu: int = 0) -> None:
        node = self.nodes[name]
        self.nodes[name] = replace(
            node,
            outbound=node.outbound + outbound,
            inbound=node.inbound + inbound,
            memory_used_mib=node.memory_used_mib + memory_mib,
            cpu_used_millicores=node.cpu_used_millicores + cpu,
        )


def make_model(vms_per_node: int, seed: int = _SEED) -> Model:
    """Make a herd of `NODES` nodes, each with up to twice as many VMs of various sizes."""
    chance = random.Random(seed)
    vms: dict[Key, VirtualMachine] = {}
    used: Counter[str] = Counter()
    for number in range(NODES):
        name = f"n{number:04}"
        for slot in range(chance.randint(0, 2 * vms_per_node)):
            size = chance.choice(SIZES_MIB)
            if used[name] + size > NODE_MIB:
                continue
            used[name] += size
            vm = a_vm(f"vm-{number:04}-{slot}", node=name, memory=f"{size}Mi")
            vms[vm.key] = vm
    counts = Counter(vm.status.node_name for vm in vms.values())
    nodes = {
        name: a_node_state(
            name,
            memory_mib=NODE_MIB,
            cpu_millicores=256_000,
            memory_used_mib=used[name],
            cpu_used_millicores=1000 * counts[name],
        )
        for name in (f"n{number:04}" for number in range(NODES))
    }
    return Model(nodes, vms, chance)


def drain_many(drained: int, vms_per_node: int) -> tuple[list[Figure], Model]:
    """Drain some nodes at once."""
    model = make_model(vms_per_node)
    for name in sorted(model.nodes)[:drained]:
        model.drain(name)
    makespan = model.run()
    bound = lower_bound_s(model.jobs, outbound=1, cap=NODES - drained)
    moved = Counter(job.vm for job in model.jobs)
    assert not any(model.on[name] for name in sorted(model.nodes)[:drained]), "a node is not empty"
    assert max(moved.values()) == 1, "a VM was moved twice"
    title = f"{drained} of {NODES} nodes, {len(model.jobs)} VMs"
    return _figures(title, makespan, bound, model), model


def rolling(vms_per_node: int) -> tuple[list[Figure], Model]:
    """A rolling maintenance of all nodes, `PARALLEL` at a time."""
    model = make_model(vms_per_node)
    names = sorted(model.nodes)
    spec = MaintenanceSpec(nodes=tuple(names), hook="true", parallel=PARALLEL)
    state = _Rolling(model, Maintenance(metadata=ObjectMeta(name="rolling"), spec=spec))
    state.look()
    makespan = model.run()
    assert state.maintenance.status.phase is MaintenancePhase.COMPLETED
    # What can't be done without: each VM leaves its node once, and each node has its hook.
    needed = dict.fromkeys(names, HOOK_S)
    first: set[Key] = set()
    for job in model.jobs:
        if job.vm not in first:
            first.add(job.vm)
            needed[job.source] += job.seconds
    title = f"all {NODES} nodes, {PARALLEL} at a time, a hook of {HOOK_S:.0f} s each"
    steady = STEADY.total_seconds()
    figures = _figures(title, makespan, _rolling_bound(needed, steady), model)
    figures.append(Figure(f"... without the {steady:.0f} s of Ready", makespan / _rolling_bound(needed, 0), "x"))
    figures.append(Figure("migrations for each VM (1 at least)", len(model.jobs) / len(model.vms), "x"))
    return figures, model


def _rolling_bound(needed: Mapping[str, float], besides: float) -> float:
    """The longest turn of a node, and all turns over the nodes that are away at a time."""
    turns = [seconds + besides for seconds in needed.values()]
    return max(*turns, sum(turns) / PARALLEL)


@dataclass
class _Rolling:
    model: Model
    maintenance: Maintenance
    _hooked: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Look at the maintenance, as reconcile does, and see to its hooks."""
        now = NOW + timedelta(seconds=self.model.now)
        while True:
            nodes = {name: self._node(name) for name in in_sight(self.maintenance)}
            decided = next_maintenance(self.maintenance, nodes, self.model.drains, self.model.admit, now)
            self.maintenance = decided.maintenance
            for name in decided.drain:
                self.model.drain(name)
            for name in decided.uncordon:
                self.model.uncordon(name)
            if not (decided.drain or decided.uncordon):
                break
        waiting = {n for n in self.maintenance.spec.nodes if self.maintenance.node(n).stage is NodeStage.WAITING}
        for name, node in self.model.nodes.items():
            if bool(node.taints) != (name in waiting):
                self.model.nodes[name] = replace(node, taints=(YET_TO_COME,) if name in waiting else ())
        for name in self.maintenance.away:
            if self.maintenance.node(name).stage is NodeStage.DRAINED and name not in self._hooked:
                self._hooked.add(name)
                self.maintenance = claimed(
                    self.maintenance, name, self._node(name), "bench", now, timedelta(seconds=10 * HOOK_S)
                )
                self.model.after(HOOK_S, lambda name=name: self._end(name))  # type: ignore[misc]
        if self.maintenance.is_open:
            self.model.after(2.0, self.look)  # reconcile's period

    def _node(self, name: str) -> Node:
        return _nodes(name, self.model.nodes[name].cordoned)

    def _end(self, name: str) -> None:
        now = NOW + timedelta(seconds=self.model.now)
        self.maintenance = hook_ended(self.maintenance, name, 0, "", now)


_KNOWN: dict[tuple[str, bool], Node] = {}


def _nodes(name: str, cordoned: bool) -> Node:
    if (name, cordoned) not in _KNOWN:
        _KNOWN[name, cordoned] = a_node(name, cordoned=cordoned)
    return _KNOWN[name, cordoned]


def _figures(title: str, makespan: float, bound: float, model: Model) -> list[Figure]:
    return [
        Figure(f"{title}: makespan", makespan, "s", "simulated"),
        Figure("lower bound", bound, "s", "simulated"),
        Figure("ratio", makespan / bound, "x", "aim: at most 1.05"),
        Figure("CPU of a pass of grant, on average", model.planning_s / model.passes * 1000, "ms", f"{model.passes}"),
    ]


def run(bench: Bench) -> Result:
    """Measure it."""
    result = Result("draining", f"drains and a rolling maintenance on {NODES} simulated nodes")
    steps: dict[str, Callable[[], tuple[list[Figure], Model]]] = {
        "a tenth of the nodes is drained": lambda: drain_many(NODES // 10, 8),
        "rolling maintenance": lambda: rolling(3),
    }
    for title, step in bench.track(steps.items(), len(steps), "draining"):
        figures, model = step()
        result.tables[title] = figures
        result.raw[title] = {"jobs": len(model.jobs), "seconds": model.now}
    return result
