"""The real kubectl on what keeps the herd in order: drains, maintenances, rebalancing, fencing; and on nodes."""

import json
import re
from collections.abc import Iterator
from typing import ClassVar

import pytest
import yaml

from orchestrator.lease import Lease as Heartbeat
from orchestrator.lease import Timing
from orchestrator.resources import KINDS, Maintenance, Node, NodeDrain, NodeFencing, RebalancePolicy
from orchestrator.resources.drain import DrainPhase
from orchestrator.resources.maintenance import MaintenancePhase
from orchestrator.resources.node import NodeInventory
from orchestrator.services import maintenances
from orchestrator.services.context import Context
from orchestrator.services.herd import Herd
from orchestrator.store import keys
from tests.builders import a_node, an_inventory
from tests.fakes import Outbox
from tests.integration.command import Vmherd, vm_manifest
from tests.kubectl import ApiProcess, Kubectl
from tests.processes import Processes
from tests.redis_server import RedisServer

pytestmark = pytest.mark.kubectl
DRAIN, MAINTENANCE = "nodedrain.vmherd.dev", "maintenance.vmherd.dev"
POLICY, FENCING = "rebalancepolicy.vmherd.dev", "nodefencing.vmherd.dev"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("api")
    redis = RedisServer(folder / "redis")
    redis.start()
    with Processes(redis.url, folder) as processes:
        yield ApiProcess(processes, folder, redis.url).wait_ready()
    redis.kill()


@pytest.fixture
def herd(server: ApiProcess) -> Iterator[Vmherd]:
    """Three nodes and nothing else."""
    herd = Vmherd(server.environment["VMHERD_REDIS_URL"])
    batch = herd.store.batch()
    for name, kind in KINDS.items():
        for resource in () if name == "AccessToken" else herd.store.all(kind):
            batch.delete(resource)
    herd.store.must_commit(batch)
    herd.store.must_commit(herd.store.batch().create(a_node("h1")).create(a_node("h2")).create(a_node("h3")))
    yield herd
    herd.store.close()


@pytest.fixture
def kubectl(server: ApiProcess, herd: Vmherd) -> Kubectl:
    return server.kubectl()


def document(kind: str, name: str, **spec: object) -> str:
    head = {"apiVersion": "vmherd.dev/v1", "kind": kind, "metadata": {"name": name}}
    return yaml.safe_dump({**head, "spec": spec})


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


class TestDrains:
    def test_made_watched_and_deleted(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm("a")
        with kubectl.beside("get", "drain", "-w") as watch:
            wanted = document("NodeDrain", "h1", timeoutS=600, requestedBy="somebody else")
            assert kubectl.ok("create", "-f", "-", stdin=wanted) == f"{DRAIN}/h1 created\n"
            watch.wait_for("h1", "Draining", "1/1", "root")
        assert herd.store.get(Node, "h1").spec.unschedulable
        assert len(herd.operations()) == 1
        assert kubectl.ok("delete", "drain", "h1", "--timeout=30s") == f'{DRAIN} "h1" deleted\n'
        assert herd.store.all(NodeDrain) == []
        assert herd.operations() == []
        assert herd.store.get(Node, "h1").spec.unschedulable

    def test_what_is_wrong_or_has_no_place_is_refused(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm("a")
        told = kubectl.refused("create", "-f", "-", stdin=document("NodeDrain", "h1", timeoutS=-1, selektor="x"))
        assert "* spec.timeoutS: " in told
        assert "* spec.selektor: unknown field" in told
        assert "spec.cause" in kubectl.refused(
            "create", "-f", "-", stdin=document("NodeDrain", "h1", cause="HostShutdown")
        )
        kubectl.ok("cordon", "h2")
        kubectl.ok("cordon", "h3")
        told = kubectl.refused("create", "-f", "-", stdin=document("NodeDrain", "h1"))
        assert "h1 can't be emptied: the rest of the herd has no place for 1 VMs: a (" in told
        assert herd.store.all(NodeDrain) == []
        kubectl.ok("create", "-f", "-", stdin=document("NodeDrain", "h1", partial=True))
        assert herd.store.get(NodeDrain, "h1").status.phase is DrainPhase.DRAINING


class TestMaintenances:
    def test_made_paused_resumed_and_deleted(self, herd: Vmherd, kubectl: Kubectl) -> None:
        wanted = document("Maintenance", "october", nodes=["h1", "h2"], hook="true")
        assert kubectl.ok("apply", "-f", "-", stdin=wanted) == f"{MAINTENANCE}/october created\n"
        assert kubectl.ok("apply", "-f", "-", stdin=wanted) == f"{MAINTENANCE}/october unchanged\n"
        assert rows(kubectl.ok("get", "maint"))[1][:3] == ["october", "Running", "0/2"]

        def phase() -> MaintenancePhase:
            return herd.store.get(Maintenance, "october").status.phase

        kubectl.ok("patch", "maint", "october", "--type=merge", "-p", '{"spec": {"paused": true}}')
        assert phase() is MaintenancePhase.PAUSED
        assert kubectl.ok("get", "maint", "october", "-o", "jsonpath={.spec.paused}") == "true"
        kubectl.ok("patch", "maint", "october", "--type=merge", "-p", '{"spec": {"paused": false}}')
        assert phase() is MaintenancePhase.RUNNING
        kubectl.ok("create", "--raw", "/apis/vmherd.dev/v1/maintenances/october/pause", "-f", "-", stdin="{}")
        assert phase() is MaintenancePhase.PAUSED
        told = kubectl.refused("patch", "maint", "october", "--type=merge", "-p", '{"spec": {"hook": "rm -rf /"}}')
        assert "spec.hook: can't be changed" in told
        with kubectl.beside("delete", "maint", "october", "--timeout=60s") as deleting:
            deleting.wait_for("deleted")
            assert phase() is MaintenancePhase.STOPPING
            copy = Herd(herd.store).start()
            maintenances.keep_maintenances(Context(herd.store, Outbox()), copy)
            copy.follower.sync()
            maintenances.keep_maintenances(Context(herd.store, Outbox()), copy)
            copy.stop()
            assert deleting.ended() == 0
        assert herd.store.all(Maintenance) == []

    def test_fields_are_checked_and_explained(self, kubectl: Kubectl) -> None:
        wrong = document("Maintenance", "october", nodes=["h1"], hook="", parallel=-1)
        told = kubectl.refused("create", "-f", "-", stdin=wrong)
        assert "* spec.hook: " in told
        assert "* spec.parallel: " in told
        assert re.search(r"paused\s+<boolean>\s+No node and no hook", kubectl.ok("explain", "maint.spec"))
        for kind in ("nodedrain", "rebalancepolicy", "nodefencing", "lease"):
            assert "FIELDS:" in kubectl.ok("explain", kind)


class TestThePolicy:
    def test_is_applied_and_patched(self, herd: Vmherd, kubectl: Kubectl) -> None:
        wanted = document("RebalancePolicy", "cluster", thresholds={"cpu": 75})
        assert kubectl.ok("apply", "-f", "-", stdin=wanted) == f"{POLICY}/cluster created\n"
        patched = kubectl.ok("patch", "rebalance", "cluster", "--type=merge", "-p", '{"spec": {"enabled": false}}')
        assert patched == f"{POLICY}/cluster patched\n"
        spec = herd.store.get(RebalancePolicy, "cluster").spec
        assert (spec.enabled, spec.thresholds.cpu, spec.thresholds.memory) == (False, 75, 80)
        assert rows(kubectl.ok("get", "rebalance"))[1][:4] == ["cluster", "false", "75%", "80%"]
        told = kubectl.refused("patch", "rebalance", "cluster", "--type=merge", "-p", '{"spec": {"maxMoves": 0}}')
        assert "spec.maxMoves: " in told
        assert "metadata.name: there is one policy" in kubectl.refused(
            "create", "-f", "-", stdin=document("RebalancePolicy", "mine")
        )
        assert "(MethodNotAllowed)" in kubectl.refused("delete", "rebalance", "cluster")


class TestFencing:
    bmc: ClassVar = {"agent": "fence_ipmilan", "options": {"ip": "192.0.2.1"}, "passwordFile": "/etc/vmherd/bmc"}

    def test_said_shown_and_never_its_status(self, herd: Vmherd, kubectl: Kubectl) -> None:
        wanted = document("NodeFencing", "h1", enabled=True, bmc=self.bmc)
        assert kubectl.ok("apply", "-f", "-", stdin=wanted) == f"{FENCING}/h1 created\n"
        assert kubectl.ok("apply", "-f", "-", stdin=wanted) == f"{FENCING}/h1 unchanged\n"
        assert rows(kubectl.ok("get", "fencing"))[1][:4] == ["h1", "true", "fence_ipmilan", "Idle"]
        kubectl.ok(
            "patch", "fencing", "h1", "--type=merge", "-p", '{"spec": {"enabled": null}, "status": {"phase": "Fenced"}}'
        )
        stored = herd.store.get(NodeFencing, "h1")
        assert (stored.spec.enabled, stored.status.phase.value) == (None, "Idle")
        secret = {**self.bmc, "options": {"passwd": "x"}}
        told = kubectl.refused("create", "-f", "-", stdin=document("NodeFencing", "h2", bmc=secret))
        assert "spec.bmc.options.passwd: no secrets here" in told
        assert "NotFound" in kubectl.refused(
            "create", "--raw", "/apis/vmherd.dev/v1/nodefencings/h9/confirm", "-f", "-", stdin="{}"
        )


class TestNodes:
    def test_a_node_shows_its_lease(self, herd: Vmherd, kubectl: Kubectl) -> None:
        assert re.search(
            r"Lease:\n +HolderIdentity: +h2\n.*\n +RenewTime: +<unset>", kubectl.ok("describe", "node", "h2")
        )
        timing = Timing(lease_ttl=20, watchdog_timeout=10, heartbeat=2, poll_validity=2)
        beat = json.loads(Heartbeat("g1", "boot-1", 7, 1.0, timing).text())
        herd.store.redis.set(keys.lease("h1"), json.dumps({**beat, "renewed_ms": 1_700_000_000_123}))
        told = kubectl.ok("describe", "node", "h1")
        assert re.search(r"HolderIdentity: +h1\n", told)
        assert re.search(r"RenewTime: +Tue, 14 Nov 2023", told)
        assert rows(kubectl.ok("get", "leases", "-n", "kube-node-lease"))[1][:2] == ["h1", "h1"]
        herd.store.redis.delete(keys.lease("h1"))

    def test_one_that_is_gone_is_deleted(self, server: ApiProcess, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm("a")
        assert "is Ready: drain it" in kubectl.refused("delete", "node", "h2")
        store = herd.store
        for name in ("h1", "h2"):
            node = store.get(Node, name)
            batch = store.batch().put(node, node.with_status(conditions=a_node(name, ready=False).status.conditions))
            store.must_commit(batch.create(an_inventory(name)))
        assert "node 'h1' has vm/default/a on record" in kubectl.refused("delete", "node", "h1")
        assert "cannot delete" in server.kubectl("ops", "operator").refused("delete", "node", "h2")
        assert kubectl.ok("delete", "node", "h2", "--timeout=30s") == 'node "h2" deleted\n'
        assert store.find(Node, "h2") is None
        assert store.find(NodeInventory, "h2") is None


class TestServerSideApply:
    def test_creates_changes_and_takes_away_what_is_said_no_more(self, herd: Vmherd, kubectl: Kubectl) -> None:
        vm = "virtualmachine.virtualization.deckhouse.io/a"
        apply = ("apply", "--server-side", "-f", "-")
        first = vm_manifest("a", nodeSelector={"zone": "a"}, terminationGracePeriodSeconds=30)
        assert kubectl.ok(*apply, stdin=first) == f"{vm} serverside-applied\n"
        kubectl.ok("label", "vm", "a", "mine=yes")
        assert kubectl.ok(*apply, stdin=vm_manifest("a", terminationGracePeriodSeconds=40)) == (
            f"{vm} serverside-applied\n"
        )
        stored = json.loads(kubectl.ok("get", "vm", "a", "-o", "json"))
        assert stored["metadata"]["labels"]["mine"] == "yes"
        assert "nodeSelector" not in stored["spec"]
        assert stored["spec"]["terminationGracePeriodSeconds"] == 40
        assert "managedFields" not in stored["metadata"]
        wrong = vm_manifest("a", bogus=1)
        assert "spec.bogus: unknown field" in kubectl.refused(*apply, stdin=wrong)
