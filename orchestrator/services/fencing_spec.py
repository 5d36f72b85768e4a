"""What people say of a node's fencing, as a document that is written as a whole."""

from typing import cast

from orchestrator.errors import AlreadyExists
from orchestrator.resources import NodeFencing
from orchestrator.resources.fencing import NodeFencingSpec
from orchestrator.services import fencing
from orchestrator.services.classes import ChangedMeanwhile, check_version
from orchestrator.services.context import Context
from orchestrator.services.labelling import with_metadata
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors


def create_fencing(ctx: Context, wanted: NodeFencing) -> NodeFencing:
    """Say how a node may be fenced; it may not have joined yet.

    Raises:
        AlreadyExists: Something is on record of its fencing.
    """
    if ctx.store.find(NodeFencing, wanted.name) is not None:
        raise AlreadyExists(f"NodeFencing {wanted.name!r} already exists")
    return _put(ctx, wanted, NodeFencingSpec())


def update_fencing(ctx: Context, wanted: NodeFencing) -> NodeFencing:
    """Replace what is said of a node's fencing, and its labels and annotations.

    Raises:
        NotFound: Nothing is on record of its fencing.
        ChangedMeanwhile: `metadata.resourceVersion` is given, and another one is stored.
    """
    old = ctx.store.get(NodeFencing, wanted.name)
    check_version(old, wanted)
    return _put(ctx, wanted, old.spec)


def _put(ctx: Context, wanted: NodeFencing, before: NodeFencingSpec) -> NodeFencing:
    def change(spec: NodeFencingSpec) -> NodeFencingSpec:
        if spec != before:
            raise ChangedMeanwhile(f"NodeFencing {wanted.name!r} changed since it was read: read it again")
        return wanted.spec

    stored = fencing.set_fencing(ctx, wanted.name, change)
    return with_metadata(ctx, stored, wanted.metadata)


def disarmed(ctx: Context) -> dict[str, str]:
    """Say what may not be fenced now, and why: nodes by name, `keys.DISARMED_ALL` for the herd."""
    with redis_errors(ctx.store.redis):
        return cast("dict[str, str]", ctx.store.redis.hgetall(keys.DISARMED))
