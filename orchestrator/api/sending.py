"""Long answers: sent piece by piece, compressed for who takes that, and not for ever to who takes nothing.

A list of all VMs has tens of megabytes. Handed over as a whole, it would stay in this process's memory for as long as
its client likes to read.
"""

import asyncio
import gzip
from collections.abc import Callable
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.logs import logger

log = logger(__name__)

LONG: Final = 128 * 1024
"""Bytes from which on an answer is sent in this way; Kubernetes compresses from there on too."""
_PIECE: Final = 64 * 1024
_FAST: Final = 1
"""gzip's level: the others take several times as long, and make it little smaller."""


def compressed(body: bytes, accept_encoding: str) -> tuple[bytes, dict[str, str]]:
    """Give an answer as it is sent, and the headers that say so. Takes its time: for a thread."""
    taken = {word.partition(";")[0].strip().lower() for word in accept_encoding[:1024].split(",")}
    if len(body) < LONG or "gzip" not in taken:
        return body, {}
    return gzip.compress(body, _FAST, mtime=0), {"content-encoding": "gzip", "vary": "Accept-Encoding"}


class LongResponse(Response):
    """An answer that is sent piece by piece.

    Args:
        body: All of it.
        headers: Besides the usual ones.
        piece_s: For so long the client may take nothing at all.
        on_end: Called when all was sent, or it was given up.
    """

    media_type = "application/json"

    def __init__(self, body: bytes, headers: dict[str, str], *, piece_s: float, on_end: Callable[[], None]) -> None:
        super().__init__(body, headers=headers)
        self._whole = body
        self._piece_s = piece_s
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        del scope, receive
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            view = memoryview(self._whole)
            for start in range(0, len(view), _PIECE):
                async with asyncio.timeout(self._piece_s):
                    piece = bytes(view[start : start + _PIECE])
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.info("a long answer was given up: its client takes nothing", bytes=len(self._whole))
        finally:
            self._on_end()
