"""Redis: the herd's truth. `store` for the control plane, `node_store` for a node, `follower` for a copy in memory."""

from orchestrator.store.batch import Batch
from orchestrator.store.store import Change, ChangeType, Refusal, Store

__all__ = ["Batch", "Change", "ChangeType", "Refusal", "Store"]
