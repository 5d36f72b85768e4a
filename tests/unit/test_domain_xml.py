"""The domain XML of a VM: what its spec says is in it, and what it was given at its first start stays."""

import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import Invalid, InvariantBroken
from orchestrator.resources import RenderHost, VirtualMachine, VirtualMachineClass, parse, render_domain
from orchestrator.resources.cpu import CpuRequest
from orchestrator.resources.domain_xml import default_mac, disk_targets, local_disks
from orchestrator.resources.machine import Machine, record_machine
from orchestrator.resources.vm_spec import VirtualMachineSpec
from tests.builders import a_class, a_structured_vm, a_vm


def rendered(vm: VirtualMachine, vm_class: VirtualMachineClass | None = None, **host: Any) -> ET.Element:
    return ET.fromstring(render_domain(vm, vm_class, RenderHost(**host)))  # noqa: S314


def attributes(root: ET.Element, path: str) -> dict[str, str]:
    found = root.find(path)
    assert found is not None, path
    return found.attrib


def with_spec(vm: VirtualMachine, **change: Any) -> VirtualMachine:
    """A VM whose spec differs in its outside form."""
    spec = {**vm.manifest()["spec"], **change}
    kept = {key: value for key, value in spec.items() if value is not None}
    return vm.with_(spec=parse(VirtualMachineSpec, kept))


def templated(template: str, **status: Any) -> VirtualMachine:
    vm = a_vm(**status)
    return vm.with_(spec=vm.spec.with_(domain_template=template))


class TestStructured:
    def test_identity_size_and_ends_are_the_resources_own(self) -> None:
        vm = a_structured_vm(cpu={"cores": 4, "sockets": 2, "coreFraction": "50%"}, memory={"size": "192Mi"})
        root = rendered(vm)
        assert root.findtext("name") == "default.linux-vm"
        assert root.findtext("uuid") == vm.metadata.uid
        assert (root.findtext("memory"), root.findtext("vcpu")) == ("196608", "4")
        assert attributes(root, "cpu/topology") == {"sockets": "2", "dies": "1", "cores": "2", "threads": "1"}
        assert root.findtext("cputune/shares") == "200"
        ends = [root.findtext(tag) for tag in ("on_poweroff", "on_reboot", "on_crash")]
        assert ends == ["destroy", "restart", "destroy"]

    def test_the_node_says_how_it_runs(self) -> None:
        assert rendered(a_structured_vm()).get("type") == "kvm"
        root = rendered(a_structured_vm(), domain_type="qemu", cpu_shares=False)
        assert root.get("type") == "qemu"
        assert root.find("cputune") is None

    def test_disks_of_all_sorts(self) -> None:
        vm = a_structured_vm(
            disks=[
                {"name": "root", "file": {"path": "/a <&>.raw"}, "serial": "S-1"},
                {"name": "block", "block": {"path": "/dev/vg/b"}, "readOnly": True, "bus": "scsi"},
                {
                    "name": "rbd",
                    "network": {
                        "protocol": "rbd",
                        "name": "pool/image",
                        "hosts": [{"name": "192.0.2.5", "port": 6789}],
                        "auth": {"username": "u", "secretUuid": "11111111-2222-3333-4444-555555555555"},
                    },
                },
                {"name": "cd", "cdrom": True, "file": {"path": "/cd.iso"}},
            ]
        )
        root = rendered(vm)
        disks = root.findall("devices/disk")
        assert [disk.get("type") for disk in disks] == ["file", "block", "network", "file"]
        assert [attributes(disk, "target")["dev"] for disk in disks] == ["vda", "sda", "vdb", "sdb"]
        assert attributes(disks[0], "source") == {"file": "/a <&>.raw"}
        assert disks[0].findtext("serial") == "S-1"
        assert attributes(disks[1], "source") == {"dev": "/dev/vg/b"}
        assert disks[1].find("readonly") is not None
        assert attributes(disks[2], "source") == {"protocol": "rbd", "name": "pool/image"}
        assert attributes(disks[2], "source/host") == {"name": "192.0.2.5", "port": "6789"}
        assert attributes(disks[2], "source/auth/secret")["type"] == "ceph"
        assert (disks[3].get("device"), attributes(disks[3], "target")["bus"]) == ("cdrom", "sata")
        assert [attributes(disk, "boot")["order"] for disk in disks] == ["1", "2", "3", "4"]
        assert attributes(root, "devices/controller[@type='scsi']")["model"] == "virtio-scsi"

    def test_boot_orders_that_are_said_count_alone(self) -> None:
        vm = a_structured_vm(interfaces=[{"name": "main", "bridge": "br0", "bootOrder": 3}])
        root = rendered(vm)
        assert root.find("devices/disk/boot") is None
        assert attributes(root, "devices/interface/boot") == {"order": "3"}
        assert root.find("devices/interface/rom") is None

    def test_without_a_disk_it_boots_from_the_network(self) -> None:
        root = rendered(a_structured_vm(disks=[]))
        assert attributes(root, "devices/interface/boot") == {"order": "1"}

    def test_an_interface_has_the_same_mac_at_each_start_and_another_than_others(self) -> None:
        vm = a_structured_vm()
        mac = attributes(rendered(vm), "devices/interface/mac")["address"]
        assert mac == default_mac(vm.metadata.uid, "main")
        assert mac != default_mac(vm.metadata.uid, "second")
        assert mac.startswith("02:")
        named = a_structured_vm(interfaces=[{"name": "main", "bridge": "br0", "mac": "52:54:00:00:00:01"}])
        assert attributes(rendered(named), "devices/interface/mac")["address"] == "52:54:00:00:00:01"

    def test_without_paravirtualization_nothing_is_virtio(self) -> None:
        text = render_domain(a_structured_vm(enableParavirtualization=False))
        assert "virtio" not in text
        root = ET.fromstring(text)  # noqa: S314
        assert attributes(root, "devices/disk/target")["bus"] == "sata"
        assert attributes(root, "devices/interface/model")["type"] == "e1000e"

    @pytest.mark.parametrize(
        ("spec", "machine", "clock"),
        [({}, "q35", "utc"), ({"osType": "Windows"}, "q35", "localtime"), ({"osType": "Legacy"}, "pc", "utc")],
    )
    def test_operating_systems(self, spec: dict[str, Any], machine: str, clock: str) -> None:
        root = rendered(a_structured_vm(**spec))
        assert attributes(root, "os/type")["machine"] == machine
        assert attributes(root, "clock")["offset"] == clock
        assert (root.find("features/hyperv") is not None) == (spec.get("osType") == "Windows")

    def test_hyperv_needs_kvm(self) -> None:
        assert rendered(a_structured_vm(osType="Windows"), domain_type="qemu").find("features/hyperv") is None

    @pytest.mark.parametrize(("bootloader", "secure"), [("EFI", "no"), ("EFIWithSecureBoot", "yes")])
    def test_firmware(self, bootloader: str, secure: str) -> None:
        root = rendered(a_structured_vm(bootloader=bootloader))
        assert attributes(root, "os")["firmware"] == "efi"
        assert attributes(root, "os/firmware/feature[@name='secure-boot']")["enabled"] == secure
        assert (root.find("features/smm") is not None) == (secure == "yes")

    def test_without_a_class_it_sees_a_cpu_that_every_host_has(self) -> None:
        assert rendered(a_structured_vm()).findtext("cpu/model") == "Nehalem"
        named = a_structured_vm(cpu={"cores": 1, "model": "EPYC"})
        assert rendered(named).findtext("cpu/model") == "EPYC"

    @pytest.mark.parametrize(
        ("request_", "mode", "model"),
        [
            (CpuRequest(mode="host-model"), "host-model", None),
            (CpuRequest(mode="host-passthrough"), "host-passthrough", None),
            (CpuRequest(model="EPYC", vendor="AMD", features=frozenset({"avx"})), "custom", "EPYC"),
        ],
    )
    def test_the_classs_cpu(self, request_: CpuRequest, mode: str, model: str | None) -> None:
        vm = a_structured_vm(virtualMachineClassName="fast")
        root = rendered(vm, a_class("fast", gives=request_))
        assert attributes(root, "cpu")["mode"] == mode
        assert root.findtext("cpu/model") == model
        assert attributes(root, "cpu/topology")["cores"] == "2"
        assert [f.get("name") for f in root.findall("cpu/feature")] == sorted(request_.features)

    def test_a_class_that_is_not_known_is_no_default(self) -> None:
        vm = a_structured_vm(virtualMachineClassName="fast")
        for wrong in (None, a_class("slow"), a_class("fast").with_status(cpu=None)):
            with pytest.raises(InvariantBroken, match="'fast' is not known"):
                render_domain(vm, wrong)

    @given(st.lists(st.sampled_from(["virtio", "scsi", "sata"]), min_size=1, max_size=40))
    def test_no_two_disks_have_one_target(self, buses: list[str]) -> None:
        disks = [{"name": f"d{n}", "file": {"path": f"/{n}"}, "bus": bus} for n, bus in enumerate(buses)]
        targets = disk_targets(a_structured_vm(disks=disks).spec)
        assert len(set(targets.values())) == len(disks)
        prefixes = [target[:2] for target in targets.values()]
        assert prefixes == ["vd" if bus == "virtio" else "sd" for bus in buses]

    def test_disks_that_are_not_shared(self) -> None:
        vm = a_structured_vm(
            disks=[
                {"name": "root", "file": {"path": "/a"}},
                {"name": "scratch", "file": {"path": "/b"}, "shared": False},
                {"name": "iso", "file": {"path": "/c"}, "shared": False, "cdrom": True},
            ]
        )
        assert local_disks(vm) == ("vdb",)


class TestTemplates:
    def test_what_is_the_resources_own_replaces_what_the_template_says(self) -> None:
        template = (
            "<domain><name>x</name><vcpu current='1'>9</vcpu><memory unit='GiB'>7</memory><devices/>"
            "<on_reboot>destroy</on_reboot><on_crash>coredump-restart</on_crash></domain>"
        )
        root = rendered(templated(template))
        assert root.findtext("name") == "default.linux-vm"
        assert (root.findtext("vcpu"), attributes(root, "vcpu")) == ("1", {})
        assert (root.findtext("memory"), attributes(root, "memory")) == ("1048576", {"unit": "KiB"})
        assert (root.findtext("on_reboot"), root.findtext("on_crash")) == ("restart", "destroy")

    def test_its_own_type_machine_and_cpu_stay(self) -> None:
        template = "<domain type='qemu'><os><type machine='pc'>hvm</type></os><cpu mode='host-passthrough'/></domain>"
        root = rendered(templated(template), domain_type="kvm")
        assert root.get("type") == "qemu"
        assert attributes(root, "os/type") == {"machine": "pc"}
        assert attributes(root, "cpu") == {"mode": "host-passthrough"}

    def test_a_class_replaces_its_cpu_but_not_its_topology(self) -> None:
        template = "<domain><cpu mode='host-passthrough'><topology sockets='1' cores='1' threads='1'/></cpu></domain>"
        vm = templated(template)
        vm = vm.with_(spec=vm.spec.with_(virtual_machine_class_name="generic"))
        root = rendered(vm, a_class())
        assert root.findtext("cpu/model") == "Nehalem"
        assert attributes(root, "cpu/topology")["cores"] == "1"

    def test_other_namespaces_keep_their_prefix(self) -> None:
        uri = "http://libvirt.org/schemas/domain/qemu/1.0"
        template = (
            f"<domain xmlns:qemu='{uri}'><qemu:commandline><qemu:arg value='-snapshot'/></qemu:commandline></domain>"
        )
        assert "<qemu:arg" in render_domain(templated(template))


LIVE = """
<domain type='kvm' id='3'>
  <metadata><r:rendered xmlns:r="https://vmherd.dev/rendered/1" cpu="custom Nehalem"/></metadata>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
  <cpu mode='custom' match='exact' check='full'><model fallback='forbid'>Nehalem</model><vendor>Intel</vendor>
    <topology sockets='1' dies='1' cores='8' threads='1'/><feature policy='require' name='vme'/>
    <feature policy='disable' name='x2apic'/></cpu>
  <devices>
    <disk type='file' device='disk'><target dev='vdc' bus='virtio'/><alias name='ua-disk-root'/>
      <address type='pci' domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></disk>
    <controller type='pci' index='0' model='pcie-root'><alias name='pcie.0'/></controller>
    <controller type='pci' index='3' model='pcie-root-port'><model name='pcie-root-port'/>
      <target chassis='3' port='0xa'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x01' function='0x2'/></controller>
    <interface type='bridge'><mac address='52:54:00:aa:bb:cc'/><source bridge='br0'/><alias name='ua-net-main'/>
      <address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></interface>
    <memballoon model='virtio'><alias name='ua-balloon'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/></memballoon>
  </devices>
</domain>
"""


class TestTheSameMachine:
    def test_all_that_was_given_is_given_again(self) -> None:
        vm = a_structured_vm().with_status(machine=record_machine(LIVE))
        root = rendered(vm)
        assert attributes(root, "os/type")["machine"] == "pc-q35-7.2"
        assert attributes(root, "cpu")["check"] == "full"
        assert [f.attrib for f in root.findall("cpu/feature")] == [
            {"policy": "require", "name": "vme"},
            {"policy": "disable", "name": "x2apic"},
        ]
        assert attributes(root, "cpu/topology")["cores"] == "2"  # follows from the spec
        assert attributes(root, "devices/disk/target")["dev"] == "vdc"
        assert attributes(root, "devices/disk/address")["bus"] == "0x03"
        assert attributes(root, "devices/interface/mac")["address"] == "52:54:00:aa:bb:cc"
        assert attributes(root, "devices/memballoon/address")["bus"] == "0x04"
        port = root.find("devices/controller[@index='3']")
        assert port is not None
        assert attributes(port, "target") == {"chassis": "3", "port": "0xa"}
        assert root.find("devices/rng/address") is None  # the XML told none: libvirt chooses
        assert record_machine(ET.tostring(root, encoding="unicode")).cpu == record_machine(LIVE).cpu

    def test_another_cpu_that_is_asked_for_is_given(self) -> None:
        vm = a_structured_vm(cpu={"cores": 2, "model": "EPYC"}).with_status(machine=record_machine(LIVE))
        root = rendered(vm)
        assert root.findtext("cpu/model") == "EPYC"
        assert attributes(root, "cpu")["check"] == "partial"
        assert attributes(root, "devices/disk/address")["bus"] == "0x03"

    def test_on_another_chipset_only_the_mac_stays(self) -> None:
        vm = a_structured_vm(osType="Legacy").with_status(machine=record_machine(LIVE))
        root = rendered(vm)
        assert attributes(root, "os/type")["machine"] == "pc"
        assert root.find("devices/disk/address") is None
        assert root.find("devices/controller[@index='3']") is None
        assert attributes(root, "devices/interface/mac")["address"] == "52:54:00:aa:bb:cc"

    def test_a_disk_on_another_bus_is_another_device(self) -> None:
        vm = a_structured_vm().with_status(machine=record_machine(LIVE))
        root = rendered(with_spec(vm, disks=[{"name": "root", "file": {"path": "/a"}, "bus": "sata"}]))
        assert attributes(root, "devices/disk/target")["dev"] == "sda"
        assert root.find("devices/disk/address") is None

    def test_a_new_disk_takes_no_name_that_is_taken(self) -> None:
        vm = a_structured_vm().with_status(machine=record_machine(LIVE.replace("vdc", "vda")))
        disks = [{"name": "new", "file": {"path": "/b"}}, {"name": "root", "file": {"path": "/a"}}]
        assert disk_targets(with_spec(vm, disks=disks).spec, vm.status.machine) == {"root": "vda", "new": "vdb"}

    def test_an_address_that_the_spec_now_gives_to_another_is_not_given_twice(self) -> None:
        template = "<domain><devices>{}<interface type='bridge'><source bridge='br0'/></interface></devices></domain>"
        live = template.format("").replace(
            "<source bridge='br0'/>",
            "<mac address='52:54:00:00:00:01'/><source bridge='br0'/><address type='pci' slot='0x3'/>",
        )
        rng = "<rng model='virtio'><address type='pci' domain='0' bus='0' slot='3' function='0'/></rng>"
        vm = templated(template.format(rng), machine=record_machine(live))
        root = rendered(vm)
        assert root.find("devices/interface/address") is None
        assert attributes(root, "devices/interface/mac")["address"] == "52:54:00:00:00:01"

    def test_interfaces_of_a_template_are_told_apart_by_their_order(self) -> None:
        nic = "<interface type='bridge'>{}<source bridge='br0'/></interface>"
        live = nic.format("<mac address='52:54:00:00:00:01'/>") + nic.format("<mac address='52:54:00:00:00:02'/>")
        machine = record_machine(f"<domain><devices>{live}</devices></domain>")
        vm = templated(f"<domain><devices>{nic.format('') * 2}</devices></domain>", machine=machine)
        macs = [mac.get("address") for mac in rendered(vm).iterfind("devices/interface/mac")]
        assert macs == ["52:54:00:00:00:01", "52:54:00:00:00:02"]

    def test_what_a_template_says_stays(self) -> None:
        template = """<domain><os><type machine='pc-q35-6.2'>hvm</type></os><devices>
            <disk><target dev='vda' bus='virtio'/><address type='pci' slot='9'/></disk></devices></domain>"""
        live = template.replace("6.2", "7.2").replace("slot='9'", "slot='5'")
        root = rendered(templated(template, machine=record_machine(live)))
        assert attributes(root, "os/type")["machine"] == "pc-q35-6.2"
        assert attributes(root, "devices/disk/address")["slot"] == "9"

    @pytest.mark.parametrize(
        "xml",
        [
            "",
            "<domain",
            "<!DOCTYPE domain><domain/>",
            "<domain>" + " " * 2_000_000 + "</domain>",
            "<domain><os><type machine='a b'>hvm</type></os></domain>",
            "<domain><devices><controller type='pci' index='x'/></devices></domain>",
            "<domain><devices><controller type='pci' index='-1'/></devices></domain>",
            "<domain><cpu><feature name='a/b'/></cpu></domain>",
            "<domain><devices><disk><address type='pci' evil='&lt;'/></disk></devices></domain>",
        ],
    )
    def test_what_a_node_tells_is_checked(self, xml: str) -> None:
        with pytest.raises(Invalid, match="the XML of a running domain"):
            record_machine(xml)

    def test_it_is_stored_and_read_back(self) -> None:
        machine = record_machine(LIVE)
        assert Machine.model_validate_json(machine.model_dump_json(by_alias=True)) == machine
