"""Which VMs run on an outdated hypervisor, and which of them may move to a newer one now.

A VM's firmware is the QEMU that its process was started from: that of its node when it was started there, or arrived. A
package that is upgraded under a running guest does not change it; a restart, or a migration to a node with the newer
one, does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.planner.packing import place_all
from orchestrator.planner.preflight import immovable
from orchestrator.planner.snapshot import Snapshot
from orchestrator.resources import Condition, Key, Node, RunPolicy, VirtualMachine, VmPhase
from orchestrator.resources.node import HYPERVISOR_LABEL

UP_TO_DATE = "FirmwareUpToDate"


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest hypervisor of the herd.

    Attributes:
        version: As nodes tell it; empty where none tells one.
        nodes: Ready nodes that have it, by name.
        ready: How many nodes are Ready.
    """

    version: str
    nodes: tuple[str, ...]
    ready: int

    @property
    def is_common(self) -> bool:
        """Whether at least half of the nodes have it. Before that, all VMs would crowd onto the first ones."""
        return bool(self.nodes) and 2 * len(self.nodes) >= self.ready


def newest(nodes: Iterable[Node]) -> Newest:
    """Find the newest hypervisor among the nodes that are Ready."""
    ready = [node for node in nodes if node.is_ready]
    versions = {node.name: text for node in ready if (text := node.status.hypervisor.number)}
    best = max(versions.values(), key=number, default="")
    return Newest(best, tuple(sorted(n for n, v in versions.items() if number(v) == number(best))), len(ready))


def number(version: str) -> tuple[int, ...]:
    """Give a version so that it can be compared: `8.2.10` is newer than `8.2.9`."""
    return tuple(int(part) for part in version.split(".") if part)


def firmware_condition(vm: VirtualMachine, best: Newest) -> Condition:
    """Say whether a VM that runs does so on the newest hypervisor of the herd."""
    runs_on = vm.status.firmware
    if not runs_on or not best.version:
        text = "it was started before this was recorded, or its node does not tell its version"
        return Condition(type=UP_TO_DATE, status="Unknown", reason="FirmwareNotKnown", message=text)
    if number(runs_on) >= number(best.version):
        return Condition(type=UP_TO_DATE, status="True", reason="FirmwareUpToDate", message=f"QEMU {runs_on}")
    text = f"runs on QEMU {runs_on}; the newest is {best.version}"
    return Condition(type=UP_TO_DATE, status="False", reason="FirmwareOutOfDate", message=text)


def plan_updates(
    snapshot: Snapshot, vms: Iterable[VirtualMachine], best: Newest, held: frozenset[str], *, most: int
) -> Mapping[Key, str]:
    """Choose VMs that move to a node with the newest hypervisor now, with the node that they would find there.

    One that was asked for once for this version is not chosen again, whatever came of it.

    Args:
        snapshot: With all residents.
        vms: All of them.
        best: The newest hypervisor.
        held: VMs (keys) on which an operation is open.
        most: So many at most.
    """
    if most <= 0 or not best.is_common:
        return {}
    outdated = [vm for vm in sorted(vms, key=lambda vm: vm.key) if _is_outdated(vm, best) and vm.key not in held]
    others = frozenset(
        name for name, node in snapshot.nodes.items() if node.labels.get(HYPERVISOR_LABEL) != best.version
    )
    return dict(place_all(snapshot, outdated[:most], excluded=others).targets)


def _is_outdated(vm: VirtualMachine, best: Newest) -> bool:
    status = vm.status
    if status.phase is not VmPhase.RUNNING or vm.metadata.deletion_timestamp is not None or status.adoption is not None:
        return False
    if not status.firmware or number(status.firmware) >= number(best.version):
        return False
    if status.firmware_update == best.version or vm.spec.run_policy is RunPolicy.ALWAYS_OFF:
        return False
    return immovable(vm) is None
