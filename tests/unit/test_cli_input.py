"""What people write: on the command line and in manifests."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from orchestrator.cli.arguments import parse_duration, parse_kind, parse_labels, parse_targets
from orchestrator.cli.create import Document, read_documents
from orchestrator.cli.main import COMMANDS, app, explain
from orchestrator.cli.nodes import node_url
from orchestrator.errors import Invalid, NotFound
from orchestrator.resources import Event, Node, Resource, VirtualMachine, VirtualMachineClass, VirtualMachineOperation
from orchestrator.services.manifests import read_manifest


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("vm vms VM virtualmachine VirtualMachines virtualmachines.virtualization.deckhouse.io", VirtualMachine),
        ("vmop vmops virtualmachineoperation virtualmachineoperations", VirtualMachineOperation),
        ("vmclass vmclasses virtualmachineclass virtualmachineclasses", VirtualMachineClass),
        ("node nodes no", Node),
        ("event events ev", Event),
    ],
)
def test_kinds_by_all_their_names(words: str, kind: type[Resource]) -> None:
    assert {parse_kind(word) for word in words.split()} == {kind}


@pytest.mark.parametrize("word", ["pod", "", "nodeinventory"])
def test_no_kind(word: str) -> None:
    kinds = "vm, vmclass, vmop, node, drain, maintenance, rebalance, fencing or event"
    with pytest.raises(typer.BadParameter, match=f"is not a kind: {kinds}"):
        parse_kind(word)


def test_names() -> None:
    assert parse_targets("vm", None) == (VirtualMachine, [])
    assert parse_targets("vm", ["b", "a", "b"]) == (VirtualMachine, ["b", "a"])
    assert parse_targets("virtualmachine.virtualization.deckhouse.io/a", ["vm/b"]) == (VirtualMachine, ["a", "b"])


@pytest.mark.parametrize(
    ("kind", "names"), [("vm/a", ["vmop/b"]), ("vm", ["vm/a"]), ("vm", [""]), ("vm/", []), ("vm/a", ["b"]), ("vm", [])]
)
def test_wrong_names(kind: str, names: list[str]) -> None:
    with pytest.raises(typer.BadParameter):
        parse_targets(kind, names, needs_name=True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("1h5s", 3605),
        ("0.5s", 0.5),
        ("30d", 2_592_000),
        ("1d12h", 129_600),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "10x", "m", "1.5h", "5m1h"])
def test_no_duration(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a duration such as"):
        parse_duration(text)


def test_labels() -> None:
    assert parse_labels([]) == {}
    assert parse_labels(["a=1,b=", "c=x=y"]) == {"a": "1", "b": "", "c": "x=y"}


@pytest.mark.parametrize("text", ["a", "=1", "a=1,", "a=1,a=2", ""])
def test_no_labels(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not key=value"):
        parse_labels([text])


class TestManifests:
    def test_documents_are_numbered_and_lists_taken_apart(self, tmp_path: Path) -> None:
        text = "a: 1\n---\n# nothing\n---\nkind: List\nitems:\n- b: 2\n- c: 3\n"
        file = written(tmp_path, text)
        assert list(read_documents(file)) == [
            Document(f"{file}: document 1", {"a": 1}),
            Document(f"{file}: document 2: items[0]", {"b": 2}),
            Document(f"{file}: document 2: items[1]", {"c": 3}),
        ]

    @pytest.mark.parametrize("text", ['{"a": "\\u00e9"}', '{\n\t"a": "é"\n}', "{a: é}", "\ufeffa: é"])
    def test_json_and_what_looks_like_it(self, tmp_path: Path, text: str) -> None:
        file = written(tmp_path, text)
        assert list(read_documents(file)) == [Document(file, {"a": "é"})]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: 1\nb: c: d\n", "line 2, column 5: mapping values are not allowed here"),
            ("a: 1\nb: 2\na: 3\n", "line 3, column 1: key 'a' is given twice"),
            ('{"a": 1,\n"b" 2}', "line 2, column 5: expected ',' or '}'"),
            ("a: !!python/object:os.system {}", "line 1, column 4: could not determine a constructor"),
            ("a: \x00", "special characters are not allowed"),
            ("---\n---\n", "has no manifest in it"),
        ],
    )
    def test_no_manifest(self, tmp_path: Path, text: str, message: str) -> None:
        file = written(tmp_path, text)
        with pytest.raises(Invalid) as caught:
            list(read_documents(file))
        assert str(caught.value).startswith(f"{file}: ")
        assert message in str(caught.value)

    def test_not_text(self, tmp_path: Path) -> None:
        file = tmp_path / "m.yaml"
        file.write_bytes(b"a: \xff\xfe")
        with pytest.raises(Invalid, match=r"is not UTF-8 text \(byte 3\)"):
            list(read_documents(str(file)))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"spec": {"type": "Evict", "virtualMachineName": "a", "when": "now"}}, "spec.when: unknown field"),
            ({"spec": {"type": "Evict"}}, "spec.virtualMachineName: is required"),
            ({"spec": {"type": "Teleport", "virtualMachineName": "a"}}, "spec.type: "),
            ({"metadata": {}}, "metadata.name: a name or a generateName is needed"),
            ({"metadata": {"name": "A B"}}, "metadata.name: 'A B' is not a DNS label"),
            ({"metadata": {"name": "a", "namespace": "other"}}, "metadata.namespace: is 'other'"),
            ({"kind": "Pod"}, "kind: Pod of virtualization.deckhouse.io/v1alpha2 can't be created; known: "),
        ],
    )
    def test_wrong_fields_are_named_by_their_path(self, change: dict[str, Any], message: str) -> None:
        manifest = {
            "apiVersion": "virtualization.deckhouse.io/v1alpha2",
            "kind": "VirtualMachineOperation",
            "metadata": {"generateName": "evict-a-"},
            "spec": {"type": "Evict", "virtualMachineName": "a"},
        }
        assert read_manifest(manifest, "project").metadata.namespace == "project"
        with pytest.raises(Invalid) as caught:
            read_manifest({**manifest, **change}, "project")
        assert message in str(caught.value)


class TestNodeUrl:
    @pytest.mark.parametrize(
        ("ours", "address", "theirs"),
        [
            ("redis://:secret@redis.example:6379/0", "", "redis://node-h1:p%2Fw@redis.example:6379/0"),
            (
                "rediss://u:s@redis.example/2?ssl_cert_reqs=none",
                "",
                "rediss://node-h1:p%2Fw@redis.example/2?ssl_cert_reqs=none",
            ),
            ("redis://127.0.0.1:6379", "192.0.2.1:6380", "redis://node-h1:p%2Fw@192.0.2.1:6380/0"),
            ("redis://redis.example:1/0", "[2001:db8::1]:6379", "redis://node-h1:p%2Fw@[2001:db8::1]:6379/0"),
            ("unix:///run/redis.sock?db=3", "192.0.2.1:6379", "redis://node-h1:p%2Fw@192.0.2.1:6379/3"),
        ],
    )
    def test_made_of_ours(self, ours: str, address: str, theirs: str) -> None:
        assert node_url(ours, address, "h1", "p/w") == theirs

    @pytest.mark.parametrize(
        "ours",
        ["redis://127.0.0.1/0", "redis://localhost:6379/0", "redis://[::1]:6379/0", "redis:///0", "unix:///run/r.sock"],
    )
    def test_what_only_we_can_reach_needs_an_address(self, ours: str) -> None:
        with pytest.raises(Invalid, match=r"a node can't reach .* of this machine: give --address HOST:PORT"):
            node_url(ours, "", "h1", "p")

    @pytest.mark.parametrize("address", ["host", "host:", ":6379", "host:port", "a@host:1", "host:1/0", "host:99999"])
    def test_wrong_address(self, address: str) -> None:
        with pytest.raises(Invalid, match="is not HOST:PORT"):
            node_url("redis://redis.example/0", address, "h1", "p")


@pytest.mark.parametrize(
    "line",
    [
        "get",
        "get pods",
        "get vm -o table",
        "get vm x -A",
        "describe vm",
        "evict",
        "delete vm",
        "delete node h1",
        "evict a --timeout soon",
        "migrate a -l rack",
        "node enroll H1",
        "create",
        "frobnicate",
    ],
)
def test_wrong_usage(line: str) -> None:
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 2
    assert "Usage: " in done.output


def test_every_command_has_help_with_an_example() -> None:
    groups = {
        "failover": ("arm", "disarm"),
        "fence": ("status", "set", "test", "confirm"),
        "maintenance": ("pause", "resume", "stop"),
        "node": ("enroll", "expel"),
        "plan": ("failure",),
        "token": ("create", "revoke", "list"),
    }
    lines = [[name] for name in COMMANDS if name not in {*groups, "run"}]
    lines += [[group, name] for group, names in groups.items() for name in names]
    texts = {" ".join(line): CliRunner().invoke(app, [*line, "--help"]).output for line in lines}
    assert [name for name, text in texts.items() if "$ vmherd" not in text] == []


def test_errors_in_one_line() -> None:
    assert explain(NotFound("Node 'x' not found")) == "Node 'x' not found"
    assert explain(FileNotFoundError(2, "No such file or directory", "vm.yaml")) == "vm.yaml: No such file or directory"
    assert explain(KeyError("x")) == "unexpected KeyError: 'x' (VMHERD_DEBUG=1 shows where)"


def test_ctrl_c_while_a_destructor_runs_is_not_lost() -> None:
    """Python drops what is raised there."""
    code = """
import os, signal, sys, time
from orchestrator.cli.main import main

class Closing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

def wait_for_ever(*words):
    Closing()
    while True:
        time.sleep(10)

sys.modules["orchestrator.cli.main"].app = wait_for_ever
main()
"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=20, check=False)
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"


def written(folder: Path, text: str) -> str:
    file = folder / "m.yaml"
    file.write_text(text)
    return str(file)
