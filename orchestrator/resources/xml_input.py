"""Domain XML that people write: read without what XML can do to its reader, and checked as far as libvirt would not.

No document type is taken, so there are no entities to expand and nothing external to fetch; XInclude is refused; size,
depth and the number of elements are bounded. What libvirt itself says clearly at a start is left to it, but not what it
says only then and only of one host: two devices with one name, one address or one MAC.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

MOST_CHARACTERS = 256 * 1024
MOST_ELEMENTS = 5_000
DEEPEST = 32
_XINCLUDE = "{http://www.w3.org/2001/XInclude}"
_ONCE = ("name", "uuid", "memory", "currentMemory", "vcpu", "cpu", "os", "devices", "metadata", "features", "clock")
_LONGEST_REASON = 200
_PCI = ("domain", "bus", "slot", "function")

# The namespaces that libvirt has in domains: with its own prefixes the XML stays as people know it.
for _prefix, _uri in {
    "qemu": "http://libvirt.org/schemas/domain/qemu/1.0",
    "libosinfo": "http://libosinfo.org/xmlns/libvirt/domain/1.0",
}.items():
    ET.register_namespace(_prefix, _uri)


def read_domain(text: str) -> ET.Element:
    """Read a domain's XML as a person gave it.

    Raises:
        ValueError: It is not one, or not one that is taken; says why.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"is longer than {MOST_CHARACTERS // 1024} KiB")
    try:
        root: ET.Element = fromstring(text, forbid_dtd=True)
    except DefusedXmlException as error:
        raise ValueError("has a document type or entities, which are not taken") from error
    except ET.ParseError as error:
        raise ValueError(f"is not well-formed XML: {error}") from error
    except (LookupError, ValueError) as error:
        raise ValueError(f"is not XML that can be read: {error}") from error
    if root.tag != "domain":
        raise ValueError(f"is not a libvirt domain: its root element is <{root.tag[:80]}>")
    _check_shape(root)
    for why in _conflicts(root):
        raise ValueError(why[:_LONGEST_REASON])
    return root


def _check_shape(root: ET.Element) -> None:
    level, depth, count = [root], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > DEEPEST:
            raise ValueError(f"is nested deeper than {DEEPEST} elements")
        if count > MOST_ELEMENTS:
            raise ValueError(f"has more than {MOST_ELEMENTS} elements")
        for element in level:
            if element.tag.startswith(_XINCLUDE):
                raise ValueError("has an XInclude, which is not taken")
        level = [child for element in level for child in element]


def _conflicts(root: ET.Element) -> Iterator[str]:
    for tag in _ONCE:
        if len(root.findall(tag)) > 1:
            yield f"has <{tag}> twice"
    seen: set[str] = set()
    for what in _identities(root):
        if what in seen:
            yield f"has two devices with {what}"
        seen.add(what)


def _identities(root: ET.Element) -> Iterator[str]:
    """Name what no two devices may share."""
    for device in root.iterfind("devices/*"):
        target = device.find("target")
        if device.tag in {"disk", "interface"} and target is not None and target.get("dev"):
            yield f"target dev {target.get('dev')!r}"
        mac = device.find("mac")
        if device.tag == "interface" and mac is not None and device.find("teaming") is None:  # a team has one for two
            yield f"MAC address {mac.get('address', '').lower()!r}"
        alias = device.find("alias")
        if alias is not None and alias.get("name", "").startswith("ua-"):
            yield f"alias {alias.get('name')!r}"
        boot = device.find("boot")
        if boot is not None:
            yield f"boot order {boot.get('order')!r}"
        if device.tag == "controller" and device.get("type") != "usb" and device.get("index") is not None:
            yield f"controller {device.get('type')} {device.get('index')}"
        address = device.find("address")
        if address is not None and address.get("type") == "pci" and address.get("slot") is not None:
            yield f"PCI address {' '.join(_number(address.get(part, '0')) for part in _PCI)}"


def _number(text: str) -> str:
    """Write a number in one way, whether it came as `0x05` or as `5`."""
    try:
        return f"{int(text, 0):x}"
    except ValueError:
        return text
