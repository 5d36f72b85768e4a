"""A TCP proxy that loses replies: what the server did is done, and its client does not learn of it."""

import contextlib
import socket
import threading
from types import TracebackType


class Proxy:
    """Forwards connections to a port on loopback; a context manager.

    Args:
        port: The server's.

    Attributes:
        port: The proxy's own.
        lost: How many replies it has lost.
    """

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.lost = 0
        self._to_lose = 0
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> "Proxy":
        """Begin to forward."""
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        self._listener.close()
        with self._lock:
            for end in self._sockets:
                _close(end)

    def lose_replies(self, count: int = 1) -> None:
        """Of the next `count` replies: close the connection in place of forwarding them."""
        with self._lock:
            self._to_lose = count

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server))
                with self._lock:
                    self._sockets += [client, server]
                for source, sink, is_reply in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._copy, args=(source, sink, is_reply), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, is_reply: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_reply and self._is_lost():
                    break
                sink.sendall(data)
        _close(source)
        _close(sink)

    def _is_lost(self) -> bool:
        with self._lock:
            if not self._to_lose:
                return False
            self._to_lose -= 1
            self.lost += 1
            return True


def _close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
