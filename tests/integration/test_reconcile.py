"""What reconcile and housekeeping make good, and what they must not do too often."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from orchestrator.errors import Conflict
from orchestrator.queues import lifecycle_queue, migrate_queue
from orchestrator.resources import GrantState, OperationPhase, OperationType, RunPolicy
from orchestrator.services import reconcile, vms
from orchestrator.services.housekeeping import remove_old_operations
from orchestrator.store import keys
from tests.builders import a_vm, an_operation
from tests.fakes import Stage


class TestSendingAgain:
    def test_what_is_still_in_the_queue_is_not_sent_again(self, stage: Stage) -> None:
        """A node whose workers are away for a day must not find a message for each two seconds of it."""
        stage.add_vm("a", "n1")
        operation = stage.evict("a")
        stage.grant()
        stage.store.redis.lpush(migrate_queue("n1"), "the first one")
        stage.expire(keys.AWAITING, operation.key)
        stage.reconcile()
        assert stage.outbox.take() == []
        stage.store.redis.delete(migrate_queue("n1"))
        stage.expire(keys.AWAITING, operation.key)  # it is looked at again
        stage.reconcile()
        assert len(stage.outbox.take()) == 1

    def test_nor_is_a_repair(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        operation = stage.evict("a")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.nodes["n1"].domains[grant.uuid].job = False
        stage.nodes["n1"].end(grant, "failed")
        stage.read()
        for node in stage.nodes.values():
            node.answer()
        stage.read()
        assert len(stage.outbox.take()) == 1  # destroy the target's copy
        stage.store.redis.lpush(lifecycle_queue("n2"), "the first one")
        stage.expire(keys.AWAITING, operation.key)
        stage.reconcile()
        assert stage.outbox.take() == []


def test_one_operation_that_is_always_changed_does_not_hold_up_the_others(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, node in (("a", "n1"), ("b", "n2")):
        stage.add_vm(name, node)
    first, second = stage.evict("a"), stage.evict("b")
    messages = stage.grant()
    press = reconcile._press

    def busy(ctx: Any, key: str) -> None:
        if key == first.key:
            raise Conflict("changed meanwhile")
        press(ctx, key)

    monkeypatch.setattr(reconcile, "_press", busy)
    for operation in (first, second):
        stage.expire(keys.AWAITING, operation.key)
    stage.reconcile()
    assert stage.outbox.take() == messages[1:]


def test_a_timer_that_was_set_meanwhile_is_not_removed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconcile finds a settlement, which needs no deadline; before it says so, the job is adopted, which needs one."""
    stage.add_vm("a", "n1")
    operation = stage.evict("a")
    (message,) = stage.grant()
    grant = stage.nodes["n1"].begin(message)
    assert grant is not None
    stage.read()
    stage.expire(keys.DEADLINES, operation.key)
    stage.reconcile()  # settling begins
    stage.store.redis.zadd(keys.DEADLINES, {operation.key: 0})
    find = stage.store.find
    looked: list[str] = []

    def find_and_be_late(kind: Any, key: str) -> Any:
        found = find(kind, key)
        if key == operation.key and not looked:
            looked.append(key)
            for node in stage.nodes.values():
                node.answer()
            stage.read()
        return found

    monkeypatch.setattr(stage.store, "find", find_and_be_late)
    stage.reconcile()
    adopted = stage.operation(operation).status.grant
    assert adopted is not None
    assert adopted.adopt
    assert stage.store.redis.zscore(keys.DEADLINES, operation.key) is not None


def test_a_grant_that_was_renewed_meanwhile_is_not_suspect(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress changes no document: that it came between reconcile's look and its commit is seen by the timer alone."""
    stage.add_vm("a", "n1")
    operation = stage.evict("a")
    (message,) = stage.grant()
    grant = stage.nodes["n1"].begin(message)
    assert grant is not None
    stage.read()
    stage.expire(keys.DEADLINES, operation.key)
    has_unread = reconcile._has_unread

    def look_and_be_late(ctx: Any, node: str) -> bool:
        found = has_unread(ctx, node)
        stage.nodes["n1"].progress(grant, 0)
        stage.read()
        return found

    monkeypatch.setattr(reconcile, "_has_unread", look_and_be_late)
    stage.reconcile()
    renewed = stage.operation(operation).status.grant
    assert renewed is not None
    assert renewed.state is GrantState.RUNNING


class TestRestarts:
    def stopped(self, stage: Stage, how: str, reason: str = "", **more: Any) -> None:
        vm = stage.add_vm("a", "n1", **more)
        del stage.nodes["n1"].domains[vm.metadata.uid]
        stage.nodes["n1"].tell(vm.metadata.uid, how, reason)
        stage.read()
        assert not stage.vm("a").status.phase.occupies_node
        stage.reconcile()

    @pytest.mark.parametrize(
        ("policy", "how", "reason", "starts"),
        [
            (RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY, "crashed", "", True),
            (
                RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY,
                "shutdown",
                "host",
                True,
            ),  # the node's doing, not the guest's
            (RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY, "shutdown", "guest", False),
            (RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY, "destroyed", "", True),  # by whom is not known: not by hand
            (RunPolicy.ALWAYS_ON, "shutdown", "guest", True),
            (RunPolicy.ALWAYS_ON, "destroyed", "", True),
            (RunPolicy.MANUAL, "crashed", "", False),
            (RunPolicy.ALWAYS_OFF, "crashed", "", False),
        ],
    )
    def test_a_vm_runs_again_as_its_policy_says(
        self, stage: Stage, policy: RunPolicy, how: str, reason: str, starts: bool
    ) -> None:
        self.stopped(stage, how, reason, policy=policy)
        assert [o.spec.type for o in stage.operations()] == [OperationType.START] * starts

    def test_one_that_stops_again_and_again_waits_longer_each_time(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        waits = []
        for _ in range(4):
            node = stage.nodes[stage.vm("a").status.node_name]
            del node.domains[vm.metadata.uid]
            node.tell(vm.metadata.uid, "crashed")
            stage.read()
            stage.reconcile()
            not_before = stage.vm("a").status.not_before
            waits.append(0 if not_before is None else round((not_before - stage.store.now()).total_seconds()))
            if not_before is not None:  # nothing is started before its time, which then comes
                assert not any(o.is_active for o in stage.operations())
                old = stage.vm("a")
                stage.store.must_commit(stage.store.batch().put(old, old.with_status(not_before=stage.store.now())))
                stage.reconcile()
            stage.play(lambda: stage.is_at_rest("a"))
        assert waits == [0, 10, 20, 40]

    def test_a_new_vm_for_which_there_was_no_room_is_tried_again(self, stage: Stage) -> None:
        vms.create_vm(stage.ctx, a_vm("a"))
        (operation,) = stage.operations()
        failed = operation.with_status(
            phase=OperationPhase.FAILED, finished_at=datetime.now(UTC) - timedelta(minutes=2)
        )
        stage.store.must_commit(stage.store.batch().put(operation, failed))
        stage.reconcile()
        assert len(stage.operations()) == 2


class TestHousekeeping:
    def test_finished_operations_go_after_a_day_and_all_but_ten_of_a_vm_before(self, stage: Stage) -> None:
        def finished(name: str, vm: str, hours: int) -> None:
            operation = an_operation(name, vm, phase=OperationPhase.COMPLETED)
            created = datetime.now(UTC) - timedelta(hours=hours)
            operation = operation.with_(metadata=operation.metadata.with_(creation_timestamp=created))
            stage.store.must_commit(stage.store.batch().create(operation))

        for number in range(14):
            finished(f"often-{number}", "often", 1)
        finished("old", "seldom", 25)
        finished("young", "seldom", 23)
        old = an_operation("pending", "waits")
        stage.store.must_commit(stage.store.batch().create(old))
        assert remove_old_operations(stage.ctx) == 5
        kept = {operation.name for operation in stage.operations()}
        assert kept == {"young", "pending", *(f"often-{number}" for number in range(4, 14))}
        assert remove_old_operations(stage.ctx) == 0


def test_back_off_is_counted_by_redis_and_not_by_a_clock_that_is_wrong(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Intake's machine is an hour ahead: the next attempt must not wait for that hour."""

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(hours=1)

    stage.add_vm("a", "n1")
    operation = stage.evict("a")
    monkeypatch.setattr("orchestrator.services.context.datetime", Ahead)
    for _ in range(2):
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.nodes["n1"].fall_back(grant)
        stage.nodes["n1"].end(grant, "failed")
        for _ in range(3):
            stage.read()
            for node in stage.nodes.values():
                node.answer()
        stage.read()
    not_before = stage.operation(operation).status.not_before
    assert not_before is not None
    assert not_before - datetime.now(UTC) < timedelta(minutes=1)
    assert stage.grant() == []
