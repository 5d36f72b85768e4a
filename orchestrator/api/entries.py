"""What the copy in memory holds: one resource at one version, with the forms in which it was asked for.

Resources are immutable, so each form is made once, and a thousand watchers are sent the same bytes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from orchestrator.api.errors import to_json
from orchestrator.api.selectors import Fields
from orchestrator.cli.ages import UNKNOWN
from orchestrator.cli.tables import Around, Column, Table, clean
from orchestrator.resources import Resource

READ: Final = ("get", "list", "watch")
_ALONE: Final = Around(datetime.fromtimestamp(0, UTC))


def is_steady(column: Column[Any]) -> bool:
    """Whether a column shows nothing but what is in the resource."""
    return not (column.is_clock or column.counts_vms)


def cell_json(text: str) -> bytes:
    """Encode a cell as it is shown."""
    return to_json(clean(text) or UNKNOWN)


def wire_form(resource: Resource) -> dict[str, Any]:
    """Give a resource as clients see it."""
    return resource.manifest()


@dataclass(frozen=True, slots=True, eq=False)
class ApiResource:
    """One kind of resource as the API offers it.

    Attributes:
        kind: What the copy holds.
        verbs: What may be done with it.
        table: How it is printed.
        fields: What it can be selected by, besides `metadata.name` and `metadata.namespace`.
        short_names: For people.
        categories: Groups of kinds that are asked for together (`kubectl get all`).
        wire: Gives it as clients see it.
        schema: The model that describes what clients see; the kind itself unless it is shown differently.
        is_derived: Made by this server out of others, and not stored.
        is_evictable: Whether one can be asked to leave its node.
        actions: What can be done with one besides, or with all of them: see `actions`.
    """

    kind: type[Resource]
    verbs: tuple[str, ...]
    table: Table[Any]
    fields: Fields = field(default_factory=dict)
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    wire: Callable[[Any], dict[str, Any]] = wire_form
    schema: type[Resource] | None = None
    is_derived: bool = False
    is_evictable: bool = False
    actions: tuple[str, ...] = ()

    @property
    def subresources(self) -> Mapping[str, tuple[str, ...]]:
        """Parts that have paths of their own, and what may be done with each."""
        found = {"status": ("get",)} if "status" in self.kind.model_fields else {}
        evicted = {"eviction": ("create",)} if self.is_evictable else {}
        return {**found, **evicted, **dict.fromkeys(self.actions, ("create",))}

    @property
    def group(self) -> str:
        """Its API group; empty for core."""
        return self.kind.group_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        """Its API version without the group."""
        return self.kind.group_version.rpartition("/")[2]

    @property
    def plural(self) -> str:
        """Its name in paths."""
        return self.kind.plural

    @property
    def full_name(self) -> str:
        """Its name in messages: `virtualmachines.virtualization.deckhouse.io`, `nodes`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


class Entry:
    """One resource at one version.

    Attributes:
        resource: What it is.
    """

    __slots__ = ("_cells", "_json", "_metadata", "_stored", "api", "resource")

    def __init__(self, api: ApiResource, resource: Resource) -> None:
        self.api = api
        self.resource = resource
        self._json: bytes | None = None
        self._metadata: bytes | None = None
        self._stored: bytes | None = None
        self._cells: tuple[bytes, ...] | None = None

    def __repr__(self) -> str:
        """Say what it is."""
        return f"Entry({self.api.plural} {self.resource.key} at {self.resource.metadata.resource_version})"

    @property
    def labels(self) -> Mapping[str, str]:
        """Its labels."""
        return self.resource.metadata.labels

    def wire(self) -> dict[str, Any]:
        """Give it as clients see it; not to be changed."""
        return self.api.wire(self.resource)

    def json(self) -> bytes:
        """Give it encoded."""
        if self._json is None:
            self._json = to_json(self.wire())
        return self._json

    def stored(self) -> bytes:
        """Give it encoded as it is stored, with its versions: what vmherd's own clients read back without a loss."""
        if self._stored is None:
            document = self.resource.model_dump(mode="json", by_alias=True, exclude_none=True)
            self._stored = to_json({**document, "createdVersion": self.resource.created_version})
        return self._stored

    def partial(self) -> bytes:
        """Give its metadata, encoded as a PartialObjectMetadata."""
        if self._metadata is None:
            head = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}
            self._metadata = to_json({**head, "metadata": self.resource.metadata.document()})
        return self._metadata

    def steady_cells(self) -> tuple[bytes, ...]:
        """Give those cells of its row that are made from nothing but itself, encoded."""
        if self._cells is None:
            cells = (column.cell(self.resource, _ALONE) for column in self.api.table.columns if is_steady(column))
            self._cells = tuple(cell_json(cell) for cell in cells)
        return self._cells

    def looks_like(self, other: "Entry") -> bool:
        """Whether a row of a table that shows this one would say the same as one that shows the other."""
        mine, theirs = self.resource.metadata, other.resource.metadata
        return self.steady_cells() == other.steady_cells() and theirs == mine.with_(
            resource_version=theirs.resource_version
        )
