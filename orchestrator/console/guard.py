"""What stands before every page: who is signed in, where a request comes from, and what browsers may do.

* Without a session there is the page to sign in, and NiceGUI's own files, which are public.
* A WebSocket is opened by a page of this origin only; so is every form sent, which bears its session's CSRF token
  besides. The cookie is SameSite=Strict, HttpOnly, and Secure where the browser came by TLS.
* The policy that goes with each answer (CSP) lets the browser ask nobody else for anything.
"""

from collections.abc import Awaitable, Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.console.sessions import LASTS_S, Session, Sessions
from orchestrator.console.signing_in import login_page, new_form_token, same_text
from orchestrator.errors import StoreUnavailable, Unauthorized
from orchestrator.logs import logger

log = logger(__name__)

PREFIX: Final = "/console"
COOKIE: Final = "vmherd_session"
FORM_COOKIE: Final = "vmherd_form"
SESSION: Final = "vmherd.session"
"""Where the session stands in a request's scope."""
CSRF_HEADER: Final = "x-csrf-token"
_LARGEST_FORM: Final = 8 * 1024
_ASSETS: Final = ("/_nicegui/", "/favicon.ico")
_POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'self'; "
    "form-action 'self'; object-src 'none'"
)
"""NiceGUI writes scripts into its pages, and Vue compiles templates; neither is ever made of what a person wrote."""

Answer = Callable[[Request, Session], Awaitable[Response]]


class Guard:
    """Stands before an application that is mounted at `PREFIX`.

    Args:
        app: NiceGUI's.
        sessions: Known sessions.
        act: Answers a POST to `/actions`.
        on_end: Told of a session that was ended here.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions, act: Answer, on_end: Callable[[Session], None]) -> None:
        self._app = app
        self._sessions = sessions
        self._act = act
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "websocket":
            await self._open_socket(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, _with_policy(send))
        else:
            await self._app(scope, receive, send)

    async def _open_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a page's connection through; refused before it is accepted, a browser sees 403."""
        headers = Headers(scope=scope)
        try:
            session = await self._sessions.find(_cookies(headers).get(COOKIE, ""))
        except StoreUnavailable:
            session = None  # it tries again
        if session is None or not is_own_origin(headers):
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "not signed in, or from elsewhere"})
            return
        await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path.startswith(_ASSETS):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        session: Session | None = None
        try:
            session = await self._sessions.find(request.cookies.get(COOKIE, ""))
            response = await self._local(request, path, session)
        except StoreUnavailable as error:
            response = PlainTextResponse(f"The console can't tell who you are now: {error}", 503)
        if response is not None:
            response.headers["cache-control"] = "no-store"
            await response(scope, receive, send)
            return
        scope[SESSION] = session
        await self._app(scope, receive, send)

    async def _local(self, request: Request, path: str, session: Session | None) -> Response | None:
        """Answer what is answered here; None lets it through."""
        if request.method not in {"GET", "HEAD", "POST"}:
            return PlainTextResponse("GET and POST only", 405)
        if path == "/login":
            return await self._sign_in(request) if request.method == "POST" else _ask_token(request)
        if session is None:
            if request.method == "POST" or path.startswith("/_nicegui_ws"):
                return PlainTextResponse("sign in first", 401)
            return RedirectResponse(f"{PREFIX}/login", 303)
        if request.method == "POST":
            if not is_own_origin(request.headers):
                return PlainTextResponse("this form was sent by another site's page", 403)
            if path == "/logout":
                return await self._sign_out(request, session)
            if path == "/actions":
                if not same_text(request.headers.get(CSRF_HEADER, ""), session.csrf):
                    return PlainTextResponse(f"{CSRF_HEADER}: is not this session's", 403)
                return await self._act(request, session)
            return PlainTextResponse("no such form", 404)
        return None

    async def _sign_in(self, request: Request) -> Response:
        form = await _read_form(request)
        if not is_own_origin(request.headers) or not same_text(
            form.get("form", ""), request.cookies.get(FORM_COOKIE, "")
        ):
            return _ask_token(request, "This form is out of date: try once more.", 403)
        try:
            number, session = await self._sessions.begin(form.get("token", "").strip())
        except Unauthorized as error:
            return _ask_token(request, f"Not signed in: {error}.", 401)
        log.info("signed in to the console", user=session.identity.name)
        response = RedirectResponse(PREFIX + "/", 303)
        response.set_cookie(
            COOKIE,
            number,
            max_age=LASTS_S,
            path=PREFIX,
            secure=_is_secure(request.headers),
            httponly=True,
            samesite="strict",
        )
        response.delete_cookie(FORM_COOKIE, path=PREFIX)
        return response

    async def _sign_out(self, request: Request, session: Session) -> Response:
        form = await _read_form(request)
        if not same_text(form.get("csrf", ""), session.csrf):
            return PlainTextResponse("this form is not this session's", 403)
        await self._sessions.end(session)
        self._on_end(session)
        response = RedirectResponse(f"{PREFIX}/login", 303)
        response.delete_cookie(COOKIE, path=PREFIX)
        return response


def _ask_token(request: Request, message: str = "", code: int = 200) -> Response:
    token = new_form_token()
    response = login_page(f"{PREFIX}/login", token, message, code)
    response.set_cookie(
        FORM_COOKIE,
        token,
        max_age=3600,
        path=PREFIX,
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return response


def is_own_origin(headers: Headers) -> bool:
    """Whether a request was made by a page of this server: browsers say so of each form and each WebSocket.

    The scheme is not compared: something in front may do TLS.
    """
    host = headers.get("host", "")
    return bool(host) and urlsplit(headers.get("origin", "")).netloc == host


def _is_secure(headers: Headers) -> bool:
    return urlsplit(headers.get("origin", "")).scheme == "https"


async def _read_form(request: Request) -> dict[str, str]:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST_FORM:
            return {}
    found = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=16)
    return {name: values[0] for name, values in found.items()}


def _cookies(headers: Headers) -> dict[str, str]:
    try:
        jar: SimpleCookie = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return {}
    return {name: morsel.value for name, morsel in jar.items()}


def _with_policy(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers: Any = MutableHeaders(scope=message)
            headers["content-security-policy"] = _POLICY
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "same-origin"
            headers["x-frame-options"] = "DENY"
        await send(message)

    return sending
