"""The HTTP server around the application."""

import asyncio
from socket import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from orchestrator.api.tls import ServerCertificate
from orchestrator.settings import Settings

_KEPT_ALIVE_S = 180
"""Longer than any client keeps a connection that is idle (Go: 90 s). With uvicorn's 5 s, `kubectl drain`, which asks
every 5 s, met a connection that was just being closed, and gave up with EOF: Go sends no POST twice."""
_LARGEST_HEAD = 64 * 1024
_GRACEFUL_S = 5
"""What is under way when the server is stopped is given so long."""


class BoundedProtocol(HttpToolsProtocol):
    """HTTP on one connection; whoever sends a head without an end is hung up on, before it is known who it is."""

    _is_head = True
    _has_ended_one = False
    _head = 0

    def data_received(self, data: bytes) -> None:
        """Take bytes from the client."""
        self._has_ended_one = False
        super().data_received(data)
        if self._is_head and not self._has_ended_one:  # else most of it may have been a body
            self._head += len(data)
            if self._head > _LARGEST_HEAD:
                self.send_400_response(f"a request's head has at most {_LARGEST_HEAD} bytes")

    def on_headers_complete(self) -> None:
        """Take that the head is complete; its body is bounded where it is read."""
        self._is_head, self._head = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Take that the request is complete; the next bytes are another's head."""
        self._is_head = self._has_ended_one = True
        super().on_message_complete()


class Serving(uvicorn.Server):
    """uvicorn, which ends watches when it is stopped: it would wait for them else, and they for their clients.

    Args:
        app: As `create_app` made it.
        config: The `api_` settings.
        tls: The certificate, which is kept current while the server runs; None: plain HTTP.
    """

    def __init__(self, app: FastAPI, config: Settings, tls: ServerCertificate | None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=config.api_address,
                port=config.api_port,
                http=BoundedProtocol,
                loop="asyncio",
                ws="websockets-sansio" if config.console else "none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEPT_ALIVE_S,
                timeout_graceful_shutdown=_GRACEFUL_S,
                ssl_context_factory=None if tls is None else lambda *_: tls.context,
            )
        )
        self._app = app
        self._tls = tls
        self._renewing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Begin to listen, and to renew the certificate."""
        await super().startup(sockets)
        if self._tls is not None:
            self._renewing = asyncio.create_task(self._tls.keep_current())

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Stop listening, end watches, and wait for what else is under way."""
        if self._renewing is not None:
            self._renewing.cancel()
        self._app.state.mirror.end_watches()
        await super().shutdown(sockets)
