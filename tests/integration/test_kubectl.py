"""The real kubectl on the real server. No hypervisor: the tests write what nodes would report."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from orchestrator.resources import (
    KINDS,
    Node,
    OperationPhase,
    Reason,
    VirtualMachine,
    VmPhase,
)
from orchestrator.resources.node import NodeInventory
from tests.builders import a_node, an_inventory, seen
from tests.integration.command import EVICT, VMOP, Vmherd, vm_manifest
from tests.kubectl import ApiProcess, Kubectl
from tests.processes import Processes
from tests.redis_server import RedisServer
from tests.waiting import wait_until

pytestmark = pytest.mark.kubectl
VM = "virtualmachine.virtualization.deckhouse.io"
KEPT = ("AccessToken",)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    """One server for the module, on a Redis of its own."""
    folder = tmp_path_factory.mktemp("api")
    redis = RedisServer(folder / "redis")
    redis.start()
    with Processes(redis.url, folder) as processes:
        yield ApiProcess(processes, folder, redis.url).wait_ready()
    redis.kill()


@pytest.fixture
def herd(server: ApiProcess) -> Iterator[Vmherd]:
    """Three nodes and nothing else; a VM that runs is one line."""
    herd = Vmherd(server.environment["VMHERD_REDIS_URL"])
    store = herd.store
    batch = store.batch()
    for name, kind in KINDS.items():
        for resource in () if name in KEPT else store.all(kind):
            batch.delete(resource)
    store.must_commit(batch)
    batch = store.batch()
    for name in ("h1", "h2", "h3"):
        batch.create(a_node(name))
    store.must_commit(batch)
    yield herd
    store.close()


@pytest.fixture
def kubectl(server: ApiProcess, herd: Vmherd) -> Kubectl:
    return server.kubectl()


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


class TestTheMigrationGuide:
    def test_its_four_commands(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm()
        assert rows(kubectl.ok("get", "vm"))[1][:4] == ["linux-vm", "Running", "h1", "192.0.2.101"]
        with kubectl.beside("get", "vm", "-w") as watch:
            watch.wait_for("linux-vm", "Running")
            told = kubectl.ok("create", "-f", "-", stdin=EVICT)
            name = re.fullmatch(rf"{re.escape(VMOP)}/(evict-linux-vm-[0-9a-f]{{5}}) created\n", told)[1]  # type: ignore[index]
            assert rows(kubectl.ok("get", "vmop"))[1][:5] == [name, "Pending", "0%", "Evict", "linux-vm"]
            herd.set_vm("linux-vm", phase=VmPhase.MIGRATING)
            watch.wait_for("linux-vm", "Migrating")
            herd.set_vm("linux-vm", phase=VmPhase.RUNNING, node_name="h2")
            watch.wait_for("linux-vm", "Running", "h2")
            assert [row[:3] for row in rows("\n".join(watch.lines))] == [
                ["NAME", "PHASE", "NODE"],
                ["linux-vm", "Running", "h1"],
                ["linux-vm", "Migrating", "h1"],
                ["linux-vm", "Running", "h2"],
            ]
        assert kubectl.ok("delete", "vmop", name) == f'{VMOP} "{name}" deleted\n'
        assert herd.operations() == []


class TestReading:
    def test_forms(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm()
        stored = herd.store.get(VirtualMachine, "default/linux-vm").manifest()
        assert yaml.safe_load(kubectl.ok("get", "vm", "linux-vm", "-o", "yaml")) == stored
        assert json.loads(kubectl.ok("get", "vm", "-o", "json"))["items"] == [stored]
        assert kubectl.ok("get", "vm", "linux-vm", "-o", "jsonpath={.status.nodeName}") == "h1"
        custom = kubectl.ok("get", "vm", "-o", "custom-columns=N:.metadata.name,P:.status.phase")
        assert rows(custom) == [["N", "P"], ["linux-vm", "Running"]]
        assert kubectl.ok("get", "vm", "-o", "name") == f"{VM}/linux-vm\n"
        wide = kubectl.ok("get", "vm", "-o", "wide").splitlines()[0]
        assert "NEED RESTART" in wide
        assert "RUNPOLICY" in wide
        assert kubectl.run("get", "vmop").stderr == "No resources found in default namespace.\n"

    def test_the_same_rows_as_vmherds_own(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm()
        herd.running_vm("b", "h2")
        for words in (("get", "vm"), ("get", "vm", "-o", "wide"), ("get", "nodes", "-o", "wide")):
            assert rows(kubectl.ok(*words)) == rows(herd.ok(*words)), words

    def test_selectors_and_namespaces(self, herd: Vmherd, kubectl: Kubectl) -> None:
        for name in ("a", "b"):
            herd.running_vm(name)
        kubectl.ok("create", "-n", "other", "-f", "-", stdin=vm_manifest("c"))
        kubectl.ok("label", "vm", "a", "tier=db")

        def names(*words: str) -> list[str]:
            return kubectl.ok("get", "vm", "-o", "name", *words).split()

        assert names("-l", "tier=db") == [f"{VM}/a"]
        assert names("-l", "tier!=db") == [f"{VM}/b"]
        assert names("-l", "tier in (db, web)") == [f"{VM}/a"]
        assert names("-l", "!tier") == [f"{VM}/b"]
        assert names("--field-selector", "status.phase=Running,metadata.name!=a") == [f"{VM}/b"]
        assert names("-n", "other") == [f"{VM}/c"]
        assert [row[:2] for row in rows(kubectl.ok("get", "vm", "-A"))[1:]] == [
            ["default", "a"],
            ["default", "b"],
            ["other", "c"],
        ]
        assert [row[0] for row in rows(kubectl.ok("get", "ns"))[1:]] == ["default", "other"]
        assert [row[0] for row in rows(kubectl.ok("get", "vm", "--chunk-size=1", "-A"))] == [
            "NAMESPACE",
            "default",
            "default",
            "other",
        ]

    def test_describe_shows_what_happened(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm()
        kubectl.ok("create", "-f", "-", stdin=EVICT)
        (operation,) = herd.operations()
        kubectl.ok("cordon", "h1")
        told = kubectl.ok("describe", "node", "h1")
        assert re.search(r"NodeCordoned .* no VM starts or lands here", told)
        assert re.search(r"memory: +16Gi", told)
        assert re.search(r"default +d8v-linux-vm-\w+ +1 \(12%\)", told)
        assert "waits to be granted" in kubectl.ok("describe", "vmop", operation.name)
        kubectl.ok("delete", "vmop", operation.name)
        told = kubectl.ok("describe", "vm", "linux-vm")
        assert re.search(r"Node Name: +h1", told)
        assert re.search(r"OperationAborted .* deleted before it began", told)
        events = kubectl.ok("get", "events", "--field-selector", "involvedObject.kind=Node,involvedObject.name=h1")
        assert [row[2] for row in rows(events)[1:] if row[2].startswith("Node")] == ["NodeCordoned"]

    def test_explain(self, kubectl: Kubectl) -> None:
        told = kubectl.ok("explain", "vmop.spec")
        assert re.search(r"force\s+<boolean>\s+None is not False", told)
        assert re.search(r"type\s+<string> -required-", told)
        assert "enum: Start, Stop, Restart, Evict" in told
        assert re.search(r"size\s+<string> -required-", kubectl.ok("explain", "vm.spec.memory"))
        assert "targetNode" in kubectl.ok("explain", "vmop", "--recursive")
        for kind in ("vm", "vmclass", "nodes", "pods", "events", "ns"):
            assert "FIELDS:" in kubectl.ok("explain", kind)

    def test_wait(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm()
        kubectl.ok("create", "-f", "-", stdin=EVICT)
        (operation,) = herd.operations()
        with kubectl.beside(
            "wait", f"vmop/{operation.name}", "--for=jsonpath={.status.phase}=Completed", "--timeout=30s"
        ) as waiting:
            herd.step(operation.name, Reason.SYNCING, "45 %", phase=OperationPhase.IN_PROGRESS, progress=45)
            herd.step(operation.name, Reason.OPERATION_COMPLETED, "done", phase=OperationPhase.COMPLETED, progress=100)
            assert waiting.ended() == 0
            waiting.wait_for("condition met")


class TestChanging:
    def test_unknown_and_wrong_fields_are_refused_with_their_paths(self, herd: Vmherd, kubectl: Kubectl) -> None:
        wrong = vm_manifest("a", bogus=1, cpu={"cores": "many"}, memory={"size": "1Gi", "slots": 2})
        for validate in ("true", "false"):
            told = kubectl.refused("create", f"--validate={validate}", "-f", "-", stdin=wrong)
            assert 'The VirtualMachine "a" is invalid' in told
            for path in ("spec.bogus: unknown field", "spec.cpu.cores: ", "spec.memory.slots: unknown field"):
                assert f"* {path}" in told
        assert "spec.type: input should be" in kubectl.refused(
            "create", "-f", "-", stdin=EVICT.replace("Evict", "Move")
        )
        assert herd.store.all(VirtualMachine) == []

    def test_apply_keeps_what_others_set(self, herd: Vmherd, kubectl: Kubectl) -> None:
        text = vm_manifest("a", nodeSelector={"zone": "a"})
        assert kubectl.ok("apply", "-f", "-", stdin=text) == f"{VM}/a created\n"
        assert kubectl.ok("apply", "-f", "-", stdin=text) == f"{VM}/a unchanged\n"
        kubectl.ok("label", "vm", "a", "mine=yes")
        assert kubectl.ok("apply", "-f", "-", stdin=vm_manifest("a", memory={"size": "1Gi"})) == f"{VM}/a configured\n"
        vm = herd.store.get(VirtualMachine, "default/a")
        assert (vm.spec.memory.size, vm.spec.node_selector, vm.metadata.labels) == ("1Gi", {}, {"mine": "yes"})
        assert "kubectl.kubernetes.io/last-applied-configuration" in vm.metadata.annotations
        assert kubectl.run("diff", "-f", "-", stdin=vm_manifest("a", memory={"size": "1Gi"})).returncode == 0
        changed = kubectl.run("diff", "-f", "-", stdin=vm_manifest("a", memory={"size": "2Gi"}))
        assert (changed.returncode, "+    size: 2Gi" in changed.stdout) == (1, True), changed

    def test_patches_and_replacement(self, herd: Vmherd, kubectl: Kubectl) -> None:
        kubectl.ok("create", "-f", "-", stdin=vm_manifest("a"))
        kubectl.ok("patch", "vm", "a", "--type=merge", "-p", '{"spec":{"runPolicy":"AlwaysOff"}}')
        operations = '[{"op":"replace","path":"/spec/memory/size","value":"256Mi"}]'
        kubectl.ok("patch", "vm", "a", "--type=json", "-p", operations)
        vm = herd.store.get(VirtualMachine, "default/a")
        assert (vm.spec.run_policy, vm.spec.memory.size, vm.metadata.generation) == ("AlwaysOff", "256Mi", 3)
        document = kubectl.ok("get", "vm", "a", "-o", "yaml")
        kubectl.ok("replace", "-f", "-", stdin=document.replace("256Mi", "512Mi"))
        told = kubectl.refused("replace", "-f", "-", stdin=document.replace("256Mi", "1Gi"))
        assert "Error from server (Conflict)" in told
        assert "changed since it was read" in told
        told = kubectl.refused("patch", "vm", "a", "--type=merge", "-p", '{"spec":{"cpu":{"cores":0}}}')
        assert "spec.cpu.cores: " in told
        assert herd.store.get(VirtualMachine, "default/a").spec.memory.size == "512Mi"

    def test_edit(self, herd: Vmherd, kubectl: Kubectl, tmp_path: Path) -> None:
        kubectl.ok("create", "-f", "-", stdin=vm_manifest("a"))
        editor = tmp_path / "editor"
        editor.write_text('#!/bin/sh\nsed -i s/192Mi/256Mi/ "$1"\n')
        editor.chmod(0o755)
        done = kubectl.run("edit", "vm", "a", KUBE_EDITOR=str(editor))
        assert (done.returncode, done.stdout) == (0, f"{VM}/a edited\n"), done
        assert herd.store.get(VirtualMachine, "default/a").spec.memory.size == "256Mi"

    def test_dry_run_says_all_and_stores_nothing(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm()
        before = herd.store.version()
        herd.store.redis.delete("wanted:grant")
        dry = "--dry-run=server"
        assert kubectl.ok("create", dry, "-f", "-", stdin=vm_manifest("a")) == f"{VM}/a created (server dry run)\n"
        assert "(server dry run)" in kubectl.ok("create", dry, "-f", "-", stdin=EVICT)
        assert "(server dry run)" in kubectl.ok("delete", dry, "vm", "linux-vm")
        assert "(server dry run)" in kubectl.ok("label", dry, "vm", "linux-vm", "a=b")
        assert "(server dry run)" in kubectl.ok("cordon", dry, "h1")
        assert "(server dry run)" in kubectl.ok("apply", dry, "-f", "-", stdin=vm_manifest("b"))
        # Admission speaks in a dry run too.
        herd.set_vm("linux-vm", phase=VmPhase.PAUSE)
        assert "is Pause, not Running" in kubectl.refused("create", dry, "-f", "-", stdin=EVICT)
        assert "already exists" in kubectl.refused("create", dry, "-f", "-", stdin=vm_manifest("linux-vm"))
        resources = {kind: herd.store.all(KINDS[kind]) for kind in ("VirtualMachineOperation", "VirtualMachine")}
        assert resources["VirtualMachineOperation"] == []
        assert [vm.name for vm in resources["VirtualMachine"]] == ["linux-vm"]
        refusals = [e for e in herd.store.all(KINDS["Event"]) if e.version > before]
        assert {event.manifest()["reason"] for event in refusals} <= {"RequestRefused"}
        assert herd.store.redis.get("wanted:grant") is None, "a wake-up that is never sent would hold back the next"

    def test_an_operations_spec_can_not_be_changed(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm()
        kubectl.ok("create", "-f", "-", stdin=EVICT)
        (operation,) = herd.operations()
        told = kubectl.refused("patch", "vmop", operation.name, "--type=merge", "-p", '{"spec":{"force":true}}')
        assert "spec: .spec is immutable" in told
        kubectl.ok("annotate", "vmop", operation.name, "note=mine")
        kubectl.ok("patch", "vmop", operation.name, "--type=merge", "-p", '{"status":{"phase":"Completed"}}')
        (now,) = herd.operations()
        assert (now.metadata.annotations["note"], now.status) == ("mine", operation.status)

    def test_admission(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm()
        kubectl.ok("create", "-f", "-", stdin=EVICT)
        (operation,) = herd.operations()
        told = kubectl.refused("create", "-f", "-", stdin=EVICT)
        assert "Error from server (Forbidden)" in told
        assert f"Previously created operation '{operation.name}' should finish first" in told
        named = EVICT.replace("generateName: evict-linux-vm-", f"name: {operation.name}")
        assert f'virtualmachineoperations.virtualization.deckhouse.io "{operation.name}" already exists' in (
            kubectl.refused("create", "-f", "-", stdin=named)
        )
        missing = EVICT.replace("virtualMachineName: linux-vm", "virtualMachineName: nope")
        assert "VirtualMachine 'nope' not found" in kubectl.refused("create", "-f", "-", stdin=missing)
        assert kubectl.refused("get", "vm", "nope") == (
            'Error from server (NotFound): virtualmachines.virtualization.deckhouse.io "nope" not found\n'
        )

    def test_a_vm_that_runs_goes_when_it_has_stopped(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm()
        with kubectl.beside("delete", "vm", "linux-vm") as deleting:
            wait_until(herd.operations, 20, "its stop")
            deleting.wait_for(f'{VM} "linux-vm" deleted')
            vm = herd.store.get(VirtualMachine, "default/linux-vm")
            assert vm.metadata.deletion_timestamp is not None
            assert deleting.process.poll() is None, "kubectl waits until it is gone"
            assert rows(kubectl.ok("get", "vm"))[1][1] == "Terminating"
            batch = herd.store.batch().delete(vm)
            for operation in herd.operations():
                batch.delete(operation)
            herd.store.must_commit(batch)
            assert deleting.ended() == 0

    def test_finalizers_hold_a_vm(self, herd: Vmherd, kubectl: Kubectl) -> None:
        text = yaml.safe_load(vm_manifest("a"))
        text["metadata"]["finalizers"] = ["example.com/backup"]
        kubectl.ok("create", "-f", "-", stdin=yaml.safe_dump(text))
        with kubectl.beside("delete", "vm", "a") as deleting:
            deleting.wait_for("deleted")
            vm = herd.store.get(VirtualMachine, "default/a")
            assert vm.metadata.deletion_timestamp is not None
            assert deleting.process.poll() is None
            more = '{"metadata":{"finalizers":["example.com/backup","example.com/late"]}}'
            assert "can't be added" in kubectl.refused("patch", "vm", "a", "--type=merge", "-p", more)
            spec = '{"spec":{"runPolicy":"AlwaysOff"}}'
            assert "is being deleted" in kubectl.refused("patch", "vm", "a", "--type=merge", "-p", spec)
            kubectl.ok("patch", "vm", "a", "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
            assert deleting.ended() == 0
        assert herd.store.all(VirtualMachine) == []

    def test_finalizers_hold_an_operation(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm()
        kubectl.ok("create", "-f", "-", stdin=EVICT)
        (operation,) = herd.operations()
        named = ("vmop", operation.name, "--type=json", "-p")
        kubectl.ok("patch", *named, '[{"op":"add","path":"/metadata/finalizers/-","value":"example.com/x"}]')
        kubectl.ok("delete", "--wait=false", "vmop", operation.name)
        (left,) = herd.operations()
        assert (left.status.phase, left.metadata.finalizers) == ("Terminating", ("example.com/x",))
        assert "should finish first" in kubectl.refused("create", "-f", "-", stdin=EVICT)
        kubectl.ok("patch", *named, '[{"op":"remove","path":"/metadata/finalizers"}]')
        assert herd.operations() == []

    def test_our_own_finalizer_is_ours(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm()
        kubectl.ok("create", "-f", "-", stdin=EVICT)
        (operation,) = herd.operations()
        kubectl.ok("patch", "vmop", operation.name, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
        assert herd.operations()[0].metadata.finalizers == ("virtualization.deckhouse.io/vmop-cleanup",)

    def test_all_of_a_kind(self, herd: Vmherd, kubectl: Kubectl) -> None:
        for name in ("a", "b", "c"):
            kubectl.ok("create", "-f", "-", stdin=vm_manifest(name))
        kubectl.ok("label", "vm", "a", "b", "old=yes")
        kubectl.ok("delete", "vm", "-l", "old=yes")
        assert [vm.name for vm in herd.store.all(VirtualMachine)] == ["c"]
        collection = "/apis/virtualization.deckhouse.io/v1alpha2/namespaces/default/virtualmachines"
        kubectl.ok("delete", "--raw", collection)
        assert herd.store.all(VirtualMachine) == []

    def test_classes(self, herd: Vmherd, kubectl: Kubectl) -> None:
        text = yaml.safe_dump(
            {
                "apiVersion": "virtualization.deckhouse.io/v1alpha2",
                "kind": "VirtualMachineClass",
                "metadata": {"name": "generic", "labels": {"a": "1", "b": "2"}},
                "spec": {"cpu": {"type": "Model", "model": "Nehalem"}},
            }
        )
        kubectl.ok("create", "-f", "-", stdin=text)
        kubectl.ok("label", "vmclass", "generic", "a-", "c=3")
        assert rows(kubectl.ok("get", "vmclass", "--show-labels"))[1][-1] == "b=2,c=3"
        kubectl.ok("create", "-f", "-", stdin=vm_manifest("a", virtualMachineClassName="generic"))
        assert "is used by VirtualMachine default/a" in kubectl.refused("delete", "vmclass", "generic")
        kubectl.ok("delete", "vm", "a")
        kubectl.ok("delete", "vmclass", "generic")

    def test_projects(self, herd: Vmherd, kubectl: Kubectl) -> None:
        assert kubectl.ok("create", "namespace", "team-a") == "namespace/team-a created\n"
        assert "already exists" in kubectl.refused("create", "namespace", "team-a")
        kubectl.ok("label", "ns", "team-a", "cost=low")
        kubectl.ok("create", "-n", "team-a", "-f", "-", stdin=vm_manifest("a"))
        assert "is not empty: VirtualMachine a" in kubectl.refused("delete", "ns", "team-a")
        kubectl.ok("delete", "-n", "team-a", "vm", "a")
        assert rows(kubectl.ok("get", "ns", "-l", "cost=low"))[1][:2] == ["team-a", "Active"]
        kubectl.ok("delete", "ns", "team-a")
        assert [row[0] for row in rows(kubectl.ok("get", "ns"))] == ["NAME", "default"]
        assert "can't be deleted" in kubectl.refused("delete", "ns", "default")


class TestNodes:
    def test_cordon_labels_and_taints(self, herd: Vmherd, kubectl: Kubectl) -> None:
        assert kubectl.ok("cordon", "h1") == "node/h1 cordoned\n"
        assert rows(kubectl.ok("get", "node", "h1"))[1][1] == "Ready,SchedulingDisabled"
        assert kubectl.ok("uncordon", "h1") == "node/h1 uncordoned\n"
        kubectl.ok("label", "node", "h1", "zone=a", "empty=")
        kubectl.ok("taint", "node", "h1", "dedicated=db:NoSchedule")
        kubectl.ok("label", "node", "h1", "zone-")
        node = herd.store.get(Node, "h1")
        assert (node.metadata.labels, node.spec.unschedulable) == ({"empty": ""}, False)
        assert [str(taint) for taint in node.spec.taints] == ["dedicated=db:NoSchedule"]
        kubectl.ok("taint", "node", "h1", "dedicated-")
        assert herd.store.get(Node, "h1").spec.taints == ()
        assert "unknown field" in kubectl.refused("patch", "node", "h1", "-p", '{"spec":{"podCIDR":"10.0.0.0/8"}}')
        assert "node 'h1' is Ready: drain it" in kubectl.refused("delete", "node", "h1")

    def test_drain_moves_each_vm_and_waits_for_it(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm("a")
        herd.running_vm("b", "h2")
        with kubectl.beside("drain", "h1", "--ignore-daemonsets", "--delete-emptydir-data") as drain:
            drain.wait_for('Eviction triggered evacuation of VMI "default/a"')
            (operation,) = herd.operations()
            assert operation.name.startswith("evacuation-a-")
            herd.step(operation.name, Reason.SYNCING, "sends", phase=OperationPhase.IN_PROGRESS, progress=45)
            drain.wait_for('Evacuation in progress: Eviction triggered evacuation of VMI "default/a"', "45%")
            herd.set_vm("a", node_name="h2")
            herd.step(operation.name, Reason.OPERATION_COMPLETED, "", phase=OperationPhase.COMPLETED, progress=100)
            assert drain.ended() == 0, "\n".join(drain.lines)
            drain.wait_for("node/h1 drained")
        assert [o.name for o in herd.operations()] == [operation.name], "asked for once"
        assert herd.store.get(Node, "h1").spec.unschedulable

    def test_uncordon_drops_what_a_drain_has_not_begun(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm("a")
        with kubectl.beside("drain", "h1", "--ignore-daemonsets") as drain:
            drain.wait_for('Eviction triggered evacuation of VMI "default/a"')
        assert len(herd.operations()) == 1
        kubectl.ok("uncordon", "h1")
        assert herd.operations() == []

    def test_drain_of_vms_alone_passes_others_by(self, herd: Vmherd, kubectl: Kubectl) -> None:
        foreign = seen("running", vm="").with_(vm="", name="win7")
        herd.store.must_commit(herd.store.batch().create(an_inventory("h1", {"x": foreign})))
        told = kubectl.refused("drain", "h1", "--ignore-daemonsets", "--delete-emptydir-data")
        assert re.search(r"cannot delete Pods that declare no controller.*default/domain-win7-", told)
        selector = "vm.kubevirt.internal.virtualization.deckhouse.io/name"
        assert "drained" in kubectl.ok("drain", "h1", "--pod-selector", selector, "--delete-emptydir-data")
        assert len(herd.store.all(NodeInventory)) == 1

    def test_drain_says_what_keeps_a_vm(self, herd: Vmherd, kubectl: Kubectl) -> None:
        herd.running_vm("a")
        herd.set_vm("a", phase=VmPhase.PAUSE)
        with kubectl.beside("drain", "h1", "--ignore-daemonsets") as drain:
            drain.wait_for('VMI "default/a"', "is Pause: only a Running VM migrates")
        assert "server dry run" in kubectl.ok("drain", "h2", "--dry-run=server")


def test_what_there_is(kubectl: Kubectl) -> None:
    found = {row[0]: row for row in rows(kubectl.ok("api-resources", "--no-headers"))}
    assert found["virtualmachines"][1:] == ["vm", "virtualization.deckhouse.io/v1alpha2", "true", "VirtualMachine"]
    assert set(found) == {
        "virtualmachines",
        "virtualmachineoperations",
        "virtualmachineclasses",
        "nodes",
        "namespaces",
        "pods",
        "events",
        "nodedrains",
        "maintenances",
        "rebalancepolicies",
        "nodefencings",
        "leases",
    }
    version = json.loads(kubectl.ok("version", "-o", "json"))["serverVersion"]
    assert re.fullmatch(r"v1\.\d+\.\d+-vmherd-.*", version["gitVersion"])
    assert kubectl.ok("get", "--raw", "/readyz") == "ok"


def test_rights(server: ApiProcess, herd: Vmherd) -> None:
    herd.running_vm()
    viewer = server.kubectl("looks", "viewer")
    assert rows(viewer.ok("get", "vm"))[1][0] == "linux-vm"
    told = viewer.refused("create", "-f", "-", stdin=EVICT)
    assert "Error from server (Forbidden)" in told
    assert 'User "looks" cannot create resource "virtualmachineoperations"' in told
    assert "nodes is forbidden" in viewer.run("cordon", "h1").stderr  # kubectl's exit code says nothing of it
    assert not herd.store.get(Node, "h1").spec.unschedulable
    server.vmherd("token", "revoke", "looks")
    assert "Unauthorized" in viewer.refused("get", "vm") or "logged in" in viewer.refused("get", "vm")
    (server.folder / "looks.kubeconfig").unlink()
    assert herd.operations() == []


def test_it_goes_on_after_a_restart_of_redis(durable_redis: RedisServer, tmp_path: Path) -> None:
    """Reading and writing: a server without Redis says when to ask again."""
    with Processes(durable_redis.url, tmp_path) as processes:
        kubectl = ApiProcess(processes, tmp_path, durable_redis.url).wait_ready().kubectl()
        kubectl.ok("create", "-f", "-", stdin=vm_manifest("a"))
        durable_redis.kill()
        with kubectl.beside("get", "vm", "-o", "name") as reading, kubectl.beside("delete", "vm", "a") as writing:
            with pytest.raises(subprocess.TimeoutExpired):
                reading.process.wait(2)
            assert writing.process.poll() is None
            durable_redis.start()
            assert (reading.ended(), writing.ended()) == (0, 0), (reading.lines, writing.lines)
        assert kubectl.ok("get", "vm", "-o", "name") == ""
