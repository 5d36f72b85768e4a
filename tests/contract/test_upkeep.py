"""Drains, maintenances, rebalancing and fencing, by both ways to the herd: one suite, as `test_client` is."""

from collections.abc import Callable, Iterator

import pytest

from orchestrator.errors import Invalid, NotFound, Refused, VmherdError
from orchestrator.resources import (
    Condition,
    Maintenance,
    Node,
    NodeDrain,
    NodeFencing,
    RebalancePolicy,
    VirtualMachine,
    VirtualMachineOperation,
)
from orchestrator.resources.drain import DrainPhase, DrainSpec, VmState
from orchestrator.resources.fencing import Bmc, FenceLevel
from orchestrator.resources.maintenance import MaintenancePhase, MaintenanceSpec, NodeMaintenance, NodeStage
from orchestrator.services.context import Context
from orchestrator.services.recovery import check_identity
from orchestrator.store import Store, keys
from tests.builders import a_node, a_vm, granted_operation
from tests.contract.clients import WAYS, Herd, is_stored
from tests.fakes import Outbox

VM_LABEL = "vm.kubevirt.internal.virtualization.deckhouse.io/name"


@pytest.fixture(params=WAYS)
def herd(request: pytest.FixtureRequest, redis_url: str, store: Store) -> Iterator[Herd]:
    """Two hosts, and two VMs on the first."""
    assert check_identity(Context(store, Outbox()))
    with WAYS[request.param](redis_url) as client:
        herd = Herd(client, store, redis_url)
        herd.put(a_node("n1"), a_node("n2"), a_vm("a", node="n1"), a_vm("b", node="n1"))
        yield herd


def said(do: Callable[[], object], kind: type[VmherdError]) -> str:
    with pytest.raises(kind) as refused:
        do()
    assert type(refused.value) is kind
    return str(refused.value)


class TestDrains:
    def test_a_plan_is_the_cores_own_and_begins_nothing(self, herd: Herd) -> None:
        plan = herd.client.plan_drain(["n1"], DrainSpec())
        moves = {(move.job.vm, move.job.source, move.job.target) for move in plan.moves}
        assert moves == {("default/a", "n1", "n2"), ("default/b", "n1", "n2")}
        assert plan.seconds > 0
        assert plan.problem() == ""
        assert herd.store.all(NodeDrain) == []
        only = herd.client.plan_drain(["n1"], DrainSpec(selector=f"{VM_LABEL}=a"))
        assert [move.job.vm for move in only.moves] == ["default/a"]
        assert said(lambda: herd.client.plan_drain(["n9"], DrainSpec()), NotFound) == "Node 'n9' not found"
        assert "spec.selector" in said(lambda: herd.client.plan_drain(["n1"], DrainSpec(selector="a in")), Invalid)

    def test_begun_and_ended(self, herd: Herd) -> None:
        (drain,) = herd.client.begin_drains(["n1"], DrainSpec(timeout_s=60, requested_by="me"))
        assert is_stored(herd, drain)
        assert (drain.status.phase, drain.spec.timeout_s) == (DrainPhase.DRAINING, 60)
        assert drain.spec.requested_by in {"me", "suite"}
        assert herd.store.get(Node, "n1").spec.unschedulable
        assert len(herd.store.all(VirtualMachineOperation)) == 2
        assert herd.client.all(NodeDrain) == herd.store.all(NodeDrain)
        again = herd.client.begin_drains(["n1"], DrainSpec())
        assert again[0].metadata.uid == drain.metadata.uid
        ended = herd.client.cancel_drain("n1", "enough")
        assert ended.status.phase is DrainPhase.CANCELLED
        assert herd.store.all(VirtualMachineOperation) == []
        assert herd.store.get(Node, "n1").spec.unschedulable
        assert said(lambda: herd.client.cancel_drain("n2", "x"), NotFound) == "NodeDrain 'n2' not found"

    def test_what_cant_be_emptied_is_refused_and_nothing_is_begun(self, herd: Herd) -> None:
        both = lambda: herd.client.begin_drains(["n2", "n1"], DrainSpec())  # noqa: E731 - asked for twice
        told = said(both, Refused)
        assert told.startswith("n2, n1 can't be emptied: the rest of the herd has no place for 2 VMs: a (")
        assert told.endswith("--partial moves the others all the same")
        assert herd.store.all(NodeDrain) == []
        begun = herd.client.begin_drains(["n2", "n1"], DrainSpec(partial=True))
        assert [drain.name for drain in begun] == ["n2", "n1"]

    def test_what_it_moved_comes_home_at_an_uncordon(self, herd: Herd) -> None:
        herd.client.begin_drains(["n1"], DrainSpec())
        drain = herd.store.get(NodeDrain, "n1")
        moved = {key: vm.with_(state=VmState.LEFT, moved=True, target="n2") for key, vm in drain.vms.items()}
        herd.change(drain, vms=moved, phase=DrainPhase.DRAINED)
        for operation in herd.store.all(VirtualMachineOperation):
            herd.store.must_commit(herd.store.batch().delete(operation))
        for vm in herd.store.all(VirtualMachine):
            herd.change(vm, node_name="n2")
        assert herd.client.set_unschedulable("n1", unschedulable=False, bring_back=True)
        assert herd.store.get(NodeDrain, "n1").status.phase is DrainPhase.RETURNING
        assert "vmherd.dev/bring-back" not in herd.store.get(Node, "n1").metadata.annotations


class TestMaintenances:
    spec = MaintenanceSpec(nodes=("n1", "n2"), hook="true", requested_by="me")

    def test_begun_paused_resumed_and_stopped(self, herd: Herd) -> None:
        begun = herd.client.begin_maintenance("m1", self.spec)
        assert is_stored(herd, begun)
        assert begun.status.phase is MaintenancePhase.RUNNING
        assert herd.client.begin_maintenance("m1", self.spec).metadata.uid == begun.metadata.uid
        other = self.spec.with_(hook="false")
        assert said(lambda: herd.client.begin_maintenance("m1", other), Refused) == (
            "Maintenance 'm1' is there already, and about other nodes or another hook"
        )
        assert "is in Maintenance 'm1'" in said(lambda: herd.client.begin_maintenance("m2", other), Refused)
        nowhere = self.spec.with_(nodes=("n9",))
        assert said(lambda: herd.client.begin_maintenance("m2", nowhere), NotFound) == "Node 'n9' not found"
        assert herd.client.pause_maintenance("m1", "why").status.phase is MaintenancePhase.PAUSED
        assert herd.client.resume_maintenance("m1").status.phase is MaintenancePhase.RUNNING
        assert herd.client.stop_maintenance("m1", "why").status.phase is MaintenancePhase.STOPPING
        assert "is Stopping, not Paused" in said(lambda: herd.client.resume_maintenance("m1"), Refused)
        assert said(lambda: herd.client.pause_maintenance("m9", "x"), NotFound) == "Maintenance 'm9' not found"
        assert herd.client.all(Maintenance) == herd.store.all(Maintenance)

    def test_a_hook_is_claimed_held_and_ended_once(self, herd: Herd) -> None:
        herd.client.begin_maintenance("m1", self.spec)
        assert herd.client.claim_hook("m1", "me") is None
        herd.client.set_unschedulable("n1", unschedulable=True)
        herd.change(herd.store.get(Maintenance, "m1"), nodes={"n1": NodeMaintenance(stage=NodeStage.DRAINED)})
        assert herd.client.claim_hook("m1", "me") == "n1"
        assert herd.client.claim_hook("m1", "you") is None
        assert herd.client.renew_hook("m1", "n1", "me")
        assert not herd.client.renew_hook("m1", "n1", "you")
        assert herd.client.end_hook("m1", "n1", "me", -9, "x" * 9_000)
        assert not herd.client.end_hook("m1", "n1", "me", 0, "")
        node = herd.store.get(Maintenance, "m1").node("n1")
        assert (node.exit_code, node.attempts, len(node.output)) == (-9, 1, 2_000)


class TestOverviews:
    def test_say_how_the_herd_is_now(self, herd: Herd) -> None:
        with herd.client.overviews(lambda: None) as look:
            first = look()
            assert {load.name: (load.status, load.vms) for load in first.nodes} == {
                "n1": ("Ready", 2),
                "n2": ("Ready", 0),
            }
            assert first.nodes[0].memory_reserved_mib > 2 * 1024
            assert (first.operations, first.phases, first.slots_used, first.slots_cap) == ((), {"Running": 2}, 0, 2)
            herd.client.set_unschedulable("n2", unschedulable=True)
            herd.put(granted_operation("move", "a"))
            second = look()
        assert {load.name: load.status for load in second.nodes}["n2"] == "Ready,SchedulingDisabled"
        assert [(one.name, one.virtual_machine) for one in second.operations] == [("move", "a")]
        assert (second.slots_used, second.slots_cap) == (1, 1)


class TestRebalancing:
    def test_the_policy(self, herd: Herd) -> None:
        assert herd.client.policy().spec.enabled
        changed = herd.client.change_policy({"enabled": False, "thresholds.cpu": 70})
        assert (changed.spec.enabled, changed.spec.thresholds.cpu, changed.spec.thresholds.memory) == (False, 70, 80)
        assert is_stored(herd, changed)
        assert herd.client.policy() == herd.store.get(RebalancePolicy, "cluster")
        assert herd.client.change_policy({"hold": 3}).spec.thresholds.cpu == 70
        for wrong in ({"holds": 3}, {"hold": "x"}, {"hold.x": 3}, {"thresholds.cpu": 101}):
            with pytest.raises(Invalid, match=next(iter(wrong)).partition(".")[0]):
                herd.client.change_policy(wrong)
        assert herd.client.policy().spec.hold == 3

    def test_a_plan_and_what_comes_of_it(self, herd: Herd) -> None:
        herd.change(herd.store.get(Node, "n1"), capacity=a_node("n1", memory_mib=2500).status.capacity)
        why, plan = herd.client.plan_moves()
        assert why == ""
        assert [(move.vm, move.source, move.target) for move in plan.moves] == [("default/a", "n1", "n2")]
        assert plan.over == ("n1",)
        assert herd.store.all(VirtualMachineOperation) == []
        why, done, made = herd.client.rebalance()
        assert (why, done) == ("", plan)
        assert [is_stored(herd, one) for one in made] == [True]
        herd.store.redis.hset(keys.IDENTITY, "state", "recovery")
        assert herd.client.plan_moves()[0] == "the herd is in recovery (recovery)"
        assert herd.client.rebalance()[2] == []

    def test_what_a_loss_would_come_to(self, herd: Herd) -> None:
        found = herd.client.failures(["n1"])
        assert {name: failure.nodes for name, failure in found.items()} == {"n1": ("n1",)}
        assert found["n1"].message == "all 2 VMs that would have to be restarted fit elsewhere"
        assert set(herd.client.failures([])) == {"n1", "n2"}
        herd.client.set_unschedulable("n2", unschedulable=True)
        assert set(herd.client.failures(["n1"])["n1"].stranded) == {"default/a", "default/b"}
        assert said(lambda: herd.client.failures(["n9"]), NotFound) == "Node 'n9' not found"


class TestFencing:
    def test_how_a_node_is_fenced(self, herd: Herd) -> None:
        bmc = Bmc(agent="fence_ipmilan", options={"ip": "192.0.2.1"}, password_file="/secret")
        first = herd.client.set_fencing("n1", lambda old: old.with_(bmc=bmc, enabled=True))
        assert is_stored(herd, first)
        second = herd.client.set_fencing("n1", lambda old: old.with_(afterwards="LeaveOff"))
        assert (second.spec.bmc, second.spec.enabled, second.spec.afterwards) == (bmc, True, "LeaveOff")
        assert herd.client.set_fencing("n1", lambda old: old.with_(bmc=None)).spec.bmc is None
        assert herd.client.set_fencing("later", lambda old: old.with_(enabled=False)).name == "later"
        assert herd.client.all(NodeFencing) == herd.store.all(NodeFencing)

    def test_a_persons_word(self, herd: Herd) -> None:
        fresh = Condition(type="LeaseFresh", status="True", reason="Renewed")
        herd.change(herd.store.get(Node, "n1"), conditions=(fresh,))
        assert "renews its lease: it lives" in said(lambda: herd.client.confirm_fencing("n1", "me"), Refused)
        assert said(lambda: herd.client.confirm_fencing("n9", "me"), NotFound) == "Node 'n9' not found"
        herd.change(herd.store.get(Node, "n1"), conditions=())
        herd.client.confirm_fencing("n1", "me")
        evidence = herd.store.get(NodeFencing, "n1").status.evidence
        assert evidence is not None
        assert evidence.level is FenceLevel.PERSON
        assert evidence.text.partition(" ")[0] in {"me", "suite"}
        assert "is fenced already" in said(lambda: herd.client.confirm_fencing("n1", "me"), Refused)

    def test_the_power_is_asked_for(self, herd: Herd) -> None:
        assert said(lambda: herd.client.test_power("n1"), NotFound).startswith("node 'n1' has no BMC on record")
        herd.client.set_fencing("n1", lambda old: old.with_(bmc=Bmc(agent="fence_not_there")))
        assert "fence_not_there" in said(lambda: herd.client.test_power("n1"), Refused)

    def test_disarmed_and_armed(self, herd: Herd) -> None:
        assert herd.client.disarmed() == {}
        assert herd.client.disarm("", "a switch") is False
        assert herd.client.disarm("n1", "a disk") is False
        assert herd.client.disarmed() == {"*": "a switch", "n1": "a disk"}
        assert said(lambda: herd.client.disarm("n9", "x"), NotFound) == "Node 'n9' not found"
        assert herd.client.arm("")
        assert not herd.client.arm("")
        assert herd.client.disarmed() == {"n1": "a disk"}
