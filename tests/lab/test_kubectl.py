"""The migration guide with kubectl on real hosts and guests; then what people do beside it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.resources import OperationType
from tests.kubectl import ApiProcess, Kubectl
from tests.lab import outside
from tests.lab.herd import LabHerd
from tests.lab.observer import DoubleRunObserver
from tests.lab.test_migration import PLATFORM_MANIFEST
from tests.processes import Processes
from tests.waiting import wait_until

pytestmark = [pytest.mark.kubectl, pytest.mark.timeout(300)]
SETTINGS = {"VMHERD_BANDWIDTH_MIB_S": "40"}
VM_PODS = "vm.kubevirt.internal.virtualization.deckhouse.io/name"


@pytest.fixture(scope="module")
def kubectl(module_herd: LabHerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    """Kubectl on an API server that reaches the lab's Redis from outside."""
    folder = tmp_path_factory.mktemp("api")
    with Processes(module_herd.redis.url, folder) as processes:
        yield ApiProcess(processes, folder, module_herd.redis.url).wait_ready().kubectl("guide")


def columns(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def placed(kubectl: Kubectl, vm: str) -> list[str]:
    """Phase and node."""
    return kubectl.ok("get", "vm", vm, "-o", "jsonpath={.status.phase} {.status.nodeName}").split()


def test_the_migration_guide(herd: LabHerd, kubectl: Kubectl) -> None:
    guest = herd.lab.guest("linux-vm", address="192.0.2.101", dirty_mib_s=2, working_set_mib=16)
    doubles = DoubleRunObserver(herd.lab)
    herd.start_guests((guest, "h1"))
    before = guest.wait_ticks(1)
    header, row = columns(kubectl.ok("get", "vm"))
    assert header == ["NAME", "PHASE", "NODE", "IPADDRESS", "AGE"]
    assert row[:4] == ["linux-vm", "Running", "h1", guest.address]

    with kubectl.beside("get", "vm", "-w") as watch:
        watch.wait_for("linux-vm", "Running", "h1")
        told = kubectl.ok("create", "-f", "-", stdin=PLATFORM_MANIFEST)
        match = re.fullmatch(r"virtualmachineoperation\S+/(evict-linux-vm-\w+) created\n", told)
        assert match is not None, told
        name = match[1]
        kubectl.ok("wait", "vmop", name, "--for=jsonpath={.status.phase}=Completed", "--timeout=90s", timeout=100)
        (phase, node) = placed(kubectl, "linux-vm")
        assert (phase, node in {"h2", "h3"}) == ("Running", True)
        watch.wait_for("linux-vm", "Running", node)
        shown = [row[1:3] for row in columns("\n".join(watch.lines))[1:]]
        assert shown == [["Running", "h1"], ["Migrating", "h1"], ["Running", node]]
    header, *found = columns(kubectl.ok("get", "vmop"))
    assert header == ["NAME", "PHASE", "PROGRESS", "TYPE", "VIRTUALMACHINE", "AGE"]
    (row,) = [row for row in found if row[3] == "Evict"]  # beside its start
    assert row[:5] == [name, "Completed", "100%", "Evict", "linux-vm"]

    after = guest.wait_ticks(1)
    assert (after.boot_id, guest.trouble()) == (before.boot_id, "")
    doubles.check()
    outside.assert_runs_once(herd, guest, node)
    described = kubectl.ok("describe", "vmop", name)
    assert "MigrationStarted" in described
    assert re.search(rf"Target Node: +{node}", described)
    assert "MigrationStarted" in kubectl.ok("describe", "vm", "linux-vm")
    events = kubectl.ok("get", "events", "--field-selector", "involvedObject.name=linux-vm")
    assert "MigrationStarted" in events


def test_deleting_an_operation_that_runs_aborts_it(herd: LabHerd, kubectl: Kubectl) -> None:
    # It dirties faster than 40 MiB/s carry away: the migration never ends by itself.
    guest = herd.lab.guest("linux-vm", address="192.0.2.101", memory_mib=192, dirty_mib_s=120, working_set_mib=64)
    herd.start_guests((guest, "h1"))
    kubectl.ok("create", "-f", "-", stdin=PLATFORM_MANIFEST)
    (operation,) = [o for o in herd.cluster.operations() if o.spec.type is OperationType.EVICT]
    phase = "jsonpath={.status.phase}"
    kubectl.ok("wait", "vmop", operation.name, f"--for={phase}=InProgress", "--timeout=60s", timeout=70)
    wait_until(lambda: outside.job(herd.lab.host("h1"), guest), 30, "libvirt's job")
    pods = columns(kubectl.ok("get", "pods", "-o", "wide", "--no-headers"))
    assert sorted((row[2], row[6]) for row in pods)[1] == ("Running", "h1")
    assert sorted(row[2] for row in pods) == ["Pending", "Running"]
    told = kubectl.ok("delete", "vmop", operation.name, timeout=100)
    assert told == f'virtualmachineoperation.virtualization.deckhouse.io "{operation.name}" deleted\n'
    assert placed(kubectl, "linux-vm") == ["Running", "h1"]
    outside.assert_runs_once(herd, guest, "h1")
    guest.wait_ticks(1)
    assert guest.trouble() == ""


def test_a_node_is_emptied_and_used_again(herd: LabHerd, kubectl: Kubectl, tmp_path: Path) -> None:
    first = herd.lab.guest("a", address="192.0.2.101")
    second = herd.lab.guest("b", address="192.0.2.102")
    herd.start_guests((first, "h1"), (second, "h1"))
    kubectl.ok("cordon", "h1")
    assert columns(kubectl.ok("get", "node", "h1"))[1][1] == "Ready,SchedulingDisabled"
    kubectl.ok("uncordon", "h1")
    with kubectl.beside("drain", "h1", "--pod-selector", VM_PODS, "--delete-emptydir-data") as drain:
        drain.wait_for('Eviction triggered evacuation of VMI "default/a"', timeout=30)
        drain.wait_for('Eviction triggered evacuation of VMI "default/b"', timeout=30)
        assert drain.ended(150) == 0, "\n".join(drain.lines)
        drain.wait_for("node/h1 drained")
    made = [o.name for o in herd.cluster.operations() if o.spec.type is OperationType.EVICT]
    assert sorted(name.rpartition("-")[0] for name in made) == ["evacuation-a", "evacuation-b"], "each asked for once"
    for guest in (first, second):
        phase, node = placed(kubectl, guest.name)
        assert (phase, node in {"h2", "h3"}) == ("Running", True)
        outside.assert_runs_once(herd, guest, node)
        assert guest.trouble() == ""
    told = kubectl.ok("describe", "node", "h1")
    assert "Non-terminated Pods:          (0 in total)" in told
    assert "NodeCordoned" in told
    kubectl.ok("uncordon", "h1")

    document = kubectl.ok("get", "vm", "a", "-o", "yaml")
    assert kubectl.ok("get", "vm", "-l", "tier=db", "-o", "name") == ""
    kubectl.ok("label", "vm", "a", "tier=db")
    kubectl.ok("patch", "vm", "a", "--type=merge", "-p", '{"spec":{"liveMigrationPolicy":"PreferForced"}}')
    assert kubectl.ok("get", "vm", "-l", "tier=db", "-o", "name").endswith("/a\n")
    assert kubectl.ok("get", "vm", "-A", "--field-selector", "status.phase=Running", "-o", "name").count("\n") == 2
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nsed -i s/PreferForced/AlwaysSafe/ "$1"\n')
    editor.chmod(0o755)
    assert kubectl.run("edit", "vm", "a", KUBE_EDITOR=str(editor)).returncode == 0
    assert kubectl.ok("get", "vm", "a", "-o", "jsonpath={.spec.liveMigrationPolicy}") == "AlwaysSafe"
    plain = "\n".join(line for line in document.splitlines() if "resourceVersion" not in line)
    applied = kubectl.run("apply", "-f", "-", stdin=plain)  # it warns: what it changes was not made by apply
    assert applied.returncode == 0, applied
    assert "configured" in applied.stdout
    assert "RUNPOLICY" in kubectl.ok("get", "vm", "-o", "wide")
    named = kubectl.ok("get", "vm", "-n", "default", "-o", "custom-columns=N:.metadata.name,P:.status.phase")
    assert columns(named) == [["N", "P"], ["a", "Running"], ["b", "Running"]]
    assert kubectl.ok("get", "vm", "-n", "other", "-o", "name") == ""
    assert "virtualMachineName" in kubectl.ok("explain", "vmop.spec")
