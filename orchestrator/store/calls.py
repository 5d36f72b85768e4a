"""Calls of scripts, apart from the client that makes them: the heartbeat process has one of its own."""

import hashlib

from orchestrator.lease import Lease
from orchestrator.store import keys


def lease_arguments(node: str, lease: Lease, peer_key: str) -> list[str | int | float]:
    """Give ARGV of `lua/lease.lua`.

    Args:
        node: Whose lease it is.
        lease: It.
        peer_key: The one held; empty for none.
    """
    held = hashlib.sha1(peer_key.encode(), usedforsecurity=False).hexdigest()
    return [
        lease.text(),
        keys.LEASE_KEPT_MS,
        node,
        lease.boot_id,
        lease.generation,
        lease.sequence,
        repr(lease.created),
        lease.membership,
        held,
    ]
