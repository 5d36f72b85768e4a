"""What becomes of a node's domains when they are adopted, from their XML; and one coreFraction a node."""

import xml.etree.ElementTree as ET
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planner.adoption import Around, Planned, core_fraction, missing, plan_adoption, template, vm_name
from orchestrator.resources import RunPolicy
from orchestrator.resources.adoption import XML_MOST, FoundDomain, fingerprint, local_files
from orchestrator.resources.names import check_name
from tests.fake_definitions import FakeDefinitions
from tests.fakes import Copy, World
from tests.xml_paths import differences
from workers.adoption import describe, with_name
from workers.hypervisor.port import Hypervisor
from workers.preflight import SharedStorage, Storage

UUID = "6f1d2c7e-0d4c-4d3b-9c55-0a1b2c3d4e5f"
DISK = (
    "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/srv/vm/web.qcow2'/>"
    "<target dev='vda' bus='virtio'/></disk>"
)


def domain_xml(name: str = "web", *, os: str = "", devices: str = DISK, more: str = "", kind: str = "kvm") -> str:
    return (
        f"<domain type='{kind}'><name>{name}</name><uuid>{UUID}</uuid><memory unit='KiB'>2097152</memory>"
        f"<currentMemory unit='KiB'>2097152</currentMemory><vcpu placement='static'>4</vcpu>"
        f"<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>{os}</os>{more}<devices>{devices}</devices></domain>"
    )


def found(name: str = "web", xml: str | None = None, **more: Any) -> FoundDomain:
    """A domain that can be adopted, but for what is said."""
    text = xml or domain_xml(name)
    fields = {"uuid": UUID, "name": name, "state": "running", "persistent": True, "vcpus": 4, "memory_mib": 2048}
    fields |= {"is_read": True, "inactive_xml": text, "live_xml": text}
    return FoundDomain(**{**fields, **more})


def around(**more: Any) -> Around:
    fields = {"node": "n1", "namespace": "shop", "run_policy": RunPolicy.MANUAL, "vms": {}}
    return Around(**{**fields, "capacity_millicores": 32_000, "reserved_millicores": 0, **more})


def plan_one(domain: FoundDomain, **more: Any) -> Planned:
    (planned,) = plan_adoption([domain], [], around(**more))
    return planned


def test_a_plain_domain_is_adopted_as_it_is() -> None:
    planned = plan_one(found())
    assert (planned.name, planned.cores, planned.memory, planned.core_fraction) == ("web", 4, "2Gi", "100%")
    assert planned.disks == ("vda=/srv/vm/web.qcow2",)
    assert (planned.refusals, planned.findings, planned.standing) == ((), (), None)
    assert planned.spec is not None
    assert planned.spec.run_policy is RunPolicy.MANUAL
    assert (planned.spec.cpu.cores, planned.spec.memory_mib) == (4, 2048)
    assert planned.spec.domain_template == domain_xml()


@pytest.mark.parametrize(
    ("event", "action", "text"),
    [
        ("on_reboot", "destroy", "its on_reboot is destroy: a reboot counts as a power-off, until its next start"),
        ("on_poweroff", "restart", "its on_poweroff is restart: a guest that powers itself off is booted again"),
        ("on_crash", "preserve", "its on_crash is preserve: a guest that crashes stays on its node"),
        ("on_crash", "coredump-restart", "its on_crash is restart: a guest that crashes is booted again by its host"),
        ("on_reboot", "restart", ""),
        ("on_poweroff", "destroy", ""),
        ("on_crash", "coredump-destroy", ""),
    ],
)
def test_what_its_guests_ends_come_to_for_now_is_a_finding(event: str, action: str, text: str) -> None:
    """As it runs: its definition may have been changed since it was started."""
    live = domain_xml(more=f"<{event}>{action}</{event}>")
    planned = plan_one(found(live_xml=live))
    assert planned.refusals == ()
    assert [finding for finding in planned.findings if not finding.startswith(text or "-")] == []
    assert bool(planned.findings) is bool(text)
    assert plan_one(found(inactive_xml=live)).findings == ()


def hostdev(kind: str) -> str:
    return f"<hostdev mode='subsystem' type='{kind}'><source/></hostdev>"


TPM = "<tpm model='tpm-crb'><backend type='{}' version='2.0'{}/></tpm>"


@pytest.mark.parametrize(
    ("domain", "reason"),
    [
        (found(state="paused"), "it does not run: it is paused"),
        (found(state="shutoff", is_read=False, inactive_xml="", live_xml=""), "it does not run: it is shutoff"),
        (found(persistent=False, is_read=False), "it is transient"),
        (found(snapshots=2), "it has 2 snapshots or checkpoints"),
        (found(vm="shop/other"), "it bears the mark of VirtualMachine 'shop/other', which is not of this herd"),
        (found(is_read=False), "its XML is longer than 256 KiB"),
        (found("***"), "its name has nothing that a VM's name may have"),
        (found(inactive_xml="<domain"), "its XML is not well-formed XML"),
        (found(xml=domain_xml(kind="lxc")), "vmherd does not start domains of type 'lxc'"),
        (found(xml=domain_xml(devices=hostdev("pci"))), "it has devices of its host: hostdev (pci)"),
        (found(xml=domain_xml(devices=hostdev("mdev"))), "it has devices of its host: hostdev (mdev)"),
        (found(xml=domain_xml(devices="<interface type='hostdev'/>")), "devices of its host: interface (hostdev)"),
        # A network of host devices shows its kind only where it runs.
        (found(live_xml=domain_xml(devices="<interface type='hostdev'/>")), "devices of its host: interface (hostdev)"),
        (found(xml=domain_xml(devices="<disk type='nvme'/>")), "it has devices of its host: disk (nvme)"),
        (found(xml=domain_xml(devices=TPM.format("passthrough", ""))), "devices of its host: TPM (passthrough)"),
        (found(xml=domain_xml(devices=TPM.format("emulator", ""))), "its TPM has no persistent_state='yes'"),
        (
            found(xml=domain_xml(devices=TPM.format("emulator", " persistent_state='no'"))),
            "its TPM has no persistent_state='yes'",
        ),
        (found(xml=domain_xml().replace("2097152", "0")), "vmherd could not start it anew: memory.size"),
    ],
)
def test_what_would_lose_something_is_refused_with_the_reason(domain: FoundDomain, reason: str) -> None:
    (planned,) = plan_adoption([domain], [domain.name], around())
    assert reason in "; ".join(planned.refusals)
    assert planned.spec is None


def test_a_vm_of_the_herd_and_a_taken_name_are_refused() -> None:
    assert plan_one(found(), vms={UUID: "shop/web"}).refusals == ("it is VirtualMachine 'shop/web' already",)
    (text,) = plan_one(found(), vms={"another": "shop/web"}).refusals
    assert text == "there is a VirtualMachine 'web' in namespace 'shop': choose another namespace"
    assert not plan_one(found(), vms={"another": "default/web"}).is_refused


def test_two_domains_whose_names_become_the_same_are_not_both_adopted() -> None:
    one, other = found("Web 1"), found("web_1", uuid="other")
    first, second = plan_adoption([other, one], [], around())
    assert (first.name, first.is_refused) == ("web-1", False)
    assert "there is a VirtualMachine 'web-1'" in second.refusals[0]


def test_a_tpm_with_persistent_state_is_adopted() -> None:
    planned = plan_one(found(xml=domain_xml(devices=TPM.format("emulator", " persistent_state='yes'"))))
    assert not planned.is_refused


@pytest.mark.parametrize(
    ("os", "devices", "path", "reason", "words"),
    [
        ("<nvram>/var/lib/x_VARS.fd</nvram>", "", "/var/lib/x_VARS.fd", "LocalNvram", "its NVRAM /var/lib/x_VARS.fd"),
        (
            "",
            TPM.format("emulator", " persistent_state='yes'"),
            f"/var/lib/libvirt/swtpm/{UUID}",
            "LocalTpmState",
            "its TPM's state /var/lib/libvirt/swtpm",
        ),
        ("", DISK, "/srv/vm/web.qcow2", "LocalDisks", "its disk vda /srv/vm/web.qcow2"),
    ],
)
def test_state_on_local_disks_is_said_and_no_obstacle(
    os: str, devices: str, path: str, reason: str, words: str
) -> None:
    planned = plan_one(found(xml=domain_xml(os=os, devices=devices), local={path: "ext4"}))
    assert not planned.is_refused
    assert planned.standing is not None
    assert planned.standing[0] == reason
    assert planned.standing[1].startswith(f"{words}")
    assert "of this host alone (ext4)" in planned.standing[1]
    assert any(finding.startswith("ColdStandby=False: ") for finding in planned.findings)
    assert plan_one(found(xml=domain_xml(os=os, devices=devices))).standing is None


def test_files_are_named_with_what_they_are() -> None:
    xml = domain_xml(
        os="<nvram><source file='/n/vars.fd'/></nvram>",
        devices=DISK
        + "<disk type='file' device='cdrom'><source file='/iso/a.iso'/><target dev='sda'/></disk>"
        + "<tpm><backend type='emulator'><source type='dir' path='/t'/></backend></tpm>",
    )
    assert local_files(xml, "", UUID) == {"/n/vars.fd": "nvram", "/t": "tpm", "/srv/vm/web.qcow2": "vda"}
    with pytest.raises(ValueError, match="unclosed"):
        local_files("<domain", "", UUID)


def test_vcpus_that_are_offline_count_and_are_said() -> None:
    planned = plan_one(found(vcpus=2))
    assert planned.cores == 4
    assert planned.findings == ("2 of its 4 vCPUs are online; vmherd starts it with all",)


class TestTemplate:
    """What later starts are made from."""

    def test_a_console_whose_password_is_left_out_listens_nowhere(self) -> None:
        graphics = "<graphics type='vnc' port='5901' autoport='no' listen='0.0.0.0'><listen type='address'/></graphics>"
        xml = domain_xml(devices=DISK + graphics)
        assert template(found(xml=xml)) == xml
        changed = template(found(xml=xml, secrets=True))
        (console,) = ET.fromstring(changed).findall("devices/graphics")  # noqa: S314
        assert console.attrib == {"type": "vnc"}
        assert [listen.attrib for listen in console] == [{"type": "none"}]
        assert differences(xml, changed) == {
            "/domain/devices/graphics/@port",
            "/domain/devices/graphics/@autoport",
            "/domain/devices/graphics/@listen",
            "/domain/devices/graphics/listen/@type",
        }

    def test_firmware_variables_keep_the_place_that_libvirt_chose_by_the_name(self) -> None:
        live = domain_xml(os="<nvram template='/t.fd'>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram>")
        changed = template(found(xml=domain_xml(os="<nvram template='/t.fd'/>"), live_xml=live))
        assert ET.fromstring(changed).findtext("os/nvram") == "/var/lib/libvirt/qemu/nvram/web_VARS.fd"  # noqa: S314
        kept = domain_xml(os="<nvram>/srv/own.fd</nvram>")
        assert template(found(xml=kept, live_xml=live)) == kept

    def test_others_namespaces_keep_their_prefixes(self) -> None:
        more = "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><q:arg value='-x'/></q:commandline>"
        xml = domain_xml(devices="<graphics type='vnc'/>", more=more)
        assert "<q:commandline" in template(found(xml=xml, secrets=True))


class TestCoreFraction:
    def test_the_percentage_is_rounded_down_and_never_zero(self) -> None:
        assert core_fraction(32_000, 0, 32) == 100
        assert core_fraction(32_000, 0, 33) == 96
        assert core_fraction(8_000, 8_000, 4) == 1
        assert core_fraction(8_000, 9_000, 4) == 1
        assert core_fraction(8_000, 0, 0) == 100

    @given(st.integers(0, 10_000_000), st.lists(st.integers(1, 512), min_size=1, max_size=20), st.integers(0, 10**6))
    def test_they_fit_unless_not_even_one_percent_does(self, capacity: int, cores: list[int], reserved: int) -> None:
        fraction = core_fraction(capacity, reserved, sum(cores))
        assert 1 <= fraction <= 100
        taken = reserved + sum(count * 10 * fraction for count in cores)
        assert taken <= capacity or fraction == 1
        more = reserved + sum(count * 10 * (fraction + 1) for count in cores)
        assert fraction == 100 or more > capacity

    @given(st.integers(10_000, 10_000_000), st.lists(st.integers(1, 512), min_size=1, max_size=8))
    def test_one_by_one_they_fit_as_well(self, capacity: int, cores: list[int]) -> None:
        reserved = 0
        fractions = []
        for position, count in enumerate(cores):
            fractions.append(core_fraction(capacity, reserved, sum(cores[position:])))
            reserved += count * 10 * fractions[-1]
        assert reserved <= capacity or 1 in fractions

    def test_one_for_the_node_whoever_is_wanted(self) -> None:
        """Those that are not wanted, and refused ones, count: they run too. What does not run takes nothing."""
        domains = [
            found("a"),
            found("b", uuid="b", snapshots=1),
            found("c", uuid="c", vcpus=8, is_read=False),
            found("d", uuid="d", state="shutoff", is_read=False),
        ]
        (planned,) = plan_adoption(domains, ["a"], around(capacity_millicores=10_000, reserved_millicores=2_000))
        assert planned.core_fraction == "50%"
        assert planned.spec is not None
        assert planned.spec.cpu_millicores == 2_000


def test_names_that_are_not_there() -> None:
    assert missing([found("a")], ["b", "a", UUID, "b", "c"]) == ("b", "c")


@given(st.text(max_size=100))
def test_a_vm_name_is_a_label_or_nothing(text: str) -> None:
    name = vm_name(text)
    if name:
        check_name(name)


def test_vm_names() -> None:
    assert [vm_name(name) for name in ("Web_01.prod", "web", "--a--", "ä", "x" * 70)] == [
        "web-01-prod", "web", "a", "", "x" * 63,
    ]  # fmt: skip


def test_a_definition_gets_the_name_that_its_domain_runs_under() -> None:
    xml = domain_xml("web")
    assert with_name(xml, "web") is xml
    renamed = with_name(xml, "a&b")
    assert ET.fromstring(renamed).findtext("name") == "a&b"  # noqa: S314
    assert differences(xml, renamed) == {"/domain/name"}


def test_fingerprints_tell_texts_apart() -> None:
    assert fingerprint("a") == fingerprint("a") != fingerprint("a ")


class TestDifferences:
    """The comparison that the lab test rests on."""

    def test_equal(self) -> None:
        assert differences("<a x='1' y='2'><b/>\n <c> t </c></a>", '<a y="2" x="1">\n<b></b><c>t</c></a>') == set()

    @pytest.mark.parametrize(
        ("other", "path"),
        [
            ("<a x='2'><b/><c>t</c></a>", "/a/@x"),
            ("<a><b/><c>t</c></a>", "/a/@x"),
            ("<a x='1'><b/><c>u</c></a>", "/a/c"),
            ("<a x='1'><c>t</c></a>", "/a/b"),
            ("<a x='1'><b/><b/><c>t</c></a>", "/a/b"),
            ("<a x='1'><b/><c>t<d/></c></a>", "/a/c/d"),
        ],
    )
    def test_each_kind_of_difference_has_its_path(self, other: str, path: str) -> None:
        assert differences("<a x='1'><b/><c>t</c></a>", other) == {path}
        assert differences(other, "<a x='1'><b/><c>t</c></a>") == {path}

    def test_the_order_of_siblings_counts(self) -> None:
        assert differences("<a><b n='1'/><b n='2'/></a>", "<a><b n='2'/><b n='1'/></a>") == {"/a/b/@n"}


class TestDescribe:
    """What an agent tells of a domain, without its secrets."""

    XML = domain_xml(os="<nvram>/n/vars.fd</nvram>", devices=DISK + "<graphics type='vnc' passwd='s3cr3t'/>")

    def host(self, xml: str) -> Hypervisor:
        world = World(hosts={"n1": {UUID: Copy("", name="web", definition=xml, live_xml=xml, autostart=True)}})
        return cast("Hypervisor", FakeDefinitions(world, "n1"))

    def found(self, xml: str, storage: Storage | None = None) -> FoundDomain:
        host = self.host(xml)
        domain = host.domain(UUID)
        assert domain is not None
        return describe(host, domain, storage or SharedStorage())

    def test_its_xml_has_no_secrets_and_says_so(self) -> None:
        found = self.found(self.XML)
        assert (found.is_read, found.secrets, found.autostart) == (True, True, True)
        assert "s3cr3t" not in found.model_dump_json()
        assert not self.found(domain_xml()).secrets

    def test_one_that_is_too_long_is_not_sent(self) -> None:
        found = self.found(domain_xml(more=f"<description>{'x' * XML_MOST}</description>"))
        assert (found.is_read, found.inactive_xml, found.live_xml) == (False, "", "")
        assert "longer than 256 KiB" in plan_one(found).refusals[0]

    @pytest.mark.parametrize(
        ("kind", "is_shared", "local"),
        [
            ("ext4", False, {"/n/vars.fd": "ext4", "/srv/vm/web.qcow2": "ext4"}),
            # A setting says that images are shared; of what libvirt keeps it says nothing.
            ("ext4", True, {"/n/vars.fd": "ext4"}),
            ("nfs4", True, {}),
        ],
    )
    def test_files_that_no_other_host_sees(
        self, monkeypatch: pytest.MonkeyPatch, kind: str, is_shared: bool, local: dict[str, str]
    ) -> None:
        class Images(SharedStorage):
            def is_shared(self, path: str) -> bool:
                return is_shared

        monkeypatch.setattr("workers.adoption.file_system", lambda *_: kind)
        assert self.found(self.XML, Images()).local == local
