"""What outside data may do to resources: become one, or be refused with the path of what is wrong."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import Invalid
from orchestrator.resources import (
    Node,
    NodeInventory,
    ObjectMeta,
    Resource,
    VirtualMachine,
    VirtualMachineOperation,
    make_key,
    new_metadata,
    parse,
    render_domain,
    split_key,
)
from orchestrator.resources.meta import Condition, find_condition, quantity_bytes, with_condition
from orchestrator.resources.names import check_name
from orchestrator.resources.vm import Cpu
from orchestrator.store.batch import encode
from orchestrator.store.store import decode
from tests.builders import DOMAIN_XML, NOW, a_node, a_vm, an_inventory, an_operation, granted_operation, seen

EVICT: dict[str, Any] = {
    "apiVersion": "virtualization.deckhouse.io/v1alpha2",
    "kind": "VirtualMachineOperation",
    "metadata": {"generateName": "evict-linux-vm-"},
    "spec": {"virtualMachineName": "linux-vm", "type": "Evict"},
}
VM: dict[str, Any] = {
    "apiVersion": "virtualization.deckhouse.io/v1alpha2",
    "kind": "VirtualMachine",
    "metadata": {"name": "linux-vm"},
    "spec": {"memory": {"size": "1Gi"}, "domainTemplate": DOMAIN_XML},
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
MODELS: list[type[Resource]] = [VirtualMachine, VirtualMachineOperation, Node, NodeInventory]


def causes(model: type[Resource], data: Any) -> tuple[tuple[str, str], ...]:
    """What is wrong with it; nothing, when it is taken."""
    try:
        parse(model, data)
    except Invalid as error:
        return error.causes or (("", ""),)
    return ()


class TestQuantities:
    @pytest.mark.parametrize(
        ("text", "count"),
        [
            ("0", 0),
            ("1000000", 1_000_000),
            ("1k", 1000),
            ("1Ki", 1024),
            ("192Mi", 192 * 2**20),
            ("2Gi", 2**31),
            ("1Ti", 2**40),
            ("3G", 3 * 10**9),
        ],
    )
    def test_are_bytes(self, text: str, count: int) -> None:
        assert quantity_bytes(text) == count

    @pytest.mark.parametrize("text", ["", "Mi", "1.5Gi", "-1Mi", "1 Mi", "1mi", "1MiB", "+1", "1Mi\n", "٣Mi", "1e9"])
    def test_anything_else_is_refused_with_what_it_is(self, text: str) -> None:
        with pytest.raises(ValueError, match="is not a quantity such as"):
            quantity_bytes(text)

    @pytest.mark.parametrize(("size", "mib"), [("1Mi", 1), ("1048577", 2), ("1Gi", 1024), ("1G", 954)])
    def test_memory_is_rounded_up_to_mib(self, size: str, mib: int) -> None:
        assert a_vm(memory=size).spec.memory_mib == mib


class TestCpu:
    @pytest.mark.parametrize(
        ("cores", "fraction", "millicores"),
        [(1, "100%", 1000), (4, "100%", 4000), (1, "1%", 10), (3, "33%", 990), (2, "25%", 500), (1024, "99%", 1013760)],
    )
    def test_reservation_is_cores_by_fraction(self, cores: int, fraction: str, millicores: int) -> None:
        assert a_vm(cores=cores, fraction=fraction).spec.cpu_millicores == millicores

    @given(st.integers(1, 1024), st.integers(1, 100))
    def test_reservation_is_the_exact_ceiling(self, cores: int, percent: int) -> None:
        exact = -(-cores * 1000 * percent // 100)
        assert a_vm(cores=cores, fraction=f"{percent}%").spec.cpu_millicores == exact

    @pytest.mark.parametrize("fraction", ["0%", "101%", "50", "05%", "", "5.5%", "Auto", "50%\n"])
    def test_fractions_out_of_range_are_refused(self, fraction: str) -> None:
        with pytest.raises(ValueError, match="must be 1% to 100%"):
            Cpu(cores=1, core_fraction=fraction)


class TestNames:
    @pytest.mark.parametrize("name", ["a", "n1", "linux-vm", "0", "a" * 63, "a--b"])
    def test_dns_labels_pass(self, name: str) -> None:
        assert check_name(name) == name

    @pytest.mark.parametrize(
        "name", ["", "A", "a_b", "-a", "a-", "a.b", "a/b", "a b", "a" * 64, "ä", "n1}", "*", "n1\n", "n1:", "²"]
    )
    def test_anything_that_could_leave_a_redis_key_or_an_acl_pattern_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="not a DNS label"):
            check_name(name)

    @given(st.text(max_size=70))
    def test_what_passes_is_made_of_harmless_characters_only(self, name: str) -> None:
        try:
            check_name(name)
        except ValueError:
            return
        assert 1 <= len(name) <= 63
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")

    def test_a_name_is_generated(self) -> None:
        meta = new_metadata(ObjectMeta(generate_name="evict-vm-"), namespaced=True, now=NOW, suffix="abcde")
        assert (meta.name, meta.namespace, meta.creation_timestamp) == ("evict-vm-abcde", "default", NOW)
        assert meta.uid

    def test_generated_names_differ(self) -> None:
        names = {new_metadata(ObjectMeta(generate_name="a-"), namespaced=True, now=NOW).name for _ in range(50)}
        assert len(names) == 50

    def test_a_long_prefix_is_cut_to_leave_room(self) -> None:
        name = new_metadata(ObjectMeta(generate_name="x" * 70), namespaced=True, now=NOW, suffix="abcde").name
        assert name == "x" * 58 + "abcde"

    @pytest.mark.parametrize(
        ("meta", "path"),
        [
            (ObjectMeta(), "metadata.name"),
            (ObjectMeta(name="A"), "metadata.name"),
            (ObjectMeta(generate_name="X-"), "metadata.name"),
            (ObjectMeta(name="a", namespace="B"), "metadata.namespace"),
        ],
    )
    def test_a_wrong_name_is_invalid_and_says_where(self, meta: ObjectMeta, path: str) -> None:
        with pytest.raises(Invalid, match=path) as error:
            new_metadata(meta, namespaced=True, now=NOW)
        assert error.value.causes[0][0] == path

    @given(st.text("abc/", min_size=1), st.text("abc"))
    def test_keys_split_into_what_they_were_made_of(self, name: str, namespace: str) -> None:
        if "/" not in name:
            assert split_key(make_key(name, namespace)) == (namespace, name)


class TestParsing:
    @given(st.sampled_from(MODELS), json_values)
    def test_any_json_gives_a_model_or_invalid(self, model: type[Resource], data: Any) -> None:
        assert all(path and why for path, why in causes(model, data))

    @given(st.data())
    def test_a_manifest_with_anything_in_one_place_gives_a_model_or_invalid(self, data: st.DataObject) -> None:
        manifest = json.loads(json.dumps(data.draw(st.sampled_from([VM, EVICT]))))
        place: dict[str, Any] = manifest
        while True:
            field = data.draw(st.sampled_from(sorted(place)) | st.text(max_size=12))
            if isinstance(place.get(field), dict) and data.draw(st.booleans()):
                place = place[field]
                continue
            place[field] = data.draw(json_values)
            break
        model = VirtualMachine if manifest.get("kind") == "VirtualMachine" else VirtualMachineOperation
        assert all(path and why for path, why in causes(model, manifest))

    def test_the_platforms_own_manifest_is_taken_unchanged(self) -> None:
        operation = parse(VirtualMachineOperation, EVICT)
        assert operation.spec.type.value == "Evict"
        assert operation.spec.force is None  # unset is not False
        assert operation.is_active

    @pytest.mark.parametrize(
        ("model", "change", "cause"),
        [
            (VirtualMachine, {"spec": {**VM["spec"], "cpus": 2}}, ("spec.cpus", "unknown field")),
            (VirtualMachine, {"spec": {"domainTemplate": DOMAIN_XML}}, ("spec.memory", "is required")),
            (VirtualMachine, {"spec": {**VM["spec"], "cpu": {"cores": 0}}}, ("spec.cpu.cores", "greater than")),
            (VirtualMachine, {"spec": {**VM["spec"], "cpu": {"coreFraction": "0%"}}}, ("spec.cpu.coreFraction", "1%")),
            (VirtualMachine, {"spec": {**VM["spec"], "memory": {"size": "2GB"}}}, ("spec.memory.size", "'2GB' is not")),
            (VirtualMachine, {"spec": {**VM["spec"], "memory": {"size": "1"}}}, ("spec.memory.size", "less than 1Mi")),
            (VirtualMachine, {"spec": {**VM["spec"], "domainTemplate": "<a/>"}}, ("spec.domainTemplate", "<a>")),
            (VirtualMachine, {"spec": {**VM["spec"], "domainTemplate": "<a"}}, ("spec.domainTemplate", "well-formed")),
            (VirtualMachineOperation, {"spec": {**EVICT["spec"], "type": "Fly"}}, ("spec.type", "'Evict'")),
            (
                VirtualMachineOperation,
                {"spec": {**EVICT["spec"], "virtualMachineName": "A"}},
                ("spec.virtualMachineName", "DNS label"),
            ),
            (
                VirtualMachineOperation,
                {"spec": {**EVICT["spec"], "migrate": {"nodeName": "n2"}}},
                ("spec", "only for type Migrate"),
            ),
            (VirtualMachineOperation, {"metadata": {"labels": {"a": 1}}}, ("metadata.labels.a", "string")),
            (VirtualMachineOperation, {"kind": "Pod"}, ("kind", "VirtualMachineOperation")),
        ],
        ids=[
            "unknown field",
            "missing",
            "too small",
            "fraction",
            "no quantity",
            "too little memory",
            "no domain",
            "broken XML",
            "type",
            "name",
            "migrate on an evict",
            "label",
            "kind",
        ],
    )
    def test_messages_name_the_path_and_the_trouble(
        self, model: type[Resource], change: dict[str, Any], cause: tuple[str, str]
    ) -> None:
        with pytest.raises(Invalid) as error:
            parse(model, {**(VM if model is VirtualMachine else EVICT), **change})
        ((path, why),) = error.value.causes
        assert path == cause[0]
        assert cause[1] in why
        assert str(error.value) == f"{path}: {why}"

    def test_each_wrong_field_is_named(self) -> None:
        spec = {"cpu": {"cores": -1}, "memory": {}, "colour": "red"}
        with pytest.raises(Invalid) as error:
            parse(VirtualMachine, {**VM, "spec": spec})
        paths = [path for path, _ in error.value.causes]
        assert paths == ["spec.cpu.cores", "spec.memory.size", "spec.colour"]

    def test_what_is_no_object_at_all_is_called_the_document(self) -> None:
        with pytest.raises(Invalid, match=r"^document: "):
            parse(VirtualMachine, ["a"])


class TestDocuments:
    @pytest.mark.parametrize(
        "resource",
        [
            a_node("n1", labels={"zone": "a"}),
            a_vm(),
            an_operation(),
            granted_operation(),
            an_inventory("n1", {"linux-vm": seen("running")}),
            an_inventory("n1", {"nameless": seen("", vm="").with_(name="", vm="")}),
            a_node("n1").with_(metadata=ObjectMeta(name="n1", annotations={"a": "grüß \U0001f600", "b": '"\\\n'})),
        ],
        ids=["node", "vm", "operation", "granted", "inventory", "empty fields", "any characters"],
    )
    def test_what_is_stored_is_read_back_as_it_was(self, resource: Resource) -> None:
        read = decode(resource.kind_name, f"7 3 {encode(resource)}")
        assert (read.version, read.created_version) == (7, 3)
        assert read.with_(metadata=resource.metadata, created_version=resource.created_version) == resource

    def test_empty_fields_are_left_out_and_false_and_zero_stay(self) -> None:
        manifest = an_operation(force=False).manifest()
        assert manifest["spec"]["force"] is False
        assert manifest["status"]["progress"] == 0
        assert "grant" not in manifest["status"]
        assert "labels" not in manifest["metadata"]

    def test_a_condition_keeps_its_time_until_its_status_changes(self) -> None:
        first = with_condition((), Condition(type="Ready", status="True", reason="A"), NOW)
        later = NOW.replace(hour=13)
        same = with_condition(first, Condition(type="Ready", status="True", reason="B"), later)
        other = with_condition(same, Condition(type="Ready", status="False"), later)
        assert [c.last_transition_time for c in (*first, *same, *other)] == [NOW, NOW, later]
        assert find_condition(same, "Ready") == same[0]
        assert same[0].reason == "B"

    def test_the_domain_is_the_template_with_the_resources_own_name_and_size(self) -> None:
        vm = a_vm(memory="192Mi", cores=3)
        template = "<domain><name>x</name><vcpu current='1'>9</vcpu><memory unit='GiB'>7</memory><devices/></domain>"
        vm = vm.with_(spec=vm.spec.with_(domain_template=template))
        xml = render_domain(vm)
        assert "<name>default.linux-vm</name>" in xml
        assert f"<uuid>{vm.metadata.uid}</uuid>" in xml
        assert '<memory unit="KiB">196608</memory>' in xml
        assert '<currentMemory unit="KiB">196608</currentMemory>' in xml
        assert "<vcpu>3</vcpu>" in xml
        assert "<devices />" in xml


def test_a_manifest_leaves_out_empty_fields_and_keeps_what_people_named() -> None:
    node = a_node("n1")
    node = node.with_(metadata=node.metadata.with_(labels={"node-role/db": ""}, annotations={}))
    shown = node.manifest()
    assert shown["metadata"]["labels"] == {"node-role/db": ""}, "a label without a value is a label"
    assert "annotations" not in shown["metadata"]
    assert "generateName" not in shown["metadata"]
    assert shown["spec"] == {"unschedulable": False, "witness": False}
    vm = a_vm("a")
    vm = vm.with_(spec=vm.spec.with_(node_selector={"gpu": ""}))
    assert vm.manifest()["spec"]["nodeSelector"] == {"gpu": ""}
    assert VirtualMachine.model_validate(vm.manifest()) == vm
