"""What the API says of itself, and how it writes what it is asked for; no server."""

import json
from typing import Any

import pytest

from orchestrator.api import protobuf
from orchestrator.api.catalog import NODES, OPERATIONS, RESOURCES, VIRTUAL_MACHINES
from orchestrator.api.discovery import Discovery
from orchestrator.api.entries import Entry
from orchestrator.api.errors import CODES, status_of
from orchestrator.api.forms import choose
from orchestrator.api.openapi import OpenApi
from orchestrator.api.schemas import split_docstring
from orchestrator.api.tables import Include, TableForm
from orchestrator.api.targets import Parameters, Paths
from orchestrator.cli.tables import TABLES, Around, cells_of, columns_of
from orchestrator.errors import (
    BadRequest,
    Conflict,
    Invalid,
    NotAcceptable,
    NotFound,
    OutcomeUnknown,
    Refused,
    StoreUnavailable,
)
from orchestrator.resources import Resource, VirtualMachine
from orchestrator.resources.shown_node import show_node
from tests.builders import NOW, a_node, a_vm, an_operation

TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"
DOCUMENTS = {path: json.loads(body) for path, body in OpenApi(RESOURCES).documents.items()}
GROUP = DOCUMENTS["/openapi/v3/apis/virtualization.deckhouse.io/v1alpha2"]
PREFIX = "io.deckhouse.virtualization.v1alpha2."


def walk(value: Any) -> list[dict[str, Any]]:
    """All objects of a document."""
    if isinstance(value, list):
        return [found for item in value for found in walk(item)]
    if not isinstance(value, dict):
        return []
    return [value, *(found for item in value.values() for found in walk(item))]


class TestOpenApi:
    @pytest.mark.parametrize("path", [path for path in DOCUMENTS if path != "/openapi/v3"])
    def test_references_lead_somewhere_and_words_are_those_of_openapi_3_0(self, path: str) -> None:
        schemas = DOCUMENTS[path]["components"]["schemas"]
        for found in walk(DOCUMENTS[path]):
            reference = found.get("$ref")
            if isinstance(reference, str):
                assert reference.rpartition("/")[2] in schemas
                assert list(found) == ["$ref"], "what stands beside a reference is not read"
        for found in walk(schemas):
            for word in ("anyOf", "const", "prefixItems", "propertyNames", "$defs"):
                assert word not in found or (isinstance(found[word], dict) and "type" in found[word]), (word, found)

    def test_each_kind_has_its_paths_and_its_name(self) -> None:
        for api in RESOURCES:
            root = f"/apis/{api.kind.group_version}" if api.group else f"/api/{api.version}"
            document = DOCUMENTS[f"/openapi/v3{root}"]
            listed = document["paths"][f"{root}/{api.plural}"]["get"]
            assert listed["x-kubernetes-group-version-kind"]["kind"] == api.kind.kind_name
            kinds = [
                named["kind"]
                for schema in document["components"]["schemas"].values()
                for named in schema.get("x-kubernetes-group-version-kind", [])
            ]
            assert {api.kind.kind_name, f"{api.kind.kind_name}List"} <= set(kinds)

    def test_only_what_a_kind_can_is_offered(self) -> None:
        methods = {
            path: set(found) - {"parameters"} for path, found in DOCUMENTS["/openapi/v3/api/v1"]["paths"].items()
        }
        assert methods["/api/v1/nodes/{name}"] == {"get", "put", "patch", "delete"}
        assert methods["/api/v1/namespaces/{namespace}/pods/{name}"] == {"get"}
        assert methods["/api/v1/namespaces/{namespace}/pods/{name}/eviction"] == {"post"}
        assert methods["/api/v1/namespaces"] == {"get", "post"}

    def test_the_server_checks_fields_by_itself(self) -> None:
        """Else kubectl checks them, with what it takes from OpenAPI v2."""
        created = GROUP["paths"]["/apis/virtualization.deckhouse.io/v1alpha2/namespaces/{namespace}/virtualmachines"]
        assert "fieldValidation" in {parameter["name"] for parameter in created["post"]["parameters"]}

    def test_a_schema_says_what_its_model_says(self) -> None:
        schemas = GROUP["components"]["schemas"]
        spec = schemas[f"{PREFIX}OperationSpec"]
        assert spec["required"] == ["type", "virtualMachineName"]
        assert spec["properties"]["force"]["nullable"] is True
        assert spec["properties"]["type"]["enum"] == ["Start", "Stop", "Restart", "Evict", "Migrate"]
        assert schemas[f"{PREFIX}Memory"]["required"] == ["size"]
        assert schemas[f"{PREFIX}VirtualMachineSpec"]["properties"]["disks"]["maxItems"] == 64
        labels = schemas["io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"]["properties"]["labels"]
        assert labels["additionalProperties"]["type"] == "string"
        whole = schemas[f"{PREFIX}VirtualMachine"]["properties"]
        assert set(whole) == {"apiVersion", "kind", "metadata", "spec", "status"}

    def test_descriptions_come_from_docstrings(self) -> None:
        about, fields = split_docstring(
            "One line.\n\nAnother\none.\n\nAttributes:\n    a_field: What it is,\n        at length.\n    b, c: Both.\n"
        )
        assert about == "One line. Another one."
        assert fields == {"aField": "What it is, at length.", "b": "Both.", "c": "Both."}
        properties = GROUP["components"]["schemas"][f"{PREFIX}OperationSpec"]["properties"]
        assert properties["force"]["description"].startswith("None is not False")


class TestDiscovery:
    def test_resources_and_subresources(self) -> None:
        documents = Discovery(RESOURCES).documents
        found = {one["name"]: one for one in documents["/api/v1"]["resources"]}
        eviction = found["pods/eviction"]
        assert (eviction["group"], eviction["version"], eviction["kind"]) == ("policy", "v1", "Eviction")
        assert found["nodes"]["namespaced"] is False
        group = documents["/apis/virtualization.deckhouse.io/v1alpha2"]
        assert {"vm", "vmop", "vmclass"} == {short for one in group["resources"] for short in one.get("shortNames", ())}
        assert documents["/apis"]["groups"][0]["preferredVersion"]["groupVersion"].endswith("/v1alpha2")


class TestPaths:
    paths = Paths(RESOURCES)

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("/api/v1/nodes", ("nodes", "", "", "")),
            ("/api/v1/nodes/h1/status", ("nodes", "", "h1", "status")),
            ("/api/v1/pods", ("pods", "", "", "")),
            ("/api/v1/namespaces", ("namespaces", "", "", "")),
            ("/api/v1/namespaces/a", ("namespaces", "", "a", "")),
            ("/api/v1/namespaces/a/status", ("namespaces", "", "a", "status")),
            ("/api/v1/namespaces/a/pods", ("pods", "a", "", "")),
            ("/api/v1/namespaces/a/pods/p/eviction", ("pods", "a", "p", "eviction")),
            ("/api/v1/namespaces/namespaces/pods/pods", ("pods", "namespaces", "pods", "")),
            (
                "/apis/virtualization.deckhouse.io/v1alpha2/namespaces/a/virtualmachines/b",
                ("virtualmachines", "a", "b", ""),
            ),
        ],
    )
    def test_what_they_name(self, path: str, expected: tuple[str, ...]) -> None:
        target = self.paths.read(path)
        assert (target.api.plural, target.namespace, target.name, target.subresource) == expected

    @pytest.mark.parametrize(
        "path",
        [
            "/api/v1",
            "/api/v1/pods/x",
            "/api/v1/nodes/h1/eviction",
            "/api/v1/namespaces/a/nodes",
            "/api/v1/namespaces/a/pods/p/eviction/x",
            "/apis/virtualization.deckhouse.io/v1alpha2/nodes",
            "/api/v1/virtualmachines",
            "/api/v1/namespaces//pods",
            "",
        ],
    )
    def test_what_names_nothing(self, path: str) -> None:
        with pytest.raises(NotFound, match="could not find the requested resource"):
            self.paths.read(path)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("limit", "-1"), ("limit", "x"), ("limit", "1.5"), ("watch", "maybe"), ("dryRun", "Some"), ("limit", "²")],
    )
    def test_parameters_that_are_wrong_are_named(self, name: str, value: str) -> None:
        with pytest.raises(BadRequest, match=f"^{name}: "):
            read_all(Parameters({name: value}))

    def test_large_numbers_are_cut(self) -> None:
        assert Parameters({"limit": "9" * 400}).number("limit", 9) == 9


def read_all(parameters: Parameters) -> None:
    parameters.number("limit", 9)
    parameters.flag("watch")
    parameters.is_dry()


class TestForms:
    def test_the_first_form_that_is_ours(self) -> None:
        accept = f"application/vnd.kubernetes.protobuf, {TABLE}, application/json"
        assert choose(VIRTUAL_MACHINES, accept, "").is_table
        assert not choose(VIRTUAL_MACHINES, "application/json, " + TABLE, "").is_table
        assert not choose(VIRTUAL_MACHINES, TABLE.replace("v=v1", "v=v1beta1") + ",*/*", "").is_table
        with pytest.raises(NotAcceptable):
            choose(VIRTUAL_MACHINES, "application/yaml", "")
        with pytest.raises(BadRequest):
            choose(VIRTUAL_MACHINES, TABLE, "Everything")

    @pytest.mark.parametrize("resource", [a_vm(), an_operation(), a_node("h1")], ids=lambda r: r.kind_name)
    def test_rows_are_those_of_vmherd_get(self, resource: Resource) -> None:
        api = next(api for api in RESOURCES if api.kind is type(resource))
        around = Around(NOW, {"h1": 3})
        form = TableForm(api, Include.NONE)
        columns = columns_of(TABLES[type(resource)], wide=True, namespaces=False)
        assert json.loads(form.row(Entry(api, resource), around))["cells"] == list(cells_of(columns, resource, around))
        assert [column["name"] for column in form.definitions()] == [column.title for column in columns]

    def test_what_a_row_does_not_show_is_no_difference(self) -> None:
        old = Entry(VIRTUAL_MACHINES, a_vm())
        silent = a_vm().with_status(counter=9)
        later = silent.with_(metadata=silent.metadata.with_(resource_version="9"))
        assert old.looks_like(Entry(VIRTUAL_MACHINES, later))
        labelled = silent.with_(metadata=silent.metadata.with_(labels={"a": "b"}))
        assert not old.looks_like(Entry(VIRTUAL_MACHINES, labelled))
        assert not old.looks_like(Entry(VIRTUAL_MACHINES, a_vm(node="n2")))
        assert not Entry(OPERATIONS, an_operation()).looks_like(Entry(OPERATIONS, an_operation(progress=5)))

    def test_what_the_store_may_hold_is_written_whatever_it_is(self) -> None:
        odd = a_vm().with_status(ip_address="\ud800")
        assert json.loads(Entry(VIRTUAL_MACHINES, odd).json())["status"]["ipAddress"] == "\ud800"

    def test_a_node_is_as_kubernetes_shows_one(self) -> None:
        node = a_node("h1", labels={"zone": "a"}, cordoned=True).with_status(boot_id="boot", generation="agent")
        shown = json.loads(Entry(NODES, node).json())
        assert shown["status"]["capacity"] == {"cpu": "8", "memory": "16384Mi"}
        assert shown == show_node(node)
        stored = node.manifest()
        assert {**shown, "status": None} == {**stored, "status": None}
        assert shown["status"]["allocatable"] == shown["status"]["capacity"]
        assert shown["status"]["nodeInfo"]["bootID"] == "boot"
        for part in ("hypervisor", "conditions"):
            assert shown["status"][part] == stored["status"][part]
        assert not {"bootId", "generation"} & set(shown["status"])


class TestStatus:
    @pytest.mark.parametrize(
        ("error", "code", "reason"),
        [
            (NotFound("x"), 404, "NotFound"),
            (Conflict("x"), 409, "Conflict"),
            (Refused("x"), 403, "Forbidden"),
            (Invalid("x"), 422, "Invalid"),
            (StoreUnavailable("x"), 503, "ServiceUnavailable"),
            (OutcomeUnknown("x"), 504, "OutcomeUnknown"),
        ],
    )
    def test_codes(self, error: Exception, code: int, reason: str) -> None:
        status = status_of(error)
        assert (status["code"], status["reason"], status["message"]) == (code, reason, "x")
        assert CODES[reason] == code

    def test_causes_have_their_fields(self) -> None:
        status = status_of(Invalid("x", (("spec.a", "unknown field"), ("spec.b", "is required"))), name="vm")
        assert status["details"]["causes"] == [
            {"reason": "FieldValueNotSupported", "message": "unknown field", "field": "spec.a"},
            {"reason": "FieldValueRequired", "message": "is required", "field": "spec.b"},
        ]

    def test_an_error_that_is_not_known_gives_nothing_away(self) -> None:
        status = status_of(ValueError("the password is swordfish"))
        assert (status["code"], status["reason"]) == (500, "InternalError")
        assert "swordfish" not in json.dumps(status)


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def part(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def envelope(kind: str, raw: bytes) -> bytes:
    return b"k8s\x00" + part(1, part(1, b"v1") + part(2, kind.encode())) + part(2, raw) + part(3, b"") + part(4, b"")


class TestProtobuf:
    def test_a_namespace(self) -> None:
        label = part(11, part(1, b"a") + part(2, b"b"))
        meta = part(1, b"team-a") + label + part(11, part(1, b"c") + part(2, b"d")) + varint(7 << 3) + varint(300)
        read = protobuf.read(envelope("Namespace", part(1, meta) + part(2, b"") + part(3, b"")))
        assert read == {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": "team-a", "labels": {"a": "b", "c": "d"}},
        }

    def test_an_eviction(self) -> None:
        options = part(2, part(1, b"some-uid")) + part(5, b"All")
        read = protobuf.read(envelope("Eviction", part(1, part(1, b"pod")) + part(2, options)))
        assert read["deleteOptions"] == {"preconditions": {"uid": "some-uid"}, "dryRun": ["All"]}

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{}",
            b"k8s\x00",
            b"k8s\x00\xff",
            b"k8s\x00" + b"\xff" * 20,
            b"k8s\x00\x0a\x7f",
            envelope("Pod", b""),
            envelope("Namespace", b"\x0a\x05abc"),
            envelope("Namespace", part(1, part(1, b"\xff"))),
            envelope("Namespace", b"\x0b"),
        ],
    )
    def test_what_is_none(self, body: bytes) -> None:
        with pytest.raises(BadRequest):
            protobuf.read(body)


def test_every_column_of_what_is_stored_is_in_the_clis_table() -> None:
    assert VIRTUAL_MACHINES.table is TABLES[VirtualMachine]
