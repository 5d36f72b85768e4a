"""A lab host's watchdog: outside of its host, it takes the host's power when it is not fed in time.

It stands in for `/dev/watchdog0`, which the hosts of a lab would share. A process of the host speaks to it through a
socket on the host's file system, by one line a call, as the device takes one ioctl; it passes the same contract suite
as a real one (tests/contract/test_watchdog.py).
"""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.lab.host import LabHost
from tests.lab.promptness import PRIORITY, be_prompt
from workers.watchdog import Armed, WatchdogFailed

_IDENTITY = "lab stand-in"


class StandIn:
    """A watchdog that lives in a thread of this process; a context manager.

    Args:
        path: Of its socket.
        expire: Called when it was not fed in time, once; it has stopped counting then.

    Attributes:
        fired: How often it has expired.
    """

    def __init__(self, path: Path, expire: Callable[[], None]) -> None:
        self.path = path
        self.fired = 0
        self._expire = expire
        self._timeout_s = 60
        self._due: float | None = None
        self._client: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen()
        self._woken, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name=f"watchdog {path}", daemon=True)
        self._thread.start()

    def __enter__(self) -> "StandIn":
        """It is there."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_counting(self) -> bool:
        """Whether it will expire when nobody feeds it."""
        return self._due is not None

    def close(self) -> None:
        """Remove it; it never expires then."""
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        self._thread.join()
        self.path.unlink(missing_ok=True)

    def _serve(self) -> None:
        # Hardware is never late: neither to take a feed that waits, for which its host would go down, nor to expire.
        be_prompt(PRIORITY + 10)
        with selectors.DefaultSelector() as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                due = self._due
                ready = selector.select(None if due is None else max(0.0, due - time.monotonic()))
                if due is not None and self._due == due and time.monotonic() >= due:
                    self._due = None
                    self.fired += 1
                    self._expire()
                    continue
                for key, _ in ready:
                    if key.fileobj is self._woken:
                        return
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif isinstance(key.fileobj, socket.socket):
                        self._take(key.fileobj, selector)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        client, _ = self._listener.accept()
        if self._client is not None:
            with contextlib.suppress(OSError):
                client.sendall(b"busy\n")
            client.close()
            return
        self._client = client
        selector.register(client, selectors.EVENT_READ)

    def _take(self, client: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            lines = client.recv(4096).splitlines()
        except ConnectionError:
            lines = []
        for line in lines:
            word, _, value = line.decode().partition(" ")
            if word == "open":
                self._timeout_s = int(value)
            if word in {"open", "feed"}:
                self._due = time.monotonic() + self._timeout_s
            if word == "V":
                self._due = None
            with contextlib.suppress(OSError):
                client.sendall(f"{self._timeout_s}\n".encode())
        if not lines:  # closed; without a V before, it counts on
            selector.unregister(client)
            client.close()
            self._client = None


class StandInDevice:
    """The host's end of a stand-in; a `WatchdogDevice`.

    Args:
        path: Of its socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket: socket.socket | None = None

    def open(self, timeout_s: int) -> Armed:
        """Start it; see `WatchdogDevice`."""
        if self._socket is not None:
            raise WatchdogFailed(f"{self.path} is open already")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(1.0)
        try:
            connection.connect(str(self.path))
            actual = int(_call(connection, f"open {timeout_s}"))
        except (OSError, ValueError) as error:
            connection.close()
            raise WatchdogFailed(f"{self.path}: {error}") from error
        self._socket = connection
        return Armed(_IDENTITY, actual)

    def feed(self) -> None:
        """Feed it; see `WatchdogDevice`."""
        if self._socket is None:
            raise WatchdogFailed(f"{self.path} is not open")
        try:
            _call(self._socket, "feed")
        except OSError as error:
            raise WatchdogFailed(f"{self.path}: {error}") from error

    def disarm(self) -> None:
        """Stop it; see `WatchdogDevice`."""
        connection, self._socket = self._socket, None
        if connection is None:
            return
        try:
            _call(connection, "V")
        except OSError as error:
            raise WatchdogFailed(f"{self.path}: {error}") from error
        finally:
            connection.close()


def _call(connection: socket.socket, line: str) -> str:
    with contextlib.suppress(BrokenPipeError):  # one that is busy says so, and hangs up, without having been asked
        connection.sendall(line.encode() + b"\n")
    answer = connection.recv(64)
    if not answer:
        raise ConnectionError("it is gone")
    if answer == b"busy\n":
        raise ConnectionError("Device or resource busy")
    return answer.decode()


def put_in(host: LabHost) -> StandIn:
    """Give a host a watchdog, which takes its power. It outlives that, as a real one does."""
    return StandIn(host.directory / "watchdog.sock", host.power_cut)
