import pytest

from orchestrator.api.selectors import parse_fields, parse_labels
from orchestrator.errors import BadRequest
from tests.builders import a_vm


def test_a_parameter_that_is_no_label_selector_is_a_bad_request() -> None:
    assert parse_labels("tier=db").matches({"tier": "db"})
    with pytest.raises(
        BadRequest, match=r"^labelSelector: 'a,,b' is not a label selector: a word is missing before ','$"
    ):
        parse_labels("a,,b")


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
