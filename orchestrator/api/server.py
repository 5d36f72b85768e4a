"""One request: who asks, what for, whether they may, and what is kept of that. What comes of it is in `verbs`."""

import asyncio
import time
from collections.abc import Awaitable
from typing import Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from orchestrator.api.access import Access, Identity
from orchestrator.api.actions import PLANS
from orchestrator.api.discovery import Discovery
from orchestrator.api.entries import ApiResource
from orchestrator.api.errors import CODES, status_of, to_json
from orchestrator.api.limits import Shares, read_document
from orchestrator.api.mirror import Mirror
from orchestrator.api.openapi import OpenApi
from orchestrator.api.reviews import REVIEWS
from orchestrator.api.targets import Parameters, Paths, Target
from orchestrator.api.verbs import Asked, Verbs, json_answer
from orchestrator.api.writing import Writer
from orchestrator.errors import (
    BadRequest,
    Invalid,
    MethodNotAllowed,
    RequestTimeout,
    Unauthorized,
    VmherdError,
)
from orchestrator.logs import logger
from orchestrator.metrics import REQUEST_SECONDS, REQUESTS
from orchestrator.settings import Settings

T = TypeVar("T")
log = logger(__name__)

_VERBS: Final = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_COUNTED: Final = frozenset({*_VERBS.values(), "list", "watch", "deletecollection"})
"""Verbs as metrics have them; others are what somebody made up."""
_RIGHTS: Final = {"deletecollection": "delete"}
"""The verb that rights are given on, where it is another."""


class Server:
    """Answers requests.

    Args:
        mirror: The copy in memory; started.
        access: Decides who may do what.
        write: Does what changes something.
        resources: All that is offered.
        config: The `api_` settings.
    """

    def __init__(
        self, mirror: Mirror, access: Access, write: Writer, resources: tuple[ApiResource, ...], config: Settings
    ) -> None:
        self.access = access
        self._verbs = Verbs(mirror, access, write, config)
        self._paths = Paths(resources)
        self._documents = {path: to_json(document) for path, document in Discovery(resources).documents.items()}
        self._documents |= OpenApi(resources).documents
        self._most_bytes = int(config.api_body_mib * 2**20)
        self._timeout_s = config.api_request_timeout
        self._asking = Shares(config.api_requests_per_client, "requests")

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        asked = Asked(_VERBS.get(request.method, request.method.lower()))
        began = time.monotonic()
        try:
            response = await self._answer(request, asked)
        except Exception as error:  # noqa: BLE001 - the entry point: whatever goes wrong is an answer
            response = self._refuse(error, asked)
            self._audit(request, asked, response.status_code, _message(error))
        else:
            self._audit(request, asked, response.status_code, "")
        verb = asked.verb if asked.verb in _COUNTED else "other"
        resource = asked.target.api.plural if asked.target is not None else ""
        REQUESTS.labels(verb, resource, str(response.status_code)).inc()
        REQUEST_SECONDS.labels(verb).observe(time.monotonic() - began)
        return response

    async def _answer(self, request: Request, asked: Asked) -> Response:
        asked.identity = self.access.authenticate(request.headers.get("authorization"))
        path: str = request.scope["path"]
        document = self._documents.get(path.rstrip("/") or "/")
        if document is not None:
            if request.method not in {"GET", "HEAD"}:
                raise MethodNotAllowed(f"{path}: GET only")
            return json_answer(document)
        if path in REVIEWS:
            return await self._review(request, asked.identity)
        asked.target = target = self._paths.read(path)
        asked.name = target.name
        parameters = Parameters(request.query_params)
        asked.verb = self._verb(request, target, parameters)
        if asked.verb not in target.verbs:
            raise MethodNotAllowed(f"{target.api.full_name}: the server does not allow {asked.verb} here")
        right = _RIGHTS.get(asked.verb, asked.verb)
        self.access.check(asked.identity, right, target.resource, target.scope)
        if asked.verb == "watch":
            return await self._in_time(self._verbs.watch(request, target, parameters, asked.identity))
        with self._asking.one(asked.identity.name):
            return await self._in_time(self._verbs.do(request, asked, target, parameters, asked.identity))

    async def _review(self, request: Request, identity: Identity) -> Response:
        """Answer what somebody asks about themselves."""
        if request.method != "POST":
            raise MethodNotAllowed(f"{request.url.path}: POST only")
        asked = await self._in_time(read_document(request, self._most_bytes))
        if not isinstance(asked, dict):
            raise BadRequest("the body of a review is an object")
        return json_answer(to_json(REVIEWS[request.url.path](identity, asked)), 201)

    def _verb(self, request: Request, target: Target, parameters: Parameters) -> str:
        verb = _VERBS.get(request.method)
        if verb is None:
            raise MethodNotAllowed(f"method {request.method[:20]!r} is not allowed")
        if verb == "get":
            if parameters.flag("watch"):
                return "watch"
            return "get" if target.name else "list"
        if verb == "delete" and not target.name:
            return "deletecollection"
        if verb != "create" and not target.name:
            raise MethodNotAllowed(f"{target.api.full_name}: {verb} is for one resource")
        if verb == "create" and target.name and not target.subresource:
            raise MethodNotAllowed(f"{target.api.full_name}: POST is for the collection")
        return verb

    async def _in_time(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await work
        except TimeoutError as error:
            raise RequestTimeout(
                f"the request took longer than {self._timeout_s:g} s; what it changes may still come"
            ) from error

    def _refuse(self, error: Exception, asked: Asked) -> Response:
        target = asked.target
        kind = target.api if target is not None else None
        status = status_of(
            error,
            kind="" if kind is None else kind.kind.kind_name if isinstance(error, Invalid) else kind.plural,
            group=kind.group if kind is not None else "",
            name=asked.name,
        )
        if status["code"] == CODES["InternalError"]:
            log.error("a request failed", verb=asked.verb, exc_info=error)
        headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else None
        if status["code"] == CODES["ServiceUnavailable"] and asked.verb != "create":
            # kubectl asks again by that, ten times. What it creates may have been stored though no answer came.
            headers = {"Retry-After": "1"}
        return json_answer(to_json(status), status["code"], headers)

    def _audit(self, request: Request, asked: Asked, outcome: int, message: str) -> None:
        target = asked.target
        if target is None and asked.identity is not None:
            return  # what the API says of itself
        self.access.audit(
            asked.identity,
            "get" if target is not None and target.resource in PLANS else _RIGHTS.get(asked.verb, asked.verb),
            target.resource if target is not None else "",
            target.namespace or None if target is not None else None,
            asked.name,
            outcome,
            message=message,
            source=request.client.host if request.client is not None else "",
            dry_run=asked.dry,
        )


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, VmherdError) else type(error).__name__
