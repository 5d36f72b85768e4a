"""What can be done with a resource besides reading and writing it: `POST .../<plural>/<name>/<action>`.

Each action is one call of a service. Its body and its answer are plain JSON; plans are what the core made, as it is.
What is about several nodes, or about all, has `-` for a name, which no node can have.

Nothing here can be tried out by `dryRun`: it is refused. Plans say what would be.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.alias_generators import to_camel

from orchestrator.errors import MethodNotAllowed
from orchestrator.planner.capacity import Failure
from orchestrator.planner.drain import DrainPlan
from orchestrator.planner.rebalance import Plan
from orchestrator.resources import Resource, parse
from orchestrator.resources.drain import DrainSpec
from orchestrator.resources.maintenance import LONGEST_OUTPUT
from orchestrator.resources.meta import Model
from orchestrator.resources.selectors import parse_selector
from orchestrator.services import capacity, drain_plans, drains, fencing, maintenances, nodes, rebalancing
from orchestrator.services.context import Context
from orchestrator.services.fencing_spec import disarmed
from orchestrator.services.herd import Herd
from orchestrator.services.overview import Overview, overview

ALL: Final = "-"
"""In place of a name: several, or all."""

M = TypeVar("M", bound="_Body")


class _Body(Model):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)


Text = Annotated[str, Field(max_length=1_000)]


class Names(_Body):
    """Of nodes; none: all."""

    nodes: tuple[Text, ...] = ()


class DrainWanted(_Body):
    """A drain that is only thought of, of the nodes that are named."""

    nodes: tuple[Text, ...] = ()
    spec: DrainSpec = DrainSpec()


class Why(_Body):
    """A word for people."""

    why: Text = ""


class Home(_Body):
    """Whether what was moved off comes home; None leaves that to the settings."""

    bring_back: bool | None = None


class Hook(_Body):
    """A hook, by who runs it."""

    holder: Annotated[str, Field(min_length=1, max_length=1_000)]
    node: Text = ""
    exit_code: int = Field(0, ge=-(2**31), le=2**31)
    output: Annotated[str, Field(max_length=8 * LONGEST_OUTPUT)] = ""


class _Nothing(_Body):
    pass


@dataclass(frozen=True, slots=True)
class Request:
    """One action that is asked for.

    Attributes:
        herd: Gives the herd as it is now.
        name: What it is about.
        body: As it came.
        who: Asks for it.
    """

    ctx: Context
    herd: Callable[[], Herd]
    name: str
    body: Mapping[str, Any]
    who: str

    def read(self, model: type[M]) -> M:
        """Read the body.

        Raises:
            Invalid: Names each field that is wrong.
        """
        return parse(model, self.body)

    @property
    def node(self) -> str:
        """The node that is named; empty: all."""
        return "" if self.name == ALL else self.name


def act(request: Request, what: str) -> dict[str, Any]:
    """Do an action.

    Args:
        request: Who asks, and for what.
        what: `nodedrains/plan`.

    Raises:
        MethodNotAllowed: There is no such action.
        Invalid, NotFound, Refused: As the service says.
    """
    action = ACTIONS.get(what)
    if action is None:
        raise MethodNotAllowed(f"{what}: there is no such action")
    return action(request)


def stored(resource: Resource) -> dict[str, Any]:
    """Give a resource as our own clients read it."""
    document = resource.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {**document, "createdVersion": resource.created_version}


def _as_json(kind: Any, value: Any) -> dict[str, Any]:
    written: dict[str, Any] = TypeAdapter(kind).dump_python(value, mode="json")
    return written


# --- nodes ------------------------------------------------------------------------------------------------------------


def _uncordon(request: Request) -> dict[str, Any]:
    home = request.read(Home)
    changed = nodes.set_unschedulable(request.ctx, request.name, unschedulable=False, bring_back=home.bring_back)
    return {"changed": changed}


def _failures(request: Request) -> dict[str, Any]:
    named = list(request.read(Names).nodes) or ([request.node] if request.node else [])
    return {"failures": _as_json(dict[str, Failure], capacity.failures_of(request.herd(), named))}


def _overview(request: Request) -> dict[str, Any]:
    request.read(_Nothing)
    return {"overview": _as_json(Overview, overview(request.herd()))}


# --- drains -----------------------------------------------------------------------------------------------------------


def _plan_drain(request: Request) -> dict[str, Any]:
    wanted = request.read(DrainWanted)
    names = wanted.nodes or ((request.node,) if request.node else ())
    parse_selector(wanted.spec.selector, "spec.selector")
    return {"plan": _as_json(DrainPlan, drain_plans.plan(request.ctx, names, wanted.spec, request.herd()))}


def _cancel_drain(request: Request) -> dict[str, Any]:
    request.read(Why)
    return stored(drains.cancel(request.ctx, request.name, f"stopped by {request.who}"))


# --- maintenances -----------------------------------------------------------------------------------------------------


def _pause(request: Request) -> dict[str, Any]:
    request.read(Why)
    return stored(maintenances.pause(request.ctx, request.name, f"paused by {request.who}"))


def _resume(request: Request) -> dict[str, Any]:
    request.read(_Nothing)
    return stored(maintenances.resume(request.ctx, request.name))


def _stop(request: Request) -> dict[str, Any]:
    request.read(Why)
    return stored(maintenances.stop(request.ctx, request.name, f"stopped by {request.who}"))


def _claim_hook(request: Request) -> dict[str, Any]:
    node = maintenances.claim_hook(request.ctx, request.name, request.read(Hook).holder)
    return {"node": node or ""}


def _renew_hook(request: Request) -> dict[str, Any]:
    hook = request.read(Hook)
    return {"counts": maintenances.renew_hook(request.ctx, request.name, hook.node, hook.holder)}


def _end_hook(request: Request) -> dict[str, Any]:
    hook = request.read(Hook)
    return {
        "counts": maintenances.end_hook(request.ctx, request.name, hook.node, hook.holder, hook.exit_code, hook.output)
    }


# --- the policy of rebalancing ----------------------------------------------------------------------------------------


def _plan_moves(request: Request) -> dict[str, Any]:
    request.read(_Nothing)
    obstacle, plan = rebalancing.look(request.ctx, request.herd())
    return {"obstacle": obstacle, "plan": _as_json(Plan, plan)}


def _rebalance(request: Request) -> dict[str, Any]:
    request.read(_Nothing)
    obstacle, plan = rebalancing.look(request.ctx, request.herd())
    made = [] if obstacle else rebalancing.carry_out(request.ctx, plan)
    return {"obstacle": obstacle, "plan": _as_json(Plan, plan), "operations": [stored(one) for one in made]}


# --- fencing ----------------------------------------------------------------------------------------------------------


def _confirm(request: Request) -> dict[str, Any]:
    request.read(_Nothing)
    fencing.confirm(request.ctx, request.name, request.who)
    return {"confirmed": request.name}


def _test_power(request: Request) -> dict[str, Any]:
    request.read(_Nothing)
    return {"power": fencing.test_power(request.ctx, fencing.default_tools(), request.name)}


def _disarm(request: Request) -> dict[str, Any]:
    why = request.read(Why).why
    return {"deferred": fencing.disarm(request.ctx, request.node, why or f"by {request.who}")}


def _arm(request: Request) -> dict[str, Any]:
    request.read(_Nothing)
    return {"changed": fencing.arm(request.ctx, request.node)}


def _disarmed(request: Request) -> dict[str, Any]:
    request.read(_Nothing)
    return {"disarmed": disarmed(request.ctx)}


PLANS: Final = frozenset(
    {"nodes/failures", "nodes/overview", "nodedrains/plan", "rebalancepolicies/plan", "nodefencings/disarmed"}
)
"""They only read."""
ACTIONS: Final[Mapping[str, Callable[[Request], dict[str, Any]]]] = {
    "nodes/uncordon": _uncordon,
    "nodes/failures": _failures,
    "nodes/overview": _overview,
    "nodedrains/plan": _plan_drain,
    "nodedrains/cancel": _cancel_drain,
    "maintenances/pause": _pause,
    "maintenances/resume": _resume,
    "maintenances/stop": _stop,
    "maintenances/claimhook": _claim_hook,
    "maintenances/renewhook": _renew_hook,
    "maintenances/endhook": _end_hook,
    "rebalancepolicies/plan": _plan_moves,
    "rebalancepolicies/run": _rebalance,
    "nodefencings/confirm": _confirm,
    "nodefencings/test": _test_power,
    "nodefencings/disarm": _disarm,
    "nodefencings/arm": _arm,
    "nodefencings/disarmed": _disarmed,
}
