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
_THREADS = 20


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
    names = [node_name(number) for number in range(nodes)]
    silent: set[str] = set()
    ended = threading.Event()
    for first in range(_THREADS):  # Redis writes what comes at once with one fsync, as it does for real nodes
        threading.Thread(target=_beat, args=(url, names[first::_THREADS], period_s, silent, ended)).start()
    print("beating", flush=True)
    for line in sys.stdin:
        silent.add(line.strip())
    ended.set()


def _beat(url: str, names: list[str], period_s: float, silent: set[str], ended: threading.Event) -> None:
    client = connect(url)
    beating = [Beating(NodeStore(client, name)) for name in names]
    began, number = time.monotonic(), 0
    while not ended.is_set():
        one = beating[number % len(beating)]
        if one.store.node not in silent:
            one.beat()
        number += 1
        ended.wait(max(0.0, began + number * period_s / len(beating) - time.monotonic()))


if __name__ == "__main__":
    main()
