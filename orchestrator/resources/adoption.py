"""Adoption: a running domain of a plain libvirt host becomes a VM, and is given back; what its node is asked for that.

The orders here may hold a domain's secrets (`docs/adr/0006-adoption.md` says where those are). So they are part of no
document, and no error about them repeats what it was given.
"""

import hashlib
import xml.etree.ElementTree as ET  # what is parsed, libvirtd wrote
from enum import StrEnum

from pydantic import ConfigDict, Field

from orchestrator.resources.meta import Model

ADOPTION_PREFIX = "adoption:"
DEFINITIONS_PREFIX = "definitions:"
UNDEFINE_PREFIX = "undefine:"
"""How ids of orders begin. No operation's key has a colon."""

SWTPM_DIRECTORY = "/var/lib/libvirt/swtpm"
"""Where libvirt keeps the state of TPMs, a folder for each domain's UUID."""
XML_MOST = 256 * 1024
"""Characters of one domain XML. libvirt's own are a few thousand; a report with two of them stays below a mebibyte."""


class AdoptionStep(StrEnum):
    """How far an adoption is, or that a release is under way."""

    RECORDING = "Recording"
    """The node's agent reads the definition, with its secrets, and the control plane puts it on record."""
    TAKING_OVER = "TakingOver"
    """The record is safe: the node marks the domain as ours and removes its persistent definition."""
    RELEASING = "Releasing"
    """The node removes the mark and defines the domain as it was."""


class Adoption(Model):
    """What is under way for a VM. While it is, no operation is granted and no report changes the VM.

    Attributes:
        node: Whose answer is awaited.
        epoch: Of the order: numbers it, and is what the domain is marked with.
        fingerprint: Of the definition, without its secrets, that the VM's spec was made from.
    """

    step: AdoptionStep
    node: str
    epoch: int
    fingerprint: str = ""


class AdoptionOrderKind(StrEnum):
    """What a node is asked. The values differ from those of the settlements' orders."""

    DEFINITIONS = "definitions"
    """How all its domains are configured, without secrets."""
    RECORD = "record"
    """How one domain is configured, with its secrets."""
    TAKE_OVER = "take-over"
    RELEASE = "release"
    UNDEFINE = "undefine"
    """A domain of ours was defined again behind our back: remove the definition."""

    @property
    def changes_domain(self) -> bool:
        """Whether it goes to the node's lifecycle queue; the others go to its agent."""
        return self in {AdoptionOrderKind.TAKE_OVER, AdoptionOrderKind.RELEASE, AdoptionOrderKind.UNDEFINE}


class AdoptionOrder(Model):
    """One numbered order to one node. It may be carried out any number of times, and its first answer counts.

    Attributes:
        vm: `namespace/name`.
        uuid: The domain.
        incarnation: What the domain is marked with; a mark with a higher one is left alone.
        epoch: Likewise.
        names: Domains whose XML is wanted; empty: all.
        fingerprint: Of the definition that is on record, secrets included: any other is not touched.
        inactive_xml: What a release defines.
        autostart: Likewise.
        runs: Whether the VM runs on this node, as far as is known; a release of anything else is refused.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    id: str
    kind: AdoptionOrderKind
    vm: str = ""
    uuid: str = ""
    incarnation: int = 0
    epoch: int = 0
    names: tuple[str, ...] = ()
    fingerprint: str = ""
    inactive_xml: str = ""
    autostart: bool = False
    runs: bool = True


class FoundDomain(Model):
    """One domain of a node, as its agent found it.

    Attributes:
        state: A `workers.hypervisor.port.DomainState`.
        vm: `namespace/name` from its mark; empty where it has none.
        vcpus: Those online.
        snapshots: Snapshots and checkpoints of it.
        secrets: Whether its XML has secrets, which are not in this one.
        is_read: Whether its XML was asked for, and is not longer than `XML_MOST`.
        inactive_xml: Its persistent definition, without secrets.
        live_xml: As it runs, without secrets.
        local: Files of it on file systems that no other host sees, each with the type of that file system.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    uuid: str
    name: str
    state: str
    vm: str = ""
    persistent: bool = False
    vcpus: int = 1
    memory_mib: int = 0
    autostart: bool = False
    snapshots: int = 0
    secrets: bool = False
    is_read: bool = False
    inactive_xml: str = ""
    live_xml: str = ""
    local: dict[str, str] = Field(default_factory=dict)


class RecordedDefinition(Model):
    """A domain's definition, secrets included, as it was when it was adopted. Kept apart from all documents.

    Attributes:
        vm: `namespace/name`.
        node: Where it was adopted.
        domain: Its name there.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    vm: str
    node: str
    domain: str
    inactive_xml: str
    live_xml: str
    autostart: bool = False


def adoption_order_id(vm: str, adoption: Adoption) -> str:
    """Give the id of the order that a VM's adoption or release awaits the answer to."""
    return f"{ADOPTION_PREFIX}{vm}#{adoption.epoch}.{adoption.step}"


def fingerprint(xml: str) -> str:
    """Tell one XML from another. That of an XML with a short password is as good as the password: keep it apart too."""
    return hashlib.sha256(xml.encode()).hexdigest()


def local_files(inactive_xml: str, live_xml: str, uuid: str) -> dict[str, str]:
    """Name the files that a domain needs to start, each with what it is to it: `nvram`, `tpm`, or a disk's target.

    Raises:
        ValueError: The XML is broken.
    """
    try:
        roots = [ET.fromstring(xml) for xml in (inactive_xml, live_xml) if xml]  # noqa: S314
    except ET.ParseError as error:
        raise ValueError(str(error)) from error
    found: dict[str, str] = {}
    for root in roots:
        nvram = root.findtext("os/nvram", "").strip() or attribute_at(root, "os/nvram/source", "file")
        if nvram:
            found[nvram] = "nvram"
        for backend in root.iterfind("devices/tpm/backend"):
            if backend.get("type") == "emulator":
                found[attribute_at(backend, "source", "path") or f"{SWTPM_DIRECTORY}/{uuid}"] = "tpm"
        for disk in root.iterfind("devices/disk"):
            path = attribute_at(disk, "source", "file") or attribute_at(disk, "source", "dir")
            if path and disk.get("device") != "cdrom":
                found[path] = attribute_at(disk, "target", "dev")
    return found


def attribute_at(root: ET.Element, path: str, name: str) -> str:
    """Read an attribute of the element at a path; empty where there is none."""
    element = root.find(path)
    return "" if element is None else element.get(name, "")
