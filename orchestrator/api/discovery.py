"""What the API says of itself: versions, groups, resources.

Plain discovery documents are answered also to those who ask for the aggregated form first: clients take both.
"""

import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any, Final

from orchestrator.api.entries import ApiResource

GIT_VERSION: Final = "v1.32.0"
"""The Kubernetes version that clients compare their own with."""
_EVICTION: Final = {"group": "policy", "version": "v1", "kind": "Eviction"}
_ANYWHERE: Final = [{"clientCIDR": "0.0.0.0/0", "serverAddress": ""}]


class Discovery:
    """Makes the documents, by path.

    Args:
        resources: All that is offered.
    """

    def __init__(self, resources: Sequence[ApiResource]) -> None:
        by_version: dict[str, list[ApiResource]] = {}
        for api in resources:
            by_version.setdefault(api.kind.group_version, []).append(api)
        self.group_versions = {name: tuple(found) for name, found in by_version.items()}
        self.documents: dict[str, dict[str, Any]] = {
            "/version": version(),
            "/api": {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": _ANYWHERE},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": list(self._groups())},
        }
        for group in self._groups():
            self.documents[f"/apis/{group['name']}"] = {"kind": "APIGroup", "apiVersion": "v1", **group}
        for name, found in self.group_versions.items():
            path = f"/apis/{name}" if "/" in name else f"/api/{name}"
            self.documents[path] = _resource_list(name, [r for api in found for r in self._resources(api)])

    def _groups(self) -> Iterable[dict[str, Any]]:
        names = [name for name in self.group_versions if "/" in name]
        for name in names:
            group, _, number = name.partition("/")
            only = {"groupVersion": name, "version": number}
            yield {"name": group, "versions": [only], "preferredVersion": only}

    def _resources(self, api: ApiResource) -> Iterable[dict[str, Any]]:
        described: dict[str, Any] = {
            "name": api.plural,
            "singularName": api.kind.kind_name.lower(),
            "namespaced": api.kind.namespaced,
            "kind": api.kind.kind_name,
            "verbs": list(api.verbs),
        }
        if api.short_names:
            described["shortNames"] = list(api.short_names)
        if api.categories:
            described["categories"] = list(api.categories)
        yield described
        below = {"singularName": "", "namespaced": api.kind.namespaced, "kind": api.kind.kind_name}
        if "status" in api.subresources:
            yield {**below, "name": f"{api.plural}/status", "verbs": ["get"]}
        for action in api.actions:
            yield {**below, "name": f"{api.plural}/{action}", "verbs": ["create"]}
        if api.is_evictable:
            yield {**below, **_EVICTION, "name": f"{api.plural}/eviction", "verbs": ["create"]}


def version() -> dict[str, Any]:
    """Say which version this is; clients want a number of Kubernetes' own."""
    major, minor, _ = GIT_VERSION.removeprefix("v").split(".")
    return {
        "major": major,
        "minor": minor,
        "gitVersion": f"{GIT_VERSION}-vmherd-{metadata.version('vmherd')}",
        "gitCommit": "",
        "gitTreeState": "",
        "buildDate": "",
        "goVersion": "",
        "compiler": platform.python_implementation(),
        "platform": f"{platform.system()}/{platform.machine()}".lower(),
    }


def _resource_list(group_version: str, resources: list[dict[str, Any]]) -> dict[str, Any]:
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}
