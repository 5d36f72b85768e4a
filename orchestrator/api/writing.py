"""Create, replace, patch and delete: each becomes one call of a service, as from every other way in.

A patch is applied to what is stored now. If that changes before the result is stored, it is applied anew, unless the
client named the version that it meant. With `dryRun=All` the services run on a store that checks commits and writes
none, so admission says what it would say.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from orchestrator.api import actions, upkeep
from orchestrator.api.actions import Request
from orchestrator.api.catalog import CLASSES, NAMESPACES, NODES, OPERATIONS, VIRTUAL_MACHINES
from orchestrator.api.entries import ApiResource, Entry
from orchestrator.api.leases import read_leases
from orchestrator.api.patching import Patch
from orchestrator.api.pods import DOMAIN_ANNOTATION, Pod
from orchestrator.api.reading import not_found
from orchestrator.api.targets import Choice, Target
from orchestrator.errors import (
    AlreadyExists,
    BadRequest,
    Conflict,
    Invalid,
    MethodNotAllowed,
    NotFound,
    Refused,
    TooManyRequests,
)
from orchestrator.queues import Message
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    Namespace,
    Node,
    ObjectMeta,
    Resource,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
    make_key,
    parse,
)
from orchestrator.resources.manifest import check_size
from orchestrator.resources.names import shown
from orchestrator.resources.node import NodeSpec
from orchestrator.services import manifests, namespaces, nodes, operations, vms
from orchestrator.services.classes import ChangedMeanwhile, delete_class, update_class
from orchestrator.services.context import Context
from orchestrator.services.evictions import EvictionState, evict
from orchestrator.services.herd import Herd
from orchestrator.services.labelling import update_operation

Permit = Callable[[Resource | None, Resource], None]
"""Told of what is stored (None: nothing) and what is to be, before that: raises `Forbidden` where it goes too far."""

_ATTEMPTS: Final = 20
_SERVERS_OWN: Final = frozenset({"managedFields", "selfLink", "deletionGracePeriodSeconds"})
"""Fields of metadata that clients send back, and that say nothing here."""
_MOST_ANNOTATIONS: Final = 256 * 1024


class Silent:
    """A messenger for what is only tried out."""

    def send(self, message: Message) -> None:
        """Send nothing."""

    def finish(self, task_id: str, result: dict[str, Any]) -> None:
        """Store nothing."""


@dataclass(frozen=True, slots=True)
class Deletion:
    """What became of a deletion.

    Attributes:
        resource: As it was, or as it is now.
        is_gone: Whether it is there no more.
    """

    resource: Resource
    is_gone: bool


class Writer:
    """Writes through the services. Its methods block: they are for threads.

    Args:
        ctx: To work with.
        herd: Gives the herd as it is now, for what takes a plan.
    """

    def __init__(self, ctx: Context, herd: Callable[[], Herd]) -> None:
        self._real = ctx
        self._herd = herd
        self._dry = replace(ctx, store=ctx.store.dry(), messenger=Silent())

    def _ctx(self, *, dry: bool) -> Context:
        return self._dry if dry else self._real

    def create(self, target: Target, body: Any, permit: Permit, *, dry: bool, who: str = "") -> Resource:
        """Create a resource from its manifest.

        Args:
            target: Its kind and namespace.
            body: The manifest.
            permit: Called before it is stored.
            dry: Only look whether it would be.
            who: Asks for it.

        Raises:
            BadRequest: It is not a manifest of what the path names.
            AlreadyExists, Invalid, NotFound, Refused: As the service says.
        """
        data = _document(target, body)
        namespace = target.namespace or DEFAULT_NAMESPACE if target.api.kind.namespaced else ""
        ctx = self._ctx(dry=dry)
        if target.api is NAMESPACES:
            wanted_namespace = _read(Namespace, data)
            permit(None, wanted_namespace)
            return namespaces.create_namespace(ctx, wanted_namespace)
        if target.api in upkeep.OF_HERD:
            own = upkeep.read(target.api, data)
            permit(None, own)
            try:
                return upkeep.create(ctx, self._herd, own, who)
            except AlreadyExists as error:
                raise _exists(target.api, own.name) from error
        wanted = manifests.read_manifest(data, namespace)
        permit(None, wanted)
        # Before admission: that would find the operation itself in its way, and blame that.
        is_named = isinstance(wanted, VirtualMachineOperation) and wanted.name
        if is_named and ctx.store.find(type(wanted), make_key(wanted.name, namespace)) is not None:
            raise _exists(target.api, wanted.name)
        try:
            return manifests.create_resource(ctx, wanted)
        except AlreadyExists as error:
            raise _exists(target.api, wanted.name) from error

    def replace(self, target: Target, body: Any, permit: Permit, *, dry: bool, who: str = "") -> Resource:
        """Replace a resource by its manifest.

        Raises:
            BadRequest: It is not a manifest of what the path names.
            ChangedMeanwhile: `metadata.resourceVersion` is given, and another one is stored.
            Invalid, NotFound, Refused: As the service says.
        """
        ctx = self._ctx(dry=dry)
        old = _find(target, ctx)
        new = _wanted(target, _document(target, body))
        permit(old, new)
        return self._store(target, new, ctx, who)

    def patch(self, target: Target, patch: Patch, permit: Permit, *, dry: bool, who: str = "") -> Resource:
        """Patch a resource as it is now.

        Raises:
            ChangedMeanwhile: The patch names a version, and another one is stored.
            BadRequest, Invalid, NotFound, Refused: As the patch or the service says.
        """
        ctx = self._ctx(dry=dry)
        for attempt in range(_ATTEMPTS):
            old = _find(target, ctx)
            after = patch(target.api.wire(old))
            check_size(after)
            stored_version, named = old.metadata.resource_version, _metadata(after).get("resourceVersion")
            if not named:
                after = {**after, "metadata": {**_metadata(after), "resourceVersion": stored_version}}
            new = _wanted(target, _document(target, after))
            permit(old, new)
            try:
                return self._store(target, new, ctx, who)
            except (ChangedMeanwhile, Conflict):
                if named not in {None, "", stored_version} or attempt == _ATTEMPTS - 1:
                    raise
        raise Conflict(f"{target.api.full_name} {target.name!r} changes all the time")

    def apply(self, target: Target, patch: Patch, permit: Permit, *, dry: bool, who: str = "") -> Resource:
        """Change a resource by a server-side apply, or create it.

        Raises:
            NotFound: It is not there, and none of its kind can be created.
            All that `patch` and `create` raise.
        """
        try:
            return self.patch(target, patch, permit, dry=dry, who=who)
        except NotFound:
            if _is_there(target, self._ctx(dry=dry)) or "create" not in target.api.verbs:
                raise
        return self.create(target, patch({}), permit, dry=dry, who=who)

    def delete(self, target: Target, options: Mapping[str, Any], *, dry: bool, who: str = "") -> Deletion:
        """Delete a resource.

        Args:
            target: Names it.
            options: The body's DeleteOptions.
            dry: Only look whether it would be.
            who: Asks for it.

        Raises:
            ChangedMeanwhile: The options name another uid or version than what is stored.
            NotFound, Refused: As the service says.
        """
        ctx = self._ctx(dry=dry)
        _check_preconditions(_find(target, ctx), options)
        key = make_key(target.name, target.namespace)
        resource: Resource
        match target.api:
            case api if api is VIRTUAL_MACHINES:
                resource = vms.delete_vm(ctx, key)
            case api if api is OPERATIONS:
                resource = operations.delete_operation(ctx, key)
            case api if api is CLASSES:
                resource = delete_class(ctx, target.name)
            case api if api is NAMESPACES:
                resource = namespaces.delete_namespace(ctx, target.name)
            case api if api is NODES:
                resource = nodes.remove_node(ctx, target.name)
            case api if api in upkeep.OF_HERD:
                resource = upkeep.delete(ctx, target.api, target.name, who)
            case _:
                raise MethodNotAllowed(f"{target.api.plural} can't be deleted")
        left = ctx.store.find(type(resource), resource.key)
        is_gone = not dry and (left is None or left.metadata.uid != resource.metadata.uid)
        return Deletion(resource if left is None or is_gone or dry else left, is_gone)

    def evict(self, pod: Pod, *, dry: bool) -> None:
        """Have a pod's VM leave its node.

        Returns:
            When it has left already.

        Raises:
            TooManyRequests: It is on its way, or what keeps it: ask again.
            Refused: It is not vmherd's.
        """
        if not pod.vm:
            domain = pod.metadata.annotations.get(DOMAIN_ANNOTATION, "")
            raise Refused(f"domain {domain!r} on node {pod.spec.node_name} is not vmherd's, and is not moved by it")
        done = evict(self._ctx(dry=dry), f"{pod.metadata.namespace}/{pod.vm}", pod.spec.node_name)
        is_refused = done.state is EvictionState.REFUSED
        if done.state is not EvictionState.GONE and (is_refused or not dry):
            raise TooManyRequests(done.message)

    def leases(self, choice: Choice) -> list[Entry]:
        """Read nodes' leases, which no copy has."""
        return read_leases(self._real, choice)

    def act(self, target: Target, body: Mapping[str, Any], who: str) -> dict[str, Any]:
        """Do what a path names besides: see `actions`."""
        return actions.act(Request(self._real, self._herd, target.name, body, who), target.resource)

    def _store(self, target: Target, wanted: Resource, ctx: Context, who: str) -> Resource:
        try:
            match wanted:
                case VirtualMachine():
                    return vms.update_vm(ctx, wanted)
                case VirtualMachineOperation():
                    return update_operation(ctx, wanted)
                case VirtualMachineClass():
                    return update_class(ctx, wanted)
                case Node():
                    return nodes.update_node(ctx, wanted)
                case Namespace():
                    return namespaces.update_namespace(ctx, wanted)
                case _ if target.api in upkeep.OF_HERD:
                    return upkeep.update(ctx, self._herd, wanted, who)
                case _:
                    raise MethodNotAllowed(f"{target.api.plural} can't be changed")
        except NotFound as error:
            if _is_there(target, ctx):
                raise
            raise not_found(target) from error


def _find(target: Target, ctx: Context) -> Resource:
    key = make_key(target.name, target.namespace)
    found = namespaces.find(ctx, key) if target.api is NAMESPACES else ctx.store.find(target.api.kind, key)
    if found is None:
        raise not_found(target)
    return found


def _is_there(target: Target, ctx: Context) -> bool:
    return ctx.store.find(target.api.kind, make_key(target.name, target.namespace)) is not None


def _wanted(target: Target, data: dict[str, Any]) -> Resource:
    """Read the whole manifest of something that is there."""
    if target.api is NODES:
        return _read_node(data)
    if target.api is NAMESPACES:
        return _read(Namespace, data)
    if target.api in upkeep.OF_HERD:
        return upkeep.read(target.api, data)
    return manifests.read_manifest(data, target.namespace)


def _document(target: Target, body: Any) -> dict[str, Any]:
    """Check that a manifest is of what the path names, and take out what is not the client's to say."""
    kind = target.api.kind
    if not isinstance(body, dict):
        raise BadRequest(f"the body is an object, not {shown(body)}")
    check_size(body)
    for field, wanted in (("apiVersion", kind.group_version), ("kind", kind.kind_name)):
        if body.get(field, wanted) != wanted:
            raise BadRequest(f"{field}: is {shown(body[field])}, the path is for {wanted}")
    meta = {key: value for key, value in _metadata(body).items() if key not in _SERVERS_OWN}
    if target.name and meta.setdefault("name", target.name) != target.name:
        raise BadRequest(f"metadata.name: is {shown(meta['name'])}, the path is for {target.name!r}")
    if target.namespace and (meta.get("namespace") or target.namespace) != target.namespace:
        raise BadRequest(f"metadata.namespace: is {shown(meta['namespace'])}, the path is for {target.namespace!r}")
    if meta.get("finalizers") and target.api not in {VIRTUAL_MACHINES, OPERATIONS}:
        why = f"a {kind.kind_name} takes none"
        raise Invalid(f"metadata.finalizers: {why}", (("metadata.finalizers", why),))
    head = {"apiVersion": kind.group_version, "kind": kind.kind_name}
    return {**{key: value for key, value in body.items() if key != "status"}, **head, "metadata": meta}


def _metadata(body: Mapping[str, Any]) -> dict[str, Any]:
    meta = body.get("metadata")
    if meta is None:
        return {}
    if not isinstance(meta, dict):
        raise BadRequest(f"metadata: is an object, not {shown(meta)}")
    return meta


def _read(model: type[Namespace], data: Mapping[str, Any]) -> Namespace:
    return parse(model, {key: value for key, value in data.items() if key != "spec"})


def _read_node(data: Mapping[str, Any]) -> Node:
    spec = parse(_NodeDocument, {"spec": data.get("spec") or {}}).spec
    return Node(metadata=parse(ObjectMeta, data["metadata"]), spec=spec)


class _NodeDocument(ObjectMeta):
    """For the paths of its errors: `spec.taints[0].key`."""

    spec: NodeSpec = NodeSpec()


def _exists(api: ApiResource, name: str) -> AlreadyExists:
    return AlreadyExists(f'{api.full_name} "{name}" already exists')


def _check_preconditions(found: Resource, options: Mapping[str, Any]) -> None:
    wanted = options.get("preconditions")
    if wanted is None:
        return
    if not isinstance(wanted, dict):
        raise BadRequest("preconditions: is an object")
    meta = found.metadata
    for field, present in (("uid", meta.uid), ("resourceVersion", meta.resource_version)):
        if wanted.get(field) not in {None, present}:
            raise ChangedMeanwhile(
                f"{found.kind_name} {found.name!r}: preconditions.{field} is {shown(wanted[field])}, it has {present!r}"
            )
