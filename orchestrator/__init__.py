"""The control plane: keeps virtual machines running on a herd of libvirt hosts.

The public Python API is `Cluster`; it is loaded when it is first used, so that a node's processes, which need only
resources and queues, don't load the whole control plane.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.cluster import Cluster, Operation, Progress

__all__ = ["Cluster", "Operation", "Progress"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from orchestrator import cluster  # noqa: PLC0415 - see the module's docstring

        return getattr(cluster, name)
    raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
