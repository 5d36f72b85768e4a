"""`vmherd apply`, classes, and what `describe` and `get -o wide` say of a machine, as a person runs them."""

import re
from collections.abc import Iterator

import pytest
import yaml

from orchestrator.resources import Node, VirtualMachine, VmPhase
from orchestrator.resources.machine import DeviceRecord, Machine, MachineCpu
from tests.builders import a_node
from tests.integration.command import Vmherd, vm_manifest

CLASS = yaml.safe_dump(
    {
        "apiVersion": "virtualization.deckhouse.io/v1alpha2",
        "kind": "VirtualMachineClass",
        "metadata": {"name": "generic"},
        "spec": {"cpu": {"type": "Model", "model": "Nehalem"}},
    }
)
VM = "virtualmachine.virtualization.deckhouse.io"
VMCLASS = "virtualmachineclass.virtualization.deckhouse.io"


@pytest.fixture
def vmherd(redis_url: str) -> Iterator[Vmherd]:
    herd = Vmherd(redis_url)
    herd.store.must_commit(herd.store.batch().create(a_node("h1")))
    yield herd
    herd.store.close()


def fact(told: str, title: str) -> str:
    found = re.search(rf"^{title}: +(.*)$", told, re.MULTILINE)
    assert found is not None, told
    return found[1]


def test_from_nothing_to_a_change_that_waits(vmherd: Vmherd) -> None:
    text = CLASS + "---\n" + vm_manifest("a", virtualMachineClassName="generic")
    assert vmherd.ok("apply", "-f", "-", stdin=text) == f"{VMCLASS}/generic created\n{VM}/a created\n"
    assert vmherd.ok("apply", "-f", "-", stdin=text) == f"{VMCLASS}/generic unchanged\n{VM}/a unchanged\n"
    cpu = MachineCpu(model="Nehalem")
    mac = DeviceRecord(key="interface/bridge/br0", mac="52:54:00:00:00:01")
    machine = Machine(type="pc-q35-7.2", domain_type="kvm", cpu=cpu, cpu_from="custom Nehalem", devices=(mac,))
    vmherd.set_vm("a", phase=VmPhase.RUNNING, node_name="h1", incarnation=1, machine=machine)

    larger = vm_manifest("a", virtualMachineClassName="generic", memory={"size": "1Gi"}, nodeSelector={"zone": "a"})
    told = vmherd.ok("apply", "-f", "-", stdin=larger)
    assert told == f"{VM}/a configured (waits for a restart: spec.memory.size)\n"
    told = vmherd.ok("describe", "vm", "a")
    assert fact(told, "Class") == "generic"
    assert fact(told, "Machine") == "pc-q35-7.2 (kvm), CPU Nehalem, MAC 52:54:00:00:00:01"
    assert fact(told, "Node Selector") == "zone=a"
    assert re.search(r"spec\.memory\.size +192Mi +1Gi", told)
    assert re.search(r"AwaitingRestartToApplyConfiguration +True", told)
    header, row = vmherd.ok("get", "vm", "-o", "wide").splitlines()
    assert header.index("NEED RESTART") < header.index("AGENT") < header.index("MIGRATABLE")
    assert row[header.index("NEED RESTART") :].split()[0] == "True"


def test_a_wrong_document_changes_nothing(vmherd: Vmherd) -> None:
    bad = vm_manifest("b", disks=[{"name": "root"}])
    told = vmherd.refused("apply", "-f", "-", stdin=vm_manifest("a") + "---\n" + bad)
    assert told.startswith("standard input: document 2: spec.disks[0].file: is required")
    assert told.endswith("; nothing was stored")
    assert vmherd.store.all(VirtualMachine) == []


def test_classes_and_what_they_choose_by(vmherd: Vmherd) -> None:
    vmherd.ok("create", "-f", "-", stdin=CLASS)
    header, row = vmherd.ok("get", "vmclass", "-o", "wide").splitlines()
    assert header.split() == ["NAME", "PHASE", "AGE", "CPUTYPE", "CPU", "NODES"]
    assert (row.split()[:2], row.split()[3:]) == (["generic", "Ready"], ["Model", "Nehalem", "1"])
    assert fact(vmherd.ok("describe", "vmclass", "generic"), "Available Nodes") == "h1"
    vmherd.ok("create", "-f", "-", stdin=vm_manifest("a", virtualMachineClassName="generic"))
    assert "is used by VirtualMachine default/a" in vmherd.refused("delete", "vmclass", "generic")
    vmherd.ok("delete", "vm", "a")
    assert vmherd.ok("delete", "vmclass", "generic") == 'virtualmachineclass "generic" deleted\n'


def test_labels_and_taints_of_a_node(vmherd: Vmherd) -> None:
    assert vmherd.ok("node", "label", "h1", "zone=a") == "node/h1 labelled\n"
    assert vmherd.ok("node", "taint", "h1", "dedicated=db:NoSchedule") == "node/h1 tainted\n"
    assert fact(vmherd.ok("describe", "node", "h1"), "Taints") == "dedicated=db:NoSchedule"
    assert vmherd.ok("node", "taint", "h1", "dedicated-") == "node/h1 tainted\n"
    assert vmherd.ok("node", "label", "h1", "zone-", "other-") == "node/h1 labelled\n"
    assert vmherd.refused("node", "taint", "h1", "a:Never").startswith("effect: ")
    node = vmherd.store.get(Node, "h1")
    assert (node.spec.taints, node.metadata.labels) == ((), {})
