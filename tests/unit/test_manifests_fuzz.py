"""Whatever is given as a manifest: it becomes a resource that can be kept and run, or is refused by the path of what is
wrong with it.
"""

import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.errors import Invalid
from orchestrator.resources import VirtualMachine, render_domain
from orchestrator.resources.migratable import migratable
from orchestrator.services.manifests import read_manifest
from orchestrator.store.batch import encode
from orchestrator.store.store import decode
from tests.manifests import (
    ALL,
    ATTACKS,
    FREE_FORM,
    STRUCTURED,
    TEMPLATE,
    Path,
    places,
    replaced,
    spoilt,
    value_at,
    written,
)

LONGEST_REASON = 600
fuzz = settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def wrong(data: Any) -> list[tuple[str, str]]:
    """What is wrong with a manifest; nothing when it is taken, and then it is one that can be kept and run."""
    try:
        resource = read_manifest(data)
    except Invalid as refusal:
        assert refusal.causes, f"no path: {refusal}"  # noqa: PT017 - what it says is what is tested
        assert all(path and why and len(why) < LONGEST_REASON for path, why in refusal.causes)  # noqa: PT017
        str(refusal).encode()  # it can be printed
        return list(refusal.causes)
    read = decode(resource.kind_name, f"1 1 {encode(resource)}")
    assert read.with_(metadata=resource.metadata, created_version=0) == resource
    if isinstance(resource, VirtualMachine) and resource.spec.virtual_machine_class_name is None:
        ET.fromstring(render_domain(resource))  # noqa: S314 - ours
        assert migratable(resource).reason
    return []


def test_what_is_spoilt_here_is_right_as_it_stands() -> None:
    assert [wrong(document) for document in ALL] == [[]] * len(ALL)


@fuzz
@given(spoilt())
@example({})
@example([])
@example(None)
@example(replaced(STRUCTURED, ("kind",), 10**5000))
@example(replaced(STRUCTURED, ("apiVersion",), ["a"]))
@example(replaced(STRUCTURED, ("kind",), "\ud800"))
@example(replaced(STRUCTURED, ("spec", "\ud800"), 1))
@example(replaced(STRUCTURED, ("metadata",), None))
@example(replaced(STRUCTURED, ("metadata", "labels"), {"app": "\ud800"}))
@example(replaced(STRUCTURED, ("metadata", "annotations"), {"example.com/note": "\ud800"}))
def test_it_is_taken_or_refused_by_its_path(document: Any) -> None:
    wrong(document)


def _of_models() -> list[tuple[int, Path]]:
    """Every place that is one of our models: its fields are ours to name."""
    return [
        (number, place)
        for number, document in enumerate(ALL)
        for place in places(document)
        if isinstance(found := value_at(document, place), dict)
        and not (place and place[-1] in FREE_FORM and not found.keys() & {"matchLabels", "matchExpressions"})
    ]


@pytest.mark.parametrize(("number", "place"), _of_models())
@pytest.mark.parametrize("name", ["colour", "Spec", "cpu ", "metadata.name", "ä\u202e", "__class__", "x" * 500])
def test_an_unknown_field_is_named_at_every_depth(number: int, place: Path, name: str) -> None:
    causes = wrong(replaced(ALL[number], (*place, name), 1))
    shown = written((*place, name if name.isprintable() else name.encode("unicode_escape").decode()))
    assert any(why == "unknown field" and path.rstrip("…") == shown[: len(path.rstrip("…"))] for path, why in causes)


@pytest.mark.parametrize(
    ("number", "place"),
    [
        (number, place)
        for number, document in enumerate(ALL)
        for place in places(document)
        if len(place) > 1 and not isinstance(value_at(document, place), str)
    ],
)
@pytest.mark.parametrize(
    "value",
    ["", "\x00", {1: 2}, [[]], {"a": {}}, float("nan"), -(10**5000)],
    ids=["empty", "NUL", "number as key", "lists", "mapping", "nan", "huge"],
)
def test_a_value_of_the_wrong_type_is_refused_where_it_stands(number: int, place: Path, value: Any) -> None:
    causes = wrong(replaced(ALL[number], place, value))
    where = written(place)
    assert causes
    assert any(path.startswith(where) or where.startswith(path) for path, _ in causes)


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_a_template_that_attacks_its_reader_is_refused(attack: str) -> None:
    ((path, why),) = wrong(replaced(TEMPLATE, ("spec", "domainTemplate"), attack))
    assert path == "spec.domainTemplate"
    assert "passwd" not in why


@fuzz
@given(st.data())
def test_a_template_of_any_shape_is_taken_or_refused(data: st.DataObject) -> None:
    tags = st.sampled_from(["devices", "disk", "target", "os", "type", "cpu", "model", "address", "vcpu", "a b", "x:y"])
    words = st.sampled_from(["pci", "0x0", "-1", "1" * 5000, "ua-x", "vda", "", "ä", "&lt;", "drive", "pc", "q35"])
    names = st.sampled_from(["type", "dev", "slot", "index", "name", "address", "order", "machine", "x:y"])
    attribute = st.tuples(names, words).map(lambda pair: f"{pair[0]}='{pair[1]}'")
    leaf = st.builds(lambda tag, given_: f"<{tag} {' '.join(given_)}/>", tags, st.lists(attribute, max_size=3))
    other = st.sampled_from(["text", "<!-- note -->", "<?pi?>", "<![CDATA[x]]>", "\ud800", "\x01", "&amp;", "]]>"])

    def element(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.builds(lambda tag, parts: f"<{tag}>{''.join(parts)}</{tag}>", tags, st.lists(inner, max_size=4))

    body = data.draw(st.recursive(leaf | other, element, max_leaves=12))
    wrong(replaced(TEMPLATE, ("spec", "domainTemplate"), f"<domain type='kvm'>{body}</domain>"))


@pytest.mark.parametrize("kind", ["alias of itself", "nested", "wide", "long"])
def test_a_document_without_bounds_is_refused(kind: str) -> None:
    value: Any = []
    if kind == "alias of itself":
        value.append(value)
    elif kind == "nested":
        for _ in range(5000):
            value = [value]
    elif kind == "wide":
        for _ in range(40):
            value = [value, value]
        for _ in range(3):
            value = [value] * 50
    else:
        value = "x" * 2**21
    ((path, _),) = wrong({**STRUCTURED, "spec": {"more": value}})
    assert path == "document"
