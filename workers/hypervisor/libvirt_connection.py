"""Connections to a libvirt daemon: opened when needed, given up when broken, never inherited by a fork.

Three hazards shape this module:

- A daemon that is gone fails a call at once, a frozen one never. Opening has no timeout of libvirt's own (71 s to a
  host that vanished, for ever to a stopped daemon), so it is done on a thread that can be left behind; keepalive ends
  calls on an open connection.
- While one call of a connection is unanswered, other calls on it stall now and then for a second (one in seven,
  measured: libvirt's client loses a wake-up), and from the fifth on (`max_client_requests`) the daemon reads no more
  from it. So a call that may take long has a connection of its own, and one that may hang with a stuck QEMU a thread
  besides (`Asks`).
- libvirt's event loop and its locks do not survive a fork. Nothing is opened at import or construction, and a process
  that forks after first use gets an error in the child and not a deadlock.
"""

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import libvirt

from orchestrator.errors import HypervisorError, HypervisorUnavailable, InvariantBroken
from workers.hypervisor.libvirt_readings import is_transport_error

T = TypeVar("T")

OPEN_TIMEOUT_S: Final = 5.0
KEEPALIVE_INTERVAL_S: Final = 2
KEEPALIVE_COUNT: Final = 4
"""A frozen daemon is given up after 2 s x (4 + 1) = 10 s; more would not answer "within seconds"."""

_loop_lock = threading.Lock()
_loop_owner: list[int] = []


def check_not_forked() -> None:
    """Refuse to go on in a child of a process that used libvirt: its locks may be held by threads that are not here.

    Raises:
        InvariantBroken: This process is such a child.
    """
    if _loop_owner and _loop_owner[0] != os.getpid():
        raise InvariantBroken("libvirt was used before this process was forked: use the hypervisor after the fork only")


def ensure_event_loop() -> None:
    """Start libvirt's event loop, once in a process; must be done before any connection is opened."""
    check_not_forked()
    with _loop_lock:
        if _loop_owner:
            return
        # By default libvirt prints every error to stderr, also those that we expect.
        libvirt.registerErrorHandler(_ignore_error, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_event_loop, name="libvirt-event-loop", daemon=True).start()
        _loop_owner.append(os.getpid())


def _run_event_loop() -> None:
    while True:
        # It fails only for want of memory or descriptors, which may pass; without it keepalive and events are dead.
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError:
            threading.Event().wait(0.1)


def _ignore_error(_context: object, _error: object) -> None:
    pass


def run_apart(call: Callable[[], T]) -> "Future[T]":
    """Run `call` on a daemon thread of its own, which can be left behind if the call hangs."""
    future: Future[T] = Future()
    threading.Thread(target=_fulfil, args=(future, call), name="libvirt-call", daemon=True).start()
    return future


def _fulfil(future: "Future[T]", call: Callable[[], T]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001  it belongs to whoever waits for the future
        future.set_exception(error)


def _open(uri: str) -> Any:
    ensure_event_loop()
    connection = libvirt.open(uri)
    connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
    return connection


def _opened(uri: str, opening: "Future[Any]", timeout_s: float) -> Any:
    try:
        return opening.result(timeout_s)
    except TimeoutError as error:
        raise HypervisorUnavailable(f"libvirt at {uri} did not answer within {timeout_s:g} s") from error
    except libvirt.libvirtError as error:
        raise HypervisorUnavailable(f"libvirt at {uri} does not answer: {message_of(error)}") from error


def open_connection(uri: str, timeout_s: float = OPEN_TIMEOUT_S) -> Any:
    """Open a connection (`libvirt.virConnect`) for the caller alone; it is closed when the last reference goes.

    Raises:
        HypervisorUnavailable: Refused, or not answered in time.
    """
    return _opened(uri, run_apart(lambda: _open(uri)), timeout_s)


def message_of(error: Any) -> str:
    """Return libvirt's own words for an error."""
    return error.get_error_message() or str(error)


def is_alive(connection: Any) -> bool:
    """Whether a connection stands, as far as this side knows; asks nobody."""
    try:
        return bool(connection.isAlive() == 1)
    except libvirt.libvirtError:
        return False


def is_lost(connection: Any, error: Any) -> bool:
    """Whether `error` came up since the connection broke, so that the call may or may not have been carried out."""
    return is_transport_error(error.get_error_domain(), error.get_error_code()) or not is_alive(connection)


class SharedConnection:
    """A connection that several threads use: opened at first use, and again at the first use after it broke.

    Args:
        uri: The daemon's URI.
        on_open: Called, on some thread, each time a connection was opened.
    """

    def __init__(self, uri: str, on_open: Callable[[], None] = lambda: None) -> None:
        self._uri = uri
        self._on_open = on_open
        self._lock = threading.Lock()
        self._connection: Any = None
        self._opening: Future[Any] | None = None
        self._closed = False

    def get(self, timeout_s: float = OPEN_TIMEOUT_S) -> Any:
        """Return an open connection (`libvirt.virConnect`).

        Raises:
            HypervisorUnavailable: There is none, and none could be opened.
        """
        check_not_forked()
        with self._lock:
            if self._closed:
                raise HypervisorError(f"the driver of {self._uri} was closed")
            if self._connection is not None and is_alive(self._connection):
                return self._connection
            self._connection = None
            # One attempt at a time, however many callers wait: each left-behind attempt holds a thread.
            if self._opening is None or self._opening.done():
                self._opening = run_apart(self._open)
            opening = self._opening
        return _opened(self._uri, opening, timeout_s)

    def _open(self) -> Any:
        connection = _open(self._uri)
        with self._lock:
            if not self._closed:
                self._connection = connection
        self._on_open()
        return connection

    def discard(self, connection: Any) -> None:
        """Forget a connection that broke, unless it was replaced already."""
        with self._lock:
            if self._connection is connection:
                self._connection = None

    def close(self) -> None:
        """Forget the connection and open no other. Calls in flight end by themselves: others may hold references."""
        with self._lock:
            self._closed = True
            self._connection = None


class Asks:
    """Questions that may hang, each with a deadline; at most `lanes` at a time.

    A question that hangs keeps its lane until libvirt answers it or the connection breaks. With all lanes taken
    everything is silent: callers have to treat silence as "don't know".

    Args:
        uri: The daemon's URI.
        lanes: Threads, each with a connection of its own, >= 1.
    """

    def __init__(self, uri: str, lanes: int) -> None:
        self._uri = uri
        self._lanes = lanes
        self._lock = threading.Lock()
        self._overdue: dict[str, Future[Any]] = {}
        self._work: SimpleQueue[tuple[Future[Any], Callable[[Any], Any]] | None] = SimpleQueue()
        self._has_threads = False
        self._closed = False

    def ask(self, key: str, question: Callable[[Any], T], timeout_s: float) -> "Future[T] | None":
        """Ask one question; see `ask_all`.

        Returns:
            Its answer or error, as a future that is done; None if it was silent for `timeout_s`.
        """
        return self.ask_all({key: question}, timeout_s).get(key)

    def ask_all(self, questions: Mapping[str, Callable[[Any], T]], timeout_s: float) -> "dict[str, Future[T]]":
        """Ask many questions at once, within one deadline.

        Args:
            questions: By key, each to be called with a connection. One whose last call still hangs is silent at
                once: a stuck QEMU takes one lane however often it is asked about, and delays the first who asks.
            timeout_s: Of all of them together.

        Returns:
            The questions that were answered, by key, as futures that are done. Their error may be
            `HypervisorUnavailable`.
        """
        check_not_forked()
        asked: dict[str, Future[T]] = {}
        with self._lock:
            if self._closed:
                raise HypervisorError(f"the driver of {self._uri} was closed")
            if not self._has_threads:
                self._start_threads()
            for key, question in questions.items():
                if key not in self._overdue or self._overdue[key].done():
                    asked[key] = Future()
                    self._work.put((asked[key], question))
        wait(asked.values(), timeout_s)
        answered: dict[str, Future[T]] = {}
        for key, future in asked.items():
            # What waits for a lane still is taken back, for nobody would read its answer.
            if future.cancel():
                continue
            if future.done():
                answered[key] = future
            else:
                self._remember_overdue(key, future)
        return answered

    def _remember_overdue(self, key: str, future: "Future[Any]") -> None:
        def forget(done: "Future[Any]") -> None:
            with self._lock:
                if self._overdue.get(key) is done:
                    del self._overdue[key]

        with self._lock:
            self._overdue[key] = future
        future.add_done_callback(forget)

    def _start_threads(self) -> None:
        for _ in range(self._lanes):
            threading.Thread(target=self._work_on, name="libvirt-ask", daemon=True).start()
        self._has_threads = True

    def _work_on(self) -> None:
        lane = _Lane(self._uri)
        while (item := self._work.get()) is not None:
            future, question = item
            if future.set_running_or_notify_cancel():
                _fulfil(future, partial(lane.answer, question))
            del item, future, question

    def close(self) -> None:
        """Ask nothing any more; the threads end, each after what it is at. Idempotent."""
        with self._lock:
            self._closed = True
            if self._has_threads:
                for _ in range(self._lanes):
                    self._work.put(None)
                self._has_threads = False


class _Lane:
    """A connection that one thread uses, opened anew when it is found broken."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._connection: Any = None

    def answer(self, question: Callable[[Any], T]) -> T:
        if self._connection is None or not is_alive(self._connection):
            self._connection = open_connection(self._uri)
        try:
            return question(self._connection)
        except libvirt.libvirtError as error:
            if not is_lost(self._connection, error):
                raise
            self._connection = None
            raise HypervisorUnavailable(f"libvirt at {self._uri} is gone: {message_of(error)}") from error
