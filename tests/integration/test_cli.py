"""The command `vmherd` as a person runs it, on a real Redis. No hypervisor: the tests write what nodes would report."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from orchestrator.resources import Node, OperationPhase, OperationType, VirtualMachine, VmPhase
from orchestrator.store import access
from orchestrator.store.connection import connect
from tests.builders import a_node
from tests.integration.command import EVICT, VMOP, Vmherd, on_a_terminal, vm_manifest
from tests.redis_server import free_port


@pytest.fixture
def vmherd(redis_url: str) -> Iterator[Vmherd]:
    herd = Vmherd(redis_url)
    yield herd
    herd.store.close()


class TestGet:
    def test_nothing(self, vmherd: Vmherd) -> None:
        done = vmherd.run("get", "vm")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "No resources found in default namespace.\n")
        assert vmherd.run("get", "nodes").stderr == "No resources found.\n"
        assert vmherd.run("get", "vmop", "-n", "other").stderr == "No resources found in other namespace.\n"
        assert json.loads(vmherd.ok("get", "vm", "-o", "json"))["items"] == []

    def test_all_kinds_in_all_forms(self, vmherd: Vmherd) -> None:
        vmherd.store.must_commit(vmherd.store.batch().create(a_node("h1")).create(a_node("h2")))
        vmherd.running_vm()
        operation = vmherd.ok("evict", "linux-vm", "--no-wait").strip()
        assert re.fullmatch(r"evict-linux-vm-[0-9a-f]{5}", operation)
        vmherd.ok("cordon", "h1")

        header, row = table(vmherd.ok("get", "vm"))
        assert header == ["NAME", "PHASE", "NODE", "IPADDRESS", "AGE"]
        assert row[:4] == ["linux-vm", "Running", "h1", "192.0.2.101"]
        header, row = table(vmherd.ok("get", "vmop"))
        assert header == ["NAME", "PHASE", "PROGRESS", "TYPE", "VIRTUALMACHINE", "AGE"]
        assert row[:5] == [operation, "Pending", "0%", "Evict", "linux-vm"]
        header, first, second = table(vmherd.ok("get", "node"))
        assert header == ["NAME", "STATUS", "CPU", "MEMORY", "AGE"]
        assert [first[:4], second[:4]] == [
            ["h1", "Ready,SchedulingDisabled", "8", "16Gi"],
            ["h2", "Ready", "8", "16Gi"],
        ]
        assert vmherd.ok("get", "events").splitlines()[-1].split()[1:4] == ["Normal", "NodeCordoned", "node/h1"]
        assert table(vmherd.ok("get", "vm", "-A"))[1][:2] == ["default", "linux-vm"]
        assert "Manual" in table(vmherd.ok("get", "vm", "-o", "wide"))[1]

        stored = vmherd.store.get(VirtualMachine, "default/linux-vm").manifest()
        assert json.loads(vmherd.ok("get", "vm", "linux-vm", "-o", "json")) == stored
        assert yaml.safe_load(vmherd.ok("get", "vm", "linux-vm", "-o", "yaml")) == stored
        assert yaml.safe_load(vmherd.ok("get", "vm", "-o", "yaml"))["items"] == [stored]
        name = vmherd.ok("get", "vmop", "-o", "name").strip()
        assert name == f"{VMOP}/{operation}"
        assert operation in vmherd.ok("get", name)

        told = vmherd.ok("describe", "vm", "linux-vm")
        assert re.search(r"^Node: +h1$", told, re.MULTILINE)
        assert operation in told
        assert "waits to be granted" in vmherd.ok("describe", name)
        assert "NodeCordoned" in vmherd.ok("describe", "node", "h1")

    def test_a_name_that_is_not_there_does_not_hide_the_others(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        assert vmherd.refused("get", "vm", "x") == "VirtualMachine 'x' not found in namespace 'default'"
        assert vmherd.refused("describe", "node", "x") == "Node 'x' not found"
        done = vmherd.run("get", "vm", "x", "linux-vm")
        assert (done.returncode, done.stderr) == (1, "vmherd: VirtualMachine 'x' not found in namespace 'default'\n")
        assert table(done.stdout)[1][0] == "linux-vm"

    def test_colour_on_a_terminal_only(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        assert "\x1b" not in vmherd.ok("get", "vm")
        assert "\x1b[32mRunning" in on_a_terminal(vmherd, "get", "vm")
        assert "\x1b[32mRunning" not in on_a_terminal(vmherd, "get", "vm", NO_COLOR="1")


class TestCreate:
    def test_the_platforms_manifest(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        told = vmherd.ok("create", "-f", "-", stdin=EVICT)
        assert re.fullmatch(rf"{re.escape(VMOP)}/evict-linux-vm-[0-9a-f]{{5}} created\n", told)
        (operation,) = vmherd.operations()
        assert f"/{operation.name} " in told
        assert operation.status.phase is OperationPhase.PENDING

    def test_what_get_prints(self, vmherd: Vmherd) -> None:
        vmherd.running_vm("a")
        vmherd.running_vm("b")
        names = vmherd.ok("get", "vm", "-o", "name")
        printed = vmherd.ok("get", "vm", "-o", "yaml")
        vmherd.store.redis.flushall()
        assert vmherd.ok("create", "-f", "-", "-o", "name", stdin=printed) == names
        assert {vm.status.phase for vm in vmherd.store.all(VirtualMachine)} == {VmPhase.STOPPED}

    def test_as_it_was_stored(self, vmherd: Vmherd) -> None:
        text = vm_manifest("a") + "---\n" + vm_manifest("b")
        stored = yaml.safe_load(vmherd.ok("create", "-f", "-", "-o", "yaml", "-n", "other", stdin=text))["items"]
        assert [vm["metadata"]["namespace"] for vm in stored] == ["other", "other"]
        one = json.loads(
            vmherd.ok("create", "-f", "-", "-o", "json", stdin=json.dumps(yaml.safe_load(vm_manifest("c"))))
        )
        assert one["status"]["phase"] == "Stopped"

    def test_one_bad_document_and_nothing_is_stored(self, vmherd: Vmherd) -> None:
        bad = vm_manifest("b", memory={"size": "192Mi", "swap": "1Gi"})
        told = vmherd.refused("create", "-f", "-", stdin=vm_manifest("a") + "---\n" + bad)
        assert told == "standard input: document 2: spec.memory.swap: unknown field; nothing was stored"
        assert vmherd.store.all(VirtualMachine) == []

    def test_unknown_fields_are_named_by_their_path(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        told = vmherd.refused("create", "-f", "-", stdin=EVICT + "  when: now\n")
        assert told == "standard input: spec.when: unknown field"
        assert vmherd.operations() == []

    def test_a_refused_document_does_not_hold_up_the_others(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        unknown = EVICT.replace("virtualMachineName: linux-vm", "virtualMachineName: nobody")
        done = vmherd.run("create", "-f", "-", stdin=f"{unknown}---{EVICT}")
        assert done.returncode == 1
        assert done.stderr == (
            "vmherd: standard input: document 1: VirtualMachine 'nobody' not found in namespace 'default'\n"
        )
        assert done.stdout.endswith(" created\n")

    def test_a_spec_is_immutable(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        named = EVICT.replace("generateName: evict-linux-vm-", "name: op")
        assert vmherd.ok("create", "-f", "-", stdin=named) == f"{VMOP}/op created\n"
        assert vmherd.refused("create", "-f", "-", stdin=named) == "VirtualMachineOperation 'op' already exists"
        told = vmherd.refused("create", "-f", "-", stdin=named.replace("Evict", "Migrate"))
        assert told == "VirtualMachineOperation 'op': .spec is immutable: delete it and create another"

    def test_files_that_cannot_be_read(self, vmherd: Vmherd, tmp_path: Path) -> None:
        assert vmherd.refused("create", "-f", "nowhere.yaml") == "nowhere.yaml: No such file or directory"
        assert vmherd.refused("create", "-f", str(tmp_path)) == f"{tmp_path}: Is a directory"
        told = vmherd.refused("create", "-f", "-", stdin="a: 1\nb: c: d\n")
        assert told == "standard input: line 2, column 5: mapping values are not allowed here"


class TestRefusals:
    def test_unknown_vm(self, vmherd: Vmherd) -> None:
        told = "VirtualMachine 'linux-vm' not found in namespace 'default'"
        assert vmherd.refused("create", "-f", "-", stdin=EVICT) == told
        assert vmherd.refused("evict", "linux-vm") == told
        assert vmherd.refused("delete", "vm", "linux-vm") == told

    def test_a_name_that_cannot_be_one(self, vmherd: Vmherd) -> None:
        assert "'Linux VM' is not a DNS label" in vmherd.refused("evict", "Linux VM")

    def test_vm_not_running(self, vmherd: Vmherd) -> None:
        vmherd.ok("create", "-f", "-", stdin=vm_manifest("linux-vm"))
        told = vmherd.refused("evict", "linux-vm")
        why = "Evict is not applicable: VirtualMachine 'linux-vm' is Stopped, not Running"
        assert told == f"{why} (NotApplicableForVirtualMachinePhase)"

    def test_a_second_operation(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        first = vmherd.ok("evict", "linux-vm", "--no-wait").strip()
        told = f"VMOP cannot be executed now. Previously created operation '{first}' should finish first"
        assert vmherd.refused("evict", "linux-vm") == told
        assert vmherd.refused("create", "-f", "-", stdin=EVICT) == told
        assert [operation.name for operation in vmherd.operations()] == [first]

    def test_where_it_is_and_where_nothing_is(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        vmherd.store.must_commit(vmherd.store.batch().create(a_node("h1")))
        told = vmherd.refused("migrate", "linux-vm", "--node", "h1")
        assert told == "VirtualMachine 'linux-vm' runs on node 'h1' already (spec.migrate.nodeName)"
        assert vmherd.refused("migrate", "linux-vm", "--node", "x") == "Node 'x' not found (spec.migrate.nodeName)"

    def test_a_vm_that_runs_is_stopped_before_it_is_removed(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        assert vmherd.ok("delete", "vm", "linux-vm", "--no-wait") == 'virtualmachine "linux-vm" deleted\n'
        assert [(o.spec.type, o.status.phase) for o in vmherd.operations()] == [
            (OperationType.STOP, OperationPhase.PENDING)
        ]
        assert {vm.status.phase for vm in vmherd.store.all(VirtualMachine)} == {VmPhase.TERMINATING}

    def test_one_that_does_not_run_is_removed(self, vmherd: Vmherd) -> None:
        vmherd.ok("create", "-f", "-", stdin=vm_manifest("linux-vm"))
        assert vmherd.ok("delete", "vm", "linux-vm") == 'virtualmachine "linux-vm" deleted\n'
        assert vmherd.store.all(VirtualMachine) == []


class TestNodes:
    def test_cordon(self, vmherd: Vmherd) -> None:
        vmherd.store.must_commit(vmherd.store.batch().create(a_node("h1")).create(a_node("h2")))
        assert vmherd.ok("cordon", "h1", "h2") == "node/h1 cordoned\nnode/h2 cordoned\n"
        assert vmherd.ok("cordon", "h1") == "node/h1 already cordoned\n"
        assert vmherd.ok("uncordon", "h1") == "node/h1 uncordoned\n"
        assert not vmherd.store.get(Node, "h1").spec.unschedulable
        assert vmherd.refused("uncordon", "x") == "Node 'x' not found"

    def test_a_host_gets_its_user_and_loses_it(self, vmherd: Vmherd, tmp_path: Path) -> None:
        told = vmherd.refused("node", "enroll", "h1")
        assert told == "a node can't reach 127.0.0.1 of this machine: give --address HOST:PORT"
        assert vmherd.store.redis.acl_users() == ["default"]

        address = vmherd.url.removeprefix("redis://").removesuffix("/0")
        environment = read_environment(vmherd.ok("node", "enroll", "h1", "--address", address))
        assert environment["VMHERD_NODE"] == "h1"
        theirs = connect(environment["VMHERD_REDIS_URL"])
        assert theirs.set("node:{h1}:lease", "x")

        file = tmp_path / "h1.env"
        again = vmherd.run("node", "enroll", "h1", "--address", address, "--to-file", str(file))
        assert (again.returncode, again.stdout) == (0, "node/h1 enrolled\n")
        assert again.stderr == "vmherd: node 'h1' was enrolled before: its former password no longer works\n"
        assert file.stat().st_mode & 0o777 == 0o600
        assert [p.name for p in tmp_path.iterdir()] == ["h1.env"]
        second = read_environment(file.read_text())
        assert second["VMHERD_REDIS_URL"] != environment["VMHERD_REDIS_URL"]
        assert "does not permit this user" in vmherd.refused("get", "vm", **second)

        vmherd.store.must_commit(vmherd.store.batch().create(a_node("h1")))
        told = vmherd.refused("node", "expel", "h1")
        assert told == "node 'h1' is Ready: stop its agent and its heartbeat first, or use --force"
        assert vmherd.ok("node", "expel", "h1", "--force") == "node/h1 expelled\n"
        assert vmherd.store.redis.acl_users() == ["default"]
        told = vmherd.refused("node", "expel", "h1", "--force")
        assert told == "node 'h1' is not enrolled: Redis has no user 'node-h1'"

    def test_no_password_is_lost(self, vmherd: Vmherd) -> None:
        told = vmherd.refused("node", "enroll", "h1", "--address", "192.0.2.1:6379", "--to-file", "/nowhere/h1.env")
        assert told == "/nowhere/h1.env: No such file or directory"
        assert access.user_name("h1") not in vmherd.store.redis.acl_users()


class TestWithoutRedis:
    @pytest.mark.parametrize(
        "arguments",
        [("get", "vm"), ("get", "vm", "-w"), ("describe", "vm", "a"), ("evict", "a"), ("delete", "vmop", "a"),
         ("cordon", "a"), ("create", "-f", "-"), ("node", "expel", "a")],
        ids=" ".join,
    )  # fmt: skip
    def test_one_line_says_what_and_where(self, arguments: tuple[str, ...]) -> None:
        url = f"redis://127.0.0.1:{free_port()}/0"
        assert Vmherd(url).refused(*arguments, stdin=EVICT).startswith(f"no Redis at {url}: ")

    @pytest.mark.parametrize(
        ("url", "told"),
        [
            ("http://127.0.0.1/", "VMHERD_REDIS_URL: Redis URL must specify one of the following schemes"),
            ("", "VMHERD_REDIS_URL: Redis URL must specify one of the following schemes"),
            ("127.0.0.1:6379", "VMHERD_REDIS_URL: Redis URL must specify one of the following schemes"),
            ("redis://127.0.0.1:port/0", "VMHERD_REDIS_URL: Port could not be cast to integer value as 'port'"),
            ("redis://127.0.0.1:99999/0", "VMHERD_REDIS_URL: Port out of range 0-65535"),
            ("redis://127.0.0.1/zero", "VMHERD_REDIS_URL: the database is a number, not 'zero'"),
            ("redis://127.0.0.1/0?speed=high", "VMHERD_REDIS_URL: "),
            ("redis://no-such-host.invalid/0", "no Redis at redis://no-such-host.invalid:6379/0: "),
            ("unix:///nowhere/redis.sock", "no Redis at unix:///nowhere/redis.sock: "),
        ],
    )
    def test_wrong_urls(self, vmherd: Vmherd, url: str, told: str) -> None:
        assert vmherd.refused("get", "vm", VMHERD_REDIS_URL=url).startswith(told)

    def test_wrong_password(self, vmherd: Vmherd) -> None:
        url = vmherd.url.replace("redis://", "redis://node-h1:secret@")
        told = vmherd.refused("get", "vm", VMHERD_REDIS_URL=url)
        assert told.startswith(f"Redis at {vmherd.url} refuses the user or password: ")
        assert "secret" not in told

    def test_a_wrong_setting(self, vmherd: Vmherd) -> None:
        told = vmherd.refused("get", "vm", VMHERD_GRANT_TTL="soon")
        assert told.startswith("settings: VMHERD_GRANT_TTL: ")

    def test_help_and_version_need_none(self) -> None:
        nowhere = Vmherd(f"redis://127.0.0.1:{free_port()}/0")
        assert nowhere.ok("version").startswith("vmherd ")
        assert "get" in nowhere.ok("--help")


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def read_environment(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines())
