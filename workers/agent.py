"""The agent: registers its node, renews its lease, reports its domains, answers the control plane's questions.

Four threads: the lease (nothing that blocks is done there), the inventory, the wait for orders, and a few that answer
them, so that one slow answer holds up nothing.
"""

import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from uuid import uuid4

from orchestrator import logs
from orchestrator.errors import HypervisorError, Invalid, StoreUnavailable, VmherdError
from orchestrator.resources import Order
from orchestrator.resources.meta import check_name
from orchestrator.settings import settings
from orchestrator.store.node_store import NodeStore
from workers.hypervisor.libvirt_driver import LibvirtHypervisor
from workers.hypervisor.port import Hypervisor
from workers.inventory import Inventory
from workers.orders import perform
from workers.reporting import report_surely

log = logs.logger(__name__)

_LOOK_EVERY_S = 2.0
"""A wake-up that was lost is made up for by then."""


class Agent:
    """One node's agent.

    Args:
        store: The node's view of Redis.
        hypervisor: The node's.
        migration_uri: Where other hosts' daemons reach this one's.
    """

    def __init__(self, store: NodeStore, hypervisor: Hypervisor, migration_uri: str) -> None:
        self.stop = threading.Event()
        self._store = store
        self._hypervisor = hypervisor
        self._generation = uuid4().hex
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._inventory = Inventory(
            store, hypervisor, {"migration_uri": migration_uri}, self._generation, self._boot_id, self.stop
        )
        self._answered: dict[str, float] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        """Run until `stop` is set."""
        self._hypervisor.watch(self._inventory.note)
        threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("lease", self._renew), ("inventory", self._inventory.run), ("orders", self._listen))
        ]
        for thread in threads:
            thread.start()
        self.stop.wait()
        for thread in threads:
            thread.join(timeout=_LOOK_EVERY_S + 1)
        self._hypervisor.close()

    def _renew(self) -> None:
        sequence = 0
        config = settings()
        while not self.stop.is_set():
            sequence += 1
            try:
                self._store.renew_lease(
                    {
                        "generation": self._generation,
                        "boot_id": self._boot_id,
                        "sequence": sequence,
                        "ttl_ms": int(config.lease_ttl * 1000),
                    }
                )
            except StoreUnavailable as error:
                log.warning("lease not renewed", error=str(error))
            self.stop.wait(config.heartbeat)

    def _listen(self) -> None:
        last = "0-0"
        with ThreadPoolExecutor(max_workers=4, thread_name_prefix="answer") as pool:
            while not self.stop.is_set():
                try:
                    for order_id, order in self._store.orders().items():
                        if self._take(order_id):
                            pool.submit(self._answer, order_id, order)
                    last = self._store.wait_for_wake(last, _LOOK_EVERY_S)
                except StoreUnavailable as error:
                    log.warning("orders: no Redis", error=str(error))
                    self.stop.wait(0.5)

    def _take(self, order_id: str) -> bool:
        """Whether to answer an order now: one that was just taken is, while the control plane has not read that yet."""
        clock = time.monotonic()
        with self._lock:
            self._answered = {k: at for k, at in self._answered.items() if clock - at < _LOOK_EVERY_S}
            if order_id in self._answered:
                return False
            self._answered[order_id] = clock
            return True

    def _answer(self, order_id: str, order: Order | None) -> None:
        """Answer one order. One that can't be answered stays, and is looked at again."""
        if order is None:
            self._inventory.list_anew(order_id)
            return
        if order.kind.changes_domain:
            return  # the lifecycle worker's
        try:
            reading = perform(self._hypervisor, order, self._store.claimed_by(order.epoch))
        except (HypervisorError, StoreUnavailable) as error:
            log.warning("no answer yet", order=order_id, error=str(error))
            return
        report_surely(self._store, "Answer", {"order": order.id, "reading": reading}, self.stop)


def main() -> None:
    """Run this node's agent until SIGTERM or SIGINT."""
    try:
        config = settings()
        logs.configure("agent")
        if not config.node:
            raise Invalid("VMHERD_NODE is not set: the name under which this host joins the herd")
        check_name(config.node)
    except (VmherdError, ValueError) as error:
        raise SystemExit(f"vmherd: {error}") from None
    agent = Agent(
        NodeStore.open(),
        LibvirtHypervisor(config.libvirt_uri),
        config.migration_uri or f"qemu+tls://{socket.getfqdn()}/system",
    )

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        agent.stop.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    log.info("agent starts")
    agent.run()


if __name__ == "__main__":
    main()
