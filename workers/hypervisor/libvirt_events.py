"""libvirt's events: received on its event loop's thread, told on a thread of our own.

libvirt calls back on the thread that also reads its sockets, so a callback that makes a libvirt call would wait for
itself. Hence the callbacks here only translate and queue; one thread (the teller) takes from the queue, calls the
watcher, and reconnects when the connection is lost. The connection is the teller's own: it alone opens and closes it.

What is told of the new connection comes after RESYNC, and RESYNC after the callbacks were registered there. So whoever
lists on RESYNC misses nothing.
"""

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Final

import libvirt

from orchestrator.errors import HypervisorUnavailable
from workers.hypervisor.libvirt_connection import message_of, open_connection
from workers.hypervisor.libvirt_readings import LifecycleEvent, lifecycle_event
from workers.hypervisor.port import DomainEvent, EventKind

_log = logging.getLogger(__name__)

FIRST_RETRY_S: Final = 0.1
LONGEST_RETRY_S: Final = 2.0
"""Between attempts to reconnect. A local daemon refuses at no cost, and its restart takes about a second."""


@dataclass(frozen=True, slots=True)
class _Lifecycle:
    uuid: str
    event: LifecycleEvent


@dataclass(frozen=True, slots=True)
class _Closed:
    """The connection broke (`subscription` says which one), or is to be closed (None)."""

    subscription: "_Subscription | None"


_Item = DomainEvent | _Lifecycle | _Closed


class _Subscription:
    """One connection with all callbacks on it.

    Raises:
        HypervisorUnavailable: The daemon does not answer, or broke the connection off.
    """

    def __init__(self, uri: str, queue: "SimpleQueue[_Item]") -> None:
        self._queue = queue
        self._connection = open_connection(uri)
        self._ids: list[int] = []
        try:
            self._connection.registerCloseCallback(self._on_close, None)
            for event, callback in (
                (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle),
                (libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, self._on_reboot),
                (libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, self._on_agent),
                (libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, self._on_metadata),
                (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, self._on_job_completed),
            ):
                self._ids.append(self._connection.domainEventRegisterAny(None, event, callback, None))
        except libvirt.libvirtError as error:
            self.close()
            raise HypervisorUnavailable(f"libvirt at {uri} can't be watched: {message_of(error)}") from error

    def close(self) -> None:
        # A connection with callbacks is kept alive by them: without this each restart of the daemon leaks one. On a
        # broken connection libvirt removes them and then complains.
        for number in self._ids:
            with contextlib.suppress(libvirt.libvirtError):
                self._connection.domainEventDeregisterAny(number)
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.unregisterCloseCallback()
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.close()

    def _on_close(self, _connection: Any, _reason: int, _opaque: None) -> None:
        self._queue.put(_Closed(self))

    def _on_lifecycle(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: None) -> None:
        self._queue.put(_Lifecycle(domain.UUIDString(), lifecycle_event(event, detail)))

    def _on_reboot(self, _connection: Any, domain: Any, _opaque: None) -> None:
        self._queue.put(DomainEvent(EventKind.REBOOTED, domain.UUIDString()))

    def _on_agent(self, _connection: Any, domain: Any, state: int, _reason: int, _opaque: None) -> None:
        connected = state == libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED
        self._changed(domain, "agent-connected" if connected else "agent-disconnected")

    def _on_metadata(self, _connection: Any, domain: Any, _kind: int, _namespace: str | None, _opaque: None) -> None:
        self._changed(domain, "metadata")

    def _on_job_completed(self, _connection: Any, domain: Any, _figures: Any, _opaque: None) -> None:
        self._changed(domain, "job-completed")

    def _changed(self, domain: Any, detail: str) -> None:
        self._queue.put(DomainEvent(EventKind.CHANGED, domain.UUIDString(), detail))


class EventTeller:
    """Tells one watcher of every event, over restarts of the daemon, until closed.

    Args:
        uri: The daemon's URI.
        callback: Called from the teller's thread, one event at a time. What it raises is logged.

    Raises:
        HypervisorUnavailable: The daemon does not answer now.
    """

    def __init__(self, uri: str, callback: Callable[[DomainEvent], None]) -> None:
        self._uri = uri
        self._callback = callback
        self._queue: SimpleQueue[_Item] = SimpleQueue()
        self._awake = threading.Event()
        self._closed = False
        self._shutdown_by: dict[str, str] = {}
        subscription = _Subscription(uri, self._queue)
        threading.Thread(target=self._run, args=(subscription,), name="libvirt-events", daemon=True).start()

    def wake(self) -> None:
        """Try to reconnect now, if not connected: somebody else just could."""
        self._awake.set()

    def close(self) -> None:
        """Tell nothing any more. Doesn't wait for a callback that runs, so it may be called from one."""
        self._closed = True
        self._queue.put(_Closed(None))
        self._awake.set()

    def _run(self, subscription: _Subscription) -> None:
        while True:
            self._tell_until_lost(subscription)
            subscription.close()
            if self._closed:
                return
            self._tell(DomainEvent(EventKind.LOST))
            self._shutdown_by.clear()
            again = self._reconnect()
            if again is None:
                return
            subscription = again
            self._tell(DomainEvent(EventKind.RESYNC))

    def _tell_until_lost(self, subscription: _Subscription) -> None:
        while not self._closed:
            match self._queue.get():
                case _Closed(subscription=lost):
                    if lost is None or lost is subscription:
                        return
                case _Lifecycle(uuid=uuid, event=event):
                    self._tell(self._with_reason(uuid, event))
                case DomainEvent() as event:
                    self._tell(event)

    def _with_reason(self, uuid: str, event: LifecycleEvent) -> DomainEvent:
        if event.shutdown_by:
            self._shutdown_by[uuid] = event.shutdown_by
            return DomainEvent(event.kind, uuid, event.detail)
        if event.kind in (EventKind.STARTED, EventKind.STOPPED):
            by = self._shutdown_by.pop(uuid, "")
            if event.kind is EventKind.STOPPED and event.detail == "shutdown":
                return DomainEvent(event.kind, uuid, event.detail, by)
        return DomainEvent(event.kind, uuid, event.detail)

    def _reconnect(self) -> _Subscription | None:
        pause = FIRST_RETRY_S
        while not self._closed:
            self._awake.clear()
            try:
                return _Subscription(self._uri, self._queue)
            except HypervisorUnavailable:
                self._awake.wait(pause)
                pause = min(2 * pause, LONGEST_RETRY_S)
        return None

    def _tell(self, event: DomainEvent) -> None:
        if self._closed:
            return
        try:
            self._callback(event)
        except Exception:  # noqa: BLE001  the watcher's fault must not end the events
            _log.exception("the watcher of %s failed at %s", self._uri, event)
