"""Resources: immutable pydantic models in the Kubernetes shape and the platform's vocabulary."""

from orchestrator.resources.access_token import AccessToken, Role
from orchestrator.resources.domain_xml import RenderHost, render_domain
from orchestrator.resources.drain import NodeDrain
from orchestrator.resources.event import Event, event_about
from orchestrator.resources.fencing import NodeFencing
from orchestrator.resources.grant import Action, Grant, GrantState, NodeGrant, Order, OrderKind, Reading, Settlement
from orchestrator.resources.maintenance import Maintenance
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
from orchestrator.resources.namespace import Namespace
from orchestrator.resources.node import Node, NodeInventory, SeenDomain
from orchestrator.resources.rebalancing import RebalancePolicy
from orchestrator.resources.vm import RunPolicy, VirtualMachine, VmPhase
from orchestrator.resources.vmclass import VirtualMachineClass
from orchestrator.resources.vmop import OperationPhase, OperationType, Priority, Reason, VirtualMachineOperation

KINDS: dict[str, type[Resource]] = {
    kind.kind_name: kind
    for kind in (
        VirtualMachine,
        VirtualMachineClass,
        VirtualMachineOperation,
        Node,
        NodeInventory,
        NodeDrain,
        NodeFencing,
        Namespace,
        Maintenance,
        Event,
        AccessToken,
        RebalancePolicy,
    )
}
"""Every kind that the store keeps, by name."""

__all__ = [
    "DEFAULT_NAMESPACE",
    "KINDS",
    "AccessToken",
    "Action",
    "Condition",
    "Event",
    "Grant",
    "GrantState",
    "Key",
    "Maintenance",
    "Namespace",
    "Node",
    "NodeDrain",
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
    "RebalancePolicy",
    "RenderHost",
    "Resource",
    "Role",
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
