"""`upkeep.Upkeep` on Redis itself: the services, called here."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from orchestrator.planner.capacity import Failure
from orchestrator.planner.drain import DrainPlan
from orchestrator.planner.rebalance import Plan
from orchestrator.resources import Maintenance, NodeDrain, NodeFencing, RebalancePolicy, VirtualMachineOperation
from orchestrator.resources.drain import DrainSpec
from orchestrator.resources.fencing import NodeFencingSpec
from orchestrator.resources.maintenance import MaintenanceSpec
from orchestrator.services import capacity, drain_plans, drains, fencing, fencing_spec, maintenances, rebalancing
from orchestrator.services.context import Context
from orchestrator.services.herd import Herd
from orchestrator.services.overview import Overview, overview


class LocalUpkeep:
    """Half of `local.LocalClient`.

    Args:
        context: Of the services.
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    @contextmanager
    def overviews(self, on_change: Callable[[], object]) -> Iterator[Callable[[], Overview]]:
        """Give a function that says how the herd is now, from a copy that follows it."""
        with self._herd(on_change) as herd:

            def look() -> Overview:
                herd.follower.sync()  # raises where Redis is away: the copy alone would go on as if nothing were
                return overview(herd)

            yield look

    def plan_drain(self, nodes: Iterable[str], spec: DrainSpec) -> DrainPlan:
        """Plan how nodes would be emptied together."""
        return drain_plans.plan(self.context, nodes, spec)

    def begin_drains(self, nodes: Iterable[str], spec: DrainSpec) -> list[NodeDrain]:
        """Have nodes emptied."""
        return drain_plans.begin_checked(self.context, nodes, spec)

    def cancel_drain(self, node: str, why: str) -> NodeDrain:
        """End a drain."""
        return drains.cancel(self.context, node, why)

    def begin_maintenance(self, name: str, spec: MaintenanceSpec) -> Maintenance:
        """Begin a maintenance, or give the one of that name."""
        return maintenances.begin(self.context, name, spec)

    def pause_maintenance(self, name: str, why: str) -> Maintenance:
        """Let no node and no hook be begun."""
        return maintenances.pause(self.context, name, why)

    def resume_maintenance(self, name: str) -> Maintenance:
        """Let a paused one go on."""
        return maintenances.resume(self.context, name)

    def stop_maintenance(self, name: str, why: str) -> Maintenance:
        """End one."""
        return maintenances.stop(self.context, name, why)

    def claim_hook(self, name: str, holder: str) -> str | None:
        """Claim the next hook."""
        return maintenances.claim_hook(self.context, name, holder)

    def renew_hook(self, name: str, node: str, holder: str) -> bool:
        """Say that a hook is being run still."""
        return maintenances.renew_hook(self.context, name, node, holder)

    def end_hook(self, name: str, node: str, holder: str, exit_code: int, output: str) -> bool:
        """Record how a hook ended."""
        return maintenances.end_hook(self.context, name, node, holder, exit_code, output)

    def policy(self) -> RebalancePolicy:
        """Give the policy."""
        return rebalancing.load_policy(self.context)

    def change_policy(self, changes: Mapping[str, object]) -> RebalancePolicy:
        """Change fields of the policy."""
        return rebalancing.change_policy(self.context, changes)

    def plan_moves(self) -> tuple[str, Plan]:
        """Say what would be moved now."""
        with self._herd() as herd:
            return rebalancing.look(self.context, herd)

    def rebalance(self) -> tuple[str, Plan, list[VirtualMachineOperation]]:
        """Do what `plan_moves` says."""
        why, plan = self.plan_moves()
        return why, plan, rebalancing.carry_out(self.context, plan)

    def failures(self, nodes: Iterable[str]) -> dict[str, Failure]:
        """Say what would come of the loss of nodes."""
        with self._herd() as herd:
            return capacity.failures_of(herd, list(nodes))

    def set_fencing(self, name: str, change: Callable[[NodeFencingSpec], NodeFencingSpec]) -> NodeFencing:
        """Change what is said of a node's fencing."""
        return fencing.set_fencing(self.context, name, change)

    def confirm_fencing(self, name: str, who: str) -> None:
        """Say that a lost node runs nothing any more."""
        fencing.confirm(self.context, name, who)

    def test_power(self, name: str) -> str:
        """Ask a node's BMC for the power state."""
        return fencing.test_power(self.context, fencing.default_tools(), name)

    def disarm(self, node: str, why: str) -> bool:
        """Let a node, or the herd, not be fenced."""
        return fencing.disarm(self.context, node, why)

    def arm(self, node: str) -> bool:
        """Let a node, or the herd, be fenced again."""
        return fencing.arm(self.context, node)

    def disarmed(self) -> dict[str, str]:
        """Say what is not fenced now."""
        return fencing_spec.disarmed(self.context)

    @contextmanager
    def _herd(self, on_change: Callable[[], object] | None = None) -> Iterator[Herd]:
        herd = Herd(self.context.store, on_change).start()
        try:
            yield herd
        finally:
            herd.stop()
