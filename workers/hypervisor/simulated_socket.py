"""A link to simulated hosts whose world is another process, over its Unix socket.

Each call has a connection of its own, so nothing is shared between threads or inherited by a fork, and a call that
blocks holds up no other. Whoever waits is woken by the answer. A caller that dies closes its connection; what it began
goes on, as in libvirtd.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import HypervisorError, HypervisorUnavailable
from workers.hypervisor.port import DomainEvent, EventKind
from workers.hypervisor.simulated_spec import broken_off, unanswered
from workers.hypervisor.simulated_wire import check_answer, pack, pack_call, read_event, read_value, unpack

_log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S: Final = 5.0
_READING_TIMEOUT_S: Final = 30.0
"""For calls that don't block: a world that is frozen must not hold its askers for ever."""
_BLOCKING: Final = frozenset({"migrate", "destroy", "dirty_rate"})
_FIRST_RETRY_S: Final = 0.1
_LONGEST_RETRY_S: Final = 2.0


class SocketLink:
    """Leads to one host of a world that listens on a Unix socket.

    Args:
        path: The socket.
        host: The host's name there.
    """

    def __init__(self, path: Path, host: str) -> None:
        self._path = path
        self._host = host
        self._closed = threading.Event()
        self._watching: socket.socket | None = None

    def ask(self, method: str, *arguments: Any) -> Any:
        """Ask something of it, and wait for the answer."""
        try:
            connection = self._connect()
        except HypervisorUnavailable as error:
            return _given(unanswered(method, str(error)))
        with connection, connection.makefile("rb") as lines:
            try:
                connection.sendall(pack_call(self._host, method, arguments))
                connection.settimeout(None if method in _BLOCKING else _READING_TIMEOUT_S)
                line = lines.readline()
            except OSError as error:
                line, why = b"", str(error)
            else:
                why = "it ended"
        if not line.endswith(b"\n"):
            words = f"the connection to simulated host {self._host} ({self._path}) broke during {method}: {why}"
            return _given(broken_off(method, words))
        return read_value(method, unpack(line))

    def request(self, message: dict[str, Any]) -> Any:
        """Make a request that is no call of the port (see `simulated_wire`), and give the answer's value."""
        with self._connect() as connection:
            try:
                connection.sendall(pack(message))
                answer = unpack(_read_line(connection))
            except OSError as error:
                raise HypervisorUnavailable(f"the world at {self._path}: {error}") from error
        check_answer(answer)
        return answer.get("value")

    def watch(self, callback: Callable[[DomainEvent], None]) -> None:
        """Tell `callback` of every event, from a thread of its own, over outages."""
        connection = self._subscribe()
        threading.Thread(
            target=self._tell_all, args=(connection, callback), name=f"simulated-events {self._host}", daemon=True
        ).start()

    def close(self) -> None:
        """Tell nothing any more. Idempotent."""
        self._closed.set()
        watching = self._watching
        if watching is not None:
            with contextlib.suppress(OSError):
                watching.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(_CONNECT_TIMEOUT_S)
            connection.connect(str(self._path))
        except OSError as error:
            connection.close()
            raise HypervisorUnavailable(f"simulated host {self._host} ({self._path}): {error}") from error
        return connection

    def _subscribe(self) -> socket.socket:
        connection = self._connect()
        try:
            connection.sendall(pack({"host": self._host, "watch": True}))
            check_answer(unpack(_read_line(connection)))
        except OSError as error:
            connection.close()
            raise HypervisorUnavailable(f"simulated host {self._host} can't be watched: {error}") from error
        except HypervisorError:
            connection.close()
            raise
        connection.settimeout(None)
        self._watching = connection
        return connection

    def _tell_all(self, connection: socket.socket, callback: Callable[[DomainEvent], None]) -> None:
        is_lost = False

        def tell(event: DomainEvent) -> None:
            nonlocal is_lost
            is_lost = event.kind is EventKind.LOST or (is_lost and event.kind is not EventKind.RESYNC)
            if self._closed.is_set():
                return
            try:
                callback(event)
            except Exception:  # noqa: BLE001  the watcher's fault must not end the events
                _log.exception("the watcher of simulated host %s failed at %s", self._host, event)

        while True:
            with connection, connection.makefile("rb") as lines, contextlib.suppress(OSError):
                for line in lines:
                    tell(read_event(unpack(line)))
            if self._closed.is_set():
                return
            if not is_lost:
                tell(DomainEvent(EventKind.LOST))
            again = self._reconnect()
            if again is None:
                return
            connection = again
            tell(DomainEvent(EventKind.RESYNC))

    def _reconnect(self) -> socket.socket | None:
        pause = _FIRST_RETRY_S
        while not self._closed.wait(pause):
            try:
                return self._subscribe()
            except HypervisorError:
                pause = min(2 * pause, _LONGEST_RETRY_S)
        return None


def _given(outcome: Any) -> Any:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _read_line(connection: socket.socket) -> bytes:
    """Read one line and no byte of the next, which a buffer would swallow."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise ConnectionResetError("the world ended the connection")
        line += byte
    return bytes(line)
