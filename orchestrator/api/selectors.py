"""Selectors of requests: labels as everywhere, and fields.

Fields: `=`, `==` and `!=` only, on the fields that a kind offers.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import BadRequest, Invalid
from orchestrator.resources.names import shown
from orchestrator.resources.selectors import LONGEST, Requirement, Selector, parse_selector

Fields = Mapping[str, Callable[[Any], str]]
"""What a kind can be selected by: the field's name, and how to read it off the resource."""


@dataclass(frozen=True, slots=True)
class FieldSelector:
    """All of its requirements have to hold; pairs of a requirement and how to read its field."""

    requirements: tuple[tuple[Requirement, Callable[[Any], str]], ...] = ()

    def matches(self, resource: Any) -> bool:
        """Whether a resource is selected."""
        return all(requirement.holds(read(resource)) for requirement, read in self.requirements)

    def required(self, key: str) -> str | None:
        """Give the value that a field must have; None when none is named."""
        for requirement, _ in self.requirements:
            if requirement.key == key and not requirement.negated and requirement.values:
                return next(iter(requirement.values))
        return None


def parse_labels(text: str) -> Selector:
    """Read a label selector.

    Raises:
        BadRequest: Says what is wrong: it is a parameter, and no field of a document.
    """
    try:
        return parse_selector(text, "labelSelector")
    except Invalid as error:
        raise BadRequest(str(error)) from error


def parse_fields(text: str, fields: Fields) -> FieldSelector:
    """Read a field selector.

    Args:
        text: As it was given. A backslash takes the meaning from a comma, an equals sign or a backslash after it.
        fields: What the kind offers.

    Raises:
        BadRequest: Says what is wrong, or which fields there are.
    """
    if len(text) > LONGEST:
        raise BadRequest(f"fieldSelector: is longer than {LONGEST} characters")
    found: list[tuple[Requirement, Callable[[Any], str]]] = []
    for term in re.split(r"(?<!\\),", text):
        if not term.strip():
            continue
        match = re.match(r"\s*([^=!\s]+?)\s*(==|!=|=)(.*)", term, re.DOTALL)
        if match is None:
            raise BadRequest(f"fieldSelector {shown(text)}: {shown(term)} is not field=value or field!=value")
        name, operator, value = match[1], match[2], re.sub(r"\\([\\,=])", r"\1", match[3])
        read = fields.get(name)
        if read is None:
            raise BadRequest(f"field label not supported: {shown(name)}; known: {', '.join(sorted(fields))}")
        found.append((Requirement(name, frozenset({value.strip()}), negated=operator == "!="), read))
    return FieldSelector(tuple(found))
