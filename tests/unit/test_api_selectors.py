import pytest

from orchestrator.api.errors import BadRequest
from orchestrator.api.selectors import parse_fields, parse_labels
from tests.builders import a_vm

LABELS = {"tier": "db", "zone": "a", "empty": ""}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("tier=db", True),
        ("tier==db", True),
        (" tier = db , zone=a", True),
        ("tier=web", False),
        ("tier!=web", True),
        ("tier!=db", False),
        ("other!=x", True),
        ("tier", True),
        ("other", False),
        ("!other", True),
        ("!tier", False),
        ("tier in (web, db)", True),
        ("tier in (web)", False),
        ("other in (x)", False),
        ("tier notin (web)", True),
        ("tier notin (db,web)", False),
        ("other notin (x)", True),
        ("empty=", True),
        ("empty in ()", True),
        ("tier=", False),
        ("tier,zone in (a,b),!other", True),
        ("tier,zone in (b)", False),
        ("vm.example.com/name", False),
    ],
)
def test_labels(text: str, *, matches: bool) -> None:
    assert parse_labels(text).matches(LABELS) is matches


@pytest.mark.parametrize(
    "text",
    [
        "=",
        "tier=db,",
        "tier in db",
        "tier in (db",
        "tier db",
        "tier=a=b",
        "tier>1",
        "ti er",
        "-x=1",
        "a=-",
        "!",
        "a,,b",
    ],
)
def test_a_label_selector_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="labelSelector"):
        parse_labels(text)


FIELDS = {"metadata.name": lambda r: r.metadata.name, "status.phase": lambda r: r.status.phase.value}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("metadata.name=linux-vm", True),
        ("metadata.name==linux-vm,status.phase=Running", True),
        ("status.phase!=Running", False),
        ("status.phase!=Stopped,status.phase!=Failed", True),
        ("metadata.name=", False),
        (r"metadata.name=linux\,vm", False),
    ],
)
def test_fields(text: str, *, matches: bool) -> None:
    assert parse_fields(text, FIELDS).matches(a_vm()) is matches


def test_a_field_that_is_not_offered_is_named_with_those_that_are() -> None:
    with pytest.raises(BadRequest, match=r"field label not supported: 'spec.x'; known: metadata.name, status.phase"):
        parse_fields("spec.x=1", FIELDS)
    with pytest.raises(BadRequest, match="is not field=value"):
        parse_fields("metadata.name", FIELDS)


def test_the_name_that_a_field_selector_asks_for() -> None:
    assert parse_fields("metadata.name=a", FIELDS).required("metadata.name") == "a"
    assert parse_fields("metadata.name!=a", FIELDS).required("metadata.name") is None
