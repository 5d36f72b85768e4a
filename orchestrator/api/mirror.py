"""The herd's copy in memory as the API serves it: what is now, what happened lately, and who watches.

A follower's thread reads the change stream (woken, not polled) and hands each change to the event loop, which alone
touches this copy. So a list, the version that it is of, and a watch that begins there belong together without locks.

A read that asks for what is newest first asks Redis for the counter of changes, and waits until the copy is there: what
any server has committed is seen by all. Reads that come while that question is under way share the next one.

Versions of the past are answered from the last `history` changes. What happened before this server began is read from
Redis's own stream (`changes_since`), so a watch outlives the server that it was begun on. When the connection broke
and another Redis process answers, nobody can know what was lost: open watches end with 410, and their owners list
again.

Pods and namespaces are made here out of what is stored (`View`), and get the version of the change that made them.
Where one change makes several of their events, all but the last bear the version before it: a watch that is cut off
between them, and resumed, gets them again instead of losing some.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from orchestrator.api.deltas import Delta, Step, View, Watcher
from orchestrator.api.entries import ApiResource, Entry
from orchestrator.api.newest import Newest
from orchestrator.errors import StoreUnavailable, VersionExpired
from orchestrator.logs import logger
from orchestrator.resources import Key, Resource
from orchestrator.services.herd import Herd
from orchestrator.store import Change, ChangeType, Store
from orchestrator.store.follower import Follower

log = logger(__name__)

CATCH_UP_S: Final = 5.0
"""A read waits so long for the copy to reach what Redis has."""


@dataclass(slots=True)
class _Loaded:
    """A whole copy that the follower read."""

    version: int
    documents: dict[str, dict[Key, Resource]]


class Mirror:
    """The copy; one a server. All methods are for the event loop's thread.

    Args:
        store: Its connections are shared; they must not try again by themselves, which would hide a break.
        resources: What is shown.
        views: Those that are made and not stored.
        hidden: Kinds that are not shown, and needed for views.
        history: How many changes are kept.

    Attributes:
        version: Of the copy; -1 before it was loaded.
        documents: What is stored, by kind and key.
        entries: What is shown, by plural and key.
    """

    def __init__(
        self,
        store: Store,
        resources: Sequence[ApiResource],
        views: Sequence[View] = (),
        hidden: Sequence[type[Resource]] = (),
        history: int = 10_000,
    ) -> None:
        self.store = store
        self.version = -1
        self.documents: dict[str, dict[Key, Resource]] = {}
        self.entries: dict[str, dict[Key, Entry]] = {}
        self._stored = {api.kind.kind_name: api for api in resources if not api.is_derived}
        self._views = tuple(views)
        self._made: dict[str, dict[str, dict[Key, Entry]]] = {view.api.plural: {} for view in views}
        self._steps: deque[Step] = deque(maxlen=history)
        self._floor = 0
        self._watchers: dict[str, set[Watcher]] = {api.plural: set() for api in resources}
        self._listeners: dict[str, list[Callable[[], None]]] = {}
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        kinds = tuple({kind.kind_name: kind for kind in (*(self._kinds()), *hidden)}.values())
        self._follower = Follower(store, kinds, self._hear)
        self._run_id = ""
        self._heard = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._newest = Newest(store.redis)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="history")

    def _kinds(self) -> Iterator[type[Resource]]:
        return (api.kind for api in self._stored.values())

    async def start(self) -> None:
        """Load everything and begin to follow.

        Raises:
            StoreUnavailable: Redis does not answer now. Later outages are waited out.
        """
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._follower.start)
        await self.reached(self._follower.version)

    def herd(self) -> Herd:
        """Give what is stored as planners take it, as of now; for other threads."""
        return Herd.of(self._follower)

    async def stop(self) -> None:
        """Stop following, and end all watches."""
        self._follower.stop()
        self.end_watches()
        await self._newest.close()
        self._threads.shutdown(wait=False)

    @property
    def follower(self) -> Follower:
        """What it is made of: for reading, under its lock."""
        return self._follower

    # --- reading ------------------------------------------------------------------------------------------------------

    async def newest(self) -> int:
        """Wait until the copy has all that was committed before this call, by any server.

        Returns:
            The version that it is at, at least.

        Raises:
            StoreUnavailable: Redis does not answer, or the copy does not catch up.
        """
        version = await self._newest.ask()
        await self.reached(version)
        return version

    async def reached(self, version: int) -> None:
        """Wait until the copy is at a version that Redis is known to have.

        Raises:
            StoreUnavailable: It does not catch up.
        """
        if self.version >= version:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((version, future))
        try:
            await asyncio.wait_for(future, CATCH_UP_S)
        except TimeoutError as error:
            raise StoreUnavailable(
                f"this server's copy is at version {self.version}, wanted {version}: it has lost Redis; try again"
            ) from error
        finally:
            self._waiting = [one for one in self._waiting if one[1] is not future]

    def at(self, api: ApiResource, version: int) -> dict[Key, Entry]:
        """Give a kind's resources as they were at a version, by undoing what came after it.

        Raises:
            VersionExpired: It is older than what is kept, or newer than the copy.
        """
        if version > self.version:
            raise VersionExpired(f"version {version} is not known here, where the last is {self.version}: list again")
        found = dict(self.entries[api.plural])
        if version == self.version:
            return found
        if version < self._floor:
            raise VersionExpired(f"version {version} is too old: list again")
        for step in reversed(self._steps):
            if step.version <= version:
                break
            for delta in reversed(step.deltas):
                if delta.api is not api:
                    continue
                if delta.old is not None:
                    found[delta.old.resource.key] = delta.old
                elif delta.new is not None:
                    found.pop(delta.new.resource.key, None)
        return found

    # --- watching -----------------------------------------------------------------------------------------------------

    def watch(self, api: ApiResource, watcher: Watcher) -> None:
        """Tell a watcher of all changes of a kind from now on."""
        self._watchers[api.plural].add(watcher)

    def unwatch(self, api: ApiResource, watcher: Watcher) -> None:
        """Tell it no more."""
        self._watchers[api.plural].discard(watcher)

    def listen(self, kind: type[Resource], listener: Callable[[], None]) -> None:
        """Call a function whenever a stored resource of a kind has changed."""
        self._listeners.setdefault(kind.kind_name, []).append(listener)

    async def changes_since(self, api: ApiResource, version: int, watcher: Watcher) -> list[Delta]:
        """Give what happened to a kind after a version, and begin to tell a watcher what comes next, without a gap.

        Raises:
            VersionExpired: It is too old, or this Redis never had it.
        """
        if version > self.version:
            newest = await self.newest()
            if version > newest:
                raise VersionExpired(f"version {version} is not this Redis's, whose last is {newest}: list again")
        earlier: list[Delta] = []
        while version < self._floor:
            floor = self._floor
            earlier += await self._from_stream(api, version, floor)
            version = floor
        self.watch(api, watcher)
        steps = [step for step in self._steps if step.version > version]
        return earlier + [delta for step in steps for delta in step.deltas if delta.api is api]

    async def _from_stream(self, api: ApiResource, since: int, until: int) -> list[Delta]:
        limit = self._steps.maxlen or 0
        if api.is_derived or until - since > limit:
            raise VersionExpired(f"version {since} is too old: list again")
        loop = asyncio.get_running_loop()
        changes = await loop.run_in_executor(self._threads, self.store.history, since, until, api.kind)
        last: dict[Key, Entry] = {}
        deltas: list[Delta] = []
        for change in changes:
            key, entry = change.resource.key, Entry(api, change.resource)
            old = last.pop(key, None)
            is_known = old is not None or change.type is ChangeType.ADDED
            is_gone = change.type is ChangeType.DELETED
            if not is_gone:
                last[key] = entry
            new, end = (None, entry) if is_gone else (entry, None)
            deltas.append(Delta(change.version, api, old, new, end, is_old_known=is_known))
        return deltas

    # --- following ----------------------------------------------------------------------------------------------------

    def _hear(self, change: Change | None) -> None:
        """Hand on what the follower took in; called in its thread, under its lock."""
        if change is not None:
            self._heard = change.version
            self._tell(self._take, [change])
            return
        follower = self._follower
        loaded = _Loaded(follower.version, {kind: dict(found) for kind, found in follower.resources.items()})
        missed = self._missed(loaded.version)
        self._run_id, self._heard = follower.run_id, loaded.version
        if missed is None:
            self._tell(self._reset, loaded)
        else:
            self._tell(self._take, missed)

    def _missed(self, until: int) -> list[Change] | None:
        """Give what was missed while the connection was away; None where that can't be known."""
        if self._heard < 0 or self._follower.run_id != self._run_id or until < self._heard:
            return None
        missed: list[Change] = []
        since = self._heard
        try:
            while since < until:
                missed += self.store.changes(since, block_ms=1)
                if not missed or missed[-1].version == since:
                    return None
                since = missed[-1].version
        except (VersionExpired, StoreUnavailable, ValueError, KeyError) as error:  # the latter: one can't be read
            log.warning("watches end", why=str(error))
            return None
        return [change for change in missed if change.version <= until]

    def _tell(self, what: Callable[[Any], None], argument: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(what, argument)

    def _reset(self, loaded: _Loaded) -> None:
        if self.version >= 0:
            log.warning("everything was loaded anew", version=f"{self.version} => {loaded.version}")
        self.documents = loaded.documents
        self.entries = {
            api.plural: {key: Entry(api, resource) for key, resource in loaded.documents[kind].items()}
            for kind, api in self._stored.items()
        }
        for view in self._views:
            made = {owner: self._make(view, owner, loaded.version) for owner in view.owners(self.documents)}
            self._made[view.api.plural] = made
            self.entries[view.api.plural] = {key: entry for found in made.values() for key, entry in found.items()}
        self._steps.clear()
        self._floor = loaded.version
        self._advance(loaded.version)
        self.end_watches(VersionExpired("the connection to Redis was lost, and with it what happened: list again"))
        for kind in self._listeners:
            self._notify(kind)

    def _take(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.version <= self.version:
                continue
            kind, key = change.resource.kind_name, change.resource.key
            documents = self.documents.get(kind)
            deltas: list[Delta] = []
            if documents is not None:
                if change.type is ChangeType.DELETED:
                    documents.pop(key, None)
                else:
                    documents[key] = change.resource
                api = self._stored.get(kind)
                if api is not None:
                    deltas += self._put(api, key, change)
                for view in self._views:
                    deltas += self._remake(view, change)
            self._keep(Step(change.version, tuple(deltas)))
            self._advance(change.version)
            for delta in deltas:
                for watcher in tuple(self._watchers[delta.api.plural]):
                    watcher.push(delta)
            self._notify(kind)

    def _put(self, api: ApiResource, key: Key, change: Change) -> Iterator[Delta]:
        held = self.entries[api.plural]
        if change.type is ChangeType.DELETED:
            yield Delta(change.version, api, held.pop(key, None), None, Entry(api, change.resource))
        else:
            new = Entry(api, change.resource)
            old, held[key] = held.get(key), new
            yield Delta(change.version, api, old, new)

    def _remake(self, view: View, change: Change) -> list[Delta]:
        """Make anew what a change is about; gives what differs."""
        api, made, held = view.api, self._made[view.api.plural], self.entries[view.api.plural]
        found: list[tuple[str, Entry, Entry | None, bool]] = []
        """Owner, what is shown, what was there, and whether it stays."""
        for owner in view.affected(change):
            before, after = made.get(owner, {}), self._make(view, owner, change.version)
            found += [(owner, old, old, False) for key, old in before.items() if key not in after]
            for key, new in after.items():
                present = before.get(key)
                if present is None or not _is_same(present, new):
                    found.append((owner, new, present, True))
        deltas: list[Delta] = []
        for number, (owner, entry, old, stays) in enumerate(found, start=1):
            version = change.version if number == len(found) else change.version - 1
            shown, key = _at_version(entry, version), entry.resource.key
            if stays:
                held[key] = made.setdefault(owner, {})[key] = shown
            else:
                held.pop(key, None)
                made[owner].pop(key, None)
            deltas.append(Delta(version, api, old, shown if stays else None, None if stays else shown))
        for owner in {owner for owner, *_ in found if not made.get(owner)}:
            made.pop(owner, None)
        return deltas

    def _make(self, view: View, owner: str, version: int) -> dict[Key, Entry]:
        made: dict[Key, Entry] = {}
        for resource in view.make(owner, self.documents):
            known = resource.version or version
            dated = resource.with_(metadata=resource.metadata.with_(resource_version=str(known)))
            made[dated.key] = Entry(view.api, dated)
        return made

    def _keep(self, step: Step) -> None:
        if len(self._steps) == self._steps.maxlen:
            self._floor = self._steps[0].version
        self._steps.append(step)

    def _advance(self, version: int) -> None:
        self.version = version
        for wanted, future in self._waiting:
            if version >= wanted and not future.done():
                future.set_result(None)

    def _notify(self, kind: str) -> None:
        for listener in self._listeners.get(kind, ()):
            listener()

    def end_watches(self, error: Exception | None = None) -> None:
        """End all watches; with an error, where their clients have to be told."""
        for watchers in self._watchers.values():
            for watcher in tuple(watchers):
                watcher.end(error)


def _at_version(entry: Entry, version: int) -> Entry:
    meta = entry.resource.metadata.with_(resource_version=str(version))
    return Entry(entry.api, entry.resource.with_(metadata=meta))


def _is_same(one: Entry, other: Entry) -> bool:
    """Whether two differ in nothing but the version."""
    meta = one.resource.metadata.with_(resource_version=other.resource.metadata.resource_version)
    return one.resource.with_(metadata=meta) == other.resource
