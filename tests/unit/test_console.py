"""What the console shows, and whom its guard lets through: without a browser and without Redis."""

import asyncio
import re
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import pytest
from starlette.datastructures import Headers

from orchestrator.console.charts import Mark, Sample, dirty_rates, migration_charts, sample_of, timeline
from orchestrator.console.guard import is_own_origin
from orchestrator.console.herd_view import HerdNow, drained_share, marks, node_map, node_row, preview
from orchestrator.console.live import SAMPLED, Samples
from orchestrator.console.pages import windows
from orchestrator.console.rows import (
    PAGE,
    Wanted,
    facts,
    in_order,
    list_vms,
    offered,
    operation_row,
    placement,
    waiting_changes,
)
from orchestrator.console.signing_in import login_page, same_text
from orchestrator.planner.drain import DrainPlan, Job, Planned
from orchestrator.planner.flow import say
from orchestrator.resources import (
    Key,
    NodeDrain,
    NodeFencing,
    ObjectMeta,
    OperationPhase,
    Priority,
    Reason,
    RunPolicy,
    VmPhase,
)
from orchestrator.resources.drain import DrainPhase, DrainStatus, VmDrain, VmState
from orchestrator.resources.fencing import Evidence, FenceLevel, FencePhase, NodeFencingStatus
from orchestrator.resources.vm import Change
from orchestrator.services.overview import NodeLoad
from orchestrator.services.use import Use
from tests.builders import NOW, a_node, a_vm, an_operation

FIGURES = "TimeElapsed={0:.1f}s DataProcessed={1:.1f}MiB DataRemaining={2:.1f}MiB DataTotal=1024.0MiB Iteration=2 "
FIGURES += "AutoConvergeThrottle={3}%"


# --- the list of VMs --------------------------------------------------------------------------------------------------


def test_a_page_of_the_list_has_fifty_and_says_which() -> None:
    vms = [a_vm(f"vm-{number:03}") for number in range(2 * PAGE + 7)]
    shown = list_vms(vms, Wanted(page=2), {}, may=True)
    assert [row["name"] for row in shown.rows] == [vm.name for vm in vms[2 * PAGE :]]
    assert (shown.range, shown.pages, shown.total) == ("101-107 of 107", 3, 107)
    assert list_vms(vms, Wanted(page=99), {}, may=True).page == 2, "what is gone is no empty page"
    assert list_vms([], Wanted(), {}, may=True).range == "none"


def test_the_list_is_searched_and_filtered() -> None:
    vms = [
        a_vm("web-1", node="n1").with_status(ip_address="192.0.2.17"),
        a_vm("web-2", node="n2"),
        a_vm("db-1", node="n2", phase=VmPhase.STOPPED),
    ]

    def names(**wanted: str) -> list[str]:
        return [row["name"] for row in list_vms(vms, Wanted(**wanted), {}, may=True).rows]  # type: ignore[arg-type]

    assert names(search="WEB ") == ["web-1", "web-2"]
    assert names(search="2.17") == ["web-1"]
    assert names(phase="Stopped") == ["db-1"]
    assert names(node="n2", search="web") == ["web-2"]
    whole = list_vms(vms, Wanted(phase="Stopped"), {}, may=True)
    assert (whole.nodes, whole.phases) == (("n1", "n2"), {"Running": 2, "Stopped": 1}), "all that can be chosen"


def test_who_may_do_nothing_is_offered_nothing() -> None:
    vm = a_vm()
    assert list_vms([vm], Wanted(), {}, may=False).rows[0]["actions"] == []
    assert [one["name"] for one in offered(vm)] == ["Start", "Stop", "Restart", "Migrate"]


@pytest.mark.parametrize(
    ("phase", "policy", "enabled"),
    [
        (VmPhase.RUNNING, RunPolicy.MANUAL, {"Stop", "Restart", "Migrate"}),
        (VmPhase.RUNNING, RunPolicy.ALWAYS_ON, {"Restart", "Migrate"}),
        (VmPhase.STOPPED, RunPolicy.MANUAL, {"Start"}),
        (VmPhase.STOPPED, RunPolicy.ALWAYS_OFF, set()),
        (VmPhase.MIGRATING, RunPolicy.MANUAL, set()),
    ],
)
def test_the_menu_offers_what_admission_would_take(phase: VmPhase, policy: RunPolicy, enabled: set[str]) -> None:
    vm = a_vm(phase=phase, policy=policy)
    assert {one["name"] for one in offered(vm) if one["enabled"]} == enabled


def test_a_row_has_progress_only_while_something_is_under_way() -> None:
    vm = a_vm()
    assert list_vms([vm], Wanted(), {vm.key: 45}, may=True).rows[0]["progress"] == 45
    assert list_vms([vm], Wanted(), {}, may=True).rows[0]["progress"] is None


def test_what_waits_for_a_restart_is_told_with_both_values() -> None:
    change = Change(path="spec.memory.size", operation="replace", current_value="1Gi", desired_value="2Gi")
    vm = a_vm().with_status(restart_awaiting_changes=(change,))
    assert waiting_changes(vm) == [("spec.memory.size", "1Gi → 2Gi")]
    assert list_vms([vm], Wanted(), {}, may=True).rows[0]["restart"] is True


def test_a_vms_page_tells_its_configuration_and_place() -> None:
    vm = a_vm(memory="2Gi", cores=4, fraction="50%", selector={"zone": "a"})
    assert dict(facts(vm))["CPU"] == "4 cores, 50% of each reserved"
    assert dict(facts(vm))["Memory"] == "2Gi (2Gi)"
    assert dict(placement(vm))["Node selector"] == "zone=a"
    assert dict(placement(vm))["Node"] == "n1"


def test_operations_under_way_come_first_and_only_active_ones_can_be_aborted() -> None:
    waiting = an_operation("later").with_(created_version=5)
    done = an_operation("done").with_status(phase=OperationPhase.COMPLETED)
    assert operation_row(waiting, may=True)["abort"] is True
    assert operation_row(waiting, may=False)["abort"] is False
    assert operation_row(done, may=True)["abort"] is False
    first = an_operation("first").with_(created_version=2)
    assert [one.name for one in in_order([waiting, first])] == ["first", "later"]


# --- plots ------------------------------------------------------------------------------------------------------------


def told(*figures: float) -> Sample | None:
    return sample_of(say(an_operation(), Reason.SYNCING, FIGURES.format(*figures), NOW))


def test_figures_are_read_as_the_node_tells_them() -> None:
    assert told(5, 300, 500, 20) == Sample(5.0, 300.0, 500.0, 20.0)
    assert sample_of(say(an_operation(), Reason.MIGRATION_PENDING, "waits to be granted", NOW)) is None


def test_the_dirty_rate_is_what_is_left_beyond_what_was_sent() -> None:
    samples = [Sample(1, 100, 900, 0), Sample(2, 200, 850, 0), Sample(4, 400, 650, 0)]
    assert dirty_rates(samples) == [(2, 50.0), (4, 0.0)]


def test_a_plot_is_made_of_numbers_alone_and_says_its_last_value() -> None:
    charts = dict(migration_charts([Sample(0, 0, 1024, 0), Sample(10, 900, 124, 30)]))
    assert list(charts) == ["Data left, MiB", "Dirty rate, MiB/s", "Throttle, %"]
    assert 'aria-label="Data left, MiB: 124 MiB after 10 s"' in charts["Data left, MiB"]
    assert len(re.search(r'points="([^"]+)"', charts["Throttle, %"])[1].split()) == 2  # type: ignore[index]
    assert "no figures yet" in migration_charts([])[0][1]


def test_samples_are_bounded_and_begin_anew_with_another_attempt() -> None:
    samples = Samples()
    for seconds in (1.0, 2.0, 2.0, 1.0):
        samples.take(say(an_operation(), Reason.SYNCING, FIGURES.format(seconds, 1, 1, 0), NOW))
    assert [one.elapsed_s for one in samples.of(an_operation().key)] == [1.0]
    for number in range(SAMPLED):
        samples.take(say(an_operation(f"op-{number}"), Reason.SYNCING, FIGURES.format(1, 1, 1, 0), NOW))
    assert samples.of(an_operation().key) == [], "the oldest went"


def test_the_day_shows_migrations_fencings_and_moves_in_their_lanes_and_no_names_as_markup() -> None:
    began, ended = NOW - timedelta(hours=2), NOW - timedelta(hours=1)
    person = an_operation("a").with_status(started_at=began, finished_at=ended, phase=OperationPhase.COMPLETED)
    balance = an_operation("b", priority=Priority.BALANCE).with_status(started_at=began, phase=OperationPhase.FAILED)
    old = an_operation("c").with_status(started_at=NOW - timedelta(hours=30), finished_at=NOW - timedelta(hours=29))
    evidence = Evidence(level=FenceLevel.BMC, text="off", at=began, epoch=1)
    fencing = NodeFencing(metadata=ObjectMeta(name="n1"), status=NodeFencingStatus(evidence=evidence))
    found = marks([person, balance, old], [fencing], [], [], NOW)
    assert sorted((mark.lane, mark.bad) for mark in found) == [
        ("Fencings", True),
        ("Migrations", False),
        ("Moves", True),
    ]
    drawn = timeline([*found, Mark(NOW, None, "Moves", "<script>")], NOW)
    assert "1 migrations, 1 fencings, 2 moves" in drawn
    assert "<script>" not in drawn


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("succeeds", [True, False])
def test_what_was_confirmed_can_not_be_confirmed_again_while_it_is_under_way(
    monkeypatch: pytest.MonkeyPatch, *, succeeds: bool
) -> None:
    button, window, redraw = Mock(), Mock(), Mock()
    states: list[str] = []
    button.enable.side_effect = lambda: states.append("enabled")
    button.disable.side_effect = lambda: states.append("disabled")
    window.close.side_effect = lambda: states.append("closed")

    async def work() -> None:
        states.append("works")

    async def attempted(found: Coroutine[Any, Any, object], _done: str) -> bool:
        await found
        return succeeds

    monkeypatch.setattr(windows, "attempt", attempted)
    windows.do_on(button, window, work, "it is done", redraw)
    asyncio.run(button.on_click.call_args.args[0]())
    assert states == ["disabled", "works", "closed" if succeeds else "enabled"]
    assert redraw.called is succeeds


# --- nodes ------------------------------------------------------------------------------------------------------------


def load(name: str = "n1", *, cpu: float = 0.5, status: str = "Ready") -> NodeLoad:
    return NodeLoad(name, status, 3, 10_000, int(cpu * 10_000), 1000, 500, 1, 0)


def draining(phase: DrainPhase) -> NodeDrain:
    vms = {"a": VmDrain(state=VmState.LEFT, memory_mib=300), "b": VmDrain(state=VmState.MOVING, memory_mib=100)}
    return NodeDrain(metadata=ObjectMeta(name="n1"), status=DrainStatus(phase=phase, vms=vms, message="1 of 2 left"))


def test_a_nodes_bar_turns_at_the_line_of_80_percent() -> None:
    at = node_row(a_node("n1"), load(cpu=0.8), None, None, may=True)["cpu"]
    over = node_row(a_node("n1"), load(cpu=0.81), None, None, may=True)["cpu"]
    assert (at["over"], at["percent"], at["text"]) == (False, "80%", "8/10")
    assert over["over"] is True


def test_a_nodes_bars_show_what_is_in_use_as_far_as_its_host_has_told() -> None:
    told = replace(load(), use=Use(0.371, 2048), host_memory_mib=8192)
    row = node_row(a_node("n1"), told, None, None, may=True)
    assert (row["cpu"]["used"], row["cpu"]["inUse"]) == (0.371, "37% in use")
    assert (row["memory"]["used"], row["memory"]["inUse"]) == (0.25, "25% in use")
    silent = node_row(a_node("n1"), load(), None, None, may=True)
    assert (silent["cpu"]["used"], silent["memory"]["inUse"]) == (None, "")


def test_a_node_can_be_drained_or_uncordoned_as_it_stands() -> None:
    def buttons(*, cordoned: bool, drain: NodeDrain | None, may: bool = True) -> tuple[bool, bool]:
        row = node_row(a_node("n1", cordoned=cordoned), load(), drain, None, may=may)
        return row["canDrain"], row["canUncordon"]

    assert buttons(cordoned=False, drain=None) == (True, False)
    assert buttons(cordoned=True, drain=draining(DrainPhase.DRAINING)) == (False, True)
    assert buttons(cordoned=True, drain=draining(DrainPhase.DRAINED)) == (True, True)
    assert buttons(cordoned=True, drain=None, may=False) == (False, False)


def test_a_drain_says_how_much_has_left_by_memory() -> None:
    row = node_row(a_node("n1", cordoned=True), load(), draining(DrainPhase.DRAINING), None, may=True)
    assert (row["drain"], row["drained"]) == ("Draining: 1 of 2 left", 75)
    assert drained_share(NodeDrain(metadata=ObjectMeta(name="n1"))) == 0
    over = node_row(a_node("n1"), load(), draining(DrainPhase.DRAINED), None, may=True)
    assert over["drain"] == "", "what is over is not told of a node that takes VMs"


def test_a_nodes_fencing_is_told_as_far_as_it_is() -> None:
    status = NodeFencingStatus(phase=FencePhase.UNCONFIRMED, reason="NoAnswer")
    fencing = NodeFencing(metadata=ObjectMeta(name="n1"), status=status)
    row = node_row(a_node("n1"), load(), None, fencing, may=True)
    assert (row["fencing"], row["fencingShade"]) == ("FenceUnconfirmed (NoAnswer)", "negative")
    assert node_row(a_node("n1"), load(), None, None, may=True)["fencing"] == "off"


def test_a_plan_tells_where_each_goes_and_what_does_not_fit() -> None:
    move = Planned(Job(Key("default/a"), "n1", "n2", 2048, 90), 30, 120)
    plan = DrainPlan((move,), {Key("default/b"): "too little memory"}, {Key("default/c"): "has a host device"})
    shown = preview("n1", plan)
    assert shown.headline == "n1: 1 VM, 2Gi, about 2m"
    assert [(row["vm"], row["to"], row["begins"], row["takes"]) for row in shown.rows] == [
        ("default/a", "n2", "30s", "90s")
    ]
    assert shown.notes == ("default/c can't migrate, and is waited for: has a host device",)
    assert "b (too little memory)" in shown.problem
    assert preview("n1", DrainPlan()).headline == "n1: nothing has to be moved"


def test_the_map_marks_what_is_lost_cordoned_and_too_full() -> None:
    loads = [load("n1", cpu=0.9), load("n2", status="NotReady"), load("n3", cpu=0.1, status="Ready,SchedulingDisabled")]
    drawn = node_map(HerdNow(1, {one.name: one for one in loads}, {}, 0, 0))
    assert re.findall(r'class="([^"]+)" title="(n\d)', drawn) == [("over", "n1"), ("down", "n2"), ("l0 off", "n3")]
    assert 'aria-label="3 nodes, 2 Ready, 1 above 80 % of CPU"' in drawn


# --- the guard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        ({"host": "api.example:8080", "origin": "https://api.example:8080"}, True),
        ({"host": "api.example", "origin": "https://api.example"}, True),
        ({"host": "api.example", "origin": "https://elsewhere.example"}, False),
        ({"host": "api.example", "origin": "https://api.example.elsewhere.example"}, False),
        ({"host": "api.example", "origin": "null"}, False),
        ({"host": "api.example"}, False),
        ({}, False),
    ],
)
def test_only_a_page_of_this_server_may_send_forms_and_open_sockets(
    headers: Mapping[str, str], *, is_own: bool
) -> None:
    assert is_own_origin(Headers(headers)) is is_own


def test_an_empty_token_of_a_form_is_nobodys() -> None:
    assert same_text("a", "a")
    assert not same_text("", "")
    assert not same_text("a", "b")


def test_the_page_to_sign_in_holds_no_markup_of_others() -> None:
    body = bytes(login_page("/console/login", "x", 'no <b> & "c"', 401).body).decode()
    assert "no &lt;b&gt; &amp; &quot;c&quot;" in body
