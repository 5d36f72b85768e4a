"""Who asks, and what is kept of it. What a role may do is tests/unit/test_rights.py's."""

import io
import json
import logging
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from orchestrator.api.access import OPEN_PATHS, Access
from orchestrator.api.audit import Audit, Entry, Sieve, event_of
from orchestrator.api.rights import Identity
from orchestrator.errors import Forbidden, Invalid, Unauthorized
from orchestrator.resources import AccessToken, ObjectMeta, Role
from orchestrator.resources.access_token import AccessTokenSpec, digest, token_text
from tests.builders import NOW, a_vm

SECRET = "s" * 43
TEXT = token_text("ci", SECRET)


def a_token(name: str = "ci", **spec: object) -> AccessToken:
    whole = {"role": "viewer", "sha256": digest(token_text(name, SECRET)), **spec}
    meta = ObjectMeta(name=name, uid=f"uid-of-{name}")
    return AccessToken(metadata=meta, spec=AccessTokenSpec.model_validate(whole))


class Kept(dict[str, AccessToken]):
    def get(self, kind: type[AccessToken], key: str) -> AccessToken | None:  # type: ignore[override]
        assert kind is AccessToken
        return super().get(key)


def access_with(*tokens: AccessToken, audit: Audit | None = None, later: timedelta = timedelta(0)) -> Access:
    kept = Kept({token.name: token for token in tokens})
    return Access(kept, lambda: NOW + later, audit or Audit(None))


class TestAuthentication:
    def test_a_token_is_somebody(self) -> None:
        access = access_with(a_token(), a_token("two", role="operator", namespaces=["a"]))
        assert access.authenticate(f"Bearer {TEXT}") == Identity("ci", Role.VIEWER, None, "uid-of-ci")
        two = access.authenticate(f"bearer  {token_text('two', SECRET)} ")
        assert two == Identity("two", Role.OPERATOR, frozenset({"a"}), "uid-of-two")

    @pytest.mark.parametrize(
        "header",
        [
            None,
            "",
            "Bearer",
            "Bearer ",
            f"Basic {TEXT}",
            TEXT,
            "Bearer x",
            f"Bearer {TEXT}x",
            f"Bearer {TEXT[:-1]}",
            f"Bearer {TEXT[:-1]}t",
            f"Bearer {token_text('nobody', SECRET)}",
            f"Bearer {token_text('other', SECRET)} ",
            f"Bearer {TEXT} {TEXT}",
            f"Bearer {digest(TEXT)}",
            "Bearer " + "a" * 100_000,
            "Bearer vmherd_ci_\u00ff",
        ],
    )
    def test_anything_else_is_nobody(self, header: str | None) -> None:
        other = a_token("other").with_(spec=a_token("third").spec)  # the secret is right, the name is not
        with pytest.raises(Unauthorized) as refused:
            access_with(a_token(), other).authenticate(header)
        assert SECRET not in str(refused.value)

    def test_a_token_has_its_time(self) -> None:
        token = a_token(expires_at=NOW + timedelta(hours=1))
        before, after = timedelta(minutes=59), timedelta(hours=1)
        identity = access_with(token, later=before).authenticate(f"Bearer {TEXT}")
        assert identity.expires_at == NOW + timedelta(hours=1)
        assert access_with(token, later=before).is_valid(identity)
        assert not access_with(token, later=after).is_valid(identity)
        with pytest.raises(Unauthorized, match="token 'ci' has expired"):
            access_with(token, later=after).authenticate(f"Bearer {TEXT}")

    def test_one_that_was_revoked_and_made_anew_is_another(self) -> None:
        identity = access_with(a_token()).authenticate(f"Bearer {TEXT}")
        anew = a_token().with_(metadata=ObjectMeta(name="ci", uid="another"))
        assert access_with(a_token()).is_valid(identity)
        assert not access_with().is_valid(identity)
        assert not access_with(anew).is_valid(identity)

    def test_only_four_paths_are_open(self) -> None:
        assert {"/healthz", "/readyz", "/version"} == OPEN_PATHS


class TestRefusals:
    def test_says_who_what_and_where(self) -> None:
        access = access_with()
        mine = Identity("ci", Role.VIEWER, frozenset({"b", "a"}))
        with pytest.raises(Forbidden) as refused:
            access.check(mine, "delete", "virtualmachines", "a")
        assert str(refused.value) == (
            'virtualmachines.virtualization.deckhouse.io is forbidden: User "ci" cannot delete resource '
            '"virtualmachines" in API group "virtualization.deckhouse.io" in the namespace "a" '
            "(its role is viewer in a, b)"
        )
        with pytest.raises(Forbidden) as refused:
            access.check(mine, "list", "nodes", None)
        assert str(refused.value) == (
            'nodes is forbidden: User "ci" cannot list resource "nodes" in API group "" at the cluster scope '
            "(its role is viewer in a, b)"
        )
        with pytest.raises(Forbidden, match="at the cluster scope"):
            access.check(mine, "list", "pods", "")
        access.check(mine, "list", "pods", "a")

    def test_says_what_a_change_touches(self) -> None:
        with pytest.raises(Forbidden, match=r"cannot create .*: spec.domainTemplate is any libvirt XML and takes"):
            access_with().check_change(
                Identity("ops", Role.OPERATOR, None), "create", "virtualmachines", None, a_vm("a")
            )
        access_with().check_change(Identity("boss", Role.ADMIN, None), "create", "virtualmachines", None, a_vm("a"))


class TestTheDigest:
    def test_is_in_nothing_that_is_shown(self, caplog: pytest.LogCaptureFixture) -> None:
        token = a_token()
        shown = [repr(token), str(token), json.dumps(token.manifest()), yaml.safe_dump(token.manifest())]
        logging.getLogger("x").warning("%s", token)
        for text in (*shown, caplog.text):
            assert "ci" in text
            assert digest(TEXT) not in text
            assert SECRET not in text


def entry(**changes: object) -> Entry:
    whole: dict[str, object] = {
        "at": NOW,
        "user": "ci",
        "role": "operator",
        "verb": "create",
        "resource": "virtualmachines",
        "namespace": "default",
        "name": "web",
        "outcome": 201,
    }
    return Entry(**{**whole, **changes})  # type: ignore[arg-type]


class TestAuditLines:
    def lines(self, path: Path) -> list[dict[str, object]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_who_what_when_and_what_came_of_it(self, tmp_path: Path) -> None:
        path = tmp_path / "audit.jsonl"
        access = access_with(a_token(role="operator"), audit=Audit(None, str(path)))
        identity = access.authenticate(f"Bearer {TEXT}")
        access.audit(identity, "create", "virtualmachines", "default", "web", 201, source="192.0.2.1")
        access.audit(identity, "list", "nodes", None, "", 200)
        access.audit(identity, "list", "nodes", None, "", 403, message="not yours")
        access.audit(None, "list", "nodes", None, "", 401)
        done, refused, unknown = self.lines(path)
        assert done == {
            "at": NOW.isoformat(timespec="milliseconds"),
            "user": "ci",
            "role": "operator",
            "verb": "create",
            "resource": "virtualmachines",
            "namespace": "default",
            "name": "web",
            "outcome": 201,
            "source": "192.0.2.1",
        }
        assert (refused["outcome"], refused["message"]) == (403, "not yours")
        assert "user" not in unknown
        assert path.stat().st_mode & 0o777 == 0o600
        assert SECRET not in path.read_text()

    def test_reads_where_they_are_wanted(self, tmp_path: Path) -> None:
        path = tmp_path / "audit.jsonl"
        Audit(None, str(path), reads=True).take(entry(verb="list", outcome=200))
        assert [line["verb"] for line in self.lines(path)] == ["list"]

    def test_what_is_named_with_line_breaks_is_one_line(self, tmp_path: Path) -> None:
        path = tmp_path / "audit.jsonl"
        Audit(None, str(path)).take(entry(name='a\n{"user":"root"}', message="\r\n\u2028x"))
        assert len(path.read_bytes().splitlines()) == 1
        assert path.read_text().isascii()

    def test_a_file_that_cant_be_written_is_told_at_the_start(self, tmp_path: Path) -> None:
        with pytest.raises(Invalid, match=r"VMHERD_AUDIT_LOG: .*nowhere"):
            Audit(None, str(tmp_path / "nowhere" / "audit.jsonl"))


class TestAuditEvents:
    def test_about_what_was_asked_for(self) -> None:
        event = event_of(entry())
        about = event.involved_object
        assert (about.kind, about.namespace, about.name) == ("VirtualMachine", "default", "web")
        assert (event.reason, event.type) == ("RequestDone", "Normal")
        assert event.message == "ci (operator) created VirtualMachine 'web'"
        node = event_of(entry(resource="nodes", namespace="", name="n1", verb="patch"))
        assert (node.involved_object.namespace, node.metadata.namespace) == ("", "default")
        assert node.message == "ci (operator) changed Node 'n1'"
        refused = event_of(entry(verb="delete", outcome=403, message="not yours"))
        assert (refused.reason, refused.type) == ("RequestRefused", "Warning")
        assert refused.message == "ci (operator) was refused to delete VirtualMachine 'web': 403 not yours"

    def test_an_eviction_that_goes_on_is_no_refusal(self) -> None:
        begun = event_of(entry(resource="pods/eviction", name="web-1", outcome=429, message="migrating"))
        assert (begun.type, begun.message) == ("Normal", "ci (operator) asked to evict Pod 'web-1'")
        ended = event_of(entry(resource="pods/eviction", name="web-1"))
        assert ended.message == "ci (operator) evicted Pod 'web-1'"

    def test_what_is_repeated_is_one_event_in_ten_minutes(self) -> None:
        now = [0.0]
        sieve = Sieve(lambda: now[0])
        evict = entry(resource="pods/eviction", outcome=429)
        passed = []
        for second in range(0, 1_200, 5):
            now[0] = second
            passed += [second] if sieve.lets_pass(evict) else []
        assert passed == [0, 600]
        assert sieve.lets_pass(entry(resource="pods/eviction", outcome=201)), "its end is another"

    def test_no_token_floods_the_events(self) -> None:
        now = [0.0]
        sieve = Sieve(lambda: now[0])
        assert sum(sieve.lets_pass(entry(name=f"x{i}")) for i in range(1_000)) == 60
        assert sieve.lets_pass(entry(user="other")), "others are not held back by it"
        now[0] = 60
        assert sum(sieve.lets_pass(entry(name=f"y{i}")) for i in range(1_000)) == 60


def test_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    Audit(None, "-").take(entry())
    assert json.loads(io.StringIO(capfd.readouterr().out).readline())["user"] == "ci"
