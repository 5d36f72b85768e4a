"""The part of the seam that keeps a herd in order: drains, maintenances, rebalancing, fencing.

Plans are made where the herd's copy is: by the API's server, or here on Redis. Errors are those of `port`. Who asks is
said by the caller on Redis; through the API it is who has the token.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from orchestrator.planner.capacity import Failure
from orchestrator.planner.drain import DrainPlan
from orchestrator.planner.rebalance import Plan
from orchestrator.resources import Maintenance, NodeDrain, NodeFencing, RebalancePolicy, VirtualMachineOperation
from orchestrator.resources.drain import DrainSpec
from orchestrator.resources.fencing import NodeFencingSpec
from orchestrator.resources.maintenance import MaintenanceSpec
from orchestrator.services.overview import Overview


class Upkeep(Protocol):
    """A herd, as far as it is kept in order by people."""

    def overviews(self, on_change: Callable[[], object]) -> AbstractContextManager[Callable[[], Overview]]:
        """Give, while it is open, a function that says how the herd is now.

        Args:
            on_change: Called, from a thread, when there is news. A herd that is not followed from here never calls it:
                whoever shows it looks again after a second.

        Raises:
            StoreUnavailable: On opening, and whenever the function is called: the herd is away.
        """
        ...

    # --- drains -------------------------------------------------------------------------------------------------------

    def plan_drain(self, nodes: Iterable[str], spec: DrainSpec) -> DrainPlan:
        """Plan how nodes would be emptied together.

        Raises:
            NotFound: No such node.
            Invalid: The selector is none.
        """
        ...

    def begin_drains(self, nodes: Iterable[str], spec: DrainSpec) -> list[NodeDrain]:
        """Have nodes emptied; a drain that is open already goes on with what is asked now.

        Raises:
            NotFound: No such node; nothing was begun.
            Refused: Some VMs have no place, and the spec is not `partial`; nothing was begun.
            Invalid: The selector is none.
        """
        ...

    def cancel_drain(self, node: str, why: str) -> NodeDrain:
        """End a drain: what has not begun is dropped, what has goes on, the node stays cordoned.

        Raises:
            NotFound: The node was never drained.
        """
        ...

    # --- maintenances -------------------------------------------------------------------------------------------------

    def begin_maintenance(self, name: str, spec: MaintenanceSpec) -> Maintenance:
        """Begin a maintenance, or give the one of that name, which goes on.

        Raises:
            NotFound: A node is not in the herd.
            Refused: One of that name is about something else, or a node is in another one that is open.
        """
        ...

    def pause_maintenance(self, name: str, why: str) -> Maintenance:
        """Let no node and no hook be begun. Raises `NotFound`."""
        ...

    def resume_maintenance(self, name: str) -> Maintenance:
        """Let a paused one go on. Raises `NotFound`, and `Refused` when it is not paused."""
        ...

    def stop_maintenance(self, name: str, why: str) -> Maintenance:
        """End one. Raises `NotFound`."""
        ...

    def claim_hook(self, name: str, holder: str) -> str | None:
        """Claim the next hook of a maintenance; gives the node's name, or None when none is to be run now."""
        ...

    def renew_hook(self, name: str, node: str, holder: str) -> bool:
        """Say that a hook is being run still; tells whether it is still this holder's."""
        ...

    def end_hook(self, name: str, node: str, holder: str, exit_code: int, output: str) -> bool:
        """Record how a hook ended; False where its claim had run out."""
        ...

    # --- rebalancing --------------------------------------------------------------------------------------------------

    def policy(self) -> RebalancePolicy:
        """Give the policy; the default one where none is stored."""
        ...

    def change_policy(self, changes: Mapping[str, object]) -> RebalancePolicy:
        """Change fields of the policy, by their paths in the spec: `thresholds.cpu`.

        Raises:
            Invalid: Names a field that is not there, or a value that it can't have.
        """
        ...

    def plan_moves(self) -> tuple[str, Plan]:
        """Say what would be moved now; with a reason why nothing may be, the plan is empty."""
        ...

    def rebalance(self) -> tuple[str, Plan, list[VirtualMachineOperation]]:
        """Do what `plan_moves` says; gives the operations that were made besides."""
        ...

    def failures(self, nodes: Iterable[str]) -> dict[str, Failure]:
        """Say what would come of the loss of each of some nodes; of none named: of each node, rack and zone.

        Raises:
            NotFound: No such node.
        """
        ...

    # --- fencing ------------------------------------------------------------------------------------------------------

    def set_fencing(self, name: str, change: Callable[[NodeFencingSpec], NodeFencingSpec]) -> NodeFencing:
        """Change what is said of a node's fencing; it may not have joined yet."""
        ...

    def confirm_fencing(self, name: str, who: str) -> None:
        """Say that a lost node runs nothing any more.

        Raises:
            NotFound: No such node.
            Refused: It lives, or there is evidence already, or the herd is in recovery.
        """
        ...

    def test_power(self, name: str) -> str:
        """Ask a node's BMC for the power state, from this machine, or from the API's.

        Raises:
            NotFound: It has no BMC on record.
            Refused: It can't be read.
        """
        ...

    def disarm(self, node: str, why: str) -> bool:
        """Let a node, or (empty) the herd, not be fenced; tells whether a fencing under way comes to its end first."""
        ...

    def arm(self, node: str) -> bool:
        """Let a node, or (empty) the herd, be fenced again; tells whether anything changed."""
        ...

    def disarmed(self) -> dict[str, str]:
        """Say what is not fenced now, and why: nodes by name, `keys.DISARMED_ALL` for the herd."""
        ...
