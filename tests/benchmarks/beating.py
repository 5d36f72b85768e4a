"""Heartbeats of many simulated nodes, in a process of their own: only what they say to Redis.

    python -m tests.benchmarks.beating URL NODES PERIOD_S

Each renews its lease as the real one does, by the same script, and acknowledges suspicions and memberships. A line on
standard input names a node that falls silent.
"""

import sys
import threading
import time

from orchestrator.lease import PROFILES, Lease
from orchestrator.store.connection import connect
from orchestrator.store.node_store import NodeStore

TIMING = PROFILES["medium"]


class Beating:
    """One node's heartbeat."""

    def __init__(self, store: NodeStore) -> None:
        self.store = store
        self.lease = Lease(f"g-{store.node}", f"b-{store.node}", 0, 0.0, TIMING, armed=True, watchdog="simulated")
        self.peer_key = ""

    def beat(self) -> None:
        """Renew the lease, and take in the answer."""
        old = self.lease
        values = {name: getattr(old, name) for name in old.__slots__}
        self.lease = Lease(**{**values, "sequence": old.sequence + 1, "created": time.monotonic()})
        reply = self.store.renew_lease(self.lease, self.peer_key)
        self.peer_key = reply.peer_key if reply.peer_key is not None else self.peer_key
        values = {name: getattr(self.lease, name) for name in old.__slots__}
        values["suspicions"] = tuple(reply.suspicions.values())
        values["membership"] = reply.membership.version if reply.membership is not None else self.lease.membership
        self.lease = Lease(**values)


def node_name(number: int) -> str:
    """Name a node."""
    return f"n{number:04}"


def main() -> None:
    """Beat until standard input ends."""
    url, nodes, period_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    client = connect(url)
    beating = {node_name(number): Beating(NodeStore(client, node_name(number))) for number in range(nodes)}

    def listen() -> None:
        for line in sys.stdin:
            beating.pop(line.strip(), None)
        beating.clear()

    threading.Thread(target=listen, daemon=True).start()
    began, number = time.monotonic(), 0
    print("beating", flush=True)
    while beating:
        found = beating.get(node_name(number % nodes))
        if found is not None:
            found.beat()
        number += 1
        time.sleep(max(0.0, began + number * period_s / nodes - time.monotonic()))


if __name__ == "__main__":
    main()
