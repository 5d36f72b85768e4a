"""DESIGN.md's table of how an operation ended, row by row; and what must hold for every pair of readings."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner.settlement import Settled, Verdict, settle_migration, settle_start
from orchestrator.resources import Reading
from tests.builders import a_reading

STATES = (
    "",
    "running",
    "paused",
    "incoming",
    "paused-migrated",
    "postcopy",
    "postcopy-failed",
    "shutdown",
    "crashed",
    "shutoff",
)
RUNS = {"running", "postcopy"}
PAIRS = list(itertools.product(STATES, STATES, (False, True), (False, True)))
"""States of source and target, whether a job is active on the source, whether the target's copy ran."""


def settle(source: str, target: str, *, job: bool = False, target_ran: bool = False) -> Settled:
    return settle_migration(a_reading(source, job=job), a_reading(target), target_ran=target_ran)


class TestTheTable:
    def test_running_with_a_job_and_incoming_is_adopted(self) -> None:
        assert settle("running", "incoming", job=True).verdict is Verdict.ADOPT

    def test_running_and_absent_failed(self) -> None:
        assert settle("running", "").verdict is Verdict.BACK

    def test_one_that_crashed_and_is_kept_is_back_where_it_was(self) -> None:
        assert settle("crashed", "").verdict is Verdict.BACK
        settled = settle("crashed", "incoming")
        assert (settled.verdict, settled.on_source, settled.expect) == (Verdict.REPAIR, False, ("incoming",))

    def test_running_and_incoming_without_a_job_cleans_the_target(self) -> None:
        settled = settle("running", "incoming")
        assert (settled.verdict, settled.on_source, settled.resume) == (Verdict.REPAIR, False, False)
        assert settled.expect == ("incoming",)

    @pytest.mark.parametrize("source", ["", "shutoff"])
    def test_absent_and_running_is_done(self, source: str) -> None:
        assert settle(source, "running").verdict is Verdict.DONE

    def test_paused_after_switch_over_and_running_destroys_the_sources_copy(self) -> None:
        settled = settle("paused-migrated", "running")
        assert (settled.verdict, settled.on_source, settled.resume) == (Verdict.REPAIR, True, False)
        assert settled.expect == ("paused-migrated",)  # one that was resumed meanwhile is left alone

    def test_running_on_both_is_critical_and_looked_at_twice_before_the_sources_copy_goes(self) -> None:
        settled = settle("running", "running")
        assert (settled.verdict, settled.on_source, settled.resume) == (Verdict.REPAIR, True, False)
        assert settled.critical
        assert settled.confirm

    @pytest.mark.parametrize("source", ["paused", "paused-migrated"])
    def test_paused_and_absent_resumes_on_the_source(self, source: str) -> None:
        settled = settle(source, "")
        assert (settled.verdict, settled.on_source, settled.resume) == (Verdict.REPAIR, True, True)
        assert settled.confirm

    def test_but_not_when_the_targets_copy_ran(self) -> None:
        settled = settle("paused-migrated", "", target_ran=True)
        assert (settled.verdict, settled.on_source, settled.resume) == (Verdict.REPAIR, True, False)
        assert settled.confirm

    @pytest.mark.parametrize(
        ("source", "target"), [("postcopy-failed", "postcopy-failed"), ("postcopy-failed", "running"), ("postcopy", "")]
    )
    def test_failed_post_copy_is_a_persons(self, source: str, target: str) -> None:
        assert settle(source, target).verdict is Verdict.PERSON

    def test_on_neither_the_guest_ended(self) -> None:
        settled = settle("", "")
        assert settled.verdict is Verdict.GONE
        assert settled.confirm  # a domain can be absent from both for a moment


class TestEveryPair:
    @pytest.mark.parametrize(("source", "target", "job", "ran"), PAIRS)
    def test_has_a_verdict_that_says_why(self, source: str, target: str, job: bool, ran: bool) -> None:
        settled = settle(source, target, job=job, target_ran=ran)
        assert settled.verdict in Verdict
        assert settled.why
        assert bool(settled.expect) == (settled.verdict is Verdict.REPAIR)

    def test_a_running_copy_is_destroyed_only_when_the_other_runs_too_and_after_a_second_look(self) -> None:
        for source, target, job, ran in PAIRS:
            settled = settle(source, target, job=job, target_ran=ran)
            if settled.verdict is Verdict.REPAIR and not settled.resume and RUNS & set(settled.expect):
                assert (source, target) == ("running", "running")
                assert settled.on_source
                assert settled.confirm

    def test_the_source_is_resumed_only_when_the_target_runs_nothing_and_never_did(self) -> None:
        for source, target, job, ran in PAIRS:
            settled = settle(source, target, job=job, target_ran=ran)
            if settled.resume:
                assert settled.on_source
                assert target in {"", "shutoff"}
                assert not job
                assert settled.confirm
                assert not (ran and source == "paused-migrated")

    def test_a_repair_is_for_a_state_that_was_read(self) -> None:
        for source, target, job, ran in PAIRS:
            settled = settle(source, target, job=job, target_ran=ran)
            if settled.verdict is Verdict.REPAIR:
                assert (source if settled.on_source else target) in settled.expect

    def test_it_is_done_or_back_only_when_one_side_has_it_and_the_other_has_nothing(self) -> None:
        for source, target, job, ran in PAIRS:
            verdict = settle(source, target, job=job, target_ran=ran).verdict
            if verdict is Verdict.DONE:
                assert source in {"", "shutoff"}
                assert target in {"running", "paused"}
                assert not job
            if verdict is Verdict.BACK:
                assert source in {"running", "crashed"}
                assert target in {"", "shutoff"}
                assert not job

    def test_nothing_is_concluded_or_repaired_while_a_job_runs(self) -> None:
        for source, target, _, ran in PAIRS:
            verdict = settle(source, target, job=True, target_ran=ran).verdict
            assert verdict in {Verdict.ADOPT, Verdict.ASK_AGAIN, Verdict.PERSON}

    def test_it_ended_only_where_no_copy_is_left(self) -> None:
        for source, target, job, ran in PAIRS:
            if settle(source, target, job=job, target_ran=ran).verdict is Verdict.GONE:
                assert {source, target} <= {"", "shutoff"}


class TestStarts:
    @pytest.mark.parametrize(
        ("reading", "verdict"),
        [
            pytest.param(a_reading(""), Verdict.BACK, id="absent"),
            pytest.param(a_reading("shutoff"), Verdict.BACK, id="only defined"),
            pytest.param(a_reading("running"), Verdict.DONE, id="running"),
            pytest.param(a_reading("paused"), Verdict.DONE, id="paused"),
            pytest.param(a_reading("running", incarnation=2), Verdict.PERSON, id="another incarnation"),
            pytest.param(a_reading("running", incarnation=0), Verdict.PERSON, id="not ours"),
            pytest.param(a_reading("shutdown"), Verdict.DONE, id="started, and on its way down"),
        ],
    )
    def test_verdicts(self, reading: Reading, verdict: Verdict) -> None:
        assert settle_start(reading, 1).verdict is verdict

    @given(st.sampled_from(STATES), st.integers(0, 3), st.integers(1, 3))
    def test_it_did_not_take_place_only_where_nothing_runs(self, state: str, found: int, wanted: int) -> None:
        settled = settle_start(a_reading(state, incarnation=found), wanted)
        assert settled.why
        if settled.verdict is Verdict.BACK:  # the start is tried again, on another node
            assert state in {"", "shutoff"}
        if settled.verdict is Verdict.DONE:
            assert found == wanted


def test_readings_take_the_agents_answer() -> None:
    answer: dict[str, Any] = {"present": True, "state": "running", "job": False, "incarnation": 1, "downtimeMs": 12}
    assert Reading.model_validate({**answer, "counter": 7}).downtime_ms == 12
