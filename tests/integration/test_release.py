"""VMs are given back as they were; and what is defined behind our back is removed, but nothing else."""

from typing import Any

import pytest

from orchestrator.errors import Refused
from orchestrator.queues import Task
from orchestrator.resources import (
    OperationType,
    RunPolicy,
    VmPhase,
)
from orchestrator.services import adoption, operations, policies, vms
from orchestrator.store import keys
from tests.builders import uuid_of
from tests.fakes import Copy, Stage
from tests.integration.adopting import (
    UUID,
    add_domain,
    adopted,
    check_at_rest,
    condition,
    definition,
    deliver,
    nothing_secret,
    told,
    web,
)
from tests.integration.test_crashes import let_time_pass


class TestRelease:
    def test_it_is_as_it_was(self, stage: Stage, capfd: pytest.CaptureFixture[str]) -> None:
        copy = add_domain(stage)
        adopted(stage)
        vm = adoption.release(stage.ctx, "default/web-1")
        releasing = condition(vm, "Releasing")
        assert releasing is not None
        assert releasing.status == "True"
        with pytest.raises(Refused, match="is being released: node n1 has not answered yet"):
            adoption.release(stage.ctx, "default/web-1")
        stage.nodes["n1"].tell(UUID)
        stage.read()
        with nothing_secret(stage, capfd):
            deliver(stage)
        assert (copy.state, copy.vm, copy.definition, copy.autostart) == ("running", "", definition(), True)
        assert web(stage) is None
        assert not stage.store.redis.exists(keys.ADOPTED)
        last = stage.store.last_of(vm)
        assert last is not None
        said = condition(last, "Releasing")
        assert said is not None
        assert said.message == "defined on node n1 as domain Web 1, and runs on"
        assert told(stage, "Released") == [f"default/web-1: {said.message}"]
        check_at_rest(stage)

    def test_and_can_be_adopted_again(self, stage: Stage) -> None:
        add_domain(stage)
        adopted(stage)
        adoption.release(stage.ctx, "default/web-1")
        deliver(stage)
        stage.nodes["n1"].tell(UUID)
        stage.read()
        assert adopted(stage).status.adoption is None

    def test_where_it_runs_now(self, stage: Stage) -> None:
        copy = add_domain(stage)
        adopted(stage)
        stage.world.hosts["n2"][UUID] = stage.world.hosts["n1"].pop(UUID)
        stage.nodes["n1"].tell(UUID, "migrated")
        stage.nodes["n2"].tell(UUID)
        stage.read()
        vm = adoption.release(stage.ctx, "default/web-1")
        deliver(stage)
        assert copy.definition == definition()
        (text,) = told(stage, "Released")
        assert text == ("default/web-1: defined on node n2 as domain Web 1 (it was adopted on node n1), and runs on")
        assert vm.status.node_name == "n2"

    def test_stopped(self, stage: Stage) -> None:
        add_domain(stage)
        adopted(stage)
        del stage.nodes["n1"].domains[UUID]
        stage.nodes["n1"].tell(UUID, "shutdown", "guest")
        stage.read()
        vm = web(stage)
        assert vm is not None
        assert vm.status.phase is VmPhase.STOPPED
        adoption.release(stage.ctx, "default/web-1")
        deliver(stage)
        copy = stage.nodes["n1"].domains[UUID]
        assert (copy.state, copy.domain, copy.definition) == ("shutoff", "Web 1", definition())
        assert "it does not run" in told(stage, "Released")[0]
        assert web(stage) is None
        assert not stage.world.running(UUID)

    def test_its_policy_does_not_start_it_meanwhile(self, stage: Stage) -> None:
        add_domain(stage)
        adopted(stage, run_policy=RunPolicy.ALWAYS_ON)
        del stage.nodes["n1"].domains[UUID]
        vm = web(stage)
        assert vm is not None
        stopped = vm.with_status(phase=VmPhase.STOPPED)
        stage.store.must_commit(stage.store.batch().put(vm, stopped))
        adoption.release(stage.ctx, "default/web-1")
        stage.reconcile()
        assert not stage.operations()
        start = policies.policy_operation(stopped, OperationType.START, stage.ctx.now())  # decided just before
        stage.store.must_commit(stage.store.batch().create(start))
        assert not stage.grant()
        (waiting,) = stage.operations()
        assert "being adopted or released" in waiting.message
        deliver(stage)
        assert not stage.grant()
        assert not stage.world.running(UUID)

    def test_what_runs_against_the_record_is_not_defined(self, stage: Stage) -> None:
        copy = add_domain(stage)
        adopted(stage)
        del stage.nodes["n1"].domains[UUID]
        stage.nodes["n1"].tell(UUID, "shutdown", "guest")
        stage.read()
        adoption.release(stage.ctx, "default/web-1")
        stage.nodes["n1"].domains[UUID] = copy
        deliver(stage)
        assert (copy.vm, copy.definition) == ("default/web-1", "")
        assert "against what is on record" in told(stage, "ReleaseFailed")[0]
        vm = web(stage)
        assert vm is not None
        assert vm.status.adoption is None

    def test_under_the_name_that_vmherd_gave_it_at_a_start(self, stage: Stage) -> None:
        copy = add_domain(stage)
        adopted(stage)
        copy.name = "default.web-1"
        adoption.release(stage.ctx, "default/web-1")
        deliver(stage)
        assert copy.definition == definition("default.web-1")

    def test_only_what_was_adopted(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        with pytest.raises(Refused, match="was not adopted"):
            adoption.release(stage.ctx, "default/a")

    def test_not_while_an_operation_is_open(self, stage: Stage) -> None:
        add_domain(stage)
        adopted(stage)
        operation = operations.create_operation(stage.ctx, operations.new_operation("web-1", OperationType.EVICT))
        with pytest.raises(Refused, match=f"operation '{operation.name}' should finish first"):
            adoption.release(stage.ctx, "default/web-1")

    def test_what_its_host_refuses_leaves_it_a_vm(self, stage: Stage) -> None:
        copy = add_domain(stage)
        adopted(stage)
        stage.world.hosts["n1"]["another"] = Copy("", name="Web 1")
        adoption.release(stage.ctx, "default/web-1")
        deliver(stage)
        vm = web(stage)
        assert vm is not None
        failed = condition(vm, "Releasing")
        assert failed is not None
        assert (failed.status, failed.reason) == ("False", "ReleaseFailed")
        assert "already exists" in failed.message
        assert (copy.vm, copy.incarnation, copy.definition) == ("default/web-1", 1, "")
        assert (vm.status.phase, vm.status.adoption) == (VmPhase.RUNNING, None)
        check_at_rest(stage)
        del stage.world.hosts["n1"]["another"]
        adoption.release(stage.ctx, "default/web-1")
        deliver(stage)
        assert copy.definition == definition()

    def test_it_ended_or_went_meanwhile_and_is_not_defined_in_two_places(self, stage: Stage) -> None:
        copy = add_domain(stage)
        adopted(stage)
        adoption.release(stage.ctx, "default/web-1")
        stage.world.hosts["n2"][UUID] = stage.world.hosts["n1"].pop(UUID)
        deliver(stage)
        assert UUID not in stage.nodes["n1"].domains
        assert not copy.definition
        vm = web(stage)
        assert vm is not None
        assert "does not run on its host any more" in told(stage, "ReleaseFailed")[0]

    def test_its_record_goes_with_a_vm_that_is_deleted(self, stage: Stage) -> None:
        add_domain(stage)
        adopted(stage)
        del stage.nodes["n1"].domains[UUID]
        stage.nodes["n1"].tell(UUID, "shutdown", "guest")
        stage.read()
        vms.delete_vm(stage.ctx, "default/web-1")
        assert web(stage) is None
        assert not stage.store.redis.exists(keys.ADOPTED)


class TestDefinedBehindOurBack:
    @pytest.fixture
    def copy(self, stage: Stage) -> Copy:
        vm = stage.add_vm("a", "n1")
        return stage.nodes["n1"].domains[vm.metadata.uid]

    def define(self, stage: Stage, copy: Copy) -> None:
        copy.definition, copy.autostart = "<domain/>", True
        stage.nodes["n1"].tell(uuid_of("a"))
        stage.read()
        stage.reconcile()

    def test_it_is_undefined_and_told(self, stage: Stage, copy: Copy) -> None:
        self.define(stage, copy)
        deliver(stage)
        assert (copy.state, copy.definition, copy.autostart) == ("running", "", False)
        (text,) = told(stage, "PersistentDefinitionRemoved")
        assert "on node n1" in text
        stage.nodes["n1"].tell(uuid_of("a"))
        stage.read()
        check_at_rest(stage)

    def test_a_listing_tells_it_too_and_a_lost_message_is_sent_again(self, stage: Stage, copy: Copy) -> None:
        copy.definition = "<domain/>"
        stage.nodes["n1"].list_all()
        stage.read()
        stage.reconcile()
        assert len(stage.outbox.take(Task.NODE_ADOPT)) == 1
        let_time_pass(stage)
        deliver(stage)
        assert not copy.definition

    @pytest.mark.parametrize("what", ["another incarnation", "another VM's mark", "it does not run", "unmarked"])
    def test_nothing_else_is(self, stage: Stage, copy: Copy, what: str) -> None:
        match what:
            case "another incarnation":
                copy.incarnation = 0
            case "another VM's mark":
                copy.vm = "other/b"
            case "unmarked":
                copy.vm = ""
            case _:
                copy.state = "shutoff"
        self.define(stage, copy)
        assert not stage.outbox.take(Task.NODE_ADOPT)
        assert copy.definition

    @pytest.mark.parametrize("change", [{"state": "shutoff"}, {"incarnation": 2}, {"vm": "other/a"}, {"vm": ""}])
    def test_what_changed_since_is_left_alone(self, stage: Stage, copy: Copy, change: dict[str, Any]) -> None:
        self.define(stage, copy)
        for name, value in change.items():
            setattr(copy, name, value)
        deliver(stage)
        assert copy.definition
        assert not told(stage, "PersistentDefinitionRemoved")

    def test_with_snapshots_it_stays(self, stage: Stage, copy: Copy) -> None:
        copy.snapshots = 1
        self.define(stage, copy)
        deliver(stage)
        assert copy.definition
        assert not told(stage, "PersistentDefinitionRemoved")
        check_at_rest(stage)

    def test_a_release_withdraws_it(self, stage: Stage) -> None:
        """Else what is given back would be taken away again."""
        copy = add_domain(stage)
        adopted(stage)
        copy.definition = definition()
        stage.nodes["n1"].tell(UUID)
        stage.read()
        adoption.release(stage.ctx, "default/web-1")
        assert [order_id.partition(":")[0] for order_id in stage.nodes["n1"].store.orders()] == ["adoption"]
        stage.reconcile()
        stage.nodes["n1"].tell(UUID)
        deliver(stage)
        stage.reconcile()
        deliver(stage)
        assert copy.definition == definition()
        check_at_rest(stage)
