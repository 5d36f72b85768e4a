"""What vmherd reads from a domain's XML, and the one thing it writes there: whose domain it is.

The XML is libvirt's, and each driver speaks it. Nothing in here talks to a hypervisor.
"""

import uuid
import xml.etree.ElementTree as ET  # what is parsed comes from libvirtd, or from an administrator's VirtualMachine
from dataclasses import dataclass
from typing import Final
from xml.dom import minidom
from xml.parsers.expat import ExpatError

from orchestrator.errors import HypervisorError
from workers.hypervisor.port import Marker

MARKER_NAMESPACE: Final = "https://vmherd.dev/domain/1"
MARKER_PREFIX: Final = "vmherd"
_MARKER_TAG: Final = f"{{{MARKER_NAMESPACE}}}vm"
_AGENT_CHANNEL: Final = "org.qemu.guest_agent.0"


@dataclass(frozen=True, slots=True)
class ParsedDomain:
    """What vmherd reads from a domain's live XML.

    Attributes:
        uuid: Lower-case, with dashes.
        name: The hypervisor's name for it.
        marker: None for a domain that vmherd does not manage.
        memory_mib: All memory it has, hot-plugged memory included.
        vcpus: Those online, >= 1.
        agent: Whether a guest agent is connected; None where it has no channel for one.
    """

    uuid: str
    name: str
    marker: Marker | None
    memory_mib: int
    vcpus: int
    agent: bool | None


def parse_domain(domain_xml: str) -> ParsedDomain:
    """Read a domain's live XML, as libvirt wrote it."""
    root = ET.fromstring(domain_xml)  # noqa: S314  libvirtd wrote it
    vcpu = root.find("vcpu")
    online = 1 if vcpu is None else int(vcpu.get("current") or vcpu.text or 1)
    channels = [target for target in root.iterfind("devices/channel/target") if target.get("name") == _AGENT_CHANNEL]
    return ParsedDomain(
        uuid=root.findtext("uuid", "").lower(),
        name=root.findtext("name", ""),
        marker=_parse_marker(root),
        memory_mib=int(root.findtext("memory", "0")) // 1024,  # libvirt always answers in KiB
        vcpus=max(1, online),
        agent=any(target.get("state") == "connected" for target in channels) if channels else None,
    )


def _parse_marker(root: ET.Element) -> Marker | None:
    element = root.find(f"metadata/{_MARKER_TAG}")
    if element is None:
        return None
    try:
        return Marker(
            project=element.attrib["project"],
            name=element.attrib["name"],
            incarnation=int(element.attrib["incarnation"]),
            epoch=int(element.attrib["epoch"]),
        )
    except (KeyError, ValueError):
        return None  # somebody else's hand was in it: not a domain that we can claim


def marker_xml(marker: Marker) -> str:
    """Write a marker as an element of no namespace; it belongs into `MARKER_NAMESPACE`."""
    return ET.tostring(ET.Element("vm", _attributes(marker)), encoding="unicode")


def _attributes(marker: Marker) -> dict[str, str]:
    return {
        "project": marker.project,
        "name": marker.name,
        "incarnation": str(marker.incarnation),
        "epoch": str(marker.epoch),
    }


def with_marker(domain_xml: str, marker: Marker) -> tuple[str, str]:
    """Write `marker` into a domain's XML, in place of one that may be there.

    minidom and not ElementTree, since it keeps comments and the prefixes of other namespaces (`qemu:commandline`).

    Returns:
        The XML, and the domain's UUID (lower-case, with dashes).

    Raises:
        HypervisorError: The XML is broken, is no domain, or lacks a name or a UUID.
    """
    document, root, identity = _parse_identified(domain_xml)
    metadata = _child(root, "metadata")
    if metadata is None:
        metadata = root.appendChild(document.createElement("metadata"))
    for old in list(metadata.childNodes):
        if getattr(old, "namespaceURI", None) == MARKER_NAMESPACE:
            metadata.removeChild(old)
    element = document.createElementNS(MARKER_NAMESPACE, f"{MARKER_PREFIX}:vm")
    element.setAttribute(f"xmlns:{MARKER_PREFIX}", MARKER_NAMESPACE)
    for name, value in _attributes(marker).items():
        element.setAttribute(name, value)
    metadata.appendChild(element)
    return root.toxml(), identity


def identity_of(domain_xml: str) -> str:
    """Read the UUID (lower-case, with dashes) of a domain's XML from whomever.

    Raises:
        HypervisorError: The XML is broken, is no domain, or lacks a name or a UUID.
    """
    return _parse_identified(domain_xml)[2]


def startable(live_xml: str) -> str:
    """Undo in a live XML what a start from it would take for configuration.

    libvirt tells an interface of a network by what the network made of it: a bridge's, or a network device's. Started
    from that, it would no longer belong to the network. An interface that got a device of a pool stays what it is: a
    host device.
    """
    document = minidom.parseString(live_xml)  # noqa: S318  libvirtd wrote it
    changed = False
    for interface in document.getElementsByTagName("interface"):
        source = _child(interface, "source")
        is_made = interface.getAttribute("type") in ("bridge", "direct")
        if is_made and source is not None and source.hasAttribute("network"):
            interface.setAttribute("type", "network")
            for name in filter(source.hasAttribute, ("bridge", "dev", "mode", "portid")):
                source.removeAttribute(name)
            changed = True
    root = document.documentElement
    return live_xml if not changed or root is None else root.toxml()


def _parse_identified(domain_xml: str) -> tuple[minidom.Document, minidom.Element, str]:
    try:
        document = minidom.parseString(domain_xml)  # noqa: S318  an administrator's own, and libvirtd parses it next
    except (ExpatError, ValueError) as error:
        raise HypervisorError(f"the domain XML is broken: {error}") from error
    root = document.documentElement
    if root is None or root.tagName != "domain":
        raise HypervisorError(f"the domain XML is no <domain> but a <{root.tagName if root else ''}>")
    if not _child_text(root, "name"):
        raise HypervisorError("the domain XML has no <name>")
    try:
        return document, root, str(uuid.UUID(_child_text(root, "uuid")))
    except ValueError as error:
        raise HypervisorError("the domain XML has no valid <uuid>: without one libvirt would invent it") from error


def _child(parent: minidom.Element, tag: str) -> minidom.Element | None:
    for node in parent.childNodes:
        if isinstance(node, minidom.Element) and node.tagName == tag:
            return node
    return None


def _child_text(parent: minidom.Element, tag: str) -> str:
    child = _child(parent, tag)
    if child is None:
        return ""
    return "".join(node.data for node in child.childNodes if isinstance(node, minidom.Text)).strip()
