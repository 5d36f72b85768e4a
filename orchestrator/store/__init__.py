"""Redis: the herd's truth. `store` for the control plane, `node_store` for a node, `follower` for a copy in memory.

The control plane's part is loaded when it is first used: the heartbeat process needs `keys` and `calls` alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.store.batch import Batch
    from orchestrator.store.store import Change, ChangeType, Refusal, Store

__all__ = ["Batch", "Change", "ChangeType", "Refusal", "Store"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from orchestrator.store import batch, store  # noqa: PLC0415 - see the module's docstring

        return getattr(batch if name == "Batch" else store, name)
    raise AttributeError(f"module 'orchestrator.store' has no attribute {name!r}")
