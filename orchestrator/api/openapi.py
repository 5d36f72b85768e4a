"""OpenAPI v3 documents, one for each group and version, made from the catalogue and the models.

kubectl reads them before it creates (whether the server checks fields by itself: it does), and for `explain`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, Final

from orchestrator.api.entries import ApiResource
from orchestrator.api.errors import to_json
from orchestrator.api.patching import JSON_PATCH, MERGE_PATCH, STRATEGIC
from orchestrator.api.schemas import COMMON, META, REF, gvk, prefix, schemas_of

_ACTIONS: Final = {"create": "post", "update": "put", "patch": "patch", "delete": "delete"}
_TEXT: Final = {"type": "string"}
_NUMBER: Final = {"type": "integer"}
_FLAG: Final = {"type": "boolean"}
_LIST: Final[Mapping[str, Mapping[str, Any]]] = {
    "labelSelector": _TEXT,
    "fieldSelector": _TEXT,
    "limit": _NUMBER,
    "continue": _TEXT,
    "resourceVersion": _TEXT,
    "resourceVersionMatch": {"type": "string", "enum": ["Exact", "NotOlderThan"]},
    "timeoutSeconds": _NUMBER,
    "watch": _FLAG,
    "allowWatchBookmarks": _FLAG,
    "sendInitialEvents": _FLAG,
}
_WRITE: Final[Mapping[str, Mapping[str, Any]]] = {
    "dryRun": {"type": "string", "enum": ["All"]},
    "fieldManager": _TEXT,
    "fieldValidation": {"type": "string", "enum": ["Ignore", "Warn", "Strict"]},
}
_IN_PATH: Final = {
    "name": "Name of the resource.",
    "namespace": "The project that it is in.",
}


def is_kubernetes_own(api: ApiResource) -> bool:
    """Whether clients know the kind by themselves, and patch it in the way of such kinds."""
    return not api.group


class OpenApi:
    """The documents, by path.

    Args:
        resources: All that is offered.
    """

    def __init__(self, resources: Sequence[ApiResource]) -> None:
        by_version: dict[str, list[ApiResource]] = {}
        for api in resources:
            by_version.setdefault(api.kind.group_version, []).append(api)
        self.documents: dict[str, bytes] = {}
        root: dict[str, Any] = {}
        for name, found in by_version.items():
            path = f"apis/{name}" if "/" in name else f"api/{name}"
            self._add(root, path, _document(found))
        self.documents["/openapi/v3"] = to_json({"paths": root})

    def _add(self, root: dict[str, Any], path: str, document: dict[str, Any]) -> None:
        body = to_json(document)
        self.documents[f"/openapi/v3/{path}"] = body
        digest = hashlib.sha256(body).hexdigest().upper()
        root[path] = {"serverRelativeURL": f"/openapi/v3/{path}?hash={digest}"}


def _whole(paths: Mapping[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "openapi": "3.0.0",
        "info": {"title": "vmherd", "version": metadata.version("vmherd")},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"BearerToken": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"BearerToken": []}],
    }


def _document(resources: Sequence[ApiResource]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = dict(COMMON)
    for api in resources:
        schemas |= schemas_of(api)
        paths |= dict(_paths(api))
    for evicting in (api for api in resources if api.is_evictable):
        schemas["io.k8s.api.policy.v1.Eviction"] = _EVICTION
        path = f"{_root(evicting)}/namespaces/{{namespace}}/{evicting.plural}/{{name}}/eviction"
        paths[path] = {
            "parameters": _path_parameters("namespace", "name"),
            "post": {
                **_operation(evicting, "post", "eviction", _WRITE),
                "requestBody": _body("io.k8s.api.policy.v1.Eviction"),
                "x-kubernetes-group-version-kind": _EVICTION["x-kubernetes-group-version-kind"][0],
            },
        }
    return _whole(paths, schemas)


_EVICTION: Final[dict[str, Any]] = {
    "type": "object",
    "description": "Asks that a pod leaves its node: the VM is migrated away.",
    "properties": {
        "apiVersion": _TEXT,
        "kind": _TEXT,
        "metadata": {"allOf": [{"$ref": f"{REF}{META}ObjectMeta"}], "description": "Names the pod."},
        "deleteOptions": {"allOf": [{"$ref": f"{REF}{META}DeleteOptions"}], "description": "dryRun counts."},
    },
    "x-kubernetes-group-version-kind": [{"group": "policy", "version": "v1", "kind": "Eviction"}],
}


def _root(api: ApiResource) -> str:
    return f"/apis/{api.kind.group_version}" if api.group else f"/api/{api.version}"


def _paths(api: ApiResource) -> Iterator[tuple[str, dict[str, Any]]]:
    root, name = _root(api), prefix(api) + api.kind.kind_name
    if api.kind.namespaced:
        yield f"{root}/{api.plural}", {"get": _list_operation(api, name)}
    inside = f"{root}/namespaces/{{namespace}}/{api.plural}" if api.kind.namespaced else f"{root}/{api.plural}"
    of_path = ("namespace",) if api.kind.namespaced else ()
    collection: dict[str, Any] = {"parameters": _path_parameters(*of_path), "get": _list_operation(api, name)}
    if "create" in api.verbs:
        collection["post"] = {
            **_operation(api, "post", "create", _WRITE),
            "requestBody": _body(name),
            "responses": _responses(name, created=True),
        }
    if "deletecollection" in api.verbs:
        collection["delete"] = _operation(api, "deletecollection", "deletecollection", {**_LIST, **_WRITE})
    yield inside, collection
    one: dict[str, Any] = {
        "parameters": _path_parameters(*of_path, "name"),
        "get": {**_operation(api, "get", "get", {"resourceVersion": _TEXT}), "responses": _responses(name)},
    }
    for verb in ("update", "patch", "delete"):
        if verb in api.verbs:
            one[_ACTIONS[verb]] = _writing(api, verb, name)
    yield f"{inside}/{{name}}", one
    if "status" in api.subresources:
        status = {**_operation(api, "get", "get-status", {}), "responses": _responses(name)}
        yield f"{inside}/{{name}}/status", {"parameters": _path_parameters(*of_path, "name"), "get": status}
    for action in api.actions:
        asked = {**_operation(api, "post", action, {}), "requestBody": _body(f"{META}Action", required=False)}
        asked["responses"] = _responses(f"{META}Action")
        yield f"{inside}/{{name}}/{action}", {"parameters": _path_parameters(*of_path, "name"), "post": asked}


def _writing(api: ApiResource, verb: str, name: str) -> dict[str, Any]:
    operation = _operation(api, _ACTIONS[verb], verb, _WRITE)
    if verb == "update":
        return {**operation, "requestBody": _body(name), "responses": _responses(name)}
    if verb == "delete":
        return {**operation, "requestBody": _body(f"{META}DeleteOptions", required=False)}
    forms = [MERGE_PATCH, JSON_PATCH, *([STRATEGIC] if is_kubernetes_own(api) else [])]
    content = {form: {"schema": {"$ref": f"{REF}{META}Patch"}} for form in forms}
    body = {"required": True, "content": content}
    return {**operation, "requestBody": body, "responses": _responses(name)}


def _list_operation(api: ApiResource, name: str) -> dict[str, Any]:
    return {**_operation(api, "list", "list", _LIST), "responses": _responses(f"{name}List")}


def _operation(api: ApiResource, action: str, verb: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "description": f"{verb} {api.plural}",
        "tags": [api.kind.group_version],
        "parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in parameters.items()],
        "responses": _responses(f"{META}Status"),
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": gvk(api),
    }


def _path_parameters(*names: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "description": _IN_PATH[name], "schema": _TEXT} for name in names
    ]


def _body(name: str, *, required: bool = True) -> dict[str, Any]:
    return {"required": required, "content": {"application/json": {"schema": {"$ref": REF + name}}}}


def _responses(name: str, *, created: bool = False) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": REF + name}}}
    found = {"200": {"description": "OK", "content": content}}
    if created:
        found["201"] = {"description": "Created", "content": content}
    refused = {"application/json": {"schema": {"$ref": f"{REF}{META}Status"}}}
    return {**found, "default": {"description": "Refused", "content": refused}}
