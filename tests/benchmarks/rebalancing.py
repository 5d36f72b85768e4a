"""Plans of the rebalancer, beside Ganeti's hbal on the same clusters: CPU seconds, memory moved, and what comes of it.

No lab: clusters are made up, and only planned for. A third of the nodes have most of the VMs (`skew`), a tenth has just
been added (`newnodes`), VMs are anywhere (`random`), or likewise and a twentieth of the nodes is to be emptied
(`drain`). VMs are of 2 to 32 GiB with a vCPU for each 2 GiB; a tenth of them is in groups of three that stay apart.
hbal is single-threaded and asks for much as clusters grow, so it runs on the small ones only; it is given the same file
that its own users would make (`--ignore-dynu`: balance what is reserved).

Evening out is measured twice: with as much memory to be moved as hbal moved, and with as much as it likes. Nodes that
are to be emptied are so by the drain's plan first, which is counted with it.

The clusters are this module's own. VMHERD_BENCH_CLUSTERS names a program that makes others (`--nodes --vms --layout
--json FILE -o FILE`), to be run in their place.
"""

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import pstdev

from orchestrator.planner.capacity import plan_failures, single_failures
from orchestrator.planner.drain import plan_drain
from orchestrator.planner.rebalance import plan_rebalance
from orchestrator.planner.snapshot import Snapshot
from orchestrator.resources.rebalancing import RebalanceSpec
from orchestrator.settings import FIVE_GBIT_IN_MIB_S
from tests.benchmarks.figures import Figure, Result
from tests.benchmarks.running import Bench
from tests.builders import a_node_state, a_snapshot, a_vm, keep_apart

SIZES = ((20, 200), (50, 500), (100, 1000), (300, 3000), (1000, 10_000))
LAYOUTS = ("skew", "newnodes", "random", "drain")
WITH_HBAL = 50
"""Nodes of the largest cluster that hbal is given: at 100 it takes ten minutes."""
GIB = 1024
NODE_MIB, HOST_MIB, NODE_CPUS, CPU_RATIO = 128 * GIB, 4 * GIB, 64, 4
_MOST = 0.95
_UNBOUNDED = 2**20
_DISK_MIB = 10_000_000
_MOVE = re.compile(r"^\s*\d+\.\s+(\S+)\s+(\S+)\s+=>\s+(\S+)\s")


@dataclass
class Cluster:
    """A made-up cluster.

    Attributes:
        vms: By name: memory in MiB, vCPUs, the group that stays apart, and the node.
        closed: Nodes that are to be emptied.
    """

    nodes: list[str]
    vms: dict[str, tuple[int, int, str, str]] = field(default_factory=dict)
    closed: frozenset[str] = frozenset()

    def shares(self, moved: dict[str, str]) -> list[float]:
        """The share of memory that is reserved of each node that is not closed, with some VMs elsewhere."""
        used = dict.fromkeys(self.nodes, 0)
        for name, (memory, _, _, node) in self.vms.items():
            used[moved.get(name, node)] += memory
        return [mib / (NODE_MIB - HOST_MIB) for name, mib in used.items() if name not in self.closed]

    def after(self, moved: dict[str, str]) -> "Cluster":
        """Give it with some VMs elsewhere."""
        vms = {name: (*vm[:3], moved.get(name, vm[3])) for name, vm in self.vms.items()}
        return replace(self, vms=vms)

    def gib(self, moved: dict[str, str]) -> float:
        """What is sent if each VM goes to its last place once."""
        return sum(self.vms[name][0] for name, node in moved.items() if self.vms[name][3] != node) / GIB


def make(nodes: int, vms: int, layout: str, seed: int = 1) -> Cluster:
    """Make a cluster that fits; the same for the same arguments."""
    program = os.environ.get("VMHERD_BENCH_CLUSTERS")
    if program:
        return _made_by(program, nodes, vms, layout, seed)
    chance = random.Random(f"{nodes}/{vms}/{layout}/{seed}")
    cluster = Cluster([f"node{number:04d}" for number in range(nodes)])
    if layout == "drain":
        cluster.closed = frozenset(chance.sample(cluster.nodes, max(1, nodes // 20)))
    order = chance.sample(range(nodes), nodes)
    likely = [0.0] * nodes
    for rank, node in enumerate(order):
        likely[node] = {
            "skew": (rank + nodes / 10) ** -0.8,
            "newnodes": float(rank >= nodes // 10),
        }.get(layout, 1.0)
    used, groups = [0] * nodes, [set[str]() for _ in range(nodes)]
    for number in range(vms):
        gib = chance.choices((2, 4, 8, 16, 32), (30, 30, 20, 12, 8))[0]
        group = f"g{number // 3}" if number < vms // 10 // 3 * 3 else ""
        while True:
            node = chance.choices(range(nodes), likely)[0]
            if used[node] + gib * GIB <= _MOST * NODE_MIB - HOST_MIB and (not group or group not in groups[node]):
                break
        used[node] += gib * GIB
        groups[node].add(group)
        cluster.vms[f"vm{number:05d}"] = (gib * GIB, max(1, gib // 2), group, cluster.nodes[node])
    return cluster


def _made_by(program: str, nodes: int, vms: int, layout: str, seed: int) -> Cluster:
    with tempfile.TemporaryDirectory(prefix="vmherd-clusters-") as folder:
        file = Path(folder) / "cluster.json"
        sizes = ["--nodes", str(nodes), "--vms", str(vms), "--layout", layout, "--seed", str(seed)]
        command = [sys.executable, program, *sizes, "--json", str(file), "-o", str(file.with_suffix(".data"))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        made = json.loads(file.read_text())
    names = [node["name"] for node in made["nodes"]]
    found = {vm["name"]: (vm["mem"], vm["cpu"], vm["tag"].rpartition(":")[2], names[vm["node"]]) for vm in made["vms"]}
    return Cluster(names, found, frozenset(node["name"] for node in made["nodes"] if node["off"]))


def snapshot_of(cluster: Cluster) -> Snapshot:
    """Give it as the planner sees it."""
    memory, cpu = dict.fromkeys(cluster.nodes, 0), dict.fromkeys(cluster.nodes, 0)
    vms = []
    for name, (mib, cpus, group, node) in cluster.vms.items():
        memory[node] += mib
        cpu[node] += cpus * 1000
        rules = {"labels": {"group": group}, "spec": keep_apart(group=group)} if group else {}
        vms.append(a_vm(name, node=node, memory=f"{mib}Mi", cores=cpus, **rules))  # type: ignore[arg-type]
    states = [
        a_node_state(
            name,
            memory_mib=NODE_MIB - HOST_MIB,
            cpu=NODE_CPUS * CPU_RATIO * 1000,
            memory_used_mib=memory[name],
            cpu_used_millicores=cpu[name],
            cordoned=name in cluster.closed,
        )
        for name in cluster.nodes
    ]
    return a_snapshot(states, vms)


def write_for_hbal(cluster: Cluster, file: Path) -> None:
    """Write it in the text form of Ganeti's htools, one empty line between its parts."""
    uuid, used, there = "fake-uuid-01", dict.fromkeys(cluster.nodes, 0), dict.fromkeys(cluster.nodes, 0)
    for mib, _, _, node in cluster.vms.values():
        used[node] += mib
        there[node] += 1
    policy = "|128,1,1024,1,1,1|128,1,1024,1,1,1;1048576,64,10485760,16,8,12|"
    policy += f"diskless,file,sharedfile,plain,blockdev,drbd,rbd,ext|{CPU_RATIO}.0|32.0"
    parts = [
        [f"group-01|{uuid}|preferred||"],
        [
            f"{name}|{NODE_MIB}|{HOST_MIB}|{NODE_MIB - HOST_MIB - used[name]}|"
            f"{_DISK_MIB}|{_DISK_MIB - 20_480 * there[name]}|{NODE_CPUS}|"
            f"{'Y' if name in cluster.closed else 'N'}|{uuid}|1"
            for name in cluster.nodes
        ],
        [
            f"{name}|{mib}|20480|{cpus}|running|Y|{node}||ext|{'svc:' + group if group else ''}|1"
            for name, (mib, cpus, group, node) in cluster.vms.items()
        ],
        ["htools:iextags:svc"],
        [policy],
    ]
    file.write_text("\n\n".join("\n".join(part) for part in parts) + "\n")


def run_hbal(cluster: Cluster) -> tuple[dict[str, str], float, int]:
    """Let hbal balance it; gives where VMs end, CPU seconds, and the number of moves."""
    with tempfile.TemporaryDirectory(prefix="vmherd-hbal-") as folder:
        file = Path(folder) / "cluster.data"
        write_for_hbal(cluster, file)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            ["hbal", "-t", str(file), "--ignore-dynu", "-v", "-v"], capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = [match for line in done.stdout.splitlines() if (match := _MOVE.match(line))]
    moved = {match[1]: match[3].partition(":")[0] for match in found}
    return moved, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, len(found)


def run_ours(cluster: Cluster, policy: RebalanceSpec) -> tuple[dict[str, str], float, int, float]:
    """Plan for it; gives where VMs end, CPU seconds, the number of moves, and the GiB that they send."""
    moved: dict[str, str] = {}
    took, count = 0.0, 0
    if cluster.closed:
        snapshot = snapshot_of(cluster)
        vms = [vm for vm in snapshot.vms.values() if vm.status.node_name in cluster.closed]
        began = time.process_time()
        drain = plan_drain(snapshot, vms, away=cluster.closed, bandwidth_mib_s=FIVE_GBIT_IN_MIB_S)
        took = time.process_time() - began
        assert not drain.problem(), drain.problem()
        moved = {move.job.vm.partition("/")[2]: move.job.target for move in drain.moves}
        count = len(drain.moves)
        policy = policy.with_(max_gib=max(int(policy.max_gib - cluster.gib(moved)), 1))
    snapshot = snapshot_of(cluster.after(moved))
    gib = cluster.gib(moved)
    began = time.process_time()
    plan = plan_rebalance(snapshot, policy)
    took += time.process_time() - began
    moved |= {move.vm.partition("/")[2]: move.target for move in plan.moves}
    return moved, took, count + len(plan.moves), gib + sum(move.cost_mib for move in plan.moves) / GIB


def run(bench: Bench) -> Result:
    """Measure it."""
    result = Result("rebalancing", "plans for made-up clusters, and hbal's for the same ones")
    if shutil.which("hbal") is None:
        bench.say("hbal is not here, and is left out: apt-get install ganeti-htools")
    for layout in LAYOUTS:
        for nodes, vms in bench.track(SIZES, len(SIZES), f"clusters, {layout}"):
            _measure(result, make(nodes, vms, layout), f"{nodes}/{vms} {layout}")
    return result


def _measure(result: Result, cluster: Cluster, title: str) -> None:
    figures = [_spread_of("before", cluster, {}, "")]
    budget = _UNBOUNDED
    if shutil.which("hbal") is not None and len(cluster.nodes) <= WITH_HBAL:
        moved, took, count = run_hbal(cluster)
        budget = int(cluster.gib(moved))
        figures.append(Figure("hbal: CPU", took, "s"))
        figures.append(_spread_of("hbal: after", cluster, moved, f"{count} moves, {cluster.gib(moved):,.0f} GiB"))
    even = RebalanceSpec(even_out=True, deadband_percent=0, max_moves=10_000, max_gib=_UNBOUNDED)
    runs = {
        "thresholds": even.with_(even_out=False),
        "evening out, as hbal": even.with_(max_gib=max(budget, 1)),
        "evening out": even,
    }
    for name, policy in runs.items():
        if name == "evening out, as hbal" and budget == _UNBOUNDED:
            continue
        moved, took, count, gib = run_ours(cluster, policy)
        figures.append(Figure(f"{name}: CPU", took, "s"))
        figures.append(_spread_of(f"{name}: after", cluster, moved, f"{count} moves, {gib:,.0f} GiB"))
    snapshot = snapshot_of(cluster)
    began = time.process_time()
    failures = plan_failures(snapshot, single_failures(snapshot))
    stranded = sum(bool(failure.stranded) for failure in failures.values())
    took = time.process_time() - began
    figures.append(Figure("each node lost once: CPU", took, "s", f"{stranded} would strand a VM"))
    result.tables[title] = figures
    result.raw[title] = {figure.name: figure.value for figure in figures}


def _spread_of(name: str, cluster: Cluster, moved: dict[str, str], note: str) -> Figure:
    shares = cluster.shares(moved)
    told = f"max {max(shares):.3f}" + (f", {note}" if note else "")
    return Figure(f"{name}: standard deviation of memory", pstdev(shares), "x", told)
