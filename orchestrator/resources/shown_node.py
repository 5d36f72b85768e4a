"""Nodes as Kubernetes' clients expect them: capacity as quantities, and what `kubectl describe node` shows."""

from typing import Any, ClassVar

from pydantic import Field

from orchestrator.resources.meta import Condition, Model, prune
from orchestrator.resources.node import HypervisorInfo, Node, NodeSpec


class NodeSystemInfo(Model):
    """What runs on the host.

    Attributes:
        boot_id: Changes with each boot of the host.
        system_uuid: Of the host, as its hypervisor tells.
        kubelet_version: The hypervisor's, where clients look for a version.
    """

    boot_id: str = Field("", alias="bootID")
    system_uuid: str = Field("", alias="systemUUID")
    kubelet_version: str = ""
    operating_system: str = "linux"


class ShownNodeStatus(Model):
    """What is known of a node.

    Attributes:
        capacity: What the host has: `cpu`, `memory`.
        allocatable: The same; what the herd keeps for hosts themselves is a setting.
        hypervisor: How other hosts reach it, and what it runs.
    """

    capacity: dict[str, str] = Field(default_factory=dict)
    allocatable: dict[str, str] = Field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    node_info: NodeSystemInfo = NodeSystemInfo()
    hypervisor: HypervisorInfo = HypervisorInfo()


class ShownNode(Node):
    """One hypervisor host, as the API shows it."""

    kind_name: ClassVar[str] = "Node"
    spec: NodeSpec = NodeSpec()
    status: ShownNodeStatus = ShownNodeStatus()  # type: ignore[assignment]  # shown, never stored


def show_node(node: Node) -> dict[str, Any]:
    """Give a node as the API shows it."""
    document, status = node.manifest(), node.status
    has = {"cpu": str(status.capacity.cpu), "memory": f"{status.capacity.memory_mib}Mi"}
    info = NodeSystemInfo(
        boot_id=status.boot_id, system_uuid=status.hypervisor.host_uuid, kubelet_version=status.hypervisor.version
    )
    shown = document.get("status", {}) | {"capacity": has, "allocatable": has}
    shown["nodeInfo"] = info.model_dump(mode="json", by_alias=True)
    shown.pop("bootId", None)
    shown.pop("generation", None)
    return {**document, "status": prune(shown)}
