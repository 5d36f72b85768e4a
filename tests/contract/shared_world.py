"""A world of simulated hosts that the threads of one process share: a lock, and a thread that brings it up to date."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from workers.hypervisor.port import DomainEvent
from workers.hypervisor.simulated import SimulatedHypervisor
from workers.hypervisor.simulated_faults import Faults
from workers.hypervisor.simulated_spec import Subscription
from workers.hypervisor.simulated_world import World

_log = logging.getLogger(__name__)


class SharedWorld:
    """Makes drivers to the hosts of one world, whose clock is `time.monotonic`.

    Args:
        world: Nobody else may touch it.
    """

    def __init__(self, world: World) -> None:
        self.lock = threading.Lock()
        self._world = world
        self._changed = threading.Event()
        self._closed = False
        threading.Thread(target=self._pace, name="simulated-time", daemon=True).start()

    def hypervisor(self, host: str) -> SimulatedHypervisor:
        """Make a driver to one host."""
        return SimulatedHypervisor(_SharedLink(self, host), host)

    def cause(self, fault: str, **arguments: Any) -> None:
        """Cause a fault: a method of `Faults`."""
        with self.lock:
            getattr(Faults(self._world), fault)(**arguments)
        self._changed.set()

    def look(self, look: Callable[[World], Any]) -> Any:
        """Give what a function of the world gives; it must keep nothing of it."""
        with self.lock:
            return look(self._world)

    def ask(self, host: str, method: str, *arguments: Any) -> Any:
        """Make a call, and wait for its end."""
        ended = threading.Event()
        with self.lock:
            answer = self._world.call(host, method, *arguments)
            answer.add_done_callback(lambda _: ended.set())
        self._changed.set()
        ended.wait()
        return answer.result()

    def close(self) -> None:
        """End its thread. What waits for something that is yet to happen waits for ever."""
        self._closed = True
        self._changed.set()

    def _pace(self) -> None:
        while not self._closed:
            self._changed.clear()
            with self.lock:
                self._world.advance()
                due = self._world.next_at()
            self._changed.wait(None if due is None else max(0.0, due - time.monotonic()))


class _SharedLink:
    """See `workers.hypervisor.simulated.Link`."""

    def __init__(self, shared: SharedWorld, host: str) -> None:
        self._shared = shared
        self._host = host
        self._told = threading.Event()
        self._closed = threading.Event()

    def ask(self, method: str, *arguments: Any) -> Any:
        return self._shared.ask(self._host, method, *arguments)

    def watch(self, callback: Callable[[DomainEvent], None]) -> None:
        subscription: Subscription = self._shared.look(lambda world: world.subscribe(self._host, self._told.set))
        threading.Thread(target=self._tell, args=(subscription, callback), daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._told.set()

    def _tell(self, subscription: Subscription, callback: Callable[[DomainEvent], None]) -> None:
        while not self._closed.is_set():
            self._told.wait()
            self._told.clear()
            for event in self._shared.look(lambda _: subscription.take()):
                if self._closed.is_set():
                    break
                try:
                    callback(event)
                except Exception:  # noqa: BLE001  the watcher's fault must not end the events
                    _log.exception("the watcher of simulated host %s failed at %s", self._host, event)
        self._shared.look(lambda world: world.unsubscribe(subscription))
