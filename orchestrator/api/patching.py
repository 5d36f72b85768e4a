"""Patches: JSON patch, merge patch, and for nodes strategic merge patch, as far as a node's fields need it.

All are pure: a document and a patch give a new document.
"""

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import jsonpatch
import jsonpointer

from orchestrator.errors import BadRequest, Invalid, UnsupportedMediaType
from orchestrator.resources.names import shown

JSON_PATCH: Final = "application/json-patch+json"
MERGE_PATCH: Final = "application/merge-patch+json"
STRATEGIC: Final = "application/strategic-merge-patch+json"
APPLY: Final = "application/apply-patch+yaml"
APPLIED_ANNOTATION: Final = "vmherd.dev/applied"
"""What each manager said at its last server-side apply: JSON, by the manager's name."""
_NOT_APPLIED: Final = frozenset({"managedFields", "resourceVersion", "uid", "creationTimestamp", "generation"})

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


def apply_patch(given: Mapping[str, Any], manager: str) -> Patch:
    """Give the function that applies what a manager says of a resource (server-side apply).

    What it says is put over what is there; what it said the last time and says no more is taken away. That is kept in
    the annotation `APPLIED_ANNOTATION`, by manager, in place of Kubernetes' managed fields: lists are replaced as a
    whole, and of two managers that say something of one field the last one counts.

    Args:
        given: All that it says.
        manager: Its name.
    """
    said = {key: value for key, value in given.items() if key != "status"}
    if isinstance(meta := said.get("metadata"), dict):
        said["metadata"] = {key: value for key, value in meta.items() if key not in _NOT_APPLIED}

    def apply(document: dict[str, Any]) -> dict[str, Any]:
        meta = document.get("metadata") or {}
        known = _applied(meta.get("annotations") or {})
        after = merge(merge(document, _withdrawn(known.get(manager) or {}, said)), said)
        kept = json.dumps({**known, manager: said}, sort_keys=True, separators=(",", ":"))
        marked = {"metadata": {"annotations": {APPLIED_ANNOTATION: kept}}}
        if given_version := (given.get("metadata") or {}).get("resourceVersion"):
            marked["metadata"]["resourceVersion"] = given_version
        else:
            after = merge(after, {"metadata": {"resourceVersion": None}})
        return cast("dict[str, Any]", merge(after, marked))

    return apply


def _applied(annotations: Mapping[str, Any]) -> dict[str, Any]:
    try:
        known = json.loads(annotations.get(APPLIED_ANNOTATION) or "{}")
    except ValueError:  # somebody else wrote it
        return {}
    return known if isinstance(known, dict) else {}


def _withdrawn(before: Any, now: Any) -> dict[str, Any]:
    """Give the merge patch that takes away what was said before, and is not said now."""
    found: dict[str, Any] = {}
    for key, value in before.items() if isinstance(before, dict) else ():
        if not isinstance(now, dict) or key not in now:
            found[key] = None
        elif isinstance(value, dict) and (below := _withdrawn(value, now[key])):
            found[key] = below
    return found


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
