"""The application: what stands behind each path, and what lives as long as the server does."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.api.access import Access
from orchestrator.api.audit import Audit
from orchestrator.api.catalog import NAMESPACES, RESOURCES
from orchestrator.api.discovery import version
from orchestrator.api.errors import to_json
from orchestrator.api.mirror import Mirror
from orchestrator.api.namespaces import NamespaceView
from orchestrator.api.pods import PodView
from orchestrator.api.server import Server
from orchestrator.api.writing import Writer
from orchestrator.errors import StoreUnavailable
from orchestrator.resources import AccessToken, Maintenance, Namespace, NodeDrain, NodeFencing, NodeInventory
from orchestrator.services.context import Context
from orchestrator.settings import Settings


def _utc_now() -> datetime:
    return datetime.now(UTC)


def _answering(server: Server) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            response = await server(Request(scope, receive))
            await response(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403

    return answer


class Tokens:
    """Finds tokens in the copy."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    def get(self, kind: type[AccessToken], key: str) -> AccessToken | None:
        """Give one, or None."""
        found = self._mirror.documents.get(kind.kind_name, {}).get(key)  # type: ignore[call-overload]
        return found if isinstance(found, AccessToken) else None


def create_app(ctx: Context, audit: Audit, config: Settings, now: Callable[[], datetime] = _utc_now) -> FastAPI:
    """Make the application. It connects when it is started.

    Args:
        ctx: To write with. Its store's client must not try again by itself (`Mirror`).
        audit: Where the audit log goes; closed with the application.
        config: The `api_` settings.
        now: The time of day.
    """
    mirror = Mirror(
        ctx.store,
        RESOURCES,
        views=[NamespaceView(NAMESPACES), PodView()],
        hidden=[AccessToken, NodeInventory, Namespace, NodeDrain, NodeFencing, Maintenance],
        history=config.api_history,
    )
    access = Access(Tokens(mirror), now, audit)
    server = Server(mirror, access, Writer(ctx, mirror.herd), RESOURCES, config)

    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        del app
        await mirror.start()
        try:
            yield
        finally:
            await mirror.stop()
            audit.close()

    async def healthy(request: Request) -> Response:
        del request
        return PlainTextResponse("ok")

    async def ready(request: Request) -> Response:
        """Whether it can answer with what is newest: it reaches Redis, and its copy follows."""
        del request
        try:
            await mirror.newest()
        except StoreUnavailable as error:
            return PlainTextResponse(str(error), 503)
        return PlainTextResponse("ok")

    async def tell_version(request: Request) -> Response:
        del request
        return Response(to_json(version()), media_type="application/json")

    app = FastAPI(
        title="vmherd", lifespan=living, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.add_route("/healthz", healthy)
    app.add_route("/readyz", ready)
    app.add_route("/version", tell_version)
    app.router.default = _answering(server)  # not a route: paths may hold what no route's pattern matches
    app.state.mirror = mirror
    app.state.access = access
    return app
