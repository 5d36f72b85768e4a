"""What an agent tells of a machine's needs, and what it knows of its own host's images."""

import threading
from pathlib import Path
from typing import Any, cast

import pytest

from orchestrator.errors import HypervisorError
from orchestrator.resources import Action, Order, OrderKind
from orchestrator.resources.needs import MachineNeeds
from workers.hypervisor.port import Definition, Domain, DomainState, Hypervisor, Marker
from workers.preflight import HostStorage, Needs, SharedStorage, check, describe, file_system, virtual_bytes

UUID = "0b4b8e4a-0000-4000-8000-000000000001"
MARKER = Marker("default", "a", incarnation=3, epoch=7)
CPU = "<cpu mode='custom' match='exact' check='full'><model fallback='forbid'>qemu64</model></cpu>"
DISK = """<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>
  <source file='{path}' index='{run}'/><backingStore/><target dev='{target}' bus='virtio'/>{more}
  <alias name='virtio-disk0'/><address type='pci' bus='0x0{run}'/></disk>"""
NIC = """<interface type='bridge'><mac address='52:54:00:00:02:65'/><source bridge='brvm'/>
  <target dev='vnet{run}'/><model type='virtio'/><alias name='net0'/></interface>"""
GPU = """<hostdev mode='subsystem' type='pci' managed='yes'><source>
  <address domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></source>
  <address type='pci' bus='0x0{run}'/></hostdev>"""
MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:30 / /srv rw - nfs4 nas:/srv rw,vers=4.2
31 30 0:31 / /srv/local\\040disks rw - xfs /dev/vdb rw
32 22 0:32 / /mnt rw - tmpfs tmpfs rw
33 32 0:33 / /mnt rw - ceph 10.0.0.1:/ rw
"""


def xml_of(*devices: str, run: int = 1, boot: str = "", extra: str = "") -> str:
    parts = "".join(device.replace("{run}", str(run)) for device in devices)
    return f"""<domain type='kvm' id='{run}'><name>default.a</name><uuid>{UUID}</uuid>
      <metadata><vmherd:vm xmlns:vmherd='https://vmherd.dev/domain/1' epoch='{run}'/></metadata>
      <memory unit='KiB'>{run}</memory><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>{boot}</os>{CPU}
      <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{parts}
      <graphics type='vnc' passwd='secret{run}'/><serial type='pty'/></devices>{extra}</domain>"""


def disk(path: str, target: str = "vda", more: str = "") -> str:
    return DISK.replace("{path}", path).replace("{target}", target).replace("{more}", more)


class Host:
    """A hypervisor with one machine."""

    def __init__(self, xml: str, state: DomainState = DomainState.RUNNING) -> None:
        self.xml = xml
        self.state = state
        self.problems: list[str] = []
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def domain(self, uuid: str, *, job: bool = False, marker: Marker | None = MARKER) -> Domain | None:
        if uuid != UUID:
            return None
        return Domain(UUID, "default.a", self.state, "", marker, 1, 1, has_job=job)

    def definition(self, uuid: str) -> Definition | None:
        assert uuid == UUID
        if not self.xml:
            raise HypervisorError("no")
        return Definition(self.xml, "")

    def preflight(self, xml: str, copied: tuple[str, ...]) -> list[str]:
        self.asked.append((xml, copied))
        return list(self.problems)


def needs_of(host: Host, storage: Any = None, **more: Any) -> dict[str, Any] | None:
    domain = host.domain(UUID, **more)
    assert domain is not None
    return teller(host, storage).news(domain, is_new=False)


def teller(host: Host, storage: Any = None) -> Needs:
    return Needs(cast("Hypervisor", host), storage or SharedStorage())


def told(xml: str, storage: Any = None) -> MachineNeeds:
    needs = needs_of(Host(xml), storage)
    assert needs is not None
    return MachineNeeds.model_validate(needs)  # as the control plane takes it


@pytest.fixture
def storage(tmp_path: Path) -> HostStorage:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 1 0:1 / / rw - ext4 x rw\n2 1 0:2 / {tmp_path}/shared rw - nfs4 x rw\n")
    return HostStorage(tmp_path / "disks.json", mounts)


class TestNeeds:
    def test_what_another_host_may_lack_and_nothing_else(self) -> None:
        needs = told(xml_of(disk("/srv/a.raw"), NIC, boot="<kernel>/boot/k</kernel>"))
        for kept in ("/srv/a.raw", "brvm", "/boot/k", "qemu64", "pc-q35-7.2", "qemu-system-x86_64", UUID):
            assert kept in needs.machine
        for dropped in ("secret", "vnet", "alias", "serial", "metadata", "memory", "52:54"):
            assert dropped not in needs.machine
        assert needs.incarnation == 3
        assert not needs.plain

    def test_equal_machines_have_equal_fingerprints_wherever_they_run(self) -> None:
        devices = (disk("/srv/a.raw"), NIC, GPU)
        assert told(xml_of(*devices)).fingerprint == told(xml_of(*devices, run=2)).fingerprint

    @pytest.mark.parametrize(
        "other",
        [
            xml_of(disk("/srv/b.raw"), NIC),
            xml_of(disk("/srv/a.raw"), NIC.replace("brvm", "br7")),
            xml_of(disk("/srv/a.raw"), NIC).replace("qemu64", "Nehalem"),
            xml_of(disk("/srv/a.raw")),
        ],
        ids=["disk", "bridge", "CPU", "fewer"],
    )
    def test_and_others_have_others(self, other: str) -> None:
        assert told(xml_of(disk("/srv/a.raw"), NIC)).fingerprint != told(other).fingerprint

    @pytest.mark.parametrize(
        ("xml", "plain"),
        [
            (xml_of(), True),
            (xml_of(NIC), False),
            (xml_of(disk("/srv/a.raw")), False),
            (xml_of(boot="<loader>/usr/share/OVMF.fd</loader>"), False),
        ],
        ids=["nothing", "interface", "disk", "firmware"],
    )
    def test_plain_is_what_needs_nothing_but_a_cpu(self, xml: str, plain: bool) -> None:
        assert told(xml).plain is plain

    def test_a_host_device_is_an_obstacle_and_its_address_is_kept(self) -> None:
        needs = told(xml_of(GPU))
        assert "0000:03:00.0" in needs.obstacles[0]
        assert "0x03" in needs.machine
        assert "0x01" not in needs.machine

    def test_they_are_told_once_and_again_when_they_change(self) -> None:
        host = Host(xml_of(NIC))
        needs, domain = teller(host), host.domain(UUID)
        assert domain is not None
        assert needs.news(domain, is_new=False) is not None
        assert needs.news(domain, is_new=False) is None
        assert needs.news(domain, is_new=True) is not None
        host.xml = xml_of(NIC, NIC)
        assert needs.news(domain, is_new=False) is not None
        needs.forget()
        assert needs.news(domain, is_new=False) is not None

    @pytest.mark.parametrize("state", [DomainState.PAUSED, DomainState.SHUTOFF, DomainState.INCOMING])
    def test_of_what_does_not_run_nothing_is_told(self, state: DomainState) -> None:
        assert needs_of(Host(xml_of(), state)) is None

    def test_nor_of_what_migrates_or_is_not_ours(self) -> None:
        assert needs_of(Host(xml_of()), job=True) is None
        assert needs_of(Host(xml_of()), marker=None) is None

    def test_what_can_not_be_read_is_told_another_time(self) -> None:
        host = Host("")
        needs, domain = teller(host), host.domain(UUID)
        assert domain is not None
        assert needs.news(domain, is_new=False) is None
        host.xml = xml_of()
        assert needs.news(domain, is_new=False) is not None


class TestDisks:
    def test_those_on_storage_of_its_own_are_named_with_their_size(self, tmp_path: Path, storage: HostStorage) -> None:
        image = tmp_path / "a.raw"
        image.write_bytes(b"x" * (2**20 + 1))
        needs = told(xml_of(disk(str(image)), disk(f"{tmp_path}/shared/b.raw", "vdb")), storage)
        assert [(d.target, d.path, d.size_mib) for d in needs.local_disks] == [("vda", str(image), 2)]

    @pytest.mark.parametrize(
        "device",
        [
            disk("/srv/a.iso", more="<readonly/>"),
            disk("/srv/a.raw").replace("type='file'", "type='block'").replace("file='", "dev='"),
        ],
        ids=["read-only", "block"],
    )
    def test_what_is_not_written_or_no_file_is_none(self, device: str, storage: HostStorage) -> None:
        assert told(xml_of(device), storage).local_disks == ()

    def test_a_missing_image_has_no_size(self, tmp_path: Path, storage: HostStorage) -> None:
        assert told(xml_of(disk(f"{tmp_path}/a.raw")), storage).local_disks[0].size_mib == 0

    def test_the_size_of_a_qcow2_image_is_what_the_guest_sees(self) -> None:
        header = b"QFI\xfb" + bytes(20) + (5 * 2**30).to_bytes(8, "big")
        assert virtual_bytes(header, 200_000) == 5 * 2**30
        assert virtual_bytes(bytes(32), 200_000) == 200_000

    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            ("/var/lib/a", "ext4"),
            ("/srv/a", "nfs4"),
            ("/srv", "nfs4"),
            ("/srvx/a", "ext4"),
            ("/srv/local disks/a", "xfs"),
            ("/mnt/a", "ceph"),
        ],
    )
    def test_the_mount_on_which_a_path_lies(self, path: str, kind: str) -> None:
        assert file_system(path, MOUNTS) == kind


class TestCopies:
    def order(self, xml: str, *copied: str) -> Order:
        return Order(
            id="default/op#check.1",
            kind=OrderKind.CHECK,
            uuid=UUID,
            epoch=0,
            incarnation=3,
            action=Action.MIGRATE,
            machine=xml,
            copied_disks=copied,
        )

    def ask(self, storage: Any, path: Path, *copied: str, problems: list[str] | None = None) -> list[str]:
        host = Host("")
        host.problems = problems or []
        xml = xml_of(disk(str(path)))
        answer = check(cast("Hypervisor", host), storage, self.order(xml, *copied))
        assert host.asked == [(xml, copied)]
        return answer

    def test_the_hypervisors_problems_are_told(self, tmp_path: Path, storage: HostStorage) -> None:
        assert self.ask(storage, tmp_path / "a.raw", problems=["bridge br7 is not there"]) == [
            "bridge br7 is not there"
        ]

    def test_a_copy_would_not_overwrite_what_nobody_knows(self, tmp_path: Path, storage: HostStorage) -> None:
        image = tmp_path / "a.raw"
        assert self.ask(storage, image, "vda") == []
        image.touch()
        (problem,) = self.ask(storage, image, "vda")
        assert problem.startswith(f"disk vda: {image} is here already")
        assert self.ask(storage, image) == []  # it is not copied, so it has to be here

    def test_a_dangling_link_is_something_too(self, tmp_path: Path, storage: HostStorage) -> None:
        (tmp_path / "a.raw").symlink_to(tmp_path / "nowhere")
        assert self.ask(storage, tmp_path / "a.raw", "vda")

    @pytest.mark.parametrize("state", [DomainState.RUNNING, DomainState.INCOMING])
    def test_what_was_a_disk_of_that_machine_here_may_be(
        self, state: DomainState, tmp_path: Path, storage: HostStorage
    ) -> None:
        """It was copied away, or a copy to here failed."""
        image = tmp_path / "a.raw"
        image.touch()
        needs_of(Host(xml_of(disk(str(image))), state), storage)
        assert self.ask(HostStorage(tmp_path / "disks.json", tmp_path / "mountinfo"), image, "vda") == []

    def test_but_not_by_another_machine(self, tmp_path: Path, storage: HostStorage) -> None:
        image = tmp_path / "a.raw"
        image.touch()
        storage.note_disk("another", str(image))
        assert self.ask(storage, image, "vda")

    def test_a_record_that_was_cut_off_says_nothing(self, tmp_path: Path, storage: HostStorage) -> None:
        image = tmp_path / "a.raw"
        image.touch()
        storage.note_disk(UUID, str(image))
        record = tmp_path / "disks.json"
        record.write_text(record.read_text()[:-3])
        assert self.ask(storage, image, "vda")
        storage.note_disk(UUID, str(image))
        assert self.ask(storage, image, "vda") == []

    def test_notes_of_several_threads_are_all_kept(self, tmp_path: Path, storage: HostStorage) -> None:
        threads = [
            threading.Thread(target=storage.note_disk, args=(UUID, f"{tmp_path}/{number}")) for number in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number in range(20):
            (tmp_path / str(number)).touch()
            assert storage.copy_problem(UUID, f"{tmp_path}/{number}") == ""

    def test_a_node_that_is_asked_for_the_needs_tells_them(self) -> None:
        host = Host(xml_of(NIC))
        order = self.order("").with_(kind=OrderKind.DESCRIBE)
        answer = describe(cast("Hypervisor", host), teller(host), order)
        assert answer["order"] == order.id
        assert answer["needs"]["fingerprint"] == told(host.xml).fingerprint
        assert describe(cast("Hypervisor", host), teller(host), order.with_(uuid="x"))["needs"] is None
