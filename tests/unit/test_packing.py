"""Where several VMs go together."""

from typing import Any

import pytest

from orchestrator.planner.packing import place_all
from orchestrator.resources import Key, VmPhase
from tests.builders import a_node_state, a_snapshot, a_vm, keep_apart, keep_near

GONE = frozenset({"n1"})


def key(name: str) -> Key:
    return Key(f"default/{name}")


class TestPlaceAll:
    def test_large_ones_first_so_that_all_fit(self) -> None:
        nodes = [a_node_state("n1"), a_node_state("n2", memory_mib=4096), a_node_state("n3", memory_mib=2048)]
        vms = [a_vm("a", memory="2Gi"), a_vm("b", memory="2Gi"), a_vm("c", memory="2Gi")]
        placed = place_all(a_snapshot(nodes, vms), vms, excluded=GONE)
        assert placed.stranded == {}
        assert sorted(placed.targets.values()) == ["n2", "n2", "n3"]

    def test_what_does_not_fit_is_named_with_the_reason(self) -> None:
        nodes = [a_node_state("n1"), a_node_state("n2", memory_mib=1024), a_node_state("n3", cordoned=True)]
        vms = [a_vm("big", memory="2Gi")]
        placed = place_all(a_snapshot(nodes, vms), vms, excluded=GONE)
        assert placed.stranded[key("big")] == "0/3 nodes: 1 cordoned, 1 short of 2048 MiB memory, 1 where it runs"

    def test_the_important_ones_are_not_left_out(self) -> None:
        nodes = [a_node_state("n1"), a_node_state("n2", memory_mib=2048)]
        vms = [a_vm("big", memory="2Gi"), a_vm("dear", memory="1Gi", spec={"priority": 10})]
        placed = place_all(a_snapshot(nodes, vms), vms, excluded=GONE, starting=True)
        assert list(placed.stranded) == [key("big")]

    def test_filling_up_is_tried_where_spreading_strands_one(self) -> None:
        nodes = [
            a_node_state("n1"),
            a_node_state("n2", memory_mib=3072, cpu=64_000),
            a_node_state("n3", memory_mib=3000),
        ]
        vms = [a_vm("a", memory="1Gi", spec={"priority": 9}), a_vm("b", memory="3Gi")]
        placed = place_all(a_snapshot(nodes, vms), vms, excluded=GONE, starting=True)
        assert placed.targets == {key("a"): "n3", key("b"): "n2"}

    def test_those_that_stay_apart_do_so_in_one_plan(self) -> None:
        apart: dict[str, Any] = {"labels": {"app": "web"}, "spec": keep_apart(app="web")}
        nodes = [a_node_state(f"n{i}") for i in range(1, 4)]
        vms = [a_vm("web-1", **apart), a_vm("web-2", node="n2", **apart)]
        snapshot = a_snapshot(nodes, vms)
        assert place_all(snapshot, vms[:1], excluded=GONE).targets == {key("web-1"): "n3"}
        both = place_all(snapshot, vms, excluded=GONE, starting=True)
        assert set(both.targets.values()) == {"n2", "n3"}

    def test_who_wants_company_goes_after_it(self) -> None:
        nodes = [a_node_state(f"n{i}") for i in range(1, 4)]
        vms = [a_vm("app", memory="4Gi", spec=keep_near(role="db")), a_vm("db", labels={"role": "db"})]
        placed = place_all(a_snapshot(nodes, vms), vms, excluded=GONE, starting=True)
        assert list(placed.targets) == [key("db"), key("app")]
        assert len(set(placed.targets.values())) == 1

    def test_one_that_runs_nowhere_is_started_on_its_home_only(self) -> None:
        vm = a_vm("a", node="", phase=VmPhase.STOPPED, needs=None)
        assert place_all(a_snapshot([a_node_state("n2")], [vm]), [vm], excluded=GONE, starting=True).targets == {
            key("a"): "n2"
        }

    @pytest.mark.parametrize("starting", [False, True])
    def test_nothing_to_place(self, starting: bool) -> None:
        placed = place_all(a_snapshot([a_node_state("n1")]), [], excluded=GONE, starting=starting)
        assert (placed.targets, placed.stranded) == ({}, {})
