"""The limits on migrations, by the hosts' own record: libvirt's hooks and the QEMUs' events, never the product's word.

One scenario runs on the product, and on copies of it that lack a limit (`mutants`): there the same checks must fail.
Machines with a ballast move at 1 MiB/s, so a migration lasts until the test lets it go (`outside.release`), and what
overlaps with what does not depend on how fast this computer is.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.cluster import Operation
from orchestrator.errors import NotFound
from orchestrator.resources import ObjectMeta, OperationPhase, OperationType, VirtualMachineOperation
from orchestrator.resources.vmop import PRIORITY_ANNOTATION, OperationSpec, Priority
from orchestrator.settings import Settings
from tests.lab import outside
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.mutants import WITHOUT_CLUSTER_CAP, WITHOUT_SOURCE_SLOT, make_mutant, replaced
from tests.lab.observer import (
    ObservedMigration,
    max_concurrent,
    max_concurrent_per_source,
    max_concurrent_per_target,
    observed_migrations,
    stream_migrations,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(240)

SETTINGS = {"VMHERD_BANDWIDTH_MIB_S": "1", "VMHERD_INBOUND_PER_NODE": "0"}
"""Of the module's herd (`conftest.module_herd`): migrations crawl, and any number may reach a node."""
BALLAST_MIB = 100
"""At 1 MiB/s more than what any test waits for."""


@dataclass(frozen=True)
class Record:
    """What the hosts saw.

    Attributes:
        hooked: Migrations by libvirt's hooks, from the target's preparation to the source's cleanup.
        streams: By the sources' QEMUs; within the former.
    """

    hooked: list[ObservedMigration]
    streams: list[ObservedMigration]

    def check_sources(self) -> None:
        """Never two outgoing jobs on a node."""
        for seen in (self.hooked, self.streams):
            most = max_concurrent_per_source(seen)
            assert set(most.values()) == {1}, f"outgoing at once, by node: {most}; {seen}"

    def check_cap(self, cordoned_at: float) -> None:
        """Never more jobs in the herd than schedulable nodes: three, and two from the time of the cordon on.

        What ran then goes on. So it is each begin that is held against the cap of its time.
        """
        for seen in (self.hooked, self.streams):
            for begun in seen:
                at_once = [other.domain for other in seen if other.began_at <= begun.began_at < other.ended_at]
                cap = 3 if begun.began_at < cordoned_at else 2
                assert len(at_once) <= cap, f"{len(at_once)} jobs, cap {cap}: {at_once}"


class Moves:
    """Operations on some VMs, and what comes of them by the hosts' record."""

    def __init__(self, herd: LabHerd, guests: list[Guest]) -> None:
        self._herd = herd
        self._guests = {guest.name: guest for guest in guests}
        self._operations: dict[str, Operation] = {}
        self._since = time.time()

    def evict(self, name: str, priority: Priority = Priority.PERSON) -> None:
        """Create an evict of that priority."""
        meta = ObjectMeta(name=f"evict-{name}", annotations={PRIORITY_ANNOTATION: str(priority.value)})
        spec = OperationSpec(type=OperationType.EVICT, virtual_machine_name=name)
        self._herd.cluster.create(VirtualMachineOperation(metadata=meta, spec=spec).manifest())
        self._operations[name] = self._herd.cluster.operation(meta.name)

    def migrate(self, name: str, node: str) -> None:
        """Create a migration to a node."""
        self._operations[name] = self._herd.cluster.migrate(name, node=node)

    def begun(self) -> list[str]:
        """The VMs that are being sent or were, in the order in which that began."""
        return [seen.domain.rpartition(".")[2] for seen in self.record().streams]

    def wait_begun(self, count: int) -> list[str]:
        """Wait until that many have begun, and return them."""
        wait_until(lambda: len(self.begun()) >= count, 60, lambda: f"{count} begun; it is {self.begun()}", interval=0.1)
        return self.begun()

    def wait_waits(self, name: str, why: str) -> bool:
        """Wait until it is decided on; return whether it was told to wait for that reason.

        If not, it may begin, and then it has.
        """

        def decided(operation: VirtualMachineOperation) -> bool:
            return operation.status.grant is not None or why in operation.message

        operation = self._herd.wait_operation(self._operations[name].name, decided)
        if operation.status.grant is None:
            return True
        wait_until(lambda: name in self.begun(), 60, f"{name} begins", interval=0.1)
        return False

    def finish(self, name: str) -> None:
        """Let one end that has begun."""
        source = self._herd.cluster.vm(name).status.node_name
        outside.release(self._herd.lab.host(source), self._guests[name])
        operation = self._operations[name].wait(timeout=60)
        assert operation.phase is OperationPhase.COMPLETED, operation.message

    def record(self) -> Record:
        """What the hosts saw up to now."""
        lab, since = self._herd.lab, self._since
        return Record(observed_migrations(lab, since=since), stream_migrations(lab, since=since))

    def abort(self) -> None:
        """Call off what has not ended."""
        for operation in self._operations.values():
            with suppress(NotFound):
                operation.abort()


@contextmanager
def _six_evicts(herd: LabHerd) -> Iterator[Moves]:
    """Two VMs on each of three nodes are evicted, all at once: the control worker finds all of it pending."""
    guests = {
        name: outside.laden(herd.lab, name, ballast_mib=BALLAST_MIB) for name in ["a1", "a2", "b1", "b2", "c1", "c2"]
    }
    nodes = {"a": "h1", "b": "h2", "c": "h3"}
    herd.start_guests(*((guest, nodes[name[0]]) for name, guest in guests.items()), up=False)
    moves = Moves(herd, list(guests.values()))
    # Not paused: in the middle of a pass it would go on with the first of them alone.
    herd.processes["control"].hold()
    herd.processes["control"].kill()
    try:
        # The first that comes is the last in rank; and who came first is not first by name.
        moves.evict("a2", Priority.MAINTENANCE)
        for name in ("c1", "c2", "b1", "a1", "b2"):
            moves.evict(name)
    finally:
        herd.processes["control"].release()
    try:
        yield moves
    finally:
        moves.abort()


def _cordon_in_the_middle(herd: LabHerd, moves: Moves) -> tuple[float, bool]:
    """Cordon a node while three migrations run, and let one of them end; another then waits for its source no more.

    Returns:
        When the node was cordoned, and whether the other one was told to wait for one of the herd's slots.
    """
    moves.wait_begun(3)
    cordoned_at = time.time()
    herd.cluster.cordon("h3")
    moves.finish("c1")
    return cordoned_at, moves.wait_waits("c2", "the herd's migration slots")


def test_source_slots_and_the_herds_cap_hold_and_who_came_first_goes_first(herd: LabHerd) -> None:
    with _six_evicts(herd) as moves:
        cordoned_at, waits = _cordon_in_the_middle(herd, moves)
        assert waits
        # Past its own source's second and its elder in lower rank, one of each node.
        assert sorted(moves.begun()) == ["a1", "b1", "c1"]
        moves.finish("b1")
        assert moves.wait_begun(4)[3:] == ["c2"]
        assert moves.wait_waits("b2", "the herd's migration slots")
        moves.finish("a1")
        assert moves.wait_begun(5)[3:] == ["c2", "b2"]
        assert moves.wait_waits("a2", "the herd's migration slots")
        moves.finish("c2")
        assert moves.wait_begun(6)[3:] == ["c2", "b2", "a2"]
        moves.finish("b2")
        moves.finish("a2")

        record = moves.record()
        record.check_sources()
        record.check_cap(cordoned_at)
        for seen in (record.hooked, record.streams):
            assert len(seen) == 6
            assert {migration.outcome for migration in seen} == {"completed"}
            assert max_concurrent(seen) == 3
        assert all(seen.target != "h3" for seen in record.hooked if seen.began_at > cordoned_at)


def test_a_herd_without_the_cap_fails_these_checks(herd: LabHerd, tmp_path: Path) -> None:
    mutant = make_mutant(tmp_path, WITHOUT_CLUSTER_CAP)
    with replaced(herd, "control", source=mutant), _six_evicts(herd) as moves:
        cordoned_at, waits = _cordon_in_the_middle(herd, moves)
        record = moves.record()
        record.check_sources()
        with pytest.raises(AssertionError, match="3 jobs, cap 2"):
            record.check_cap(cordoned_at)
        assert not waits


def test_a_herd_without_the_source_slot_fails_these_checks(herd: LabHerd, tmp_path: Path) -> None:
    mutant = make_mutant(tmp_path, WITHOUT_SOURCE_SLOT)
    names = ["control", *(f"{host.name}/migrate" for host in herd.lab.hosts)]
    with replaced(herd, *names, source=mutant), _six_evicts(herd) as moves:
        cordoned_at, _ = _cordon_in_the_middle(herd, moves)
        record = moves.record()
        record.check_cap(cordoned_at)
        with pytest.raises(AssertionError, match=r"outgoing at once, by node: .*'h3': 2"):
            record.check_sources()


def test_a_target_takes_as_many_as_its_limit_lets_it(herd: LabHerd) -> None:
    assert _two_to_one_node(herd) == 2
    herd.clear()
    default = Settings.model_fields["inbound_per_node"].default
    with replaced(herd, "control", settings={"VMHERD_INBOUND_PER_NODE": str(default)}):
        assert _two_to_one_node(herd) == 1


def _two_to_one_node(herd: LabHerd) -> int:
    """Move VMs of two nodes to a third one; return how many it received at once."""
    first, second = (outside.laden(herd.lab, name, ballast_mib=BALLAST_MIB) for name in ("first", "second"))
    herd.start_guests((first, "h1"), (second, "h2"), up=False)
    moves = Moves(herd, [first, second])
    try:
        for name in ("first", "second"):
            moves.migrate(name, "h3")
        moves.wait_begun(1)
        if moves.wait_waits("second", "waits for the inbound slot"):
            assert moves.begun() == ["first"]
        for name in ("first", "second"):
            moves.finish(name)
    finally:
        moves.abort()
    record = moves.record()
    (at_once,) = {max_concurrent_per_target(seen)["h3"] for seen in (record.hooked, record.streams)}
    return at_once
