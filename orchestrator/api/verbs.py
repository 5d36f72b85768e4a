"""What each verb comes to, once it may be done: reads are from the copy, writes by the services.

Whether somebody may is decided before (`server`), but for what only the body says: what a change touches.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from orchestrator.api.access import Access, Identity
from orchestrator.api.actions import PLANS
from orchestrator.api.entries import ApiResource, Entry
from orchestrator.api.errors import success, to_json
from orchestrator.api.evicting import find_pod, left, read_eviction
from orchestrator.api.forms import Form, choose
from orchestrator.api.leases import LEASES
from orchestrator.api.limits import Shares, media_type, parse_json, read_body, read_document
from orchestrator.api.mirror import Mirror
from orchestrator.api.openapi import is_kubernetes_own
from orchestrator.api.patching import APPLY, Patch, apply_patch, read_patch
from orchestrator.api.reading import around, get, not_found, page, writer
from orchestrator.api.sending import LongResponse, compressed
from orchestrator.api.targets import Parameters, Target, is_dry_by
from orchestrator.api.watching import Bounds, Watch, open_watch
from orchestrator.api.writing import Deletion, Writer
from orchestrator.cli.tables import Around
from orchestrator.errors import BadRequest, NotFound, Unauthorized
from orchestrator.metrics import WATCHES
from orchestrator.resources import AccessToken, Resource
from orchestrator.settings import Settings

T = TypeVar("T")

_LONG_LIST: Final = 100
"""Lists from here on are written in a thread, so that others are answered meanwhile."""
_LONG_AT_A_TIME: Final = 8
"""Of one client: each may be tens of megabytes in this process's memory until its client has read it."""
_LONGEST_NAME: Final = 253


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


class Verbs:
    """Does what is asked for.

    Args:
        mirror: The copy in memory; started.
        access: Decides what a change may touch, and whose watches go on.
        write: Does what changes something.
        config: The `api_` settings.
    """

    def __init__(self, mirror: Mirror, access: Access, write: Writer, config: Settings) -> None:
        self.mirror = mirror
        self.access = access
        self._write = write
        self._most_bytes = int(config.api_body_mib * 2**20)
        self._bounds = Bounds(queue=config.api_watch_queue, send_s=config.api_send_timeout)
        self._watching = Shares(config.api_watches_per_client, "watches")
        self._long = Shares(_LONG_AT_A_TIME, "long lists")
        self._writers = ThreadPoolExecutor(16, thread_name_prefix="write")
        self._planners = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._listers = ThreadPoolExecutor(2, thread_name_prefix="list")
        self._watches: dict[Watch, Identity] = {}
        mirror.listen(AccessToken, self.cut_watches)

    async def do(
        self, request: Request, asked: Asked, target: Target, parameters: Parameters, identity: Identity
    ) -> Response:
        """Do all but a watch; what is learnt of it meanwhile is noted in `asked`."""
        match asked.verb:
            case "get" | "list" if target.api is LEASES:
                return await self._leases(request, target, parameters)
            case "get":
                form = self._form(request, target, parameters)
                entry = await get(self.mirror, target, parameters)
                return json_answer(form.one(entry, around(self.mirror, target.api)))
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
            return json_answer(form.many(found, {"resourceVersion": str(version)}, now))
        if not found:
            raise not_found(target)
        return json_answer(form.one(found[0], now))

    def _form(self, request: Request, target: Target, parameters: Parameters) -> Form:
        return choose(target.api, request.headers.get("accept", ""), parameters.text("includeObject"))

    async def _list(self, request: Request, target: Target, parameters: Parameters, identity: Identity) -> Response:
        form = self._form(request, target, parameters)
        found = await page(self.mirror, target, parameters)
        write = writer(form, found, around(self.mirror, target.api))
        if len(found.entries) < _LONG_LIST:
            return json_answer(write())
        takes = request.headers.get("accept-encoding", "")
        give_back = self._long.take(identity.name)
        try:
            made = asyncio.get_running_loop().run_in_executor(self._listers, lambda: compressed(write(), takes))
            body, headers = await made
        except BaseException:
            give_back()
            raise
        return LongResponse(body, headers, piece_s=self._bounds.send_s, on_end=give_back)

    async def watch(self, request: Request, target: Target, parameters: Parameters, identity: Identity) -> Watch:
        """Begin a watch, which ends with the token that it was begun with."""
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
        return json_answer(form.one(entry, around(self.mirror, target.api)), code)

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
        return json_answer(_deleted(target.api, done, form))

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
        return json_answer(form.many(found.entries, found.metadata, around(self.mirror, target.api)))

    async def _evict(self, request: Request, asked: Asked, target: Target, parameters: Parameters) -> Response:
        body = await read_document(request, self._most_bytes)
        options = read_eviction(body, target)
        asked.dry = parameters.is_dry() or is_dry_by(options.dry_run)
        await self.mirror.newest()
        pod = find_pod(self.mirror, target)
        options.check(pod)
        await self._in_thread(partial(self._write.evict, pod, dry=asked.dry))
        return json_answer(to_json(left()), 201)

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
        return json_answer(to_json(answer))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writers, work)


def json_answer(body: bytes, code: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Answer with a document that is written already."""
    return Response(body, code, headers, media_type="application/json")


def _who(asked: Asked) -> str:
    return asked.identity.name if asked.identity is not None else ""


def _named(body: Any) -> str:
    """Give the name that a body says, for messages."""
    meta = body.get("metadata") if isinstance(body, dict) else None
    name = meta.get("name") if isinstance(meta, dict) else None
    return name[:_LONGEST_NAME] if isinstance(name, str) else ""


def _deleted(api: ApiResource, done: Deletion, form: Form) -> bytes:
    """What a deletion answers: that it is gone, or how it is now that it is going."""
    meta = done.resource.metadata
    if done.is_gone:
        return to_json(success(kind=api.plural, group=api.group, name=meta.name, uid=meta.uid))
    entry = Entry(api, done.resource)
    return form.one(entry, Around(datetime.now(UTC))) if form.kind == "Stored" else entry.json()
