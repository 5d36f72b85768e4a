"""Domains that run are adopted. Whatever is lost, doubled, or ends on the way, no domain is lost or runs twice."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from orchestrator.errors import Refused
from orchestrator.queues import Task
from orchestrator.resources import (
    OperationType,
    RunPolicy,
    VirtualMachine,
    VmPhase,
)
from orchestrator.resources.adoption import AdoptionOrder, AdoptionOrderKind, RecordedDefinition
from orchestrator.services import adoption, operations, vms
from orchestrator.store import keys
from tests.builders import a_vm, uuid_of
from tests.declared_keys import check_keys
from tests.fakes import Stage
from tests.integration.adopting import (
    SECRET,
    UUID,
    add_domain,
    adopted,
    begin,
    check_at_rest,
    claims,
    condition,
    definition,
    deliver,
    nothing_secret,
    plan,
    record,
    told,
    web,
)
from tests.integration.test_crashes import Killed, let_time_pass
from workers.adoption import run_adoption


class TestAdoption:
    def test_from_one_end_to_the_other(self, stage: Stage, capfd: pytest.CaptureFixture[str]) -> None:
        copy = add_domain(stage)
        with nothing_secret(stage, capfd):
            vm = begin(stage, run_policy=RunPolicy.MANUAL)
            assert (vm.metadata.uid, vm.key, vm.spec.run_policy) == (UUID, "default/web-1", RunPolicy.MANUAL)
            assert (vm.status.phase, vm.status.node_name, vm.status.incarnation) == (VmPhase.RUNNING, "n1", 1)
            adopting = condition(vm, "Adopting")
            assert adopting is not None
            assert (adopting.status, adopting.reason) == ("True", "Recording")
            assert (copy.vm, copy.definition, copy.autostart) == ("", definition(), True)
            record(stage)
            assert copy.definition, "undefined before its definition is on record"
            assert "adopted" in check_keys(stage.store.redis)
            kept = RecordedDefinition.model_validate_json(str(stage.store.redis.hget(keys.ADOPTED, UUID)))
            assert (kept.inactive_xml, kept.live_xml, kept.autostart) == (definition(), definition(), True)
            assert (kept.vm, kept.node, kept.domain) == ("default/web-1", "n1", "Web 1")
            (message,) = deliver(stage)
            assert message.args[0] == "default/web-1"
            assert message.queue == "node.n1.lifecycle"
        assert (copy.vm, copy.incarnation, copy.definition, copy.autostart) == ("default/web-1", 1, "", False)
        last = web(stage)
        assert last is not None
        assert (last.status.phase, last.status.adoption) == (VmPhase.RUNNING, None)
        assert condition(last, "Adopting") is None
        assert told(stage, "Adopted") == ["it was domain Web 1 of node n1, and runs on"]
        check_at_rest(stage)

    def test_it_is_an_ordinary_vm_then(self, stage: Stage) -> None:
        add_domain(stage)
        vm = adopted(stage)
        stage.nodes["n1"].list_all()
        stage.read()
        operations.create_operation(stage.ctx, operations.new_operation(vm.name, OperationType.EVICT))
        stage.play(lambda: stage.store.get(VirtualMachine, vm.key).status.node_name != "n1")
        assert stage.world.running(UUID) == [stage.store.get(VirtualMachine, vm.key).status.node_name]

    def test_it_counts_once_in_capacity_all_the_while(self, stage: Stage) -> None:
        copy = add_domain(stage)
        foreign, ours = {f"domain/{UUID}"}, {"vm/default/web-1"}
        assert claims(stage).keys() == foreign

        def told_again() -> set[str]:
            """What counts, also after reports of any kind."""
            copy.memory_mib += 1  # so that it is news
            stage.nodes["n1"].tell(UUID)
            stage.read()
            copy.memory_mib += 1
            stage.nodes["n1"].list_all()
            stage.read()
            return set(claims(stage))

        begin(stage)
        assert claims(stage).keys() == ours == told_again()
        record(stage)
        assert told_again() == ours
        deliver(stage)
        assert told_again() == ours
        adoption.release(stage.ctx, "default/web-1")
        stage.nodes["n1"].definitions.unmark(UUID)
        assert told_again() == ours
        deliver(stage)
        assert claims(stage).keys() == foreign == told_again()

    def test_a_herd_that_overcommits_gets_a_core_fraction(self, stage: Stage) -> None:
        """8 CPUs, 4 vCPUs each; 64 domains of one vCPU each, and a VM of ours that has 2."""
        for number in range(64):
            add_domain(stage, name=f"d{number}", uuid=uuid_of(f"d{number}"))
        stage.store.must_commit(stage.store.batch().create(a_vm("ours", cores=2)))
        plans = plan(stage)
        assert {planned.core_fraction for planned in plans} == {"46%"}
        for planned in plans:
            adoption.adopt(stage.ctx, "n1", planned, "default")
        taken = sum(int(demand.split()[1]) for demand in claims(stage).values())
        assert 31_000 < taken <= 32_000

    def test_nothing_is_changed_by_a_plan(self, stage: Stage) -> None:
        add_domain(stage)
        add_domain(stage, name="other", uuid=uuid_of("other"), snapshots=1)
        before, version = stage.world.hosts["n1"].copy(), stage.store.version()
        first, second = plan(stage)
        assert (first.domain.name, first.is_refused) == ("Web 1", False)
        assert (second.domain.name, second.is_refused) == ("other", True)
        assert stage.world.hosts["n1"] == before
        assert stage.store.version() == version
        check_at_rest(stage)
        assert not list(stage.store.redis.scan_iter("answers:*"))
        with pytest.raises(Refused, match="snapshots"):
            adoption.adopt(stage.ctx, "n1", second, "default")

    def test_an_answer_that_nobody_collects_goes_by_itself(self, stage: Stage) -> None:
        add_domain(stage)
        order = AdoptionOrder(id="definitions:1", kind=AdoptionOrderKind.DEFINITIONS)
        stage.store.redis.hset(keys.orders("n1"), order.id, order.model_dump_json(by_alias=True))
        record(stage)
        assert "answers:<id>" in check_keys(stage.store.redis)  # with the expiry that is declared
        assert not stage.store.redis.exists(keys.orders("n1"))

    def test_what_others_answer_counts_for_nothing(self, stage: Stage) -> None:
        add_domain(stage)
        begin(stage)
        (order_id,) = stage.nodes["n1"].store.orders()
        body = {"order": order_id, "domain": "x", "plain": "x", "inactive_xml": "<x/>", "live_xml": "<x/>"}
        stage.nodes["n2"].store.report("Adoption", body)
        stage.nodes["n2"].store.report("Adoption", {"order": "definitions:1", "count": 0})
        stage.read()
        assert not stage.store.redis.exists(keys.ADOPTED)
        assert list(stage.nodes["n1"].store.orders()) == [order_id]

    def test_no_other_thing_is_done_meanwhile(self, stage: Stage) -> None:
        copy = add_domain(stage)
        begin(stage, run_policy=RunPolicy.ALWAYS_ON)
        with pytest.raises(Refused, match="being adopted or released: node n1 has not answered"):
            operations.create_operation(stage.ctx, operations.new_operation("web-1", OperationType.EVICT))
        with pytest.raises(Refused, match="being adopted or released"):
            vms.delete_vm(stage.ctx, "default/web-1")
        with pytest.raises(Refused, match="is being adopted: node n1 has not answered yet"):
            adoption.release(stage.ctx, "default/web-1")
        copy.state = "shutoff"
        stage.nodes["n1"].tell(UUID)
        stage.nodes["n1"].list_all()
        stage.read()
        stage.reconcile()
        vm = web(stage)
        assert vm is not None
        assert vm.status.phase is VmPhase.RUNNING
        assert not stage.operations(), "its policy starts it, while it is its host's still"


class TestItEndsInTheMiddle:
    def test_before_it_is_ours_it_stays_its_hosts(self, stage: Stage) -> None:
        copy = add_domain(stage)
        begin(stage)
        record(stage)
        copy.state = "shutoff"
        stage.nodes["n1"].tell(UUID)
        deliver(stage)
        assert web(stage) is None
        assert (copy.vm, copy.definition, copy.autostart) == ("", definition(), True)
        assert told(stage, "AdoptionFailed") == [
            "default/web-1: not adopted: it stopped meanwhile; its host has it as it was; node n1 has it as it was"
        ]
        assert not stage.store.redis.exists(keys.ADOPTED)
        assert not claims(stage)
        check_at_rest(stage)

    def test_it_was_gone_before_it_was_read(self, stage: Stage) -> None:
        add_domain(stage).state = "shutoff"
        stage.world.hosts["n1"][UUID].state = "running"
        begin(stage)
        stage.world.hosts["n1"][UUID].state = "shutoff"
        record(stage)
        assert web(stage) is None
        assert "it does not run any more" in told(stage, "AdoptionFailed")[0]
        check_at_rest(stage)

    @pytest.mark.parametrize("is_told_first", [True, False])
    def test_once_it_is_ours_its_policy_says_what_follows(self, stage: Stage, is_told_first: bool) -> None:
        """The worker died after it had removed the definition; then the guest ended. The record is all there is."""
        add_domain(stage)
        begin(stage)
        record(stage)
        node = stage.nodes["n1"]

        def die(call: str) -> None:
            if call == "done undefine":
                raise Killed

        node.definitions.hook = die
        (message,) = stage.outbox.take(Task.NODE_ADOPT)
        with pytest.raises(Killed):
            stage.deliver(message)
        node.definitions.hook = lambda _: None
        del node.domains[UUID]
        if is_told_first:
            node.tell(UUID, "crashed")
            node.list_all()
            stage.read()
        let_time_pass(stage)
        deliver(stage)
        if not is_told_first:
            node.tell(UUID, "crashed")
            stage.read()
        assert any("it ended on node n1 while it was adopted" in text for text in told(stage, "Adopted"))
        stage.play(lambda: len(stage.world.running(UUID)) == 1)
        vm = web(stage)
        assert vm is not None
        assert vm.status.incarnation == 2

    def test_a_guest_that_ends_between_reading_and_answer(self, stage: Stage) -> None:
        """Its agent's report is older than the worker's answer, and newer than what that answer rests on."""
        add_domain(stage)
        begin(stage, run_policy=RunPolicy.MANUAL)
        record(stage)
        node = stage.nodes["n1"]
        report = node.store.report

        def end_first(kind: str, body: dict[str, Any], request_id: str | None = None) -> int:
            node.store.report = report  # type: ignore[method-assign]
            del node.domains[UUID]
            node.tell(UUID, "shutdown", "guest")
            return report(kind, body, request_id)

        node.store.report = end_first  # type: ignore[method-assign]
        deliver(stage)
        vm = web(stage)
        assert vm is not None
        assert vm.status.phase is VmPhase.STOPPED
        assert not claims(stage)


class TestItIsNotWhatItWas:
    @pytest.mark.parametrize("when", ["before it is recorded", "before it is taken over"])
    def test_a_changed_definition_is_left_alone(self, stage: Stage, when: str) -> None:
        copy = add_domain(stage)
        begin(stage)
        if when == "before it is taken over":
            record(stage)
        copy.definition = definition(memory_mib=2048)
        record(stage)
        deliver(stage)
        assert web(stage) is None
        assert (copy.vm, copy.definition, copy.autostart) == ("", definition(memory_mib=2048), True)
        assert "definition was changed" in told(stage, "AdoptionFailed")[0]
        assert claims(stage).keys() == {f"domain/{UUID}"}
        assert not stage.store.redis.exists(keys.ADOPTED)
        check_at_rest(stage)

    def test_a_changed_password_alone_is_a_change(self, stage: Stage) -> None:
        copy = add_domain(stage)
        begin(stage)
        record(stage)
        copy.definition = definition().replace(SECRET, "another")
        deliver(stage)
        assert web(stage) is None
        assert copy.definition

    def test_what_libvirt_refuses_is_undone(self, stage: Stage) -> None:
        """A migration began by hand between the mark and the removal: the mark goes again, once that has ended."""
        copy = add_domain(stage)
        begin(stage)
        record(stage)

        def begin_job(call: str) -> None:
            if call == "done mark":
                copy.job = True

        stage.nodes["n1"].definitions.hook = begin_job
        deliver(stage)
        assert copy.vm, "it can't be unmarked while it migrates"
        assert web(stage) is not None
        copy.job = False
        stage.nodes["n1"].definitions.hook = lambda _: None
        let_time_pass(stage)
        deliver(stage)
        assert (copy.vm, copy.definition) == ("default/web-1", "")

    def test_a_snapshot_made_meanwhile(self, stage: Stage) -> None:
        copy = add_domain(stage)
        begin(stage)
        record(stage)
        copy.snapshots = 1
        deliver(stage)
        assert web(stage) is None
        assert (copy.vm, bool(copy.definition)) == ("", True)
        assert "snapshot or checkpoint" in told(stage, "AdoptionFailed")[0]


class TestMessages:
    def test_lost_ones_are_sent_again(self, stage: Stage) -> None:
        copy = add_domain(stage)
        begin(stage)
        stage.store.redis.delete(keys.wake("n1"))
        record(stage)
        stage.outbox.take()
        let_time_pass(stage)
        assert deliver(stage)
        assert not copy.definition
        check_at_rest(stage)

    def test_a_lost_order_is_put_again(self, stage: Stage) -> None:
        add_domain(stage)
        begin(stage)
        stage.store.redis.delete(keys.orders("n1"))
        let_time_pass(stage)
        record(stage)
        deliver(stage)
        vm = web(stage)
        assert vm is not None
        assert vm.status.adoption is None

    def test_doubled_and_late_ones_do_nothing(self, stage: Stage) -> None:
        """The last copy of the message comes when the VM has been given back: it must not take it over again."""
        copy = add_domain(stage)
        begin(stage)
        record(stage)
        (message,) = stage.outbox.take(Task.NODE_ADOPT)
        stage.deliver(message)
        stage.deliver(message)
        stage.read()
        assert web(stage) is not None
        adoption.release(stage.ctx, "default/web-1")
        deliver(stage)
        assert not stage.deliver(message)
        stage.read()
        assert (copy.vm, copy.definition, copy.autostart) == ("", definition(), True)
        assert web(stage) is None

    def test_an_order_is_read_again_when_its_turn_has_come(self, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another thread of the worker was at it: what that has answered is not done a second time."""
        copy = add_domain(stage)
        begin(stage)
        record(stage)
        (message,) = stage.outbox.take(Task.NODE_ADOPT)
        node, turn = stage.nodes["n1"], Turn()
        monkeypatch.setattr("workers.adoption._one_at_a_time", turn)
        with ThreadPoolExecutor(1) as pool:
            with turn.lock:
                late = pool.submit(run_adoption, node.store, node.hypervisor, str(message.args[1]))
                assert turn.is_wanted.wait(10)
                stage.store.redis.delete(keys.orders("n1"))
            assert late.result(10).endswith("answered already")
        assert (copy.vm, bool(copy.definition)) == ("", True)


class Turn:
    """A lock that tells when somebody wants it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.is_wanted = threading.Event()

    def __enter__(self) -> None:
        self.is_wanted.set()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
