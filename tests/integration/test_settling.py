"""How operations end when something goes wrong: read from both hosts, repaired where they are split, never guessed."""

from collections.abc import Callable

import pytest

from orchestrator.queues import Message, Task, migrate_queue
from orchestrator.resources import (
    Event,
    GrantState,
    NodeGrant,
    OperationPhase,
    VirtualMachineOperation,
    VmPhase,
    find_condition,
)
from orchestrator.services import operations, vms
from orchestrator.store import keys
from tests.builders import a_vm
from tests.declared_keys import check_keys
from tests.fakes import Copy, Stage


def begun(stage: Stage, name: str = "a", node: str = "n1") -> tuple[VirtualMachineOperation, NodeGrant]:
    """An evict whose worker has made its call."""
    stage.add_vm(name, node)
    operation = stage.evict(name)
    (message,) = stage.grant()
    grant = stage.nodes[node].begin(message)
    assert grant is not None
    stage.read()
    return operation, grant


def suspect(stage: Stage, operation: VirtualMachineOperation) -> None:
    """Its grant was not renewed for too long."""
    stage.expire(keys.DEADLINES, operation.key)
    stage.reconcile()


def answer_round(stage: Stage) -> None:
    """All nodes answer what they are asked and do what they are told, once."""
    stage.grant_and_deliver()
    for node in stage.nodes.values():
        node.answer()
    stage.read()


def ended(stage: Stage, operation: VirtualMachineOperation) -> Callable[[], bool]:
    return lambda: stage.operation(operation).status.phase.is_final and stage.is_at_rest("a")


class TestRows:
    """The rows of DESIGN.md's table, played on the hosts; in each the guest ends running once."""

    def test_the_job_goes_on_by_itself_and_is_adopted(self, stage: Stage) -> None:
        operation, grant = begun(stage)
        suspect(stage, operation)
        assert stage.nodes["n1"].begin(message_for(operation, grant.epoch)) is None  # withdrawn
        answer_round(stage)
        adopted = stage.operation(operation).status.grant
        assert adopted is not None
        assert adopted.adopt
        assert adopted.epoch > grant.epoch
        assert "kill the holder on n1" in stage.world.calls
        (message,) = stage.outbox.take()
        watching = stage.nodes["n1"].begin(message)
        assert watching is not None
        assert watching.adopt
        stage.nodes["n1"].switch_over(watching)
        stage.nodes["n1"].end(watching, "unknown")
        stage.play(ended(stage, operation))
        assert stage.operation(operation).status.phase is OperationPhase.COMPLETED
        assert stage.vm("a").status.node_name == "n2"

    def test_it_failed_and_is_tried_again_elsewhere(self, stage: Stage) -> None:
        operation, grant = begun(stage)
        stage.nodes["n1"].fall_back(grant)
        stage.nodes["n1"].end(grant, "failed", "no route to host")
        stage.play(ended(stage, operation))
        assert stage.vm("a").status.node_name == "n3"  # not n2, where it failed
        assert stage.operation(operation).status.attempts == 2

    def test_a_leftover_on_the_target_is_cleaned_first(self, stage: Stage) -> None:
        operation, grant = begun(stage)
        stage.nodes["n1"].domains[grant.uuid].job = False
        stage.nodes["n1"].end(grant, "failed")
        stage.play(ended(stage, operation))
        assert "destroy on n2" in stage.world.calls
        assert stage.vm("a").status.node_name == "n3"

    def test_the_worker_died_after_the_switch_over(self, stage: Stage) -> None:
        operation, grant = begun(stage)
        stage.nodes["n1"].switch_over(grant)
        suspect(stage, operation)
        stage.play(ended(stage, operation))
        assert stage.operation(operation).status.phase is OperationPhase.COMPLETED

    def test_the_sources_copy_is_left_and_is_destroyed(self, stage: Stage) -> None:
        operation, grant = begun(stage)
        mine = stage.nodes["n1"].domains[grant.uuid]
        stage.nodes["n1"].switch_over(grant)
        mine.state, mine.job = "paused-migrated", False
        stage.nodes["n1"].domains[grant.uuid] = mine
        stage.nodes["n1"].end(grant, "unknown")
        stage.play(ended(stage, operation))
        assert "destroy on n1" in stage.world.calls
        assert stage.vm("a").status.node_name == "n2"

    def test_it_runs_twice_and_the_older_memory_goes(self, stage: Stage) -> None:
        operation, grant = begun(stage)
        mine = stage.nodes["n1"].domains[grant.uuid]
        stage.nodes["n1"].switch_over(grant)
        mine.job = False
        stage.nodes["n1"].domains[grant.uuid] = mine
        stage.nodes["n1"].end(grant, "unknown")
        stage.read()
        answer_round(stage)
        assert "destroy on n1" not in stage.world.calls  # not on the first look
        stage.play(lambda: stage.operation(operation).status.phase.is_final)
        assert stage.is_at_rest("a")
        assert stage.world.calls.count("destroy on n1") == 1
        assert "VirtualMachineRanTwice" in reasons(stage)

    def test_the_target_died_and_the_source_is_resumed(self, stage: Stage) -> None:
        operation, grant = begun(stage)
        stage.nodes["n1"].fall_back(grant)
        stage.nodes["n1"].domains[grant.uuid].state = "paused-migrated"
        stage.nodes["n1"].end(grant, "failed")
        stage.play(ended(stage, operation))
        assert "resume on n1" in stage.world.calls

    def test_the_guest_ended_in_the_middle_and_is_started_again(self, stage: Stage) -> None:
        operation, grant = begun(stage)
        stage.nodes["n1"].fall_back(grant)
        del stage.nodes["n1"].domains[grant.uuid]
        stage.nodes["n1"].end(grant, "failed")
        stage.play(lambda: stage.operation(operation).status.phase.is_final)
        assert stage.operation(operation).status.phase is OperationPhase.FAILED
        assert stage.vm("a").status.phase is VmPhase.PENDING
        stage.reconcile()
        stage.play(lambda: stage.is_at_rest("a"))
        assert stage.vm("a").status.incarnation == 2

    def test_who_does_not_answer_is_waited_for_and_named(self, stage: Stage) -> None:
        operation, grant = begun(stage)
        stage.nodes["n1"].switch_over(grant)
        stage.nodes["n1"].end(grant)
        stage.read()
        stage.nodes["n1"].answer()
        stage.read()
        for _ in range(3):
            stage.expire(keys.AWAITING, operation.key)
            stage.reconcile()
        waiting = stage.operation(operation)
        assert waiting.status.phase is OperationPhase.IN_PROGRESS
        assert waiting.message.endswith("waits for an answer of node n2")
        assert stage.store.redis.scard(keys.slots_outbound("n1")) == 1  # suspect, not free
        condition = find_condition(waiting.status.conditions, "Completed")
        assert condition is not None
        assert condition.reason == "OutcomeUnknown"
        stage.play(ended(stage, operation))
        assert stage.operation(operation).status.phase is OperationPhase.COMPLETED

    def test_where_no_rule_fits_it_waits_for_a_person_without_haste(self, stage: Stage) -> None:
        """Rounds must not follow each other as fast as hosts answer: the stream of changes would be nothing else."""
        operation, grant = begun(stage)
        for node in ("n1", "n2"):
            stage.nodes[node].domains[grant.uuid] = Copy("default/a", "postcopy-failed")
        stage.nodes["n1"].end(grant, "failed")
        stage.read()
        version = stage.store.version()
        for _ in range(50):
            answer_round(stage)
        assert stage.store.version() - version < 40
        waiting = stage.operation(operation)
        assert "the guest is split between both hosts" in waiting.message
        # A person did something; the next look finds it.
        stage.nodes["n1"].domains.pop(grant.uuid)
        stage.nodes["n2"].domains[grant.uuid].state = "running"
        for _ in range(3):
            if stage.store.redis.zscore(keys.AWAITING, operation.key) is not None:
                stage.expire(keys.AWAITING, operation.key)
            stage.reconcile()
            answer_round(stage)
        assert ended(stage, operation)()


def message_for(operation: VirtualMachineOperation, epoch: int) -> Message:
    return Message(Task.NODE_MIGRATE, migrate_queue("n1"), (operation.vm_key, operation.key, epoch))


def reasons(stage: Stage) -> list[str]:
    return [event.reason for event in stage.store.all(Event)]


class TestAborts:
    def test_pending_is_dropped_and_nothing_of_it_runs_later(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        operation = stage.evict("a")
        operations.delete_operation(stage.ctx, operation.key)
        assert stage.operations() == []
        assert stage.grant() == []
        stage.reconcile()
        assert stage.is_at_rest("a")
        assert stage.world.calls == []

    @pytest.mark.parametrize("moment", ["granted", "claimed", "ended", "suspect"])
    def test_in_time_it_stays_on_its_source(self, stage: Stage, moment: str) -> None:
        stage.add_vm("a", "n1")
        operation = stage.evict("a")
        (message,) = stage.grant()
        node = stage.nodes["n1"]
        if moment == "granted":
            operations.delete_operation(stage.ctx, operation.key)
        grant = node.begin(message)
        assert grant is not None
        if moment == "granted":
            assert grant.cancel
        stage.read()
        if moment == "claimed":
            operations.delete_operation(stage.ctx, operation.key)
            told = node.store.grant(grant.operation)
            assert told is not None
            assert told.cancel
        if moment == "suspect":
            suspect(stage, operation)
            operations.delete_operation(stage.ctx, operation.key)
        node.fall_back(grant)
        node.end(grant, "aborted")
        if moment == "ended":
            stage.read()
            operations.delete_operation(stage.ctx, operation.key)
        stage.play(lambda: not stage.operations())
        assert stage.is_at_rest("a")
        assert stage.vm("a").status.node_name == "n1"
        assert "MigrationAborted" in reasons(stage)
        check_keys(stage.store.redis)

    def test_too_late_it_completes_and_says_so(self, stage: Stage) -> None:
        operation, grant = begun(stage)
        stage.nodes["n1"].switch_over(grant)
        operations.delete_operation(stage.ctx, operation.key)
        stage.nodes["n1"].end(grant)
        version = stage.store.version()
        stage.play(lambda: not stage.operations())
        assert stage.vm("a").status.node_name == "n2"
        last = [c.resource for c in stage.store.changes(version, 1) if c.resource.key == operation.key][-1]
        assert isinstance(last, VirtualMachineOperation)
        assert last.status.phase is OperationPhase.COMPLETED
        assert last.message.endswith("it was too late to abort")

    def test_twice_is_once(self, stage: Stage) -> None:
        operation, _ = begun(stage)
        first = operations.delete_operation(stage.ctx, operation.key)
        assert operations.delete_operation(stage.ctx, operation.key).version == first.version

    def test_an_adopted_job_is_aborted_by_who_adopts_it(self, stage: Stage) -> None:
        operation, _ = begun(stage)
        suspect(stage, operation)
        operations.delete_operation(stage.ctx, operation.key)
        answer_round(stage)
        (message,) = stage.outbox.take()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        assert grant.cancel
        assert grant.adopt
        stage.nodes["n1"].fall_back(grant)
        stage.nodes["n1"].end(grant, "unknown")
        stage.play(lambda: not stage.operations())
        assert stage.vm("a").status.node_name == "n1"


class TestMessages:
    """Lost, doubled, late: nothing comes of it."""

    def test_a_message_that_comes_twice_is_done_once(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        stage.evict("a")
        (message,) = stage.grant()
        assert stage.deliver(message)
        assert not stage.deliver(message)
        assert len(stage.world.calls) == 1

    def test_also_when_the_first_one_failed_and_nobody_has_read_that(self, stage: Stage) -> None:
        """Intake is away, reconcile sends again what was not reported, the worker is idle: it must not begin anew."""
        stage.add_vm("a", "n1")
        operation = stage.evict("a")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.nodes["n1"].fall_back(grant)
        stage.nodes["n1"].end(grant, "failed")
        stage.expire(keys.AWAITING, operation.key)
        stage.reconcile()
        (again,) = stage.outbox.take()
        assert again == message
        assert not stage.deliver(again)
        stage.play(ended(stage, operation))
        assert [call for call in stage.world.calls if "migrate" in call] == [
            f"migrate default/a on n1 to n2 epoch {grant.epoch}",
            f"migrate default/a on n1 to n3 epoch {grant.epoch + 1}",
        ]

    def test_a_lost_message_is_sent_again_until_it_is_reported(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        operation = stage.evict("a")
        (message,) = stage.grant()
        for _ in range(3):
            stage.reconcile()
            assert stage.outbox.take() == []  # not before its time
            stage.expire(keys.AWAITING, operation.key)
            stage.reconcile()
            assert stage.outbox.take() == [message]
        stage.deliver(message)
        stage.play(ended(stage, operation))

    def test_a_late_message_of_an_earlier_attempt_finds_nothing(self, stage: Stage) -> None:
        operation, grant = begun(stage)
        stage.nodes["n1"].fall_back(grant)
        stage.nodes["n1"].end(grant, "failed")
        late = message_for(operation, grant.epoch)
        stage.play(lambda: stage.operation(operation).status.attempts == 2)
        assert not stage.deliver(late)
        stage.play(ended(stage, operation))
        assert not stage.deliver(late)

    def test_a_lost_repair_is_sent_again(self, stage: Stage) -> None:
        operation, grant = begun(stage)
        stage.nodes["n1"].domains[grant.uuid].job = False
        stage.nodes["n1"].end(grant, "failed")
        stage.read()
        answer_round(stage)
        (repair,) = stage.outbox.take(Task.NODE_SETTLE)
        stage.expire(keys.AWAITING, operation.key)
        stage.reconcile()
        assert stage.outbox.take(Task.NODE_SETTLE) == [repair]
        assert stage.deliver(repair)
        stage.read()
        assert not stage.deliver(repair)
        stage.play(ended(stage, operation))


class TestSuspicion:
    def test_progress_renews_a_grant(self, stage: Stage) -> None:
        operation, grant = begun(stage)
        stage.expire(keys.DEADLINES, operation.key)
        stage.nodes["n1"].progress(grant)
        stage.read()
        stage.reconcile()
        granted = stage.operation(operation).status.grant
        assert granted is not None
        assert granted.state is GrantState.RUNNING

    def test_a_holder_whose_reports_nobody_has_read_is_not_suspect(self, stage: Stage) -> None:
        """Intake was away for longer than the grant lasts: the worker did nothing wrong, and must not be killed."""
        operation, grant = begun(stage)
        stage.nodes["n1"].progress(grant)
        suspect(stage, operation)
        granted = stage.operation(operation).status.grant
        assert granted is not None
        assert granted.state is GrantState.RUNNING
        stage.read()
        suspect(stage, operation)
        granted = stage.operation(operation).status.grant
        assert granted is not None
        assert granted.state is GrantState.SETTLING

    def test_a_grant_that_nobody_took_is_settled_too(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        operation = stage.evict("a")
        (message,) = stage.grant()
        suspect(stage, operation)
        assert not stage.deliver(message)
        stage.play(ended(stage, operation))
        assert stage.operation(operation).status.attempts == 2


class TestStarts:
    def test_a_new_vm_starts_by_itself(self, stage: Stage) -> None:
        vm = vms.create_vm(stage.ctx, a_vm("a"))
        stage.play(lambda: stage.is_at_rest("a"))
        assert stage.vm("a").status.incarnation == 1
        (copy,) = [d[vm.metadata.uid] for d in stage.world.hosts.values() if vm.metadata.uid in d]
        assert (copy.incarnation, copy.state) == (1, "running")

    def test_a_start_whose_worker_died_is_read_and_not_repeated_elsewhere(self, stage: Stage) -> None:
        vms.create_vm(stage.ctx, a_vm("a"))
        (message,) = stage.grant()
        stage.nodes["n1"].begin(message)
        stage.read()
        (operation,) = stage.operations()
        suspect(stage, operation)
        stage.play(lambda: stage.is_at_rest("a"))
        assert stage.vm("a").status.node_name == "n1"
        assert len([call for call in stage.world.calls if "start" in call]) == 1

    def test_a_call_that_was_on_its_way_when_its_worker_was_killed_is_not_overlooked(self, stage: Stage) -> None:
        """The daemon had the request and not yet begun: it is absent at the first look and runs at the second."""
        vm = vms.create_vm(stage.ctx, a_vm("a"))
        (message,) = stage.grant()
        stage.nodes["n1"].begin(message)
        copy = stage.nodes["n1"].domains.pop(vm.metadata.uid)
        stage.read()
        (operation,) = stage.operations()
        suspect(stage, operation)
        answer_round(stage)
        stage.nodes["n1"].domains[vm.metadata.uid] = copy
        stage.play(lambda: stage.operation(operation).status.phase.is_final)
        assert stage.world.running(vm.metadata.uid) == ["n1"]
        assert stage.is_at_rest("a")

    def test_a_start_that_failed_is_tried_on_another_node_as_the_next_incarnation(self, stage: Stage) -> None:
        vm = vms.create_vm(stage.ctx, a_vm("a"))
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        del stage.nodes["n1"].domains[vm.metadata.uid]
        stage.nodes["n1"].end(grant, "failed", "no such disk")
        stage.play(lambda: stage.is_at_rest("a"))
        assert (stage.vm("a").status.node_name, stage.vm("a").status.incarnation) == ("n2", 2)


def test_every_message_twice_and_every_answer_late(stage: Stage) -> None:
    """Several operations at once; all messages come twice and in reverse, and so do the answers."""
    names = ["a", "b", "c"]
    for name, node in zip(names, ("n1", "n2", "n3"), strict=True):
        stage.add_vm(name, node)
    for name in names:
        stage.evict(name)
    for _ in range(40):
        if all(o.status.phase.is_final for o in stage.operations()):
            break
        sent = stage.grant() + stage.outbox.take(Task.NODE_SETTLE)
        for message in [*reversed(sent), *sent]:
            stage.deliver(message)
        stage.read()
        for host in reversed(stage.nodes.values()):
            host.answer()
            host.answer()
        stage.read()
    assert {o.status.phase for o in stage.operations()} == {OperationPhase.COMPLETED}
    assert stage.is_at_rest(*names)
    assert len(stage.world.calls) == 3
