"""What somebody asks about themselves: who they are to the API, and what they may do.

`kubectl auth can-i` and `auth whoami` ask so, and k9s and Headlamp before they offer an action. Only one's own rights
can be asked for. The answers are made by the same functions that decide requests.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from orchestrator.api.access import GROUPS, group_of, refusal
from orchestrator.api.rights import IN_NAMESPACES, NAMESPACES, RULES, Identity, is_allowed
from orchestrator.errors import BadRequest

_ANY: Final = "*"
_VERBS: Final[Mapping[str, str]] = {"deletecollection": "delete"}

Review = Callable[[Identity, Mapping[str, Any]], dict[str, Any]]
"""Answers a review's body, for whoever asks."""


def may_i(identity: Identity, body: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a SelfSubjectAccessReview.

    Raises:
        BadRequest: It asks for nothing, or in a form that can't be read.
    """
    spec = _part(body, "spec")
    if spec.get("resourceAttributes") is not None:
        allowed, why = _resource(identity, _part(spec, "resourceAttributes"))
    elif spec.get("nonResourceAttributes") is not None:
        path = _part(spec, "nonResourceAttributes")
        allowed, why = _text(path, "verb") == "get", "what the API says of itself may be read"
    else:
        raise BadRequest("spec: resourceAttributes or nonResourceAttributes is needed")
    status = {"allowed": allowed, **({"reason": why} if why else {})}
    return {"kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1", "spec": spec, "status": status}


def what_may_i(identity: Identity, body: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a SelfSubjectRulesReview: what one may do in a namespace.

    Raises:
        BadRequest: It can't be read.
    """
    spec = _part(body, "spec")
    namespace = _text(spec, "namespace") or "default"
    mine = identity.namespaces is None or namespace in identity.namespaces
    rules = []
    for rule in RULES if mine else ():
        if not rule.is_for(identity.role):
            continue
        resources = rule.resources or frozenset({_ANY})
        if identity.namespaces is not None:
            resources = rule.resources & IN_NAMESPACES if rule.resources else IN_NAMESPACES
        if resources:
            groups = sorted({_ANY if name == _ANY else group_of(name) for name in resources})
            verbs = sorted(rule.verbs) or [_ANY]
            rules.append({"verbs": verbs, "apiGroups": groups, "resources": sorted(resources)})
    status = {"resourceRules": rules, "nonResourceRules": [{"verbs": ["get"], "nonResourceURLs": [_ANY]}]}
    head = {"kind": "SelfSubjectRulesReview", "apiVersion": "authorization.k8s.io/v1"}
    return {**head, "spec": spec, "status": {**status, "incomplete": False}}


def who_am_i(identity: Identity, body: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a SelfSubjectReview."""
    del body
    info = {"username": identity.name, "uid": identity.uid, "groups": [f"vmherd:{identity.role}"]}
    if identity.namespaces is not None:
        info["extra"] = {"vmherd.dev/namespaces": sorted(identity.namespaces)}  # type: ignore[assignment]
    head = {"kind": "SelfSubjectReview", "apiVersion": "authentication.k8s.io/v1"}
    return {**head, "metadata": {}, "status": {"userInfo": info}}


REVIEWS: Final[Mapping[str, Review]] = {
    "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews": may_i,
    "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews": what_may_i,
    "/apis/authentication.k8s.io/v1/selfsubjectreviews": who_am_i,
}
"""By path; each is for POST alone."""


def _resource(identity: Identity, asked: Mapping[str, Any]) -> tuple[bool, str]:
    resource, below = _text(asked, "resource"), _text(asked, "subresource")
    whole = f"{resource}/{below}" if below else resource
    namespace = _text(asked, "namespace") or None
    if resource == NAMESPACES:
        namespace = _text(asked, "name") or None  # as a request on one is in that namespace
    verb = _text(asked, "verb")
    group = _text(asked, "group")
    is_ours = group in {_ANY, GROUPS.get(whole, ""), group_of(resource)}
    if is_ours and is_allowed(identity, _VERBS.get(verb, verb), whole, namespace):
        return True, ""
    return False, refusal(identity, verb, whole, namespace)


def _part(body: Mapping[str, Any], field: str) -> dict[str, Any]:
    part = body.get(field)
    if not isinstance(part, dict):
        raise BadRequest(f"{field}: must be an object")
    return part


def _text(part: Mapping[str, Any], field: str) -> str:
    value = part.get(field, "")
    if not isinstance(value, str):
        raise BadRequest(f"{field}: must be a text")
    return value
