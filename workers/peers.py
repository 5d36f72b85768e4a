"""How members ask each other whether Redis is away: one datagram a question, one an answer (TAKEOVER.md, rule 2).

UDP, as there is nothing to connect, to resend, or to wait for: a question that is lost is asked again by the next poll.
A thousand members ask each other with some thousand datagrams a second each, and connections would be a million.

Each datagram is authenticated by a key that members alone can read in Redis (`peer-key`), and names who speaks and who
is spoken to, so none can be taken for another's or sent back. Nonces of polls are never used twice. What a datagram
says is believed of its sender alone: nothing is relayed.
"""

import contextlib
import hmac
import json
import socket
from dataclasses import dataclass
from typing import Any, Final

from orchestrator.errors import Invalid
from workers.heart import Question, Says

PORT: Final = 7949
_MAC: Final = 32
_LONGEST: Final = 2048
_AT_A_TIME: Final = 256


@dataclass(frozen=True, slots=True)
class Answered:
    """A peer's answer."""

    peer: str
    nonce: str
    says: Says


def pack(key: str, speaker: str, listener: str, nonce: str, says: Says | None) -> bytes:
    """Write a question, or an answer where it says something."""
    body = json.dumps([speaker, listener, nonce, says or "?"], separators=(",", ":")).encode()
    return hmac.digest(key.encode(), body, "sha256") + body


def unpack(key: str, listener: str, data: bytes) -> Question | Answered | None:
    """Read a datagram; None for one that is not a member's, or not to this one."""
    mac, body = data[:_MAC], data[_MAC:]
    if not key or not hmac.compare_digest(mac, hmac.digest(key.encode(), body, "sha256")):
        return None
    try:
        speaker, to, nonce, says = json.loads(body)
        if to != listener or not isinstance(speaker, str) or not isinstance(nonce, str):
            return None
        return Question(speaker, nonce) if says == "?" else Answered(speaker, nonce, Says(says))
    except (ValueError, TypeError):
        return None


def parse_address(text: str) -> tuple[str, int]:
    """Read `192.0.2.11:7949` or `[2001:db8::1]:7949`.

    Raises:
        Invalid: It is something else.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.inet_pton(family, host)
        number = int(port)
    except (OSError, ValueError):
        number = -1
    if not colon or not 0 <= number <= 65535:  # noqa: PLR2004 - ports
        raise Invalid(f"VMHERD_PEER_ADDRESS: {text!r} is not an address such as 192.0.2.11:7949 or [2001:db8::1]:7949")
    return host, number


def format_address(host: str, port: int) -> str:
    """Write an address as `parse_address` reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class PeerSocket:
    """Where one member asks and is asked; nothing here waits.

    Args:
        node: Its name.
        host: Its address.
        port: Its port; 0: any that is free.

    Attributes:
        address: Where others reach it.

    Raises:
        OSError: The port is taken.
    """

    def __init__(self, node: str, host: str, port: int) -> None:
        self._node = node
        self._sources: dict[str, Any] = {}
        is_v6 = ":" in host
        self._socket = socket.socket(
            socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        )
        self._socket.setblocking(False)
        # Any of this host's addresses: the one that others use may come later than this process.
        self._socket.bind(("::" if is_v6 else "0.0.0.0", port))  # noqa: S104 - each datagram is authenticated
        self.address = format_address(host, self._socket.getsockname()[1])

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    def ask(self, key: str, peer: str, address: str, nonce: str) -> None:
        """Ask a peer; a question that can't be sent is lost, as datagrams are."""
        with contextlib.suppress(OSError, Invalid):
            self._socket.sendto(pack(key, self._node, peer, nonce, None), parse_address(address))

    def answer(self, key: str, question: Question, says: Says) -> None:
        """Answer a question, to where it came from; likewise."""
        if question.asker in self._sources:
            with contextlib.suppress(OSError):
                datagram = pack(key, self._node, question.asker, question.nonce, says)
                self._socket.sendto(datagram, self._sources[question.asker])

    def received(self, key: str) -> list[Question | Answered]:
        """Take what has come, at most 256."""
        found: list[Question | Answered] = []
        for _ in range(_AT_A_TIME):
            try:
                data, source = self._socket.recvfrom(_LONGEST)
            except BlockingIOError:
                break
            except OSError:  # the host of a peer told that nobody listens there
                continue
            message = unpack(key, self._node, data)
            if isinstance(message, Question):
                self._sources[message.asker] = source
            if message is not None:
                found.append(message)
        return found

    def close(self) -> None:
        """Close it."""
        self._socket.close()
