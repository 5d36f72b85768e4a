"""Where one VM may run: filters that say why a node is refused, then a score.

The score is the share of CPU reserved after the VM has come; the lowest wins, names break ties.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.planner.snapshot import NodeState


@dataclass(frozen=True, slots=True)
class Demand:
    """What a VM needs of a node.

    Attributes:
        memory_mib: With QEMU's overhead.
        labels: That the node must have.
        node_name: The only node allowed, or empty.
        exclude: Nodes that are out of the question (its own), with the reason.
        avoid: Nodes taken only when nothing else is left.
        inbound: Migrations that the node may receive at a time, this one included; 0 means no limit.
    """

    memory_mib: int
    cpu_millicores: int
    labels: Mapping[str, str]
    node_name: str = ""
    exclude: Mapping[str, str] | None = None
    avoid: frozenset[str] = frozenset()
    inbound: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """The node chosen, or None; and why other nodes were refused, by name.

    Attributes:
        full: How many nodes fit, and receive as many migrations as they may.
    """

    node: str | None
    refused: Mapping[str, str]
    full: int = 0

    def explain(self) -> str:
        """Say it as `0/3 nodes: 1 cordoned, 2 with less than 512 MiB memory free`."""
        counts = Counter(self.refused.values())
        parts = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        fitting = 0 if self.node is None else 1
        return f"{fitting}/{len(self.refused) + fitting} nodes: {parts}" if parts else "there is no node"


def refusal(node: NodeState, demand: Demand) -> str:
    """Say why a node can't take the VM; empty when it can.

    The reason names what is demanded, not how much is missing here: equal reasons can be counted, and one does not
    change with each VM that comes or goes.
    """
    if demand.exclude and node.name in demand.exclude:
        return demand.exclude[node.name]
    if not node.ready:
        return "not Ready"
    if node.cordoned:
        return "cordoned"
    if demand.node_name and node.name != demand.node_name:
        return f"not node {demand.node_name}"
    missing = [f"{k}={v}" for k, v in sorted(demand.labels.items()) if node.labels.get(k) != v]
    if missing:
        return f"without label {', '.join(missing)}"
    if node.memory_used_mib + demand.memory_mib > node.memory_mib:
        return f"with less than {demand.memory_mib} MiB memory free"
    if node.cpu_used_millicores + demand.cpu_millicores > node.cpu_millicores:
        return f"with less than {demand.cpu_millicores} millicores CPU free"
    return ""


def choose_node(nodes: Mapping[str, NodeState], demand: Demand) -> Choice:
    """Choose the node on which the least share of CPU is reserved afterwards.

    Args:
        nodes: By name.
        demand: Memory and CPU in MiB and millicores.

    Returns:
        The choice, with a reason for every node that was refused.
    """
    refused: dict[str, str] = {}
    best: tuple[bool, float, str] | None = None
    full = 0
    for name in sorted(nodes):
        node = nodes[name]
        reason = refusal(node, demand)
        if reason:
            refused[name] = reason
            continue
        if demand.inbound and node.inbound >= demand.inbound:
            full += 1
            continue
        share = (node.cpu_used_millicores + demand.cpu_millicores) / max(node.cpu_millicores, 1)
        rank = (name in demand.avoid, share, name)
        if best is None or rank < best:
            best = rank
    return Choice(best[2] if best else None, refused, full)
