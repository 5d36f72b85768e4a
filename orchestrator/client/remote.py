"""The herd through its API, with a token's rights."""

import json
import queue
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar, cast

from orchestrator.client.documents import body_of, deciding, decode, path_of
from orchestrator.client.local import IDLE_S
from orchestrator.client.place import Place
from orchestrator.client.port import Scope
from orchestrator.client.remote_upkeep import RemoteUpkeep
from orchestrator.client.session import ApiSession, Stream, new_queue, status_error
from orchestrator.errors import AlreadyExists, Conflict, NotFound, StoreUnavailable, VersionExpired
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    Key,
    Node,
    Resource,
    VirtualMachineOperation,
    make_key,
    split_key,
)
from orchestrator.resources.scheduling import Taint
from orchestrator.services.classes import ChangedMeanwhile
from orchestrator.services.manifests import Applied, Creatable
from orchestrator.services.nodes import with_labels, with_taints
from orchestrator.services.operations import check_same_spec
from orchestrator.store import Change, ChangeType
from orchestrator.store.store import Loaded

R = TypeVar("R", bound=Resource)
C = TypeVar("C", bound=Creatable)

MERGE: Final = "application/merge-patch+json"
_ATTEMPTS: Final = 20
_RETRY_S: Final = 0.2
_ENDED_S: Final = 5.0
"""For so long the end of a resource that is gone is looked for."""


class RemoteClient(RemoteUpkeep):
    """`port.Client` by the API.

    Args:
        place: Where it is, and who we are.
        patience_s: A watch whose server is away for no longer goes on where it was. 0: it is told at once.
    """

    def __init__(self, place: Place, *, patience_s: float = 0.0) -> None:
        self.session = ApiSession(place)
        super().__init__(self.session, self)
        self.patience_s = patience_s

    def find(self, kind: type[R], key: str) -> R | None:
        """Read one resource, or None."""
        namespace, name = split_key(Key(key))
        try:
            return decode(kind, self.session.read(path_of(kind, namespace, name)))
        except NotFound:
            return None

    def get(self, kind: type[R], key: str) -> R:
        """Read one resource."""
        found = self.find(kind, key)
        if found is None:
            namespace, name = split_key(Key(key))
            inside = f" in namespace {namespace!r}" if namespace else ""
            raise NotFound(f"{kind.kind_name} {name!r} not found{inside}")
        return found

    def all(self, kind: type[R], namespace: str | None = None) -> list[R]:
        """Read all resources of a kind."""
        documents = self.read(Scope((kind,), namespace)).resources[kind.kind_name]
        return [cast("R", documents[key]) for key in sorted(documents)]

    def many(self, kind: type[R], keys: Iterable[str]) -> dict[Key, R]:
        """Read some resources."""
        found = (self.find(kind, key) for key in dict.fromkeys(keys))
        return {resource.key: resource for resource in found if resource is not None}

    def read(self, scope: Scope) -> Loaded:
        """Read what is in a scope: of several kinds, all as of the version that the first list has."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._read(scope)
            except VersionExpired:
                continue  # more happened between two lists than the server remembers
        return self._read(scope)

    def _read(self, scope: Scope) -> Loaded:
        version, resources = 0, dict[str, dict[Key, Resource]]()
        for kind in scope.kinds:
            parameters = _selectors(scope)
            if version:
                parameters |= {"resourceVersion": str(version), "resourceVersionMatch": "Exact"}
            answer = self.session.read(path_of(kind, scope.namespace), parameters)
            version = int(answer["metadata"]["resourceVersion"])
            found = [decode(kind, item) for item in answer["items"]]
            resources[kind.kind_name] = {resource.key: resource for resource in found}
        return Loaded(version, "", resources)

    def watch(self, scope: Scope, since: int, deadline: float | None = None) -> Iterator[Change | None]:
        """Follow what happens in a scope; each kind is a watch of its own."""
        watches = _Watches(self.session, scope, since, self.patience_s)
        try:
            yield from watches.changes(deadline)
        finally:
            watches.close()

    def last_of(self, resource: R) -> R | None:
        """Read how a resource was when it was deleted."""
        scope = Scope((type(resource),), resource.metadata.namespace or None, resource.name)
        try:
            for change in self.watch(scope, resource.version, time.monotonic() + _ENDED_S):
                found = change.resource if change is not None else None
                if found is None or change is None or found.metadata.uid != resource.metadata.uid:
                    continue
                if change.type is ChangeType.DELETED:
                    return cast("R", found)
        except VersionExpired:
            pass
        return None

    def create(self, wanted: C) -> C:
        """Create a resource."""
        namespace = (wanted.metadata.namespace or DEFAULT_NAMESPACE) if wanted.namespaced else ""
        meta = wanted.metadata.with_(resource_version="")
        answer = self.session.write("POST", path_of(type(wanted), namespace), body_of(wanted.with_(metadata=meta)))
        return decode(type(wanted), answer)

    def apply(self, wanted: Creatable) -> tuple[Creatable, Applied]:
        """Create what is not there, and change what differs."""
        if not wanted.name:
            return self.create(wanted), Applied.CREATED
        namespace = (wanted.metadata.namespace or DEFAULT_NAMESPACE) if wanted.namespaced else ""
        key = make_key(wanted.name, namespace)

        def decide() -> tuple[Creatable, Applied]:
            found = self.find(type(wanted), key)
            if found is None:
                try:
                    return self.create(wanted), Applied.CREATED
                except AlreadyExists as error:  # someone else was faster
                    raise Conflict(str(error)) from error
            return self._change(found, wanted, namespace)

        return deciding(decide)

    def _change(self, found: Creatable, wanted: Creatable, namespace: str) -> tuple[Creatable, Applied]:
        if isinstance(wanted, VirtualMachineOperation) and isinstance(found, VirtualMachineOperation):
            check_same_spec(wanted, found)
            return found, Applied.UNCHANGED
        given = wanted.metadata.resource_version
        meta = wanted.metadata.with_(
            namespace=namespace,
            labels={**found.metadata.labels, **wanted.metadata.labels},
            annotations={**found.metadata.annotations, **wanted.metadata.annotations},
            resource_version=given or found.metadata.resource_version,
        )
        try:
            answer = self.session.write(
                "PUT", path_of(type(wanted), namespace, wanted.name), body_of(wanted.with_(metadata=meta))
            )
        except Conflict as error:
            if given:  # a person's change rests on it: only a person can decide again
                raise ChangedMeanwhile(str(error)) from error
            raise
        new = decode(type(wanted), answer)
        is_same = new.metadata.resource_version == found.metadata.resource_version
        return new, Applied.UNCHANGED if is_same else Applied.CONFIGURED

    def delete(self, kind: type[C], key: str) -> C:
        """Delete a resource."""
        before = self.get(kind, key)
        namespace, name = split_key(Key(key))
        answer = self.session.write("DELETE", path_of(kind, namespace, name))
        if answer.get("kind") == kind.kind_name:
            return decode(kind, answer)
        gone = before.metadata.with_(deletion_timestamp=datetime.now(UTC))
        return cast("C", before.with_(metadata=gone))

    def set_unschedulable(self, node: str, *, unschedulable: bool, bring_back: bool | None = None) -> bool:
        """Cordon or uncordon a node."""
        if not unschedulable and bring_back is not None:
            return self.uncordon(node, bring_back=bring_back)
        before = self.get(Node, node)
        if before.spec.unschedulable == unschedulable:
            return False
        self._patch(before, {"spec": {"unschedulable": unschedulable}})
        return True

    def set_labels(self, node: str, changes: Mapping[str, str | None]) -> bool:
        """Set or remove labels of a node."""
        before = self.get(Node, node)
        if with_labels(before, changes) == before:
            return False
        self._patch(before, {"metadata": {"labels": dict(changes)}})
        return True

    def set_taints(self, node: str, wanted: Iterable[Taint], removed: Iterable[tuple[str, str]] = ()) -> bool:
        """Put taints on a node, or remove some."""
        new, gone = tuple(wanted), tuple(removed)

        def decide() -> bool:
            before = self.get(Node, node)
            after = with_taints(before, new, gone)
            if after == before:
                return False
            taints = [taint.model_dump(mode="json", by_alias=True) for taint in after.spec.taints]
            version = {"resourceVersion": before.metadata.resource_version}  # a list is replaced as a whole
            self._patch(before, {"metadata": version, "spec": {"taints": taints}})
            return True

        return deciding(decide)

    def close(self) -> None:
        """Close its connections."""
        self.session.close()

    def _patch(self, node: Node, change: dict[str, Any]) -> None:
        self.session.write("PATCH", path_of(Node, "", node.name), change, MERGE)


@dataclass(slots=True)
class _Watch:
    kind: type[Resource]
    version: int
    stream: Stream | None = None


class _Watches:
    """The watches of a scope's kinds, each begun again where it was when its connection ends."""

    def __init__(self, session: ApiSession, scope: Scope, since: int, patience_s: float) -> None:
        self._session = session
        self._scope = scope
        self._patience_s = patience_s
        self._lines = new_queue()
        self._watches = {kind.kind_name: _Watch(kind, since) for kind in scope.kinds}

    def changes(self, deadline: float | None) -> Iterator[Change | None]:
        for watch in self._watches.values():
            self._begin(watch)
        while deadline is None or time.monotonic() < deadline:
            left = IDLE_S if deadline is None else max(0.001, min(IDLE_S, deadline - time.monotonic()))
            try:
                tag, line = self._lines.get(timeout=left)
            except queue.Empty:
                yield None
                continue
            watch = self._watches[tag]
            if line is None:
                if watch.stream is not None:
                    watch.stream.close()
                self._begin(watch)
            elif line:
                change = self._take(watch, line)
                if change is not None:
                    yield change

    def close(self) -> None:
        for watch in self._watches.values():
            if watch.stream is not None:
                watch.stream.close()

    def _begin(self, watch: _Watch) -> None:
        watch.stream = None
        parameters = _selectors(self._scope) | {
            "watch": "true",
            "resourceVersion": str(watch.version),
            "allowWatchBookmarks": "true",
        }
        path = path_of(watch.kind, self._scope.namespace)
        until = time.monotonic() + self._patience_s
        while True:
            try:
                watch.stream = self._session.open_stream(path, parameters, self._lines, watch.kind.kind_name)
                return
            except StoreUnavailable:
                if time.monotonic() >= until:
                    raise
                time.sleep(_RETRY_S)

    def _take(self, watch: _Watch, line: bytes) -> Change | None:
        event = json.loads(line)
        kind, body = event["type"], event["object"]
        if kind == "ERROR":
            raise status_error(body)
        version = int(body["metadata"]["resourceVersion"])
        watch.version = version
        if kind == "BOOKMARK":
            return None
        return Change(version, ChangeType(kind), decode(watch.kind, body))


def _selectors(scope: Scope) -> dict[str, str]:
    return {"fieldSelector": f"metadata.name={scope.name}"} if scope.name else {}
