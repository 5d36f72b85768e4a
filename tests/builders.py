"""Resources for tests, each whole with nothing but a name; a test says only what it is about."""

from datetime import UTC, datetime
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from pydantic.alias_generators import to_snake

from orchestrator.lease import PROFILES, Lease
from orchestrator.planner.rules import resident
from orchestrator.planner.snapshot import Limits, NodeState, Snapshot
from orchestrator.resources import (
    Action,
    Condition,
    Grant,
    GrantState,
    Key,
    Node,
    NodeInventory,
    ObjectMeta,
    OperationPhase,
    OperationType,
    Priority,
    Reading,
    RunPolicy,
    SeenDomain,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
    VmPhase,
    parse,
)
from orchestrator.resources.cpu import CpuRequest, NodeCpu
from orchestrator.resources.needs import MachineNeeds
from orchestrator.resources.node import Capacity, HypervisorInfo, NodeSpec, NodeStatus
from orchestrator.resources.vm import Cpu, Memory, VirtualMachineSpec, VirtualMachineStatus
from orchestrator.resources.vmclass import ClassPhase
from orchestrator.resources.vmop import (
    CLEANUP_FINALIZER,
    PRIORITY_ANNOTATION,
    MigrateTo,
    OperationSpec,
    OperationStatus,
)

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
DOMAIN_XML = "<domain type='kvm'><os><type>hvm</type></os></domain>"


def uuid_of(vm: str) -> str:
    """The domain's UUID of a VM that is called so."""
    return str(uuid5(NAMESPACE_URL, f"vm/{vm}"))


def a_node(
    name: str,
    *,
    ready: bool = True,
    cordoned: bool = False,
    cpu: int = 8,
    memory_mib: int = 16_384,
    labels: dict[str, str] | None = None,
) -> Node:
    condition = Condition(type="Ready", status="True" if ready else "Unknown", reason="NodeReady")
    return Node(
        metadata=ObjectMeta(name=name, uid=f"node-{name}", labels=labels or {}, creation_timestamp=NOW),
        spec=NodeSpec(unschedulable=cordoned),
        status=NodeStatus(
            capacity=Capacity(cpu=cpu, memory_mib=memory_mib),
            hypervisor=HypervisorInfo(
                migration_uri=f"qemu+tcp://{name}/system", cpu_model="qemu64", version="fake", libvirt_version="fake"
            ),
            conditions=(condition,),
        ),
    )


def a_cpu(
    *features: str, model: str = "EPYC", vendor: str = "AMD", models: tuple[str, ...] = ("qemu64", "Nehalem")
) -> NodeCpu:
    """A node's CPU as it is told."""
    return NodeCpu(
        vendor=vendor, model=model, features=frozenset(features or ("sse2", "avx")), models=frozenset(models)
    )


def a_class(name: str = "generic", *, gives: CpuRequest | None = None, **spec: Any) -> VirtualMachineClass:
    """A class whose CPU is known; `spec` has parts of its spec in their outside form."""
    wanted = {"cpu": {"type": "Model", "model": "Nehalem"}, **spec}
    found = parse(VirtualMachineClass, {"metadata": {"name": name}, "spec": wanted})
    return found.with_status(
        phase=ClassPhase.READY, cpu=gives or CpuRequest(model="Nehalem"), observed_generation=1, available_nodes=("n1",)
    )


def a_structured_vm(name: str = "linux-vm", **spec: Any) -> VirtualMachine:
    """A VM of parts that has not run; `spec` has parts of its spec in their outside form."""
    whole = {
        "cpu": {"cores": 2},
        "memory": {"size": "1Gi"},
        "disks": [{"name": "root", "file": {"path": "/srv/vm/root.qcow2"}, "format": "qcow2"}],
        "interfaces": [{"name": "main", "bridge": "br0"}],
        **spec,
    }
    return VirtualMachine(
        metadata=ObjectMeta(name=name, namespace="default", uid=uuid_of(name), creation_timestamp=NOW),
        spec=parse(VirtualMachineSpec, whole),
    )


def a_vm(
    name: str = "linux-vm",
    *,
    node: str = "n1",
    phase: VmPhase = VmPhase.RUNNING,
    memory: str = "1Gi",
    cores: int = 1,
    fraction: str = "100%",
    policy: RunPolicy = RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY,
    selector: dict[str, str] | None = None,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    spec: dict[str, Any] | None = None,
    **status: Any,
) -> VirtualMachine:
    """A VM that runs on node `n1` as its first incarnation.

    `spec` has more of its spec in its outside form, `status` fields of its status.
    """
    return VirtualMachine(
        metadata=ObjectMeta(
            name=name,
            namespace="default",
            uid=uuid_of(name),
            labels=labels or {},
            annotations=annotations or {},
            creation_timestamp=NOW,
        ),
        spec=VirtualMachineSpec(
            run_policy=policy,
            cpu=Cpu(cores=cores, core_fraction=fraction),
            memory=Memory(size=memory),
            node_selector=selector or {},
            domain_template=DOMAIN_XML,
        ).with_(**_given(spec or {})),
        status=VirtualMachineStatus(
            **{
                "phase": phase,
                "node_name": node,
                "incarnation": 1,
                "needs": some_needs(plain=True, incarnation=status.get("incarnation", 1)),
                **status,
            }
        ),
    )


def _given(spec: dict[str, Any]) -> dict[str, Any]:
    """Parts of a spec in their outside form, as its fields."""
    whole = parse(VirtualMachineSpec, {"memory": {"size": "1Gi"}, "domainTemplate": DOMAIN_XML, **spec})
    names = {to_snake(name) for name in spec}
    return {name: getattr(whole, name) for name in names}


def keep_apart(topology: str = "kubernetes.io/hostname", **labels: str) -> dict[str, Any]:
    """A spec that asks not to be where VMs with these labels are."""
    return {"affinity": {"virtualMachineAndPodAntiAffinity": {_REQUIRED: [_term(topology, labels)]}}}


def keep_near(topology: str = "kubernetes.io/hostname", **labels: str) -> dict[str, Any]:
    """A spec that asks to be where a VM with these labels is."""
    return {"affinity": {"virtualMachineAndPodAffinity": {_REQUIRED: [_term(topology, labels)]}}}


_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def _term(topology: str, labels: dict[str, str]) -> dict[str, Any]:
    return {"topologyKey": topology, "labelSelector": {"matchLabels": labels}}


def some_needs(fingerprint: str = "f1", *, incarnation: int = 1, **more: Any) -> MachineNeeds:
    """What a VM needs of a host; `plain=True`: nothing but a CPU."""
    machine = "<domain type='kvm'><os/><devices/></domain>"
    return MachineNeeds(**{"fingerprint": fingerprint, "incarnation": incarnation, "machine": machine, **more})


def an_operation(
    name: str = "op",
    vm: str = "linux-vm",
    *,
    kind: OperationType = OperationType.EVICT,
    created: int = 0,
    priority: Priority | str = Priority.PERSON,
    phase: OperationPhase = OperationPhase.PENDING,
    to: MigrateTo | None = None,
    force: bool | None = None,
    **status: Any,
) -> VirtualMachineOperation:
    """An operation on a VM; `status` has fields of its status."""
    annotations = {} if priority is Priority.PERSON else {PRIORITY_ANNOTATION: str(priority)}
    return VirtualMachineOperation(
        metadata=ObjectMeta(
            name=name,
            namespace="default",
            uid=f"op-{name}",
            annotations=annotations,
            finalizers=(CLEANUP_FINALIZER,) if kind.is_migration else (),
            creation_timestamp=NOW,
        ),
        spec=OperationSpec(type=kind, virtual_machine_name=vm, migrate=to, force=force),
        status=OperationStatus(**{"phase": phase, **status}),
        created_version=created,
    )


def a_grant(
    *,
    node: str = "n1",
    target: str = "n2",
    vm: str = "linux-vm",
    action: Action = Action.MIGRATE,
    epoch: int = 1,
    state: GrantState = GrantState.GRANTED,
    memory_mib: int = 1088,
    **more: Any,
) -> Grant:
    return Grant(
        **{
            "epoch": epoch,
            "action": action,
            "node": node,
            "target": node if action is Action.START else target,
            "uuid": uuid_of(vm),
            "incarnation": 1,
            "memory_mib": memory_mib,
            "cpu_millicores": 1000,
            "granted_at": NOW,
            "state": state,
            **more,
        }
    )


def granted_operation(name: str = "op", vm: str = "linux-vm", **grant: Any) -> VirtualMachineOperation:
    """An operation with an open grant, as the node has reported it when the grant's state says so."""
    given = a_grant(vm=vm, **grant)
    is_granted = given.state is GrantState.GRANTED
    return an_operation(
        name,
        vm,
        kind=OperationType.START if given.action is Action.START else OperationType.EVICT,
        phase=OperationPhase.PENDING if is_granted else OperationPhase.IN_PROGRESS,
        attempts=1,
        progress=2,
        source_node=given.node,
        target_node=given.target,
        grant=given,
    )


def a_reading(state: str = "", *, job: bool = False, **more: Any) -> Reading:
    """What a host said; no state: it does not have the domain."""
    return Reading(**{"present": bool(state), "state": state, "job": job, "incarnation": 1, "counter": 10, **more})


def seen(state: str, counter: int = 10, *, vm: str = "linux-vm", **more: Any) -> SeenDomain:
    """A domain as its host reported it."""
    fields = {"name": f"default.{vm}", "vm": f"default/{vm}", "incarnation": 1, "memory_mib": 1024, "vcpus": 1}
    return SeenDomain(**{**fields, "state": state, "counter": counter, "began": counter, **more})


def an_inventory(node: str, domains: dict[str, SeenDomain] | None = None, counter: int = 10) -> NodeInventory:
    """What a node has; domains by the names of their VMs."""
    return NodeInventory(
        metadata=ObjectMeta(name=node, creation_timestamp=NOW),
        domains={uuid_of(vm): domain for vm, domain in (domains or {}).items()},
        counter=counter,
    )


def a_node_state(name: str, *, cpu: int = 8000, memory_mib: int = 16_384, **more: Any) -> NodeState:
    fields = {"labels": {}, "ready": True, "cordoned": False, "migration_uri": f"qemu+tcp://{name}/system"}
    fields |= {"generation": "g1", "platform": "qemu64/fake/fake"}
    return NodeState(**{**fields, "name": name, "cpu_millicores": cpu, "memory_mib": memory_mib, **more})


def a_snapshot(
    nodes: tuple[NodeState, ...] | list[NodeState],
    vms: tuple[VirtualMachine, ...] | list[VirtualMachine] = (),
    pending: tuple[VirtualMachineOperation, ...] | list[VirtualMachineOperation] = (),
    *,
    limits: Limits | None = None,
    **more: Any,
) -> Snapshot:
    return Snapshot(
        **{
            "now": NOW,
            "nodes": {node.name: node for node in nodes},
            "vms": {Key(vm.key): vm for vm in vms},
            "pending": tuple(pending),
            "limits": limits or Limits(),
            "residents": {
                Key(vm.key): resident(vm, None, (vm.status.node_name,))
                for vm in vms
                if vm.status.node_name and vm.status.phase.occupies_node
            },
            **more,
        }
    )


def a_lease(sequence: int = 1, **fields: Any) -> Lease:
    """One heartbeat; each is a second after the one before."""
    values = {"generation": "g", "boot_id": "b", "created": float(sequence), "timing": PROFILES["medium"], **fields}
    return Lease(sequence=sequence, **values)
