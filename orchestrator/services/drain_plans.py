"""Plans of drains, checked before the first move: what can't be carried out is refused, with what is missing."""

from collections.abc import Iterable

from orchestrator.errors import NotFound, Refused
from orchestrator.planner.drain import DrainPlan, measured_rate_mib_s, plan_drain
from orchestrator.planner.draining import is_on, is_to_leave
from orchestrator.resources import Node, NodeDrain, ObjectMeta, VirtualMachine, VirtualMachineOperation
from orchestrator.resources.drain import DrainPhase, DrainSpec
from orchestrator.services import drains
from orchestrator.services.context import Context
from orchestrator.services.herd import Herd


def plan(ctx: Context, nodes: Iterable[str], spec: DrainSpec, herd: Herd | None = None) -> DrainPlan:
    """Plan how nodes would be emptied together, besides the drains that are open.

    Args:
        ctx: To work with.
        nodes: Their names.
        spec: What would be asked for each.
        herd: This process's copy; None: one is loaded for this.

    Raises:
        NotFound: No such node.
    """
    if herd is not None:
        return _plan(herd, list(nodes), spec)
    herd = Herd(ctx.store).start()
    try:
        return _plan(herd, list(nodes), spec)
    finally:
        herd.stop()


def begin_checked(ctx: Context, nodes: Iterable[str], spec: DrainSpec, herd: Herd | None = None) -> list[NodeDrain]:
    """Have nodes emptied, if the rest of the herd can take what runs there.

    Args:
        ctx: To work with.
        nodes: Their names.
        spec: What is asked for each; if it is `partial`, what can be done is done.
        herd: As for `plan`.

    Raises:
        NotFound: No such node; nothing was begun.
        Refused: Some VMs have no place; nothing was begun.
        Invalid: The selector is none.
    """
    names = list(dict.fromkeys(nodes))
    check(names, plan(ctx, names, spec, herd), spec)
    return [drains.begin(ctx, name, spec) for name in names]


def check(nodes: Iterable[str], planned: DrainPlan, spec: DrainSpec) -> None:
    """Check that a plan can be carried out.

    Raises:
        Refused: Some VMs have no place, and that is not taken.
    """
    problem = planned.problem()
    if problem and not spec.partial:
        raise Refused(f"{', '.join(nodes)} can't be emptied: {problem}. --partial moves the others all the same")


def _plan(herd: Herd, nodes: list[str], spec: DrainSpec) -> DrainPlan:
    snapshot = herd.snapshot()
    with herd.follower.lock:
        for name in nodes:
            if herd.follower.get(Node, name) is None:
                raise NotFound(f"Node {name!r} not found")
        open_drains = [drain for drain in herd.follower.all(NodeDrain) if drain.status.phase is DrainPhase.DRAINING]
        wanted = [NodeDrain(metadata=ObjectMeta(name=name), spec=spec) for name in nodes]
        vms = herd.follower.all(VirtualMachine)
        rate = measured_rate_mib_s(herd.follower.all(VirtualMachineOperation))
    away = frozenset((*nodes, *(drain.name for drain in open_drains)))
    cap = herd.store.config.bandwidth_mib_s
    return plan_drain(
        snapshot,
        _leaving(vms, wanted),
        away=away,
        bandwidth_mib_s=min(rate or cap, cap),
        besides=_leaving(vms, open_drains),
    )


def _leaving(vms: Iterable[VirtualMachine], of: Iterable[NodeDrain]) -> list[VirtualMachine]:
    by_node = {drain.name: drain for drain in of}
    return [
        vm
        for vm in vms
        if (drain := by_node.get(vm.status.node_name)) is not None and is_on(vm, drain.name) and is_to_leave(drain, vm)
    ]
