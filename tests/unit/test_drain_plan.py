"""What emptying nodes will come to, and in which order evacuations are served."""

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner.drain import Job, by_remaining_work, eta_s, lower_bound_s, plan_drain, schedule
from orchestrator.resources import Key, NodeDrain, ObjectMeta, Priority
from orchestrator.resources.drain import STRATEGY_ANNOTATION, DrainStatus, VmDrain, VmState
from tests.builders import NOW, a_node_state, a_snapshot, a_vm, an_operation, some_needs

AWAY = frozenset({"n1"})


def test_each_vm_has_its_target_and_its_turn() -> None:
    nodes = [a_node_state("n1", memory_used_mib=7168), a_node_state("n2"), a_node_state("n3")]
    vms = [a_vm("a", memory="1Gi"), a_vm("b", memory="4Gi"), a_vm("c", memory="2Gi")]
    plan = plan_drain(a_snapshot(nodes, vms), vms, away=AWAY, bandwidth_mib_s=512)
    assert [(move.job.vm, move.begins_s) for move in plan.moves] == [
        ("default/b", 0),
        ("default/c", 8),
        ("default/a", 12),
    ]
    assert {move.job.target for move in plan.moves} <= {"n2", "n3"}
    assert plan.seconds == 14
    assert plan.problem() == ""


def test_what_has_no_place_is_named_and_what_cant_migrate_is_something_else() -> None:
    nodes = [a_node_state("n1"), a_node_state("n2", memory_mib=1024)]
    tied = some_needs(obstacles=("host device pci",))
    vms = [
        a_vm("big", memory="2Gi"),
        a_vm("tied", needs=tied),
        a_vm("off", memory="2Gi", annotations={STRATEGY_ANNOTATION: "ShutDown"}),
    ]
    plan = plan_drain(a_snapshot(nodes, vms), vms, away=AWAY, bandwidth_mib_s=512)
    assert list(plan.without_place) == ["default/big"]
    assert list(plan.stay) == ["default/tied"]
    assert list(plan.shut_down) == ["default/off"]
    assert "no place for 1 VMs: big (0/2 nodes" in plan.problem()


def test_those_that_leave_other_nodes_need_their_place_too() -> None:
    nodes = [a_node_state("n1"), a_node_state("n2"), a_node_state("n3", memory_mib=3000)]
    ours, theirs = [a_vm("a", memory="2Gi")], [a_vm("b", node="n2", memory="2Gi")]
    snapshot = a_snapshot(nodes, [*ours, *theirs])
    away = frozenset({"n1", "n2"})
    assert plan_drain(snapshot, ours, away=away, bandwidth_mib_s=512).problem() == ""
    alone = plan_drain(snapshot, theirs, away=away, bandwidth_mib_s=512, besides=ours)
    assert list(alone.without_place) == ["default/b"]


jobs = st.lists(
    st.builds(
        lambda n, source, target, mib: Job(Key(f"default/v{n}"), f"s{source}", f"t{target}", mib, mib / 100),
        st.uuids(),
        st.integers(0, 4),
        st.integers(0, 4),
        st.integers(1, 5_000),
    ),
    max_size=25,
)


@given(jobs, st.integers(1, 2), st.integers(0, 2), st.integers(1, 6))
def test_a_schedule_keeps_the_limits_and_wastes_no_slot(
    found: list[Job], outbound: int, inbound: int, cap: int
) -> None:
    planned = schedule(found, outbound=outbound, inbound=inbound, cap=cap)
    assert sorted(move.job.vm for move in planned) == sorted(job.vm for job in found)
    for move in planned:
        at_once = [m for m in planned if m.begins_s <= move.begins_s < m.ends_s]
        assert len(at_once) <= cap
        assert sum(m.job.source == move.job.source for m in at_once) <= outbound
        assert not inbound or sum(m.job.target == move.job.target for m in at_once) <= inbound
    last = max((move.ends_s for move in planned), default=0)
    assert last >= lower_bound_s(found, outbound=outbound, cap=cap) - 1e-6
    assert last <= sum(job.seconds for job in found) + 1e-6


def test_the_node_with_the_most_left_goes_first_and_its_own_order_stays() -> None:
    vms = {
        vm.key: vm
        for vm in (a_vm("a", node="n1"), a_vm("b", node="n2", memory="4Gi"), a_vm("c", node="n2"), a_vm("p", node="n3"))
    }
    maintenance = Priority.MAINTENANCE
    pending = [
        an_operation("p", "p", created=9),
        an_operation("a", "a", created=1, priority=maintenance),
        an_operation("c", "c", created=2, priority=maintenance),
        an_operation("b", "b", created=3, priority=maintenance),
    ]
    assert [o.name for o in by_remaining_work(pending, vms)] == ["p", "c", "b", "a"]


def test_what_is_left_is_foreseen_from_what_was_measured() -> None:
    moved = VmDrain(state=VmState.LEFT, memory_mib=2048, operation="one", moved=True)
    left = VmDrain(state=VmState.MOVING, memory_mib=4096, operation="two")
    drain = NodeDrain(metadata=ObjectMeta(name="n1"), status=DrainStatus(vms={"default/a": moved, "default/b": left}))
    first = an_operation("one", "a", started_at=NOW, finished_at=NOW + timedelta(seconds=10))
    operations = {"one": first, "two": an_operation("two", "b", progress=50)}
    assert eta_s(drain, operations) == 10
    assert eta_s(drain, {"two": operations["two"]}) is None
    waiting = drain.with_status(vms={**drain.vms, "default/c": VmDrain(state=VmState.STAYS)})
    assert eta_s(waiting, operations) is None
