"""What the copy in memory tells: what one change did to what is shown, and who makes what is not stored."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.api.entries import ApiResource, Entry
from orchestrator.resources import Key, Resource
from orchestrator.store import Change

Documents = Mapping[str, Mapping[Key, Resource]]
"""All that is stored, by kind and key."""


@dataclass(slots=True, eq=False)
class Delta:
    """What one change did to one resource.

    Attributes:
        version: What a watch that has sent this may be resumed from.
        old: None where there was none, or it is not known.
        new: None when it is gone.
        last: Of one that is gone: how it was at its end, which may say more than `old`.
        is_old_known: False for what happened before this server began: whoever filters must take it as matching.
        encoded: The forms in which it was sent.
    """

    version: int
    api: ApiResource
    old: Entry | None
    new: Entry | None
    last: Entry | None = None
    is_old_known: bool = True
    encoded: dict[tuple[Any, ...], bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """One version, and what it did to what is shown; nothing, for kinds that are not."""

    version: int
    deltas: tuple[Delta, ...]


class View(Protocol):
    """Makes resources out of what is stored."""

    api: ApiResource

    def affected(self, change: Change) -> Iterable[str]:
        """Name the owners whose resources may differ after a change; told of each once, in order."""
        ...

    def owners(self, documents: Documents) -> Iterable[str]:
        """Name all owners; called when everything was loaded anew."""
        ...

    def make(self, owner: str, documents: Documents) -> Iterable[Resource]:
        """Make an owner's resources."""
        ...


class Watcher(Protocol):
    """Is told what happens to one kind of resource."""

    def push(self, delta: Delta) -> None:
        """Take what happened; called in the event loop, must not block."""
        ...

    def end(self, error: Exception | None) -> None:
        """Take that no more will come; why, where its client has to be told."""
        ...
