"""Rows and columns for `kubectl get`: the same columns as `vmherd get` prints (`cli.tables`)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from orchestrator.api.entries import ApiResource, Entry, cell_json, is_steady
from orchestrator.api.errors import to_json
from orchestrator.cli.tables import Around
from orchestrator.errors import BadRequest
from orchestrator.resources.names import shown

_HEAD: Final = b'{"kind":"Table","apiVersion":"meta.k8s.io/v1","metadata":'


class Include(StrEnum):
    """What of a resource goes with its row."""

    NONE = "None"
    METADATA = "Metadata"
    OBJECT = "Object"


def read_include(text: str) -> Include:
    """Read the parameter `includeObject`.

    Raises:
        BadRequest: It is none of the three.
    """
    try:
        return Include(text or Include.METADATA)
    except ValueError as error:
        raise BadRequest(f"includeObject: must be None, Metadata or Object (given: {shown(text)})") from error


@dataclass(frozen=True, slots=True)
class TableForm:
    """How a kind's table is written.

    Attributes:
        include: What goes with each row.
    """

    api: ApiResource
    include: Include

    def table(self, entries: Iterable[Entry], metadata: Mapping[str, Any], around: Around, *, headed: bool) -> bytes:
        """Write a table.

        Args:
            entries: Its rows.
            metadata: Of the list.
            around: What cells need besides.
            headed: With the columns' definitions; the later tables of a watch leave them out.
        """
        columns = to_json(self.definitions() if headed else None)
        rows = b",".join(self.row(entry, around) for entry in entries)
        return b"".join((_HEAD, to_json(metadata), b',"columnDefinitions":', columns, b',"rows":[', rows, b"]}"))

    def definitions(self) -> list[dict[str, Any]]:
        """Give the columns; wide ones have a lower priority."""
        return [
            {
                "name": column.title,
                "type": "string",
                "format": "name" if column.title == "NAME" else "",
                "description": "",
                "priority": int(column.is_wide),
            }
            for column in self.api.table.columns
        ]

    def row(self, entry: Entry, around: Around) -> bytes:
        """Write a row."""
        steady = iter(entry.steady_cells())
        cells = (
            next(steady) if is_steady(column) else cell_json(column.cell(entry.resource, around))
            for column in self.api.table.columns
        )
        return b'{"cells":[' + b",".join(cells) + b'],"object":' + self._included(entry) + b"}"

    def _included(self, entry: Entry) -> bytes:
        match self.include:
            case Include.NONE:
                return b"null"
            case Include.METADATA:
                return entry.partial()
            case Include.OBJECT:
                return entry.json()
