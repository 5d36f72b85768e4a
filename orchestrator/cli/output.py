"""`-o json|yaml|name`."""

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

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
    if output.value == Output.JSON.value:
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
