"""Who may do what, as the table of docs/access.md says it; the expectations are written out, not computed."""

import pytest

from orchestrator.api.rights import RULES, Identity, beyond, is_allowed
from orchestrator.resources import Node, Role
from tests.builders import a_node, a_vm

READ = ("get", "list", "watch")
WRITE = ("create", "update", "patch", "delete")
NAMESPACED = ("virtualmachines", "virtualmachineoperations", "pods", "events")
WHOLE_HERD = ("nodes", "virtualmachineclasses", "namespaces")

CHANGES_OF_OPERATORS = {
    *((verb, "virtualmachines") for verb in WRITE),
    ("create", "virtualmachineoperations"),
    ("delete", "virtualmachineoperations"),
    ("create", "pods/eviction"),
}
EVERYTHING = [(verb, resource) for verb in READ + WRITE for resource in (*NAMESPACED, *WHOLE_HERD, "pods/eviction")]


def who(role: Role, *namespaces: str) -> Identity:
    return Identity("x", role, frozenset(namespaces) or None)


@pytest.mark.parametrize(("verb", "resource"), EVERYTHING)
@pytest.mark.parametrize("role", Role)
def test_of_all_namespaces(role: Role, verb: str, resource: str) -> None:
    if role is Role.ADMIN:
        expected = True
    elif verb in READ:
        expected = resource != "pods/eviction"
    else:
        cordon = resource == "nodes" and verb in {"update", "patch"}
        expected = role is Role.OPERATOR and (cordon or (verb, resource) in CHANGES_OF_OPERATORS)
    in_namespace = resource not in WHOLE_HERD
    assert is_allowed(who(role), verb, resource, "a" if in_namespace else None) is expected
    assert is_allowed(who(role), verb, resource, None) is expected


@pytest.mark.parametrize(("verb", "resource"), EVERYTHING)
@pytest.mark.parametrize("role", Role)
def test_of_one_namespace(role: Role, verb: str, resource: str) -> None:
    mine = who(role, "a", "b")
    for everywhere in (None, "c"):
        assert not is_allowed(mine, verb, resource, everywhere)
    if resource == "namespaces":
        expected = verb == "get"
    elif resource in WHOLE_HERD:
        expected = False
    else:
        expected = is_allowed(who(role), verb, resource, "a")
    assert is_allowed(mine, verb, resource, "a") is expected
    assert is_allowed(mine, verb, resource, "b") is expected


@pytest.mark.parametrize("resource", ["accesstokens", "secrets", "nodes/proxy", "pods/exec", "nodeinventories", "*"])
def test_what_is_not_in_the_table_is_an_admins(resource: str) -> None:
    for verb in (*READ, *WRITE, "*"):
        assert is_allowed(who(Role.ADMIN), verb, resource, None)
        for role in (Role.VIEWER, Role.OPERATOR):
            assert not is_allowed(who(role), verb, resource, "a")
        for role in Role:
            assert not is_allowed(who(role, "a"), verb, resource, "a")


def test_each_role_may_do_what_those_before_it_may() -> None:
    for rule in RULES:
        allowed = [rule.covers(role, verb, resource) for verb, resource in EVERYTHING[:1] for role in Role]
        assert allowed == sorted(allowed)


class TestWhatAChangeTouches:
    def test_a_domain_template_takes_an_admin_of_all_namespaces(self) -> None:
        plain, xml = a_vm("a"), a_vm("a")
        plain = plain.with_(spec=plain.spec.with_(domain_template=None))
        assert xml.spec.domain_template
        for identity in (who(Role.OPERATOR), who(Role.OPERATOR, "default"), who(Role.ADMIN, "default")):
            assert "domainTemplate" in (beyond(identity, None, xml) or "")
            assert "domainTemplate" in (beyond(identity, plain, xml) or "")
            assert beyond(identity, xml, xml) is None, "what an admin wrote stays where it is"
            assert beyond(identity, xml, plain) is None
            assert beyond(identity, None, plain) is None
            other = xml.with_(spec=xml.spec.with_(domain_template=f"{xml.spec.domain_template}<!-- -->"))
            assert "domainTemplate" in (beyond(identity, xml, other) or "")
        assert beyond(who(Role.ADMIN), None, xml) is None

    def test_an_operator_may_cordon_and_no_more(self) -> None:
        old = a_node("n1")
        cordoned = old.with_(spec=old.spec.with_(unschedulable=True))
        labelled = old.with_(metadata=old.metadata.with_(labels={"zone": "a"}))
        noted = old.with_(metadata=old.metadata.with_(annotations={"x": "y"}))
        tainted = Node.model_validate({**old.manifest(), "spec": {"taints": [{"key": "k", "effect": "NoSchedule"}]}})
        assert beyond(who(Role.OPERATOR), old, cordoned) is None
        for changed in (labelled, noted, tainted):
            assert beyond(who(Role.OPERATOR), old, changed) == "all but spec.unschedulable takes an admin"
            assert beyond(who(Role.ADMIN), old, changed) is None
