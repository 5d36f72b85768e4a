"""Label and field selectors as Kubernetes writes them.

Labels: `a=b`, `a==b`, `a!=b`, `a in (b, c)`, `a notin (b, c)`, `a`, `!a`, joined by commas. `!=` and `notin` hold for
what has no such label. Fields: `=`, `==` and `!=` only, on the fields that a kind offers.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.api.errors import BadRequest
from orchestrator.resources.names import check_label_key, check_label_value, shown

_LONGEST = 16_384
_TOKEN = re.compile(r"\s*(==|!=|=|!|\(|\)|,|[^\s=!(),<>]+)")
_END = ""

Fields = Mapping[str, Callable[[Any], str]]
"""What a kind can be selected by: the field's name, and how to read it off the resource."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition.

    Attributes:
        key: Of the label, or the field's name.
        values: Any of these; None: any value at all.
        negated: Holds when the rest does not.
    """

    key: str
    values: frozenset[str] | None
    negated: bool = False

    def holds(self, value: str | None) -> bool:
        """Whether it holds for a value; None: there is none."""
        return (value is not None and (self.values is None or value in self.values)) != self.negated


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """All of its requirements have to hold."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether labels are selected."""
        return all(requirement.holds(labels.get(requirement.key)) for requirement in self.requirements)


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


def parse_labels(text: str) -> LabelSelector:
    """Read a label selector.

    Raises:
        BadRequest: Says what is wrong.
    """
    tokens = _Tokens(text, "label")
    found: list[Requirement] = []
    while tokens.next != _END:
        found.append(_label_requirement(tokens))
        if tokens.next != _END:
            tokens.take(",")
            if tokens.next == _END:
                raise tokens.wrong("ends with a comma")
    return LabelSelector(tuple(found))


def _label_requirement(tokens: "_Tokens") -> Requirement:
    if tokens.next == "!":
        tokens.pop()
        return Requirement(_key(tokens), None, negated=True)
    key = _key(tokens)
    match tokens.next:
        case "=" | "==" | "!=":
            operator = tokens.pop()
            value = tokens.word() if tokens.next not in {",", _END} else ""
            return Requirement(key, frozenset({_value(tokens, value)}), negated=operator == "!=")
        case "in" | "notin":
            operator = tokens.pop()
            return Requirement(key, _values(tokens), negated=operator == "notin")
        case _:
            return Requirement(key, None)


def _key(tokens: "_Tokens") -> str:
    try:
        return check_label_key(tokens.word())
    except ValueError as error:
        raise tokens.wrong(str(error)) from error


def _value(tokens: "_Tokens", value: str) -> str:
    try:
        return check_label_value(value)
    except ValueError as error:
        raise tokens.wrong(str(error)) from error


def _values(tokens: "_Tokens") -> frozenset[str]:
    tokens.take("(")
    values: set[str] = set()
    while True:
        word = tokens.word() if tokens.next not in {",", ")", _END} else ""
        values.add(_value(tokens, word))
        if tokens.next != ",":
            break
        tokens.pop()
    tokens.take(")")
    return frozenset(values)


class _Tokens:
    """Words and signs of a selector, one ahead."""

    def __init__(self, text: str, kind: str) -> None:
        self._kind = kind
        self._text = text
        if len(text) > _LONGEST:
            raise self.wrong(f"is longer than {_LONGEST} characters")
        self._found: list[str] = []
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.wrong(f"has {shown(text[position])} in it")
            self._found.append(match[1])
            position = match.end()
        self._found.reverse()

    @property
    def next(self) -> str:
        """The next one; empty at the end."""
        return self._found[-1] if self._found else _END

    def pop(self) -> str:
        """Take the next one."""
        return self._found.pop()

    def take(self, sign: str) -> None:
        """Take a sign that must come now."""
        if self.next != sign:
            raise self.wrong(f"{shown(sign)} is missing before {shown(self.next) if self.next else 'its end'}")
        self.pop()

    def word(self) -> str:
        """Take a word that must come now."""
        if self.next in {"=", "==", "!=", "!", "(", ")", ",", _END}:
            raise self.wrong(f"a word is missing before {shown(self.next) if self.next else 'its end'}")
        return self.pop()

    def wrong(self, why: str) -> BadRequest:
        """Make the error."""
        return BadRequest(f"{self._kind}Selector {shown(self._text)}: {why}")


def parse_fields(text: str, fields: Fields) -> FieldSelector:
    """Read a field selector.

    Args:
        text: As it was given. A backslash takes the meaning from a comma, an equals sign or a backslash after it.
        fields: What the kind offers.

    Raises:
        BadRequest: Says what is wrong, or which fields there are.
    """
    if len(text) > _LONGEST:
        raise BadRequest(f"fieldSelector: is longer than {_LONGEST} characters")
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
