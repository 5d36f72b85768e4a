"""Watches: a response that goes on, one line for each change.

What a watch has yet to send waits in a queue of its own, bounded: who reads too slowly is told 410, and lists again. A
resource that stops matching the watch's selectors is reported as deleted, one that begins to match as added.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.api.deltas import Delta
from orchestrator.api.entries import ApiResource, Entry
from orchestrator.api.errors import status_of, to_json
from orchestrator.api.forms import Form
from orchestrator.api.mirror import Mirror
from orchestrator.api.reading import around, at_least
from orchestrator.api.targets import Choice, Parameters, Target
from orchestrator.cli.tables import Around
from orchestrator.errors import BadRequest, VersionExpired
from orchestrator.logs import logger

log = logger(__name__)

LONGEST_S: Final = 3600.0
"""A watch ends after this long at most; its client begins another where it was."""
_CHUNK: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a watch may take.

    Attributes:
        queue: Changes that may wait for their client.
        send_s: For so long a client may take nothing at all.
        bookmark_s: So often one that asked for it is told how far it is.
    """

    queue: int = 1_000
    send_s: float = 30.0
    bookmark_s: float = 15.0


class Watch(Response):
    """One watch, as a response. It is registered when `open_watch` made it, and gone when its response has ended."""

    media_type = "application/json"

    def __init__(
        self, mirror: Mirror, choice: Choice, form: Form, bounds: Bounds, *, seconds: float, bookmarks: bool
    ) -> None:
        super().__init__()
        self.mirror = mirror
        self.choice = choice
        self.form = form
        self.bounds = bounds
        self.seconds = min(seconds, LONGEST_S)
        self.bookmarks = bookmarks
        self.initial: list[Entry] = []
        self.initial_version = 0
        self.marks_beginning = False
        self.on_end: list[Any] = []
        self._queue: deque[tuple[str, Entry, Delta]] = deque()
        self._woken = asyncio.Event()
        self._error: Exception | None = None
        self._is_over = False
        self._is_headed = False

    @property
    def api(self) -> ApiResource:
        """What is watched."""
        return self.form.api

    # --- what the copy tells ------------------------------------------------------------------------------------------

    def push(self, delta: Delta) -> None:
        """Take what happened, if it is about what is watched."""
        if self._is_over:
            return
        if len(self._queue) >= self.bounds.queue:
            self.cut(VersionExpired("this watch reads too slowly, and has missed changes: list again"))
        else:
            self.replay(delta)

    def replay(self, delta: Delta) -> None:
        """Take what happened before the watch began, however much that is."""
        line = self._line(delta)
        if line is not None:
            self._queue.append((*line, delta))
            self._woken.set()

    def end(self, error: Exception | None) -> None:
        """Take that no more will come; what waits is still sent, and then the error."""
        if not self._is_over:
            self._is_over, self._error = True, error
            self._woken.set()

    def cut(self, error: Exception) -> None:
        """End it at once with an error, whatever waits."""
        self._queue.clear()
        self._is_over, self._error = True, error
        self._woken.set()

    def _line(self, delta: Delta) -> tuple[str, Entry] | None:
        """Say what a change is to this watch; None: nothing."""
        old, new = delta.old, delta.new
        present = new or delta.last
        if present is None:
            return None
        was = self.choice.takes(old) or (not delta.is_old_known and self._may_have_been(present))
        if new is None or not self.choice.takes(new):
            return ("DELETED", present) if was else None
        if was and old is not None and self._shows_no_difference(old, new):
            return None
        return ("MODIFIED" if was else "ADDED", new)

    def _may_have_been(self, new: Entry) -> bool:
        """Whether one whose past is not known may have been sent before: its name and namespace were the same."""
        meta = new.resource.metadata
        return self.choice.name in {"", meta.name} and self.choice.namespace in {"", meta.namespace}

    def _shows_no_difference(self, old: Entry, new: Entry) -> bool:
        """Whether nothing of a change can be seen: a table's rows have cells and metadata only."""
        return self.form.is_table and self.form.table.include != "Object" and old.looks_like(new)

    # --- what the client is sent --------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, until the client goes, its time is over, or the copy ends it."""
        del scope
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.mirror.unwatch(self.api, self)
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            for call in self.on_end:
                call()
        if sending.done() and not sending.cancelled() and (error := sending.exception()) is not None:
            if isinstance(error, TimeoutError | OSError):
                log.info("a watch was dropped: its client takes nothing", resource=self.api.plural)
                return
            raise error

    async def _send_all(self, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-cache, private")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        deadline = asyncio.get_running_loop().time() + self.seconds
        await self._send(send, self._beginning())
        while self._queue or not self._is_over:
            await self._wait(min(deadline, self._next_bookmark()))
            lines = self._take_lines()
            await self._send(send, lines or self._bookmark())
            if asyncio.get_running_loop().time() >= deadline:
                break
        if self._error is not None:
            await self._send(send, [self._error_line(self._error)])
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _next_bookmark(self) -> float:
        return asyncio.get_running_loop().time() + (self.bounds.bookmark_s if self.bookmarks else self.seconds)

    async def _wait(self, until: float) -> None:
        """Wait for something to send."""
        if not self._queue and not self._is_over:
            try:
                async with asyncio.timeout_at(until):
                    await self._woken.wait()
            except TimeoutError:
                pass
        self._woken.clear()

    def _take_lines(self) -> list[bytes]:
        about = around(self.mirror, self.api)
        lines: list[bytes] = []
        while self._queue:
            kind, entry, delta = self._queue.popleft()
            key = (kind, self._is_headed, *self.form.key)
            line = delta.encoded.get(key)
            if line is None:
                line = self.form.event(kind, entry, about, headed=not self._is_headed, version=delta.version)
                delta.encoded[key] = line
            self._is_headed = True
            lines.append(line)
        return lines

    def _beginning(self) -> Iterable[bytes]:
        about: Around = around(self.mirror, self.api)
        for entry in self.initial:
            headed, self._is_headed = not self._is_headed, True
            yield self.form.event("ADDED", entry, about, headed=headed, version=self.initial_version)
        if self.marks_beginning:
            yield self.form.bookmark(self.initial_version, ends_beginning=True)
        self.initial = []

    def _bookmark(self) -> list[bytes]:
        """Say how far it is: nothing that waits is before the copy's version."""
        can_tell = self.bookmarks and not self._queue and not self._is_over
        return [self.form.bookmark(self.mirror.version)] if can_tell else []

    def _error_line(self, error: Exception) -> bytes:
        return to_json({"type": "ERROR", "object": status_of(error)}) + b"\n"

    async def _send(self, send: Send, lines: Iterable[bytes]) -> None:
        chunk: list[bytes] = []
        size = 0
        for line in lines:
            chunk.append(line)
            size += len(line)
            if size >= _CHUNK:
                await self._send_chunk(send, chunk)
                chunk, size = [], 0
        if chunk:
            await self._send_chunk(send, chunk)

    async def _send_chunk(self, send: Send, chunk: list[bytes]) -> None:
        async with asyncio.timeout(self.bounds.send_s):
            await send({"type": "http.response.body", "body": b"".join(chunk), "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def open_watch(mirror: Mirror, target: Target, parameters: Parameters, form: Form, bounds: Bounds) -> Watch:
    """Begin a watch; from here on it misses nothing.

    Raises:
        BadRequest: Parameters are wrong.
        VersionExpired: It begins at a version that is too old, or that this Redis never had.
    """
    choice = parameters.choice(target)
    version = parameters.version()
    seconds = parameters.seconds("timeoutSeconds")
    initial = parameters.text("sendInitialEvents")
    if parameters.text("resourceVersionMatch") not in {"", "NotOlderThan"}:
        raise BadRequest("resourceVersionMatch: must be NotOlderThan for a watch")
    wants_initial = parameters.flag("sendInitialEvents")
    bookmarks = parameters.flag("allowWatchBookmarks")
    watch = Watch(mirror, choice, form, bounds, seconds=seconds or LONGEST_S, bookmarks=bookmarks)
    if wants_initial or (not version and not initial):
        await at_least(mirror, version)
        held = mirror.entries[target.api.plural]
        watch.initial = [entry for _, entry in sorted(held.items()) if choice.takes(entry)]
        watch.initial_version = mirror.version
        watch.marks_beginning = wants_initial and bookmarks
        mirror.watch(target.api, watch)
    elif not version:
        await at_least(mirror, version)
        mirror.watch(target.api, watch)
    else:
        for delta in await mirror.changes_since(target.api, version, watch):
            watch.replay(delta)
    return watch
