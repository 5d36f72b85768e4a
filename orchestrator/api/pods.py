"""VMs as pods, for clients that empty and describe nodes by their pods.

A VM that runs is one pod on its node; its name and uid are made of the VM, the node and the incarnation, so a VM that
moved is another pod, and whoever waits for the old one to go sees it go. A VM that arrives is a pod on its target too,
from its grant on, and is the same pod once it runs there. A domain that we don't manage is a pod without a controller:
who empties a node completely is told of it by name, and who moves VMs only passes it by.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import ClassVar, Final, Literal
from uuid import NAMESPACE_URL, uuid5

from pydantic import Field

from orchestrator.api.deltas import Documents
from orchestrator.api.entries import READ, ApiResource
from orchestrator.cli.ages import age
from orchestrator.cli.tables import Column, Table
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    Action,
    Key,
    NodeInventory,
    ObjectMeta,
    Resource,
    SeenDomain,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
)
from orchestrator.resources.meta import GROUP_VERSION, Condition, Model, Timestamp
from orchestrator.store import Change, ChangeType

VM_LABEL: Final = "vm.kubevirt.internal.virtualization.deckhouse.io/name"
"""By which a drain of VMs alone selects them."""
UNMANAGED_LABEL: Final = "vmherd.dev/unmanaged"
DOMAIN_ANNOTATION: Final = "vmherd.dev/domain"
_CONTAINER: Final = "compute"
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")
_GONE: Final = frozenset({"", "shutoff", "absent"})


class OwnerReference(Model):
    """What a pod belongs to."""

    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool = True
    block_owner_deletion: bool = True


class PodMeta(ObjectMeta):
    """Metadata of a pod."""

    owner_references: tuple[OwnerReference, ...] = ()


class ResourceRequests(Model):
    """What is reserved."""

    requests: dict[str, str] = Field(default_factory=dict)


class Container(Model):
    """The machine."""

    name: str = _CONTAINER
    resources: ResourceRequests = ResourceRequests()


class PodSpec(Model):
    """Where the machine is.

    Attributes:
        node_name: Its node; of one that arrives, the target.
    """

    node_name: str
    containers: tuple[Container, ...] = ()
    restart_policy: str = "Never"


class ContainerStatus(Model):
    """How the machine is.

    Attributes:
        restart_count: Starts before this one.
    """

    name: str = _CONTAINER
    ready: bool = False
    restart_count: int = 0


class PodIp(Model):
    """One address."""

    ip: str


class PodStatus(Model):
    """What is known of the machine.

    Attributes:
        phase: Pending while it starts, or has not arrived yet.
    """

    phase: Literal["Pending", "Running"]
    conditions: tuple[Condition, ...] = ()
    container_statuses: tuple[ContainerStatus, ...] = ()
    pod_ip: str = Field("", alias="podIP")
    pod_ips: tuple[PodIp, ...] = Field((), alias="podIPs")
    start_time: Timestamp | None = None


class Pod(Resource):
    """A machine on a node: read only, but that it can be asked to leave (`eviction`)."""

    kind_name: ClassVar[str] = "Pod"
    group_version: ClassVar[str] = "v1"
    plural: ClassVar[str] = "pods"
    short: ClassVar[str] = "po"

    api_version: Literal["v1"] = "v1"
    kind: Literal["Pod"] = "Pod"
    metadata: PodMeta
    spec: PodSpec
    status: PodStatus

    @property
    def vm(self) -> str:
        """Name of its VM, in the pod's namespace; empty for a domain that we don't manage."""
        return self.metadata.labels.get(VM_LABEL, "")

    @property
    def is_ready(self) -> bool:
        """Whether the machine runs here."""
        return any(container.ready for container in self.status.container_statuses)


_POD_TABLE: Table[Pod] = Table(
    Pod,
    (
        Column("NAME", lambda pod, _: pod.name),
        Column("READY", lambda pod, _: f"{int(pod.is_ready)}/1"),
        Column("STATUS", lambda pod, _: pod.status.phase, is_phase=True),
        Column("RESTARTS", lambda pod, _: str(pod.status.container_statuses[0].restart_count)),
        Column("AGE", lambda pod, a: age(pod.metadata.creation_timestamp, a.now), is_clock=True),
        Column("IP", lambda pod, _: pod.status.pod_ip, is_wide=True),
        Column("NODE", lambda pod, _: pod.spec.node_name, is_wide=True),
    ),
)

PODS: Final = ApiResource(
    Pod,
    READ,
    _POD_TABLE,
    {
        "spec.nodeName": lambda pod: pod.spec.node_name,
        "status.phase": lambda pod: pod.status.phase,
        "status.podIP": lambda pod: pod.status.pod_ip,
    },
    short_names=("po",),
    is_derived=True,
    is_evictable=True,
)


class PodView:
    """Makes the pods; the owner of each is `vm <key>` or `node <name>`."""

    api = PODS

    def __init__(self) -> None:
        self._arriving: dict[Key, Key] = {}
        """By VM, the operation that migrates it."""

    def affected(self, change: Change) -> Iterable[str]:
        """Name whose pods may differ."""
        match change.resource:
            case VirtualMachine() as vm:
                return (f"vm {vm.key}",)
            case VirtualMachineOperation() as operation:
                is_known = self._arriving.get(Key(operation.vm_key)) == operation.key
                self._learn(operation, gone=change.type is ChangeType.DELETED)
                return (f"vm {operation.vm_key}",) if is_known or _arrival(operation) else ()
            case NodeInventory() as inventory:
                return (f"node {inventory.name}",)
            case _:
                return ()

    def owners(self, documents: Documents) -> Iterable[str]:
        """Name all whose pods there may be."""
        self._arriving = {}
        for operation in documents[VirtualMachineOperation.kind_name].values():
            if isinstance(operation, VirtualMachineOperation):
                self._learn(operation, gone=False)
        vms = [f"vm {key}" for key in documents[VirtualMachine.kind_name]]
        return [*vms, *(f"node {key}" for key in documents[NodeInventory.kind_name])]

    def make(self, owner: str, documents: Documents) -> Iterator[Resource]:
        """Make an owner's pods."""
        kind, _, key = owner.partition(" ")
        if kind == "node":
            inventory = documents[NodeInventory.kind_name].get(Key(key))
            if isinstance(inventory, NodeInventory):
                for uuid, domain in inventory.domains.items():
                    if not domain.vm and domain.state not in _GONE:
                        yield _unmanaged(inventory, uuid, domain)
            return
        vm = documents[VirtualMachine.kind_name].get(Key(key))
        if not isinstance(vm, VirtualMachine) or not vm.status.phase.occupies_node:
            return
        if vm.status.node_name:
            yield _pod(vm, vm.status.node_name, is_here=vm.status.phase is not VmPhase.STARTING)
        operation = documents[VirtualMachineOperation.kind_name].get(self._arriving.get(vm.key, Key("")))
        target = _arrival(operation) if isinstance(operation, VirtualMachineOperation) else ""
        if target and target != vm.status.node_name:
            yield _pod(vm, target, is_here=False)

    def _learn(self, operation: VirtualMachineOperation, *, gone: bool) -> None:
        vm = Key(operation.vm_key)
        if _arrival(operation) and not gone:
            self._arriving[vm] = operation.key
        elif self._arriving.get(vm) == operation.key:
            del self._arriving[vm]


def _arrival(operation: VirtualMachineOperation) -> str:
    """Give the node at which an operation lets a VM arrive; empty when none."""
    grant = operation.status.grant
    return grant.target if grant is not None and grant.action is Action.MIGRATE else ""


def _pod(vm: VirtualMachine, node: str, *, is_here: bool) -> Pod:
    status = vm.status
    place = f"{vm.metadata.uid}/{node}/{status.incarnation}"
    spec = vm.running_spec
    requests = {"cpu": f"{spec.cpu_millicores}m", "memory": f"{spec.memory_mib}Mi"}
    owner = OwnerReference(api_version=GROUP_VERSION, kind=vm.kind_name, name=vm.name, uid=vm.metadata.uid)
    address = status.ip_address if is_here else ""
    condition = Condition(type="Ready", status="True" if is_here else "False")
    return Pod(
        metadata=PodMeta(
            name=f"d8v-{vm.name[:45].rstrip('-')}-{_digest(place)}",
            namespace=vm.metadata.namespace,
            uid=str(uuid5(NAMESPACE_URL, f"vmherd/pod/{place}")),
            labels={**_labels(vm), VM_LABEL: vm.name},
            creation_timestamp=status.started_at or vm.metadata.creation_timestamp,
            owner_references=(owner,),
        ),
        spec=PodSpec(node_name=node, containers=(Container(resources=ResourceRequests(requests=requests)),)),
        status=PodStatus(
            phase="Running" if is_here else "Pending",
            conditions=(condition,),
            container_statuses=(ContainerStatus(ready=is_here, restart_count=max(0, status.incarnation - 1)),),
            pod_ip=address,
            pod_ips=(PodIp(ip=address),) if address else (),
            start_time=status.started_at,
        ),
    )


def _labels(vm: VirtualMachine) -> dict[str, str]:
    return {key: value for key, value in vm.metadata.labels.items() if key != VM_LABEL}


def _unmanaged(inventory: NodeInventory, uuid: str, domain: SeenDomain) -> Pod:
    node = inventory.name
    readable = _NOT_IN_NAMES.sub("-", domain.name.lower())[:40].strip("-")
    place = f"{uuid}/{node}"
    requests = {"cpu": f"{domain.vcpus * 1000}m", "memory": f"{domain.memory_mib}Mi"}
    return Pod(
        metadata=PodMeta(
            name="-".join(part for part in ("domain", readable, _digest(place)) if part),
            namespace=DEFAULT_NAMESPACE,
            uid=str(uuid5(NAMESPACE_URL, f"vmherd/domain/{place}")),
            labels={UNMANAGED_LABEL: "true"},
            annotations={DOMAIN_ANNOTATION: domain.name, "vmherd.dev/domain-uuid": uuid},
        ),
        spec=PodSpec(node_name=node, containers=(Container(resources=ResourceRequests(requests=requests)),)),
        status=PodStatus(
            phase="Running",
            conditions=(Condition(type="Ready", status="True"),),
            container_statuses=(ContainerStatus(ready=True),),
        ),
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]
