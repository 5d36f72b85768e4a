"""`-o json|yaml|name`: resources as they are, and what a command did or found as a document."""

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from orchestrator.cli import terminal
from orchestrator.cli.arguments import full_name
from orchestrator.resources import Resource


class Output(StrEnum):
    """How resources are printed, where not as a table."""

    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


class Written(StrEnum):
    """How something that was just created is printed."""

    JSON = "json"
    YAML = "yaml"
    NAME = "name"


class Documents(StrEnum):
    """How it is printed, where not as lines."""

    JSON = "json"
    YAML = "yaml"


AsDocument = Annotated[
    Documents | None, typer.Option("-o", "--output", help="As a document, not as lines.", show_default=False)
]


def qualified_name(resource: Resource) -> str:
    """Name a resource so that `vmherd` takes it back: `node/h1`."""
    return f"{full_name(type(resource))}/{resource.name}"


def render(resources: Sequence[Resource], output: Output | Written, *, is_list: bool) -> str:
    """Give resources as text, without a newline at the end.

    Args:
        resources: In the order in which they are printed.
        output: Any but `wide`.
        is_list: Whether they are put into a `List`, as they are when not one was asked for by its name.
    """
    if output.value == Output.NAME.value:
        return "\n".join(qualified_name(resource) for resource in resources)
    items = [resource.manifest() for resource in resources]
    data: Any = {"apiVersion": "v1", "kind": "List", "items": items} if is_list else items[0]
    return document(data, Documents(output.value))


def document(data: object, output: Documents) -> str:
    """Give data as text, without a newline at the end."""
    if output is Documents.JSON:
        return json.dumps(data, indent=4, ensure_ascii=False)
    return _to_yaml(data)


def _to_yaml(data: object) -> str:
    """Write texts of several lines (a domain's XML) as such, and nothing as a reference to something above."""
    import yaml  # noqa: PLC0415 - tables don't need it

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, _data: object) -> bool:
            return True

    def represent_text(dumper: Dumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, represent_text)
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120).rstrip("\n")


class Results:
    """What a command did to each thing: a line at once, or one document at the end.

    Args:
        output: Of the document; None: lines.
        is_list: Whether the command may be given several things: its document is then a list, of however many.
    """

    def __init__(self, output: Documents | None, *, is_list: bool = False) -> None:
        self._output = output
        self._is_list = is_list
        self._found: list[dict[str, Any]] = []

    def add(self, line: str, **fields: Any) -> None:
        """Say what was done: as a line, or as the fields of it."""
        if self._output is None:
            terminal.write(line)
        self._found.append(fields)

    def end(self) -> None:
        """Print the document, if one is wanted."""
        if self._output is not None:
            terminal.write(document(self._found if self._is_list else self._found[0], self._output))
