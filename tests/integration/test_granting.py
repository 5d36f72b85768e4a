"""Who is granted what, and when: on real Redis, by real services."""

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import redis

from orchestrator.errors import Invalid
from orchestrator.queues import Task
from orchestrator.resources import (
    Event,
    Node,
    OperationPhase,
    OperationType,
    Priority,
    VirtualMachineOperation,
    VmPhase,
)
from orchestrator.resources.vmop import CELERY_TASK_ANNOTATION, PRIORITY_ANNOTATION
from orchestrator.services import operations
from orchestrator.services.context import Context, wake_grant
from orchestrator.services.granting import grant_pending
from orchestrator.services.herd import Herd
from orchestrator.services.nodes import set_unschedulable
from orchestrator.store import Store, keys
from orchestrator.store.connection import connect
from tests.builders import a_node, a_vm, an_operation, granted_operation
from tests.fakes import Copy, Outbox, Stage
from tests.threads import in_threads


@pytest.fixture
def wide(redis_url: str) -> Iterator[Stage]:
    """Nodes that receive as many as come."""
    stage = Stage(redis_url, inbound_per_node=0)
    stage.add_nodes("n1", "n2", "n3")
    yield stage
    stage.close()


def is_free(stage: Stage, operation: str) -> bool:
    return not stage.store.redis.sismember(keys.SLOTS_CLUSTER, operation)


def wake_ups(stage: Stage) -> int:
    return len(stage.outbox.take(Task.GRANT))


class TestWakeUps:
    def test_many_at_once_are_one(self, stage: Stage) -> None:
        for number in range(20):
            stage.store.must_commit(stage.store.batch().create(a_vm(f"vm{number}", node="n1")))
            stage.evict(f"vm{number}")
        assert wake_ups(stage) == 1

    def test_the_task_takes_the_mark_before_it_looks(self, stage: Stage) -> None:
        """Whoever commits while it plans sends a wake-up of its own."""
        wake_grant(stage.ctx)
        assert wake_ups(stage) == 1
        stage.grant()
        wake_grant(stage.ctx)
        assert wake_ups(stage) == 1

    def test_a_mark_whose_message_was_lost_runs_out(self, stage: Stage) -> None:
        wake_grant(stage.ctx)
        assert 0 < stage.store.redis.pttl(keys.wanted("grant")) <= keys.WANTED_TTL_MS

    def test_what_frees_or_adds_room_wakes_it(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")

        def wakes(action: Any) -> bool:
            stage.forget()
            action()
            return wake_ups(stage) == 1

        assert wakes(lambda: set_unschedulable(stage.ctx, "n2", unschedulable=True))
        assert wakes(lambda: set_unschedulable(stage.ctx, "n2", unschedulable=False))
        assert not wakes(lambda: set_unschedulable(stage.ctx, "n2", unschedulable=False))
        operation = stage.evict("a")
        assert wakes(lambda: operations.delete_operation(stage.ctx, operation.key))
        assert wakes(lambda: stage.evict("a"))
        (message,) = stage.grant()
        stage.deliver(message)
        stage.read()
        for node in stage.nodes.values():
            node.answer()
        assert wakes(stage.read)

    def test_reconcile_wakes_it_for_what_is_pending_and_not_else(self, stage: Stage) -> None:
        stage.reconcile()
        assert wake_ups(stage) == 0
        stage.add_vm("a", "n1")
        stage.evict("a")
        stage.forget()
        stage.reconcile()
        assert wake_ups(stage) == 1


class TestLimits:
    def test_order_sources_and_cap(self, stage: Stage) -> None:
        for name, node in (("a", "n1"), ("b", "n1"), ("c", "n2"), ("d", "n2"), ("e", "n3")):
            stage.add_vm(name, node)
            stage.evict(name)
        assert [message.args[0] for message in stage.grant()] == ["default/a", "default/c", "default/e"]
        waiting = {o.spec.virtual_machine_name: o.message for o in stage.operations() if o.status.grant is None}
        assert waiting == {
            "b": "waits for the outbound slot of node n1",
            "d": "waits for the outbound slot of node n2",
        }

    def test_priorities(self, stage: Stage) -> None:
        for name, priority in (("balance", "3"), ("first", "1"), ("second", "1"), ("person", None)):
            stage.add_vm(name, "n1")
            annotations = {} if priority is None else {PRIORITY_ANNOTATION: priority}
            wanted = operations.new_operation(name, OperationType.EVICT, annotations=annotations)
            operations.create_operation(stage.ctx, wanted)
        order = []
        for _ in range(4):
            (message,) = stage.grant()
            order.append(str(message.args[0]))
            stage.outbox.sent.append(message)
            stage.play(lambda: stage.store.redis.scard(keys.SLOTS_CLUSTER) == 0)
        assert order == ["default/person", "default/first", "default/second", "default/balance"]

    @pytest.mark.parametrize("priority", ["high", "9", "-1", "", "1.0"])
    def test_a_priority_that_is_none_is_refused(self, stage: Stage, priority: str) -> None:
        stage.add_vm("a", "n1")
        wanted = operations.new_operation("a", OperationType.EVICT, annotations={PRIORITY_ANNOTATION: priority})
        with pytest.raises(Invalid, match=r"metadata\.annotations\.vmherd\.dev/priority: must be one of 0, 1, 2, 3"):
            operations.create_operation(stage.ctx, wanted)

    def test_a_herd_that_shrinks_while_slots_are_held(self, wide: Stage) -> None:
        stage = wide
        names = ["a", "b", "c"]
        for name, node in zip(names, ("n1", "n2", "n3"), strict=True):
            stage.add_vm(name, node)
            stage.add_vm(f"{name}-later", node)
            stage.evict(name)
        messages = stage.grant()
        hosts = [stage.nodes[message.queue.split(".")[1]] for message in messages]
        grants = [host.begin(message) for host, message in zip(hosts, messages, strict=True)]
        stage.read()
        for name in ("n1", "n2"):
            set_unschedulable(stage.ctx, name, unschedulable=True)  # the cap is 1 now, and 3 run
        for name in names:
            stage.evict(f"{name}-later")
        assert stage.grant() == []
        assert stage.store.redis.scard(keys.SLOTS_CLUSTER) == 3  # nobody is stopped
        for host, grant in zip(hosts, grants, strict=True):
            assert grant is not None
            assert stage.grant() == []
            host.switch_over(grant)
            host.end(grant)
            stage.play(partial(is_free, stage, grant.operation))
        assert len(stage.grant()) == 1

    def test_two_workers_at_once_grant_each_once(self, wide: Stage) -> None:
        stage = wide
        for number in range(12):
            stage.add_vm(f"vm{number}", f"n{number % 3 + 1}")
            stage.evict(f"vm{number}")
        outbox = Outbox()

        def run(_: int) -> None:
            ctx = Context(Store(connect(stage.url), stage.store.config), outbox)
            herd = Herd(ctx.store).start()
            for _ in range(3):
                grant_pending(ctx, herd)
            herd.stop()

        in_threads(4, run)
        assert len(outbox.take(Task.NODE_MIGRATE)) == 3
        assert stage.store.redis.scard(keys.SLOTS_CLUSTER) == 3
        assert sorted(o.status.attempts for o in stage.operations()) == [0] * 9 + [1] * 3

    def test_a_plan_from_an_old_snapshot_is_refused_not_wrong(self, stage: Stage) -> None:
        """Between the snapshot and the commit: the VM stops, the target is cordoned, another takes the room."""
        stage.add_vm("a", "n1")
        stage.evict("a")
        snapshot = stage.herd.snapshot
        vm = stage.vm("a")

        def late(change: Any) -> None:
            def stale() -> Any:
                taken = snapshot()
                change()
                return taken

            stage.herd.snapshot = stale  # type: ignore[assignment,method-assign]
            assert stage.grant() == []

        late(lambda: [set_unschedulable(stage.ctx, name, unschedulable=True) for name in ("n2", "n3")])
        for name in ("n2", "n3"):
            set_unschedulable(stage.ctx, name, unschedulable=False)

        def stop() -> None:
            del stage.nodes["n1"].domains[vm.metadata.uid]
            stage.nodes["n1"].tell(vm.metadata.uid, "shutdown", "guest")
            stage.read()

        late(stop)
        assert stage.world.calls == []

    def test_a_foreign_migration_is_waited_for(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        operation = stage.evict("a")
        stage.nodes["n1"].domains[vm.metadata.uid].job = True
        stage.nodes["n1"].tell(vm.metadata.uid)
        stage.read()
        assert stage.grant() == []
        assert "did not begin" in stage.operation(operation).message
        stage.nodes["n1"].domains[vm.metadata.uid].job = False
        stage.nodes["n1"].tell(vm.metadata.uid)
        stage.read()
        assert len(stage.grant()) == 1

    def test_a_job_of_our_own_that_has_ended_is_no_foreign_one(self, stage: Stage) -> None:
        """A listing in the middle of a migration shows its job; when it fell back, nothing tells that it is over."""
        stage.add_vm("a", "n1")
        operation = stage.evict("a")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.nodes["n1"].list_all()
        stage.read()
        stage.nodes["n1"].fall_back(grant)
        stage.nodes["n1"].end(grant, "failed")
        stage.play(lambda: stage.operation(operation).status.attempts == 2)


class TestResults:
    """`evict.delay(...).get()` returns whatever becomes of the operation."""

    def enqueued(self, stage: Stage) -> VirtualMachineOperation:
        stage.add_vm("a", "n1")
        wanted = operations.new_operation("a", OperationType.EVICT, annotations={CELERY_TASK_ANNOTATION: "task-1"})
        return operations.create_operation(stage.ctx, wanted)

    def test_of_one_that_completed(self, stage: Stage) -> None:
        self.enqueued(stage)
        (message,) = stage.grant()
        stage.outbox.sent.append(message)
        stage.play(lambda: "task-1" in stage.outbox.results)
        assert stage.outbox.results["task-1"]["phase"] == "Completed"
        assert stage.outbox.results["task-1"]["node"] == "n2"

    def test_of_one_that_was_deleted_before_it_began(self, stage: Stage) -> None:
        operation = self.enqueued(stage)
        operations.delete_operation(stage.ctx, operation.key)
        assert stage.outbox.results["task-1"]["phase"] == "Terminating"
        assert "deleted before it began" in stage.outbox.results["task-1"]["message"]

    def test_of_one_whose_end_was_committed_by_a_process_that_died_just_then(self, stage: Stage) -> None:
        operation = self.enqueued(stage)
        (message,) = stage.grant()
        stage.outbox.sent.append(message)
        stage.outbox.finish = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            stage.play(lambda: False)
        del stage.outbox.finish
        assert stage.operation(operation).status.phase is OperationPhase.COMPLETED
        stage.expire(keys.AWAITING, operation.key)
        stage.reconcile()
        assert stage.outbox.results["task-1"]["phase"] == "Completed"
        stage.reconcile()
        assert not stage.store.redis.exists(keys.AWAITING)


class TestRefusals:
    def test_an_unschedulable_one_says_so_runs_when_a_node_fits_and_fails_after_its_time(self, stage: Stage) -> None:
        stage.add_vm("a", "n1", memory="20Gi")
        operation = stage.evict("a")
        assert stage.grant() == []
        waiting = stage.operation(operation)
        assert waiting.message == "0/3 nodes: 2 short of 20544 MiB memory, 1 where it runs"
        assert waiting.status.unschedulable_since is not None
        version = stage.store.version()
        stage.grant()
        assert stage.store.version() == version  # it is said once
        node = stage.store.get(Node, "n3")
        capacity = node.status.capacity.with_(memory_mib=50_000)
        stage.store.must_commit(stage.store.batch().put(node, node.with_status(capacity=capacity)))
        assert len(stage.grant()) == 1
        assert stage.operation(operation).status.unschedulable_since is None

    def test_after_its_time_it_fails(self, redis_url: str) -> None:
        stage = Stage(redis_url, unschedulable_after=0.05)
        stage.add_nodes("n1", "n2")
        stage.add_vm("a", "n1", memory="20Gi")
        operation = stage.evict("a")
        stage.grant()
        threading.Event().wait(0.1)
        stage.grant()
        assert stage.operation(operation).status.phase is OperationPhase.FAILED
        assert "no node fits for" in stage.operation(operation).message
        stage.close()

    def test_a_vm_that_is_gone_or_stopped_fails_it(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        stage.store.must_commit(stage.store.batch().create(an_operation("gone", "nobody")))
        operation = stage.evict("a")
        del stage.nodes["n1"].domains[vm.metadata.uid]
        stage.nodes["n1"].tell(vm.metadata.uid, "shutdown", "guest")
        stage.read()
        stage.grant()
        assert stage.operation(operation).status.phase is OperationPhase.FAILED
        assert stage.operation(operation).message == "a is Stopped, only a Running VM migrates"

    def test_one_that_was_to_leave_its_node_has_nothing_left_to_do(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        priority = {PRIORITY_ANNOTATION: str(Priority.MAINTENANCE.value)}
        wanted = operations.new_operation("a", OperationType.EVICT, annotations=priority)
        operation = operations.create_operation(stage.ctx, wanted)
        del stage.nodes["n1"].domains[vm.metadata.uid]
        stage.nodes["n1"].tell(vm.metadata.uid, "shutdown", "guest")
        stage.read()
        stage.grant()
        ended = stage.operation(operation)
        assert (ended.status.phase, ended.status.progress) == (OperationPhase.COMPLETED, 100)
        assert ended.message == "a does not run any more: there is nothing to move"
        assert all(event.type != "Warning" for event in stage.store.all(Event))


def test_one_grant_pass_over_500_pending_operations_is_a_few_round_trips(
    stage: Stage, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """250 nodes, 500 operations: half can go. The number of round trips must not grow with those that wait."""
    batch = stage.store.batch()
    for number in range(250):
        batch.create(a_node(f"m{number}", memory_mib=100_000, cpu=64))
    stage.store.must_commit(batch)
    batch = stage.store.batch()
    for number in range(500):
        batch.create(a_vm(f"vm{number}", node=f"m{number // 2}"))
        batch.create(an_operation(f"op{number}", f"vm{number}"))
    stage.store.must_commit(batch)
    calls = count_round_trips(monkeypatch)
    granted = stage.grant()
    first = calls.copy()
    calls.clear()
    assert stage.grant() == []
    assert len(granted) == 250
    record_property("first pass", len(first))
    record_property("second pass", len(calls))
    assert len(first) <= 250 * 2 + 20  # a grant each, and its epoch
    assert len(calls) <= 5


def count_round_trips(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note each command that is sent."""
    calls: list[str] = []
    send = redis.Redis._execute_command

    def noting(self: Any, *args: Any, **options: Any) -> Any:
        if args[0] != "XREAD":  # the follower's
            calls.append(str(args[0]))
        return send(self, *args, **options)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(redis.Redis, "_execute_command", noting)
    return calls


def test_crashed_vms_run_again_where_their_policy_says_so(stage: Stage) -> None:
    vm = stage.add_vm("a", "n1")
    del stage.nodes["n1"].domains[vm.metadata.uid]
    stage.nodes["n1"].tell(vm.metadata.uid, "crashed")
    stage.read()
    assert stage.vm("a").status.phase is VmPhase.PENDING
    stage.forget()
    for _ in range(3):
        stage.reconcile()
    assert len(stage.operations()) == 1
    stage.play(lambda: stage.is_at_rest("a"))
    assert stage.vm("a").status.incarnation == 2


def test_an_outdated_copy_is_no_reason_to_wait_and_never_becomes_the_vm(stage: Stage) -> None:
    vm = stage.add_vm("a", "n1", incarnation=2)
    stage.nodes["n1"].domains[vm.metadata.uid].incarnation = 2
    stage.nodes["n1"].tell(vm.metadata.uid)
    stage.nodes["n3"].domains[vm.metadata.uid] = Copy(vm.key, incarnation=1)
    stage.nodes["n3"].tell(vm.metadata.uid)
    stage.read()
    assert stage.vm("a").status.outdated == ("n3",)
    assert stage.vm("a").status.node_name == "n1"


def test_an_outdated_copy_is_destroyed_by_its_own_node(stage: Stage) -> None:
    vm = stage.add_vm("a", "n1", incarnation=2)
    uid, redis = vm.metadata.uid, stage.store.redis
    stage.nodes["n1"].domains[uid].incarnation = 2
    stage.nodes["n1"].tell(uid)
    stage.nodes["n3"].domains[uid] = Copy(vm.key, incarnation=1)
    stage.nodes["n3"].tell(uid)
    stage.read()
    assert [str(order).partition("#")[2] for order in redis.hkeys(keys.orders("n3"))] == ["n3.2"]
    stage.forget()  # whatever message there was is lost
    stage.reconcile()
    (message,) = stage.outbox.take(Task.NODE_SETTLE)
    assert message.queue == "node.n3.lifecycle"
    stage.deliver(message)
    assert uid not in stage.nodes["n3"].domains
    assert stage.nodes["n1"].domains[uid].incarnation == 2
    stage.nodes["n3"].tell(uid, "destroyed")
    stage.read()
    assert stage.vm("a").status.outdated == ()
    assert redis.hlen(keys.orders("n3")) == 0
    assert stage.vm("a").status.node_name == "n1"
    stage.reconcile()
    assert stage.outbox.take(Task.NODE_SETTLE) == []


def test_a_grant_holds_room_that_a_start_can_not_take(stage: Stage) -> None:
    stage.store.must_commit(stage.store.batch().create(granted_operation("g", "x", node="n1", target="n2")))
    stage.herd.follower.sync()
    claimed = stage.herd.snapshot().nodes["n2"].memory_used_mib
    assert claimed == 1088
