"""What emptying nodes will come to, and in which order evacuations are served."""

from dataclasses import replace
from datetime import timedelta
from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from orchestrator.planner.drain import DrainPlan, Job, by_remaining_work, eta_s, lower_bound_s, plan_drain, schedule
from orchestrator.planner.migration import Go, plan_grants
from orchestrator.resources import Key, NodeDrain, ObjectMeta, Priority
from orchestrator.resources.drain import STRATEGY_ANNOTATION, DrainStatus, VmDrain, VmState
from tests.builders import NOW, a_node_state, a_snapshot, a_vm, an_operation, some_needs
from tests.small_herds import SmallHerd, random_herd

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


def drained_herd(seed: int) -> tuple[SmallHerd, list[str]]:
    random = Random(seed)
    return random_herd(random, nodes=4, vms=8).drained(random)


drained_herds = st.integers(0, 10**9).map(drained_herd)
some = settings(max_examples=80, phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink))


def plan_for(herd: SmallHerd, leaving: list[str]) -> DrainPlan:
    snapshot = herd.snapshot()
    vms = [snapshot.vms[Key(f"default/{vm}")] for vm in leaving]
    away = frozenset(herd.at[vm] for vm in leaving)
    return plan_drain(snapshot, vms, away=away, bandwidth_mib_s=512)


class TestEveryDrain:
    """Over small herds with all kinds of rules, one or two nodes of which are emptied."""

    @given(drained_herds, st.integers(-1, 7))
    @some
    def test_breaks_no_rule_and_no_capacity_at_any_step_also_when_one_fails(
        self, given: tuple[SmallHerd, list[str]], which: int
    ) -> None:
        herd, leaving = given
        at, failed = dict(herd.at), set[Key]()
        ends: dict[Key, float] = {}
        for number, move in enumerate(plan_for(herd, leaving).moves):
            assert all(ends[vm] <= move.begins_s for vm in move.after), "what it needs has ended by then"
            ends[move.job.vm] = move.ends_s
            if number == which or failed & move.after:
                failed.add(move.job.vm)
                continue
            vm = move.job.vm.partition("/")[2]
            assert at[vm] == move.job.source
            assert herd.may_land(vm, move.job.target, at), move
            at[vm] = move.job.target

    @given(drained_herds, st.randoms(use_true_random=False))
    @some
    def test_nor_do_its_grants_in_whatever_order_they_end(
        self, given: tuple[SmallHerd, list[str]], random: Random
    ) -> None:
        """What is granted is decided anew each time; one VM, or none, never gets away."""
        herd, leaving = given
        at, failing = dict(herd.at), random.choice([None, *leaving])
        left = [vm for vm in leaving if vm != failing]
        while True:
            operations = [
                an_operation(f"e-{vm}", vm, priority=Priority.MAINTENANCE, created=n) for n, vm in enumerate(left, 1)
            ]
            snapshot = replace(herd.snapshot(at), pending=tuple(operations))
            granted = [decision for decision in plan_grants(snapshot) if isinstance(decision, Go)]
            if not granted:
                break
            random.shuffle(granted)
            for go in granted:
                vm = go.vm.name
                assert herd.may_land(vm, go.target, at), go
                at[vm] = go.target
                left.remove(vm)
        for vm in left:
            assert not any(herd.may_land(vm, node, at) for node in herd.nodes if node != at[vm]), f"{vm} could go"

    @given(drained_herds, st.randoms(use_true_random=False))
    @some
    def test_is_the_same_for_the_same_herd(self, given: tuple[SmallHerd, list[str]], random: Random) -> None:
        herd, leaving = given
        nodes, vms, order = list(herd.nodes.items()), list(herd.vms.items()), list(leaving)
        for part in (nodes, vms, order):
            random.shuffle(part)
        shuffled = SmallHerd(dict(nodes), dict(vms), herd.at)
        assert plan_for(shuffled, order) == plan_for(herd, leaving)


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
