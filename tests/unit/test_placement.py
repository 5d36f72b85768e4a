"""Which node takes a VM, and what is said of those that don't."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner.placement import Demand, choose_node, refusal
from orchestrator.planner.snapshot import NodeState
from tests.builders import a_node_state


def a_demand(**more: Any) -> Demand:
    return Demand(**{"memory_mib": 1088, "cpu_millicores": 1000, "labels": {}, **more})


def nodes(*states: NodeState) -> dict[str, NodeState]:
    return {state.name: state for state in states}


@pytest.mark.parametrize(
    ("node", "demand", "reason"),
    [
        pytest.param({}, {}, "", id="fits"),
        pytest.param({"ready": False}, {}, "not Ready", id="not ready"),
        pytest.param({"cordoned": True}, {}, "cordoned", id="cordoned"),
        pytest.param({"ready": False, "cordoned": True}, {}, "not Ready", id="not ready comes first"),
        pytest.param({}, {"exclude": {"n1": "where it runs"}}, "where it runs", id="excluded"),
        pytest.param({}, {"exclude": {"n2": "where it runs"}}, "", id="another excluded"),
        pytest.param({}, {"node_name": "n2"}, "not node n2", id="another named"),
        pytest.param({}, {"node_name": "n1"}, "", id="named"),
        pytest.param({}, {"labels": {"zone": "a"}}, "without label zone=a", id="label missing"),
        pytest.param({"labels": {"zone": "b"}}, {"labels": {"zone": "a"}}, "without label zone=a", id="label differs"),
        pytest.param({"labels": {"zone": "a"}}, {"labels": {"zone": "a"}}, "", id="label there"),
        pytest.param({}, {"labels": {"b": "2", "a": "1"}}, "without label a=1, b=2", id="labels in order"),
        pytest.param({"memory_mib": 1088}, {}, "", id="memory just enough"),
        pytest.param({"memory_mib": 1087}, {}, "with less than 1088 MiB memory free", id="memory short"),
        pytest.param(
            {"memory_mib": 2000, "memory_used_mib": 1000}, {}, "with less than 1088 MiB memory free", id="memory used"
        ),
        pytest.param({"cpu": 1000}, {}, "", id="CPU just enough"),
        pytest.param({"cpu": 999}, {}, "with less than 1000 millicores CPU free", id="CPU short"),
        pytest.param(
            {"cpu_used_millicores": 7001}, {}, "with less than 1000 millicores CPU free", id="CPU reserved already"
        ),
        pytest.param({"outbound": 1, "inbound": 5}, {}, "", id="slots are not placement"),
    ],
)
def test_why_a_node_is_refused(node: dict[str, Any], demand: dict[str, Any], reason: str) -> None:
    assert refusal(a_node_state("n1", **node), a_demand(**demand)) == reason


def test_the_least_reserved_share_of_cpu_wins_whatever_the_size() -> None:
    big = a_node_state("big", cpu=64_000, cpu_used_millicores=31_000)  # 50 % afterwards
    small = a_node_state("small", cpu=4_000, cpu_used_millicores=500)  # 38 % afterwards
    assert choose_node(nodes(big, small), a_demand()).node == "small"


def test_names_break_ties() -> None:
    assert choose_node(nodes(a_node_state("n3"), a_node_state("n1"), a_node_state("n2")), a_demand()).node == "n1"


def test_where_it_failed_before_comes_last_but_comes() -> None:
    idle, loaded = a_node_state("n1"), a_node_state("n2", cpu_used_millicores=6000)
    demand = a_demand(avoid=frozenset({"n1"}))
    assert choose_node(nodes(idle, loaded), demand).node == "n2"
    assert choose_node(nodes(idle), demand).node == "n1"


def test_the_explanation_counts_reasons() -> None:
    choice = choose_node(
        nodes(
            a_node_state("n1"),
            a_node_state("n2", cordoned=True),
            a_node_state("n3", memory_mib=512),
            a_node_state("n4", memory_mib=600),
        ),
        a_demand(exclude={"n1": "where it runs"}),
    )
    assert choice.node is None
    assert choice.explain() == "0/4 nodes: 1 cordoned, 1 where it runs, 2 with less than 1088 MiB memory free"


def test_without_a_node_there_is_nothing_to_count() -> None:
    assert choose_node({}, a_demand()).explain() == "there is no node"


def test_the_explanation_stays_short_in_a_large_herd_and_the_same_while_nodes_fill() -> None:
    def full(more: int) -> str:
        states = [a_node_state(f"n{i}", memory_mib=2000, memory_used_mib=1000 + i + more) for i in range(500)]
        return choose_node(nodes(*states), a_demand()).explain()

    assert len(full(0)) < 100
    assert full(0) == full(1)  # else each pass would write each waiting operation anew


@given(
    st.lists(
        st.builds(
            lambda cordoned, memory, cpu, used: {
                "cordoned": cordoned,
                "memory_mib": memory,
                "cpu": cpu,
                "cpu_used_millicores": used,
            },
            st.booleans(),
            st.integers(0, 4000),
            st.integers(0, 8000),
            st.integers(0, 8000),
        ),
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_the_choice_fits_is_the_best_and_does_not_depend_on_order(fields: list[dict[str, Any]], random: Any) -> None:
    states = [a_node_state(f"n{i}", **more) for i, more in enumerate(fields)]
    demand = a_demand()
    choice = choose_node(nodes(*states), demand)
    random.shuffle(states)
    assert choose_node(nodes(*states), demand) == choice
    fitting = [state for state in states if not refusal(state, demand)]
    assert set(choice.refused) == {state.name for state in states} - {state.name for state in fitting}
    if choice.node is None:
        assert not fitting
    else:
        shares = {s.name: (s.cpu_used_millicores + 1000) / s.cpu_millicores for s in fitting}
        assert shares[choice.node] == min(shares.values())
