"""Label selectors as Kubernetes writes them, for `kubectl get -l` and `drain --pod-selector` alike.

`a=b`, `a==b`, `a!=b`, `a in (b, c)`, `a notin (b, c)`, `a`, `!a`, joined by commas. `!=` and `notin` hold for what has
no such label.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from orchestrator.errors import Invalid
from orchestrator.resources.names import check_label_key, check_label_value, shown
from orchestrator.resources.vm import VirtualMachine

POD_NAME_LABEL = "vm.kubevirt.internal.virtualization.deckhouse.io/name"
"""Of each VM's pod, with the VM's name: the platform's guide to maintenance selects VMs by it."""
LONGEST: Final = 16_384
"""Characters of a selector."""

_TOKEN = re.compile(r"\s*(==|!=|=|!|\(|\)|,|[^\s=!(),<>]+)")
_END = ""


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
class Selector:
    """All of its requirements have to hold."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether labels are selected."""
        return all(requirement.holds(labels.get(requirement.key)) for requirement in self.requirements)


def parse_selector(text: str, path: str) -> Selector:
    """Read a selector; empty selects everything.

    Args:
        text: As it was given.
        path: Of the field or parameter that has it, for the error.

    Raises:
        Invalid: It is none; says why.
    """
    tokens = _Tokens(text, path)
    found: list[Requirement] = []
    while tokens.next != _END:
        found.append(_requirement(tokens))
        if tokens.next != _END:
            tokens.take(",")
            if tokens.next == _END:
                raise tokens.wrong("it ends with a comma")
    return Selector(tuple(found))


def pod_labels(vm: VirtualMachine) -> dict[str, str]:
    """Give the labels of a VM's pod: its own, and the one that tells that it is a VM's."""
    return {**vm.metadata.labels, POD_NAME_LABEL: vm.name}


def _requirement(tokens: "_Tokens") -> Requirement:
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

    def __init__(self, text: str, path: str) -> None:
        self._path = path
        self._text = text
        if len(text) > LONGEST:
            raise self.wrong(f"it is longer than {LONGEST} characters")
        self._found: list[str] = []
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.wrong(f"it has {shown(text[position])} in it")
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

    def wrong(self, why: str) -> Invalid:
        """Make the error."""
        why = f"{shown(self._text)} is not a label selector: {why}"
        return Invalid(f"{self._path}: {why}", ((self._path, why),))
