"""What a VM's and a class's manifest may say: taken as it is meant, or refused with the path of what is wrong."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.create import read_documents
from orchestrator.errors import Invalid
from orchestrator.resources import Node, VirtualMachine, VirtualMachineClass, parse, render_domain
from orchestrator.resources.scheduling import NodeSelectorRequirement, Taint, Toleration, untolerated
from orchestrator.resources.vm_spec import VirtualMachineSpec
from orchestrator.services.manifests import read_manifest
from orchestrator.store.batch import encode
from orchestrator.store.store import decode
from tests.builders import DOMAIN_XML, a_class, a_node, a_structured_vm

DISK = {"name": "root", "file": {"path": "/srv/root.raw"}}
NIC = {"name": "main", "bridge": "br0"}
TERM = {"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "db"}}}
EVERYTHING: dict[str, Any] = {
    "runPolicy": "AlwaysOn",
    "virtualMachineClassName": "generic",
    "cpu": {"cores": 4, "coreFraction": "20%", "sockets": 2},
    "memory": {"size": "2Gi"},
    "disks": [
        {**DISK, "format": "qcow2", "bus": "scsi", "bootOrder": 2, "serial": "ROOT-1", "shared": False},
        {"name": "fast", "block": {"path": "/dev/vg0/fast"}, "readOnly": True},
        {
            "name": "far",
            "network": {
                "protocol": "rbd",
                "name": "pool/image",
                "hosts": [{"name": "192.0.2.5", "port": 6789}],
                "auth": {"username": "admin", "secretUuid": "11111111-2222-3333-4444-555555555555"},
            },
        },
        {"name": "cd", "cdrom": True},
    ],
    "interfaces": [{**NIC, "mac": "52:54:00:12:34:AB", "bootOrder": 1}, {"name": "nat", "network": "default"}],
    "osType": "Windows",
    "bootloader": "EFIWithSecureBoot",
    "nodeSelector": {"example.com/zone": "a"},
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]}]
            },
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 10, "preference": {"matchExpressions": [{"key": "ssd", "operator": "Exists"}]}}
            ],
        },
        "virtualMachineAndPodAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [TERM]},
        "virtualMachineAndPodAntiAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 100, "virtualMachineAndPodAffinityTerm": TERM}
            ]
        },
    },
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
    "tolerations": [{"key": "dedicated", "operator": "Equal", "value": "db", "effect": "NoSchedule"}],
    "priorityClassName": "production",
    "priority": 1000,
    "liveMigrationPolicy": "AlwaysSafe",
    "disruptions": {"restartApprovalMode": "Automatic"},
    "terminationGracePeriodSeconds": 30,
    "ipAddress": "192.0.2.101",
}


def refusal(spec: dict[str, Any], model: type[Any] = VirtualMachine) -> list[tuple[str, str]]:
    """What is wrong with a manifest, as paths and reasons."""
    with pytest.raises(Invalid) as error:
        parse(model, {"metadata": {"name": "a"}, "spec": spec})
    assert all(f"{path}: {why}" in str(error.value) for path, why in error.value.causes)
    return list(error.value.causes)


def structured(**change: Any) -> dict[str, Any]:
    whole = {"cpu": {"cores": 2}, "memory": {"size": "1Gi"}, "disks": [DISK], "interfaces": [NIC], **change}
    return {key: value for key, value in whole.items() if value is not None}


def test_everything_at_once_is_taken_and_kept() -> None:
    vm = parse(VirtualMachine, {"metadata": {"name": "a"}, "spec": EVERYTHING})
    assert vm.manifest()["spec"]["affinity"] == EVERYTHING["affinity"]
    assert vm.manifest()["spec"]["tolerations"] == EVERYTHING["tolerations"]
    assert vm.spec.interfaces[0].mac == "52:54:00:12:34:ab"
    assert decode(vm.kind_name, f"7 3 {encode(vm)}").spec == vm.spec  # type: ignore[attr-defined]
    assert parse(VirtualMachine, vm.manifest()).spec == vm.spec  # what is shown can be given back


@pytest.mark.parametrize(
    ("change", "path", "why"),
    [
        pytest.param({"disks": None, "interfaces": None}, "disks", "is required", id="nothing to boot from"),
        pytest.param({"cpu": None}, "cpu", "is required (without a domainTemplate)", id="no cpu"),
        pytest.param({"memory": None}, "memory", "is required", id="no memory"),
        pytest.param({"memory": {"size": "65Ti"}}, "memory.size", "more than 64Ti", id="huge memory"),
        pytest.param({"memory": {"size": "9" * 5000}}, "memory.size", "is not a quantity", id="endless memory"),
        pytest.param({"cpu": {"cores": 3, "sockets": 2}}, "cpu.sockets", "evenly", id="sockets"),
        pytest.param({"cpu": {"cores": 10**5000}}, "cpu.cores", "less than or equal to 1024", id="endless cores"),
        pytest.param({"domainTemplate": DOMAIN_XML}, "disks", "conflicts with domainTemplate", id="both"),
        pytest.param(
            {"virtualMachineClassName": "x", "cpu": {"cores": 1, "model": "EPYC"}}, "cpu.model", "conflicts", id="model"
        ),
        pytest.param({"disks": [DISK, DISK]}, "disks[1].name", "is that of disks[0] too", id="disk twice"),
        pytest.param({"disks": [{"name": "a"}]}, "disks[0].file", "is required", id="no source"),
        pytest.param(
            {"disks": [{**DISK, "block": {"path": "/dev/sda"}}]}, "disks[0].block", "conflicts with file", id="sources"
        ),
        pytest.param({"disks": [{**DISK, "file": {"path": "a"}}]}, "disks[0].file.path", "absolute", id="relative"),
        pytest.param(
            {"disks": [{**DISK, "file": {"path": "/a/../b"}}]}, "disks[0].file.path", "'..'", id="dots in a path"
        ),
        pytest.param(
            {"disks": [{**DISK, "file": {"path": "/a\x1b"}}]}, "disks[0].file.path", "printable", id="control"
        ),
        pytest.param({"disks": [{**DISK, "bus": "nvme"}]}, "disks[0].bus", "'virtio'", id="bus"),
        pytest.param({"disks": [{**DISK, "bus": "ide"}]}, "disks[0].bus", "osType Legacy", id="ide"),
        pytest.param({"disks": [{**DISK, "cdrom": True, "bus": "virtio"}]}, "disks[0].bus", "cdrom", id="cdrom"),
        pytest.param({"disks": [{**DISK, "serial": "a/b"}]}, "disks[0].serial", "serial number", id="serial"),
        pytest.param(
            {"disks": [{"name": "a", "network": {"protocol": "nbd", "name": "x"}}]},
            "disks[0].network.hosts",
            "must be one host for nbd",
            id="nbd",
        ),
        pytest.param(
            {"disks": [{**DISK, "bootOrder": 1}], "interfaces": [{**NIC, "bootOrder": 1}]},
            "interfaces[0].bootOrder",
            "1 is that of disks[0] too",
            id="boot order",
        ),
        pytest.param(
            {"interfaces": [{**NIC, "mac": "02:00:00:00:00:01"}, {**NIC, "name": "b", "mac": "02:00:00:00:00:01"}]},
            "interfaces[1].mac",
            "is that of interfaces[0] too",
            id="mac twice",
        ),
        pytest.param({"interfaces": [{**NIC, "mac": "01:00:00:00:00:01"}]}, "interfaces[0].mac", "unicast", id="mac"),
        pytest.param({"interfaces": [{**NIC, "mac": 41135085296}]}, "interfaces[0].mac", "in quotes", id="mac of YAML"),
        pytest.param({"interfaces": [{"name": "a"}]}, "interfaces[0].bridge", "is required (or network)", id="nowhere"),
        pytest.param({"interfaces": [{**NIC, "bridge": "b/r"}]}, "interfaces[0].bridge", "bridge", id="bridge"),
        pytest.param(
            {"enableParavirtualization": False, "interfaces": [{**NIC, "model": "virtio"}]},
            "interfaces[0].model",
            "virtio conflicts with enableParavirtualization",
            id="paravirtualization",
        ),
        pytest.param({"nodeSelector": {"a b": "c"}}, "nodeSelector.a b.[key]", "label key", id="label key"),
        pytest.param({"nodeSelector": {"a": "-"}}, "nodeSelector.a", "label value", id="label value"),
        pytest.param({"tolerations": [{"value": "x"}]}, "tolerations[0].key", "unless operator", id="toleration key"),
        pytest.param(
            {"tolerations": [{"key": "a", "operator": "Exists", "value": "x"}]},
            "tolerations[0].value",
            "must be empty",
            id="toleration value",
        ),
        pytest.param(
            {"tolerations": [{"key": "a", "tolerationSeconds": 5, "effect": "NoSchedule"}]},
            "tolerations[0].tolerationSeconds",
            "only for effect NoExecute",
            id="toleration seconds",
        ),
        pytest.param(
            {"topologySpreadConstraints": EVERYTHING["topologySpreadConstraints"] * 2},
            "topologySpreadConstraints[1].topologyKey",
            "is there already",
            id="spread twice",
        ),
        pytest.param({"priority": 2**40}, "priority", "less than or equal", id="priority"),
        pytest.param({"priorityClassName": "A"}, "priorityClassName", "DNS subdomain", id="priority class"),
        pytest.param({"ipAddress": "192.0.2"}, "ipAddress", "is not an IP address", id="address"),
        pytest.param({"ipAddress": "127.0.0.1"}, "ipAddress", "that a guest can have", id="loopback"),
        pytest.param({"terminationGracePeriodSeconds": -1}, "terminationGracePeriodSeconds", "greater", id="grace"),
        pytest.param({"disruptions": {"restartApprovalMode": "Never"}}, "disruptions.restartApprovalMode", "'Manual'"),
        pytest.param({"bootloader": "UEFI"}, "bootloader", "'BIOS'", id="bootloader"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], path: str, why: str) -> None:
    causes = refusal(structured(**change))
    assert causes[0][0] == f"spec.{path}"
    assert why in causes[0][1]
    assert all(len(reason) < 300 for _, reason in causes)


REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


@pytest.mark.parametrize(
    ("place", "value", "path"),
    [
        (
            ["nodeAffinity", REQUIRED],
            {"nodeSelectorTerms": []},
            ".nodeSelectorTerms",
        ),
        (
            ["nodeAffinity", REQUIRED],
            {"nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "In"}]}]},
            ".nodeSelectorTerms[0].matchExpressions[0].values",
        ),
        (
            ["nodeAffinity", REQUIRED],
            {"nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["x"]}]}]},
            ".nodeSelectorTerms[0].matchExpressions[0].values",
        ),
        (
            ["nodeAffinity", REQUIRED],
            {"nodeSelectorTerms": [{"matchFields": [{"key": "a", "operator": "In", "values": ["x"]}]}]},
            ".nodeSelectorTerms[0].matchFields[0].key",
        ),
        (
            ["nodeAffinity", PREFERRED],
            [{"weight": 101, "preference": {}}],
            "[0].weight",
        ),
        (
            ["virtualMachineAndPodAffinity", REQUIRED],
            [{"labelSelector": {}}],
            "[0].topologyKey",
        ),
        (
            ["virtualMachineAndPodAntiAffinity", REQUIRED],
            [{"topologyKey": "zone", "matchLabelKeys": ["a"]}],
            "[0].matchLabelKeys",
        ),
        (["podAffinity"], {}, ""),
    ],
)
def test_affinity_is_checked_as_kubernetes_does(place: list[str], value: Any, path: str) -> None:
    affinity: Any = value
    for key in reversed(place):
        affinity = {key: affinity}
    causes = refusal(structured(affinity=affinity))
    assert causes[0][0] == f"spec.affinity.{'.'.join(place)}{path}"


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        ("interfaces", [NIC], "interfaces"),
        ("osType", "Windows", "osType"),
        ("bootloader", "EFI", "bootloader"),
        ("enableParavirtualization", False, "enableParavirtualization"),
        ("cpu", {"cores": 2, "sockets": 2}, "cpu.sockets"),
        ("cpu", {"cores": 2, "model": "EPYC"}, "cpu.model"),
    ],
)
def test_what_conflicts_with_a_template_is_named(field: str, value: Any, path: str) -> None:
    (cause,) = refusal({"memory": {"size": "1Gi"}, "domainTemplate": DOMAIN_XML, field: value})
    assert cause == (f"spec.{path}", "conflicts with domainTemplate: a machine is described by one of both")


@pytest.mark.parametrize(
    ("xml", "why"),
    [
        ("", "is not well-formed XML"),
        ("<domain>", "is not well-formed XML"),
        ("<network/>", "its root element is <network>"),
        ("<!DOCTYPE domain><domain/>", "has a document type"),
        ('<!DOCTYPE d [<!ENTITY a "b">]><domain>&a;</domain>', "has a document type"),
        ('<!DOCTYPE d SYSTEM "file:///etc/passwd"><domain/>', "has a document type"),
        ("<domain>&a;</domain>", "is not well-formed XML"),
        ("<domain><xi:include xmlns:xi='http://www.w3.org/2001/XInclude' href='/etc/passwd'/></domain>", "XInclude"),
        ("<domain>" + "<a>" * 40 + "</a>" * 40 + "</domain>", "nested deeper than 32"),
        ("<domain>" + "<a/>" * 6000 + "</domain>", "more than 5000 elements"),
        ("<domain>" + " " * 300_000 + "</domain>", "longer than 256 KiB"),
        ("<domain><vcpu/><vcpu/></domain>", "has <vcpu> twice"),
        (
            "<domain><devices><disk><target dev='vda'/></disk><disk><target dev='vda'/></disk></devices></domain>",
            "has two devices with target dev 'vda'",
        ),
        (
            (
                "<domain><devices><interface><mac address='02:00:00:00:00:0A'/></interface>"
                "<interface><mac address='02:00:00:00:00:0a'/></interface></devices></domain>"
            ),
            "two devices with MAC address '02:00:00:00:00:0a'",
        ),
        (
            (
                "<domain><devices><rng><address type='pci' bus='0x01' slot='0x2'/></rng>"
                "<video><address type='pci' domain='0' bus='1' slot='2' function='0x0'/></video></devices></domain>"
            ),
            "two devices with PCI address 0 1 2 0",
        ),
    ],
)
def test_a_template_is_read_safely(xml: str, why: str) -> None:
    (cause,) = refusal({"memory": {"size": "1Gi"}, "domainTemplate": xml})
    assert cause[0] == "spec.domainTemplate"
    assert why in cause[1]
    assert len(cause[1]) < 300


def test_what_looks_like_a_duplicate_and_is_none() -> None:
    team = "<interface><mac address='02:00:00:00:00:0a'/><teaming type='persistent'/></interface>"
    usb = "<controller type='usb' index='0' model='ich9-uhci1'/>"
    ports = [f"<rng><address type='pci' slot='2' function='{number}'/></rng>" for number in range(2)]
    xml = f"<domain><devices>{team * 2}{usb * 2}{''.join(ports)}</devices></domain>"
    parse(VirtualMachine, {"metadata": {"name": "a"}, "spec": {"memory": {"size": "1Gi"}, "domainTemplate": xml}})


def test_what_is_stored_is_not_checked_again() -> None:
    """A document that an older vmherd took, or a costly template, is read back whatever is refused by now."""
    vm = a_structured_vm()
    stored = (
        encode(vm)
        .replace('"bootloader":"BIOS"', '"bootloader":"EFI"')
        .replace('"cpu":{', '"domainTemplate":"<broken","cpu":{')
    )
    read = decode(vm.kind_name, f"1 1 {stored}")
    assert read.spec.domain_template == "<broken"  # type: ignore[attr-defined]


class TestTaints:
    def test_a_node_may_have_a_taint_of_each_effect_once(self) -> None:
        taint = {"key": "a", "effect": "NoSchedule"}
        node = parse(Node, {"metadata": {"name": "n1"}, "spec": {"taints": [taint, {**taint, "effect": "NoExecute"}]}})
        assert [str(t) for t in node.spec.taints] == ["a:NoSchedule", "a:NoExecute"]
        (cause,) = refusal({"taints": [taint, {**taint, "value": "x"}]}, Node)
        assert cause == ("spec.taints[1].key", "a has effect NoSchedule already")
        assert decode("Node", f"1 1 {encode(a_node('n1').with_(spec=node.spec))}").spec == node.spec  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("toleration", "tolerated"),
        [
            ({"operator": "Exists"}, True),
            ({"key": "a", "operator": "Exists"}, True),
            ({"key": "b", "operator": "Exists"}, False),
            ({"key": "a", "value": "1"}, True),
            ({"key": "a", "value": "2"}, False),
            ({"key": "a"}, False),
            ({"key": "a", "value": "1", "effect": "NoSchedule"}, True),
            ({"key": "a", "value": "1", "effect": "NoExecute"}, False),
        ],
    )
    def test_tolerations(self, toleration: dict[str, str], *, tolerated: bool) -> None:
        taint = parse(Taint, {"key": "a", "value": "1", "effect": "NoSchedule"})
        assert (untolerated([taint], [parse(Toleration, toleration)]) == ()) is tolerated

    @pytest.mark.parametrize(
        ("operator", "values", "labels", "holds"),
        [
            ("In", ["a", "b"], {"k": "b"}, True),
            ("In", ["a"], {}, False),
            ("NotIn", ["a"], {}, True),
            ("NotIn", ["a"], {"k": "a"}, False),
            ("Exists", [], {"k": ""}, True),
            ("DoesNotExist", [], {"k": ""}, False),
            ("Gt", ["5"], {"k": "6"}, True),
            ("Gt", ["5"], {"k": "5"}, False),
            ("Lt", ["5"], {"k": "4"}, True),
            ("Lt", ["5"], {"k": "few"}, False),
        ],
    )
    def test_expressions(self, operator: str, values: list[str], labels: dict[str, str], *, holds: bool) -> None:
        wanted = parse(NodeSelectorRequirement, {"key": "k", "operator": operator, "values": values})
        assert wanted.holds(labels) is holds


class TestClasses:
    @pytest.mark.parametrize(
        ("cpu", "path", "why"),
        [
            ({"type": "Model"}, "model", "is required for type Model"),
            ({"type": "Features"}, "features", "is required for type Features"),
            ({"type": "Host", "model": "EPYC"}, "model", "is only for type Model"),
            ({"type": "Model", "model": "EPYC", "features": ["avx"]}, "features", "is only for type Features"),
            ({"type": "Features", "features": ["avx", "avx"]}, "features", "avx is there twice"),
            ({"type": "Features", "features": ["a<b"]}, "features[0]", "pattern"),
            ({"type": "Host", "discovery": {}}, "discovery", "is only for type Discovery"),
            ({"type": "Best"}, "type", "'Host'"),
            ({}, "type", "is required"),
        ],
    )
    def test_a_wrong_field_is_named(self, cpu: dict[str, Any], path: str, why: str) -> None:
        (cause,) = refusal({"cpu": cpu}, VirtualMachineClass)
        assert cause[0] == f"spec.cpu.{path}"
        assert why in cause[1]

    def test_the_platforms_own_form(self) -> None:
        spec: dict[str, Any] = {
            "cpu": {"type": "Discovery", "discovery": {"nodeSelector": {"matchLabels": {"zone": "a"}}}},
            "nodeSelector": {"matchExpressions": [{"key": "group", "operator": "In", "values": ["vm"]}]},
            "tolerations": [{"key": "vm", "operator": "Exists"}],
        }
        found = parse(VirtualMachineClass, {"metadata": {"name": "host"}, "spec": spec})
        assert found.manifest()["spec"]["nodeSelector"] == spec["nodeSelector"]
        whole = a_class(**spec)
        assert decode(whole.kind_name, f"1 1 {encode(whole)}").spec == whole.spec  # type: ignore[attr-defined]


class TestExamples:
    FILES = sorted((Path(__file__).parents[2] / "config/examples").glob("*.yaml"))

    def test_there_are_some(self) -> None:
        assert len(self.FILES) == 4

    @pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
    def test_each_is_taken(self, file: Path) -> None:
        for document in read_documents(str(file)):
            resource = read_manifest(document.data)
            if isinstance(resource, VirtualMachine):
                name = resource.spec.virtual_machine_class_name
                assert render_domain(resource, a_class(name) if name else None)

    def test_one_has_every_field(self) -> None:
        (document,) = read_documents(str(self.FILES[0].with_name("virtual-machine-all-fields.yaml")))
        known = {field.alias for field in VirtualMachineSpec.model_fields.values()}
        assert known - document.data["spec"].keys() == {"domainTemplate"}
