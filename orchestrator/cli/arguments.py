"""What is written on the command line: kinds, names, durations, labels, and the options that commands share."""

import re
from typing import Annotated

import typer

from orchestrator.cli.completion import complete_kinds, complete_names
from orchestrator.resources import (
    Event,
    Maintenance,
    Node,
    NodeDrain,
    NodeFencing,
    RebalancePolicy,
    Resource,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
)

KNOWN: tuple[type[Resource], ...] = (
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
    Node,
    NodeDrain,
    Maintenance,
    RebalancePolicy,
    NodeFencing,
    Event,
)
"""Kinds that people see. `NodeInventory` is our own affair."""

Namespace = Annotated[
    str, typer.Option("-n", "--namespace", help="The namespace that the names are in.", metavar="NAME")
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")]


def full_name(kind: type[Resource]) -> str:
    """Name a kind as `-o name` does: `virtualmachine.virtualization.deckhouse.io`, `node`."""
    group = kind.group_version.rpartition("/")[0]
    return kind.kind_name.lower() + (f".{group}" if group else "")


def _aliases(kind: type[Resource]) -> set[str]:
    group = kind.group_version.rpartition("/")[0]
    names = {kind.kind_name.lower(), kind.plural, kind.short, kind.short + ("es" if kind.short.endswith("s") else "s")}
    return names | {f"{name}.{group}" for name in names if group}


_BY_ALIAS = {alias: kind for kind in KNOWN for alias in _aliases(kind)}


_KINDS = "vm, vmclass, vmop, node, drain, maintenance, rebalance, fencing or event"


def parse_kind(word: str) -> type[Resource]:
    """Read a kind by any of its names.

    Raises:
        typer.BadParameter: Not a kind.
    """
    kind = _BY_ALIAS.get(word.lower())
    if kind is None:
        raise typer.BadParameter(f"{word!r} is not a kind: {_KINDS}")
    return kind


KindName = Annotated[
    str,
    typer.Argument(
        metavar="KIND",
        help=f"{_KINDS}.",
        autocompletion=complete_kinds,
    ),
]
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", show_default=False, autocompletion=complete_names)]


def parse_targets(kind: str, names: list[str] | None, *, needs_name: bool = False) -> tuple[type[Resource], list[str]]:
    """Read `KIND [NAME...]` or, as `-o name` prints them, `KIND/NAME...`.

    Args:
        kind: The first word.
        names: The others.
        needs_name: Whether the kind alone is not enough.

    Raises:
        typer.BadParameter: Not a kind, or several kinds, or no name where one is needed.
    """
    words = [kind, *(names or [])]
    if "/" not in kind:
        found, chosen = parse_kind(kind), words[1:]
        if any("/" in name for name in chosen):
            raise typer.BadParameter("either KIND NAME... or KIND/NAME...")
    else:
        pairs = [word.partition("/") for word in words]
        kinds = {parse_kind(first) for first, _, _ in pairs}
        if len(kinds) > 1:
            raise typer.BadParameter("of one kind at a time")
        found, chosen = kinds.pop(), [name for _, _, name in pairs]
    if not all(chosen):
        raise typer.BadParameter("a name is empty")
    if needs_name and not chosen:
        raise typer.BadParameter("give a name too")
    return found, list(dict.fromkeys(chosen))


_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_duration(text: str) -> float:
    """Read `90`, `90s`, `10m`, `1h30m` or `30d` as seconds, > 0.

    Raises:
        typer.BadParameter: It is something else.
    """
    match = _DURATION.fullmatch(text)
    days, hours, minutes, seconds = match.groups() if match else (None, None, None, None)
    total = int(days or 0) * 86_400 + int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(seconds or 0)
    if total <= 0:
        raise typer.BadParameter(f"{text!r} is not a duration such as 90s, 10m or 1h30m")
    return total


Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout", parser=parse_duration, metavar="DURATION", help="Wait no longer: 90s, 10m, 1h30m. Else for ever."
    ),
]


def parse_labels(texts: list[str]) -> dict[str, str]:
    """Read `key=value,key=value`, given once or several times.

    Raises:
        typer.BadParameter: A part is not `key=value`, or a key has two values.
    """
    labels: dict[str, str] = {}
    for part in ",".join(texts).split(",") if texts else ():
        key, separator, value = part.partition("=")
        if not separator or not key or labels.get(key, value) != value:
            raise typer.BadParameter(f"{part!r} is not key=value, once for each key")
        labels[key] = value
    return labels
