"""Writes of what keeps the herd in order: drains, maintenances, the policy of rebalancing, how nodes are fenced.

Each is one call of the service that `vmherd`'s own commands use. Who asks for something is who has the token, whatever
the manifest says. Status is not the client's to write.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from orchestrator.api.catalog import DRAINS, FENCINGS, MAINTENANCES, POLICIES
from orchestrator.api.entries import ApiResource
from orchestrator.errors import AlreadyExists, Invalid, MethodNotAllowed, Refused
from orchestrator.resources import Maintenance, NodeDrain, NodeFencing, RebalancePolicy, Resource, new_metadata, parse
from orchestrator.resources.drain import DrainCause, DrainPhase
from orchestrator.resources.shown_maintenance import ShownMaintenance, asked_of
from orchestrator.services import drain_plans, drains, maintenances, rebalancing
from orchestrator.services.classes import check_version
from orchestrator.services.context import Context
from orchestrator.services.fencing_spec import create_fencing, update_fencing
from orchestrator.services.herd import Herd
from orchestrator.services.labelling import with_metadata
from orchestrator.services.manifests import NO_TIME

OF_HERD: Final = (DRAINS, MAINTENANCES, POLICIES, FENCINGS)


def read(api: ApiResource, data: Mapping[str, Any]) -> Resource:
    """Read a manifest.

    Raises:
        Invalid: Names each field that is wrong.
    """
    wanted = parse(api.schema or api.kind, data)
    new_metadata(wanted.metadata, namespaced=False, now=NO_TIME)  # for its checks of names
    return wanted


def create(ctx: Context, herd: Callable[[], Herd], wanted: Resource, who: str) -> Resource:
    """Create one; a drain that is there already goes on with what is asked now.

    Args:
        ctx: To work with.
        herd: Gives the herd as it is now.
        wanted: As `read` gave it.
        who: Asks for it.

    Raises:
        AlreadyExists, Invalid, NotFound, Refused: As the service says.
    """
    match wanted:
        case NodeDrain():
            if wanted.spec.cause is not DrainCause.PERSON:
                why = f"is the control plane's to say, but for {DrainCause.PERSON.value}"
                raise Invalid(f"spec.cause: {why}", (("spec.cause", why),))
            spec = wanted.spec.with_(requested_by=who)
            begun = drain_plans.begin_checked(ctx, [wanted.name], spec, herd())[0]
            return with_metadata(ctx, begun, wanted.metadata)
        case ShownMaintenance():
            return maintenances.create(ctx, wanted.metadata, asked_of(wanted).with_(requested_by=who))
        case RebalancePolicy():
            if ctx.store.find(RebalancePolicy, wanted.name) is not None:
                raise AlreadyExists(f"RebalancePolicy {wanted.name!r} already exists")
            return rebalancing.replace_policy(ctx, wanted)
        case NodeFencing():
            return create_fencing(ctx, wanted)
        case _:
            raise MethodNotAllowed(f"{wanted.plural} can't be created")


def update(ctx: Context, herd: Callable[[], Herd], wanted: Resource, who: str) -> Resource:
    """Replace one; raises as `create`. What is asked of a drain can be changed while it goes on."""
    match wanted:
        case NodeDrain():
            old = ctx.store.get(NodeDrain, wanted.name)
            check_version(old, wanted)
            spec = wanted.spec.with_(requested_by=old.spec.requested_by)
            if spec != old.spec and old.status.phase is not DrainPhase.DRAINING:
                raise Refused(f"NodeDrain {old.name!r} is {old.status.phase}: create it anew")
            changed = drain_plans.begin_checked(ctx, [old.name], spec, herd())[0] if spec != old.spec else old
            return with_metadata(ctx, changed, wanted.metadata)
        case ShownMaintenance():
            stored = Maintenance(metadata=wanted.metadata, spec=asked_of(wanted))
            return maintenances.update(ctx, stored, paused=wanted.spec.paused, who=who)
        case RebalancePolicy():
            return rebalancing.replace_policy(ctx, wanted)
        case NodeFencing():
            return update_fencing(ctx, wanted)
        case _:
            raise MethodNotAllowed(f"{wanted.plural} can't be changed")


def delete(ctx: Context, api: ApiResource, name: str, who: str) -> Resource:
    """End a drain or a maintenance, and forget it once it has ended."""
    ends = cast("Callable[[Context, str, str], Resource]", drains.remove if api is DRAINS else maintenances.remove)
    return ends(ctx, name, f"deleted by {who}")
