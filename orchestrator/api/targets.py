"""What a request is about: its path and its parameters, read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from orchestrator.api.entries import ApiResource, Entry
from orchestrator.api.selectors import Fields, FieldSelector, parse_fields, parse_labels
from orchestrator.errors import BadRequest, NotFound
from orchestrator.resources import Resource
from orchestrator.resources.names import shown
from orchestrator.resources.selectors import Selector

_NAMESPACES: Final = "namespaces"
_OF_NAMESPACES: Final = frozenset({"status", "finalize"})
_MOST_SECONDS: Final = 10**6
_MOST_VERSION: Final = 2**63
_LONGEST_TOKEN: Final = 1024

COMMON_FIELDS: Final[Fields] = {
    "metadata.name": lambda resource: resource.metadata.name,
    "metadata.namespace": lambda resource: resource.metadata.namespace,
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a path names.

    Attributes:
        namespace: Empty: all of them, or the kind has none.
        name: Empty: the collection.
        subresource: `status`, `eviction`; empty: the resource itself.
    """

    api: ApiResource
    namespace: str = ""
    name: str = ""
    subresource: str = ""

    @property
    def resource(self) -> str:
        """Its plural with the subresource, as rights are given on it: `pods/eviction`."""
        return f"{self.api.plural}/{self.subresource}" if self.subresource else self.api.plural

    @property
    def scope(self) -> str | None:
        """The namespace that rights count in; a request on one namespace is in that namespace."""
        return (self.name if self.api.plural == _NAMESPACES else self.namespace) or None

    @property
    def verbs(self) -> tuple[str, ...]:
        """What may be done with it."""
        return self.api.subresources.get(self.subresource, ()) if self.subresource else self.api.verbs


class Paths:
    """Reads paths.

    Args:
        resources: All that is offered.
    """

    def __init__(self, resources: Iterable[ApiResource]) -> None:
        self._known = {(api.kind.group_version, api.plural): api for api in resources}

    def read(self, path: str) -> Target:
        """Read the path of a resource or a collection.

        Args:
            path: `/api/v1/nodes/h1`, `/apis/<group>/<version>/namespaces/<namespace>/<plural>[/<name>[/<sub>]]`.

        Raises:
            NotFound: It names nothing that is offered.
        """
        parts = path.strip("/").split("/")
        match parts:
            case ["api", version, *rest] if rest:
                group_version = version
            case ["apis", group, version, *rest] if rest:
                group_version = f"{group}/{version}"
            case _:
                raise _no_such(path)
        if "" in rest:
            raise _no_such(path)
        namespace = ""
        if rest[0] == _NAMESPACES and len(rest) > 2 and not (len(rest) == 3 and rest[2] in _OF_NAMESPACES):  # noqa: PLR2004 - parts
            namespace, rest = rest[1], rest[2:]
        api = self._known.get((group_version, rest[0]))
        if api is None or len(rest) > 3 or bool(namespace) > api.kind.namespaced:  # noqa: PLR2004 - parts
            raise _no_such(path)
        name, subresource = (*rest[1:], "", "")[:2]
        if subresource and subresource not in api.subresources:
            raise _no_such(path)
        if name and api.kind.namespaced and not namespace:
            raise _no_such(path)
        return Target(api, namespace, name, subresource)


def _no_such(path: str) -> NotFound:
    return NotFound(f"the server could not find the requested resource: {shown(path)}")


EVERY_LABEL: Final = Selector()
EVERY_FIELD: Final = FieldSelector()


@dataclass(frozen=True, slots=True)
class Choice:
    """Which resources of a kind are wanted."""

    namespace: str = ""
    name: str = ""
    labels: Selector = EVERY_LABEL
    fields: FieldSelector = EVERY_FIELD

    @property
    def is_all(self) -> bool:
        """Whether it leaves none out."""
        return not (self.namespace or self.name or self.labels.requirements or self.fields.requirements)

    def takes(self, entry: Entry | None) -> bool:
        """Whether a resource is wanted."""
        if entry is None:
            return False
        meta: Resource = entry.resource
        if self.namespace and meta.metadata.namespace != self.namespace:
            return False
        if self.name and meta.metadata.name != self.name:
            return False
        return self.labels.matches(entry.labels) and self.fields.matches(meta)


class Parameters:
    """Those of a request, read as they are asked for.

    Args:
        given: The query's; of one that is given twice, the last counts.

    Raises:
        BadRequest: By the methods: which parameter, and what is wrong with it.
    """

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given

    def text(self, name: str) -> str:
        """Give a text; empty when there is none."""
        return self._given.get(name, "")

    def flag(self, name: str) -> bool:
        """Give a yes or no; no when there is none."""
        value = self._given.get(name, "").lower()
        if value not in {"", "0", "1", "t", "f", "true", "false"}:
            raise BadRequest(f"{name}: must be true or false (given: {shown(value)})")
        return value in {"1", "t", "true"}

    def number(self, name: str, most: int) -> int | None:
        """Give a whole number from 0 on, cut at `most`; None when there is none."""
        value = self._given.get(name, "")
        if not value:
            return None
        if not (value.isascii() and value.isdecimal()):
            raise BadRequest(f"{name}: must be a whole number from 0 on (given: {shown(value)})")
        return min(int(value), most) if len(value) < 20 else most  # noqa: PLR2004 - digits

    def version(self) -> int | None:
        """Give `resourceVersion`; None when there is none."""
        value = self._given.get("resourceVersion", "")
        if not value:
            return None
        if not (value.isascii() and value.isdecimal()) or len(value) > 19:  # noqa: PLR2004 - digits
            raise BadRequest(f"resourceVersion: invalid value {shown(value)}")
        return int(value)

    def choice(self, target: Target) -> Choice:
        """Read the selectors."""
        labels = parse_labels(self.text("labelSelector"))
        fields = parse_fields(self.text("fieldSelector"), {**COMMON_FIELDS, **target.api.fields})
        return Choice(target.namespace, target.name or fields.required("metadata.name") or "", labels, fields)

    def is_dry(self) -> bool:
        """Whether nothing is to be stored."""
        value = self.text("dryRun")
        if value not in {"", "All"}:
            raise BadRequest(f"dryRun: must be All (given: {shown(value)})")
        return bool(value)

    def seconds(self, name: str) -> float | None:
        """Give a time-out; None when there is none."""
        return self.number(name, _MOST_SECONDS)


def is_dry_by(options: Sequence[object]) -> bool:
    """Read `dryRun` of a body's options.

    Raises:
        BadRequest: It is not what it may be.
    """
    if any(option != "All" for option in options):
        raise BadRequest("dryRun: must be All")
    return bool(options)
