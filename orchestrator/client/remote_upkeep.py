"""`upkeep.Upkeep` by the API: its actions, and the resources that they are about."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar

from pydantic import TypeAdapter

from orchestrator.client.documents import body_of, deciding, decode, path_of
from orchestrator.client.session import ApiSession
from orchestrator.errors import AlreadyExists, Conflict
from orchestrator.planner.capacity import Failure
from orchestrator.planner.drain import DrainPlan
from orchestrator.planner.rebalance import Plan
from orchestrator.resources import (
    Maintenance,
    Node,
    NodeDrain,
    NodeFencing,
    ObjectMeta,
    RebalancePolicy,
    Resource,
    VirtualMachineOperation,
)
from orchestrator.resources.drain import DrainSpec
from orchestrator.resources.fencing import NodeFencingSpec
from orchestrator.resources.maintenance import MaintenanceSpec
from orchestrator.resources.rebalancing import POLICY_NAME
from orchestrator.services.drain_plans import check
from orchestrator.services.maintenances import check_same
from orchestrator.services.overview import Overview
from orchestrator.services.rebalancing import changed_spec

ALL: Final = "-"
_PATIENT_S: Final = 120.0
"""For answers that take a plan of a large herd, or a BMC."""

R = TypeVar("R", bound=Resource)


class _Reads(Protocol):
    """What the other half of `remote.RemoteClient` has."""

    session: ApiSession

    def find(self, kind: type[R], key: str) -> R | None: ...
    def get(self, kind: type[R], key: str) -> R: ...


class RemoteUpkeep:
    """Half of `remote.RemoteClient`.

    Args:
        session: With the server.
        reads: The other half.
    """

    def __init__(self, session: ApiSession, reads: _Reads) -> None:
        self._session = session
        self._reads = reads

    @contextmanager
    def overviews(self, on_change: Callable[[], object]) -> Iterator[Callable[[], Overview]]:
        """Give a function that asks the server, which has the herd in memory, how it is now."""
        del on_change  # a watch would send each VM, of which one figure is shown
        yield lambda: _read(Overview, self._ask(Node, ALL, "overview")["overview"])

    def plan_drain(self, nodes: Iterable[str], spec: DrainSpec) -> DrainPlan:
        """Plan how nodes would be emptied together."""
        wanted = {"nodes": list(nodes), "spec": spec.model_dump(mode="json", by_alias=True)}
        return _read(DrainPlan, self._ask(NodeDrain, ALL, "plan", wanted)["plan"])

    def begin_drains(self, nodes: Iterable[str], spec: DrainSpec) -> list[NodeDrain]:
        """Have nodes emptied: they are checked together, and then begun one after another."""
        names = list(dict.fromkeys(nodes))
        check(names, self.plan_drain(names, spec), spec)
        begun = []
        for name in names:
            wanted = NodeDrain(metadata=ObjectMeta(name=name), spec=spec.with_(partial=True))
            begun.append(decode(NodeDrain, self._session.write("POST", path_of(NodeDrain), body_of(wanted))))
        return begun

    def cancel_drain(self, node: str, why: str) -> NodeDrain:
        """End a drain."""
        return decode(NodeDrain, self._act(NodeDrain, node, "cancel", {"why": why}))

    def begin_maintenance(self, name: str, spec: MaintenanceSpec) -> Maintenance:
        """Begin a maintenance, or give the one of that name."""
        wanted = Maintenance(metadata=ObjectMeta(name=name), spec=spec)
        try:
            return decode(Maintenance, self._session.write("POST", path_of(Maintenance), body_of(wanted)))
        except AlreadyExists:
            return check_same(self._reads.get(Maintenance, name), spec)

    def pause_maintenance(self, name: str, why: str) -> Maintenance:
        """Let no node and no hook be begun."""
        return decode(Maintenance, self._act(Maintenance, name, "pause", {"why": why}))

    def resume_maintenance(self, name: str) -> Maintenance:
        """Let a paused one go on."""
        return decode(Maintenance, self._act(Maintenance, name, "resume"))

    def stop_maintenance(self, name: str, why: str) -> Maintenance:
        """End one."""
        return decode(Maintenance, self._act(Maintenance, name, "stop", {"why": why}))

    def claim_hook(self, name: str, holder: str) -> str | None:
        """Claim the next hook."""
        return self._act(Maintenance, name, "claimhook", {"holder": holder})["node"] or None

    def renew_hook(self, name: str, node: str, holder: str) -> bool:
        """Say that a hook is being run still."""
        return bool(self._act(Maintenance, name, "renewhook", {"holder": holder, "node": node})["counts"])

    def end_hook(self, name: str, node: str, holder: str, exit_code: int, output: str) -> bool:
        """Record how a hook ended."""
        ended = {"holder": holder, "node": node, "exitCode": exit_code, "output": output}
        return bool(self._act(Maintenance, name, "endhook", ended)["counts"])

    def policy(self) -> RebalancePolicy:
        """Give the policy."""
        stored = self._reads.find(RebalancePolicy, POLICY_NAME)
        return stored or RebalancePolicy(metadata=ObjectMeta(name=POLICY_NAME))

    def change_policy(self, changes: Mapping[str, object]) -> RebalancePolicy:
        """Change fields of the policy."""

        def decide() -> RebalancePolicy:
            old = self.policy()
            return self._put(old, old.with_(spec=changed_spec(old.spec, changes)))

        return deciding(decide)

    def plan_moves(self) -> tuple[str, Plan]:
        """Say what would be moved now."""
        answer = self._ask(RebalancePolicy, POLICY_NAME, "plan")
        return answer["obstacle"], _read(Plan, answer["plan"])

    def rebalance(self) -> tuple[str, Plan, list[VirtualMachineOperation]]:
        """Do what `plan_moves` says."""
        answer = self._act(RebalancePolicy, POLICY_NAME, "run")
        made = [decode(VirtualMachineOperation, one) for one in answer["operations"]]
        return answer["obstacle"], _read(Plan, answer["plan"]), made

    def failures(self, nodes: Iterable[str]) -> dict[str, Failure]:
        """Say what would come of the loss of nodes."""
        return _read(dict[str, Failure], self._ask(Node, ALL, "failures", {"nodes": list(nodes)})["failures"])

    def set_fencing(self, name: str, change: Callable[[NodeFencingSpec], NodeFencingSpec]) -> NodeFencing:
        """Change what is said of a node's fencing."""

        def decide() -> NodeFencing:
            old = self._reads.find(NodeFencing, name) or NodeFencing(metadata=ObjectMeta(name=name))
            return self._put(old, old.with_(spec=change(old.spec)))

        return deciding(decide)

    def confirm_fencing(self, name: str, who: str) -> None:
        """Say that a lost node runs nothing any more."""
        del who  # whose token it is
        self._act(NodeFencing, name, "confirm")

    def test_power(self, name: str) -> str:
        """Ask a node's BMC for the power state, from the API's machine."""
        return str(self._act(NodeFencing, name, "test")["power"])

    def disarm(self, node: str, why: str) -> bool:
        """Let a node, or the herd, not be fenced."""
        return bool(self._act(NodeFencing, node or ALL, "disarm", {"why": why})["deferred"])

    def arm(self, node: str) -> bool:
        """Let a node, or the herd, be fenced again."""
        return bool(self._act(NodeFencing, node or ALL, "arm")["changed"])

    def disarmed(self) -> dict[str, str]:
        """Say what is not fenced now."""
        return dict(self._ask(NodeFencing, ALL, "disarmed")["disarmed"])

    def uncordon(self, node: str, *, bring_back: bool) -> bool:
        """Uncordon a node; tells whether anything changed."""
        return bool(self._act(Node, node, "uncordon", {"bringBack": bring_back})["changed"])

    def _put(self, old: R, new: R) -> R:
        """Store what is decided from `old`; what was never stored is created."""
        if old.version:
            return decode(type(new), self._session.write("PUT", path_of(type(new), name=new.name), body_of(new)))
        try:
            return decode(type(new), self._session.write("POST", path_of(type(new)), body_of(new)))
        except AlreadyExists as error:  # someone else was faster
            raise Conflict(str(error)) from error

    def _act(self, kind: type[Resource], name: str, action: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._session.write("POST", _path(kind, name, action), dict(body or {}), timeout_s=_PATIENT_S)

    def _ask(self, kind: type[Resource], name: str, action: str, body: Mapping[str, Any] | None = None) -> Any:
        """Have one of the actions done that only read."""
        return self._session.ask(_path(kind, name, action), dict(body or {}), _PATIENT_S)


def _path(kind: type[Resource], name: str, action: str) -> str:
    return f"{path_of(kind, name=name)}/{action}"


T = TypeVar("T")


def _read(kind: type[T], data: Any) -> T:
    """Read a part of a plan as the core made it."""
    return TypeAdapter(kind).validate_python(data)
