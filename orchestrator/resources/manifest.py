"""Bounds of a manifest as a whole, before any of its fields is looked at.

YAML can say in a hundred bytes what takes gigabytes written out (an alias of an alias), or what never ends (an alias of
what it stands in). So a manifest is measured first, without following it deeper or longer than what is taken.
"""

from typing import Any, Final

from orchestrator.errors import Invalid
from orchestrator.resources.names import shown

DEEPEST: Final = 32
MOST_VALUES: Final = 50_000
MOST_CHARACTERS: Final = 1024 * 1024


def check_size(data: Any) -> None:
    """Refuse a manifest that is too deep or too large, or that refers to itself.

    Raises:
        Invalid: Names what it is.
    """
    level: list[Any] = [data]
    values = characters = 0
    for _ in range(DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list | tuple | set):
                below += value
            elif isinstance(value, str | bytes):
                characters += len(value)
            values += 1
            if values + len(below) > MOST_VALUES or characters > MOST_CHARACTERS:
                raise _too(f"is larger than {MOST_VALUES} values, or {MOST_CHARACTERS // 2**20} MiB of text")
        if not below:
            return
        level = below
    raise _too(f"is nested deeper than {DEEPEST} levels, or refers to itself")


def _too(why: str) -> Invalid:
    return Invalid(f"document: {why}", (("document", why),))


def named(data: dict[Any, Any], field: str) -> str:
    """Give a field that has to be a text; what it is not is written so that a person sees it."""
    value = data.get(field, "")
    return value if isinstance(value, str) and value.isprintable() else shown(value)
