"""Schemas of resources for OpenAPI, made from the pydantic models.

`kubectl explain` shows their descriptions, which are the models' docstrings: the text for the type, and what stands
under `Attributes:` for its fields. Kubernetes' clients read OpenAPI 3.0, where pydantic writes JSON Schema: what only
the latter knows is rewritten here.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from pydantic.alias_generators import to_camel

from orchestrator.api.entries import ApiResource

REF: Final = "#/components/schemas/"
META: Final = "io.k8s.apimachinery.pkg.apis.meta.v1."
_KEPT: Final = (
    "default",
    "format",
    "maxItems",
    "maxLength",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "pattern",
    "required",
    "type",
    "uniqueItems",
)
_TYPE_META: Final = {"apiVersion": "The version of this representation.", "kind": "What this is."}
_FIELD = re.compile(r"^    (?P<names>\w+(?:, \w+)*): (?P<text>.*)$")


def gvk(api: ApiResource, suffix: str = "") -> dict[str, str]:
    """Name a kind as OpenAPI documents do."""
    return {"group": api.group, "version": api.version, "kind": api.kind.kind_name + suffix}


def prefix(api: ApiResource) -> str:
    """Give what names of a group's schemas begin with: `io.deckhouse.virtualization.v1alpha2.`."""
    group = ".".join(reversed(api.group.split("."))) if api.group else "io.k8s.api.core"
    return f"{group}.{api.version}."


def schemas_of(api: ApiResource) -> dict[str, dict[str, Any]]:
    """Give the schemas of a kind, of its list, and of all that they refer to, by name."""
    model = api.schema or api.kind
    written = model.model_json_schema(by_alias=True)
    translator = _Translator(prefix(api), written.pop("$defs", {}))
    own = translator.model(written)
    own["properties"].pop("createdVersion", None)
    own["x-kubernetes-group-version-kind"] = [gvk(api)]
    name = prefix(api) + api.kind.kind_name
    listed = {
        "description": f"A list of {api.kind.kind_name}.",
        "type": "object",
        "required": ["items"],
        "properties": {
            **{name: {"type": "string", "description": text} for name, text in _TYPE_META.items()},
            "metadata": {"allOf": [{"$ref": f"{REF}{META}ListMeta"}], "description": "Of the list."},
            "items": {"type": "array", "items": {"$ref": f"{REF}{name}"}, "description": "Its resources."},
        },
        "x-kubernetes-group-version-kind": [gvk(api, "List")],
    }
    return {name: own, f"{name}List": listed, **translator.referenced()}


class _Translator:
    """Writes one model's schema and those that it refers to."""

    def __init__(self, start: str, definitions: Mapping[str, dict[str, Any]]) -> None:
        self._start = start
        self._definitions = definitions

    def referenced(self) -> dict[str, dict[str, Any]]:
        """Give all that the model refers to; enumerations stand where they are used."""
        return {
            self._name(name): self.model(definition)
            for name, definition in self._definitions.items()
            if "enum" not in definition
        }

    def model(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """Write a model."""
        text, fields = split_docstring(written.get("description", ""))
        properties = {
            name: self.field(schema, fields.get(name) or _TYPE_META.get(name, ""))
            for name, schema in written.get("properties", {}).items()
        }
        result: dict[str, Any] = {"type": "object", "description": text, "properties": properties}
        if required := written.get("required"):
            result["required"] = required
        return result

    def field(self, written: Mapping[str, Any], description: str = "") -> dict[str, Any]:
        """Write the schema of a field or of an item."""
        options = [option for option in written.get("anyOf", ()) if option.get("type") != "null"]
        if options:
            nullable = len(options) < len(written["anyOf"])
            if len(options) > 1:
                return {"x-kubernetes-preserve-unknown-fields": True, **_described(description)}
            result = self.field(options[0], description)
            return {**result, "nullable": True} if nullable else result
        reference = written.get("$ref", "").rpartition("/")[2]
        if reference:
            definition = self._definitions[reference]
            if "enum" in definition:
                text = description or split_docstring(definition.get("description", ""))[0]
                return {"type": definition["type"], "enum": definition["enum"], **_described(text)}
            # What the type says of itself is shown beside it.
            return {"allOf": [{"$ref": REF + self._name(reference)}], **_described(description)}
        return self._plain(written, description)

    def _plain(self, written: Mapping[str, Any], description: str) -> dict[str, Any]:
        result = {key: written[key] for key in _KEPT if written.get(key) is not None}
        if "const" in written:
            result |= {"type": "string", "enum": [written["const"]]}
        if "enum" in written:
            result["enum"] = written["enum"]
        for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if exclusive in written:
                result |= {bound: written[exclusive], exclusive: True}
        if result.get("type") == "array":
            result["items"] = self.field(written["items"]) if isinstance(written.get("items"), dict) else {}
        if result.get("type") == "object":
            values = written.get("additionalProperties") or next(iter(written.get("patternProperties", {}).values()), 0)
            if isinstance(values, dict):
                result["additionalProperties"] = self.field(values)
        if "type" not in result:
            result["x-kubernetes-preserve-unknown-fields"] = True
        return {**result, **_described(description)}

    def _name(self, name: str) -> str:
        return (META if name == "ObjectMeta" else self._start) + name.removeprefix("Shown")


def _described(text: str) -> dict[str, str]:
    return {"description": text} if text else {}


def split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Split a docstring of ours into what it says of the class, and of its fields by their outside names."""
    about, _, listed = text.partition("\n\nAttributes:\n")
    fields: dict[str, str] = {}
    names: list[str] = []
    for line in listed.splitlines():
        match = _FIELD.match(line)
        if match is not None:
            names = [to_camel(name) for name in match["names"].split(", ")]
            fields |= dict.fromkeys(names, match["text"])
        elif line.startswith("        "):
            fields |= {name: f"{fields[name]} {line.strip()}" for name in names}
        else:
            break
    return " ".join(about.split()), fields


COMMON: Final[dict[str, dict[str, Any]]] = {
    f"{META}ListMeta": {
        "type": "object",
        "description": "Metadata of a list.",
        "properties": {
            "resourceVersion": {"type": "string", "description": "A watch of the list begins here."},
            "continue": {"type": "string", "description": "Gives the rest of a list that was cut at its limit."},
            "remainingItemCount": {"type": "integer", "description": "How many that are."},
        },
    },
    f"{META}Status": {
        "type": "object",
        "description": "What became of a request.",
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "status": {"type": "string"},
            "message": {"type": "string"},
            "reason": {"type": "string"},
            "code": {"type": "integer"},
            "details": {"type": "object"},
        },
        "x-kubernetes-group-version-kind": [{"group": "", "version": "v1", "kind": "Status"}],
    },
    f"{META}DeleteOptions": {
        "type": "object",
        "description": "How something is deleted.",
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "dryRun": {"type": "array", "items": {"type": "string", "enum": ["All"]}},
            "gracePeriodSeconds": {"type": "integer"},
            "propagationPolicy": {"type": "string"},
            "preconditions": {
                "type": "object",
                "properties": {"uid": {"type": "string"}, "resourceVersion": {"type": "string"}},
            },
        },
    },
    f"{META}Action": {
        "type": "object",
        "description": "What is asked of an action, or what came of it.",
        "x-kubernetes-preserve-unknown-fields": True,
    },
    f"{META}Patch": {"description": "A change, in the form that the media type names."},
}
"""What documents of all groups have."""
