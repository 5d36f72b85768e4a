"""Manifests: read and checked by themselves, and created or applied.

`apply` creates what is not there and changes what is.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from orchestrator.errors import AlreadyExists, Invalid
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
    make_key,
    new_metadata,
    parse,
)
from orchestrator.resources.manifest import check_size, named
from orchestrator.resources.names import shown
from orchestrator.services.classes import create_class, update_class
from orchestrator.services.context import Context
from orchestrator.services.operations import create_operation, replace_spec
from orchestrator.services.vms import create_vm, update_vm

NO_TIME = datetime.fromtimestamp(0, UTC)

Creatable = VirtualMachine | VirtualMachineClass | VirtualMachineOperation

CREATABLE: dict[tuple[str, str], type[Creatable]] = {
    (kind.group_version, kind.kind_name): kind
    for kind in (VirtualMachine, VirtualMachineClass, VirtualMachineOperation)
}


class Applied(StrEnum):
    """What applying a manifest did."""

    CREATED = "created"
    CONFIGURED = "configured"
    UNCHANGED = "unchanged"


def create_resource(ctx: Context, wanted: Creatable) -> Creatable:
    """Create a resource that was read from a manifest.

    Raises:
        Invalid: As `create_vm`.
        NotFound: As `create_operation`.
        Refused: As `create_operation`.
        AlreadyExists: One of that kind and name is there already.
    """
    if isinstance(wanted, VirtualMachineOperation):
        return create_operation(ctx, wanted)
    if isinstance(wanted, VirtualMachineClass):
        return create_class(ctx, wanted)
    return create_vm(ctx, wanted)


def read_manifest(data: Any, namespace: str = "") -> Creatable:
    """Check a manifest by itself; nothing is stored, and nothing that is stored is looked at.

    Args:
        data: The manifest as parsed YAML or JSON.
        namespace: Used when the manifest names none; a different one is refused. A class has none.

    Raises:
        Invalid: Not a manifest, an unknown kind, or fields that are wrong; names each.
    """
    if not isinstance(data, dict):
        why = f"a manifest is a mapping with apiVersion and kind, not {type(data).__name__}"
        raise Invalid(why, (("document", why),))
    check_size(data)
    wanted = (named(data, "apiVersion"), named(data, "kind"))
    model = CREATABLE.get(wanted)
    if model is None:
        known = ", ".join(f"{kind} of {group}" for group, kind in sorted(CREATABLE))
        raise Invalid(
            f"kind: {wanted[1][:80] or '(none)'} of {wanted[0][:80] or '(no apiVersion)'} can't be created; "
            f"known: {known}",
            (("kind", "unknown"),),
        )
    data = {key: value for key, value in data.items() if key != "status"}  # status is the server's to write
    meta = data.get("metadata")
    if not model.namespaced and isinstance(meta, dict) and meta.get("namespace"):
        why = f"a {model.kind_name} is in no namespace"
        raise Invalid(f"metadata.namespace: {why}", (("metadata.namespace", why),))
    if namespace and model.namespaced and isinstance(meta, dict):
        if (meta.get("namespace") or namespace) != namespace:
            why = f"is {shown(meta['namespace'])}, the request is for {namespace!r}"
            raise Invalid(f"metadata.namespace: {why}", (("metadata.namespace", why),))
        data = {**data, "metadata": {**meta, "namespace": namespace}}
    resource = parse(model, data)
    new_metadata(resource.metadata, namespaced=model.namespaced, now=NO_TIME)  # for its checks of names
    return resource


def apply_resource(ctx: Context, wanted: Creatable) -> tuple[Creatable, Applied]:
    """Create what is not there, and change what is.

    Labels and annotations that the manifest does not name stay.

    Raises:
        Invalid: A field is wrong, or can't be changed.
        Refused: As `create_resource` and `update_vm`.
        NotFound: As `create_resource`.
    """
    if not wanted.name:
        return create_resource(ctx, wanted), Applied.CREATED
    found = _find(ctx, wanted)
    if found is None:
        try:
            return create_resource(ctx, wanted), Applied.CREATED
        except AlreadyExists:  # someone else was faster
            found = _find(ctx, wanted)
            if found is None:
                raise
    new: Creatable = found
    if isinstance(wanted, VirtualMachine):
        new = update_vm(ctx, wanted, keeps_metadata=True)
    elif isinstance(wanted, VirtualMachineClass):
        new = update_class(ctx, wanted, keeps_metadata=True)
    else:
        replace_spec(ctx, wanted.manifest())
    is_same = new.metadata.resource_version == found.metadata.resource_version
    return new, Applied.UNCHANGED if is_same else Applied.CONFIGURED


def _find(ctx: Context, wanted: Creatable) -> Creatable | None:
    namespace = (wanted.metadata.namespace or DEFAULT_NAMESPACE) if wanted.namespaced else ""
    return ctx.store.find(type(wanted), make_key(wanted.name, namespace))
