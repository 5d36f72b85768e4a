"""Evidence before restart: the real services on a real Redis; hosts, clock and power are the test's."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import pytest

from orchestrator.errors import NotFound, Refused
from orchestrator.fencing.agents import Power
from orchestrator.lease import Membership, read_lease
from orchestrator.planner.liveness import LONGEST_GAP_S
from orchestrator.queues import Task
from orchestrator.resources import (
    Condition,
    Event,
    Node,
    NodeFencing,
    OperationType,
    RunPolicy,
    VmPhase,
    find_condition,
)
from orchestrator.resources.drain import BRING_BACK_ANNOTATION
from orchestrator.resources.fencing import FenceLevel, FencePhase
from orchestrator.services import fencing as services
from orchestrator.services.arming import DISARMING_ANNOTATIONS
from orchestrator.services.context import Clock, Context
from orchestrator.services.failover import recover_node
from orchestrator.services.fencing import Tools, arm, confirm, disarm, power_on_again, read_power
from orchestrator.services.inventory import put_node
from orchestrator.services.liveness import Liveness
from orchestrator.services.nodes import set_labels, set_unschedulable
from orchestrator.services.operations import create_operation, new_operation
from orchestrator.store import keys
from tests.fakes import Stage
from tests.fencing import FencingStage, a_bmc, until_fenced


@pytest.fixture
def stage(redis_url: str) -> Iterator[Stage]:
    stage = Stage(redis_url)
    stage.add_nodes("n1", "n2", "n3", "n4")
    yield stage
    stage.close()


@pytest.fixture
def herd(stage: Stage) -> FencingStage:
    return FencingStage(stage)


@pytest.fixture
def armed(stage: Stage) -> FencingStage:
    return FencingStage(stage, armed=True)


def is_started(stage: Stage, name: str) -> bool:
    return any(o.spec.virtual_machine_name == name and o.spec.type == "Start" for o in stage.operations())


def reasons(stage: Stage, name: str) -> list[str]:
    return [event.reason for event in stage.store.all(Event) if event.involved_object.name == name]


class TestBmc:
    def test_power_that_is_read_back_as_off_is_evidence(self, stage: Stage, herd: FencingStage) -> None:
        vm = stage.add_vm("a", "n1")
        herd.configure("n1", bmc=a_bmc("n1"))
        herd.lose("n1")
        found = herd.until_tried("n1")
        assert found.status.evidence is not None
        assert found.status.evidence.level is FenceLevel.BMC
        assert "read back as off" in found.status.evidence.text
        assert herd.switches.cut == ["n1"]
        assert stage.store.redis.get(keys.taken_over("n1")) == "b-n1 g-n1"
        assert not herd.has_node("n1")
        stage.play(lambda: stage.is_at_rest("a"))
        (host,) = stage.world.running(vm.metadata.uid)
        assert host != "n1"
        assert stage.vm("a").status.incarnation == vm.status.incarnation + 1

    def test_before_that_nothing_is_started(self, stage: Stage, herd: FencingStage) -> None:
        stage.add_vm("a", "n1")
        herd.configure("n1", bmc=a_bmc("n1", attempts=1))
        herd.switches.stuck.add("n1")
        herd.lose("n1")
        herd.until_tried("n1")
        for _ in range(15):
            herd.scan()
            herd.settle()
            stage.reconcile()
            recover_node(herd.ctx, stage.herd, "n1")
            assert not is_started(stage, "a")
        status = herd.fencing("n1").status
        assert (status.phase, status.reason) == (FencePhase.UNCONFIRMED, "PowerStaysOn")
        assert reasons(stage, "n1").count("FenceUnconfirmed") == 1  # said once, not at each try

    @pytest.mark.parametrize("problem", ["exit code 1: wrong password", "no fence agent fence_fake on this machine"])
    def test_a_bmc_that_can_t_be_read_is_none(self, stage: Stage, herd: FencingStage, problem: str) -> None:
        stage.add_vm("a", "n1")
        herd.configure("n1", bmc=a_bmc("n1"))
        herd.switches.problems["n1"] = problem
        herd.lose("n1")
        status = herd.until_tried("n1").status
        assert (status.phase, status.reason, status.message) == (FencePhase.UNCONFIRMED, "BmcUnreadable", problem)
        assert not is_started(stage, "a")

    def test_power_that_was_off_counts_only_if_it_was_read_as_on(self, stage: Stage, herd: FencingStage) -> None:
        stage.add_vm("a", "n1")
        herd.configure("n1", bmc=a_bmc("n1"))
        herd.lose("n1")
        herd.switches.power["n1"] = Power.OFF
        assert herd.until_tried("n1").status.reason == "PowerWasOff"
        assert not is_started(stage, "a")

    def test_likewise_where_it_was(self, stage: Stage, herd: FencingStage) -> None:
        stage.add_vm("a", "n1")
        herd.configure("n1", bmc=a_bmc("n1"))
        read_power(herd.ctx, herd.tools, "n1")
        herd.lose("n1")
        herd.switches.power["n1"] = Power.OFF
        assert herd.until_tried("n1").status.phase.has_evidence
        assert herd.switches.cut == []
        assert is_started(stage, "a")

    def test_likewise_where_a_worker_cut_it_and_died(self, stage: Stage, herd: FencingStage) -> None:
        stage.add_vm("a", "n1")
        herd.configure("n1", bmc=a_bmc("n1"))
        herd.switches.on_cut = dies
        herd.lose("n1")
        with pytest.raises(Died):
            herd.until_tried("n1")
        herd.switches.power["n1"] = Power.OFF
        herd.switches.on_cut = None
        disarm(herd.ctx, "", "somebody looks at it")  # nor does it matter what is shown meanwhile
        herd.scan(15)
        arm(herd.ctx, "")
        evidence = herd.until_tried("n1").status.evidence
        assert evidence is not None
        assert evidence.text == "the power was cut by an attempt before, and read back as off by its BMC"
        assert herd.switches.cut == ["n1"]
        assert is_started(stage, "a")

    def test_whom_that_cut_silenced_is_no_excuse_once_it_is_fenced(self, stage: Stage, herd: FencingStage) -> None:
        """The worker died before it saw that it was n2's power; a person has confirmed n2 meanwhile."""
        stage.add_vm("a", "n1")
        herd.configure("n1", bmc=a_bmc("n2"))
        herd.switches.on_cut = dies
        herd.lose("n1")
        with pytest.raises(Died):
            herd.until_tried("n1")
        herd.switches.power["n2"] = Power.OFF
        herd.lose("n2")
        for _ in range(20):
            herd.scan()
        confirm(herd.ctx, "n2", "alice")
        stored = read_lease(cast("str | None", stage.store.redis.get(keys.lease("n1"))))
        assert stored is not None
        services.begin(herd.ctx, "n1", "again", stored.lease)
        services.run_fencing(herd.ctx, herd.tools, "n1")
        assert not herd.fencing("n1").status.phase.has_evidence
        assert "n2" in herd.fencing("n1").status.bmc_distrust

    def test_that_reading_is_about_this_bmc(self, stage: Stage, herd: FencingStage) -> None:
        herd.configure("n1", bmc=a_bmc("n1"))
        read_power(herd.ctx, herd.tools, "n1")
        herd.configure("n1", bmc=a_bmc("spare"))
        herd.lose("n1")
        herd.switches.power["spare"] = Power.OFF
        assert herd.until_tried("n1").status.reason == "PowerWasOff"

    def test_swapped_addresses_prove_nothing(self, stage: Stage, herd: FencingStage) -> None:
        """n1 is lost, and its BMC on record is n2's: a healthy host falls silent when n1's power is cut."""
        stage.add_vm("a", "n1")
        stage.add_vm("b", "n2")
        herd.configure("n1", bmc=a_bmc("n2"))
        herd.switches.on_cut = herd.lose
        herd.lose("n1")
        status = herd.until_tried("n1").status
        assert (status.phase, status.reason) == (FencePhase.UNCONFIRMED, "BmcOfAnother")
        assert "n2" in status.message
        assert not is_started(stage, "a")
        assert "FenceUnconfirmed" in reasons(stage, "n1")

    def test_a_bmc_that_is_off_while_its_node_lives_is_never_used(self, stage: Stage, herd: FencingStage) -> None:
        herd.configure("n1", bmc=a_bmc("n2"))
        herd.switches.power["n2"] = Power.OFF
        read_power(herd.ctx, herd.tools, "n1")
        assert herd.fencing("n1").status.reason == services.BMC_CONTRADICTS

    def test_nor_later_when_the_node_is_lost(self, stage: Stage, herd: FencingStage) -> None:
        contradict(herd)
        herd.lose("n1")
        assert herd.until_tried("n1").status.reason == "BmcOfAnother"
        assert herd.switches.cut == []

    def test_nor_after_the_node_was_lost_and_came_back(self, stage: Stage, herd: FencingStage) -> None:
        contradict(herd)
        herd.beating.discard("n1")
        herd.until_tried("n1")
        herd.beating.add("n1")
        herd.scan(3)
        assert herd.fencing("n1").status.phase is FencePhase.IDLE
        read_power(herd.ctx, herd.tools, "n1")
        assert not stage.store.redis.exists(keys.bmc_on("n1"))
        herd.lose("n1")
        assert herd.until_tried("n1").status.reason == "BmcOfAnother"
        assert herd.switches.cut == []

    def test_another_bmc_is_trusted_again(self, stage: Stage, herd: FencingStage) -> None:
        contradict(herd)
        herd.configure("n1", bmc=a_bmc("n1"))
        herd.lose("n1")
        assert herd.until_tried("n1").status.phase.has_evidence
        assert herd.switches.cut == ["n1"]

    def test_swapped_addresses_are_remembered(self, stage: Stage, herd: FencingStage) -> None:
        """When the healthy host whose power was cut is back, nothing is known of the lost one still."""
        stage.add_vm("a", "n1")
        herd.configure("n1", bmc=a_bmc("n2"))
        herd.switches.on_cut = herd.lose
        herd.lose("n1")
        herd.until_tried("n1")
        herd.beating.add("n2")
        herd.switches.power["n2"] = Power.ON
        no_evidence(herd, "n1")
        assert herd.switches.cut == ["n2"]

    def test_one_that_stays_unconfirmed_keeps_no_other_from_being_read(self, stage: Stage, herd: FencingStage) -> None:
        herd.configure("n2", bmc=a_bmc("n2"))
        herd.lose("n1")
        assert herd.until_tried("n1").status.phase is FencePhase.UNCONFIRMED
        stage.forget()
        assert services.read_powers(herd.ctx) == 1

    def test_a_renewal_between_is_no_evidence(self, stage: Stage, herd: FencingStage) -> None:
        stage.add_vm("a", "n1")
        herd.configure("n1", bmc=a_bmc("n1"))
        herd.beating.discard("n1")
        herd.switches.on_cut = herd.renew
        herd.until_tried("n1")
        assert not herd.fencing("n1").status.phase.has_evidence
        assert not is_started(stage, "a")

    def test_a_renewal_before_the_off_saves_the_host(self, stage: Stage, herd: FencingStage) -> None:
        herd.configure("n1", bmc=a_bmc("n1"))
        herd.beating.discard("n1")
        for _ in range(60):
            herd.scan()
            if any(message.task is Task.FENCE for message in stage.outbox.sent):
                break
        herd.renew("n1")
        herd.settle()
        assert herd.switches.cut == []
        herd.beating.add("n1")
        herd.scan(2)
        assert herd.fencing("n1").status.phase is FencePhase.IDLE
        assert stage.store.get(Node, "n1").is_ready

    def test_a_host_whose_libvirt_answers_is_not_cut(self, stage: Stage, herd: FencingStage) -> None:
        herd.configure("n1", bmc=a_bmc("n1"))
        herd.beating.discard("n1")
        herd.listening.add("n1")
        node = stage.store.get(Node, "n1")
        uri = node.status.hypervisor.with_(migration_uri="qemu+tcp://n1/system")
        stage.store.must_commit(stage.store.batch().put(node, node.with_status(hypervisor=uri)))
        assert herd.until_tried("n1").status.reason == "HypervisorAnswers"
        assert herd.switches.cut == []

    @pytest.mark.parametrize(
        ("sees", "is_cut"),
        [
            ({"guests": [{"vm": "default/a", "incarnation": 1}]}, False),
            ({"guests": []}, True),  # it booted, and runs nothing
            ({"problem": "it did not answer within 5 s"}, True),  # its port takes connections all the same
        ],
        ids=["shows-its-vm", "shows-none", "hangs"],
    )
    def test_what_other_agents_see_decides(
        self, stage: Stage, herd: FencingStage, sees: dict[str, Any], *, is_cut: bool
    ) -> None:
        stage.add_vm("a", "n1")
        herd.configure("n1", bmc=a_bmc("n1"))
        herd.beating.discard("n1")
        node = stage.store.get(Node, "n1")
        uri = node.status.hypervisor.with_(migration_uri="qemu+tcp://n1/system")
        stage.store.must_commit(stage.store.batch().put(node, node.with_status(hypervisor=uri)))

        def listens(_host: str, _port: int) -> bool:
            stage.nodes["n2"].sees = sees
            stage.nodes["n2"].answer()
            stage.read()
            return True

        herd.tools = Tools(herd.switches, listens)
        herd.until_tried("n1")
        assert herd.switches.cut == (["n1"] if is_cut else [])
        orders = [order for node in stage.nodes.values() for order in node.store.orders()]
        assert not [order for order in orders if order.startswith("look:")]


class TestDeadline:
    def test_an_armed_watchdog_s_deadline_is_evidence(self, stage: Stage, armed: FencingStage) -> None:
        vm = stage.add_vm("a", "n1")
        armed.lose("n1")
        seconds = until_fenced(armed, "n1")
        evidence = armed.fencing("n1").status.evidence
        assert evidence is not None
        assert evidence.level is FenceLevel.DEADLINE
        timing = armed.renew("n2").timing
        assert seconds > timing.lease_ttl + timing.margin
        stage.play(lambda: stage.is_at_rest("a"))
        assert stage.world.running(vm.metadata.uid) != ["n1"]

    def test_no_period_passes_before_what_is_due_is_noticed(self, stage: Stage, armed: FencingStage) -> None:
        stage.add_vm("a", "n1")
        timing, at = armed.renew("n1").timing, {"lost": armed.now_s + 20}

        def note() -> None:
            at.setdefault(armed.fencing("n1").status.phase.value, armed.now_s)
            if stage.store.redis.hexists(keys.SUSPICIONS, "n1"):
                at.setdefault("suspected", armed.now_s)

        def sleep(seconds: float) -> None:
            note()  # a look has ended
            armed.pass_time(seconds)

        clock = Clock(stage.ctx.clock.now, lambda: armed.now_s, sleep)
        liveness = Liveness(Context(stage.store, stage.outbox, clock), stage.herd)
        while armed.now_s < at["lost"] + 40:
            if armed.now_s >= at["lost"]:
                armed.lose("n1")
            begun = armed.now_s
            stage.herd.follower.sync()
            liveness.watch(1.0)
            sleep(begun + 1.0 - armed.now_s)
        assert 0 < at["Fencing"] - at["lost"] - timing.lease_ttl < 0.2
        assert 0 < at["Fenced"] - at["suspected"] - timing.ack_wait < 0.7, "a vote is looked for four times a second"

    def test_not_without_a_watchdog(self, stage: Stage, herd: FencingStage) -> None:
        stage.add_vm("a", "n1")
        herd.lose("n1")
        no_evidence(herd, "n1")
        assert herd.fencing("n1").status.reason == "NoBmc"
        assert stage.store.redis.hlen(keys.SUSPICIONS) == 0

    def test_not_without_acknowledgements(self, stage: Stage, armed: FencingStage) -> None:
        armed.holding = False
        armed.lose("n1")
        no_evidence(armed, "n1")
        assert stage.store.redis.hexists(keys.SUSPICIONS, "n1")

    def test_not_in_a_herd_of_two(self, redis_url: str) -> None:
        stage = Stage(redis_url)
        stage.add_nodes("n1", "n2")
        armed = FencingStage(stage, armed=True)
        armed.lose("n1")
        no_evidence(armed, "n1")
        stage.close()

    def test_nor_while_it_may_hold_another_membership(self, stage: Stage, armed: FencingStage) -> None:
        armed.lose("n1")
        armed.publish(Membership(3, {name: f"{name}:1" for name in stage.nodes}, changed=1))
        no_evidence(armed, "n1")

    def test_nor_while_another_membership_is_prepared(self, stage: Stage, armed: FencingStage) -> None:
        armed.lose("n1")
        stage.store.redis.set(keys.MEMBERSHIP_NEXT, Membership(2, {"n1": "n1:1"}, changed=2).text())
        no_evidence(armed, "n1")
        stage.store.redis.delete(keys.MEMBERSHIP_NEXT)
        until_fenced(armed, "n1")

    def test_a_renewal_voids_the_suspicion(self, stage: Stage, armed: FencingStage) -> None:
        armed.beating.discard("n1")
        until_suspected(stage, armed)
        first = stage.store.redis.hget(keys.SUSPICIONS, "n1")
        armed.renew("n1")
        armed.scan()
        assert not stage.store.redis.hexists(keys.SUSPICIONS, "n1")
        until_suspected(stage, armed)
        assert stage.store.redis.hget(keys.SUSPICIONS, "n1") != first

    def test_the_script_counts_the_votes_itself(self, stage: Stage, armed: FencingStage) -> None:
        """Votes that went between the worker's reading and its commit count for nothing."""
        armed.lose("n1")
        until_suspected(stage, armed)
        armed.scan(5)
        armed.holding = False
        commit = stage.store.commit

        def late(batch: Any) -> Any:
            if any(check[0] == "acknowledged" for check in batch.checks):
                for name in ("n2", "n3", "n4"):
                    armed.renew(name, suspicions=())
            return commit(batch)

        stage.store.commit = late  # type: ignore[method-assign]
        no_evidence(armed, "n1")

    def test_a_worker_that_begins_anew_waits_anew(self, stage: Stage, armed: FencingStage) -> None:
        armed.lose("n1")
        armed.scan(16)
        armed.liveness = Liveness(armed.ctx, stage.herd)
        timing = armed.renew("n2").timing
        seconds = until_fenced(armed, "n1")
        assert seconds > timing.lease_ttl + timing.margin

    def test_nor_do_the_acknowledgements_of_before_count(self, stage: Stage, armed: FencingStage) -> None:
        """Redis may have failed over while no worker looked."""
        armed.lose("n1")
        until_suspected(stage, armed)
        before = stage.store.redis.hget(keys.SUSPICIONS, "n1")
        armed.liveness = Liveness(armed.ctx, stage.herd)
        run_id = stage.store.run_id()
        stage.store.redis.hset(keys.SUSPICIONS, "n1", str(before).replace(run_id, "f" * len(run_id)))
        armed.scan()
        assert not stage.store.redis.hexists(keys.SUSPICIONS, "n1")
        until_suspected(stage, armed)
        assert stage.store.redis.hget(keys.SUSPICIONS, "n1") != before

    def test_it_waits_for_a_failover_where_redis_is_replicated(
        self, stage: Stage, armed: FencingStage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        was_promoted(armed, monkeypatch, min_slaves_good_slaves=1)
        armed.liveness = Liveness(armed.ctx, stage.herd)
        armed.lose("n1")
        timing = armed.renew("n2").timing
        seconds = until_fenced(armed, "n1", 240)
        assert seconds > timing.lease_ttl + timing.margin + armed.ctx.config.redis_failover_wait

    def test_another_interruption_does_not_shorten_that(
        self, stage: Stage, armed: FencingStage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        was_promoted(armed, monkeypatch, min_slaves_good_slaves=1)
        stage.store.redis.config_set("min-replicas-max-lag", 200)
        try:
            armed.liveness = Liveness(armed.ctx, stage.herd)
            armed.scan()
        finally:
            stage.store.redis.config_set("min-replicas-max-lag", 10)
        armed.pass_time(LONGEST_GAP_S + 1)  # nobody looked meanwhile
        armed.lose("n1")
        for _ in range(150):
            armed.scan()
            armed.settle()
        assert not stage.store.redis.hexists(keys.SUSPICIONS, "n1")
        until_fenced(armed, "n1", 240)

    def test_not_from_a_redis_that_was_promoted_and_waits_for_no_replica(
        self, stage: Stage, armed: FencingStage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        was_promoted(armed, monkeypatch)
        stage.add_vm("a", "n1")
        armed.lose("n1")
        no_evidence(armed, "n1")
        assert stage.store.redis.hlen(keys.SUSPICIONS) == 0
        assert "min-replicas-to-write is 0" in armed.fencing("n1").status.deadline
        assert reasons(stage, "n1").count("DeadlineUnsafe") == 1
        monkeypatch.undo()  # somebody has set it
        until_fenced(armed, "n1")

    def test_failsafe_off_needs_no_vote(self, stage: Stage, armed: FencingStage) -> None:
        armed.renew("n1", failsafe=False)
        armed.lose("n1")
        armed.holding = False
        until_fenced(armed, "n1")
        assert stage.store.redis.hlen(keys.SUSPICIONS) == 0


class Died(Exception):
    """A fencing worker's end."""


def dies(_: str) -> None:
    raise Died


def contradict(herd: FencingStage) -> None:
    """The BMC on record for n1 is n2's: it was read as off while n1 lived, and n2 was switched on later."""
    herd.configure("n1", bmc=a_bmc("n2"))
    herd.switches.power["n2"] = Power.OFF
    read_power(herd.ctx, herd.tools, "n1")
    assert herd.fencing("n1").status.reason == services.BMC_CONTRADICTS
    herd.switches.power["n2"] = Power.ON


def was_promoted(herd: FencingStage, monkeypatch: pytest.MonkeyPatch, **more: int) -> None:
    """Redis says that it was a replica before it was promoted, and has none of its own now."""
    pipeline = herd.stage.store.redis.pipeline

    def told(*args: Any, **kwargs: Any) -> Any:
        pipe = pipeline(*args, **kwargs)
        execute = pipe.execute

        def answer(*args: Any, **kwargs: Any) -> list[Any]:
            found = execute(*args, **kwargs)
            for item in found:
                if isinstance(item, dict) and "second_repl_offset" in item:
                    item |= {"second_repl_offset": 1234, "connected_slaves": 0, **more}
            return found

        monkeypatch.setattr(pipe, "execute", answer)
        return pipe

    monkeypatch.setattr(herd.stage.store.redis, "pipeline", told)


def until_suspected(stage: Stage, herd: FencingStage) -> None:
    for _ in range(60):
        herd.scan()
        if stage.store.redis.hexists(keys.SUSPICIONS, "n1"):
            return
    raise AssertionError("not suspected")


def no_evidence(herd: FencingStage, name: str, seconds: int = 90) -> None:
    for _ in range(seconds):
        herd.scan()
        herd.settle()
    found = herd.stage.store.find(NodeFencing, name)
    assert found is None or not found.status.phase.has_evidence
    assert herd.stage.store.redis.get(keys.taken_over(name)) is None


class TestWhatIsNotFenced:
    def test_where_it_is_not_enabled(self, stage: Stage) -> None:
        herd = FencingStage(stage, armed=True, enabled=False)
        stage.add_vm("a", "n1")
        herd.configure("n1", bmc=a_bmc("n1"))
        herd.lose("n1")
        no_evidence(herd, "n1")
        assert herd.fencing("n1").status.reason == "FencingDisabled"
        assert herd.switches.cut == []

    def test_a_label_enables_it(self, stage: Stage) -> None:
        herd = FencingStage(stage, armed=True, enabled=False)
        set_labels(herd.ctx, "n1", {"node-manager.deckhouse.io/fencing-enabled": ""})
        herd.lose("n1")
        until_fenced(herd, "n1")

    def test_when_too_many_are_lost(self, stage: Stage, armed: FencingStage) -> None:
        for name in ("n1", "n2"):
            armed.configure(name, bmc=a_bmc(name))
            set_labels(armed.ctx, name, {"topology.kubernetes.io/rack": "r1"})
        armed.beating -= {"n1", "n2"}
        no_evidence(armed, "n1", 60)
        status = armed.fencing("n1").status
        assert status.reason == "TooManyLost"
        assert "2 of 4" in status.message
        assert "topology.kubernetes.io/rack=r1" in status.message
        assert armed.switches.cut == []

    def test_the_last_of_many_that_were_late_is_no_single_loss(self, stage: Stage, armed: FencingStage) -> None:
        """The network was away for a little less than a lease lasts: n2 is back in time, and n1 is a moment late."""
        armed.configure("n1", bmc=a_bmc("n1"))
        armed.scan(20)
        armed.beating -= {"n1", "n2"}
        armed.scan(9)
        armed.beating.add("n2")
        armed.scan(3)
        armed.settle()
        assert not stage.store.get(Node, "n1").is_ready
        assert armed.switches.cut == []
        armed.beating.add("n1")
        armed.scan(3)
        assert armed.fencing("n1").status.phase is FencePhase.IDLE
        armed.lose("n1")
        assert armed.until_tried("n1").status.phase.has_evidence

    def test_a_cordoned_and_empty_node(self, stage: Stage, armed: FencingStage) -> None:
        set_unschedulable(armed.ctx, "n1", unschedulable=True)
        armed.lose("n1")
        no_evidence(armed, "n1", 60)
        assert not stage.store.get(Node, "n1").is_ready

    def test_while_failover_is_disarmed(self, stage: Stage, armed: FencingStage) -> None:
        disarm(armed.ctx, "", "maintenance of the switch")
        armed.lose("n1")
        no_evidence(armed, "n1", 60)
        assert armed.fencing("n1").status.reason == "FailoverDisarmed"
        assert arm(armed.ctx, "")
        until_fenced(armed, "n1")

    def test_while_it_is_disarmed_what_halts_a_fencing_still_does(self, stage: Stage, armed: FencingStage) -> None:
        armed.holding = False
        armed.lose("n1")
        armed.until_tried("n1")
        assert disarm(armed.ctx, "", "maintenance of the switch")
        armed.beating.discard("n2")
        no_evidence(armed, "n1", 15)
        armed.configure("n1", bmc=a_bmc("n1"))
        no_evidence(armed, "n1", 15)
        assert armed.fencing("n1").status.reason == "TooManyLost"
        assert armed.switches.cut == []

    @pytest.mark.parametrize("text", [None, "{}"])
    def test_one_whose_lease_can_t_be_read_and_whose_agent_lives(
        self, stage: Stage, herd: FencingStage, text: str | None
    ) -> None:
        herd.configure("n1", bmc=a_bmc("n1"))
        herd.beating.discard("n1")
        stage.store.redis.delete(keys.lease("n1"))
        if text is not None:
            stage.store.redis.set(keys.lease("n1"), text)
        for count in range(60):
            stage.store.redis.set(keys.agent("n1"), str(count))
            herd.scan()
            herd.settle()
        assert herd.fencing("n1").status.reason == "AgentAlive"
        assert herd.switches.cut == []

    def test_after_an_interruption_everyone_has_their_whole_time(self, stage: Stage, armed: FencingStage) -> None:
        armed.now_s += 60  # nobody looked for a minute, and n1's heartbeat comes late
        armed.beating.discard("n1")
        armed.scan(8)
        armed.beating.add("n1")
        armed.scan(4)
        found = stage.store.find(NodeFencing, "n1")
        assert found is None or found.status.phase is FencePhase.IDLE
        assert stage.store.get(Node, "n1").is_ready

    def test_a_herd_that_all_fell_silent(self, stage: Stage, armed: FencingStage) -> None:
        for name in stage.nodes:
            armed.configure(name, bmc=a_bmc(name))
        armed.beating.clear()
        for name in stage.nodes:
            no_evidence(armed, name, 20)
        assert armed.switches.cut == []


class TestAPerson:
    def test_their_word_is_evidence(self, stage: Stage, herd: FencingStage) -> None:
        stage.add_vm("a", "n1")
        herd.lose("n1")
        herd.until_tried("n1")
        confirm(herd.ctx, "n1", "alice")
        herd.settle()
        evidence = herd.fencing("n1").status.evidence
        assert evidence is not None
        assert (evidence.level, evidence.text) == (FenceLevel.PERSON, "alice confirmed that it is off")
        assert is_started(stage, "a")
        with pytest.raises(Refused, match="fenced already: alice confirmed"):
            confirm(herd.ctx, "n1", "bob")
        with pytest.raises(NotFound):
            confirm(herd.ctx, "n9", "bob")

    def test_not_about_a_node_that_lives(self, stage: Stage, herd: FencingStage) -> None:
        with pytest.raises(Refused, match="it lives"):
            confirm(herd.ctx, "n1", "alice")


class TestWhatStarts:
    @pytest.mark.parametrize(
        ("policy", "starts"),
        [
            (RunPolicy.ALWAYS_ON, True),
            (RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY, True),
            (RunPolicy.MANUAL, False),
            (RunPolicy.ALWAYS_OFF, False),
        ],
    )
    def test_by_policy(self, stage: Stage, armed: FencingStage, policy: RunPolicy, *, starts: bool) -> None:
        stage.add_vm("a", "n1", policy=policy)
        armed.lose("n1")
        until_fenced(armed, "n1")
        armed.settle()
        assert is_started(stage, "a") == starts
        vm = stage.vm("a")
        running = find_condition(vm.status.conditions, "Running")
        assert running is not None
        assert (running.status, running.reason) == ("False", "NodeFenced")
        assert not vm.status.phase.occupies_node

    def test_what_was_stopped_stays_off(self, stage: Stage, armed: FencingStage) -> None:
        vm = stage.add_vm("a", "n1")
        stage.nodes["n1"].power_off(vm.metadata.uid)
        stage.read()
        armed.lose("n1")
        until_fenced(armed, "n1")
        assert stage.vm("a").status.phase is VmPhase.STOPPED
        assert not is_started(stage, "a")

    def test_the_most_important_first(self, stage: Stage, armed: FencingStage) -> None:
        for name, priority in (("low", 1), ("high", 100), ("none", 0)):
            vm = stage.add_vm(name, "n1")
            new = vm.with_(spec=vm.spec.with_(priority=priority))
            stage.store.must_commit(stage.store.batch().put(vm, new))
        armed.lose("n1")
        until_fenced(armed, "n1")
        operations = sorted(stage.operations(), key=lambda operation: operation.created_version)
        assert [o.spec.virtual_machine_name for o in operations] == ["high", "low", "none"]
        assert all(o.status.planned in {"n2", "n3", "n4"} for o in operations)

    def test_what_fits_nowhere_waits_and_says_so(self, stage: Stage, armed: FencingStage) -> None:
        stage.add_vm("big", "n1", memory="15Gi", cores=8)
        for name in ("n2", "n3", "n4"):
            stage.add_vm(f"on-{name}", name, memory="8Gi")
        armed.lose("n1")
        until_fenced(armed, "n1")
        stage.grant()
        (operation,) = [o for o in stage.operations() if o.spec.virtual_machine_name == "big"]
        assert "memory" in operation.message
        assert stage.vm("big").status.phase is VmPhase.PENDING


class TestOpenGrants:
    """What was under way on a node that died is settled, by the other host's word and by the evidence."""

    def test_a_start_goes_elsewhere(self, stage: Stage, armed: FencingStage) -> None:
        vm = stage.add_vm("a", "n1")
        stage.nodes["n1"].power_off(vm.metadata.uid)
        stage.read()
        create_operation(stage.ctx, new_operation("a", OperationType.START))
        (message,) = stage.grant()
        node = message.queue.split(".")[1]
        stage.nodes[node].begin(message)
        stage.read()
        armed.lose(node)
        until_fenced(armed, node)
        stage.play(lambda: stage.is_at_rest("a"))
        assert stage.world.running(vm.metadata.uid) != [node]

    def test_a_migration_whose_target_died_is_over(self, stage: Stage, armed: FencingStage) -> None:
        vm = stage.add_vm("a", "n1")
        stage.evict("a")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.read()
        stage.nodes["n1"].fall_back(grant)
        armed.lose(grant.target)
        until_fenced(armed, grant.target)

        def is_over() -> bool:
            recover_node(armed.ctx, stage.herd, grant.target)  # as every reconcile does
            return stage.is_at_rest("a")

        stage.play(is_over)
        assert grant.target not in stage.world.running(vm.metadata.uid)

    def test_a_migration_whose_source_died_waits_for_the_target(self, stage: Stage, armed: FencingStage) -> None:
        """It had switched over: it runs there, and is not started."""
        vm = stage.add_vm("a", "n1")
        stage.evict("a")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.read()
        stage.nodes["n1"].switch_over(grant)
        armed.lose("n1")
        until_fenced(armed, "n1")
        stage.reconcile()
        assert not is_started(stage, "a")  # the target has not answered yet
        stage.play(lambda: stage.is_at_rest("a"))
        assert stage.world.running(vm.metadata.uid) == [grant.target]
        assert stage.vm("a").status.incarnation == vm.status.incarnation
        recover(stage, armed)
        assert not is_started(stage, "a")

    def test_a_guest_that_was_still_arriving_is_started_anew(self, stage: Stage, armed: FencingStage) -> None:
        vm = stage.add_vm("a", "n1")
        stage.evict("a")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.read()
        armed.lose("n1")
        until_fenced(armed, "n1")

        def is_over() -> bool:
            recover(stage, armed)
            return stage.is_at_rest("a") and stage.vm("a").status.incarnation == vm.status.incarnation + 1

        stage.play(is_over)

    def test_the_node_goes_when_all_is_settled(self, stage: Stage, armed: FencingStage) -> None:
        stage.add_vm("a", "n1")
        stage.evict("a")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.read()
        stage.nodes["n1"].switch_over(grant)
        set_labels(armed.ctx, "n1", {"rack": "r1"})
        armed.lose("n1")
        until_fenced(armed, "n1")
        stage.play(lambda: stage.is_at_rest("a"))
        recover(stage, armed)
        assert not armed.has_node("n1")
        kept = armed.fencing("n1").status.kept
        assert kept is not None
        assert kept.labels["rack"] == "r1"


class TestBootedBeforeItIsBack:
    """It was fenced, booted and renews its lease, while what it had is still being settled."""

    @pytest.fixture
    def booted(self, stage: Stage, armed: FencingStage) -> FencingStage:
        stage.add_vm("a", "n1")
        stage.evict("a")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.read()
        stage.nodes["n1"].switch_over(grant)
        armed.lose("n1")
        until_fenced(armed, "n1")
        assert armed.fencing("n1").status.phase is FencePhase.FENCED  # the target has not answered
        armed.renew("n1", boot_id="b-next", generation="g-next")
        return armed

    def test_it_is_not_ready(self, stage: Stage, booted: FencingStage) -> None:
        for _ in range(5):
            booted.renew("n1", boot_id="b-next", generation="g-next")
            stage.herd.follower.sync()
            booted.now_s += 1
            booted.liveness.scan()
            assert not stage.store.get(Node, "n1").is_ready

    def test_nothing_is_granted_there_whatever_its_conditions_say(self, stage: Stage, booted: FencingStage) -> None:
        node = stage.store.get(Node, "n1")
        batch = stage.store.batch()
        fresh = Condition(type="LeaseFresh", status="True", reason="Renewed", message="")
        put_node(batch, node, node, (fresh,), stage.ctx.now())
        stage.store.must_commit(batch)
        for name in ("n2", "n3", "n4"):
            set_unschedulable(booted.ctx, name, unschedulable=True)
        vm = stage.add_vm("b", "n2")
        stage.nodes["n2"].power_off(vm.metadata.uid)
        stage.read()
        create_operation(stage.ctx, new_operation("b", OperationType.START))
        assert stage.store.get(Node, "n1").is_schedulable
        assert stage.grant() == []
        (operation,) = [o for o in stage.operations() if o.spec.virtual_machine_name == "b"]
        assert operation.status.grant is None


class TestPowerOnAgain:
    """What we cut is switched on again, however often that is lost or fails on the way."""

    @pytest.fixture
    def cut(self, stage: Stage, herd: FencingStage, monkeypatch: pytest.MonkeyPatch) -> FencingStage:
        """n1 was cut and is recovered; that its power is to be switched on is asked, and nobody has taken it."""
        monkeypatch.setattr("orchestrator.services.failover._POWER_ON_AGAIN", timedelta(0))
        herd.configure("n1", bmc=a_bmc("n1"))
        herd.lose("n1")
        herd.until_tried("n1")
        assert herd.fencing("n1").status.phase is FencePhase.RECOVERED
        assert herd.switches.power["n1"] is Power.OFF
        return herd

    def asked(self, stage: Stage, herd: FencingStage) -> str:
        """Reconcile, and have what it asks done; what came of it, empty where it asked nothing."""
        stage.herd.follower.sync()
        stage.reconcile()
        told = [power_on_again(herd.ctx, herd.tools, str(m.args[0])) for m in stage.outbox.take(Task.POWER_ON)]
        stage.herd.follower.sync()
        return told[0] if told else ""

    def test_a_message_that_is_lost_is_sent_again(self, stage: Stage, cut: FencingStage) -> None:
        assert len(stage.outbox.take(Task.POWER_ON)) == 1
        assert "switched on" in self.asked(stage, cut)
        assert cut.switches.power["n1"] is Power.ON
        assert self.asked(stage, cut) == ""
        assert reasons(stage, "n1").count("NodePowerOn") == 1

    def test_not_at_each_reconcile(self, stage: Stage, cut: FencingStage, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("orchestrator.services.failover._POWER_ON_AGAIN", timedelta(hours=1))
        cut.switches.stuck.add("n1")
        assert self.asked(stage, cut)
        assert self.asked(stage, cut) == ""

    def test_so_it_is_when_another_worker_is_at_its_bmc(self, stage: Stage, cut: FencingStage) -> None:
        stage.store.redis.set(keys.fencing("n1"), "somebody")
        assert "another worker" in self.asked(stage, cut)
        stage.store.redis.delete(keys.fencing("n1"))
        assert "switched on" in self.asked(stage, cut)

    def test_a_bmc_that_fails_is_tried_again(self, stage: Stage, cut: FencingStage) -> None:
        cut.switches.problems["n1"] = "exit code 1: no route"
        assert "no route" in self.asked(stage, cut)
        assert "no route" in self.asked(stage, cut)
        cut.switches.problems.clear()
        cut.switches.stuck.add("n1")  # it says that it did it
        assert "could not be read back as on" in self.asked(stage, cut)
        assert cut.fencing("n1").status.powered_off
        cut.switches.stuck.clear()
        assert "switched on" in self.asked(stage, cut)
        assert cut.switches.power["n1"] is Power.ON
        assert reasons(stage, "n1").count("NodePowerOn") == 3  # each thing that it had to say, once

    @pytest.mark.parametrize("why", ["confirmed", "left off", "distrusted", "another BMC", "not recovered"])
    def test_not_where_it_is_no_more_to_be_done(self, stage: Stage, cut: FencingStage, why: str) -> None:
        (message,) = stage.outbox.take(Task.POWER_ON)
        match why:
            case "confirmed":
                confirm(cut.ctx, "n1", "root")
            case "left off":
                cut.configure("n1", afterwards="LeaveOff")
            case "another BMC":
                cut.configure("n1", bmc=a_bmc("n9"))
                cut.switches.power["n9"] = Power.OFF
            case _:
                changes = {"bmc_distrust": "another host's"} if why == "distrusted" else {"phase": FencePhase.FENCING}
                old = cut.fencing("n1")
                stage.store.must_commit(stage.store.batch().put(old, old.with_status(**changes)))
        assert "nothing to do" in power_on_again(cut.ctx, cut.tools, str(message.args[0]))
        assert self.asked(stage, cut) == ""
        assert Power.ON not in {cut.switches.power["n1"], cut.switches.power.get("n9")}

    def test_a_corrected_password_changes_nothing_about_it(self, stage: Stage, cut: FencingStage) -> None:
        cut.configure("n1", bmc=a_bmc("n1", password_env="CORRECTED"))
        assert "switched on" in self.asked(stage, cut)


class TestReturn:
    def test_after_a_boot_it_has_all_again_that_people_said_of_it(self, stage: Stage, armed: FencingStage) -> None:
        vm = stage.add_vm("a", "n1")
        set_labels(armed.ctx, "n1", {"rack": "r1"})
        set_unschedulable(armed.ctx, "n1", unschedulable=True)
        annotations = {DISARMING_ANNOTATIONS[0]: "", BRING_BACK_ANNOTATION: "false"}
        old = stage.store.get(Node, "n1")
        annotated = old.with_(metadata=old.metadata.with_(annotations=annotations))
        stage.store.must_commit(stage.store.batch().put(old, annotated))
        armed.lose("n1")
        until_fenced(armed, "n1")
        stage.play(lambda: stage.is_at_rest("a"))
        assert not armed.has_node("n1")
        armed.boot("n1")
        node = stage.store.get(Node, "n1")
        assert node.metadata.labels["rack"] == "r1"
        assert node.metadata.annotations == annotations
        stage.reconcile()
        assert DISARMING_ANNOTATIONS[0] in str(stage.store.redis.get(keys.disarm("n1")))
        assert node.spec.unschedulable
        assert node.is_ready
        assert armed.fencing("n1").status.phase is FencePhase.IDLE
        assert stage.store.redis.get(keys.taken_over("n1")) is None
        assert stage.world.running(vm.metadata.uid) != ["n1"]

    def test_a_stale_guest_is_destroyed_first(self, stage: Stage, herd: FencingStage) -> None:
        """A person's word was wrong: the host runs on, its heartbeat alone had died."""
        vm = stage.add_vm("a", "n1")
        stale = stage.nodes["n1"].domains[vm.metadata.uid]
        herd.lose("n1")
        herd.until_tried("n1")
        confirm(herd.ctx, "n1", "alice")
        unread = herd.hosts["n1"]
        unread.domains[vm.metadata.uid] = stale
        unread.list_all()  # told before, and read after the evidence: it counts for nothing
        del unread.domains[vm.metadata.uid]
        herd.settle()
        stage.read()
        assert not herd.has_node("n1")
        stage.play(lambda: stage.is_at_rest("a"))
        stage.nodes["n1"] = unread
        stage.nodes["n1"].domains[vm.metadata.uid] = stale
        assert herd.renew("n1").sequence  # refused: what was taken over renews no more
        stage.nodes["n1"].answer()
        stage.read()
        assert not herd.has_node("n1")
        for message in stage.outbox.take(Task.NODE_SETTLE):
            assert stage.deliver(message)
        assert vm.metadata.uid not in stage.nodes["n1"].domains
        stage.read()
        stage.nodes["n1"].answer()
        stage.read()
        assert herd.has_node("n1")
        assert stage.store.redis.hlen(keys.orders("n1")) == 0
        (host,) = stage.world.running(vm.metadata.uid)
        assert host != "n1"
        assert stage.vm("a").status.incarnation == vm.status.incarnation + 1

    def test_it_is_watched_as_any_other_again(self, stage: Stage, armed: FencingStage) -> None:
        armed.lose("n1")
        until_fenced(armed, "n1")
        recover(stage, armed)
        armed.boot("n1")
        armed.scan(3)
        until_fenced(armed, "n1")


def recover(stage: Stage, herd: FencingStage) -> None:
    recover_node(herd.ctx, stage.herd, "n1")
