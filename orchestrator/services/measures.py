"""What of the herd's documents is shown as metrics: pure functions from one document to its samples.

The platform's metrics have its names and labels, ours begin with `vmherd_`. Of a phase only the present one is shown,
as 1: `sum by (phase)` and `{phase="Running"} == 1` say what they say on the platform, at a ninth of the series.
What vmherd does not know (firmware, guest agents) is left out.
"""

from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Final

from orchestrator.metrics import Family
from orchestrator.planner.capacity import DOMAIN_READY, FAILOVER_READY
from orchestrator.resources import (
    Node,
    NodeDrain,
    NodeFencing,
    Resource,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
    find_condition,
)
from orchestrator.resources.fencing import FencePhase

_VM: Final = "d8_virtualization_virtualmachine_"
_OPERATION: Final = "d8_virtualization_virtualmachineoperation_"
_CLASS: Final = "d8_virtualization_virtualmachineclass_"
_OF_VM: Final = ("name", "namespace", "uid", "node")
_OF_OPERATION: Final = ("name", "namespace", "uid", "type", "virtualmachine")

VM_PHASE = Family(_VM + "status_phase", "1 for the phase in which it is", (*_OF_VM, "phase"))
VM_INFO = Family(_VM + "info", "1; what it is", (*_OF_VM, "class", "os_type", "domain"))
VM_MIGRATABLE = Family(_VM + "migratable", "Whether it can be migrated live", _OF_VM)
VM_CORES = Family(_VM + "cpu_cores", "Its CPUs", _OF_VM)
VM_FRACTION = Family(_VM + "cpu_core_fraction", "Percent of each that is reserved for it", _OF_VM)
VM_MEMORY = Family(_VM + "configuration_memory_size_bytes", "Its memory, as its spec wants it", _OF_VM)
VM_POLICY = Family(_VM + "configuration_run_policy", "1 for its run policy", (*_OF_VM, "run_policy"))
VM_APPLIED = Family(_VM + "configuration_applied", "Whether the machine that runs is as its spec wants it", _OF_VM)
VM_AWAITING = Family(
    _VM + "awaiting_restart_to_apply_configuration", "Whether changes of its spec wait for a restart", _OF_VM
)
VM_INCARNATION = Family("vmherd_virtualmachine_incarnation", "How often it was started", _OF_VM)
VM_FAILURES = Family("vmherd_virtualmachine_failures", "Stops in a row that nobody asked for", _OF_VM)
VM_COPIES = Family(
    "vmherd_virtualmachine_unexpected_copies",
    "Nodes besides its own that show a copy of it: a migration behind our back, a copy to be destroyed, or a VM that "
    "runs twice",
    _OF_VM,
)

OPERATION_PHASE = Family(_OPERATION + "status_phase", "1 for the phase in which it is", (*_OF_OPERATION, "phase"))
OPERATION_CREATED = Family(_OPERATION + "created_timestamp_seconds", "When it was asked for", _OF_OPERATION)
OPERATION_STARTED = Family(_OPERATION + "started_timestamp_seconds", "When its node began", _OF_OPERATION)
OPERATION_FINISHED = Family(_OPERATION + "finished_timestamp_seconds", "When it ended", _OF_OPERATION)
OPERATION_PROGRESS = Family("vmherd_virtualmachineoperation_progress_percent", "How far it is", _OF_OPERATION)
OPERATION_DOWNTIME = Family(
    "vmherd_virtualmachineoperation_downtime_seconds",
    "How long its guest stood still at the switch-over",
    _OF_OPERATION,
)

CLASS_PHASE = Family(_CLASS + "status_phase", "1 for the phase in which it is", ("name", "uid", "phase"))
CLASS_INFO = Family(_CLASS + "info", "1; what it is", ("name", "uid", "type"))
CLASS_NODE = Family(_CLASS + "available_node", "1 for each node on which its VMs can run", ("name", "uid", "node"))
CLASS_NODES = Family("vmherd_virtualmachineclass_available_nodes", "On how many nodes its VMs can run", ("name", "uid"))

NODE_READY = Family("vmherd_node_ready", "Whether its lease is fresh and its hypervisor answers", ("node",))
NODE_CORDONED = Family("vmherd_node_cordoned", "Whether a person keeps VMs off it", ("node",))
NODE_SCHEDULABLE = Family("vmherd_node_schedulable", "Whether VMs may come; their number is the cap", ("node",))
NODE_FAILOVER = Family(
    "vmherd_node_failover_ready", "Whether all its VMs that are to be restarted would fit elsewhere", ("node",)
)
NODE_DOMAIN = Family(
    "vmherd_failure_domain_ready", "The same of all nodes of its racks and zones, if they are lost together", ("node",)
)

FENCING_PHASE = Family(
    "vmherd_node_fencing_phase", "1 for the phase of its fencing; absent of one that was never lost", ("node", "phase")
)
FENCING_LOST = Family(
    "vmherd_node_lost_timestamp_seconds",
    "When it was first noticed that its lease had run out; absent unless it is lost",
    ("node",),
)
FENCING_EVIDENCE = Family(
    "vmherd_node_evidence_timestamp_seconds",
    "Since when it is proven that it runs nothing any more; absent without evidence",
    ("node", "level"),
)
FENCING_RECOVERY = Family(
    "vmherd_node_recovery_seconds",
    "From then until all of its VMs that are to be restarted had been told to start elsewhere; until it is back",
    ("node",),
)
DRAIN_PHASE = Family("vmherd_node_drain_phase", "1 for the phase of its last drain", ("node", "phase"))
DRAIN_VMS = Family(
    "vmherd_node_drain_virtualmachines", "VMs of its last drain by what became of them", ("node", "state")
)

FAMILIES: Final = tuple(value for value in dict(globals()).values() if isinstance(value, Family))
Sample = tuple[Family, str]


def samples(resource: Resource) -> tuple[Sample, ...]:
    """Give a document's samples: a family and a line each. They depend on nothing but the document."""
    match resource:
        case VirtualMachine():
            return tuple(_of_vm(resource))
        case VirtualMachineOperation():
            return tuple(_of_operation(resource))
        case VirtualMachineClass():
            return tuple(_of_class(resource))
        case Node():
            return tuple(_of_node(resource))
        case NodeFencing():
            return tuple(_of_fencing(resource))
        case NodeDrain():
            return tuple(_of_drain(resource))
        case _:
            return ()


def _of_vm(vm: VirtualMachine) -> Iterator[Sample]:
    labels = (vm.name, vm.metadata.namespace, vm.metadata.uid, vm.status.node_name)
    spec, status = vm.spec, vm.status
    yield VM_PHASE, VM_PHASE.line(1, *labels, status.phase.value)
    domain = "template" if spec.domain_template is not None else "structured"
    yield VM_INFO, VM_INFO.line(1, *labels, spec.virtual_machine_class_name or "", spec.os_type.value, domain)
    yield VM_CORES, VM_CORES.line(spec.cpu.cores, *labels)
    yield VM_FRACTION, VM_FRACTION.line(int(spec.cpu.core_fraction.rstrip("%")), *labels)
    yield VM_MEMORY, VM_MEMORY.line(spec.memory_mib * 2**20, *labels)
    yield VM_POLICY, VM_POLICY.line(1, *labels, spec.run_policy.value)
    waits = bool(status.restart_awaiting_changes)
    yield VM_APPLIED, VM_APPLIED.line(not waits, *labels)
    yield VM_AWAITING, VM_AWAITING.line(waits, *labels)
    condition = find_condition(status.conditions, "Migratable")
    if condition is not None and condition.status != "Unknown":
        yield VM_MIGRATABLE, VM_MIGRATABLE.line(condition.status == "True", *labels)
    yield VM_INCARNATION, VM_INCARNATION.line(status.incarnation, *labels)
    yield VM_FAILURES, VM_FAILURES.line(status.failures, *labels)
    copies = len({*status.outdated, *((status.elsewhere,) if status.elsewhere else ())})
    yield VM_COPIES, VM_COPIES.line(copies, *labels)


def _of_operation(operation: VirtualMachineOperation) -> Iterator[Sample]:
    meta, spec, status = operation.metadata, operation.spec, operation.status
    labels = (meta.name, meta.namespace, meta.uid, spec.type.value, spec.virtual_machine_name)
    yield OPERATION_PHASE, OPERATION_PHASE.line(1, *labels, status.phase.value)
    yield OPERATION_PROGRESS, OPERATION_PROGRESS.line(status.progress, *labels)
    instants: tuple[tuple[Family, datetime | None], ...] = (
        (OPERATION_CREATED, meta.creation_timestamp),
        (OPERATION_STARTED, status.started_at),
        (OPERATION_FINISHED, status.finished_at),
    )
    for family, at in instants:
        if at is not None:
            yield family, family.line(at.timestamp(), *labels)
    if status.downtime_ms is not None:
        yield OPERATION_DOWNTIME, OPERATION_DOWNTIME.line(status.downtime_ms / 1000, *labels)


def _of_class(vm_class: VirtualMachineClass) -> Iterator[Sample]:
    labels = (vm_class.name, vm_class.metadata.uid)
    yield CLASS_PHASE, CLASS_PHASE.line(1, *labels, vm_class.status.phase.value)
    yield CLASS_INFO, CLASS_INFO.line(1, *labels, vm_class.spec.cpu.type.value)
    yield CLASS_NODES, CLASS_NODES.line(len(vm_class.status.available_nodes), *labels)
    for node in vm_class.status.available_nodes:
        yield CLASS_NODE, CLASS_NODE.line(1, *labels, node)


def _of_node(node: Node) -> Iterator[Sample]:
    yield NODE_READY, NODE_READY.line(node.is_ready, node.name)
    yield NODE_CORDONED, NODE_CORDONED.line(node.spec.unschedulable, node.name)
    yield NODE_SCHEDULABLE, NODE_SCHEDULABLE.line(node.is_schedulable, node.name)
    for family, kind in ((NODE_FAILOVER, FAILOVER_READY), (NODE_DOMAIN, DOMAIN_READY)):
        condition = find_condition(node.status.conditions, kind)
        if condition is not None and condition.status != "Unknown":
            yield family, family.line(condition.status == "True", node.name)


def _of_fencing(fencing: NodeFencing) -> Iterator[Sample]:
    node, status = fencing.name, fencing.status
    yield FENCING_PHASE, FENCING_PHASE.line(1, node, status.phase.value)
    if status.lost_at is not None:
        yield FENCING_LOST, FENCING_LOST.line(status.lost_at.timestamp(), node)
    if status.evidence is not None:
        yield FENCING_EVIDENCE, FENCING_EVIDENCE.line(status.evidence.at.timestamp(), node, status.evidence.level.value)
    if status.phase is FencePhase.RECOVERED and status.since is not None and status.lost_at is not None:
        yield FENCING_RECOVERY, FENCING_RECOVERY.line((status.since - status.lost_at).total_seconds(), node)


def _of_drain(drain: NodeDrain) -> Iterator[Sample]:
    yield DRAIN_PHASE, DRAIN_PHASE.line(1, drain.name, drain.status.phase.value)
    for state, count in sorted(Counter(vm.state.value for vm in drain.vms.values()).items()):
        yield DRAIN_VMS, DRAIN_VMS.line(count, drain.name, state)
