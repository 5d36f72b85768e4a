"""Questions before a grant, on a real Redis: lost, doubled, late, outdated; and nothing is left of them."""

from typing import Any

import pytest

from orchestrator.errors import Refused
from orchestrator.planner.preflight import BAD_FOR, GOOD_FOR
from orchestrator.queues import Task
from orchestrator.resources import (
    Event,
    OperationPhase,
    OperationType,
    Order,
    OrderKind,
    Reason,
    VirtualMachine,
    VirtualMachineOperation,
)
from orchestrator.resources.meta import find_condition
from orchestrator.resources.needs import STORAGE_COPY_ANNOTATION, LocalDisk
from orchestrator.resources.vmop import MigrateTo
from orchestrator.services import operations
from orchestrator.services.granting import grant_pending
from orchestrator.services.nodes import set_unschedulable
from orchestrator.store import keys
from tests.builders import some_needs
from tests.fakes import Stage

LOCAL = (LocalDisk(target="vda", path="/srv/a.raw", size_mib=64),)


def picky(stage: Stage, name: str = "a", node: str = "n1", **needs: Any) -> VirtualMachine:
    """A VM of which each target has to be asked."""
    return stage.add_vm(name, node, needs=some_needs(**needs))


def questions(stage: Stage, node: str) -> list[Order]:
    return [order for order in stage.nodes[node].store.orders().values() if isinstance(order, Order)]


def reason(operation: VirtualMachineOperation) -> str:
    condition = find_condition(operation.status.conditions, "Completed")
    assert condition is not None
    return condition.reason


def reply(stage: Stage, *nodes: str) -> int:
    """These nodes answer, and that is read; how many questions there were."""
    count = sum(stage.nodes[node].answer() for node in nodes)
    stage.read()
    return count


def slots(stage: Stage) -> int:
    return int(stage.store.redis.scard(keys.SLOTS_CLUSTER))


def age(stage: Stage, name: str, by: Any) -> None:
    """Let the answers about a VM, and the questions for it, be older."""
    vm = stage.vm(name)
    arrivals = {node: a.with_(answered_at=a.answered_at - by) for node, a in vm.status.arrivals.items()}
    stage.store.must_commit(stage.store.batch().put(vm, vm.with_status(arrivals=arrivals)))


class TestOneQuestion:
    def test_it_is_asked_first_and_granted_then_with_no_slot_in_between(self, stage: Stage) -> None:
        picky(stage)
        operation = stage.evict("a")
        assert stage.grant() == []
        (order,) = questions(stage, "n2")
        assert (order.kind, order.uuid) == (OrderKind.CHECK, stage.vm("a").metadata.uid)
        assert "<domain" in order.machine
        assert slots(stage) == 0
        waiting = stage.operation(operation)
        assert (waiting.status.phase, reason(waiting)) == (OperationPhase.PENDING, Reason.TARGET_PREPARING)
        assert "node n2" in waiting.message
        reply(stage, "n2")
        assert len(stage.outbox.take(Task.GRANT)) == 1
        (message,) = stage.grant()
        assert message.args[1] == operation.key
        assert questions(stage, "n2") == []
        assert stage.operation(operation).status.target_node == "n2"

    def test_it_goes_its_whole_way_and_leaves_nothing(self, stage: Stage) -> None:
        picky(stage)
        operation = stage.evict("a")
        stage.play(lambda: not stage.operation(operation).is_active)
        assert stage.operation(operation).status.phase is OperationPhase.COMPLETED
        assert [questions(stage, node) for node in stage.nodes] == [[], [], []]
        assert stage.store.redis.zcard(keys.AWAITING) == 0

    def test_a_wake_up_of_the_agent_comes_with_it(self, stage: Stage) -> None:
        picky(stage)
        before = stage.store.redis.xlen(keys.wake("n2"))
        stage.evict("a")
        stage.grant()
        assert stage.store.redis.xlen(keys.wake("n2")) == before + 1

    def test_what_is_deleted_takes_its_questions_along(self, stage: Stage) -> None:
        picky(stage)
        operation = stage.evict("a")
        stage.grant()
        (order,) = questions(stage, "n2")
        operations.delete_operation(stage.ctx, operation.key)
        assert questions(stage, "n2") == []
        stage.nodes["n2"].reply(order)
        stage.read()
        assert stage.vm("a").status.arrivals == {}
        stage.expire(keys.AWAITING, operation.key)
        stage.reconcile()
        assert stage.store.redis.zcard(keys.AWAITING) == 0


class TestAnswers:
    def test_a_second_copy_of_an_answer_changes_nothing(self, stage: Stage) -> None:
        picky(stage)
        stage.evict("a")
        stage.grant()
        (order,) = questions(stage, "n2")
        stage.nodes["n2"].reply(order)
        stage.read()
        version = stage.vm("a").version
        stage.nodes["n2"].problems = ["bridge br7 is not there"]
        stage.nodes["n2"].reply(order)
        stage.read()
        assert stage.vm("a").version == version

    def test_a_copy_that_comes_while_the_next_question_is_open_does_not_answer_that(self, stage: Stage) -> None:
        picky(stage)
        stage.evict("a")
        stage.grant()
        (first,) = questions(stage, "n2")
        reply(stage, "n2")
        age(stage, "a", GOOD_FOR)
        stage.grant()
        (second,) = questions(stage, "n2")
        stage.nodes["n2"].reply(first)
        stage.read()
        assert questions(stage, "n2") == [second]
        assert stage.grant() == []

    def test_another_node_can_not_answer_for_it(self, stage: Stage) -> None:
        picky(stage)
        stage.evict("a")
        stage.grant()
        (order,) = questions(stage, "n2")
        stage.nodes["n3"].reply(order)
        stage.read()
        assert stage.vm("a").status.arrivals == {}
        assert questions(stage, "n2") == [order]

    def test_an_answer_of_an_earlier_run_of_the_agent_does_not_count(self, stage: Stage) -> None:
        picky(stage)
        stage.evict("a")
        stage.grant()
        (order,) = questions(stage, "n2")
        n2 = stage.nodes["n2"]
        n2.generation = "g2"
        n2.list_all()
        stage.read()
        n2.generation = "g1"
        n2.reply(order)
        stage.read()
        assert questions(stage, "n2") == [order]
        assert stage.grant() == []
        n2.generation = "g2"
        reply(stage, "n2")
        assert len(stage.grant()) == 1

    def test_an_answer_from_before_the_agents_restart_is_asked_for_again(self, stage: Stage) -> None:
        picky(stage)
        stage.evict("a")
        stage.grant()
        reply(stage, "n2")
        stage.nodes["n2"].generation = "g2"
        stage.nodes["n2"].list_all()
        stage.read()
        assert stage.grant() == []
        assert len(questions(stage, "n2")) == 1

    def test_the_next_operation_uses_the_answer(self, stage: Stage) -> None:
        picky(stage)
        operation = stage.evict("a")
        stage.grant()
        reply(stage, "n2")
        operations.delete_operation(stage.ctx, operation.key)
        stage.evict("a")
        assert len(stage.grant()) == 1
        assert stage.world.calls.count("check on n2") == 1

    def test_until_it_is_too_old(self, stage: Stage) -> None:
        picky(stage)
        stage.evict("a")
        stage.grant()
        reply(stage, "n2")
        age(stage, "a", GOOD_FOR)
        assert stage.grant() == []

    def test_or_the_machine_is_another(self, stage: Stage) -> None:
        """A disk was plugged in: its node tells, and what was answered counts no more."""
        vm = picky(stage)
        stage.evict("a")
        stage.grant()
        reply(stage, "n2")
        stage.world.hosts["n1"][vm.metadata.uid].needs = some_needs("f2")
        stage.nodes["n1"].tell(vm.metadata.uid)
        stage.read()
        needs = stage.vm("a").status.needs
        assert needs is not None
        assert needs.fingerprint == "f2"
        assert stage.grant() == []
        assert len(questions(stage, "n2")) == 1

    def test_an_answer_about_the_machine_that_it_was_counts_for_nothing(self, stage: Stage) -> None:
        vm = picky(stage)
        stage.evict("a")
        stage.grant()
        stage.nodes["n2"].answer()
        stage.world.hosts["n1"][vm.metadata.uid].needs = some_needs("f2")
        stage.nodes["n1"].tell(vm.metadata.uid)
        stage.read_one("n1")
        stage.read()
        assert stage.vm("a").status.arrivals == {}
        assert stage.grant() == []

    def test_an_answer_that_can_not_be_read_is_a_problem(self, stage: Stage) -> None:
        picky(stage)
        stage.evict("a")
        stage.grant()
        (order,) = questions(stage, "n2")
        stage.nodes["n2"].store.report("Checked", {"order": order.id, "generation": "g1", "problems": "none"})
        stage.read()
        assert stage.vm("a").status.arrivals["n2"].problems


class TestProblems:
    def test_the_other_node_is_taken(self, stage: Stage) -> None:
        picky(stage)
        stage.nodes["n2"].problems = ["disk vda: no such file /srv/a.raw"]
        operation = stage.evict("a")
        stage.play(lambda: not stage.operation(operation).is_active)
        assert stage.vm("a").status.node_name == "n3"

    def test_where_no_node_is_left_it_says_why_and_goes_once_one_is_repaired(self, stage: Stage) -> None:
        picky(stage)
        for name in ("n2", "n3"):
            stage.nodes[name].problems = ["disk vda: no such file /srv/a.raw"]
        operation = stage.evict("a")
        for _ in range(2):
            stage.grant()
            reply(stage, "n2", "n3")
        stage.grant()
        waiting = stage.operation(operation)
        assert reason(waiting) == Reason.TARGET_DISK_ERROR
        assert "2 unfit (disk vda: no such file /srv/a.raw)" in waiting.message
        since = waiting.status.unschedulable_since
        stage.nodes["n3"].problems = []
        age(stage, "a", BAD_FOR)
        stage.grant()
        assert stage.operation(operation).status.unschedulable_since == since
        assert reply(stage, "n2", "n3") == 2
        (message,) = stage.grant()
        assert message.args[1] == operation.key
        assert stage.operation(operation).status.target_node == "n3"

    def test_a_node_named_by_a_person_fails_in_the_end(self, stage: Stage) -> None:
        picky(stage)
        stage.nodes["n3"].problems = ["bridge br7 is not there"]
        wanted = operations.new_operation("a", OperationType.MIGRATE, migrate=MigrateTo(node_name="n3"))
        operation = operations.create_operation(stage.ctx, wanted)
        stage.grant()
        reply(stage, "n3")
        stage.grant()
        assert reason(stage.operation(operation)) == Reason.TARGET_UNSCHEDULABLE
        stuck_for(stage, operation)
        stage.grant()
        ended = stage.operation(operation)
        assert (ended.status.phase, reason(ended)) == (OperationPhase.FAILED, Reason.TARGET_UNSCHEDULABLE)
        assert "bridge br7 is not there" in ended.message
        assert slots(stage) == 0


def stuck_for(stage: Stage, operation: VirtualMachineOperation) -> None:
    """Let an operation have waited for as long as it may."""
    old = stage.operation(operation)
    since = old.status.unschedulable_since
    assert since is not None
    new = old.with_status(unschedulable_since=since - stage.ctx.config.unschedulable_timeout)
    stage.store.must_commit(stage.store.batch().put(old, new))


class TestSilence:
    def test_reconcile_presses_the_question(self, stage: Stage) -> None:
        picky(stage)
        operation = stage.evict("a")
        stage.grant()
        before = stage.store.redis.xlen(keys.wake("n2"))
        stage.reconcile()
        assert stage.store.redis.xlen(keys.wake("n2")) == before
        stage.expire(keys.AWAITING, operation.key)
        stage.reconcile()
        assert stage.store.redis.xlen(keys.wake("n2")) == before + 1
        assert len(questions(stage, "n2")) == 1
        assert stage.store.redis.zcard(keys.AWAITING) == 1

    def test_the_next_node_is_asked_when_one_stays_silent(self, stage: Stage) -> None:
        picky(stage)
        operation = stage.evict("a")
        stage.grant()
        silent_for_long(stage, operation)
        assert stage.grant() == []
        assert len(questions(stage, "n3")) == 1
        assert "node n2, n3" in stage.operation(operation).message
        reply(stage, "n3")
        stage.grant()
        assert stage.operation(operation).status.target_node == "n3"
        assert questions(stage, "n2") == []

    def test_when_all_are_silent_it_fails_in_the_end(self, stage: Stage) -> None:
        picky(stage)
        operation = stage.evict("a")
        for _ in range(2):
            stage.grant()
            silent_for_long(stage, operation)
        stage.grant()
        assert reason(stage.operation(operation)) == Reason.TARGET_PREPARING
        stuck_for(stage, operation)
        stage.grant()
        ended = stage.operation(operation)
        assert (ended.status.phase, reason(ended)) == (OperationPhase.FAILED, Reason.OPERATION_FAILED)
        assert "node n2, n3" in ended.message
        assert [questions(stage, node) for node in ("n2", "n3")] == [[], []]


def silent_for_long(stage: Stage, operation: VirtualMachineOperation) -> None:
    """Let the open questions have been asked longer ago than an answer takes."""
    old = stage.operation(operation)
    asked = old.status.questions
    assert asked is not None
    older = {node: q.with_(asked_at=q.asked_at - BAD_FOR) for node, q in asked.open.items()}
    stage.store.must_commit(stage.store.batch().put(old, old.with_status(questions=asked.with_(open=older))))


class TestQueues:
    def test_the_next_in_the_queue_has_its_answer_when_its_turn_comes(self, stage: Stage) -> None:
        for name in ("a", "b"):
            picky(stage, name)
            stage.evict(name)
        assert stage.grant() == []
        reply(stage, "n2", "n3")
        (first,) = stage.grant()
        assert first.args[0] == "default/a"
        reply(stage, "n2", "n3")
        asked = list(stage.world.calls)
        stage.deliver(first)
        stage.play(lambda: stage.vm("b").status.node_name != "n1")
        assert [call for call in stage.world.calls if call not in asked and "check" in call] == []

    def test_a_grant_that_comes_back_asks_anew_only_what_it_has_to(self, stage: Stage) -> None:
        picky(stage)
        operation = stage.evict("a")
        stage.grant()
        reply(stage, "n2")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.nodes["n1"].fall_back(grant)
        stage.nodes["n1"].end(grant, "failed", "no")
        stage.play(lambda: not stage.operation(operation).is_active)
        assert stage.vm("a").status.node_name == "n3"
        assert stage.world.calls.count("check on n2") == 1


class TestNeeds:
    def test_a_start_tells_them_and_whether_it_can_migrate(self, stage: Stage) -> None:
        vm = picky(stage)
        stage.world.hosts["n1"][vm.metadata.uid].needs = some_needs("f2", local_disks=LOCAL)
        stage.nodes["n1"].tell(vm.metadata.uid)
        stage.read()
        condition = find_condition(stage.vm("a").status.conditions, "Migratable")
        assert condition is not None
        assert (condition.status, condition.reason) == ("False", "VirtualMachineDisksNotMigratable")

    def test_another_node_can_not_tell_them(self, stage: Stage) -> None:
        vm = picky(stage)
        n2 = stage.nodes["n2"]
        stage.world.hosts["n2"][vm.metadata.uid] = stage.world.hosts["n1"][vm.metadata.uid]
        n2.told.clear()
        stage.world.hosts["n1"][vm.metadata.uid].needs = some_needs("f2", obstacles=("host device x",))
        n2.tell(vm.metadata.uid)
        stage.read()
        assert stage.vm("a").status.needs == vm.status.needs

    def test_those_of_another_incarnation_do_not_count(self, stage: Stage) -> None:
        vm = picky(stage)
        told = some_needs("f2", incarnation=9).model_dump(mode="json", by_alias=True)
        domain = {**stage.nodes["n1"].describe(vm.metadata.uid), "needs": told}
        stage.nodes["n1"].store.report("Domain", {"uuid": vm.metadata.uid, "domain": domain})
        stage.read()
        assert stage.vm("a").status.needs == vm.status.needs

    @pytest.mark.parametrize("told", ["x", {"fingerprint": 1}, {"fingerprint": "f", "machine": "<!DOCTYPE d>"}])
    def test_unreadable_ones_are_dropped_and_nothing_else_with_them(self, stage: Stage, told: Any) -> None:
        vm = picky(stage)
        domain = {**stage.nodes["n1"].describe(vm.metadata.uid), "needs": told, "state": "paused"}
        stage.nodes["n1"].store.report("Domain", {"uuid": vm.metadata.uid, "domain": domain})
        stage.read()
        assert stage.vm("a").status.phase == "Pause"
        assert stage.vm("a").status.needs == vm.status.needs

    def test_where_they_are_not_known_its_own_node_is_asked(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        forgotten = stage.vm("a")
        stage.store.must_commit(stage.store.batch().put(forgotten, forgotten.with_status(needs=None)))
        operation = stage.evict("a")
        assert stage.grant() == []
        (order,) = questions(stage, "n1")
        assert order.kind is OrderKind.DESCRIBE
        assert reason(stage.operation(operation)) == Reason.WAITING_FOR_VM_TO_BE_READY_TO_MIGRATE
        reply(stage, "n1")
        assert stage.vm("a").status.needs == vm.status.needs
        assert len(stage.grant()) == 1
        assert questions(stage, "n1") == []

    def test_a_node_that_does_not_have_it_is_not_asked_again_at_once(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        forgotten = stage.vm("a")
        stage.store.must_commit(stage.store.batch().put(forgotten, forgotten.with_status(needs=None)))
        stage.evict("a")
        stage.grant()
        (order,) = questions(stage, "n1")
        del stage.world.hosts["n1"][vm.metadata.uid]
        stage.outbox.take()
        reply(stage, "n1")
        assert stage.outbox.take(Task.GRANT) == []
        assert questions(stage, "n1") == [order]


class TestNotMigratable:
    def test_it_is_refused_at_once_and_nothing_is_stored(self, stage: Stage) -> None:
        picky(stage, obstacles=("host device pci 0000:03:00.0: it can't leave its host",))
        with pytest.raises(Refused, match=r"0000:03:00.0.*VirtualMachineHostDevicesNotMigratable"):
            stage.evict("a")
        assert stage.operations() == []

    def test_disks_that_only_its_host_has(self, stage: Stage) -> None:
        vm = picky(stage, local_disks=LOCAL)
        with pytest.raises(Refused, match="VirtualMachineDisksNotMigratable"):
            stage.evict("a")
        allowed = vm.with_(metadata=vm.metadata.with_(annotations={STORAGE_COPY_ANNOTATION: "true"}))
        stage.store.must_commit(stage.store.batch().put(vm, allowed))
        operation = stage.evict("a")
        stage.grant()
        (order,) = questions(stage, "n2")
        assert order.copied_disks == ("vda",)
        reply(stage, "n2")
        stage.grant()
        grant = stage.operation(operation).status.grant
        assert grant is not None
        assert grant.copy_disks == ("vda",)

    def test_one_that_is_tied_after_it_was_asked_for_fails(self, stage: Stage) -> None:
        vm = picky(stage)
        operation = stage.evict("a")
        stage.world.hosts["n1"][vm.metadata.uid].needs = some_needs("f2", obstacles=("host device usb 1:2",))
        stage.nodes["n1"].tell(vm.metadata.uid)
        stage.read()
        grant_pending(stage.ctx, stage.herd)
        ended = stage.operation(operation)
        assert (ended.status.phase, reason(ended)) == (OperationPhase.FAILED, Reason.OPERATION_FAILED)
        assert "host device usb 1:2" in ended.message


class TestCopiedDisks:
    """Where the newest state of a disk is: nowhere else may the VM start, whatever image lies there."""

    @pytest.fixture
    def vm(self, stage: Stage) -> VirtualMachine:
        vm = picky(stage, local_disks=LOCAL)
        allowed = vm.with_(metadata=vm.metadata.with_(annotations={STORAGE_COPY_ANNOTATION: "true"}))
        stage.store.must_commit(stage.store.batch().put(vm, allowed))
        return stage.vm("a")

    def home(self, stage: Stage) -> str:
        needs = stage.vm("a").status.needs
        assert needs is not None
        return needs.home

    def told(self, stage: Stage) -> list[str]:
        return [event.message for event in stage.store.all(Event) if event.reason.startswith("Disk")]

    def test_it_moves_with_the_vm_and_the_image_that_stays_is_told(self, stage: Stage, vm: VirtualMachine) -> None:
        assert self.home(stage) == "n1"
        operation = stage.evict("a")
        stage.play(lambda: not stage.operation(operation).is_active)
        assert self.home(stage) == stage.vm("a").status.node_name == "n2"
        assert "node n1 keeps the images of disk vda" in self.told(stage)[0]

    def test_a_copy_that_failed_changes_nothing_and_is_told(self, stage: Stage, vm: VirtualMachine) -> None:
        stage.evict("a")
        stage.grant()
        reply(stage, "n2")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        assert grant.copy_disks == ("vda",)
        stage.nodes["n1"].fall_back(grant)
        stage.nodes["n1"].end(grant, "failed", "no")
        stage.read()
        reply(stage, "n1", "n2")
        assert self.home(stage) == "n1"
        assert "node n2 may hold an incomplete copy of disk vda" in self.told(stage)[0]

    def test_it_starts_where_its_disk_is_and_waits_for_that_node(self, stage: Stage, vm: VirtualMachine) -> None:
        operation = stage.evict("a")
        stage.play(lambda: not stage.operation(operation).is_active)
        stop = operations.create_operation(stage.ctx, operations.new_operation("a", OperationType.STOP, force=True))
        stage.play(lambda: not stage.operation(stop).is_active)
        set_unschedulable(stage.ctx, "n2", unschedulable=True)
        start = operations.create_operation(stage.ctx, operations.new_operation("a", OperationType.START))
        stage.grant()
        assert "not node n2" in stage.operation(start).message
        set_unschedulable(stage.ctx, "n2", unschedulable=False)
        stage.play(lambda: not stage.operation(start).is_active)
        assert stage.vm("a").status.node_name == "n2"
