"""Label selectors as kubectl writes them: `app=web,tier!=db,env in (a, b),!old`."""

import re
from collections.abc import Mapping

from orchestrator.errors import Invalid
from orchestrator.resources.meta import parse
from orchestrator.resources.names import shown
from orchestrator.resources.scheduling import NodeSelectorRequirement
from orchestrator.resources.vm import VirtualMachine

POD_NAME_LABEL = "vm.kubevirt.internal.virtualization.deckhouse.io/name"
"""Of each VM's pod, with the VM's name: the platform's guide to maintenance selects VMs by it."""

_PART = re.compile(r"\s*(?:[^,(]|\([^)]*\))+")
_SET = re.compile(r"(?P<key>\S+)\s+(?P<how>in|notin)\s*\((?P<values>[^)]*)\)")
_EQUAL = re.compile(r"(?P<key>[^=!\s]+)\s*(?P<how>==|=|!=)\s*(?P<value>\S*)")

Selector = tuple[NodeSelectorRequirement, ...]


def parse_selector(text: str) -> Selector:
    """Read a selector; empty selects everything.

    Raises:
        Invalid: It is none.
    """
    found = [part.strip() for part in _PART.findall(text)]
    if ",".join(found).replace(" ", "") != text.replace(" ", "") or (text.strip() and not all(found)):
        raise Invalid(f"{shown(text)} is not a label selector such as app=web,tier!=db")
    return tuple(_requirement(part) for part in found)


def _requirement(part: str) -> NodeSelectorRequirement:
    if match := _SET.fullmatch(part):
        values = tuple(value.strip() for value in match["values"].split(","))
        return _made(match["key"], "In" if match["how"] == "in" else "NotIn", values)
    if match := _EQUAL.fullmatch(part):
        return _made(match["key"], "NotIn" if match["how"] == "!=" else "In", (match["value"],))
    if part.startswith("!"):
        return _made(part[1:].strip(), "DoesNotExist", ())
    return _made(part, "Exists", ())


def _made(key: str, operator: str, values: tuple[str, ...]) -> NodeSelectorRequirement:
    return parse(NodeSelectorRequirement, {"key": key, "operator": operator, "values": values})


def selects(selector: Selector, labels: Mapping[str, str]) -> bool:
    """Whether all of a selector holds for these labels."""
    return all(requirement.holds(labels) for requirement in selector)


def pod_labels(vm: VirtualMachine) -> dict[str, str]:
    """Give the labels of a VM's pod: its own, and the one that tells that it is a VM's."""
    return {**vm.metadata.labels, POD_NAME_LABEL: vm.name}
