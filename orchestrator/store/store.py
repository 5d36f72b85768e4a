"""The control plane's store: documents, commits, the change stream.

One Lua call commits one or several documents, each against the version it was read at, with every index and every
slot that goes with them. Whoever loses such a race loads again and decides again (`Conflict`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeVar, cast

import redis

from orchestrator.errors import AlreadyExists, Conflict, NotFound, VersionExpired
from orchestrator.logs import logger
from orchestrator.metrics import COMMIT_SECONDS, COMMITS
from orchestrator.resources import KINDS, Key, Resource, split_key
from orchestrator.resources.meta import STORED
from orchestrator.settings import Settings, settings
from orchestrator.store import keys
from orchestrator.store.batch import Batch
from orchestrator.store.connection import connect, read_streams, redis_errors, script

R = TypeVar("R", bound=Resource)
log = logger(__name__)

_REPLICATED_WITHIN_MS = 1000
_SKIPPED = "SKIPPED"
"""Type of the stream's entry where the counter skipped ahead (`lua/commit.lua`)."""


class ChangeType(StrEnum):
    """What happened to a document."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of the change stream; `resource` is the last that was known of a deleted one."""

    version: int
    type: ChangeType
    resource: Resource


@dataclass(frozen=True, slots=True)
class Refusal:
    """A check of a commit did not hold; nothing was written.

    Attributes:
        check: Its name in `lua/commit.lua`.
        detail: What was found instead.
    """

    check: str
    detail: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """One instant's copy: the version, the Redis that gave it, and documents by kind and key."""

    version: int
    run_id: str
    resources: dict[str, dict[Key, Resource]]


def decode(kind: str, stored: str) -> Resource:
    """Read a stored document, `<version> <created> <json>`."""
    version, created, body = stored.split(" ", 2)
    return _decode(kind, int(version), int(created), body)


def _decode(kind: str, version: int, created: int, body: str) -> Resource:
    # A newer vmherd may have written fields that this one does not know: they are no error while both run.
    resource = KINDS[kind].model_validate_json(body, extra="ignore", context=STORED)
    meta = resource.metadata.with_(resource_version=str(version))
    return resource.with_(metadata=meta, created_version=created)


class Store:
    """Documents in Redis, with the control plane's rights.

    Args:
        client: A connection made by `connection.connect`.
        config: Defaults to the process's settings.
        is_dry: Commits are checked and answered as if they were done, and write nothing.
    """

    def __init__(self, client: "redis.Redis", config: Settings | None = None, *, is_dry: bool = False) -> None:
        self.redis = client
        self.is_dry = is_dry
        self.config = config or settings()
        self._commit = script(client, "commit")
        self._load = script(client, "load")

    @classmethod
    def open(cls, url: str | None = None) -> "Store":
        """Open the store at a URL, by default the settings' one. Nothing is sent yet."""
        return cls(connect(url or settings().redis_url.get_secret_value()))

    def close(self) -> None:
        """Close all connections."""
        self.redis.close()

    def dry(self) -> "Store":
        """Give this store for trying out: what is committed there is checked, and not written."""
        return Store(self.redis, self.config, is_dry=True)

    def batch(self) -> Batch:
        """Begin a commit."""
        return Batch(memory_overhead_mib=self.config.memory_overhead_mib, is_dry=self.is_dry)

    def find(self, kind: type[R], key: str) -> R | None:
        """Read one document, or None."""
        with redis_errors(self.redis):
            stored = cast("str | None", self.redis.hget(keys.resources(kind.kind_name), key))
        return cast("R", decode(kind.kind_name, stored)) if stored is not None else None

    def get(self, kind: type[R], key: str) -> R:
        """Read one document.

        Raises:
            NotFound: Names the kind, the name and the namespace.
        """
        found = self.find(kind, key)
        if found is None:
            namespace, name = split_key(Key(key))
            inside = f" in namespace {namespace!r}" if namespace else ""
            raise NotFound(f"{kind.kind_name} {name!r} not found{inside}")
        return found

    def many(self, kind: type[R], wanted: Iterable[str]) -> dict[Key, R]:
        """Read some documents in one round trip; those that don't exist are left out."""
        names = list(dict.fromkeys(wanted))
        if not names:
            return {}
        with redis_errors(self.redis):
            values = cast("list[str | None]", self.redis.hmget(keys.resources(kind.kind_name), names))
        found = (decode(kind.kind_name, value) for value in values if value is not None)
        return {r.key: cast("R", r) for r in found}

    def all(self, kind: type[R], namespace: str | None = None) -> list[R]:
        """Read all documents of a kind (of one namespace), by name."""
        documents = self.load([kind]).resources[kind.kind_name].values()
        chosen = (r for r in documents if namespace is None or r.metadata.namespace == namespace)
        return [cast("R", r) for r in sorted(chosen, key=lambda r: r.key)]

    def names(self, kind: type[Resource]) -> set[str]:
        """Read the keys of all documents of a kind, and not the documents."""
        with redis_errors(self.redis):
            return set(cast("list[str]", self.redis.hkeys(keys.resources(kind.kind_name))))

    def load(self, kinds: Sequence[type[Resource]]) -> Loaded:
        """Read all documents of some kinds as of one instant."""
        with redis_errors(self.redis):
            answer = cast("list[object]", self._load(args=[kind.kind_name for kind in kinds]))
        result: dict[str, dict[Key, Resource]] = {}
        for kind, flat in zip(kinds, answer[2:], strict=True):
            items = cast("list[str]", flat)
            pairs = zip(items[::2], items[1::2], strict=True)
            result[kind.kind_name] = {Key(key): decode(kind.kind_name, value) for key, value in pairs}
        return Loaded(cast("int", answer[0]), cast("str", answer[1]), result)

    def commit(self, batch: Batch) -> list[Resource] | Refusal:
        """Commit a batch.

        Returns:
            The documents as they are stored now, in the order of the writes (deleted ones as they were); or the check
            that did not hold.

        Raises:
            Conflict: A document is not at the version it was read at.
            AlreadyExists: A document to be created is there already.
        """
        with redis_errors(self.redis), COMMIT_SECONDS.time():
            answer = cast("list[str | int]", self._commit(args=[batch.encoded()]))
        if answer[0] == "refused":
            COMMITS.labels("conflict" if answer[1] == "version" else "refused").inc()
            if answer[1] != "version":
                return Refusal(str(answer[1]), str(answer[2]))
            kind, _, key = str(answer[2]).partition(" ")
            created = any(w["expected"] == 0 and w["kind"] == kind and w["key"] == key for w in batch.writes)
            error = AlreadyExists if created else Conflict
            raise error(f"{kind} {split_key(Key(key))[1]!r} " + ("already exists" if created else "changed meanwhile"))
        COMMITS.labels("done").inc()
        for event, warning, about in () if batch.is_dry else batch.told:
            (log.warning if warning else log.info)(event, **about)
        result: list[Resource] = []
        for resource, version in zip(batch.written, answer[1:], strict=True):
            created_version = resource.created_version or int(version)
            meta = resource.metadata.with_(resource_version=str(version or ""))  # none, of what is only tried out
            result.append(resource.with_(metadata=meta, created_version=created_version))
        return result

    def must_commit(self, batch: Batch) -> list[Resource]:
        """Commit a batch whose checks can only fail when something changed since it was decided.

        Raises:
            Conflict: As `commit`, or a check did not hold.
        """
        answer = self.commit(batch)
        if isinstance(answer, Refusal):
            raise Conflict(f"{answer.check}: {answer.detail}")
        return answer

    def next_epochs(self, count: int) -> range:
        """Take some epochs. Unused ones are lost, which harms nothing."""
        with redis_errors(self.redis):
            last = int(self.redis.incrby(keys.EPOCH, count))
        return range(last - count + 1, last + 1)

    def version(self) -> int:
        """Read the counter of all changes."""
        with redis_errors(self.redis):
            return int(cast("str | None", self.redis.get(keys.VERSION)) or 0)

    def now(self) -> datetime:
        """Read Redis's clock."""
        with redis_errors(self.redis):
            seconds, micros = self.redis.time()
        return datetime.fromtimestamp(seconds + micros / 1e6, UTC)

    def is_replicated(self) -> bool:
        """Wait until replicas have all that was written before this call, by whomever (`WAIT`).

        `WAIT` speaks for what its own connection wrote, and any other process may have written what is asked about. So
        something is written first, on the same connection, which changes nothing and comes after all of it.

        Returns:
            False when too few have it yet: what was written may be lost by a failover. True where there are none, and
            none are set (`redis_replicas`).
        """
        with redis_errors(self.redis):
            replication = cast("dict[str, object]", self.redis.info("replication"))
            has_some = int(cast("int", replication.get("connected_slaves", 0))) > 0
            needed = self.config.redis_replicas or int(has_some)
            if not needed:
                return True
            pipe = self.redis.pipeline(transaction=False)
            pipe.incrby(keys.EPOCH, 0)
            pipe.wait(needed, _REPLICATED_WITHIN_MS)
            return cast("int", pipe.execute()[1]) >= needed

    def run_id(self) -> str:
        """Read which Redis process this is."""
        with redis_errors(self.redis):
            return str(cast("dict[str, str]", self.redis.info("server"))["run_id"])

    def changes(self, since: int, block_ms: int) -> list[Change]:
        """Read what changed after a version, waiting up to `block_ms` (> 0) for something.

        Versions have no gaps but those where changes are missing: the stream is bounded, and after a failover the
        counter skips ahead of what may have been lost.

        Returns:
            Changes in order, at most 1,000; empty when nothing came.

        Raises:
            VersionExpired: The stream no longer has what follows that version, or this Redis never had that version.
        """
        with redis_errors(self.redis):
            answer = self.redis.xread({keys.CHANGES: f"{since}-0"}, count=1000, block=block_ms)
        result: list[Change] = []
        for _, entries in read_streams(answer):
            for entry_id, fields in entries:
                version = int(entry_id.partition("-")[0])
                if version != since + 1 + len(result) or fields["type"] == _SKIPPED:
                    if result:
                        return result  # the next call finds the gap first
                    raise VersionExpired(f"version {since} is too old: list again")
                result.append(_change(version, fields))
        return result

    def history(self, since: int, until: int, kind: type[Resource]) -> list[Change]:
        """Read again what happened to one kind after a version, up to and with another.

        Returns:
            Changes in order. Those of other kinds are passed over without being decoded.

        Raises:
            VersionExpired: As `changes`.
        """
        result: list[Change] = []
        while since < until:
            with redis_errors(self.redis):
                answer = self.redis.xrange(keys.CHANGES, f"{since + 1}-0", f"{until}-0", count=1000)
            entries = cast("list[tuple[str, dict[str, str]]]", answer)
            for entry_id, fields in entries:
                version = int(entry_id.partition("-")[0])
                if version != since + 1 or fields["type"] == _SKIPPED:
                    break
                since = version
                if fields["kind"] == kind.kind_name:
                    result.append(_change(version, fields))
            else:
                if entries:
                    continue
            raise VersionExpired(f"version {since} is too old: list again")
        return result

    def last_of(self, resource: R) -> R | None:
        """Read how a document was when it was deleted: whoever looks for the end of something may come too late.

        Args:
            resource: As it was read before.

        Returns:
            None when it was not deleted since, or so long ago that the change stream has forgotten it.
        """
        since = resource.version
        try:
            while changes := self.changes(since, block_ms=1):
                for change in changes:
                    found = change.resource
                    if change.type is ChangeType.DELETED and found.metadata.uid == resource.metadata.uid:
                        return cast("R", found)
                since = changes[-1].version
        except VersionExpired:
            pass
        return None

    def watch(self, since: int | None = None, *, block_ms: int = 1000) -> Iterator[Change | None]:
        """Follow all changes after a version (default: from now on), for ever.

        Yields:
            Each change; None whenever nothing came for `block_ms`, so that a caller can look at its own deadline.

        Raises:
            VersionExpired: As `changes`.
        """
        last = self.version()
        current = last if since is None else since
        if current > last:
            raise VersionExpired(f"version {current} is not this Redis's, whose last is {last}: list again")
        while True:
            found = self.changes(current, block_ms)
            if not found:
                yield None
            for change in found:
                current = change.version
                yield change


def _change(version: int, fields: dict[str, str]) -> Change:
    resource = _decode(fields["kind"], version, int(fields["created"]), fields["body"])
    return Change(version, ChangeType(fields["type"]), resource)
