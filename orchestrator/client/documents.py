"""Resources on their way to the API and back: their paths, their bodies, and what is decided from them."""

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

from orchestrator.errors import Conflict, Invalid, Refused
from orchestrator.resources import (
    KINDS,
    AccessToken,
    NodeInventory,
    Resource,
)
from orchestrator.resources.meta import STORED
from orchestrator.services.classes import ChangedMeanwhile

R = TypeVar("R", bound=Resource)
_T = TypeVar("_T")

_NOT_SERVED: Final = frozenset({AccessToken, NodeInventory})
_ATTEMPTS: Final = 20


def decode(kind: type[R], data: dict[str, Any]) -> R:
    """Read a resource in the form `session.STORED`.

    Raises:
        Invalid: It is something else: this vmherd and the server's don't fit together.
    """
    if data.get("kind") != kind.kind_name:
        raise Invalid(f"the API answered with a {data.get('kind')}, where a {kind.kind_name} was asked for")
    created = int(data.get("createdVersion") or 0)
    body = {key: value for key, value in data.items() if key != "createdVersion"}
    # A newer server may know fields that we don't.
    resource = KINDS[kind.kind_name].model_validate(body, extra="ignore", context=STORED)
    return cast("R", resource.with_(created_version=created))


def body_of(resource: Resource) -> dict[str, Any]:
    """Give what is sent of a resource: what was given of it, empty or not, and not what would be filled in."""
    given = resource.model_dump(
        mode="json", by_alias=True, exclude_unset=True, exclude_none=True, exclude={"status", "created_version"}
    )
    meta = {key: value for key, value in given["metadata"].items() if value or key in {"name", "generateName"}}
    return {**given, "apiVersion": resource.group_version, "kind": resource.kind_name, "metadata": meta}


def path_of(kind: type[Resource], namespace: str | None = None, name: str = "") -> str:
    """Give the path of a kind's collection, or of one by name.

    Raises:
        Refused: It is not served.
    """
    if kind in _NOT_SERVED:
        raise Refused(f"the API does not serve {kind.plural}: set VMHERD_REDIS_URL, and no VMHERD_SERVER, for them")
    root = f"/apis/{kind.group_version}" if "/" in kind.group_version else f"/api/{kind.group_version}"
    inside = f"/namespaces/{namespace}" if namespace and kind.namespaced else ""
    return f"{root}{inside}/{kind.plural}" + (f"/{name}" if name else "")


def deciding(decide: Callable[[], _T]) -> _T:
    """Read, decide and write until no one else changed what it was decided from."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return decide()
        except ChangedMeanwhile:
            raise
        except Conflict:
            continue
    return decide()
