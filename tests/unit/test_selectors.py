"""Label selectors as kubectl writes them."""

import pytest

from orchestrator.errors import Invalid
from orchestrator.resources.selectors import LONGEST, POD_NAME_LABEL, parse_selector, pod_labels
from tests.builders import a_vm

LABELS = {"app": "web", "tier": "db", "zone": "a", "empty": ""}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("  ", True),
        ("tier=db", True),
        ("tier==db", True),
        ("app==web,tier=db", True),
        ("app=web,tier=back", False),
        (" tier = db , zone=a", True),
        ("tier=web", False),
        ("tier!=web", True),
        ("tier!=db", False),
        ("other!=x", True),
        ("tier", True),
        ("other", False),
        ("!other", True),
        ("!tier", False),
        ("! other , app", True),
        ("app in (web, db)", True),
        ("tier in(web,db)", True),
        ("tier in (web)", False),
        ("other in (x)", False),
        ("tier notin (web)", True),
        ("tier notin (db,web)", False),
        ("app notin (web, db),tier", False),
        ("other notin (x)", True),
        ("empty=", True),
        ("empty in ()", True),
        ("tier=", False),
        ("tier,zone in (a,b),!other", True),
        ("tier,zone in (b)", False),
        ("vm.example.com/name", False),
    ],
)
def test_selectors(text: str, *, matches: bool) -> None:
    assert parse_selector(text, "spec.selector").matches(LABELS) is matches


@pytest.mark.parametrize(
    "text",
    [
        "=",
        ",",
        "!",
        "=web",
        "app=web,",
        "app in web",
        "app in (",
        "app in (web",
        "app=(x",
        "app web",
        "a,,b",
        "tier=a=b",
        "tier>1",
        "-x=1",
        "a=-",
        "a" * (LONGEST + 1),
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(Invalid, match=r"^spec\.selector: .+ is not a label selector: ") as caught:
        parse_selector(text, "spec.selector")
    assert [path for path, _ in caught.value.causes] == ["spec.selector"]


def test_each_vm_has_its_pods_label() -> None:
    assert parse_selector(POD_NAME_LABEL, "spec.selector").matches(pod_labels(a_vm("a")))
    assert parse_selector(f"{POD_NAME_LABEL}=a", "spec.selector").matches(pod_labels(a_vm("a")))
    assert not parse_selector(f"{POD_NAME_LABEL}=b", "spec.selector").matches(pod_labels(a_vm("a")))
