"""Requests to the API, and its answers put in our words: errors are those that the services raise."""

import contextlib
import json
import queue
import socket
import ssl
import threading
from collections.abc import Mapping
from typing import Any, Final

import httpx

from orchestrator.client.place import Place
from orchestrator.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    OutcomeUnknown,
    Refused,
    StoreUnavailable,
    Unauthorized,
    VersionExpired,
    VmherdError,
)

STORED: Final = "application/json;as=Stored;g=vmherd.dev;v=v1"
"""The form in which resources are asked for: as they are stored, with what people are not shown."""

_CONNECT_S: Final = 3.0
_ANSWER_S: Final = 30.0
_QUIET_S: Final = 60.0
"""A watch that is told nothing for so long has lost its server: every 15 seconds it is told how far it is."""
_LONGEST_REASON: Final = 500
_LINES_WAITING: Final = 1_000
_JOIN_S: Final = 2.0
_REFUSED: Final = 400
_BY_REASON: Final[Mapping[str, type[VmherdError]]] = {
    "NotFound": NotFound,
    "AlreadyExists": AlreadyExists,
    "Conflict": Conflict,
    "Forbidden": Refused,
    "Unauthorized": Unauthorized,
    "Expired": VersionExpired,
    "Gone": VersionExpired,
    "TooManyRequests": Refused,
    "OutcomeUnknown": OutcomeUnknown,
    "ServiceUnavailable": StoreUnavailable,
}


class ServerUnavailable(StoreUnavailable):
    """The API does not answer."""


class Untrusted(VmherdError):
    """Whoever answers can't prove to be the API."""


class ApiSession:
    """A connection to one API server. Safe from several threads.

    Raises:
        Invalid: The CA's certificate is none.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        headers = {"Accept": STORED, "User-Agent": "vmherd"}
        if place.token:
            headers["Authorization"] = f"Bearer {place.token}"
        context = _context(place)

        # Nothing of the environment counts: a proxy would be sent the token, and a .netrc could replace it.
        def connect() -> httpx.Client:
            return httpx.Client(
                base_url=place.url,
                headers=headers,
                verify=context,
                timeout=httpx.Timeout(_ANSWER_S, connect=_CONNECT_S),
                trust_env=False,
            )

        self._connect = connect
        self._http = connect()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def read(self, path: str, parameters: Mapping[str, str] | None = None) -> Any:
        """GET something; a connection that was closed meanwhile is opened again.

        Raises:
            VmherdError: As `error_of`; `ServerUnavailable`, `Untrusted`.
        """
        return self._ask(self._http.build_request("GET", path, params=parameters))

    def ask(self, path: str, body: Any, timeout_s: float) -> Any:
        """POST a question, which changes nothing: without an answer nothing is unknown. Raises as `read`."""
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_S)
        return self._ask(self._http.build_request("POST", path, json=body, timeout=timeout))

    def _ask(self, request: httpx.Request) -> Any:
        try:
            response = self._send(request)
        except (httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError):
            response = self._once_more(request)
        except httpx.HTTPError as error:
            raise self._away(error) from error
        return _answer(response, self.place)

    def write(
        self, method: str, path: str, body: Any = None, media: str = "application/json", timeout_s: float = _ANSWER_S
    ) -> Any:
        """Change something, or have it done.

        Raises:
            VmherdError: As `read`; `OutcomeUnknown` when it was sent, and no answer came.
        """
        content = json.dumps(body).encode() if body is not None else None
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_S)
        headers = {"Content-Type": media} if content is not None else None
        try:
            response = self._send(
                self._http.build_request(method, path, content=content, headers=headers, timeout=timeout)
            )
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise self._away(error) from error
        except httpx.HTTPError as error:
            raise OutcomeUnknown(
                f"{self.place.url} gave no answer to {method} {path} ({_words(error)}): look whether it was done"
            ) from error
        return _answer(response, self.place)

    def open_stream(self, path: str, parameters: Mapping[str, str], into: "queue.Queue[Line]", tag: str) -> "Stream":
        """Begin a watch, whose lines come into a queue.

        Raises:
            VmherdError: As `read`.
        """
        timeout = httpx.Timeout(_QUIET_S, connect=_CONNECT_S)
        request = self._http.build_request("GET", path, params=parameters, timeout=timeout)
        try:
            response = self._send(request, stream=True)
        except httpx.HTTPError as error:
            raise self._away(error) from error
        if response.status_code >= _REFUSED:
            try:
                response.read()
                raise error_of(response, self.place)
            except httpx.HTTPError as error:
                raise self._away(error) from error
            finally:
                response.close()
        return Stream(response, into, tag)

    def _once_more(self, request: httpx.Request) -> httpx.Response:
        try:
            return self._send(request)
        except httpx.HTTPError as error:
            raise self._away(error) from error

    def _send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        try:
            return self._http.send(request, stream=stream)
        except (KeyboardInterrupt, SystemExit):
            # Ctrl-C comes between any two instructions: locks of its pool may be held for ever, connections be half
            # used. It is left as it is, since closing it takes those locks; what is asked now goes by another.
            self._http = self._connect()
            raise

    def _away(self, error: httpx.HTTPError) -> VmherdError:
        verification = _verification(error)
        if verification is not None:
            known = "VMHERD_CA_FILE" if self.place.ca else "the system's CAs; VMHERD_CA_FILE names another"
            return Untrusted(f"{self.place.url} is not trusted: {verification.verify_message} (by {known})")
        return ServerUnavailable(f"no API at {self.place.url}: {_words(error)}")


Line = tuple[str, bytes | None]
"""What a stream gives: its tag, and a line; None at its end, however it ended."""


class Stream:
    """One watch's response, read by a thread of its own: so that whoever waits for lines can look at the time.

    Args:
        response: Whose body is not read yet.
        into: Where lines go; a full queue holds the reading up, and so in the end the server.
        tag: Put before each.
    """

    def __init__(self, response: httpx.Response, into: "queue.Queue[Line]", tag: str) -> None:
        self._response = response
        self._into = into
        self._tag = tag
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name=f"watch {tag}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it; nothing of it comes into the queue any more."""
        self._is_closed.set()
        network = self._response.extensions.get("network_stream")
        connection = network.get_extra_info("socket") if network is not None else None
        if connection is not None:
            with contextlib.suppress(OSError):  # it is closed already
                socket.socket.shutdown(connection, socket.SHUT_RDWR)  # wakes the thread, which may wait for a line
        self._thread.join(_JOIN_S)  # not for ever: Ctrl-C may have left a lock held that it waits for

    def _read(self) -> None:
        begun = b""
        try:
            for chunk in self._response.iter_bytes():
                *lines, begun = (begun + chunk).split(b"\n")
                for line in lines:
                    self._put(line)
                if self._is_closed.is_set():
                    return
        except (httpx.HTTPError, httpx.StreamError, OSError):
            pass  # its end, as any other: what comes next begins where it was
        finally:
            self._put(None)
            self._response.close()

    def _put(self, line: bytes | None) -> None:
        while not self._is_closed.is_set():
            try:
                self._into.put((self._tag, line), timeout=0.1)
                return
            except queue.Full:
                continue


def new_queue() -> "queue.Queue[Line]":
    """Make the queue that streams fill."""
    return queue.Queue(_LINES_WAITING)


def error_of(response: httpx.Response, place: Place) -> VmherdError:
    """Read the error that an answer is."""
    try:
        status = response.json()
    except ValueError:
        status = None
    if not isinstance(status, dict) or status.get("kind") != "Status":
        said = " ".join(response.text.split())[:_LONGEST_REASON]
        where = f"{place.url}{response.request.url.path}"
        return VmherdError(f"{where} answers as no vmherd API does: {response.status_code} {said}")
    return status_error(status)


def status_error(status: Mapping[str, Any]) -> VmherdError:
    """Read the error that a `Status` tells of."""
    message, reason = str(status.get("message") or "no reason given"), str(status.get("reason") or "")
    details = status.get("details") or {}
    if reason == "Invalid":
        causes = tuple((str(c.get("field", "")), str(c.get("message", ""))) for c in details.get("causes") or ())
        return Invalid(message, causes)
    if reason == "Forbidden" and " is forbidden: User " in message:
        return Forbidden(message)
    if reason == "Unauthorized":
        return Unauthorized(f"{message} (VMHERD_TOKEN)")
    kind = _BY_REASON.get(reason)
    return kind(message) if kind is not None else VmherdError(f"{message} ({reason or status.get('code')})")


def _answer(response: httpx.Response, place: Place) -> Any:
    if response.status_code >= _REFUSED:
        raise error_of(response, place)
    try:
        return response.json()
    except ValueError as error:
        where = f"{place.url}{response.request.url.path}"
        raise VmherdError(f"{where} answers as no vmherd API does: {response.status_code}, and no JSON") from error


def _context(place: Place) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cadata=place.ca or None)
    except ssl.SSLError as error:
        raise Invalid(f"VMHERD_CA_FILE: holds no certificate in PEM form: {error.reason or error}") from error


def _verification(error: BaseException) -> ssl.SSLCertVerificationError | None:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _words(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__
