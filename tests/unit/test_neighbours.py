"""The rules between VMs, as Kubernetes means them, one by one; and the arrays beside the words."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner.board import Board
from orchestrator.planner.migration import Go, Wait, plan_grants
from orchestrator.planner.neighbours import Neighbours
from orchestrator.planner.placement import move_demand, refusal
from orchestrator.planner.rules import resident
from orchestrator.planner.snapshot import NodeState
from orchestrator.resources import Key, OperationType, VirtualMachine, VmPhase
from tests.builders import a_node_state, a_snapshot, a_vm, an_operation, keep_apart, keep_near
from tests.small_herds import random_herd

NODES = {
    "n1": a_node_state("n1", labels={"zone": "a"}),
    "n2": a_node_state("n2", labels={"zone": "a"}),
    "n3": a_node_state("n3", labels={"zone": "b"}),
    "n4": a_node_state("n4"),
}


def allowed(vm: VirtualMachine, *others: VirtualMachine, nodes: dict[str, NodeState] | None = None) -> set[str]:
    """The nodes that the rules leave to a VM, the others being where they are."""
    known = nodes or NODES
    picture = Neighbours(known, [resident(other, None, (other.status.node_name,)) for other in others])
    picture.add(resident(vm, None))
    return {name for name in known if not picture.obstacle(vm.key, name)}


def web(name: str, node: str = "n1", **more: Any) -> VirtualMachine:
    return a_vm(name, node=node, labels={"app": "web"}, **more)


def spread(topology: str, skew: int = 1, **more: Any) -> dict[str, Any]:
    constraint = {"topologyKey": topology, "maxSkew": skew, "whenUnsatisfiable": "DoNotSchedule", **more}
    return {"topologySpreadConstraints": [{**constraint, "labelSelector": {"matchLabels": {"app": "web"}}}]}


class TestAntiAffinity:
    def test_it_is_off_the_places_of_those_it_means(self) -> None:
        assert allowed(a_vm("a", spec=keep_apart(app="web")), web("w", "n1")) == {"n2", "n3", "n4"}
        assert allowed(a_vm("a", spec=keep_apart("zone", app="web")), web("w", "n1")) == {"n3", "n4"}

    def test_it_works_both_ways(self) -> None:
        assert allowed(web("w"), a_vm("a", node="n1", spec=keep_apart("zone", app="web"))) == {"n3", "n4"}

    def test_others_are_not_meant(self) -> None:
        assert allowed(a_vm("a", spec=keep_apart(app="web")), a_vm("b")) == set(NODES)

    def test_the_reason_names_whom(self) -> None:
        picture = Neighbours(NODES, [resident(web("web-2", "n1"), None, ("n1",))])
        picture.add(resident(a_vm("a", spec=keep_apart(app="web")), None))
        assert picture.obstacle(Key("default/a"), "n1") == "anti-affinity with web-2"

    def test_one_that_moves_is_not_in_its_own_way_and_keeps_off_both_nodes(self) -> None:
        vm = web("w", spec=keep_apart("zone", app="web"))
        picture = Neighbours(NODES, [resident(vm, None, ("n1", "n3"))])
        assert not picture.obstacle(vm.key, "n2")
        picture.add(resident(web("other"), None))
        assert [name for name in NODES if not picture.obstacle(Key("default/other"), name)] == ["n4"]


class TestAffinity:
    def test_it_is_where_one_is_that_it_means(self) -> None:
        assert allowed(a_vm("a", spec=keep_near(app="web")), web("w", "n2")) == {"n2"}
        assert allowed(a_vm("a", spec=keep_near("zone", app="web")), web("w", "n2")) == {"n1", "n2"}

    def test_nowhere_without_company(self) -> None:
        assert allowed(a_vm("a", spec=keep_near(app="web"))) == set()

    def test_the_first_of_a_group_goes_anywhere_that_is_a_place(self) -> None:
        assert allowed(web("w", spec=keep_near("zone", app="web"))) == {"n1", "n2", "n3"}

    def test_one_that_is_on_its_way_is_no_company_unless_both_are_one_place(self) -> None:
        for topology, expected in (("zone", {"n1", "n2"}), ("kubernetes.io/hostname", set())):
            picture = Neighbours(NODES, [resident(web("w"), None, ("n1", "n2"))])
            picture.add(resident(a_vm("a", spec=keep_near(topology, app="web")), None))
            assert {name for name in NODES if not picture.obstacle(Key("default/a"), name)} == expected

    def test_whoever_leaves_company_alone_is_told(self) -> None:
        vms = [web("w", "n1"), a_vm("a", node="n1", spec=keep_near(app="web"))]
        picture = Neighbours(NODES, [resident(vm, None, ("n1",)) for vm in vms])
        assert picture.breaks(Key("default/w"), "n2") == "a needs it where it is"
        assert picture.breaks(Key("default/a"), "n1") == ""
        assert picture.where(Key("default/w")) == ("n1",)


class TestWhoIsMeant:
    @pytest.mark.parametrize(
        ("more", "is_meant"),
        [
            ({}, False),
            ({"namespaces": ["other"]}, True),
            ({"namespaceSelector": {}}, True),
            ({"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "other"}}}, True),
            ({"namespaceSelector": {"matchLabels": {"team": "a"}}}, False),
        ],
    )
    def test_namespaces(self, more: dict[str, Any], is_meant: bool) -> None:
        there = web("w", "n1")
        there = there.with_(metadata=there.metadata.with_(namespace="other"))
        rule = keep_apart(app="web")
        _term(rule).update(more)
        assert ("n1" not in allowed(a_vm("a", spec=rule), there)) is is_meant

    @pytest.mark.parametrize(
        ("selector", "is_meant"),
        [
            (None, False),
            ({}, True),
            ({"matchExpressions": [{"key": "app", "operator": "In", "values": ["web", "db"]}]}, True),
            ({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web"]}]}, False),
            ({"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}, True),
            ({"matchExpressions": [{"key": "app", "operator": "Exists"}]}, True),
        ],
    )
    def test_selectors(self, selector: dict[str, Any] | None, is_meant: bool) -> None:
        rule = keep_apart()
        if selector is None:
            del _term(rule)["labelSelector"]
        else:
            _term(rule)["labelSelector"] = selector
        assert ("n1" not in allowed(a_vm("a", spec=rule), web("w", "n1"))) is is_meant

    @pytest.mark.parametrize(
        ("field", "version", "is_meant"), [("matchLabelKeys", "1", True), ("matchLabelKeys", "2", False)]
    )
    def test_label_keys(self, field: str, version: str, is_meant: bool) -> None:
        rule = keep_apart(app="web")
        _term(rule)[field] = ["version"]
        vm = a_vm("a", labels={"app": "web", "version": version}, spec=rule)
        there = a_vm("w", node="n1", labels={"app": "web", "version": "1"})
        assert ("n1" not in allowed(vm, there)) is is_meant


class TestSpread:
    def test_no_place_is_too_far_ahead_of_the_least(self) -> None:
        there = [web("w1", "n1"), web("w2", "n2")]
        assert allowed(web("w", spec=spread("zone")), *there) == {"n3"}
        assert allowed(web("w", spec=spread("zone", 3)), *there) == {"n1", "n2", "n3"}

    def test_places_that_it_may_not_be_in_do_not_count(self) -> None:
        vm = web("w", spec=spread("zone"), selector={"zone": "a"})
        assert allowed(vm, web("w1", "n1")) == {"n1", "n2", "n3"}
        ignored = web("w", spec=spread("zone", nodeAffinityPolicy="Ignore"), selector={"zone": "a"})
        assert allowed(ignored, web("w1", "n1")) == {"n3"}

    def test_with_too_few_places_the_least_counts_as_empty(self) -> None:
        there = [web("w1", "n1"), web("w2", "n3")]
        assert allowed(web("w", spec=spread("zone")), *there) == {"n1", "n2", "n3"}
        assert allowed(web("w", spec=spread("zone", minDomains=3)), *there) == set()


class TestPreferences:
    def test_company_is_sought_and_avoided_by_weight_and_number(self) -> None:
        rather = "preferredDuringSchedulingIgnoredDuringExecution"
        term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "web"}}}
        parts = [{"weight": 5, "virtualMachineAndPodAffinityTerm": term}]
        there = [web("w1", "n1"), web("w2", "n1"), web("w3", "n2")]
        for kind, likings in (("Affinity", [10, 5, 0]), ("AntiAffinity", [-10, -5, 0])):
            vm = a_vm("a", spec={"affinity": {f"virtualMachineAndPod{kind}": {rather: parts}}})
            picture = Neighbours(NODES, [resident(other, None, (other.status.node_name,)) for other in there])
            picture.add(resident(vm, None))
            assert [picture.liking(vm.key, name) for name in ("n1", "n2", "n3")] == likings
            picture.put(vm.key, ("n3",))
            picture.add(resident(web("new"), None))
            assert [picture.liking(Key("default/new"), name) for name in ("n2", "n3")] == [0, likings[1]], "both ways"
            assert picture.liking(vm.key, "n3") == 0, "its own presence does not count"


def _term(rule: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = rule["affinity"]["virtualMachineAndPodAntiAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ][0]
    return found


class TestGrants:
    def test_two_grants_of_one_round_see_each_other(self) -> None:
        vms = [web(name, "", phase=VmPhase.PENDING, spec=keep_apart(app="web")) for name in ("a", "b")]
        nodes = [a_node_state("n1"), a_node_state("n2")]
        pending = [an_operation(f"start-{vm.name}", vm.name, kind=OperationType.START) for vm in vms]
        first, second = plan_grants(a_snapshot(nodes, vms, pending))
        assert isinstance(first, Go)
        assert isinstance(second, Go)
        assert {first.target, second.target} == {"n1", "n2"}
        assert first.is_bound
        first, second = plan_grants(a_snapshot(nodes[:1], vms, pending))
        assert isinstance(second, Wait)
        assert second.message == "0/1 nodes: 1 anti-affinity with a"

    def test_node_affinity(self) -> None:
        term = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["b"]}]}
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
        preferred = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": term}]}
        for rule, nodes, target in (
            (required, ("n1", "n2", "n3"), "n3"),
            (preferred, ("n1", "n2", "n3"), "n3"),
            (preferred, ("n1", "n2"), "n2"),
        ):
            vm = a_vm(node="n1", spec={"affinity": {"nodeAffinity": rule}})
            (go,) = plan_grants(a_snapshot([NODES[name] for name in nodes], [vm], [an_operation()]))
            assert isinstance(go, Go)
            assert go.target == target
        vm = a_vm(node="n1", spec={"affinity": {"nodeAffinity": required}})
        (wait,) = plan_grants(a_snapshot([NODES["n1"], NODES["n2"]], [vm], [an_operation()]))
        assert isinstance(wait, Wait)
        assert wait.message == "0/2 nodes: 1 outside its node affinity (zone In (b)), 1 where it runs"


@given(st.integers(0, 10**9))
def test_the_arrays_say_what_the_words_say(seed: int) -> None:
    herd = random_herd(Random(seed))
    snapshot = herd.snapshot()
    board = Board(snapshot)
    for name in herd.vms:
        vm = snapshot.vms[Key(f"default/{name}")]
        demand = move_demand(vm, None, 0, snapshot.nodes[vm.status.node_name])
        demand = replace(demand, company=board.company(vm.key))
        fits = board.open & board.suited(demand) & board.with_room(demand)
        for number, node in enumerate(board.names):
            against = board.neighbours.obstacle(vm.key, node)
            assert (bool(fits[number]) and not against) == (refusal(snapshot.nodes[node], demand) == "")
            if herd.suits(name, node):
                assert (not against) == herd.holds(name, node, herd.at)
        chosen = board.choose(demand, ~board.mask_of([vm.status.node_name]))
        fitting = [n for n in board.names if n != vm.status.node_name and not refusal(snapshot.nodes[n], demand)]
        assert (chosen is None) == (not fitting)
        assert chosen is None or board.names[chosen] in fitting
