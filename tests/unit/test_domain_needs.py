"""What a machine needs of a host is read from its XML, and nothing that it does not need."""

import pytest

from orchestrator.errors import HypervisorError
from workers.hypervisor.domain_needs import FileNeed, Needs, VolumeNeed, needs_of

UUID = "5e21a3d0-9a53-4d5c-8a39-6b8f7b8a4c11"


def needs(devices: str, *copied: str, os: str = "") -> Needs:
    return needs_of(
        f"<domain type='kvm'><name>shop.web</name><uuid>{UUID.upper()}</uuid>"
        f"<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>{os}</os>"
        f"<cpu mode='custom' check='full'><model>Haswell</model><feature policy='require' name='avx'/></cpu>"
        f"<devices><emulator>/usr/bin/qemu</emulator>{devices}</devices></domain>",
        copied,
    )


def disk(source: str, *, kind: str = "file", device: str = "disk", target: str = "vda", below: str = "") -> str:
    return f"<disk type='{kind}' device='{device}'><source {source}/>{below}<target dev='{target}'/></disk>"


def test_who_it_is_and_what_runs_it() -> None:
    read = needs("")
    assert (read.name, read.uuid) == ("shop.web", UUID)
    assert (read.virt_type, read.arch, read.machine, read.emulator) == (
        "kvm",
        "x86_64",
        "pc-q35-7.2",
        "/usr/bin/qemu",
    )
    assert (read.cpu_mode, read.cpu_model) == ("custom", "Haswell")
    assert "avx" in read.cpu_xml
    for nothing in (read.files, read.volumes, read.bridges, read.parents, read.networks, read.problems):
        assert nothing == ()


def test_a_machine_that_names_nothing_needs_nothing() -> None:
    read = needs_of("<domain><name>x</name></domain>")
    assert read.cpu_mode == read.cpu_xml == read.machine == read.emulator == ""
    assert read.problems == ()


def test_what_it_was_started_from() -> None:
    os = "<loader readonly='yes'>/fw.fd</loader><nvram>/nv.fd</nvram><kernel>/vmlinuz</kernel><initrd>/initrd</initrd>"
    assert needs("", os=os).files == (
        FileNeed("kernel", "/vmlinuz"),
        FileNeed("initrd", "/initrd"),
        FileNeed("firmware", "/fw.fd"),
    )


BASE = "<backingStore type='file'><source file='/base.qcow2'/><backingStore type='block'><source dev='/dev/vg/b'/>"
CHAIN = f"{BASE}<backingStore/></backingStore></backingStore>"


@pytest.mark.parametrize(
    ("xml", "files"),
    [
        (disk("file='/a.raw'"), (FileNeed("disk vda", "/a.raw"),)),
        (disk("dev='/dev/vg/a'", kind="block"), (FileNeed("disk vda", "/dev/vg/a", is_block=True),)),
        (disk("file='/a.iso'", device="cdrom", target="hda"), (FileNeed("CD-ROM hda", "/a.iso"),)),
        (disk("file='/a.iso' startupPolicy='optional'", device="cdrom"), ()),
        (disk("file='/a.iso' startupPolicy='requisite'", device="cdrom"), ()),
        (disk("file='/a.iso' startupPolicy='mandatory'", device="cdrom"), (FileNeed("CD-ROM vda", "/a.iso"),)),
        (disk("protocol='rbd' name='pool/a'", kind="network"), ()),
        ("<disk type='file' device='cdrom'><target dev='hda'/></disk>", ()),
        (
            disk("file='/top.qcow2'", below=CHAIN),
            (
                FileNeed("disk vda", "/top.qcow2"),
                FileNeed("disk vda (backing file)", "/base.qcow2"),
                FileNeed("disk vda (backing file)", "/dev/vg/b", is_block=True),
            ),
        ),
    ],
)
def test_images_of_disks(xml: str, files: tuple[FileNeed, ...]) -> None:
    assert needs(xml).files == files


def test_what_is_copied_needs_a_place_and_no_backing_file() -> None:
    xml = disk("file='/top.qcow2'", below=CHAIN) + disk("pool='fast' volume='b'", kind="volume", target="vdb")
    both = needs(xml, "vda", "vdb")
    assert both.files == (FileNeed("disk vda", "/top.qcow2", is_copied=True),)
    assert both.volumes == (VolumeNeed("disk vdb", "fast", "b", is_copied=True),)
    assert not needs(xml, "vda").volumes[0].is_copied


def test_a_disk_to_be_copied_has_to_be_there() -> None:
    (problem,) = needs(disk("file='/a.raw'"), "vda", "vdz").problems
    assert "vdz" in problem


def test_networks() -> None:
    read = needs(
        "<interface type='bridge'><source bridge='br1'/></interface>"
        "<interface type='bridge'><source bridge='br0'/></interface>"
        "<interface type='bridge'><source network='lan' portid='p' bridge='br7'/></interface>"
        "<interface type='direct'><source dev='eth0' mode='bridge'/></interface>"
        "<interface type='network'><source network='default' bridge='virbr0'/></interface>"
        "<interface type='network'><source network='default'/></interface>"
        "<interface type='user'/>"
    )
    assert (read.bridges, read.parents, read.networks) == (("br0", "br1"), ("eth0",), ("default", "lan"))
    assert read.problems == ()


USB = "<source><vendor id='0x046d'/><product id='0xc52b'/><address bus='1' device='4'/></source>"
PCI = "<source><address domain='0x0000' bus='0x03' slot='0x00' function='0x1'/></source>"


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        (f"<hostdev mode='subsystem' type='pci'>{PCI}</hostdev>", "pci 0000:03:00.1"),
        (f"<hostdev mode='subsystem' type='usb'>{USB}</hostdev>", "usb 046d:c52b"),
        (
            f"<hostdev mode='subsystem' type='mdev'><source><address uuid='{UUID}'/></source></hostdev>",
            f"mdev {UUID}",
        ),
        ("<hostdev mode='capabilities' type='misc'><source><char>/dev/x</char></source></hostdev>", "host device misc"),
        (f"<interface type='hostdev'><mac address='52:54:00:00:00:01'/>{PCI}</interface>", "52:54:00:00:00:01"),
        ("<interface type='vdpa'><source dev='/dev/vhost-vdpa-0'/></interface>", "interface"),
        ("<disk type='nvme'><source type='pci' namespace='1'/><target dev='vdc'/></disk>", "disk vdc"),
        ("<filesystem type='mount'><source dir='/srv'/><target dir='share'/></filesystem>", "file system share"),
        ("<tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>", "TPM"),
        ("<tpm><backend type='emulator' version='2.0'/></tpm>", "persistent_state"),
    ],
)
def test_what_keeps_a_machine_where_it_is(xml: str, words: str) -> None:
    (problem,) = needs(xml).problems
    assert words in problem


def test_a_tpm_whose_state_is_kept_is_no_problem() -> None:
    read = needs("<tpm><backend type='emulator' version='2.0' persistent_state='yes'/></tpm>")
    assert read.problems == ()
    assert read.has_emulated_tpm
    assert not needs("").has_emulated_tpm


@pytest.mark.parametrize("xml", ["", "<domain>", "<network/>", "no XML"])
def test_what_is_no_domain(xml: str) -> None:
    with pytest.raises(HypervisorError, match="XML"):
        needs_of(xml)
