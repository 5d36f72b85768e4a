"""The same machine at each start: on a real libvirt, from a structured spec and from a template, compared in whole."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import asdict
from uuid import NAMESPACE_URL, uuid5

import pytest

from orchestrator.planner.classes import evaluated
from orchestrator.resources import RenderHost, VirtualMachine, VirtualMachineClass, VmPhase, parse, render_domain
from orchestrator.resources.cpu import NodeCpu
from orchestrator.resources.machine import record_machine
from orchestrator.resources.node import HypervisorInfo
from tests.builders import NOW, a_node
from tests.lab.conftest import HERD_ENV
from tests.lab.herd import LabHerd
from tests.lab.lab import Lab, require_lab
from tests.lab.network import GUEST_BRIDGE
from workers.hypervisor.libvirt_driver import LibvirtHypervisor
from workers.hypervisor.port import Marker

HOST = RenderHost(domain_type="qemu", cpu_shares=False)  # the lab's hosts have neither KVM that works nor cgroups

OF_ONE_START = re.compile(
    r"/@id|/devices/(serial|console)(/@tty|/source/@path)|/devices/channel/source/@path|/devices/interface/target/@dev"
    r"|/metadata/vm/@(incarnation|epoch)|/devices/disk/source/@index"
)
"""What in a live XML belongs to one start and not to the machine."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    require_lab()
    with Lab(hosts=1, name="machines") as lab:
        yield lab


@pytest.fixture(scope="module")
def module_herd(lab: Lab) -> Iterator[LabHerd]:
    with LabHerd(lab, env=HERD_ENV) as herd:
        yield herd


@pytest.fixture
def hypervisor(lab: Lab) -> Iterator[LibvirtHypervisor]:
    driver = LibvirtHypervisor(lab.hosts[0].libvirt_uri, domain_type="qemu")
    yield driver
    for domain in driver.domains():
        driver.destroy(domain.uuid)
    driver.close()


def a_vm(lab: Lab, name: str, **spec: object) -> VirtualMachine:
    for disk in ("root", "data"):
        with (lab.directory / "disks" / f"{name}-{disk}.raw").open("wb") as file:
            file.truncate(2**20)
    meta = {"name": name, "namespace": "default", "uid": str(uuid5(NAMESPACE_URL, f"machines/{name}"))}
    whole = {"cpu": {"cores": 2}, "memory": {"size": "64Mi"}, **spec}
    return parse(VirtualMachine, {"metadata": meta, "spec": whole})


def a_disk(lab: Lab, vm: str, name: str, **more: object) -> dict[str, object]:
    return {"name": name, "file": {"path": str(lab.directory / "disks" / f"{vm}-{name}.raw")}, **more}


def start(
    hypervisor: LibvirtHypervisor, vm: VirtualMachine, vm_class: VirtualMachineClass | None = None
) -> tuple[VirtualMachine, str]:
    """Start it as a node would; gives it with what it was given, and its live XML. It is stopped again."""
    incarnation = vm.status.incarnation + 1
    marker = Marker("default", vm.name, incarnation, 7 + incarnation)
    hypervisor.start(render_domain(vm, vm_class, HOST), marker)
    definition = hypervisor.definition(vm.metadata.uid)
    assert definition is not None
    hypervisor.destroy(vm.metadata.uid)
    machine = record_machine(definition.live_xml)
    return vm.with_status(machine=machine, incarnation=incarnation), definition.live_xml


def paths(live_xml: str) -> dict[str, str]:
    """Every attribute and text of an XML by its path; elements of one name are numbered."""
    found: dict[str, str] = {}

    def walk(element: ET.Element, path: str) -> None:
        for name, value in element.attrib.items():
            found[f"{path}/@{name}"] = value
        if element.text and element.text.strip():
            found[f"{path}/text()"] = element.text.strip()
        seen: dict[str, int] = {}
        for child in element:
            tag = child.tag.rpartition("}")[2]
            seen[tag] = seen.get(tag, 0) + 1
            # libvirt keeps controllers in the order in which it came to know them; their indexes say which is which.
            name = f"{child.get('type')} {child.get('index')}" if tag == "controller" else str(seen[tag])
            walk(child, f"{path}/{tag}[{name}]")

    walk(ET.fromstring(live_xml), "")  # noqa: S314 - libvirtd wrote it
    return found


def differences(one: str, other: str) -> dict[str, tuple[str | None, str | None]]:
    before, after = paths(one), paths(other)
    differing = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    return {
        path: (before.get(path), after.get(path))
        for path in sorted(differing)
        if not OF_ONE_START.fullmatch(re.sub(r"\[[^]]+\]", "", path))
    }


def test_a_structured_vm_is_the_same_machine_at_each_start(lab: Lab, hypervisor: LibvirtHypervisor) -> None:
    vm = a_vm(
        lab,
        "structured",
        disks=[a_disk(lab, "structured", "root", serial="ROOT-1")],
        interfaces=[{"name": "main", "bridge": GUEST_BRIDGE}],
    )
    vm, first = start(hypervisor, vm)
    vm, second = start(hypervisor, vm)
    assert differences(first, second) == {}
    machine = vm.status.machine
    assert machine is not None
    assert re.fullmatch(r"pc-q35-\d+\.\d+", machine.type)
    assert machine.cpu is not None
    assert (machine.cpu.model, machine.cpu_from) == ("Nehalem", "custom Nehalem")
    keys = {device.key: device for device in machine.devices}
    assert keys["ua-net-main"].mac.startswith("02:")
    assert {"ua-disk-root", "ua-net-main", "ua-rng", "ua-balloon", "ua-agent"} <= keys.keys()
    assert keys["ua-disk-root"].address["type"] == "pci"


def test_what_a_change_does_not_touch_stays(lab: Lab, hypervisor: LibvirtHypervisor) -> None:
    root, data = a_disk(lab, "changed", "root"), a_disk(lab, "changed", "data")
    interface = {"name": "main", "bridge": GUEST_BRIDGE}
    vm = a_vm(lab, "changed", disks=[root, data], interfaces=[interface])
    vm, _ = start(hypervisor, vm)
    before = vm.status.machine
    more = a_vm(lab, "changed", disks=[data], interfaces=[{**interface, "name": "second"}, interface])
    vm, _ = start(hypervisor, vm.with_(spec=more.spec))
    after = vm.status.machine
    assert before is not None
    assert after is not None
    for key in ("ua-disk-data", "ua-net-main", "ua-rng", "ua-balloon"):
        assert after.device(key) == before.device(key)
    assert after.device("ua-disk-root") is None
    assert after.device("ua-net-second") is not None
    assert (after.type, after.cpu) == (before.type, before.cpu)


def test_a_template_is_the_same_machine_at_each_start(lab: Lab, hypervisor: LibvirtHypervisor) -> None:
    disk = lab.directory / "disks" / "template-root.raw"
    template = f"""
    <domain type='qemu'>
      <os><type arch='x86_64' machine='pc'>hvm</type></os>
      <features><acpi/></features>
      <cpu mode='host-model'/>
      <on_poweroff>preserve</on_poweroff>
      <devices>
        <disk type='file'><driver name='qemu' type='raw' cache='none'/><source file='{disk}'/>
          <target dev='vda' bus='virtio'/></disk>
        <interface type='bridge'><source bridge='{GUEST_BRIDGE}'/><model type='virtio'/></interface>
        <interface type='bridge'><source bridge='{GUEST_BRIDGE}'/><model type='virtio'/></interface>
      </devices>
    </domain>"""
    vm = a_vm(lab, "template", domainTemplate=template)
    vm, first = start(hypervisor, vm)
    vm, second = start(hypervisor, vm)
    assert differences(first, second) == {}
    assert "<on_poweroff>destroy</on_poweroff>" in second
    machine = vm.status.machine
    assert machine is not None
    assert re.fullmatch(r"pc-i440fx-\d+\.\d+", machine.type)
    macs = [device.mac for device in machine.devices if device.mac]
    assert len(macs) == len(set(macs)) == 2  # libvirt chose them, and they stay


def test_a_discovered_cpu_starts(lab: Lab, hypervisor: LibvirtHypervisor) -> None:
    told = hypervisor.host()
    assert told.domain_type == "qemu"
    cpu = NodeCpu.model_validate(asdict(told.cpu))
    assert "sse2" in cpu.features
    assert "Nehalem" in cpu.models
    node = a_node("h1")
    node = node.with_status(hypervisor=HypervisorInfo(domain_type="qemu", cpu=cpu))
    for name, spec in {
        "found": {"type": "Discovery"},
        "listed": {"type": "Features", "features": ["sse4.1", "aes"]},
    }.items():
        wanted = parse(VirtualMachineClass, {"metadata": {"name": name}, "spec": {"cpu": spec}})
        vm_class = evaluated(wanted, [node], NOW)
        assert vm_class.status.available_nodes == ("h1",), vm_class.status
        vm = a_vm(lab, name, interfaces=[{"name": "main", "bridge": GUEST_BRIDGE}], virtualMachineClassName=name)
        vm, first = start(hypervisor, vm, vm_class)
        vm, second = start(hypervisor, vm, vm_class)
        assert differences(first, second) == {}
        machine = vm.status.machine
        assert machine is not None
        assert machine.cpu is not None
        assert vm_class.status.cpu is not None
        assert vm_class.status.cpu.features <= machine.cpu.request.features


def test_the_product_gives_it_and_takes_a_change_at_the_restart(lab: Lab, herd: LabHerd) -> None:
    """From a manifest to QEMU: a restart gives what was recorded again, and with it a change that waited."""
    vm = a_vm(
        lab,
        "whole",
        disks=[a_disk(lab, "whole", "root")],
        interfaces=[{"name": "main", "bridge": GUEST_BRIDGE}],
        terminationGracePeriodSeconds=0,
    )
    document = vm.manifest()
    herd.cluster.create(document)
    first = running(herd, lab, 1)
    larger = {**document, "spec": {**document["spec"], "memory": {"size": "80Mi"}}}
    told = herd.vmherd("apply", "-f", "-", stdin=json.dumps(larger))
    assert told.rstrip().endswith("(waits for a restart: spec.memory.size)")
    herd.cluster.restart("whole").wait(60)
    second = running(herd, lab, 2)
    assert differences(first, second) == {
        "/currentMemory[1]/text()": ("65536", "81920"),
        "/memory[1]/text()": ("65536", "81920"),
    }
    assert herd.cluster.vm("whole").status.restart_awaiting_changes == ()


def running(herd: LabHerd, lab: Lab, incarnation: int) -> str:
    """Wait until a VM runs as this incarnation and its machine is on record; gives its live XML."""
    vm = herd.wait_vm(
        "whole", lambda vm: vm.status.phase is VmPhase.RUNNING and vm.status.incarnation == incarnation, 90
    )
    domain = lab.hosts[0].connect().lookupByUUIDString(vm.metadata.uid)
    live_xml = str(domain.XMLDesc())
    assert vm.status.machine == record_machine(live_xml)
    return live_xml
