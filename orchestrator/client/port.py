"""The seam: what is asked of a herd, wherever it is.

Errors are the same on both sides: `NotFound`, `AlreadyExists`, `Conflict`, `Invalid` with its causes' paths, `Refused`
(admission, or `Forbidden`: the token has not the right), `StoreUnavailable` (Redis or the API is away; may pass),
`VersionExpired` (list again), `OutcomeUnknown` (a change was sent, and no answer came: look before doing it again).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from orchestrator.client.upkeep import Upkeep
from orchestrator.resources import Key, Resource
from orchestrator.resources.scheduling import Taint
from orchestrator.services.manifests import Applied, Creatable
from orchestrator.store import Change
from orchestrator.store.store import Loaded

R = TypeVar("R", bound=Resource)
C = TypeVar("C", bound=Creatable)


@dataclass(frozen=True, slots=True)
class Scope:
    """What is read or watched.

    Attributes:
        kinds: One or several.
        namespace: None: all of them.
        name: Only the one of that name; empty: all.
    """

    kinds: tuple[type[Resource], ...]
    namespace: str | None = None
    name: str = ""

    def takes(self, resource: Resource) -> bool:
        """Whether a resource is in it."""
        if not isinstance(resource, self.kinds) or (self.name and resource.name != self.name):
            return False
        return self.namespace is None or not resource.namespaced or resource.metadata.namespace == self.namespace


class Client(Upkeep, Protocol):
    """A herd, as far as people's programs need it."""

    def find(self, kind: type[R], key: str) -> R | None:
        """Read one resource, or None."""
        ...

    def get(self, kind: type[R], key: str) -> R:
        """Read one resource.

        Raises:
            NotFound: Names the kind, the name and the namespace.
        """
        ...

    def all(self, kind: type[R], namespace: str | None = None) -> list[R]:
        """Read all resources of a kind (of one namespace), by key."""
        ...

    def many(self, kind: type[R], keys: Iterable[str]) -> dict[Key, R]:
        """Read some resources; those that don't exist are left out."""
        ...

    def read(self, scope: Scope) -> Loaded:
        """Read what is in a scope, with the version from which `watch` goes on."""
        ...

    def watch(self, scope: Scope, since: int, deadline: float | None = None) -> Iterator[Change | None]:
        """Follow what happens in a scope after a version; woken, not polled.

        Args:
            scope: What is wanted.
            since: A version that `read` gave, or a change's.
            deadline: Of `time.monotonic`; then it ends. None: never.

        Yields:
            Changes, those of one kind in their order; None about once a second while nothing comes.

        Raises:
            VersionExpired: What follows that version is not known any more: read again.
            StoreUnavailable: The connection broke: read again when it is back.
        """
        ...

    def last_of(self, resource: R) -> R | None:
        """Read how a resource was when it was deleted; None when it was not, or that is forgotten."""
        ...

    def create(self, wanted: C) -> C:
        """Create a resource.

        Raises:
            AlreadyExists: One of that kind and name is there.
            Invalid: A field is wrong.
            NotFound: What it refers to is not there.
            Refused: Admission says no.
        """
        ...

    def apply(self, wanted: Creatable) -> tuple[Creatable, Applied]:
        """Create what is not there, and change what differs; labels and annotations that are not named stay.

        Raises:
            Invalid: A field is wrong, or can't be changed.
            NotFound: What it refers to is not there.
            Refused: Admission says no; or it changed since it was read (`metadata.resourceVersion`).
        """
        ...

    def delete(self, kind: type[C], key: str) -> C:
        """Delete a resource: a migration is aborted by it, a VM is stopped first.

        Returns:
            It as it is then: a VM that still runs is Terminating; an operation that has a grant is still being aborted.

        Raises:
            NotFound: It is not there.
            Refused: It is in use.
        """
        ...

    def set_unschedulable(self, node: str, *, unschedulable: bool, bring_back: bool | None = None) -> bool:
        """Cordon or uncordon a node; tells whether that is new.

        Args:
            node: Its name.
            unschedulable: Whether it is to be cordoned.
            bring_back: At an uncordon, whether what the last drain moved comes home; None leaves that to the settings.

        Raises:
            NotFound: No such node.
        """
        ...

    def set_labels(self, node: str, changes: Mapping[str, str | None]) -> bool:
        """Set labels of a node, or remove those whose value is None; tells whether anything changed.

        Raises:
            NotFound: No such node.
            Invalid: A key or a value can't be one, or the label is the node's own.
        """
        ...

    def set_taints(self, node: str, wanted: Iterable[Taint], removed: Iterable[tuple[str, str]] = ()) -> bool:
        """Put taints on a node, each in place of one of its key and effect, or remove some; tells of any change.

        Args:
            node: Its name.
            wanted: To be put on.
            removed: Pairs of key and effect; an empty effect means all of the key.

        Raises:
            NotFound: No such node.
        """
        ...

    def close(self) -> None:
        """Close its connections."""
        ...
