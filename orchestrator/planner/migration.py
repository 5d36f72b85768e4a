"""Which pending operations may begin now, and where they go.

Order: by priority, and first come within one. An operation whose own way is blocked (its source sends already) lets
others pass that take another way; it never lets one pass that would take the very slot it waits for, since each slot
goes to the first in order that can use it.

The plan respects the limits, and the store's commit checks them again in Redis: a plan from an old snapshot is refused
there, never wrong.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from orchestrator.planner.placement import Demand, choose_node
from orchestrator.planner.snapshot import NodeState, Snapshot
from orchestrator.resources import (
    Key,
    OperationType,
    Reason,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
)


@dataclass(frozen=True, slots=True)
class Go:
    """Grant this operation: `node` executes it, the VM is to run on `target`."""

    operation: VirtualMachineOperation
    vm: VirtualMachine
    node: str
    target: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now; `reason` and `message` are for the operation's condition."""

    operation: VirtualMachineOperation
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Fail:
    """Never: the operation can't be done any more."""

    operation: VirtualMachineOperation
    reason: Reason
    message: str


Decision = Go | Wait | Fail


def plan_grants(snapshot: Snapshot) -> Iterator[Decision]:
    """Decide on each pending operation, in order.

    Args:
        snapshot: Its `pending` in the order of service.

    Yields:
        One decision an operation. Those of one plan respect the limits taken together.
    """
    nodes = dict(snapshot.nodes)
    migrating, cap = snapshot.migrating, snapshot.cap
    for operation in snapshot.pending:
        decision = _decide(snapshot, nodes, (migrating, cap), operation)
        if isinstance(decision, Go):
            migrates = operation.spec.type.is_migration
            migrating += migrates
            _take(nodes, decision, snapshot.memory_overhead_mib, migrates=migrates)
        yield decision


def _decide(
    snapshot: Snapshot, nodes: dict[str, NodeState], slots: tuple[int, int], operation: VirtualMachineOperation
) -> Decision:
    vm = snapshot.vms.get(Key(operation.vm_key))
    if vm is None:
        return Fail(operation, Reason.VIRTUAL_MACHINE_NOT_FOUND, f"VirtualMachine {operation.vm_key!r} is gone")
    if operation.spec.type is OperationType.START:
        return _decide_start(snapshot, nodes, operation, vm)
    return _decide_migration(snapshot, nodes, slots, operation, vm)


def _decide_start(
    snapshot: Snapshot, nodes: dict[str, NodeState], operation: VirtualMachineOperation, vm: VirtualMachine
) -> Decision:
    if vm.status.phase is VmPhase.STOPPING:
        return Wait(operation, Reason.NOT_READY, f"waits until {vm.name} is Stopped (it is Stopping)")
    if vm.status.phase.occupies_node and vm.status.phase is not VmPhase.STARTING:
        return Fail(operation, Reason.NOT_APPLICABLE_FOR_PHASE, f"{vm.name} is {vm.status.phase} already")
    if waiting := _holds(snapshot, operation, vm):
        return waiting
    choice = choose_node(nodes, _demand(snapshot, operation, vm))
    if choice.node is None:
        return Wait(operation, Reason.TARGET_UNSCHEDULABLE, choice.explain())
    return Go(operation, vm, choice.node, choice.node)


def _decide_migration(
    snapshot: Snapshot,
    nodes: dict[str, NodeState],
    slots: tuple[int, int],
    operation: VirtualMachineOperation,
    vm: VirtualMachine,
) -> Decision:
    """Decide on a migration; `slots` are the herd's: taken, and cap."""
    source = vm.status.node_name
    migrating, cap = slots
    if vm.status.phase is not VmPhase.RUNNING:
        if vm.status.phase is VmPhase.STOPPED:
            return Fail(operation, Reason.NOT_APPLICABLE_FOR_PHASE, f"{vm.name} is Stopped, only a Running VM migrates")
        return Wait(operation, Reason.NOT_READY, f"waits until {vm.name} is Running (it is {vm.status.phase})")
    if waiting := _holds(snapshot, operation, vm):
        return waiting
    if source not in nodes or not nodes[source].ready:
        return Wait(operation, Reason.NOT_READY, f"waits for node {source}, which is not Ready")
    # Slots before nodes: who queues is not unschedulable, and most of a long queue is answered without a look at nodes.
    limits = snapshot.limits
    if nodes[source].outbound >= limits.outbound_per_node:
        return Wait(operation, Reason.MIGRATION_PENDING, f"waits for the outbound slot of node {source}")
    if 0 < cap <= migrating:
        return Wait(operation, Reason.MIGRATION_PENDING, "waits for one of the herd's migration slots")
    choice = choose_node(nodes, _demand(snapshot, operation, vm, {source: "where it runs"}))
    if choice.node is None and choice.full:
        return Wait(operation, Reason.MIGRATION_PENDING, "waits for the inbound slot of a node that fits")
    if choice.node is None:
        return Wait(operation, Reason.TARGET_UNSCHEDULABLE, choice.explain())
    return Go(operation, vm, source, choice.node)


def _holds(snapshot: Snapshot, operation: VirtualMachineOperation, vm: VirtualMachine) -> Wait | None:
    not_before = operation.status.not_before
    if not_before is not None and snapshot.now < not_before:
        return Wait(operation, Reason.NOT_READY, operation.message or "waits before it tries again")
    if vm.key in snapshot.busy:
        return Wait(operation, Reason.OTHER_MIGRATION_IN_PROGRESS, snapshot.busy[vm.key])
    return None


def _demand(
    snapshot: Snapshot,
    operation: VirtualMachineOperation,
    vm: VirtualMachine,
    exclude: dict[str, str] | None = None,
) -> Demand:
    migrate = operation.spec.migrate
    is_migration = operation.spec.type.is_migration
    return Demand(
        memory_mib=vm.spec.memory_mib + snapshot.memory_overhead_mib,
        cpu_millicores=vm.spec.cpu_millicores,
        labels={**vm.spec.node_selector, **(migrate.node_selector if migrate else {})},
        node_name=migrate.node_name if migrate else "",
        exclude=exclude,
        avoid=frozenset(operation.status.avoid),
        inbound=snapshot.limits.inbound_per_node if is_migration else 0,
    )


def _take(nodes: dict[str, NodeState], go: Go, overhead_mib: int, *, migrates: bool) -> None:
    target = nodes[go.target]
    nodes[go.target] = replace(
        target,
        memory_used_mib=target.memory_used_mib + go.vm.spec.memory_mib + overhead_mib,
        cpu_used_millicores=target.cpu_used_millicores + go.vm.spec.cpu_millicores,
        inbound=target.inbound + migrates,
    )
    if migrates:
        source = nodes[go.node]
        nodes[go.node] = replace(source, outbound=source.outbound + 1)
