"""All resources that the API offers, each with its verbs, its columns and what it can be selected by."""

from collections.abc import Callable
from typing import Any, Final

from orchestrator.api.entries import READ, ApiResource
from orchestrator.api.leases import LEASES
from orchestrator.api.namespaces import NAMESPACE_TABLE
from orchestrator.api.pods import PODS
from orchestrator.cli.tables import TABLES
from orchestrator.resources import (
    KINDS,
    Event,
    Maintenance,
    Namespace,
    Node,
    NodeDrain,
    NodeFencing,
    RebalancePolicy,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
)
from orchestrator.resources.shown_maintenance import ShownMaintenance, show_maintenance
from orchestrator.resources.shown_node import ShownNode, show_node

CHANGE: Final = ("update", "patch")
MAKE: Final = ("create", *CHANGE, "delete", "deletecollection")
_ALL: Final = ("all",)


def _about(part: str) -> Callable[[Any], str]:
    return lambda event: str(getattr(event.involved_object, part))


def _api_version(event: Event) -> str:
    known = KINDS.get(event.involved_object.kind)
    return known.group_version if known is not None else ""


VIRTUAL_MACHINES = ApiResource(
    VirtualMachine,
    (*READ, *MAKE),
    TABLES[VirtualMachine],
    {
        "status.phase": lambda vm: vm.status.phase.value,
        "status.nodeName": lambda vm: vm.status.node_name,
        "spec.runPolicy": lambda vm: vm.spec.run_policy.value,
        "spec.virtualMachineClassName": lambda vm: vm.spec.virtual_machine_class_name or "",
    },
    short_names=("vm",),
    categories=_ALL,
)
OPERATIONS = ApiResource(
    VirtualMachineOperation,
    (*READ, *MAKE),
    TABLES[VirtualMachineOperation],
    {
        "status.phase": lambda operation: operation.status.phase.value,
        "spec.virtualMachineName": lambda operation: operation.spec.virtual_machine_name,
        "spec.type": lambda operation: operation.spec.type.value,
    },
    short_names=("vmop",),
    categories=_ALL,
)
CLASSES = ApiResource(
    VirtualMachineClass,
    (*READ, *MAKE),
    TABLES[VirtualMachineClass],
    {"status.phase": lambda vm_class: vm_class.status.phase.value},
    short_names=("vmclass",),
)
NODES = ApiResource(
    Node,
    (*READ, *CHANGE, "delete"),
    TABLES[Node],
    {"spec.unschedulable": lambda node: str(node.spec.unschedulable).lower()},
    short_names=("no",),
    wire=show_node,
    schema=ShownNode,
    actions=("uncordon", "failures", "overview"),
)
DRAINS = ApiResource(
    NodeDrain,
    (*READ, "create", *CHANGE, "delete"),
    TABLES[NodeDrain],
    {"status.phase": lambda drain: drain.status.phase.value},
    short_names=("drain",),
    actions=("cancel", "plan"),
)
MAINTENANCES = ApiResource(
    Maintenance,
    (*READ, "create", *CHANGE, "delete"),
    TABLES[Maintenance],
    {"status.phase": lambda maintenance: maintenance.status.phase.value},
    short_names=("maint",),
    wire=show_maintenance,
    schema=ShownMaintenance,
    actions=("pause", "resume", "stop", "claimhook", "renewhook", "endhook"),
)
POLICIES = ApiResource(
    RebalancePolicy,
    (*READ, "create", *CHANGE),
    TABLES[RebalancePolicy],
    short_names=("rebalance",),
    actions=("plan", "run"),
)
FENCINGS = ApiResource(
    NodeFencing,
    (*READ, "create", *CHANGE),
    TABLES[NodeFencing],
    {"status.phase": lambda fencing: fencing.status.phase.value},
    short_names=("fencing",),
    actions=("confirm", "test", "arm", "disarm", "disarmed"),
)
EVENTS = ApiResource(
    Event,
    READ,
    TABLES[Event],
    {
        "involvedObject.kind": _about("kind"),
        "involvedObject.namespace": _about("namespace"),
        "involvedObject.name": _about("name"),
        "involvedObject.uid": _about("uid"),
        "involvedObject.apiVersion": _api_version,
        "reason": lambda event: event.reason,
        "type": lambda event: event.type,
        "source": lambda event: event.source.component,
    },
    short_names=("ev",),
)
NAMESPACES = ApiResource(
    Namespace,
    (*READ, "create", *CHANGE, "delete"),
    NAMESPACE_TABLE,
    {"status.phase": lambda namespace: namespace.status.phase.value},
    short_names=("ns",),
    is_derived=True,
)

RESOURCES: Final[tuple[ApiResource, ...]] = (
    VIRTUAL_MACHINES,
    OPERATIONS,
    CLASSES,
    NODES,
    NAMESPACES,
    PODS,
    EVENTS,
    DRAINS,
    MAINTENANCES,
    POLICIES,
    FENCINGS,
    LEASES,
)
