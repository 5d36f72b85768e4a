"""A copy of the herd's state in memory, kept current from the change stream.

A thread waits on the stream (it is woken, it does not poll), so a read costs no round trip but the one of `sync`, which
makes sure that the copy holds all that was committed before the call. Indexes are derived from the documents by the
same function that derives those in Redis.

After a lost connection everything is loaded anew: the Redis that answers then may be another, with another history. The
client library may have connected again unseen; then the gap that recovery leaves in the versions has the same effect.
"""

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar, cast

from orchestrator.errors import StoreUnavailable, VersionExpired
from orchestrator.logs import logger
from orchestrator.resources import Key, Resource
from orchestrator.store.batch import indexes
from orchestrator.store.store import Change, ChangeType, Store

R = TypeVar("R", bound=Resource)
log = logger(__name__)

_BLOCK_MS = 2_000
_RETRY_S = 0.5


class Follower:
    """Follows some kinds. Use its values under `lock`, or through the methods, which take it.

    Args:
        store: Its connection pool is shared.
        kinds: What to keep.
        on_change: Called when a change was taken in, under the lock and before `sync` can return, from the follower's
            thread; None for a reload.

    Attributes:
        resources: Documents by kind and key.
        index: By Redis key of the index, members with their value (None in sets).
        touched: Keys of indexes that may have changed since their user last cleared this.
        run_id: Of the Redis process that everything was loaded from; empty before that.
    """

    def __init__(
        self,
        store: Store,
        kinds: tuple[type[Resource], ...],
        on_change: Callable[[Change | None], None] | None = None,
    ) -> None:
        self.store = store
        self.kinds = kinds
        self.on_change = on_change
        self.lock = threading.RLock()
        self.resources: dict[str, dict[Key, Resource]] = {kind.kind_name: {} for kind in kinds}
        self.index: dict[str, dict[str, str | None]] = defaultdict(dict)
        self.touched: set[str] = set()
        self.version = -1
        self.run_id = ""
        self._advanced = threading.Condition(self.lock)
        self._stop = threading.Event()

    def start(self) -> "Follower":
        """Load everything and begin to follow.

        Raises:
            StoreUnavailable: Redis does not answer now. Later outages are waited out.
        """
        self._reload()
        threading.Thread(target=self._run, name="follower", daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop following; the thread ends by itself when its wait on the stream does."""
        self._stop.set()

    def sync(self, timeout_s: float = 5.0) -> None:
        """Wait until the copy holds all that was committed before this call.

        Raises:
            StoreUnavailable: It does not catch up in time.
        """
        wanted = self.store.version()
        with self._advanced:
            if not self._advanced.wait_for(lambda: self.version >= wanted, timeout_s):
                raise StoreUnavailable(f"the copy of the herd is at version {self.version}, wanted {wanted}")

    def get(self, kind: type[R], key: str) -> R | None:
        """Give one document of the copy."""
        with self.lock:
            return cast("R | None", self.resources[kind.kind_name].get(Key(key)))

    def all(self, kind: type[R]) -> list[R]:
        """Give all documents of a kind, in no order."""
        with self.lock:
            return cast("list[R]", list(self.resources[kind.kind_name].values()))

    def members(self, index: str) -> dict[str, str | None]:
        """Give a copy of one index."""
        with self.lock:
            return dict(self.index.get(index, {}))

    def _run(self) -> None:
        healthy = True
        while not self._stop.is_set():
            try:
                if not healthy:
                    self._reload()
                    healthy = True
                changes = self.store.changes(self.version, _BLOCK_MS)
                for change in changes:
                    self._take(change)
                # A Redis that lost its last changes has nothing new for whoever saw them.
                healthy = bool(changes) or self.store.version() >= self.version
            except VersionExpired as error:
                log.warning("follower loads everything anew", why=str(error))
                healthy = False
            except StoreUnavailable as error:
                if healthy:
                    log.warning("follower lost Redis", error=str(error))
                healthy = False
                self._stop.wait(_RETRY_S)
            except Exception:  # the thread's entry point: a copy that silently stands still would be worse
                if self._stop.is_set():
                    return  # the store was closed under it
                log.exception("follower failed; it loads everything anew")
                healthy = False
                self._stop.wait(_RETRY_S)

    def _reload(self) -> None:
        loaded = self.store.load(self.kinds)
        with self._advanced:
            self.resources = loaded.resources
            self.index.clear()
            for documents in loaded.resources.values():
                for resource in documents.values():
                    self._reindex(None, resource)
            self.version, self.run_id = loaded.version, loaded.run_id
            if self.on_change is not None:
                self.on_change(None)
            self._advanced.notify_all()

    def _take(self, change: Change) -> None:
        with self._advanced:
            kept = self.resources.get(change.resource.kind_name)
            if kept is not None:
                key = change.resource.key
                new = None if change.type is ChangeType.DELETED else change.resource
                self._reindex(kept.get(key), new)
                if new is None:
                    kept.pop(key, None)
                else:
                    kept[key] = new
            if self.on_change is not None:
                self.on_change(change)
            self.version = change.version
            self._advanced.notify_all()

    def _reindex(self, old: Resource | None, new: Resource | None) -> None:
        overhead = self.store.config.memory_overhead_mib
        for entry in indexes(old, overhead):
            self.index[entry.key].pop(entry.member, None)
            self.touched.add(entry.key)
        for entry in indexes(new, overhead):
            self.index[entry.key][entry.member] = entry.value
            self.touched.add(entry.key)
