"""How a migration is granted, foreseen, told and ended by its deadlines, on real Redis; and what the command shows."""

from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.resources import (
    Event,
    NodeGrant,
    OperationPhase,
    Reason,
    VirtualMachineOperation,
    VmPhase,
    find_condition,
)
from orchestrator.resources.vm import LiveMigrationPolicy
from orchestrator.resources.vmop import POST_COPY_ANNOTATION, MigrationOutcome, Prediction
from orchestrator.store import keys
from tests.fakes import FakeNode, Stage
from tests.integration.command import Vmherd

MIB = 2**20
GIB = 2**30


@pytest.fixture
def stage(redis_url: str) -> Iterator[Stage]:
    """A link that carries a GiB in 102 seconds, and 20 seconds for each GiB."""
    stage = Stage(redis_url, bandwidth_mib_s=10, completion_timeout_per_gib=20, parallel_migration_channels=4)
    stage.add_nodes("n1", "n2", "n3")
    yield stage
    stage.close()


def begun(stage: Stage, vm: str = "a", node: str = "n1") -> tuple[FakeNode, NodeGrant, VirtualMachineOperation]:
    """Evict a VM, and let its node take the grant."""
    operation = stage.evict(vm)
    (message,) = stage.grant()
    grant = stage.nodes[node].begin(message)
    assert grant is not None
    stage.read()
    return stage.nodes[node], grant, stage.operation(operation)


def change(stage: Stage, name: str, annotations: dict[str, str] | None = None, **spec: Any) -> None:
    vm = stage.vm(name)
    new = vm.with_(spec=vm.spec.with_(**spec), metadata=vm.metadata.with_(annotations=annotations or {}))
    stage.store.must_commit(stage.store.batch().put(vm, new))


def said(operation: VirtualMachineOperation) -> str:
    condition = find_condition(operation.status.conditions, "Completed")
    assert condition is not None
    return condition.reason


def told(stage: Stage, operation: VirtualMachineOperation) -> list[str]:
    """The reasons of the events about an operation, in their order."""
    about = [e for e in stage.store.all(Event) if e.involved_object.name == operation.name]
    return [event.reason for event in sorted(about, key=lambda event: event.created_version)]


def figures(elapsed_s: float, left_mib: int, **more: Any) -> dict[str, Any]:
    job = {"elapsed_ms": int(elapsed_s * 1000), "total": GIB, "processed": 300 * MIB, "remaining": left_mib * MIB}
    return {**job, "iteration": 2, "throttle": 0, "stalled_ms": 0, "post_copy": False, **more}


def report(node: FakeNode, kind: str, grant: NodeGrant, **body: Any) -> None:
    node.store.report(kind, {"operation": grant.operation, "epoch": grant.epoch, **body})


class TestGrant:
    def test_it_says_how_long_it_may_take_and_how_it_is_done(self, stage: Stage) -> None:
        stage.add_vm("a", "n1", memory="2Gi")
        _, grant, operation = begun(stage)
        assert (grant.completion_timeout_s, grant.progress_timeout_s, grant.sample_s) == (40, 150, 1)
        assert (grant.bandwidth_mib_s, grant.channels) == (10, 4)
        assert (grant.auto_converge, grant.post_copy) == (False, False)
        assert operation.status.prediction == Prediction(duration_s=204.8)  # of one pass: nothing was measured yet
        assert operation.status.outcome is None

    def test_a_small_one_is_not_measured_and_has_the_time_of_a_gib(self, stage: Stage) -> None:
        stage.add_vm("a", "n1", memory="16Mi")
        _, grant, _ = begun(stage)
        assert (grant.completion_timeout_s, grant.sample_s) == (20, 0)

    @pytest.mark.parametrize(
        ("word", "setting", "expected"),
        [("", False, False), ("true", False, True), ("false", True, False), ("", True, True), ("yes", False, False)],
    )
    def test_post_copy_is_for_who_asks_for_it_and_has_one_connection(
        self, redis_url: str, word: str, setting: bool, expected: bool
    ) -> None:
        stage = Stage(redis_url, allow_post_copy=setting, parallel_migration_channels=4)
        stage.add_nodes("n1", "n2")
        stage.add_vm("a", "n1")
        change(stage, "a", {POST_COPY_ANNOTATION: word} if word else None)
        _, grant, _ = begun(stage)
        stage.close()
        assert (grant.post_copy, grant.channels) == (expected, 1 if expected else 4)

    def test_the_guest_is_throttled_where_its_policy_says_so(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        change(stage, "a", live_migration_policy=LiveMigrationPolicy.PREFER_FORCED)
        _, grant, _ = begun(stage)
        assert grant.auto_converge


class TestForecast:
    def test_what_was_measured_is_foreseen_and_told_before_it_sends(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        node, grant, operation = begun(stage)
        report(node, "Predicted", grant, dirty_rate_mib_s=4.0)
        stage.read()
        operation = stage.operation(operation)
        prediction = operation.status.prediction
        assert prediction is not None
        assert (prediction.dirty_rate_mib_s, prediction.converges) == (4.0, True)
        assert prediction.duration_s == pytest.approx(204, abs=2)  # taken as 5 of 10 MiB/s: twice the first pass
        assert said(operation) == Reason.TARGET_PREPARING
        assert operation.message.endswith(f"foreseen: {prediction.duration_s} s; it dirties 4.0 MiB/s")
        assert told(stage, operation) == ["MigrationStarted", "MigrationPredicted"]

    def test_one_of_another_grant_or_node_counts_for_nothing(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        node, grant, operation = begun(stage)
        report(node, "Predicted", grant.model_copy(update={"epoch": grant.epoch - 1}), dirty_rate_mib_s=4.0)
        report(stage.nodes["n2"], "Predicted", grant, dirty_rate_mib_s=4.0)
        stage.read()
        assert stage.operation(operation) == operation

    @pytest.mark.parametrize("rate", ["fast", None, -1, 1e300, [4]])
    def test_a_rate_that_is_none_is_dropped_and_all_goes_on(self, stage: Stage, rate: Any) -> None:
        stage.add_vm("a", "n1")
        node, grant, operation = begun(stage)
        report(node, "Predicted", grant, dirty_rate_mib_s=rate)
        node.progress(grant, 90)
        stage.read()
        status = stage.operation(operation).status
        assert status.prediction == operation.status.prediction
        assert status.progress > operation.status.progress

    @pytest.mark.parametrize("field", ["elapsed_ms", "processed", "iteration", "throttle"])
    def test_figures_beyond_measure_are_dropped(self, stage: Stage, field: str) -> None:
        stage.add_vm("a", "n1")
        node, grant, operation = begun(stage)
        for wrong in (-1, 2**80, "many"):
            report(node, "Progress", grant, job={**figures(5, 100), field: wrong})
        stage.read()
        assert stage.operation(operation) == operation
        stage.store.load([VirtualMachineOperation])


class TestProgress:
    def test_not_converging_is_said_while_it_lasts(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        node, grant, operation = begun(stage)
        seen = []
        for elapsed, stalled_s in ((1, 0), (2, 9.9), (3, 10), (4, 11), (5, 0)):
            report(node, "Progress", grant, job=figures(elapsed, 500, stalled_ms=int(stalled_s * 1000)))
            stage.read()
            seen.append(said(stage.operation(operation)))
        assert seen == ["Syncing", "Syncing", "NotConverging", "NotConverging", "Syncing"]
        assert told(stage, operation).count("MigrationNotConverging") == 1
        assert stage.operation(operation).status.phase is OperationPhase.IN_PROGRESS  # it informs, it ends nothing
        message = stage.operation(operation).message
        for word in ("TimeElapsed=5.0s", "DataProcessed=300.0MiB", "DataRemaining=500.0MiB", "DataTotal=1024.0MiB"):
            assert word in message
        assert message.endswith("Iteration=2 AutoConvergeThrottle=0%")

    @pytest.mark.parametrize(("throttle", "reason"), [(98, "Syncing"), (99, "NotConverging")])
    def test_one_that_may_be_throttled_more_has_hope(self, stage: Stage, throttle: int, reason: str) -> None:
        stage.add_vm("a", "n1")
        change(stage, "a", live_migration_policy=LiveMigrationPolicy.ALWAYS_FORCED)
        node, grant, operation = begun(stage)
        report(node, "Progress", grant, job=figures(90, 500, stalled_ms=60_000, throttle=throttle))
        stage.read()
        assert said(stage.operation(operation)) == reason

    def test_in_post_copy_it_always_converges(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        node, grant, operation = begun(stage)
        report(node, "Progress", grant, job=figures(90, 500, stalled_ms=60_000, post_copy=True))
        stage.read()
        operation = stage.operation(operation)
        assert said(operation) == "Syncing"
        assert operation.status.outcome is not None
        assert operation.status.outcome.post_copy

    def test_figures_that_are_no_news_wake_no_watcher(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        node, grant, _ = begun(stage)
        report(node, "Progress", grant, job=figures(1, 500))
        stage.read()
        version = stage.store.version()
        for elapsed in range(2, 11):
            report(node, "Progress", grant, job=figures(elapsed, 500))
        stage.read()
        assert stage.store.version() == version
        report(node, "Progress", grant, job=figures(11, 500))
        stage.read()
        assert stage.store.version() > version

    def test_the_switch_over_is_told_by_what_both_hosts_report(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        node, grant, operation = begun(stage)
        report(node, "Progress", grant, job=figures(5, 1))
        node.domains[vm.metadata.uid].state = "paused-migrated"
        node.tell(vm.metadata.uid)
        stage.read()
        shown = stage.operation(operation)
        assert (said(shown), shown.status.progress) == ("SourceSuspended", 91)
        target = stage.nodes[grant.target]
        target.domains[vm.metadata.uid].state = "running"
        target.tell(vm.metadata.uid)
        stage.read()
        shown = stage.operation(operation)
        assert (said(shown), shown.status.progress) == ("TargetResumed", 92)
        assert shown.status.phase is OperationPhase.IN_PROGRESS  # how it ended is asked of both

    def test_a_domain_that_runs_on_the_target_since_before_is_no_switch_over(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        _, grant, operation = begun(stage)
        target = stage.nodes[grant.target]
        target.domains[vm.metadata.uid].state = "running"
        target.domains[vm.metadata.uid].incarnation = 0
        target.tell(vm.metadata.uid)
        stage.read()
        assert stage.operation(operation) == operation


class TestEnd:
    def test_what_was_measured_stands_beside_what_was_foreseen(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        node, grant, operation = begun(stage)
        report(node, "Predicted", grant, dirty_rate_mib_s=4.0)
        report(node, "Progress", grant, job=figures(5, 100, throttle=30))
        node.switch_over(grant)
        report(node, "Ended", grant, end="succeeded", message="", job=figures(8.2, 1, iteration=5))
        stage.play(lambda: stage.operation(operation).status.phase.is_final)
        operation = stage.operation(operation)
        assert operation.status.phase is OperationPhase.COMPLETED
        assert operation.status.prediction is not None
        assert operation.status.prediction.dirty_rate_mib_s == 4.0
        assert operation.status.outcome == MigrationOutcome(
            duration_s=8.2, transferred_mib=300, iterations=5, throttle_percent=30
        )
        told_by_cli = Vmherd(stage.url).ok("describe", "vmop", operation.name).splitlines()
        shown = [line.split(":", 1) for line in told_by_cli if line.startswith(("Predicted:", "Measured:"))]
        assert [(title, text.strip()) for title, text in shown] == [
            ("Predicted", f"{operation.status.prediction.duration_s} s; it dirties 4.0 MiB/s"),
            ("Measured", "8.2 s, 300 MiB sent in 5 passes, throttled by up to 30%"),
        ]

    def test_one_that_was_aborted_at_its_deadline_fails_for_good_and_the_vm_runs_on(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1", memory="2Gi")
        node, grant, operation = begun(stage)
        node.fall_back(grant)
        message = "aborted after 40 s: it did not complete in its time"
        job = figures(40.3, 200, iteration=9)
        report(node, "Ended", grant, end="aborted", message=message, timed_out="completion", job=job)
        stage.play(lambda: stage.operation(operation).status.phase.is_final)
        operation = stage.operation(operation)
        assert (operation.status.phase, said(operation)) == (OperationPhase.FAILED, Reason.OPERATION_FAILED)
        assert operation.message == f"{message} (20 s per GiB x 2 GiB); it runs on node n1"
        assert operation.status.attempts == 1
        assert operation.status.outcome == MigrationOutcome(duration_s=40.3, transferred_mib=300, iterations=9)
        assert "MigrationTimedOut" in told(stage, operation)
        assert stage.vm("a").status.phase is VmPhase.RUNNING
        assert stage.world.running(vm.metadata.uid) == ["n1"]
        assert stage.is_at_rest("a")

    def test_without_progress(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        node, grant, operation = begun(stage)
        node.fall_back(grant)
        message = "aborted after 150 s: what is left to send did not shrink for 150 s"
        report(node, "Ended", grant, end="aborted", message=message, timed_out="progress")
        stage.play(lambda: stage.operation(operation).status.phase.is_final)
        assert stage.operation(operation).message == f"{message}; it runs on node n1"

    def test_the_nodes_word_is_a_hint_only(self, stage: Stage) -> None:
        """It says that it was aborted at its deadline; by both hosts' word the guest has moved."""
        stage.add_vm("a", "n1")
        node, grant, operation = begun(stage)
        node.switch_over(grant)
        report(node, "Ended", grant, end="aborted", message="aborted after 20 s", timed_out="completion")
        stage.play(lambda: stage.operation(operation).status.phase.is_final)
        operation = stage.operation(operation)
        assert (operation.status.phase, operation.message) == (OperationPhase.COMPLETED, f"runs on node {grant.target}")
        assert stage.is_at_rest("a")

    def test_an_ordinary_failure_is_tried_again_and_foreseen_anew(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        node, grant, operation = begun(stage)
        report(node, "Predicted", grant, dirty_rate_mib_s=4.0)
        node.fall_back(grant)
        report(node, "Ended", grant, end="failed", message="no route", job=figures(3, 700))
        stage.play(lambda: stage.operation(operation).status.grant is None)
        assert stage.operation(operation).status.phase is OperationPhase.PENDING
        assert stage.grant()
        status = stage.operation(operation).status
        assert (status.prediction, status.outcome) == (Prediction(duration_s=102.4), None)

    def test_a_setting_that_was_changed_meanwhile_is_not_said_to_be_the_cause(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        node, grant, operation = begun(stage)
        changed = stage.store.config.model_copy(update={"completion_timeout_per_gib": 99.0})
        stage.store.config = changed
        node.fall_back(grant)
        report(node, "Ended", grant, end="aborted", message="aborted after 20 s", timed_out="completion")
        stage.play(lambda: stage.operation(operation).status.phase.is_final)
        assert stage.operation(operation).message == "aborted after 20 s (20 s); it runs on node n1"


def test_what_a_policy_rules_out_fails_and_holds_no_slot(stage: Stage) -> None:
    stage.add_vm("a", "n1")
    operation = stage.evict("a")
    change(stage, "a", live_migration_policy=LiveMigrationPolicy.ALWAYS_SAFE)
    forced = operation.with_(spec=operation.spec.with_(force=True))
    stage.store.must_commit(stage.store.batch().put(operation, forced))
    assert stage.grant() == []
    operation = stage.operation(operation)
    assert (operation.status.phase, said(operation)) == (
        OperationPhase.FAILED,
        Reason.NOT_APPLICABLE_FOR_LIVE_MIGRATION_POLICY,
    )
    assert stage.store.redis.scard(keys.SLOTS_CLUSTER) == 0
