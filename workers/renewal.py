"""The heartbeat's way to Redis: one script, one connection, one attempt.

Not redis-py: it would take 22 MB of a process whose memory is locked, and it sends again by itself what was not
answered. An attempt here has one deadline for everything in it; whatever does not go well closes the connection, so an
answer that comes later is read by nobody (it is a lost OK, which the rules allow for).
"""

import hashlib
import socket
import time
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

import orchestrator.store
from orchestrator.errors import Invalid, StoreUnavailable
from orchestrator.lease import Lease, Reply, read_reply
from orchestrator.store import keys
from orchestrator.store.calls import lease_arguments

_LONGEST_REPLY: Final = 4 * 2**20
"""A membership of 10,000 takes 0.5 MB."""
_PORT: Final = 6379


class LeaseStore(Protocol):
    """Where leases are renewed: `RedisLink`, or `NodeStore` where a client of Redis is there anyway."""

    def renew_lease(self, lease: Lease, peer_key: str = "") -> Reply:
        """Renew the lease once.

        Raises:
            StoreUnavailable: It is not known to have been renewed.
        """
        ...


class RedisLink:
    """One node's link to Redis.

    Args:
        url: As `VMHERD_REDIS_URL`.
        node: The node.
        timeout_s: For one attempt, connecting included. (Looking up a name may take longer; it is done once.)

    Raises:
        Invalid: The URL can't be used.
    """

    def __init__(self, url: str, node: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"redis", "rediss", "unix"}:
            raise Invalid(f"VMHERD_REDIS_URL: expected redis://, rediss:// or unix://, not {parts.scheme!r}")
        self._node = node
        self._timeout_s = timeout_s
        self._user, self._password = unquote(parts.username or ""), unquote(parts.password or "")
        self._path = unquote(parts.path) if parts.scheme == "unix" else ""
        self._query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        self._host, self._is_tls = parts.hostname or "127.0.0.1", parts.scheme == "rediss"
        try:
            self._port = parts.port or _PORT
            self._database = int(self._query.get("db", "") or ("" if self._path else parts.path.strip("/")) or 0)
        except ValueError as error:
            raise Invalid(f"VMHERD_REDIS_URL: {error}") from None
        self._resolved: list[Any] = []
        self._socket: socket.socket | None = None
        self._buffer = b""
        folder = Path(orchestrator.store.__file__).parent
        self._script = (folder / "lua" / "lease.lua").read_bytes()
        self._sha = hashlib.sha1(self._script, usedforsecurity=False).hexdigest()

    def renew_lease(self, lease: Lease, peer_key: str = "") -> Reply:
        """Renew the lease once; see `LeaseStore`."""
        deadline = time.monotonic() + self._timeout_s
        try:
            self._connect(deadline)
            return read_reply(self._run_script(deadline, lease, peer_key).decode())
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            self.close()
            raise StoreUnavailable(f"no Redis at {self.where}: {str(error) or 'it does not answer'}") from error
        except StoreUnavailable:
            self.close()
            raise

    def _run_script(self, deadline: float, lease: Lease, peer_key: str) -> bytes:
        arguments = [1, keys.lease(self._node), *lease_arguments(self._node, lease, peer_key)]
        answer = self._call(deadline, "EVALSHA", self._sha, *arguments)
        if isinstance(answer, _Refused) and answer.startswith("NOSCRIPT"):
            answer = self._call(deadline, "EVAL", self._script, *arguments)
        if isinstance(answer, _Refused) or answer is None:
            raise StoreUnavailable(f"Redis at {self.where} does not take the renewal: {answer}")
        return answer

    @property
    def where(self) -> str:
        """Which Redis it is, without its password."""
        return f"unix://{self._path}" if self._path else f"{self._host}:{self._port}"

    def own_address(self) -> str:
        """Give the address from which this host speaks to Redis; that of the loopback where they share a socket.

        Raises:
            StoreUnavailable: There is no way to it now.
        """
        if self._path:
            return "127.0.0.1"
        try:
            family, _, _, _, address = self._addresses()[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # asks the kernel for the route; nothing is sent
                return str(probe.getsockname()[0])
        except OSError as error:
            raise StoreUnavailable(f"no way to Redis at {self.where}: {error}") from error

    def close(self) -> None:
        """Close the connection; the next attempt opens another."""
        connection, self._socket = self._socket, None
        self._buffer = b""
        if connection is not None:
            connection.close()

    # --- the protocol, RESP2 ----------------------------------------------------------------------------------------

    def _addresses(self) -> list[Any]:
        if not self._resolved:
            self._resolved = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        return self._resolved

    def _connect(self, deadline: float) -> None:
        if self._socket is not None:
            return
        if self._path:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(_left(deadline))
            self._socket.connect(self._path)
        else:
            self._socket = self._connect_tcp(deadline)
        if self._password:
            user = (self._user,) if self._user else ()
            self._must(deadline, "AUTH", *user, self._password)
        if self._database:
            self._must(deadline, "SELECT", self._database)

    def _connect_tcp(self, deadline: float) -> socket.socket:
        """Try the addresses one after the other; each next attempt begins with another."""
        addresses = self._addresses()
        family, kind, protocol, _, address = addresses[0]
        self._resolved = [*addresses[1:], addresses[0]]
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(deadline))
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._is_tls:
                connection = self._secured(connection)
        except BaseException:
            connection.close()
            raise
        self._resolved = addresses  # this one works
        return connection

    def _secured(self, connection: socket.socket) -> socket.socket:
        import ssl  # noqa: PLC0415 - some MB, for those who need it

        context = ssl.create_default_context(cafile=self._query.get("ssl_ca_certs"))
        if self._query.get("ssl_cert_reqs") == "none":
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(connection, server_hostname=self._host)

    def _must(self, deadline: float, *words: str | int) -> None:
        answer = self._call(deadline, *words)
        if isinstance(answer, _Refused):
            raise StoreUnavailable(f"Redis at {self.where} refuses {words[0]}: {answer}")

    def _call(self, deadline: float, *words: str | bytes | float) -> "bytes | _Refused | None":
        if self._socket is None:
            raise ConnectionError("it is closed")
        encoded = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        parts = [b"*%d\r\n" % len(encoded), *(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)]
        self._socket.settimeout(_left(deadline))
        self._socket.sendall(b"".join(parts))
        line = self._read(deadline, until=b"\r\n")
        kind, rest = line[:1], line[1:]
        match kind:
            case b"+" | b":":
                return rest
            case b"-":
                return _Refused(rest.decode(errors="replace"))
            case b"$":
                length = int(rest)
                if not -1 <= length <= _LONGEST_REPLY:
                    raise ValueError(f"a reply of {length} bytes")
                return None if length < 0 else self._read(deadline, length=length + 2)[:-2]
            case _:
                raise ValueError(f"it is no Redis: it says {line[:40]!r}")

    def _read(self, deadline: float, *, until: bytes = b"", length: int = 0) -> bytes:
        if self._socket is None:
            raise ConnectionError("it is closed")
        while True:
            end = self._buffer.find(until) if until else length if len(self._buffer) >= length else -1
            if end >= 0:
                found, self._buffer = self._buffer[:end], self._buffer[end + len(until) :]
                return found
            if len(self._buffer) > _LONGEST_REPLY + 64:
                raise ValueError("a reply without an end")
            self._socket.settimeout(_left(deadline))
            more = self._socket.recv(65536)
            if not more:
                raise ConnectionError("it closed the connection")
            self._buffer += more


class _Refused(str):
    """An error that Redis answers."""

    __slots__ = ()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("it does not answer in time")
    return left
