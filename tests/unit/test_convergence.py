"""What is foreseen of a migration, and what may be done about one that does not end."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.planner.convergence import (
    DOWNTIME_S,
    SAMPLING_SEES,
    PolicyConflict,
    completion_time,
    describe_outcome,
    describe_prediction,
    is_converging,
    measured,
    measured_at_end,
    predict,
    sample_s,
    throttles,
)
from orchestrator.planner.migration import Fail, plan_grants
from orchestrator.resources import Key, Reason
from orchestrator.resources.vm import LiveMigrationPolicy
from orchestrator.resources.vmop import MigrationOutcome, Prediction
from orchestrator.settings import Settings
from tests.builders import a_node_state, a_reading, a_snapshot, a_vm, an_operation

SAFE, PREFER_SAFE = LiveMigrationPolicy.ALWAYS_SAFE, LiveMigrationPolicy.PREFER_SAFE
FORCED, PREFER_FORCED = LiveMigrationPolicy.ALWAYS_FORCED, LiveMigrationPolicy.PREFER_FORCED

memories = st.floats(1, 2**22)
links = st.floats(1, 10_000)
rates = st.floats(0, 100_000)


class TestThrottling:
    @pytest.mark.parametrize(
        ("policy", "force", "expected"),
        [
            (SAFE, None, False),
            (SAFE, False, False),
            (PREFER_SAFE, None, False),
            (PREFER_SAFE, False, False),
            (PREFER_SAFE, True, True),
            (FORCED, None, True),
            (FORCED, True, True),
            (PREFER_FORCED, None, True),
            (PREFER_FORCED, True, True),
            (PREFER_FORCED, False, False),
        ],
    )
    def test_policy_and_force(self, policy: LiveMigrationPolicy, force: bool | None, expected: bool) -> None:
        assert throttles(policy, force) is expected

    @pytest.mark.parametrize(("policy", "force"), [(SAFE, True), (FORCED, False)])
    def test_what_rules_each_other_out_fails_the_operation(self, policy: LiveMigrationPolicy, force: bool) -> None:
        conflict = throttles(policy, force)
        assert isinstance(conflict, PolicyConflict)
        assert policy.value in conflict.message
        vm = a_vm()
        vm = vm.with_(spec=vm.spec.with_(live_migration_policy=policy))
        nodes = (a_node_state("n1"), a_node_state("n2"))
        (decision,) = plan_grants(a_snapshot(nodes, (vm,), (an_operation(force=force),)))
        assert isinstance(decision, Fail)
        assert (decision.reason, decision.message) == (
            Reason.NOT_APPLICABLE_FOR_LIVE_MIGRATION_POLICY,
            conflict.message,
        )


class TestPrediction:
    @pytest.mark.parametrize(
        ("memory", "rate", "bandwidth", "duration", "converges"),
        [
            (1000, 0, 100, 10.0, True),  # one pass, and nothing is left
            (1000, None, 100, 10.0, None),
            (20, None, 100, 0.2, True),  # it fits into the downtime
            (20, 500, 100, 0.2, True),
            (1000, 40, 100, 20.0, True),  # taken as 50: 10 + 5 + 2.5 ... until 0.3 s are left, these included
            (1000, 79, 100, 776.4, True),  # taken as 98.75: 10 s 77.6 times over
            (1000, 80, 100, None, None),  # between what was measured and a quarter more
            (1000, 99, 100, None, None),
            (1000, 100, 100, None, False),
            (1000, 5000, 100, None, False),
        ],
    )
    def test_table(
        self, memory: float, rate: float | None, bandwidth: float, duration: float | None, converges: bool | None
    ) -> None:
        found = predict(memory, rate, bandwidth)
        assert (found.converges, found.duration_s) == (
            converges,
            pytest.approx(duration, rel=0.02) if duration else None,
        )

    def test_disks_are_copied_before(self) -> None:
        assert predict(1000, 0, 100, disks_mib=5000).duration_s == 60.0

    @given(memories, links, rates)
    def test_it_converges_only_where_less_is_dirtied_than_is_sent(
        self, memory: float, link: float, rate: float
    ) -> None:
        found = predict(memory, rate, link)
        assert (found.duration_s is not None) == (found.converges is True)
        if memory <= link * DOWNTIME_S or rate / SAMPLING_SEES < link:
            assert found.converges is True
        else:
            assert found.converges is (None if rate < link else False)

    @given(memories, links, rates, st.floats(1, 3), st.sampled_from(["memory", "rate", "slower"]))
    def test_more_memory_more_writing_and_a_slower_link_never_make_it_faster(
        self, memory: float, link: float, rate: float, factor: float, what: str
    ) -> None:
        one = predict(memory, rate, link)
        other = {
            "memory": lambda: predict(memory * factor, rate, link),
            "rate": lambda: predict(memory, rate * factor, link),
            "slower": lambda: predict(memory, rate, max(1, link / factor)),
        }[what]()
        if one.duration_s is None:
            assert other.duration_s is None
        elif other.duration_s is not None:
            # A pass more or less: what is sent while the guest is stopped is up to the downtime limit.
            assert other.duration_s >= one.duration_s - DOWNTIME_S - 0.1

    @given(memories, links)
    def test_what_was_not_measured_is_at_least_one_pass(self, memory: float, link: float) -> None:
        found = predict(memory, None, link)
        assert found.duration_s == pytest.approx(memory / link, abs=0.051)
        assert found.converges in {None, True}

    @given(memories, links, st.floats(0.5, 10))
    def test_a_sample_is_a_small_part_of_what_it_foresees(self, memory: float, link: float, wanted: float) -> None:
        sample = sample_s(memory, link, wanted)
        assert sample in {0, wanted}
        assert 3 * sample <= memory / link

    def test_never(self) -> None:
        assert sample_s(2**30, 1, 0) == 0


class TestConverging:
    @pytest.mark.parametrize(
        ("stalled", "throttle", "auto_converge", "expected"),
        [
            (9.9, 0, False, True),
            (10.0, 0, False, False),
            (500.0, 20, True, True),  # it may be throttled more
            (500.0, 98, True, True),
            (10.0, 99, True, False),
            (9.9, 99, True, True),
        ],
    )
    def test_table(self, stalled: float, throttle: int, auto_converge: bool, expected: bool) -> None:
        found = is_converging(stalled_s=stalled, throttle_percent=throttle, auto_converge=auto_converge)
        assert found is expected


class TestSettings:
    @pytest.mark.parametrize("sample", [0.4, -1, 10.5])
    def test_a_sample_that_no_hypervisor_takes_is_refused(self, sample: float) -> None:
        with pytest.raises(ValidationError):
            Settings(dirty_rate_sample=sample)

    @pytest.mark.parametrize("sample", [0, 0.5, 10])
    def test_none_or_half_a_second_to_ten(self, sample: float) -> None:
        assert Settings(dirty_rate_sample=sample).dirty_rate_sample == sample

    def test_they_are_the_platforms(self) -> None:
        settings = Settings()
        found = (settings.completion_timeout_per_gib, settings.progress_timeout, settings.allow_post_copy)
        assert found == (800, 150, False)


class TestTime:
    @pytest.mark.parametrize(
        ("memory", "disks", "per_gib", "seconds", "text"),
        [
            (2048, 0, 20, 40, "20 s per GiB x 2 GiB"),
            (192, 0, 800, 800, "800 s per GiB x 1 GiB"),  # one GiB at least
            (1536, 0, 800, 1200, "800 s per GiB x 1.5 GiB"),
            (1024, 4096, 10, 50, "10 s per GiB x 5 GiB"),
            (1024, 0, 0.01, 1, "0.01 s per GiB x 1 GiB"),  # 0 would be for ever
        ],
    )
    def test_table(self, memory: int, disks: int, per_gib: float, seconds: int, text: str) -> None:
        time = completion_time(memory, per_gib, disks_mib=disks)
        assert (time.seconds, str(time)) == (seconds, text)


outcomes = st.builds(
    MigrationOutcome,
    duration_s=st.floats(0, 1e6),
    downtime_ms=st.none() | st.integers(0, 10_000),
    transferred_mib=st.integers(0, 2**30),
    iterations=st.integers(0, 1000),
    throttle_percent=st.integers(0, 99),
    post_copy=st.booleans(),
)


class TestOutcome:
    @given(st.lists(outcomes, min_size=1, max_size=8))
    def test_no_figure_ever_falls(self, told: list[MigrationOutcome]) -> None:
        known: MigrationOutcome | None = None
        shown: list[MigrationOutcome] = []
        for one in told:
            known = measured(known, one)
            shown.append(known)
        for name in ("duration_s", "transferred_mib", "iterations", "throttle_percent", "post_copy"):
            values = [getattr(outcome, name) for outcome in shown]
            assert values == sorted(values)
            assert values[-1] == max(getattr(outcome, name) for outcome in told)
        downtimes = [outcome.downtime_ms for outcome in told if outcome.downtime_ms is not None]
        assert shown[-1].downtime_ms == (downtimes[-1] if downtimes else None)

    def test_what_the_target_tells_completes_it(self) -> None:
        seen = MigrationOutcome(duration_s=11, transferred_mib=90, iterations=3, throttle_percent=40, post_copy=True)
        reading = a_reading("running", downtime_ms=28, elapsed_ms=10_400, transferred_mib=120, iterations=5)
        assert measured_at_end(seen, reading) == MigrationOutcome(
            duration_s=10.4, downtime_ms=28, transferred_mib=120, iterations=5, throttle_percent=40, post_copy=True
        )

    def test_a_target_that_tells_nothing_takes_nothing_away(self) -> None:
        seen = MigrationOutcome(duration_s=11, iterations=3)
        assert measured_at_end(seen, a_reading("running")) == seen
        assert measured_at_end(None, a_reading("running")) is None


@pytest.mark.parametrize(
    ("prediction", "text"),
    [
        (Prediction(dirty_rate_mib_s=16.04, duration_s=7.4, converges=True), "7.4 s; it dirties 16.0 MiB/s"),
        (
            Prediction(dirty_rate_mib_s=90, converges=False),
            "does not converge by itself; it dirties 90.0 MiB/s",
        ),
        (
            Prediction(dirty_rate_mib_s=19, converges=None),
            "may not converge by itself; it dirties 19.0 MiB/s, about as much as the link carries",
        ),
        (Prediction(duration_s=3.2), "3.2 s or more; its dirty rate is not known"),
    ],
)
def test_a_prediction_in_words(prediction: Prediction, text: str) -> None:
    assert describe_prediction(prediction) == text


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        ({"duration_s": 9.04, "transferred_mib": 210, "iterations": 4}, "9.0 s, 210 MiB sent in 4 passes"),
        (
            {"duration_s": 9, "downtime_ms": 28, "throttle_percent": 40, "post_copy": True},
            "9.0 s, 0 MiB sent in 0 passes, guest stopped for 28 ms, throttled by up to 40%, ended by post-copy",
        ),
    ],
)
def test_an_outcome_in_words(figures: dict[str, Any], text: str) -> None:
    assert describe_outcome(MigrationOutcome(**figures)) == text


def test_the_vm_that_is_meant() -> None:
    """The snapshot's VM is looked up by the operation's, so a conflict is of that VM's own policy."""
    safe, other = a_vm("safe"), a_vm("other")
    safe = safe.with_(spec=safe.spec.with_(live_migration_policy=SAFE))
    nodes = (a_node_state("n1"), a_node_state("n2"))
    snapshot = a_snapshot(nodes, (safe, other), (an_operation(vm="other", force=True),))
    assert Key("default/safe") in snapshot.vms
    (decision,) = plan_grants(snapshot)
    assert not isinstance(decision, Fail)
