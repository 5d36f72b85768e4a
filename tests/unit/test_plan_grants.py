"""Which operations may begin: limits, order, and what is said of those that wait."""

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner.migration import Decision, Fail, Go, Wait, plan_grants
from orchestrator.planner.placement import Demand, refusal
from orchestrator.planner.rules import Whereabouts
from orchestrator.planner.snapshot import Limits, NodeState, Snapshot
from orchestrator.resources import Key, OperationType, Reason, VmPhase
from orchestrator.resources.vmop import MigrateTo
from tests.builders import NOW, a_node_state, a_snapshot, a_vm, an_operation

THREE = (a_node_state("n1"), a_node_state("n2"), a_node_state("n3"))


def only(decisions: Any) -> Decision:
    (decision,) = decisions
    return decision  # type: ignore[no-any-return]


class TestOneOperation:
    def test_an_evict_goes_to_another_node(self) -> None:
        decision = only(plan_grants(a_snapshot(THREE, [a_vm(node="n1")], [an_operation()])))
        assert isinstance(decision, Go)
        assert (decision.node, decision.target) == ("n1", "n2")

    def test_a_migrate_goes_where_it_is_told(self) -> None:
        operation = an_operation(kind=OperationType.MIGRATE, to=MigrateTo(node_name="n3"))
        decision = only(plan_grants(a_snapshot(THREE, [a_vm()], [operation])))
        assert isinstance(decision, Go)
        assert decision.target == "n3"

    def test_its_labels_and_the_vms_own_must_all_match(self) -> None:
        nodes = [
            a_node_state("n1"),
            a_node_state("n2", labels={"disk": "ssd"}),
            a_node_state("n3", labels={"zone": "b"}),
            a_node_state("n4", labels={"disk": "ssd", "zone": "b"}),
        ]
        operation = an_operation(kind=OperationType.MIGRATE, to=MigrateTo(node_selector={"zone": "b"}))
        decision = only(plan_grants(a_snapshot(nodes, [a_vm(selector={"disk": "ssd"})], [operation])))
        assert isinstance(decision, Go)
        assert decision.target == "n4"

    def test_a_start_is_executed_where_it_is_to_run(self) -> None:
        operation = an_operation(kind=OperationType.START)
        decision = only(plan_grants(a_snapshot(THREE, [a_vm(node="", phase=VmPhase.PENDING)], [operation])))
        assert isinstance(decision, Go)
        assert decision.node == decision.target == "n1"

    def test_overhead_counts(self) -> None:
        nodes = [a_node_state("n1"), a_node_state("n2", memory_mib=1024 + 64)]
        snapshot = a_snapshot(nodes, [a_vm()], [an_operation()], memory_overhead_mib=64)
        assert isinstance(only(plan_grants(snapshot)), Go)
        assert isinstance(only(plan_grants(replace(snapshot, memory_overhead_mib=65))), Wait)

    @pytest.mark.parametrize(
        ("vm", "operation", "more", "reason", "words"),
        [
            pytest.param(
                {"phase": VmPhase.PAUSE},
                {},
                {},
                Reason.NOT_READY,
                "until linux-vm is Running (it is Pause)",
                id="paused",
            ),
            pytest.param({"node": "n9"}, {}, {}, Reason.NOT_READY, "node n9, which is not Ready", id="source gone"),
            pytest.param(
                {},
                {"not_before": NOW + timedelta(seconds=1)},
                {},
                Reason.NOT_READY,
                "before it tries again",
                id="backs off",
            ),
            pytest.param(
                {},
                {},
                {"busy": {Key("default/linux-vm"): "someone else moves it"}},
                Reason.OTHER_MIGRATION_IN_PROGRESS,
                "someone else moves it",
                id="busy",
            ),
            pytest.param({"memory": "1Ti"}, {}, {}, Reason.TARGET_UNSCHEDULABLE, "0/3 nodes: 2 short of", id="big"),
            pytest.param({}, {}, {"migrating": 3}, Reason.MIGRATION_PENDING, "one of the herd's", id="cap"),
            pytest.param(
                {"phase": VmPhase.STOPPING},
                {"kind": OperationType.START},
                {},
                Reason.NOT_READY,
                "until linux-vm is Stopped (it is Stopping)",
                id="start while it stops",
            ),
        ],
    )
    def test_why_it_waits(
        self, vm: dict[str, Any], operation: dict[str, Any], more: dict[str, Any], reason: Reason, words: str
    ) -> None:
        decision = only(plan_grants(a_snapshot(THREE, [a_vm(**vm)], [an_operation(**operation)], **more)))
        assert isinstance(decision, Wait)
        assert decision.reason is reason
        assert words in decision.message

    @pytest.mark.parametrize(
        ("vm", "kind", "reason"),
        [
            (None, OperationType.EVICT, Reason.VIRTUAL_MACHINE_NOT_FOUND),
            (None, OperationType.START, Reason.VIRTUAL_MACHINE_NOT_FOUND),
            (VmPhase.STOPPED, OperationType.EVICT, Reason.NOT_APPLICABLE_FOR_PHASE),
            (VmPhase.RUNNING, OperationType.START, Reason.NOT_APPLICABLE_FOR_PHASE),
            (VmPhase.MIGRATING, OperationType.START, Reason.NOT_APPLICABLE_FOR_PHASE),
        ],
    )
    def test_what_can_not_be_done_any_more_fails(self, vm: VmPhase | None, kind: OperationType, reason: Reason) -> None:
        vms = [] if vm is None else [a_vm(phase=vm)]
        decision = only(plan_grants(a_snapshot(THREE, vms, [an_operation(kind=kind)])))
        assert isinstance(decision, Fail)
        assert decision.reason is reason

    def test_back_off_that_is_over_does_not_hold_it(self) -> None:
        snapshot = a_snapshot(THREE, [a_vm()], [an_operation(not_before=NOW)])
        assert isinstance(only(plan_grants(snapshot)), Go)

    def test_a_source_that_is_cordoned_lets_go_and_one_that_is_not_ready_does_not(self) -> None:
        cordoned = (a_node_state("n1", cordoned=True), *THREE[1:])
        assert isinstance(only(plan_grants(a_snapshot(cordoned, [a_vm()], [an_operation()]))), Go)
        lost = (a_node_state("n1", ready=False), *THREE[1:])
        assert isinstance(only(plan_grants(a_snapshot(lost, [a_vm()], [an_operation()]))), Wait)

    def test_inbound_zero_is_no_limit(self) -> None:
        nodes = [a_node_state("n1"), a_node_state("n2", inbound=7)]
        limited = a_snapshot(nodes, [a_vm()], [an_operation()])
        assert isinstance(only(plan_grants(limited)), Wait)
        assert isinstance(only(plan_grants(replace(limited, limits=Limits(inbound_per_node=0)))), Go)

    def test_a_target_whose_inbound_slot_is_taken_gives_way_to_the_next_best(self) -> None:
        nodes = [a_node_state("n1"), a_node_state("n2", inbound=1), a_node_state("n3", cpu_used_millicores=4000)]
        decision = only(plan_grants(a_snapshot(nodes, [a_vm()], [an_operation()])))
        assert isinstance(decision, Go)
        assert decision.target == "n3"


class TestOrder:
    def test_the_second_of_a_source_waits_and_a_third_of_another_passes(self) -> None:
        vms = [a_vm("a", node="n1"), a_vm("b", node="n1"), a_vm("c", node="n2")]
        pending = [an_operation("first", "a"), an_operation("second", "b"), an_operation("third", "c")]
        first, second, third = plan_grants(a_snapshot(THREE, vms, pending))
        assert isinstance(first, Go)
        assert isinstance(second, Wait)
        assert second.message == "waits for the outbound slot of node n1"
        assert isinstance(third, Go)

    def test_a_start_needs_no_slot(self) -> None:
        nodes = [a_node_state("n1", outbound=1), a_node_state("n2", inbound=1)]
        vms = [a_vm("a", node="", phase=VmPhase.PENDING)]
        pending = [an_operation("first", "a", kind=OperationType.START)]
        assert isinstance(only(plan_grants(a_snapshot(nodes, vms, pending, migrating=2))), Go)

    def test_what_the_first_takes_the_second_does_not_get(self) -> None:
        nodes = [a_node_state("n1"), a_node_state("n2"), a_node_state("n3", memory_mib=1500)]
        vms = [a_vm("a", node="n1"), a_vm("b", node="n2")]
        to_n3 = MigrateTo(node_name="n3")
        pending = [
            an_operation(n, v, kind=OperationType.MIGRATE, to=to_n3) for n, v in (("first", "a"), ("second", "b"))
        ]
        first, second = plan_grants(a_snapshot(nodes, vms, pending, limits=Limits(inbound_per_node=0)))
        assert isinstance(first, Go)
        assert isinstance(second, Wait)
        assert second.reason is Reason.TARGET_UNSCHEDULABLE


# Random herds ---------------------------------------------------------------------------------------------------------

node_states = st.lists(
    st.tuples(
        st.booleans(),
        st.booleans(),
        st.integers(0, 6000),
        st.integers(0, 6000),
        st.integers(0, 2),
        st.integers(0, 2),
        st.sampled_from(["a", "b"]),
    ),
    min_size=1,
    max_size=6,
).map(
    lambda rows: [
        a_node_state(
            f"n{i}",
            ready=ready or i == 0,
            cordoned=cordoned and i != 0,
            memory_mib=memory,
            cpu=cpu,
            outbound=outbound,
            inbound=inbound,
            labels={"zone": zone},
        )
        for i, (ready, cordoned, memory, cpu, outbound, inbound, zone) in enumerate(rows)
    ]
)


@st.composite
def herds(draw: st.DrawFn) -> Snapshot:
    nodes = draw(node_states)
    vms, pending = [], []
    for i in range(draw(st.integers(0, 8))):
        phase = draw(st.sampled_from([VmPhase.RUNNING] * 6 + list(VmPhase)))
        selector = draw(st.sampled_from([{}, {}, {"zone": "a"}]))
        node = draw(st.sampled_from([n.name for n in nodes]))
        memory, cores = draw(st.sampled_from([256, 1000, 3000])), draw(st.integers(1, 3))
        vms.append(a_vm(f"vm{i}", node=node, phase=phase, memory=f"{memory}Mi", cores=cores, selector=selector))
        kind = draw(st.sampled_from([OperationType.EVICT] * 3 + [OperationType.START, OperationType.MIGRATE]))
        target = draw(st.sampled_from([n.name for n in nodes]))
        pending.append(
            an_operation(
                f"op{i}",
                f"vm{i}",
                kind=kind,
                to=MigrateTo(node_name=target) if kind is OperationType.MIGRATE else None,
                avoid=draw(st.sampled_from([(), ("n0",)])),
                not_before=draw(st.sampled_from([None, None, NOW + timedelta(seconds=9)])),
            )
        )
    return a_snapshot(
        nodes,
        vms,
        pending,
        migrating=draw(st.integers(0, 4)),
        memory_overhead_mib=draw(st.sampled_from([0, 64])),
        limits=Limits(inbound_per_node=draw(st.integers(0, 2))),
    )


def after(snapshot: Snapshot, decisions: list[Decision]) -> Snapshot:
    """The herd when these decisions were carried out: written anew, not as the planner counts."""
    nodes = dict(snapshot.nodes)
    migrating = snapshot.migrating
    for go in (d for d in decisions if isinstance(d, Go)):
        migrates = go.operation.spec.type.is_migration
        migrating += migrates
        target = nodes[go.target]
        nodes[go.target] = replace(
            target,
            memory_used_mib=target.memory_used_mib + go.vm.spec.memory_mib + snapshot.memory_overhead_mib,
            cpu_used_millicores=target.cpu_used_millicores + go.vm.spec.cpu_millicores,
            inbound=target.inbound + migrates,
        )
        if migrates:
            nodes[go.node] = replace(nodes[go.node], outbound=nodes[go.node].outbound + 1)
    left = tuple(d.operation for d in decisions if isinstance(d, Wait))
    return replace(snapshot, nodes=nodes, migrating=migrating, pending=left)


@given(herds())
def test_every_operation_gets_one_decision_in_the_order_of_service(snapshot: Snapshot) -> None:
    assert tuple(decision.operation for decision in plan_grants(snapshot)) == snapshot.pending


@given(herds())
def test_no_limit_is_ever_exceeded(snapshot: Snapshot) -> None:
    decisions = list(plan_grants(snapshot))
    gone = [d for d in decisions if isinstance(d, Go)]
    moves = [d for d in gone if d.operation.spec.type.is_migration]
    if moves:
        assert snapshot.migrating + len(moves) <= snapshot.cap
    for name, count in Counter(d.node for d in moves).items():
        assert snapshot.nodes[name].outbound + count <= snapshot.limits.outbound_per_node
    for name, count in Counter(d.target for d in moves).items():
        if snapshot.limits.inbound_per_node:
            assert snapshot.nodes[name].inbound + count <= snapshot.limits.inbound_per_node
    ends = after(snapshot, decisions).nodes
    for name in {d.target for d in gone}:
        assert ends[name].memory_used_mib <= ends[name].memory_mib
        assert ends[name].cpu_used_millicores <= ends[name].cpu_millicores
        assert ends[name].schedulable


@given(herds())
def test_only_what_may_go_goes_and_never_to_itself(snapshot: Snapshot) -> None:
    for go in (d for d in plan_grants(snapshot) if isinstance(d, Go)):
        assert go.operation.status.not_before is None
        if go.operation.spec.type.is_migration:
            assert go.node == go.vm.status.node_name != go.target
            assert go.vm.status.phase is VmPhase.RUNNING
            assert snapshot.nodes[go.node].ready
        else:
            assert go.node == go.target
        wanted = go.operation.spec.migrate
        assert not (wanted and wanted.node_name) or go.target == wanted.node_name
        labels = snapshot.nodes[go.target].labels
        assert all(labels.get(k) == v for k, v in go.vm.spec.node_selector.items())


@given(herds())
def test_first_come_first_served(snapshot: Snapshot) -> None:
    """Who waits for a slot finds it held by what runs, or by one that came before; the same holds for room."""
    decisions = list(plan_grants(snapshot))
    for i, decision in enumerate(decisions):
        if not isinstance(decision, Wait):
            continue
        then = after(snapshot, decisions[:i])
        vm = snapshot.vms[Key(decision.operation.vm_key)]
        source = vm.status.node_name
        if "outbound slot" in decision.message:
            assert then.nodes[source].outbound >= snapshot.limits.outbound_per_node
        elif "one of the herd's" in decision.message:
            assert then.migrating >= then.cap
        elif "inbound slot" in decision.message:
            fitting = [n for n in then.nodes.values() if not refusal(n, demand_of(then, decision))]
            assert fitting
            assert all(n.inbound >= snapshot.limits.inbound_per_node for n in fitting)
        elif decision.reason is Reason.TARGET_UNSCHEDULABLE:
            assert all(refusal(n, demand_of(then, decision)) for n in then.nodes.values())


def demand_of(snapshot: Snapshot, decision: Decision) -> Demand:
    vm = snapshot.vms[Key(decision.operation.vm_key)]
    wanted = decision.operation.spec.migrate
    is_migration = decision.operation.spec.type.is_migration
    return Demand(
        memory_mib=vm.spec.memory_mib + snapshot.memory_overhead_mib,
        cpu_millicores=vm.spec.cpu_millicores,
        where=Whereabouts(vm.spec.node_selector),
        node_name=wanted.node_name if wanted else "",
        exclude={vm.status.node_name: "where it runs"} if is_migration else None,
    )


@given(herds())
def test_whoever_is_left_waiting_would_wait_again(snapshot: Snapshot) -> None:
    ends = after(snapshot, list(plan_grants(snapshot)))
    assert not [d for d in plan_grants(ends) if not isinstance(d, Wait)]


@given(herds(), st.randoms(use_true_random=False))
def test_the_same_herd_gives_the_same_plan(snapshot: Snapshot, random: Any) -> None:
    names = list(snapshot.nodes)
    random.shuffle(names)
    shuffled: dict[str, NodeState] = {name: snapshot.nodes[name] for name in names}
    assert list(plan_grants(replace(snapshot, nodes=shuffled))) == list(plan_grants(snapshot))
