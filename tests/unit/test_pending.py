"""What of a changed spec waits for a restart, and whether a VM can migrate at all."""

from typing import Any

import pytest

from orchestrator.resources import VirtualMachine, VmPhase, find_condition
from orchestrator.resources.cpu import CpuRequest
from orchestrator.resources.machine import Machine
from orchestrator.resources.migratable import migratable
from orchestrator.resources.pending import changed_fields, pending_changes, started, with_pending
from tests.builders import DOMAIN_XML, NOW, a_class, a_structured_vm
from tests.unit.test_domain_xml import templated, with_spec


def running(**spec: Any) -> VirtualMachine:
    return a_structured_vm(**spec).with_status(phase=VmPhase.RUNNING, node_name="n1", incarnation=1)


def changed(vm: VirtualMachine, **change: Any) -> VirtualMachine:
    """A running VM after its spec was changed, as `update_vm` leaves it."""
    new = with_spec(vm, **change)
    return new.with_status(applied=vm.running_spec if changed_fields(vm.running_spec, new.spec) else None)


def told(vm: VirtualMachine) -> list[tuple[str, Any, Any]]:
    return [(c.path, c.current_value, c.desired_value) for c in pending_changes(vm)]


DISK = {"name": "root", "file": {"path": "/srv/vm/root.qcow2"}, "format": "qcow2"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"memory": {"size": "2Gi"}}, [("spec.memory.size", "1Gi", "2Gi")]),
        (
            {"cpu": {"cores": 4, "coreFraction": "10%"}},
            [("spec.cpu.coreFraction", "100%", "10%"), ("spec.cpu.cores", 2, 4)],
        ),
        ({"bootloader": "EFI"}, [("spec.bootloader", "BIOS", "EFI")]),
        ({"virtualMachineClassName": "fast"}, [("spec.virtualMachineClassName", None, "fast")]),
        ({"disks": [{**DISK, "serial": "A"}]}, [("spec.disks[root].serial", None, "A")]),
        (
            {"disks": [{**DISK, "file": {"path": "/b"}}]},
            [("spec.disks[root].file.path", "/srv/vm/root.qcow2", "/b")],
        ),
        ({"interfaces": [{"name": "main", "bridge": "br1"}]}, [("spec.interfaces[main].bridge", "br0", "br1")]),
    ],
)
def test_what_waits_is_listed_by_its_path(change: dict[str, Any], expected: list[tuple[str, Any, Any]]) -> None:
    assert told(changed(running(), **change)) == expected


def test_added_removed_and_reordered_devices() -> None:
    one, two = DISK, {"name": "data", "file": {"path": "/d"}}
    vm = running(disks=[one])
    (added,) = pending_changes(changed(vm, disks=[one, two]))
    assert (added.path, added.operation, added.current_value) == ("spec.disks[data]", "add", None)
    (removed,) = pending_changes(changed(running(disks=[one, two]), disks=[one]))
    assert (removed.path, removed.operation) == ("spec.disks[data]", "remove")
    assert told(changed(running(disks=[one, two]), disks=[two, one])) == [
        ("spec.disks", ["root", "data"], ["data", "root"])
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"runPolicy": "Manual"},
        {"nodeSelector": {"zone": "a"}},
        {"tolerations": [{"operator": "Exists"}]},
        {"affinity": {"nodeAffinity": {}}},
        {"liveMigrationPolicy": "AlwaysForced"},
        {"priority": 5, "priorityClassName": "high"},
        {"terminationGracePeriodSeconds": 1},
        {"ipAddress": "192.0.2.7"},
        {"disks": [{**DISK, "shared": False}]},
        {"disruptions": {"restartApprovalMode": "Automatic"}},
    ],
)
def test_what_applies_at_once_is_not_listed(change: dict[str, Any]) -> None:
    assert told(changed(running(), **change)) == []


def test_a_template_is_shown_by_its_digest_where_it_is_long() -> None:
    vm = templated(DOMAIN_XML, phase=VmPhase.RUNNING)
    new = vm.spec.with_(domain_template=f"<domain type='kvm'>{' ' * 500}</domain>")
    vm = vm.with_(spec=new).with_status(applied=vm.spec)
    ((path, before, after),) = told(vm)
    assert (path, before) == ("spec.domainTemplate", DOMAIN_XML)
    assert after.startswith("sha256:")
    assert len(after) < 60


def test_changed_back_waits_no_more() -> None:
    vm = changed(running(), memory={"size": "2Gi"})
    assert vm.running_spec.memory.size == "1Gi"
    assert told(changed(vm, memory={"size": "4Gi"})) == [("spec.memory.size", "1Gi", "4Gi")]
    back = changed(vm, memory={"size": "1Gi"})
    assert (told(back), back.status.applied) == ([], None)


def test_one_that_does_not_run_waits_for_nothing() -> None:
    vm = changed(running(), memory={"size": "2Gi"}).with_status(phase=VmPhase.STOPPED)
    assert told(vm) == []
    assert vm.running_spec.memory.size == "2Gi"


def test_the_class_had_another_cpu_at_the_start() -> None:
    vm = running(virtualMachineClassName="fast").with_status(machine=Machine(cpu_from="custom Nehalem"))
    same = a_class("fast", gives=CpuRequest(model="Nehalem"))
    other = a_class("fast", gives=CpuRequest(model="EPYC"))
    assert pending_changes(vm, same) == ()
    (change,) = pending_changes(vm, other)
    assert change.path == "VirtualMachineClass/fast:spec.cpu"
    assert (change.current_value, change.desired_value) == ("custom Nehalem", "custom EPYC")


def test_the_conditions_say_it() -> None:
    vm = with_pending(changed(running(), memory={"size": "2Gi"}), None, NOW)
    waits = find_condition(vm.status.conditions, "AwaitingRestartToApplyConfiguration")
    applied = find_condition(vm.status.conditions, "ConfigurationApplied")
    assert waits is not None
    assert applied is not None
    assert (waits.status, applied.status) == ("True", "False")
    assert "spec.memory.size" in waits.message
    assert with_pending(vm, None, NOW) is vm
    again = started(vm, NOW)
    assert (again.status.applied, again.status.restart_awaiting_changes) == (None, ())
    waits = find_condition(again.status.conditions, "AwaitingRestartToApplyConfiguration")
    assert waits is not None
    assert waits.status == "False"


def test_a_vm_that_never_waited_gets_no_condition() -> None:
    assert started(running(), NOW).status.conditions == ()


class TestMigratable:
    def test_one_with_shared_disks(self) -> None:
        condition = migratable(a_structured_vm())
        assert (condition.status, condition.reason) == ("True", "VirtualMachineMigratable")

    def test_a_disk_that_is_not_shared_is_named(self) -> None:
        vm = a_structured_vm(disks=[{**DISK, "shared": False}])
        condition = migratable(vm)
        assert (condition.status, condition.reason) == ("False", "VirtualMachineDisksNotMigratable")
        assert "disk vda is not shared" in condition.message
        may = vm.with_(metadata=vm.metadata.with_(annotations={"vmherd.dev/allow-storage-copy": "true"}))
        assert migratable(may).status == "True"

    @pytest.mark.parametrize(
        ("device", "reason", "message"),
        [
            (
                "<hostdev type='pci'><source><address domain='0x0000' bus='0x65' slot='0x00'/></source></hostdev>",
                "VirtualMachineHostDevicesNotMigratable",
                "host device pci 0x0000 0x65 0x00",
            ),
            (
                "<interface type='hostdev'><mac address='52:54:00:00:00:01'/></interface>",
                "VirtualMachineHostDevicesNotMigratable",
                "interface 52:54:00:00:00:01 is a host device",
            ),
            (
                "<disk><transient/><target dev='vdb'/></disk>",
                "VirtualMachineDisksNotMigratable",
                "disk vdb is transient",
            ),
            (
                "<filesystem><target dir='share'/></filesystem>",
                "VirtualMachineNonMigratable",
                "file system share is shared with its host",
            ),
        ],
    )
    def test_what_is_in_the_way_is_named(self, device: str, reason: str, message: str) -> None:
        condition = migratable(templated(f"<domain><devices>{device}</devices></domain>"))
        assert (condition.status, condition.reason) == ("False", reason)
        assert message in condition.message

    def test_a_team_with_a_virtual_card_can_go(self) -> None:
        team = "<interface type='hostdev'><teaming type='transient' persistent='ua-a'/></interface>"
        assert migratable(templated(f"<domain><devices>{team}</devices></domain>")).status == "True"
