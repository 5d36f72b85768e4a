"""Resources: immutable pydantic models in the Kubernetes shape and the platform's vocabulary."""

from orchestrator.resources.domain_xml import RenderHost, render_domain
from orchestrator.resources.event import Event, event_about
from orchestrator.resources.fencing import NodeFencing
from orchestrator.resources.meta import (
    DEFAULT_NAMESPACE,
    Condition,
    Key,
    ObjectMeta,
    Resource,
    find_condition,
    make_key,
    new_metadata,
    parse,
    split_key,
    with_condition,
)
from orchestrator.resources.node import Node, NodeInventory, SeenDomain
from orchestrator.resources.vm import RunPolicy, VirtualMachine, VmPhase
from orchestrator.resources.vmclass import VirtualMachineClass
from orchestrator.resources.vmop import (
    Action,
    Grant,
    GrantState,
    NodeGrant,
    OperationPhase,
    OperationType,
    Order,
    OrderKind,
    Priority,
    Reading,
    Reason,
    Settlement,
    VirtualMachineOperation,
)

KINDS: dict[str, type[Resource]] = {
    kind.kind_name: kind
    for kind in (VirtualMachine, VirtualMachineClass, VirtualMachineOperation, Node, NodeInventory, NodeFencing, Event)
}
"""Every kind that the store keeps, by name."""

__all__ = [
    "DEFAULT_NAMESPACE",
    "KINDS",
    "Action",
    "Condition",
    "Event",
    "Grant",
    "GrantState",
    "Key",
    "Node",
    "NodeFencing",
    "NodeGrant",
    "NodeInventory",
    "ObjectMeta",
    "OperationPhase",
    "OperationType",
    "Order",
    "OrderKind",
    "Priority",
    "Reading",
    "Reason",
    "RenderHost",
    "Resource",
    "RunPolicy",
    "SeenDomain",
    "Settlement",
    "VirtualMachine",
    "VirtualMachineClass",
    "VirtualMachineOperation",
    "VmPhase",
    "event_about",
    "find_condition",
    "make_key",
    "new_metadata",
    "parse",
    "render_domain",
    "split_key",
    "with_condition",
]
