"""Two XML texts compared element by element: in which paths they differ."""

import xml.etree.ElementTree as ET


def differences(one: str, other: str) -> set[str]:
    """Name the paths in which two texts differ: `/domain/name`, `/domain/devices/disk/@type`.

    White space around texts, the order of attributes, and how an empty element is written make no difference. Siblings
    of the same tag are compared in their order; one that the other does not have is a difference at its own path.
    """
    first, second = ET.fromstring(one), ET.fromstring(other)  # noqa: S314
    if first.tag != second.tag:
        return {f"/{first.tag}"}
    return _differences(first, second, f"/{first.tag}")


def _differences(one: ET.Element, other: ET.Element, path: str) -> set[str]:
    found = {f"{path}/@{name}" for name in one.attrib.keys() | other.attrib.keys() if one.get(name) != other.get(name)}
    if (one.text or "").strip() != (other.text or "").strip():
        found.add(path)
    for tag in {child.tag for child in (*one, *other)}:
        ours, theirs = one.findall(tag), other.findall(tag)
        if len(ours) != len(theirs):
            found.add(f"{path}/{tag}")
        for a, b in zip(ours, theirs, strict=False):
            found |= _differences(a, b, f"{path}/{tag}")
    return found
