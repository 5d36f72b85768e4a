"""What becomes of a `VirtualMachineClass` as nodes come and go: its CPU, the nodes that can give it, its phase."""

from collections.abc import Iterable, Mapping
from datetime import datetime

from orchestrator.resources import Condition, Node, VirtualMachine, VirtualMachineClass, with_condition
from orchestrator.resources.cpu import CpuRequest, NodeCpu, baseline, generic_model, lacking
from orchestrator.resources.vmclass import ClassPhase, CpuType

READY = "Ready"
DISCOVERED = "Discovered"
_NAMED_AT_MOST = 5


def evaluated(
    vm_class: VirtualMachineClass, nodes: Iterable[Node], now: datetime, *, is_used: bool = False
) -> VirtualMachineClass:
    """Give a class with its status as it follows from the nodes.

    Args:
        vm_class: As it is on record.
        nodes: All of the herd.
        now: For conditions.
        is_used: Whether a VM of it was started: a discovered CPU stays as it is then, until the spec is changed.
    """
    matching = {node.name: node for node in nodes if vm_class.spec.node_selector.holds(node.metadata.labels)}
    status, generation = vm_class.status, vm_class.metadata.generation
    is_kept = is_used and status.cpu is not None and status.observed_generation == generation
    looked_at = status.discovered_from if is_kept else tuple(sorted(_looked_at(vm_class, matching)))
    cpu = status.cpu if is_kept else _cpu(vm_class, {name: matching[name] for name in looked_at})
    if not isinstance(cpu, CpuRequest):
        refused = cpu or "no CPU"
        new = vm_class.with_status(cpu=None, available_nodes=(), discovered_from=looked_at)
        return _told(new, generation, "CpuNotKnown", refused, now)
    available = tuple(sorted(name for name, node in matching.items() if not lacking(_cpu_of(node), cpu)))
    new = vm_class.with_status(cpu=cpu, available_nodes=available, discovered_from=looked_at)
    if available:
        return _told(new, generation, "", "", now)
    if not matching:
        return _told(new, generation, "NoNodes", "no node matches spec.nodeSelector", now)
    reasons = sorted({lacking(_cpu_of(node), cpu) for node in matching.values()})
    return _told(new, generation, "NoNodes", f"all {len(matching)} nodes are {'; '.join(reasons)}", now)


def uses(vm: VirtualMachine, vm_class: VirtualMachineClass) -> bool:
    """Whether a VM was given the CPU of a class."""
    is_of_it = vm_class.name in {vm.spec.virtual_machine_class_name, vm.running_spec.virtual_machine_class_name}
    return is_of_it and (vm.status.machine is not None or vm.status.phase.occupies_node)


def class_condition(name: str, vm_class: VirtualMachineClass | None) -> Condition:
    """Make the condition VirtualMachineClassReady of a VM that names a class."""
    kind = "VirtualMachineClassReady"
    if vm_class is None:
        message = f"VirtualMachineClass {name!r} not found"
        return Condition(type=kind, status="False", reason="VirtualMachineClassNotFound", message=message)
    if vm_class.status.phase is ClassPhase.READY:
        return Condition(type=kind, status="True", reason="VirtualMachineClassReady")
    told = next((c.message for c in vm_class.status.conditions if c.type == READY), "")
    return Condition(type=kind, status="False", reason="VirtualMachineClassNotReady", message=told)


def _told(
    vm_class: VirtualMachineClass, generation: int, reason: str, message: str, now: datetime
) -> VirtualMachineClass:
    is_ready = not reason
    conditions = vm_class.status.conditions
    if vm_class.spec.cpu.type is CpuType.DISCOVERY:
        is_known = vm_class.status.cpu is not None
        told = ", ".join(vm_class.status.discovered_from[:_NAMED_AT_MOST])
        more = len(vm_class.status.discovered_from) - _NAMED_AT_MOST
        from_nodes = f"from node {told}" + (f" and {more} more" if more > 0 else "")
        discovered = Condition(
            type=DISCOVERED,
            status="True" if is_known else "False",
            reason="DiscoverySucceeded" if is_known else "DiscoveryFailed",
            message=from_nodes if is_known else message,
        )
        conditions = with_condition(conditions, discovered, now)
    ready = Condition(
        type=READY, status="True" if is_ready else "False", reason=reason or "ClassReady", message=message
    )
    return vm_class.with_status(
        phase=ClassPhase.READY if is_ready else ClassPhase.PENDING,
        observed_generation=generation,
        conditions=with_condition(conditions, ready, now),
    )


def _cpu_of(node: Node) -> NodeCpu | None:
    return node.status.hypervisor.cpu


def _looked_at(vm_class: VirtualMachineClass, matching: Mapping[str, Node]) -> list[str]:
    """Name the nodes from whose CPUs that of the class is made."""
    cpu = vm_class.spec.cpu
    if cpu.type is CpuType.DISCOVERY:
        wanted = cpu.discovery
        return [
            name
            for name, node in matching.items()
            if wanted is None or wanted.node_selector.holds(node.metadata.labels)
        ]
    if cpu.type is CpuType.FEATURES:
        features = frozenset(cpu.features)
        return [
            name
            for name, node in matching.items()
            if (known := _cpu_of(node)) is not None and features <= known.features
        ]
    return []


def _cpu(vm_class: VirtualMachineClass, nodes: Mapping[str, Node]) -> CpuRequest | str:
    """Give the CPU that VMs of a class ask for; or why there is none.

    Args:
        vm_class: Of any type.
        nodes: Those that are looked at for it.
    """
    cpu = vm_class.spec.cpu
    known = {name: _cpu_of(node) or NodeCpu() for name, node in nodes.items()}
    match cpu.type:
        case CpuType.HOST:
            return CpuRequest(mode="host-model")
        case CpuType.HOST_PASSTHROUGH:
            return CpuRequest(mode="host-passthrough")
        case CpuType.MODEL:
            return CpuRequest(model=cpu.model or "")
        case CpuType.DISCOVERY:
            return baseline(known)
        case CpuType.FEATURES:
            if not known:
                return f"no node has CPU features {', '.join(sorted(cpu.features))}"
            generic = generic_model(known)
            if not generic:
                return "the nodes that have these features share no generic CPU model"
            return CpuRequest(model=generic, features=frozenset(cpu.features))
