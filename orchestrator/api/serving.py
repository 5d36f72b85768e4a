"""The HTTP server around the application."""

import asyncio
from socket import socket

import uvicorn
from fastapi import FastAPI

from orchestrator.api.tls import ServerCertificate
from orchestrator.settings import Settings

_KEPT_ALIVE_S = 180
"""Longer than any client keeps a connection that is idle (Go: 90 s). With uvicorn's 5 s, `kubectl drain`, which asks
every 5 s, met a connection that was just being closed, and gave up with EOF: Go sends no POST twice."""
_GRACEFUL_S = 5
"""What is under way when the server is stopped is given so long."""


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
                http="httptools",
                loop="asyncio",
                ws="none",
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
