"""Label selectors as kubectl writes them."""

import pytest

from orchestrator.errors import Invalid
from orchestrator.resources.selectors import POD_NAME_LABEL, parse_selector, pod_labels, selects
from tests.builders import a_vm

WEB = {"app": "web", "tier": "front"}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("", True),
        ("app=web", True),
        ("app==web,tier=front", True),
        ("app=web,tier=back", False),
        ("app!=db", True),
        ("other!=db", True),
        ("app", True),
        ("!app", False),
        ("!other , app", True),
        ("app in (web, db)", True),
        ("app notin (web, db),tier", False),
        ("other notin (x)", True),
    ],
)
def test_selectors(text: str, holds: bool) -> None:
    assert selects(parse_selector(text), WEB) is holds


@pytest.mark.parametrize("text", [",", "app=web,", "=web", "app in web", "app in (", "a b", "app=(x"])
def test_what_is_none(text: str) -> None:
    with pytest.raises(Invalid):
        parse_selector(text)


def test_each_vm_has_its_pods_label() -> None:
    assert selects(parse_selector(POD_NAME_LABEL), pod_labels(a_vm("a")))
    assert selects(parse_selector(f"{POD_NAME_LABEL}=a"), pod_labels(a_vm("a")))
