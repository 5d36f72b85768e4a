"""The agent: registers its node, reports its domains, answers the control plane's questions.

Threads: the inventory, the wait for orders, a few that answer them, so that one slow answer holds up nothing, and one
that shows what is in use of the host.
The node's lease is not its affair (`heartbeat`): it may be restarted at any time.
"""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

from orchestrator import logs, metrics
from orchestrator.errors import HypervisorError, Invalid, StoreUnavailable, VmherdError
from orchestrator.resources import Order, OrderKind
from orchestrator.resources.adoption import AdoptionOrder
from orchestrator.resources.looking import LookOrder
from orchestrator.resources.names import check_name
from orchestrator.settings import Settings, settings
from orchestrator.store.node_store import NodeStore
from workers import adoption, clock, holder
from workers.hypervisor.drivers import boot_id, look_by_libvirt, looker, migration_uri, open_hypervisor
from workers.hypervisor.port import Domain, HostUse, Hypervisor
from workers.inventory import Inventory
from workers.orders import guests_of, perform
from workers.preflight import HostStorage, Needs, SharedStorage, Storage, check, describe
from workers.reporting import report_surely

log = logs.logger(__name__)

_ANSWERS_AT_A_TIME = 4
_FIRST_USE_S = 1.0
_USE_EVERY_S = 10.0
_LOOK_EVERY_S = 2.0
"""A wake-up that was lost is made up for by then."""


class Agent:
    """One node's agent.

    Args:
        store: The node's view of Redis.
        hypervisor: The node's.
        migration_uri: Where other hosts' daemons reach this one's.
        kill: Kills the holder of a suspect grant (see `holder.kill`).
        boot_id: Of this host's boot; by default the kernel's.
        look: Lists the domains of another host, by the URI of its daemon.
        storage: Tells which images other hosts see too; by default all.
    """

    def __init__(
        self,
        store: NodeStore,
        hypervisor: Hypervisor,
        migration_uri: str,
        *,
        kill: Callable[[str, str], None] = holder.kill,
        boot_id: str = "",
        look: Callable[[str], list[Domain]] = look_by_libvirt,
        storage: Storage | None = None,
    ) -> None:
        self.stop = threading.Event()
        self._store = store
        self._hypervisor = hypervisor
        self._kill = kill
        self._generation = uuid4().hex
        self._boot_id = boot_id or Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._storage = storage or SharedStorage()
        self._needs = Needs(hypervisor, self._storage)
        self._inventory = Inventory(
            store,
            hypervisor,
            {"migration_uri": migration_uri, "cpu_shares": settings().cpu_shares},
            self._generation,
            self._boot_id,
            self.stop,
            self._needs,
        )
        self._look = look
        self._looking: set[str] = set()
        self._answered: dict[str, float] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        """Run until `stop` is set."""
        self._hypervisor.watch(self._inventory.note)
        threads = [
            clock.begin(name, run)
            for name, run in (("inventory", self._inventory.run), ("orders", self._listen), ("use", self._show_use))
        ]
        clock.wait(self.stop)
        for thread in threads:
            thread.join(timeout=_LOOK_EVERY_S + 1)
        self._hypervisor.close()

    def _listen(self) -> None:
        last, number = "0-0", 0
        with clock.pool("answer", _ANSWERS_AT_A_TIME) as pool:
            while not self.stop.is_set():
                number += 1
                try:
                    self._store.show_alive(f"{self._generation}-{number}")
                    for order_id, order in self._store.orders().items():
                        if self._take(order_id):
                            pool.submit(self._answer, order_id, order)
                    last = self._store.wait_for_wake(last, _LOOK_EVERY_S)
                except StoreUnavailable as error:
                    log.warning("orders: no Redis", error=str(error))
                    clock.wait(self.stop, 0.5)

    def _show_use(self) -> None:
        before: HostUse | None = None
        while not clock.wait(self.stop, _FIRST_USE_S if before is None else _USE_EVERY_S):
            try:
                now = self._hypervisor.use()
                if before is not None:
                    self._store.show_use(_busy_share(before, now), now.memory_mib)
                before = now
            except (HypervisorError, StoreUnavailable) as error:
                log.debug("what is in use is not shown", error=str(error))  # others say aloud that one is away

    def _take(self, order_id: str) -> bool:
        """Whether to answer an order now: one that was just taken is, while the control plane has not read that yet."""
        now = clock.monotonic()
        with self._lock:
            self._answered = {k: at for k, at in self._answered.items() if now - at < _LOOK_EVERY_S}
            if order_id in self._answered:
                return False
            self._answered[order_id] = now
            return True

    def _answer(self, order_id: str, order: Order | AdoptionOrder | LookOrder | None) -> None:
        """Answer one order. One that can't be answered stays, and is looked at again."""
        if order is None:
            self._inventory.list_anew(order_id)
            return
        if isinstance(order, LookOrder):
            self._look_at(order)
            return
        if order.kind.changes_domain:
            return  # the lifecycle worker's
        if isinstance(order, AdoptionOrder):
            self._answer_adoption(order)
            return
        if order.kind in {OrderKind.CHECK, OrderKind.DESCRIBE}:
            self._answer_question(order)
            return
        try:
            reading = perform(self._hypervisor, order, self._store.claimed_by(order.epoch), self._kill)
        except (HypervisorError, StoreUnavailable) as error:
            log.warning("no answer yet", order=order_id, error=str(error))
            return
        report_surely(self._store, "Answer", {"order": order.id, "reading": reading}, self.stop)

    def _look_at(self, order: LookOrder) -> None:
        """Look at another host through its daemon; once, as that may take longer than until the order is read again."""
        with self._lock:
            if order.id in self._looking:
                return
            self._looking.add(order.id)
        try:
            body: dict[str, Any] = {"guests": guests_of(self._look(order.uri))}
        except HypervisorError as error:
            body = {"problem": str(error)}
        try:
            report_surely(self._store, "Looked", {"order": order.id, **body}, self.stop)
        finally:
            with self._lock:
                self._looking.discard(order.id)

    def _answer_adoption(self, order: AdoptionOrder) -> None:
        try:
            adoption.answer(self._store, self._hypervisor, order, self._storage, self.stop)
        except (HypervisorError, StoreUnavailable) as error:
            log.warning("no answer yet", order=order.id, error=str(error))

    def _answer_question(self, order: Order) -> None:
        """Answer what is asked before a migration is granted."""
        try:
            if order.kind is OrderKind.DESCRIBE:
                kind, body = "Described", describe(self._hypervisor, self._needs, order)
            else:
                problems = check(self._hypervisor, self._storage, order)
                kind, body = "Checked", {"order": order.id, "generation": self._generation, "problems": problems}
        except HypervisorError as error:
            log.warning("no answer yet", order=order.id, error=str(error))
            return
        report_surely(self._store, kind, body, self.stop)


def _busy_share(before: HostUse, now: HostUse) -> float:
    busy, idle = now.busy_s - before.busy_s, now.idle_s - before.idle_s
    return min(1.0, max(0.0, busy / (busy + idle))) if busy + idle > 0 else 0.0


def _storage(config: Settings) -> Storage:
    """The host's file systems, unless all images are known to be shared. Simulated ones are no files of this host's."""
    if config.assume_shared_storage or config.libvirt_uri.startswith("simulated"):
        return SharedStorage()
    return HostStorage(config.state_dir / "disks.json")


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
        open_hypervisor(config),
        migration_uri(config),
        boot_id=boot_id(config),
        look=looker(config),
        storage=_storage(config),
    )

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        agent.stop.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    metrics.serve("agent")
    log.info("agent starts")
    agent.run()


if __name__ == "__main__":
    main()
