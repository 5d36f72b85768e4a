"""Small herds for property tests of the planner, and what the rules mean for them, written straight from the words.

Everything here is decided from scratch at each question, by looking at all VMs: slow, short, and independent of how the
planner counts. An arrangement says on which node each VM is.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from orchestrator.planner.snapshot import Snapshot
from orchestrator.resources import Key
from orchestrator.resources.scheduling import Taint, TaintEffect
from tests.builders import a_node_state, a_snapshot, a_vm

HOST = "kubernetes.io/hostname"
ZONE = "zone"
GIB = 1024
CORE = 1000
Arrangement = dict[str, str]


@dataclass(frozen=True)
class SmallNode:
    cores: int
    gib: int
    zone: str = ""
    disk: str = ""
    tainted: bool = False
    is_open: bool = True


@dataclass(frozen=True)
class SmallVm:
    """`apart`, `near`: pairs of a topology and an app; `spread`: of a topology and a skew, over its own app."""

    cores: int
    gib: int
    app: str = ""
    disk: str = ""
    tolerates: bool = False
    apart: tuple[tuple[str, str], ...] = ()
    near: tuple[tuple[str, str], ...] = ()
    spread: tuple[tuple[str, int], ...] = ()


@dataclass
class SmallHerd:
    nodes: dict[str, SmallNode]
    vms: dict[str, SmallVm]
    at: Arrangement
    pinned: frozenset[str] = field(default_factory=frozenset)

    # What the rules mean ----------------------------------------------------------------------------------------------

    def place(self, node: str, topology: str) -> str | None:
        return node if topology == HOST else (self.nodes[node].zone or None)

    def suits(self, vm: str, node: str) -> bool:
        wanted, host = self.vms[vm], self.nodes[node]
        return (not wanted.disk or wanted.disk == host.disk) and (wanted.tolerates or not host.tainted)

    def holds(self, vm: str, node: str, at: Arrangement) -> bool:
        """Whether all rules are for a VM on a node, were all others where they are."""
        me, others = self.vms[vm], {other: where for other, where in at.items() if other != vm}
        if not self.suits(vm, node):
            return False
        for other, where in others.items():
            pairs = [(topology, app, self.vms[other].app) for topology, app in me.apart]
            pairs += [(topology, app, me.app) for topology, app in self.vms[other].apart]
            for topology, asked, shown in pairs:
                place = self.place(node, topology)
                if asked == shown and place is not None and place == self.place(where, topology):
                    return False
        for topology, _ in me.near:
            if self.place(node, topology) is None:
                return False
        company = [o for o in others if all(self.vms[o].app == app for _, app in me.near)]
        if me.near and (company or {app for _, app in me.near} != {me.app}):
            for topology in {topology for topology, _ in me.near}:
                if not any(self.place(others[o], topology) == self.place(node, topology) for o in company):
                    return False
        return all(self._is_even(vm, node, others, topology, skew) for topology, skew in me.spread)

    def _is_even(self, vm: str, node: str, others: Arrangement, topology: str, skew: int) -> bool:
        me = self.vms[vm]
        eligible = [n for n in self.nodes if not me.disk or self.nodes[n].disk == me.disk]
        counts = {place: 0 for n in eligible if (place := self.place(n, topology)) is not None}
        for other, where in others.items():
            place = self.place(where, topology)
            if self.vms[other].app == me.app and where in eligible and place is not None:
                counts[place] += 1
        here = self.place(node, topology)
        return here is not None and counts.get(here, 0) + 1 - min(counts.values(), default=0) <= skew

    def wrong(self, at: Arrangement) -> set[str]:
        return {vm for vm, node in at.items() if not self.holds(vm, node, at)}

    def used(self, node: str, at: Arrangement) -> tuple[int, int]:
        there = [self.vms[vm] for vm, where in at.items() if where == node]
        return sum(vm.cores for vm in there) * CORE, sum(vm.gib for vm in there) * GIB

    def is_over(self, node: str, at: Arrangement, percent: int = 80) -> bool:
        cores, gib = self.used(node, at)
        host = self.nodes[node]
        return cores > host.cores * CORE * percent // 100 or gib > host.gib * GIB * percent // 100

    def over(self, at: Arrangement) -> set[str]:
        return {name for name, node in self.nodes.items() if node.is_open and self.is_over(name, at)}

    def is_legal(self, vm: str, node: str, at: Arrangement, *, percent: int = 100) -> bool:
        if at[vm] == node or vm in self.pinned or not self.nodes[node].is_open or not self.holds(vm, node, at):
            return False
        after = {**at, vm: node}
        return not self.is_over(node, after, percent) and self.wrong(after) - {vm} <= self.wrong(at)

    def may_land(self, vm: str, node: str, at: Arrangement) -> bool:
        """Whether a VM that has to leave its node may go to another: others' wish for its company does not hold it."""
        after = {**at, vm: node}
        return self.nodes[node].is_open and self.holds(vm, node, at) and not self.is_over(node, after, 100)

    def drained(self, random: Random) -> tuple["SmallHerd", list[str]]:
        """Cordon one node or two of it, with VMs that may all be moved; gives the VMs that are to leave, too."""
        away = random.sample(sorted(self.nodes), k=min(len(self.nodes) - 1, random.choice([1, 1, 2])))
        nodes = {name: replace(node, is_open=node.is_open and name not in away) for name, node in self.nodes.items()}
        return SmallHerd(nodes, self.vms, self.at), [vm for vm in self.vms if self.at[vm] in away]

    # What can be reached ----------------------------------------------------------------------------------------------

    def successors(self, at: Arrangement, percent: int) -> Iterator[tuple[str, str]]:
        for vm in self.vms:
            for node in self.nodes:
                if self.is_legal(vm, node, at, percent=percent):
                    yield vm, node

    def optimum_gib(self, *, most: int) -> int | None:
        """The least GiB of any sequence of legal moves to an arrangement with nothing wrong and no node over.

        Moves land below the thresholds. None: there is no such sequence.

        Raises:
            TooLarge: More than so many arrangements would have to be looked at.
        """

        def is_goal(at: Arrangement) -> bool:
            return not self.over(at) and not self.wrong(at)

        return self._cheapest(is_goal, 80, most)

    def can_repair(self, vm: str, *, most: int) -> bool:
        """Whether some sequence of legal moves brings a VM to where it may be."""
        return self._cheapest(lambda at: self.holds(vm, at[vm], at), 100, most) is not None

    def _cheapest(self, is_goal: Any, percent: int, most: int) -> int | None:
        start = tuple(sorted(self.at.items()))
        best = {start: 0}
        heap = [(0, start)]
        looked = 0
        while heap:
            cost, state = heapq.heappop(heap)
            if cost > best[state]:
                continue
            looked += 1
            if looked > most:
                raise TooLarge
            at = dict(state)
            if is_goal(at):
                return cost
            for vm, node in self.successors(at, percent):
                after = tuple(sorted({**at, vm: node}.items()))
                reached = cost + self.vms[vm].gib
                if reached < best.get(after, reached + 1):
                    best[after] = reached
                    heapq.heappush(heap, (reached, after))
        return None

    # As the planner sees it -------------------------------------------------------------------------------------------

    def snapshot(self, at: Arrangement | None = None) -> Snapshot:
        at = self.at if at is None else at
        nodes = []
        for name, node in self.nodes.items():
            cores, gib = self.used(name, at)
            labels = {"zone": node.zone, "disk": node.disk}
            nodes.append(
                a_node_state(
                    name,
                    cpu=node.cores * CORE,
                    memory_mib=node.gib * GIB,
                    cpu_used_millicores=cores,
                    memory_used_mib=gib,
                    cordoned=not node.is_open,
                    labels={key: value for key, value in labels.items() if value},
                    taints=(Taint(key="special", effect=TaintEffect.NO_SCHEDULE),) if node.tainted else (),
                )
            )
        vms = [
            a_vm(
                name,
                node=at[name],
                memory=f"{vm.gib}Gi",
                cores=vm.cores,
                labels={"app": vm.app} if vm.app else {},
                selector={"disk": vm.disk} if vm.disk else {},
                spec=_spec(vm),
            )
            for name, vm in self.vms.items()
        ]
        return a_snapshot(nodes, vms, busy={Key(f"default/{vm}"): "pinned" for vm in self.pinned})


class TooLarge(Exception):
    """More arrangements than a test has time for."""


def _spec(vm: SmallVm) -> dict[str, Any]:
    def terms(pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
        found = [{"topologyKey": key, "labelSelector": {"matchLabels": {"app": app}}} for key, app in pairs]
        return {"requiredDuringSchedulingIgnoredDuringExecution": found}

    spec: dict[str, Any] = {}
    if vm.apart or vm.near:
        spec["affinity"] = {
            "virtualMachineAndPodAntiAffinity": terms(vm.apart),
            "virtualMachineAndPodAffinity": terms(vm.near),
        }
    if vm.spread:
        spec["topologySpreadConstraints"] = [
            {
                "maxSkew": skew,
                "topologyKey": key,
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"app": vm.app}},
            }
            for key, skew in vm.spread
        ]
    if vm.tolerates:
        spec["tolerations"] = [{"key": "special", "operator": "Exists"}]
    return spec


def random_herd(random: Random, *, nodes: int = 4, vms: int = 8, with_rules: bool = True) -> SmallHerd:
    """A herd of so many at most; many of its nodes are over a threshold, and some of its rules are broken."""
    count = random.randint(2, nodes)
    hosts = {
        f"n{i}": SmallNode(
            cores=random.choice([8, 10, 16]),
            gib=random.choice([16, 32, 64]),
            zone=random.choice(["a", "b"]),
            disk=random.choice(["", "ssd"]),
            tainted=with_rules and random.random() < 0.1,
            is_open=random.random() < 0.95,
        )
        for i in range(count)
    }
    machines: dict[str, SmallVm] = {}
    at: Arrangement = {}
    crowded = random.choice(list(hosts))
    for i in range(random.randint(2, vms)):
        app = random.choice(["", "a", "b"])
        rules: dict[str, Any] = {}
        if with_rules and random.random() < 0.4:
            topology, other = random.choice([HOST, HOST, ZONE]), random.choice(["a", "b"])
            kind = random.choice(["apart", "apart", "near", "spread"])
            rules = {kind: ((topology, random.choice([1, 2])),) if kind == "spread" else ((topology, other),)}
            app = app or "a"
        vm = SmallVm(
            cores=random.choice([1, 2, 3, 4]),
            gib=random.choice([1, 2, 3, 4, 6, 8]),
            app=app,
            disk="ssd" if with_rules and random.random() < 0.1 else "",
            tolerates=random.random() < 0.3,
            **rules,
        )
        name = f"vm{i}"
        for _ in range(8):
            node = crowded if random.random() < 0.5 else random.choice(list(hosts))
            if not SmallHerd(hosts, {**machines, name: vm}, {}).is_over(node, {**at, name: node}, 100):
                machines[name], at[name] = vm, node
                break
    pinned = frozenset(name for name in machines if random.random() < 0.1)
    return SmallHerd(hosts, machines, at, pinned)
