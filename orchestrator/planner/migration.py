"""Which pending operations may begin now, and where they go.

Order: by priority, and first come within one. An operation whose own way is blocked (its source sends already) lets
others pass that take another way; it never lets one pass that would take the very slot it waits for, since each slot
goes to the first in order that can use it.

The plan respects the limits, and the store's commit checks them again in Redis: a plan from an old snapshot is refused
there, never wrong.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import assert_never

from orchestrator.planner.convergence import PolicyConflict, throttles
from orchestrator.planner.neighbours import Neighbours
from orchestrator.planner.placement import Company, Demand, choose_node, class_obstacle, move_demand, start_demand
from orchestrator.planner.policy import has_crashed
from orchestrator.planner.preflight import (
    Target,
    find_target,
    home_of,
    immovable,
    known_needs,
    nodes_to_ask_ahead,
)
from orchestrator.planner.rules import resident
from orchestrator.planner.snapshot import NodeState, Snapshot
from orchestrator.resources import (
    Action,
    Key,
    OperationType,
    Priority,
    Reason,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
)
from orchestrator.resources.vm_spec import VirtualMachineSpec


@dataclass(frozen=True, slots=True)
class Go:
    """Grant this operation: `node` executes the action; the VM is to run on `target`, or is stopped there.

    Attributes:
        is_bound: Whether rules between VMs concern it: the grant rests on where all others are.
    """

    operation: VirtualMachineOperation
    vm: VirtualMachine
    node: str
    target: str
    action: Action
    is_bound: bool = False

    @property
    def spec(self) -> VirtualMachineSpec:
        """Of the machine that is started, moved or stopped."""
        return self.vm.spec if self.action is Action.START else self.vm.running_spec


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now; `reason` and `message` are for the operation's condition.

    Attributes:
        reserves: Its turn has come, and it goes in a moment: no later one takes its source's slot before.
    """

    operation: VirtualMachineOperation
    reason: Reason
    message: str
    reserves: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """Not before these nodes have answered whether the VM can arrive there; it waits as `wait` says.

    Where `is_about_needs`, its own node is asked what the VM needs.
    """

    wait: Wait
    vm: VirtualMachine
    nodes: tuple[str, ...]
    is_about_needs: bool = False

    @property
    def operation(self) -> VirtualMachineOperation:
        """The operation that waits."""
        return self.wait.operation


@dataclass(frozen=True, slots=True)
class Fail:
    """Never: the operation can't be done any more."""

    operation: VirtualMachineOperation
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class NothingToStop:
    """Done already: the VM does not run."""

    operation: VirtualMachineOperation
    vm: VirtualMachine


@dataclass(frozen=True, slots=True)
class NothingToMove:
    """Done already: a VM that was to leave its node does not run any more."""

    operation: VirtualMachineOperation
    vm: VirtualMachine


Decision = Go | Wait | Check | Fail | NothingToStop | NothingToMove

NO_NODE_FITS = frozenset({Reason.TARGET_UNSCHEDULABLE, Reason.TARGET_DISK_ERROR})
WITHOUT_TARGET = NO_NODE_FITS | {Reason.TARGET_PREPARING, Reason.WAITING_FOR_VM_TO_BE_READY_TO_MIGRATE}
"""Reasons for which an operation waits so long, all in all, before it fails. To queue is none."""
ASKED_AHEAD_PER_SOURCE = 2
ASKED_AHEAD = 32
"""So many of those that queue for a slot have their likely targets asked meanwhile, in one plan."""


@dataclass(slots=True)
class _Work:
    """The herd as it will be once the decisions so far are carried out.

    Attributes:
        nodes: By name, with what they take.
        migrating: Slots of the herd that are taken.
        cap: All of the herd's slots.
    """

    snapshot: Snapshot
    nodes: dict[str, NodeState]
    migrating: int
    cap: int
    _neighbours: Neighbours | None = None

    def company(self, vm: VirtualMachine) -> Company | None:
        """Give the other VMs as a VM's rules and theirs see them; None where no rule concerns it."""
        if self._neighbours is None:
            self._neighbours = Neighbours(self.snapshot.nodes, self.snapshot.residents.values())
        if vm.key not in self._neighbours:
            self._neighbours.add(resident(vm, self.snapshot.class_of(vm)))
        return Company(vm.key, self._neighbours) if self._neighbours.is_bound(vm.key) else None

    def take(self, go: Go) -> None:
        """Count what a grant takes; a stop gives nothing back before it has ended."""
        if go.action is Action.STOP:
            return
        migrates = go.action is Action.MIGRATE
        target, overhead_mib = self.nodes[go.target], self.snapshot.memory_overhead_mib
        self.migrating += migrates
        self.nodes[go.target] = replace(
            target,
            memory_used_mib=target.memory_used_mib + go.spec.memory_mib + overhead_mib,
            cpu_used_millicores=target.cpu_used_millicores + go.spec.cpu_millicores,
            inbound=target.inbound + migrates,
            starting=target.starting + (not migrates),
        )
        if migrates:
            source = self.nodes[go.node]
            self.nodes[go.node] = replace(source, outbound=source.outbound + 1)
        if self._neighbours is not None and go.vm.key in self._neighbours:
            self._neighbours.put(go.vm.key, (go.node, go.target) if migrates else (go.target,))


def plan_grants(snapshot: Snapshot) -> Iterator[Decision]:
    """Decide on each pending operation, in order.

    Args:
        snapshot: Its `pending` in the order of service.

    Yields:
        One decision an operation. Those of one plan respect the limits, and the rules between VMs, taken together.
    """
    work = _Work(snapshot, dict(snapshot.nodes), snapshot.migrating, snapshot.cap)
    queued: Counter[str] = Counter()
    for operation in snapshot.pending:
        decision = _decide(work, operation)
        if isinstance(decision, Wait) and decision.reason is Reason.MIGRATION_PENDING:
            decision = _ask_ahead(work, queued, decision)
        if isinstance(decision, Go):
            work.take(decision)
        _reserve(work, decision)
        yield decision


def _decide(work: _Work, operation: VirtualMachineOperation) -> Decision:
    vm = work.snapshot.vms.get(Key(operation.vm_key))
    if vm is None:
        return Fail(operation, Reason.VIRTUAL_MACHINE_NOT_FOUND, f"VirtualMachine {operation.vm_key!r} is gone")
    if operation.key in work.snapshot.held:
        return Wait(operation, Reason.NOT_READY, work.snapshot.held[operation.key])
    match operation.spec.type:
        case OperationType.START:
            return _decide_start(work, operation, vm)
        case OperationType.STOP:
            return _decide_stop(work, operation, vm)
        case OperationType.RESTART if vm.status.phase.occupies_node:
            return _decide_stop(work, operation, vm)
        case OperationType.RESTART:
            return _decide_start(work, operation, vm)
        case OperationType.EVICT | OperationType.MIGRATE:
            return _decide_migration(work, operation, vm)
        case _:
            assert_never(operation.spec.type)


def _decide_stop(work: _Work, operation: VirtualMachineOperation, vm: VirtualMachine) -> Decision:
    """Decide on a Stop, or on the first half of a Restart. It needs no slot: only its node has to be there."""
    if not vm.status.phase.occupies_node:
        return NothingToStop(operation, vm)
    if waiting := _holds(work.snapshot, operation, vm):
        return waiting
    node = vm.status.node_name
    if node not in work.nodes or not work.nodes[node].ready:
        return Wait(operation, Reason.NOT_READY, f"waits for node {node}, which is not Ready")
    return Go(operation, vm, node, node, Action.STOP)


def _decide_start(work: _Work, operation: VirtualMachineOperation, vm: VirtualMachine) -> Decision:
    if vm.metadata.deletion_timestamp is not None:
        return Fail(operation, Reason.NOT_APPLICABLE_FOR_PHASE, f"{vm.name} is being deleted")
    if vm.status.phase is VmPhase.STOPPING:
        return Wait(operation, Reason.NOT_READY, f"waits until {vm.name} is Stopped (it is Stopping)")
    if vm.status.phase.occupies_node and vm.status.phase is not VmPhase.STARTING:
        return Fail(operation, Reason.NOT_APPLICABLE_FOR_PHASE, f"{vm.name} is {vm.status.phase} already")
    if waiting := _holds(work.snapshot, operation, vm):
        return waiting
    if why := class_obstacle(vm, work.snapshot.class_of(vm)):
        return Wait(operation, Reason.TARGET_UNSCHEDULABLE, why)
    demand = _demand(work, operation, vm)
    choice = choose_node(work.nodes, demand)
    planned_name = operation.status.planned  # placed with others; anywhere, once that fits no more, or failed there
    if planned_name and planned_name not in demand.avoid and not demand.node_name:
        planned = choose_node(work.nodes, replace(demand, node_name=planned_name))
        choice = planned if planned.node is not None or planned.full else choice
    if choice.node is None and choice.full:
        return Wait(operation, Reason.NOT_READY, "waits for a node that fits: each starts as many as it may at a time")
    if choice.node is None:
        return Wait(operation, Reason.TARGET_UNSCHEDULABLE, choice.explain())
    return Go(operation, vm, choice.node, choice.node, Action.START, is_bound=work.company(vm) is not None)


def _decide_migration(work: _Work, operation: VirtualMachineOperation, vm: VirtualMachine) -> Decision:
    snapshot, nodes = work.snapshot, work.nodes
    source = vm.status.node_name
    conflict = throttles(vm.spec.live_migration_policy, operation.spec.force)
    if isinstance(conflict, PolicyConflict):
        return Fail(operation, Reason.NOT_APPLICABLE_FOR_LIVE_MIGRATION_POLICY, conflict.message)
    if vm.status.phase is not VmPhase.RUNNING:
        return _decide_unready(operation, vm)
    if waiting := _holds(snapshot, operation, vm):
        return waiting
    if source not in nodes or not nodes[source].ready:
        return Wait(operation, Reason.NOT_READY, f"waits for node {source}, which is not Ready")
    if (tie := immovable(vm)) is not None:
        return Fail(operation, Reason.OPERATION_FAILED, f"{vm.name} can't migrate: {tie[1]} ({tie[0]})")
    if known_needs(vm) is None:
        return _ask_for_needs(operation, vm)
    # Slots before nodes: who queues is not unschedulable, and most of a long queue is answered without a look at nodes.
    limits = snapshot.limits
    if nodes[source].outbound >= limits.outbound_per_node:
        return Wait(operation, Reason.MIGRATION_PENDING, f"waits for the outbound slot of node {source}")
    if 0 < work.cap <= work.migrating:
        return Wait(operation, Reason.MIGRATION_PENDING, "waits for one of the herd's migration slots")
    demand = _demand(work, operation, vm, {source: "where it runs"})
    target = find_target(nodes, demand, vm, operation, snapshot.now)
    if target.node is not None:
        return Go(operation, vm, source, target.node, Action.MIGRATE, is_bound=demand.company is not None)
    wait = _wait_for_target(operation, target)
    return Check(wait, vm, target.ask) if target.ask else wait


def _decide_unready(operation: VirtualMachineOperation, vm: VirtualMachine) -> Decision:
    """Decide on the migration of a VM that is not Running. Its policy, which may be to start it, waits for its end."""
    if has_crashed(vm):
        message = f"{vm.name} has crashed, only a Running VM migrates"
        return Fail(operation, Reason.NOT_APPLICABLE_FOR_PHASE, message)
    if vm.status.phase.occupies_node:
        return Wait(operation, Reason.NOT_READY, f"waits until {vm.name} is Running (it is {vm.status.phase})")
    if operation.priority is not Priority.PERSON:
        return NothingToMove(operation, vm)  # what it was to leave, it has left
    message = f"{vm.name} is {vm.status.phase}, only a Running VM migrates"
    return Fail(operation, Reason.NOT_APPLICABLE_FOR_PHASE, message)


def _wait_for_target(operation: VirtualMachineOperation, target: Target) -> Wait:
    """Say why it has no target yet."""
    choice, asked = target.choice, sorted({*target.silent, *(target.ask if target.is_patient else ())})
    if asked:
        message = f"waits for the answer of node {', '.join(asked)} whether it can arrive there"
        return Wait(operation, Reason.TARGET_PREPARING, message, reserves=target.is_patient)
    if choice.full:
        return Wait(operation, Reason.MIGRATION_PENDING, "waits for the inbound slot of a node that fits")
    reason = Reason.TARGET_DISK_ERROR if target.is_disk else Reason.TARGET_UNSCHEDULABLE
    return Wait(operation, reason, choice.explain())


def _ask_for_needs(operation: VirtualMachineOperation, vm: VirtualMachine) -> Decision:
    """Have its own node say what a VM needs; it does so by itself, but what it said may have been lost."""
    source, asked = vm.status.node_name, operation.status.questions
    message = f"waits for node {source} to say what {vm.name} needs"
    wait = Wait(operation, Reason.WAITING_FOR_VM_TO_BE_READY_TO_MIGRATE, message)
    is_asked = asked is not None and not asked.about and source in asked.open
    return wait if is_asked else Check(wait, vm, (source,), is_about_needs=True)


def _ask_ahead(work: _Work, queued: Counter[str], wait: Wait) -> Decision:
    """Have the likely targets of the first in each queue asked while they wait: the answers are there at their turn."""
    vm = work.snapshot.vms[Key(wait.operation.vm_key)]
    source = vm.status.node_name
    queued[source] += 1
    if queued[source] > ASKED_AHEAD_PER_SOURCE or queued.total() > ASKED_AHEAD:
        return wait
    demand = _demand(work, wait.operation, vm, {source: "where it runs"})
    ask = nodes_to_ask_ahead(work.nodes, demand, vm, wait.operation, work.snapshot.now)
    return Check(wait, vm, ask) if ask else wait


def _reserve(work: _Work, decision: Decision) -> None:
    """Keep later ones from a slot that is about to be taken; in this plan only, no slot is held for it."""
    wait = decision.wait if isinstance(decision, Check) else decision
    if isinstance(wait, Wait) and wait.reserves:
        source = work.snapshot.vms[Key(wait.operation.vm_key)].status.node_name
        work.nodes[source] = replace(work.nodes[source], outbound=work.nodes[source].outbound + 1)


def _holds(snapshot: Snapshot, operation: VirtualMachineOperation, vm: VirtualMachine) -> Wait | None:
    not_before = operation.status.not_before
    if not_before is not None and snapshot.now < not_before:
        return Wait(operation, Reason.NOT_READY, operation.message or "waits before it tries again")
    if vm.key in snapshot.busy:
        return Wait(operation, Reason.OTHER_MIGRATION_IN_PROGRESS, snapshot.busy[vm.key])
    return None


def _demand(
    work: _Work, operation: VirtualMachineOperation, vm: VirtualMachine, exclude: dict[str, str] | None = None
) -> Demand:
    snapshot, migrate = work.snapshot, operation.spec.migrate
    is_migration = operation.spec.type.is_migration
    vm_class, overhead_mib = snapshot.class_of(vm), snapshot.memory_overhead_mib
    if is_migration:
        demand = move_demand(vm, vm_class, overhead_mib, snapshot.nodes[vm.status.node_name])
    else:
        demand = start_demand(vm, vm_class, overhead_mib)
    labels = {**demand.where.labels, **(migrate.node_selector if migrate else {})}
    return replace(
        demand,
        where=replace(demand.where, labels=labels),
        node_name=(migrate.node_name if migrate else "") if is_migration else home_of(vm),
        exclude=exclude,
        avoid=frozenset(operation.status.avoid),
        inbound=snapshot.limits.inbound_per_node if is_migration else 0,
        starting=0 if is_migration else snapshot.limits.starts_per_node,
        company=work.company(vm),
    )
