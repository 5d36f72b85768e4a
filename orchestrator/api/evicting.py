"""Evictions: what `kubectl drain` asks of each pod, again and again until the pod is gone.

While the VM moves the answer is 429 with a message that says how far it is, without `Retry-After`: kubectl would wait
silently then. 404 or 201 once it has left.
"""

from dataclasses import dataclass
from typing import Any

from orchestrator.api.mirror import Mirror
from orchestrator.api.pods import Pod
from orchestrator.api.reading import not_found
from orchestrator.api.targets import Target
from orchestrator.errors import BadRequest, NotFound
from orchestrator.resources import make_key
from orchestrator.resources.names import shown


@dataclass(frozen=True, slots=True)
class EvictionOptions:
    """What an eviction's body says.

    Attributes:
        uid: The pod must have it; empty: any.
    """

    dry_run: tuple[object, ...] = ()
    uid: str = ""

    def check(self, pod: Pod) -> None:
        """Refuse another pod than the one that is meant.

        Raises:
            NotFound: The one that is meant is gone.
        """
        if self.uid and self.uid != pod.metadata.uid:
            raise NotFound(f'pods "{pod.name}" with uid {shown(self.uid)} not found')


def read_eviction(body: Any, target: Target) -> EvictionOptions:
    """Read an eviction's body.

    Raises:
        BadRequest: It is not one, or is about another pod.
    """
    document = {} if body is None else body
    if not isinstance(document, dict):
        raise BadRequest(f"the body is an Eviction, not {shown(document)}")
    if document.get("kind", "Eviction") != "Eviction":
        raise BadRequest(f"kind: is {shown(document['kind'])}, the path is for an Eviction")
    meta, options = document.get("metadata") or {}, document.get("deleteOptions") or {}
    if not isinstance(meta, dict) or not isinstance(options, dict):
        raise BadRequest("metadata and deleteOptions are objects")
    if meta.get("name", target.name) not in {"", target.name}:
        raise BadRequest(f"metadata.name: is {shown(meta['name'])}, the path is for {target.name!r}")
    dry_run, wanted = options.get("dryRun") or [], options.get("preconditions") or {}
    if not isinstance(dry_run, list) or not isinstance(wanted, dict):
        raise BadRequest("deleteOptions: dryRun is a list, preconditions an object")
    uid = wanted.get("uid") or ""
    return EvictionOptions(tuple(dry_run), uid if isinstance(uid, str) else shown(uid))


def find_pod(mirror: Mirror, target: Target) -> Pod:
    """Find the pod that is to leave.

    Raises:
        NotFound: It has left.
    """
    entry = mirror.entries[target.api.plural].get(make_key(target.name, target.namespace))
    if entry is None or not isinstance(entry.resource, Pod):
        raise not_found(target)
    return entry.resource


def left() -> dict[str, Any]:
    """Say that it has left."""
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}
