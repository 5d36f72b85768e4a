"""One request: who asks, what for, whether they may, what comes of it, and what is kept of that."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from orchestrator.api.access import Access, Identity
from orchestrator.api.actions import PLANS
from orchestrator.api.discovery import Discovery
from orchestrator.api.entries import ApiResource, Entry
from orchestrator.api.errors import CODES, status_of, success, to_json
from orchestrator.api.evicting import find_pod, left, read_eviction
from orchestrator.api.forms import Form, choose
from orchestrator.api.leases import LEASES
from orchestrator.api.limits import Shares, media_type, parse_json, read_body, read_document
from orchestrator.api.mirror import Mirror
from orchestrator.api.openapi import OpenApi, is_kubernetes_own
from orchestrator.api.patching import APPLY, Patch, apply_patch, read_patch
from orchestrator.api.reading import around, get, not_found, page, writer
from orchestrator.api.reviews import REVIEWS
from orchestrator.api.sending import LongResponse, compressed
from orchestrator.api.targets import Parameters, Paths, Target, is_dry_by
from orchestrator.api.watching import Bounds, Watch, open_watch
from orchestrator.api.writing import Deletion, Writer
from orchestrator.cli.tables import Around
from orchestrator.errors import (
    BadRequest,
    Invalid,
    MethodNotAllowed,
    NotFound,
    RequestTimeout,
    Unauthorized,
    VmherdError,
)
from orchestrator.logs import logger
from orchestrator.metrics import REQUEST_SECONDS, REQUESTS, WATCHES
from orchestrator.resources import AccessToken, Resource
from orchestrator.settings import Settings

T = TypeVar("T")
log = logger(__name__)

_LONG_LIST: Final = 100
"""Lists from here on are written in a thread, so that others are answered meanwhile."""
_LONG_AT_A_TIME: Final = 8
"""Of one client: each may be tens of megabytes in this process's memory until its client has read it."""
_VERBS: Final = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_COUNTED: Final = frozenset({*_VERBS.values(), "list", "watch", "deletecollection"})
"""Verbs as metrics have them; others are what somebody made up."""
_LONGEST_NAME: Final = 253
_RIGHTS: Final = {"deletecollection": "delete"}
"""The verb that rights are given on, where it is another."""


@dataclass(slots=True)
class Asked:
    """One request, as far as it is understood.

    Attributes:
        name: Of what it is about: that of a created resource is known late.
    """

    verb: str
    identity: Identity | None = None
    target: Target | None = None
    name: str = ""
    dry: bool = False


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
        self.mirror = mirror
        self.access = access
        self._write = write
        self._paths = Paths(resources)
        self._documents = {path: to_json(document) for path, document in Discovery(resources).documents.items()}
        self._documents |= OpenApi(resources).documents
        self._most_bytes = int(config.api_body_mib * 2**20)
        self._timeout_s = config.api_request_timeout
        self._bounds = Bounds(queue=config.api_watch_queue, send_s=config.api_send_timeout)
        self._watching = Shares(config.api_watches_per_client, "watches")
        self._long = Shares(_LONG_AT_A_TIME, "long lists")
        self._asking = Shares(config.api_requests_per_client, "requests")
        self._writers = ThreadPoolExecutor(16, thread_name_prefix="write")
        self._planners = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._listers = ThreadPoolExecutor(2, thread_name_prefix="list")
        self._watches: dict[Watch, Identity] = {}
        mirror.listen(AccessToken, self.cut_watches)

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
            return _json(document)
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
            return await self._in_time(self._watch(request, target, parameters, asked.identity))
        with self._asking.one(asked.identity.name):
            return await self._in_time(self._do(request, asked, target, parameters, asked.identity))

    async def _review(self, request: Request, identity: Identity) -> Response:
        """Answer what somebody asks about themselves."""
        if request.method != "POST":
            raise MethodNotAllowed(f"{request.url.path}: POST only")
        asked = await self._in_time(read_document(request, self._most_bytes))
        if not isinstance(asked, dict):
            raise BadRequest("the body of a review is an object")
        return _json(to_json(REVIEWS[request.url.path](identity, asked)), 201)

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

    async def _do(
        self, request: Request, asked: Asked, target: Target, parameters: Parameters, identity: Identity
    ) -> Response:
        match asked.verb:
            case "get" | "list" if target.api is LEASES:
                return await self._leases(request, target, parameters)
            case "get":
                form = self._form(request, target, parameters)
                entry = await get(self.mirror, target, parameters)
                return _json(form.one(entry, around(self.mirror, target.api)))
            case "list":
                return await self._list(request, target, parameters, identity)
            case "create" if target.subresource == "eviction":
                return await self._evict(request, asked, target, parameters)
            case "create" if target.subresource:
                return await self._act(request, target, parameters, identity)
            case "create" | "update" | "patch":
                return await self._change(request, asked, target, parameters)
            case _:
                return await self._delete(request, asked, target, parameters)

    async def _leases(self, request: Request, target: Target, parameters: Parameters) -> Response:
        form, choice = self._form(request, target, parameters), parameters.choice(target)
        version = await self.mirror.newest()
        found = await self._in_thread(partial(self._write.leases, choice))
        now = around(self.mirror, target.api)
        if not target.name:
            return _json(form.many(found, {"resourceVersion": str(version)}, now))
        if not found:
            raise not_found(target)
        return _json(form.one(found[0], now))

    def _form(self, request: Request, target: Target, parameters: Parameters) -> Form:
        return choose(target.api, request.headers.get("accept", ""), parameters.text("includeObject"))

    async def _list(self, request: Request, target: Target, parameters: Parameters, identity: Identity) -> Response:
        form = self._form(request, target, parameters)
        found = await page(self.mirror, target, parameters)
        write = writer(form, found, around(self.mirror, target.api))
        if len(found.entries) < _LONG_LIST:
            return _json(write())
        takes = request.headers.get("accept-encoding", "")
        give_back = self._long.take(identity.name)
        try:
            made = asyncio.get_running_loop().run_in_executor(self._listers, lambda: compressed(write(), takes))
            body, headers = await made
        except BaseException:
            give_back()
            raise
        return LongResponse(body, headers, piece_s=self._bounds.send_s, on_end=give_back)

    async def _watch(self, request: Request, target: Target, parameters: Parameters, identity: Identity) -> Watch:
        give_back = self._watching.take(identity.name)
        try:
            form = self._form(request, target, parameters)
            watch = await open_watch(self.mirror, target, parameters, form, self._bounds)
        except BaseException:
            give_back()
            raise
        if identity.expires_at is not None:
            watch.seconds = min(watch.seconds, max(0.0, (identity.expires_at - self.access.now()).total_seconds()))
        self._watches[watch] = identity
        WATCHES.inc()
        watch.on_end += [give_back, partial(self._watches.pop, watch, None), WATCHES.dec]
        return watch

    def cut_watches(self) -> None:
        """End the watches of those who may not see what they show any more."""
        for watch, identity in list(self._watches.items()):
            if not self.access.is_valid(identity):
                watch.cut(Unauthorized(f"token {identity.name!r} was revoked, or has expired"))

    async def _change(self, request: Request, asked: Asked, target: Target, parameters: Parameters) -> Response:
        asked.dry = parameters.is_dry()
        identity = asked.identity
        form = self._form(request, target, parameters)
        if asked.verb == "patch":
            body = parse_json(await read_body(request, self._most_bytes))
        else:
            body = await read_document(request, self._most_bytes)
        asked.name = asked.name or _named(body)
        right = asked.verb

        def permit(old: Resource | None, new: Resource) -> None:
            assert identity is not None  # noqa: S101 - it was authenticated
            self.access.check_change(identity, right, target.resource, old, new)

        who = _who(asked)
        write: Callable[[], Resource]
        if asked.verb == "create":
            write = partial(self._write.create, target, body, permit, dry=asked.dry, who=who)
        elif asked.verb == "update":
            write = partial(self._write.replace, target, body, permit, dry=asked.dry, who=who)
        elif media_type(request) == APPLY:
            applied = self._apply(identity, target, body, parameters)
            write = partial(self._write.apply, target, applied, permit, dry=asked.dry, who=who)
        else:
            patch = read_patch(media_type(request), body, takes_strategic=is_kubernetes_own(target.api))
            write = partial(self._write.patch, target, patch, permit, dry=asked.dry, who=who)
        resource = await self._in_thread(write)
        asked.name = resource.name
        if not asked.dry:
            await self.mirror.newest()
        entry = Entry(target.api, resource)
        code = 201 if asked.verb == "create" else 200
        return _json(form.one(entry, around(self.mirror, target.api)), code)

    def _apply(self, identity: Identity | None, target: Target, body: Any, parameters: Parameters) -> Patch:
        """Read a server-side apply, which may create."""
        manager = parameters.text("fieldManager")
        if not manager or len(manager) > _LONGEST_NAME:
            raise BadRequest("fieldManager: an apply needs one")
        if not isinstance(body, dict):
            raise BadRequest("the body of an apply is an object")
        if not isinstance(body.get("metadata", {}), dict):
            raise BadRequest("metadata: is an object")
        if identity is not None and "create" in target.verbs:
            self.access.check(identity, "create", target.resource, target.scope)
        return apply_patch(body, manager)

    async def _delete(self, request: Request, asked: Asked, target: Target, parameters: Parameters) -> Response:
        body = await read_document(request, self._most_bytes) or {}
        if not isinstance(body, dict):
            raise BadRequest("the body of a deletion is an object: DeleteOptions")
        options = body.get("dryRun") or []
        if not isinstance(options, list):
            raise BadRequest("dryRun: is a list")
        asked.dry = parameters.is_dry() or is_dry_by(options)
        if asked.verb == "deletecollection":
            return await self._delete_many(request, asked, target, parameters, body)
        done = await self._in_thread(partial(self._write.delete, target, body, dry=asked.dry, who=_who(asked)))
        if not asked.dry:
            await self.mirror.newest()
        form = self._form(request, target, parameters)
        return _json(_deleted(target.api, done, form))

    async def _delete_many(
        self, request: Request, asked: Asked, target: Target, parameters: Parameters, body: dict[str, Any]
    ) -> Response:
        form = self._form(request, target, parameters)
        found = await page(self.mirror, target, parameters)

        def delete_all() -> None:
            for entry in found.entries:
                meta = entry.resource.metadata
                try:
                    one = Target(target.api, meta.namespace, meta.name)
                    precise = {**body, "preconditions": {"uid": meta.uid}}
                    self._write.delete(one, precise, dry=asked.dry, who=_who(asked))
                except NotFound:
                    continue  # someone else was faster

        await self._in_thread(delete_all)
        if not asked.dry:
            await self.mirror.newest()
        return _json(form.many(found.entries, found.metadata, around(self.mirror, target.api)))

    async def _evict(self, request: Request, asked: Asked, target: Target, parameters: Parameters) -> Response:
        body = await read_document(request, self._most_bytes)
        options = read_eviction(body, target)
        asked.dry = parameters.is_dry() or is_dry_by(options.dry_run)
        await self.mirror.newest()
        pod = find_pod(self.mirror, target)
        options.check(pod)
        await self._in_thread(partial(self._write.evict, pod, dry=asked.dry))
        return _json(to_json(left()), 201)

    async def _act(self, request: Request, target: Target, parameters: Parameters, identity: Identity) -> Response:
        """Do what is neither a read nor a write. Plans cost much CPU: one at a time is made."""
        if parameters.is_dry():
            raise BadRequest(f"dryRun: {target.resource} can't be tried out")
        body = await read_document(request, self._most_bytes) or {}
        if not isinstance(body, dict):
            raise BadRequest("the body of an action is an object")
        plans = target.resource in PLANS
        if plans:
            await self.mirror.newest()
        work = partial(self._write.act, target, body, identity.name)
        pool = self._planners if plans else self._writers
        answer = await asyncio.get_running_loop().run_in_executor(pool, work)
        if not plans:
            await self.mirror.newest()
        return _json(to_json(answer))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writers, work)

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
        return _json(to_json(status), status["code"], headers)

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


def _who(asked: Asked) -> str:
    return asked.identity.name if asked.identity is not None else ""


def _named(body: Any) -> str:
    """Give the name that a body says, for messages."""
    meta = body.get("metadata") if isinstance(body, dict) else None
    name = meta.get("name") if isinstance(meta, dict) else None
    return name[:_LONGEST_NAME] if isinstance(name, str) else ""


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, VmherdError) else type(error).__name__


def _json(body: bytes, code: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, code, headers, media_type="application/json")


def _deleted(api: ApiResource, done: Deletion, form: Form) -> bytes:
    """What a deletion answers: that it is gone, or how it is now that it is going."""
    meta = done.resource.metadata
    if done.is_gone:
        return to_json(success(kind=api.plural, group=api.group, name=meta.name, uid=meta.uid))
    entry = Entry(api, done.resource)
    return form.one(entry, Around(datetime.now(UTC))) if form.kind == "Stored" else entry.json()
