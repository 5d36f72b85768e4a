"""In which form an answer goes: whole resources, their metadata alone, or a table, as the header `Accept` asks for.

Besides Kubernetes' forms there is one of our own, `application/json;as=Stored;g=vmherd.dev;v=v1`: whole resources with
what people are not shown (empty fields, the version of their creation, a node's own units), so that our clients read
back what the store has. It tells nothing that the other forms keep secret.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from orchestrator.api.entries import ApiResource, Entry
from orchestrator.api.errors import to_json
from orchestrator.api.tables import TableForm, read_include
from orchestrator.cli.tables import Around
from orchestrator.errors import BadRequest, NotAcceptable
from orchestrator.resources.names import shown

_JSON: Final = frozenset({"application/json", "application/*", "*/*"})
_LONGEST: Final = 4096
_PARTIAL: Final = "PartialObjectMetadata"
_STORED: Final = "Stored"
_KNOWN: Final = frozenset(
    {("Table", "meta.k8s.io", "v1"), (_PARTIAL, "meta.k8s.io", "v1"), (_STORED, "vmherd.dev", "v1")}
)
_NEVER: Final = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class Form:
    """Writes resources, lists and what watches are sent.

    Attributes:
        kind: `Table`, `PartialObjectMetadata`, `Stored`, or empty for whole resources as clients see them.
        table: With kind `Table`.
    """

    api: ApiResource
    kind: str
    table: TableForm

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for forms that write the same."""
        return (self.kind, self.table.include) if self.is_table else (self.kind,)

    @property
    def is_table(self) -> bool:
        """Whether it is rows and columns."""
        return self.kind == "Table"

    def one(self, entry: Entry, around: Around) -> bytes:
        """Write one resource."""
        if self.is_table:
            return self.table.table([entry], _list_metadata(entry.resource.version), around, headed=True)
        return self._whole(entry)

    def many(self, entries: Sequence[Entry], metadata: Mapping[str, Any], around: Around) -> bytes:
        """Write a list."""
        if self.is_table:
            return self.table.table(entries, metadata, around, headed=True)
        head = {"kind": f"{self.api.kind.kind_name}List", "apiVersion": self.api.kind.group_version}
        if self.kind == _PARTIAL:
            head = {"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1"}
        items = (self._whole(entry) for entry in entries)
        return b"".join((to_json({**head, "metadata": metadata})[:-1], b',"items":[', b",".join(items), b"]}"))

    def event(self, kind: str, entry: Entry, around: Around, *, headed: bool, version: int) -> bytes:
        """Write a line of a watch.

        Args:
            kind: `ADDED`, `MODIFIED`, `DELETED`.
            entry: What it is about.
            around: What cells need besides.
            headed: Of a table: with the columns' definitions.
            version: What the watch may be resumed from after it.
        """
        if self.is_table:
            body = self.table.table([entry], _list_metadata(version), around, headed=headed)
        else:
            body = self._whole(entry)
        return b'{"type":"%s","object":%s}\n' % (kind.encode(), body)

    def bookmark(self, version: int, *, ends_beginning: bool = False) -> bytes:
        """Write the line that says how far a watch is.

        Args:
            version: What it may be resumed from.
            ends_beginning: Whether all that was there at its begin has been sent with it.
        """
        metadata: dict[str, Any] = _list_metadata(version)
        if ends_beginning:
            metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
        if self.is_table:
            body = self.table.table([], metadata, Around(_NEVER), headed=False)
            return b'{"type":"BOOKMARK","object":%s}\n' % body
        head = {"kind": self.api.kind.kind_name, "apiVersion": self.api.kind.group_version}
        if self.kind == _PARTIAL:
            head = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}
        return to_json({"type": "BOOKMARK", "object": {**head, "metadata": metadata}}) + b"\n"

    def _whole(self, entry: Entry) -> bytes:
        if self.kind == _PARTIAL:
            return entry.partial()
        return entry.stored() if self.kind == _STORED else entry.json()


def _list_metadata(version: int) -> dict[str, Any]:
    return {"resourceVersion": str(version)}


def choose(api: ApiResource, accept: str, include: str) -> Form:
    """Choose the first form of the header `Accept` that is ours.

    Args:
        api: What it is about.
        accept: The header; empty: anything.
        include: The parameter `includeObject`.

    Raises:
        NotAcceptable: None is.
        BadRequest: `includeObject` is wrong.
    """
    if len(accept) > _LONGEST:
        raise BadRequest("Accept: is too long")
    table = TableForm(api, read_include(include))
    for part in (accept or "*/*").split(","):
        media, *options = (word.strip() for word in part.split(";"))
        if media.lower() not in _JSON:
            continue
        given = dict(option.partition("=")[::2] for option in options)
        kind = given.get("as", "").removesuffix("List")
        if not kind:
            return Form(api, "", table)
        if (kind, given.get("g"), given.get("v")) in _KNOWN:
            return Form(api, kind, table)
    raise NotAcceptable(f"only application/json is answered (asked for: {shown(accept)})")
