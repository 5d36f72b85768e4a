"""Patches: JSON patch, merge patch, and for nodes strategic merge patch, as far as a node's fields need it.

All are pure: a document and a patch give a new document.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final

import jsonpatch
import jsonpointer

from orchestrator.api.errors import BadRequest, UnsupportedMediaType
from orchestrator.errors import Invalid
from orchestrator.resources.names import shown

JSON_PATCH: Final = "application/json-patch+json"
MERGE_PATCH: Final = "application/merge-patch+json"
STRATEGIC: Final = "application/strategic-merge-patch+json"
APPLY: Final = "application/apply-patch+yaml"

_MOST_OPERATIONS: Final = 1_000
_DIRECTIVE: Final = "$patch"
_ORDER: Final = "$setElementOrder/"
_REMOVED: Final = "$deleteFromPrimitiveList/"
_RETAINED: Final = "$retainKeys"
_SETS: Final = frozenset({"metadata.finalizers"})
"""Lists that a strategic merge adds to. All others of a node (taints, for one) are replaced as a whole."""

Patch = Callable[[dict[str, Any]], dict[str, Any]]


def read_patch(media_type: str, body: Any, *, takes_strategic: bool) -> Patch:
    """Give the function that applies a patch.

    Args:
        media_type: The header `Content-Type`.
        body: As parsed.
        takes_strategic: Whether the kind is one of Kubernetes' own.

    Raises:
        UnsupportedMediaType: Not one of the forms that are taken.
        BadRequest: The body is not such a patch. The function raises it too, or `Invalid`, where the patch does not
            fit the document.
    """
    kind = media_type.partition(";")[0].strip().lower()
    taken = [JSON_PATCH, MERGE_PATCH, *([STRATEGIC] if takes_strategic else [])]
    if kind not in taken:
        raise UnsupportedMediaType(
            f"the body of the request was in an unknown format - accepted media types include: {', '.join(taken)}"
        )
    if kind == JSON_PATCH:
        return _json_patch(body)
    if not isinstance(body, dict):
        raise BadRequest(f"a patch of type {kind} is an object, not {shown(body)}")
    return lambda document: (merge if kind == MERGE_PATCH else strategic_merge)(document, body)


def merge(document: Any, patch: Any) -> Any:
    """Apply a merge patch (RFC 7396)."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(document) if isinstance(document, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def strategic_merge(document: Any, patch: Mapping[str, Any], path: str = "") -> Any:
    """Apply a strategic merge patch to a node's document.

    Raises:
        BadRequest: It has a directive that does not exist.
    """
    directive = patch.get(_DIRECTIVE, "merge")
    if directive not in {"merge", "replace", "delete"}:
        raise BadRequest(f"{path or 'patch'}: unknown directive {shown(directive)}")
    if directive == "delete":
        return {}
    result = dict(document) if isinstance(document, dict) and directive == "merge" else {}
    if isinstance(retained := patch.get(_RETAINED), list):
        result = {key: value for key, value in result.items() if key in retained}
    for key, value in patch.items():
        if key in {_DIRECTIVE, _RETAINED} or key.startswith(_ORDER):
            continue
        if key.startswith(_REMOVED):
            name = key.removeprefix(_REMOVED)
            result[name] = [item for item in _listed(result.get(name)) if item not in _listed(value)]
            continue
        below = f"{path}.{key}".lstrip(".")
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = strategic_merge(result.get(key), value, below)
        elif below in _SETS and isinstance(value, list):
            present = _listed(result.get(key))
            result[key] = [*present, *(item for item in value if item not in present)]
        else:
            result[key] = copy.deepcopy(value)
    return result


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _json_patch(body: Any) -> Patch:
    if not isinstance(body, list) or not all(isinstance(operation, dict) for operation in body):
        raise BadRequest(f"a patch of type {JSON_PATCH} is a list of operations")
    if len(body) > _MOST_OPERATIONS:
        raise BadRequest(f"a JSON patch has at most {_MOST_OPERATIONS} operations")

    def apply(document: dict[str, Any]) -> dict[str, Any]:
        try:
            result = jsonpatch.JsonPatch(body).apply(document)
        except jsonpatch.JsonPatchTestFailed as error:
            raise Invalid(f"the patch's test failed: {error}", (("patch", "test failed"),)) from error
        except (
            jsonpatch.JsonPatchException,
            jsonpointer.JsonPointerException,
            TypeError,
            KeyError,
            IndexError,
            ValueError,
            AttributeError,
        ) as error:
            raise BadRequest(f"the JSON patch can't be applied: {str(error)[:200]}") from error
        if not isinstance(result, dict):
            raise BadRequest("the JSON patch leaves no object")
        return result

    return apply
