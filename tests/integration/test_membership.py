"""Who votes, as it is published; witnesses; and which watchdogs are to be disarmed. On a real Redis."""

from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.errors import Refused
from orchestrator.lease import Membership
from orchestrator.resources import (
    Maintenance,
    Node,
    NodeDrain,
    ObjectMeta,
    OperationType,
    RunPolicy,
    VmPhase,
    new_metadata,
)
from orchestrator.resources.drain import DrainPhase, DrainSpec
from orchestrator.resources.fencing import DRAINED, ENABLED_LABEL, NOT_ENABLED
from orchestrator.resources.maintenance import MaintenancePhase, MaintenanceSpec, NodeMaintenance, NodeStage
from orchestrator.services import drains
from orchestrator.services.arming import DISARMING_ANNOTATIONS, keep_arming
from orchestrator.services.fencing import arm, disarm, set_fencing
from orchestrator.services.liveness import Liveness
from orchestrator.services.membership import keep_membership
from orchestrator.services.nodes import (
    add_witness,
    check_no_witness,
    is_armed,
    remove_witness,
    set_labels,
    set_unschedulable,
)
from orchestrator.services.operations import create_operation, new_operation
from orchestrator.services.returning import HOSTNAME_LABEL
from orchestrator.store import keys
from orchestrator.store.node_store import NodeStore
from tests.builders import a_lease, a_vm
from tests.fakes import Stage

pytestmark = pytest.mark.integration


@pytest.fixture
def stage(redis_url: str) -> Iterator[Stage]:
    stage = Stage(redis_url)
    stage.add_nodes("n1", "n2", "n3")
    yield stage
    stage.close()


class Beating:
    """Nodes that renew their leases, one renewal at a time."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.held: dict[str, int] = {}
        self.at = 0

    def beat(self, *names: str, **fields: object) -> None:
        self.at += 1
        for name in names:
            lease = a_lease(self.at, membership=self.held.get(name, 0), address=f"{name}:7949", **fields)
            reply = NodeStore(self.stage.store.redis, name).renew_lease(lease)
            if reply.membership is not None:
                self.held[name] = reply.membership.version

    def publish(self) -> Membership | None:
        self.stage.herd.follower.sync()
        return keep_membership(self.stage.ctx, self.stage.herd)


@pytest.fixture
def beating(stage: Stage) -> Beating:
    return Beating(stage)


def test_who_never_beat_is_no_member(beating: Beating) -> None:
    assert beating.publish() is None
    beating.beat("n1", "n2")
    published = beating.publish()
    assert published is not None
    assert dict(published.members) == {"n1": "n1:7949", "n2": "n2:7949"}
    assert beating.publish() is None, "nothing changed"


def test_a_change_waits_until_every_member_has_acknowledged_the_one_before(beating: Beating) -> None:
    beating.beat("n1", "n2")
    assert beating.publish() is not None
    beating.beat("n3")
    assert beating.publish() is None, "nobody has acknowledged version 1"
    beating.beat("n1", "n2")
    beating.beat("n1")
    assert beating.publish() is None, "n2 holds it, but has not said so"
    beating.beat("n2")
    published = beating.publish()
    assert published is not None
    assert (published.version, set(published.members), published.changed) == (2, {"n1", "n2", "n3"}, 1)


def test_the_lost_one_holds_it_up_unless_there_is_evidence(beating: Beating, stage: Stage) -> None:
    beating.beat("n1", "n2")
    assert beating.publish() is not None
    beating.beat("n1")
    beating.beat("n1", "n3")
    assert beating.publish() is None
    stage.store.redis.set(keys.taken_over("n2"), "b g")
    assert beating.publish() is not None


def test_evidence_of_a_former_boot_is_none_of_this_one(beating: Beating, stage: Stage) -> None:
    beating.beat("n1", "n2")
    assert beating.publish() is not None
    stage.store.redis.set(keys.taken_over("n2"), "an-earlier-boot g")
    beating.beat("n1")
    beating.beat("n1", "n3")
    assert beating.publish() is None


def test_several_that_join_at_once_are_one_version_that_says_so(beating: Beating) -> None:
    beating.beat("n1", "n2", "n3")
    published = beating.publish()
    assert published is not None
    assert published.changed == 3
    assert published.counts_for(published.version)
    assert not published.counts_for(published.version - 1)


def test_a_node_that_left_is_no_member(beating: Beating, stage: Stage) -> None:
    beating.beat("n1", "n2", "n3")
    assert beating.publish() is not None
    beating.beat("n1", "n2", "n3")
    beating.beat("n1", "n2", "n3")
    stage.store.must_commit(stage.store.batch().delete(stage.store.get(Node, "n3")))
    published = beating.publish()
    assert published is not None
    assert set(published.members) == {"n1", "n2"}


def test_a_witness_votes_and_takes_no_vms(beating: Beating, stage: Stage) -> None:
    add_witness(stage.ctx, "w1")
    add_witness(stage.ctx, "w1")
    witness = stage.store.get(Node, "w1")
    assert not witness.is_ready
    beating.beat("n1", "w1", witness=True)
    published = beating.publish()
    assert published is not None
    assert set(published.members) == {"n1", "w1"}
    liveness = Liveness(stage.ctx, stage.herd)
    liveness.scan()
    beating.beat("w1", witness=True)
    liveness.scan()
    witness = stage.store.get(Node, "w1")
    assert witness.is_ready
    assert not witness.is_schedulable
    assert stage.store.redis.smembers(keys.SCHEDULABLE) == {"n1", "n2", "n3"}, "the cap on migrations"
    remove_witness(stage.ctx, "w1")
    assert stage.store.find(Node, "w1") is None


def test_a_name_is_a_hypervisors_or_a_witness(stage: Stage) -> None:
    with pytest.raises(Refused, match="'n1' is a hypervisor"):
        add_witness(stage.ctx, "n1")
    add_witness(stage.ctx, "w1")
    with pytest.raises(Refused, match="'w1' is a witness"):
        check_no_witness(stage.ctx, "w1")
    remove_witness(stage.ctx, "n1")
    assert stage.store.find(Node, "n1") is not None


def test_whether_a_node_is_armed_is_read_from_its_lease(beating: Beating, stage: Stage) -> None:
    assert not is_armed(stage.ctx, "n1")
    beating.beat("n1", armed=True)
    assert is_armed(stage.ctx, "n1")


@pytest.mark.parametrize("annotation", DISARMING_ANNOTATIONS)
def test_the_platforms_annotations_disarm(stage: Stage, annotation: str) -> None:
    def annotated(annotations: dict[str, str]) -> str:
        old = stage.store.get(Node, "n2")
        new = old.with_(metadata=old.metadata.with_(annotations=annotations))
        stage.store.must_commit(stage.store.batch().put(old, new))
        stage.herd.follower.sync()
        keep_arming(stage.ctx, stage.herd)
        return NodeStore(stage.store.redis, "n2").renew_lease(a_lease(stage.store.version())).disarm

    enable(stage, "n1", "n2")
    assert annotated({annotation: ""}) == f"annotation {annotation}"
    assert stage.store.redis.exists(keys.disarm("n1")) == 0
    assert annotated({"other": "x"}) == ""


def enable(stage: Stage, *names: str) -> None:
    for name in names:
        set_fencing(stage.ctx, name, lambda spec: spec.with_(enabled=True))


class TestAWatchdogIsForFencing:
    """Where nothing of a node may restart elsewhere, it would reset the host for nothing."""

    def said(self, stage: Stage) -> str:
        stage.reconcile()
        return NodeStore(stage.store.redis, "n2").renew_lease(a_lease(stage.store.version())).disarm

    def test_it_is_disarmed_where_that_is_not_enabled(self, stage: Stage) -> None:
        assert self.said(stage) == NOT_ENABLED

    def test_nor_where_a_person_says_no_and_the_label_yes(self, stage: Stage) -> None:
        set_labels(stage.ctx, "n2", {ENABLED_LABEL: ""})
        set_fencing(stage.ctx, "n2", lambda spec: spec.with_(enabled=False))
        assert self.said(stage) == NOT_ENABLED

    def test_nor_while_failover_is_disarmed(self, stage: Stage) -> None:
        enable(stage, "n2")
        disarm(stage.ctx, "", "switch maintenance")
        assert self.said(stage) == "failover is disarmed: switch maintenance"
        arm(stage.ctx, "")
        assert self.said(stage) == ""
        disarm(stage.ctx, "n1", "its disks")
        assert self.said(stage) == ""
        disarm(stage.ctx, "n2", "its disks")
        assert self.said(stage) == "failover is disarmed: its disks"

    @pytest.mark.parametrize(
        ("at", "said"),
        [
            (NodeStage.DRAINING, ""),  # its VMs are still there
            (NodeStage.DRAINED, "maintenance m"),
            (NodeStage.HOOK, "maintenance m"),
            (NodeStage.RETURNING, "maintenance m"),
            (NodeStage.DONE, ""),
        ],
    )
    def test_nor_while_its_maintenance_has_emptied_it(self, stage: Stage, at: NodeStage, said: str) -> None:
        enable(stage, "n2")
        spec = MaintenanceSpec(nodes=("n2",), hook="true")
        maintenance = Maintenance(
            metadata=new_metadata(ObjectMeta(name="m"), namespaced=False, now=stage.ctx.now()), spec=spec
        )
        paused = maintenance.with_node("n2", NodeMaintenance(stage=at)).with_status(phase=MaintenancePhase.PAUSED)
        stage.store.must_commit(stage.store.batch().create(paused))
        stage.herd.follower.sync()
        keep_arming(stage.ctx, stage.herd)
        assert NodeStore(stage.store.redis, "n2").renew_lease(a_lease(1)).disarm == said

    def test_nor_while_a_drain_has_emptied_it(self, stage: Stage) -> None:
        enable(stage, "n2")
        set_unschedulable(stage.ctx, "n2", unschedulable=True)
        assert self.said(stage) == "", "it is cordoned, and nobody said that it is to be empty"
        drains.begin(stage.ctx, "n2", DrainSpec())
        assert self.said(stage) == DRAINED
        drains.uncordon(stage.ctx, "n2")
        assert self.said(stage) == ""

    def test_it_is_armed_again_when_a_vm_appears_there(self, stage: Stage) -> None:
        """By a way that is not ours: nothing is granted there."""
        enable(stage, "n2")
        drains.begin(stage.ctx, "n2", DrainSpec())
        assert self.said(stage) == DRAINED
        stage.add_vm("a", "n2")
        assert self.said(stage) == ""
        assert stage.store.get(NodeDrain, "n2").status.phase is DrainPhase.DRAINED

    def test_nor_is_one_whose_drain_leaves_some_there(self, stage: Stage) -> None:
        enable(stage, "n2")
        stage.add_vm("a", "n2")
        drains.begin(stage.ctx, "n2", DrainSpec(selector="none=such"))
        assert stage.store.get(NodeDrain, "n2").status.phase is DrainPhase.DRAINED
        assert self.said(stage) == ""

    def test_nothing_is_started_there_meanwhile(self, stage: Stage) -> None:
        """Neither by name nor by label."""
        enable(stage, "n2")
        drains.begin(stage.ctx, "n2", DrainSpec())
        vm = a_vm("a", node="", phase=VmPhase.STOPPED, policy=RunPolicy.MANUAL, selector={HOSTNAME_LABEL: "n2"})
        stage.store.must_commit(stage.store.batch().create(vm))
        create_operation(stage.ctx, new_operation("a", OperationType.START))
        assert stage.grant() == []
        assert self.said(stage) == DRAINED

    def test_a_person_or_the_label_enables_it(self, stage: Stage) -> None:
        enable(stage, "n2")
        assert self.said(stage) == ""
        set_fencing(stage.ctx, "n2", lambda spec: spec.with_(enabled=None))
        assert self.said(stage) == NOT_ENABLED
        set_labels(stage.ctx, "n2", {ENABLED_LABEL: ""})
        assert self.said(stage) == ""

    def test_it_is_told_before_it_is_a_member(self, stage: Stage, beating: Beating) -> None:
        """A member arms at once, unless it is told not to."""
        beating.beat("n1", "n2", "n3")
        redis, seen = stage.store.redis, []

        def looked(*args: Any) -> Any:
            seen.append(redis.get(keys.disarm("n1")))
            return keep_membership(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("orchestrator.services.reconcile.keep_membership", looked)
            stage.reconcile()
        assert seen == [NOT_ENABLED]
