"""A herd used from afar: the real `vmherd api` with TLS, and what people use it with: kubectl, `vmherd`, Python.

No hypervisor: the tests write what nodes would report.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from httpcore._synchronization import ThreadLock

from orchestrator import Cluster
from orchestrator.api.tls import ensure_certificate
from orchestrator.client import Scope
from orchestrator.client.place import Place
from orchestrator.client.remote import RemoteClient
from orchestrator.client.session import ApiSession
from orchestrator.errors import NotFound, Refused, StoreUnavailable, Unauthorized
from orchestrator.resources import (
    AccessToken,
    Event,
    Maintenance,
    Node,
    NodeDrain,
    NodeFencing,
    OperationPhase,
    OperationType,
    Reason,
    RebalancePolicy,
    Role,
    RunPolicy,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
)
from orchestrator.resources.maintenance import MaintenancePhase, NodeMaintenance, NodeStage
from orchestrator.services.context import Context
from orchestrator.services.recovery import check_identity
from orchestrator.services.tokens import create_token
from orchestrator.settings import settings
from tests.builders import a_node, a_vm, granted_operation
from tests.fakes import Outbox
from tests.integration.command import EVICT, VMOP, OnScreen, Running, Vmherd, on_a_terminal, vm_manifest
from tests.processes import Processes
from tests.redis_server import RedisServer, free_port
from tests.requirements import need_kubectl
from tests.waiting import wait_until


@dataclass
class Site:
    """A Redis, one API server on it, and what clients are given.

    Attributes:
        local: The command on Redis itself.
    """

    url: str
    redis: RedisServer
    folder: Path
    processes: Processes
    local: Vmherd

    @property
    def ca_file(self) -> Path:
        return self.folder / "tls" / "ca.crt"

    @property
    def audit(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.folder / "audit.jsonl").read_text().splitlines()]

    def token(self, name: str, role: Role = Role.ADMIN, namespaces: list[str] | None = None) -> str:
        store = self.local.store
        if store.find(AccessToken, name) is not None:
            store.must_commit(store.batch().delete(store.get(AccessToken, name)))
        text = create_token(Context(store, Outbox()), name, role, namespaces)[1]
        wait_until(lambda: self.is_known(text), 20, "the token is known")
        return text

    def is_known(self, token: str) -> bool:
        session = ApiSession(Place(self.url, token, self.ca_file.read_text()))
        try:
            session.read("/api")
        except Unauthorized:
            return False
        finally:
            session.close()
        return True

    def clear(self) -> None:
        """Remove what a test made, but for the tokens: the server would load all anew after a flush."""
        store = self.local.store
        made = (VirtualMachine, VirtualMachineOperation, Node, NodeDrain, Maintenance, RebalancePolicy, NodeFencing)
        for kind in made:
            for resource in store.all(kind):
                store.must_commit(store.batch().delete(resource))


class Remote(Vmherd):
    """The command as on a machine that reaches the API and no Redis."""

    def __init__(self, site: Site, token: str) -> None:
        self.url = site.url
        self.store = site.local.store
        self.site = site
        self.token = token

    def environment(self, **more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("VMHERD_")}
        given = {"VMHERD_SERVER": self.url, "VMHERD_TOKEN": self.token, "VMHERD_CA_FILE": str(self.site.ca_file)}
        return {**kept, **given, "VMHERD_SIM_DIR": str(self.site.folder / "none"), "COLUMNS": "120", **more}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    redis = RedisServer(folder / "redis")
    redis.start()
    port = free_port()
    given = {
        "VMHERD_API_PORT": str(port),
        "VMHERD_TLS_DIR": str(folder / "tls"),
        "VMHERD_AUDIT_LOG": str(folder / "audit.jsonl"),
    }
    try:
        with Processes(redis.url, folder, **given) as processes:
            processes.start("api", "-m", "orchestrator.cli", "api")
            local = Vmherd(redis.url)
            site = Site(f"https://localhost:{port}", redis, folder, processes, local)
            wait_until(lambda: is_up(site), 60, processes.logs)
            yield site
            local.store.close()
    finally:
        redis.kill()


def is_up(site: Site) -> bool:
    try:
        return not site.is_known("nobody's")
    except (FileNotFoundError, StoreUnavailable):
        return False


@pytest.fixture
def root(site: Site) -> Iterator[Remote]:
    """The command with all rights."""
    yield Remote(site, site.token("root"))
    site.clear()


class TestKubectl:
    pytestmark = pytest.mark.kubectl

    def kubectl(self, config: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
        program = need_kubectl()
        return subprocess.run(
            [program, "--kubeconfig", config, "--request-timeout", "20s", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
        )

    def written(self, site: Site, folder: Path, token: str, **environment: str) -> Path:
        path = folder / "kubeconfig"
        given = {"VMHERD_TLS_DIR": str(site.folder / "tls"), "VMHERD_TOKEN": token, **environment}
        said = site.local.ok("kubeconfig", "--server", site.url, "--to-file", str(path), **given)
        assert said == f"{path} written\n"
        assert path.stat().st_mode & 0o777 == 0o600
        return path

    def test_trusts_the_generated_ca(self, site: Site, root: Remote, tmp_path: Path) -> None:
        root.store.must_commit(root.store.batch().create(a_node("h1")))
        config = self.written(site, tmp_path, root.token)
        nodes = self.kubectl(config, "get", "nodes")
        assert (nodes.returncode, nodes.stderr) == (0, ""), nodes
        assert nodes.stdout.splitlines()[1].split()[0] == "h1"
        assert "PRIVATE" not in config.read_text()

    def test_with_another_ca_fails(self, site: Site, root: Remote, tmp_path: Path) -> None:
        other = tmp_path / "other"
        ensure_certificate(other, ("localhost",), datetime.now(UTC))
        config = self.written(site, tmp_path, root.token, VMHERD_CA_FILE=str(other / "ca.crt"))
        refused = self.kubectl(config, "get", "nodes")
        assert refused.returncode != 0
        assert "certificate signed by unknown authority" in refused.stderr

    def test_with_a_wrong_or_a_small_token_fails(self, site: Site, tmp_path: Path) -> None:
        config = self.written(site, tmp_path, "vmherd_root_" + "x" * 43)
        unknown = self.kubectl(config, "get", "nodes")
        assert unknown.returncode != 0
        assert "Unauthorized" in unknown.stderr or "must be logged in" in unknown.stderr
        viewer = self.written(site, tmp_path, site.token("viewer", Role.VIEWER, ["default"]))
        assert self.kubectl(viewer, "get", "vm").returncode == 0
        for words in (("get", "nodes"), ("get", "vm", "-A"), ("get", "vm", "-n", "kube-system"), ("cordon", "h1")):
            refused = self.kubectl(viewer, *words)
            assert refused.returncode != 0, words
            assert 'User "viewer" cannot' in refused.stderr, refused

    def test_asks_what_it_may(self, site: Site, tmp_path: Path) -> None:
        config = self.written(site, tmp_path, site.token("ops", Role.OPERATOR, ["default"]))
        for words, answer in (
            (("create", "vmop"), "yes"),
            (("patch", "vmop"), "no"),
            (("list", "nodes"), "no"),
            (("create", "pods", "--subresource", "eviction"), "yes"),
            (("create", "vmop", "-n", "other"), "no"),
            (("*", "*"), "no"),
        ):
            asked = self.kubectl(config, "auth", "can-i", *words)
            assert asked.stdout.split()[0] == answer, (words, asked)
        who = self.kubectl(config, "auth", "whoami", "-o", "json")
        assert json.loads(who.stdout)["status"]["userInfo"]["username"] == "ops", who


class TestTheCommand:
    def test_reads(self, root: Remote) -> None:
        root.store.must_commit(root.store.batch().create(a_node("h1")))
        root.running_vm()
        for words in (
            ("get", "vm", "-A", "-o", "wide"),
            ("get", "nodes", "-o", "json"),
            ("describe", "vm", "linux-vm"),
            ("describe", "node", "h1"),
        ):
            mine, theirs = root.run(*words), root.site.local.run(*words)
            assert mine.returncode == theirs.returncode == 0
            assert (ageless(mine.stdout), mine.stderr) == (ageless(theirs.stdout), theirs.stderr), words
        assert root.refused("get", "vm", "x") == "VirtualMachine 'x' not found in namespace 'default'"

    def test_writes_manifests(self, root: Remote) -> None:
        text = vm_manifest("a")
        made = "virtualmachine.virtualization.deckhouse.io/a"
        assert root.ok("create", "-f", "-", stdin=text) == f"{made} created\n"
        assert root.refused("create", "-f", "-", stdin=text).endswith('"a" already exists')
        assert root.ok("apply", "-f", "-", stdin=text) == f"{made} unchanged\n"
        assert root.ok("apply", "-f", "-", stdin=vm_manifest("a", memory={"size": "256Mi"})) == f"{made} configured\n"
        bad = root.refused("create", "-f", "-", stdin=vm_manifest("b", memory={"size": "192Mi", "swap": "1Gi"}))
        assert bad == "standard input: spec.memory.swap: unknown field"
        assert root.ok("delete", "vm", "a") == 'virtualmachine "a" deleted\n'
        assert root.store.find(VirtualMachine, "default/a") is None

    def test_writes_of_nodes(self, root: Remote) -> None:
        root.store.must_commit(root.store.batch().create(a_node("h1")).create(a_node("h2")))
        assert root.ok("cordon", "h1", "h2") == "node/h1 cordoned\nnode/h2 cordoned\n"
        assert root.ok("uncordon", "h1") == "node/h1 uncordoned\n"
        assert root.ok("node", "label", "h1", "zone=a", "role=") == "node/h1 labelled\n"
        assert root.ok("node", "taint", "h1", "db=x:NoSchedule") == "node/h1 tainted\n"
        nodes = [root.store.get(Node, name) for name in ("h1", "h2")]
        assert [node.spec.unschedulable for node in nodes] == [False, True]
        assert nodes[0].metadata.labels == {"zone": "a", "role": ""}
        assert [str(taint) for taint in nodes[0].spec.taints] == ["db=x:NoSchedule"]

    def test_operations(self, root: Remote) -> None:
        root.store.must_commit(root.store.batch().create(a_node("h1")).create(a_node("h2")))
        for command, kind in (
            (("evict", "vm-1"), OperationType.EVICT),
            (("migrate", "vm-2", "--node", "h2"), OperationType.MIGRATE),
            (("stop", "vm-3", "--force"), OperationType.STOP),
            (("restart", "vm-4"), OperationType.RESTART),
        ):
            root.running_vm(command[1])
            name = root.ok(*command, "--no-wait").strip()
            assert root.store.get(VirtualMachineOperation, f"default/{name}").spec.type is kind

    def test_an_operation_is_taken_back_or_refused(self, root: Remote) -> None:
        stopped = a_vm("vm-5", node="", phase=VmPhase.STOPPED, policy=RunPolicy.MANUAL)
        root.store.must_commit(root.store.batch().create(stopped))
        name = root.ok("start", "vm-5", "--no-wait").strip()
        assert root.store.get(VirtualMachineOperation, f"default/{name}").spec.type is OperationType.START
        refused = root.refused("start", "vm-5", "--no-wait")
        assert refused.startswith("VMOP cannot be executed now. Previously created operation")
        assert root.ok("delete", "vmop", name) == f'virtualmachineoperation "{name}" deleted\n'
        assert root.refused("evict", "x", "--no-wait") == "VirtualMachine 'x' not found in namespace 'default'"

    def test_follows_an_operation_to_its_end(self, root: Remote) -> None:
        root.running_vm()
        with Running(root, "create", "--wait", "-f", write(root, EVICT)) as waiting:
            waiting.wait(lambda lines: any("Pending" in line for line in lines))
            (operation,) = root.operations()
            root.step(operation.name, Reason.SYNCING, "half", phase=OperationPhase.IN_PROGRESS, progress=50)
            waiting.wait(lambda lines: any("InProgress" in line for line in lines))
            root.step(operation.name, Reason.OPERATION_COMPLETED, "moved", phase=OperationPhase.COMPLETED, progress=100)
            assert waiting.ended() == 0
            assert waiting.lines[0] == f"{VMOP}/{operation.name} created"
            assert "Completed" in waiting.lines[-1]

    def test_watches(self, root: Remote) -> None:
        root.running_vm()
        with Running(root, "get", "vm", "-w") as watching:
            watching.wait(lambda lines: len(lines) == 2)
            root.set_vm("linux-vm", node_name="h7")
            watching.wait(lambda lines: len(lines) == 3)
            assert "h7" in watching.lines[2]

    def test_a_watch_goes_on_when_the_server_is_back(self, root: Remote) -> None:
        root.running_vm()
        api = root.site.processes.all["api"]
        with Running(root, "get", "vm", "-w") as watching:
            watching.wait(lambda lines: len(lines) == 2)
            api.hold()
            api.kill()
            wait_until(lambda: watching.errors, 30, "it is told")
            root.set_vm("linux-vm", node_name="h8")
            api.release()
            watching.wait(lambda lines: len(lines) == 3)
            assert "h8" in watching.lines[2]
            assert len(watching.errors) == 1
            assert watching.errors[0].startswith(f"vmherd: no API at {root.url}: ")
            assert watching.errors[0].endswith("; goes on when it is back")

    def test_with_a_kubeconfig_alone(self, root: Remote, tmp_path: Path) -> None:
        root.running_vm()
        path = tmp_path / "config"
        path.write_text(
            root.site.local.ok(
                "kubeconfig",
                "--server",
                root.url,
                "--ca-file",
                str(root.site.ca_file),
                "--token",
                "-",
                stdin=root.token,
            )
        )
        alone = {"VMHERD_SERVER": "", "VMHERD_TOKEN": "", "VMHERD_CA_FILE": "", "VMHERD_KUBECONFIG": str(path)}
        environment = {key: value for key, value in root.environment().items() if key not in alone}
        environment["VMHERD_KUBECONFIG"] = str(path)
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli", "get", "vm"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "linux-vm" in done.stdout

    def test_a_small_token_is_told_in_one_line(self, root: Remote) -> None:
        root.running_vm()
        viewer = Remote(root.site, root.site.token("viewer", Role.VIEWER, ["default"]))
        assert "linux-vm" in viewer.ok("get", "vm")
        assert "linux-vm" in viewer.ok("describe", "vm", "linux-vm")
        for words in (("cordon", "h1"), ("get", "vm", "-A"), ("delete", "vm", "linux-vm")):
            assert 'is forbidden: User "viewer" cannot' in viewer.refused(*words)

    def test_bad_ways_in_are_told_in_one_line(self, root: Remote, tmp_path: Path) -> None:
        assert re.fullmatch(
            r"the token is not valid: wrong, or revoked \(VMHERD_TOKEN\)",
            root.refused("get", "vm", VMHERD_TOKEN="vmherd_x_" + "x" * 43),
        )
        closed = f"https://localhost:{free_port()}"
        assert root.refused("get", "vm", VMHERD_SERVER=closed).startswith(f"no API at {closed}: ")
        other = tmp_path / "tls"
        ensure_certificate(other, ("localhost",), datetime.now(UTC))
        untrusted = root.refused("get", "vm", VMHERD_CA_FILE=str(other / "ca.crt"))
        assert untrusted.startswith(f"{root.url} is not trusted: ")
        redis = f"http://localhost:{root.site.redis.port}"
        assert redis in root.refused("get", "vm", VMHERD_SERVER=redis)

    def test_what_needs_redis_says_so(self, root: Remote) -> None:
        for words in (("token", "list"), ("node", "enroll", "h1", "--address", "192.0.2.1:6379")):
            told = root.refused(*words)
            assert told == (
                "this command works on Redis itself: set VMHERD_REDIS_URL; VMHERD_SERVER is not enough for it"
            )


class TestUpkeep:
    """The commands that keep a herd in order, from a machine without Redis."""

    @pytest.fixture(autouse=True)
    def herd(self, root: Remote) -> None:
        check_identity(Context(root.store, Outbox()))
        root.store.must_commit(root.store.batch().create(a_node("h1")).create(a_node("h2")))
        root.running_vm()

    def test_drains(self, root: Remote) -> None:
        planned = root.ok("drain", "h1", "--dry-run")
        assert re.search(r"1 +default/linux-vm +1Gi +h1 +h2 ", planned)
        assert root.store.all(NodeDrain) == []
        with Running(root, "drain", "h1", "--timeout", "10m") as draining:
            draining.wait(lambda lines: any(line.startswith("h1: Draining: ") for line in lines))
            (operation,) = root.operations()
            draining.wait(lambda lines: any(operation.name in line for line in lines))
            assert draining.interrupt() == 130
        assert draining.lines[0] == "node/h1 cordoned"
        assert draining.errors[-1].startswith("vmherd: node h1: the drain is stopped; nothing is under way.")
        assert root.operations() == []
        assert re.search(r"^h1 +Cancelled +", root.ok("get", "drain"), re.MULTILINE)
        assert root.ok("uncordon", "h1", "--bring-back") == "node/h1 uncordoned\n"

    def test_maintains(self, root: Remote) -> None:
        hook = ("--hook", "echo $VMHERD_NODE/$VMHERD_ATTEMPT; exit 3", "--name", "october")
        with Running(root, "maintain", "h1", *hook) as maintaining:
            maintaining.wait(lambda lines: "maintenance/october: Running, 1 nodes" in lines)
            assert root.ok("maintenance", "pause", "october") == "maintenance/october paused\n"
            assert root.ok("maintenance", "resume", "october") == "maintenance/october running\n"
            root.ok("cordon", "h1")
            stored = root.store.get(Maintenance, "october")
            drained = stored.with_node("h1", NodeMaintenance(stage=NodeStage.DRAINED))
            root.store.must_commit(root.store.batch().put(stored, drained))
            maintaining.wait(lambda lines: "h1: hook ended with code 3" in lines)
            assert maintaining.interrupt() == 130
        node = root.store.get(Maintenance, "october").node("h1")
        assert (node.exit_code, node.output) == (3, "h1/1")
        assert root.ok("maintenance", "stop", "october") == "maintenance/october stopping\n"

    def test_what_takes_its_time_shows_on_a_terminal_that_it_goes_on(self, root: Remote) -> None:
        assert "plans what to move" in on_a_terminal(root, "rebalance", "--dry-run", COLUMNS="120")
        assert "plans where each VM would go" in on_a_terminal(root, "drain", "h1", "--dry-run", COLUMNS="120")
        assert "plans" not in root.ok("drain", "h1", "--dry-run")
        with OnScreen(root, "maintain", "h1", "--hook", "true", "--name", "november", COLUMNS="120") as screen:
            screen.read_until("nodes done")
            screen.read_until("0/1")
            root.ok("cordon", "h1")
            stored = root.store.get(Maintenance, "november")
            drained = stored.with_node("h1", NodeMaintenance(stage=NodeStage.DRAINED))
            root.store.must_commit(root.store.batch().put(stored, drained))
            screen.read_until("h1: hook ended with code 0")
            stored = root.store.get(Maintenance, "november")
            done = stored.with_node("h1", NodeMaintenance(stage=NodeStage.DONE))
            root.store.must_commit(root.store.batch().put(stored, done.with_status(phase=MaintenancePhase.COMPLETED)))
            screen.read_until("1/1")
            screen.read_until("maintenance/november: Completed")
            assert screen.ended() == 0

    def test_top_is_the_same_by_both_ways(self, root: Remote) -> None:
        root.store.must_commit(root.store.batch().create(granted_operation("move", "linux-vm")))
        for words in (("top",), ("top", "--once"), ("top", "-o", "json"), ("top", "-o", "yaml")):
            mine = root.ok(*words)
            assert mine == root.site.local.ok(*words), words
            assert "linux-vm" in mine
        viewer = Remote(root.site, root.site.token("viewer", Role.VIEWER))
        assert viewer.ok("top") == root.ok("top")
        narrow = Remote(root.site, root.site.token("narrow", Role.VIEWER, ["default"]))
        assert 'User "narrow" cannot create resource "nodes/overview"' in narrow.refused("top")

    def test_top_on_a_terminal_outlives_the_servers_restart(self, root: Remote) -> None:
        api = root.site.processes.all["api"]
        with OnScreen(root, "top", LINES="24") as screen:
            screen.read_until("2/2 nodes Ready")
            api.hold()
            api.kill()
            assert "2/2 nodes Ready" in screen.read_until("this is how it was").rpartition("vmherd ")[2]
            root.store.must_commit(root.store.batch().create(a_node("h3")))
            api.release()
            screen.read_until("3/3 nodes Ready")
            screen.interrupt()
            screen.read_until("\x1b[?1049l")
            assert screen.ended() == 0

    def test_rebalances_and_says_what_a_loss_would_come_to(self, root: Remote) -> None:
        assert root.ok("rebalance", "--dry-run").startswith("nothing to move: ")
        assert root.ok("rebalance", "--off", "--set", "hold=2") == "rebalancepolicy/cluster configured\n"
        assert "hold=2\n" in root.ok("rebalance", "--policy")
        assert root.ok("plan", "failure", "--all").count("no VM would have to be restarted") == 2

    def test_fences(self, root: Remote) -> None:
        options = ("--agent", "fence_ipmilan", "--option", "ip=192.0.2.1", "--password-file", "/etc/vmherd/bmc")
        assert root.ok("fence", "set", "h1", "--enable", *options) == "nodefencing/h1 set\n"
        root.ok("failover", "disarm", "--node", "h1", "--reason", "a disk")
        assert re.search(r"^h1 +yes +fence_ipmilan +Idle +disarmed: a disk$", root.ok("fence", "status"), re.MULTILINE)
        described = root.ok("describe", "fencing", "h1")
        assert re.search(r"Password From: +/etc/vmherd/bmc\n", described)
        viewer = Remote(root.site, root.site.token("viewer", Role.VIEWER))
        assert 'cannot create resource "nodefencings/confirm"' in viewer.refused("fence", "confirm", "h1", "--yes")
        assert "default/linux-vm" in viewer.ok("drain", "h1", "--dry-run")


def ageless(text: str) -> str:
    """Tables without what a second changes."""
    return re.sub(r"\b\d+[smhdy]\d*[smhd]?\b", "AGE", text)


def write(herd: Remote, text: str) -> str:
    path = herd.site.folder / "manifest.yaml"
    path.write_text(text)
    return str(path)


class TestTokens:
    def test_are_made_shown_once_listed_and_revoked(self, site: Site) -> None:
        local = site.local
        text = local.ok("token", "create", "ci", "--role", "operator", "-n", "b", "-n", "a", "--expires", "30d").strip()
        assert re.fullmatch(r"vmherd_ci_[A-Za-z0-9_-]{43}", text)
        stored = local.store.get(AccessToken, "ci")
        assert local.store.redis.hget("resources:AccessToken", "ci") is not None
        for place in (local.store.redis.hget("resources:AccessToken", "ci"), local.ok("token", "list")):
            assert text.rpartition("_")[2] not in str(place)
        row = next(line.split() for line in local.ok("token", "list").splitlines() if line.startswith("ci "))
        assert row[:3] == ["ci", "operator", "a,b"]
        assert row[3] in {"29d", "30d"}
        assert stored.spec.sha256 not in local.ok("token", "list")
        assert "AccessToken 'ci' already exists" in local.refused("token", "create", "ci", "--role", "admin")
        told = [event for event in local.store.all(Event) if event.involved_object.name == "ci"]
        assert {event.reason for event in told} == {"TokenCreated"}
        assert local.ok("token", "revoke", "ci") == "token/ci revoked\n"
        assert local.refused("token", "revoke", "ci") == "AccessToken 'ci' not found"
        for event in local.store.all(Event):
            assert text not in event.model_dump_json()
            assert stored.spec.sha256 not in event.model_dump_json()

    def test_into_a_file(self, site: Site, tmp_path: Path) -> None:
        path = tmp_path / "token"
        assert (
            site.local.ok("token", "create", "filed", "--role", "admin", "--to-file", str(path))
            == "token/filed created\n"
        )
        assert path.stat().st_mode & 0o777 == 0o600
        text = path.read_text().strip()
        wait_until(lambda: site.is_known(text), 20, "it is known")
        assert Remote(site, "").run("get", "vm", VMHERD_TOKEN_FILE=str(path)).returncode == 0
        site.local.ok("token", "revoke", "filed")
        wait_until(lambda: not site.is_known(text), 20, "it is not")

    @pytest.mark.parametrize(
        ("words", "why"),
        [
            (("Big", "--role", "admin"), "metadata.name"),
            (("x", "--role", "admin", "-n", "a b"), "namespaces"),
            (("x", "--role", "admin", "--expires", "4000d"), "3650 days"),
        ],
    )
    def test_that_cant_be(self, site: Site, words: tuple[str, ...], why: str) -> None:
        assert why in site.local.refused("token", "create", *words)
        assert site.local.store.find(AccessToken, "x") is None


class TestAudit:
    def test_who_what_when_and_what_came_of_it(self, site: Site, root: Remote) -> None:
        root.store.must_commit(root.store.batch().create(a_node("audited")))
        viewer = Remote(site, site.token("viewer", Role.VIEWER))
        root.ok("cordon", "audited")
        viewer.refused("uncordon", "audited")
        root.ok("get", "nodes")
        about = [entry for entry in site.audit if entry.get("name") == "audited"]
        done, refused = about
        assert {key: done[key] for key in ("user", "role", "verb", "resource", "outcome", "source")} == {
            "user": "root",
            "role": "admin",
            "verb": "patch",
            "resource": "nodes",
            "outcome": 200,
            "source": "127.0.0.1",
        }
        assert (refused["user"], refused["outcome"]) == ("viewer", 403)
        assert not [
            entry for entry in site.audit if entry["verb"] in {"get", "list", "watch"} and entry["outcome"] == 200
        ]
        told = root.ok("describe", "node", "audited")
        assert "root (admin) changed Node 'audited'" in told
        assert "viewer (viewer) was refused to patch Node 'audited': 403" in told
        text = (site.folder / "audit.jsonl").read_text() + site.processes.logs()
        assert root.token not in text
        assert root.token.rpartition("_")[2] not in text


class TestCluster:
    @pytest.fixture
    def cluster(self, root: Remote, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
        for name, value in root.environment().items():
            if name.startswith("VMHERD_"):
                monkeypatch.setenv(name, value)
        settings.cache_clear()
        with Cluster() as cluster:
            assert isinstance(cluster.client, RemoteClient)
            yield cluster
        settings.cache_clear()

    def test_makes_an_operation_and_follows_it_over_a_restart_of_the_server(
        self, root: Remote, cluster: Cluster
    ) -> None:
        root.running_vm()
        operation = cluster.evict("linux-vm")
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.extend(p.percent for p in operation.progress(timeout=90)))
        thread.start()
        running = OperationPhase.IN_PROGRESS
        root.step(operation.name, Reason.SYNCING, "20", phase=running, progress=20)
        wait_until(lambda: 20 in seen, 20, lambda: str(seen))
        api = root.site.processes.all["api"]
        restarts = api.restarts
        api.kill()
        root.step(operation.name, Reason.SYNCING, "40", phase=running, progress=40)
        wait_until(lambda: api.restarts > restarts, 20, "it is started again")
        wait_until(lambda: 40 in seen, 60, lambda: str(seen))
        root.step(operation.name, Reason.OPERATION_COMPLETED, "moved", phase=OperationPhase.COMPLETED, progress=100)
        thread.join(30)
        assert not thread.is_alive()
        assert seen == sorted(set(seen)), "none doubled, none out of order"
        assert {20, 40, 100} <= set(seen)
        assert operation.phase is OperationPhase.COMPLETED

    def test_what_is_asked_after_ctrl_c_inside_a_request_is_answered(
        self, root: Remote, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may come where httpx has just taken a lock, and leave it held; a watch's thread then waits for that."""
        root.store.must_commit(root.store.batch().create(a_node("h1")))

        def interrupted(lock: ThreadLock) -> ThreadLock:
            lock._lock.acquire()
            is_main = threading.current_thread() is threading.main_thread()
            if is_main and any(thread.name.startswith("watch ") for thread in threading.enumerate()):
                monkeypatch.undo()
                raise KeyboardInterrupt
            return lock

        monkeypatch.setattr(ThreadLock, "__enter__", interrupted)
        changes = cluster.client.watch(Scope((NodeDrain, VirtualMachineOperation)), 0)
        with pytest.raises(KeyboardInterrupt):
            next(changes)
        assert [node.name for node in cluster.nodes()] == ["h1"]

    def test_all_else(self, root: Remote, cluster: Cluster) -> None:
        root.store.must_commit(root.store.batch().create(a_node("h1")).create(a_node("h2")))
        made = cluster.create(yaml.safe_load(vm_manifest("made")))
        assert cluster.vm("made") == root.store.get(VirtualMachine, "default/made")
        assert [vm.name for vm in cluster.vms()] == ["made"]
        assert cluster.cordon("h1")
        assert not cluster.cordon("h1")
        assert cluster.node("h1").spec.unschedulable
        assert cluster.uncordon("h1")
        assert [node.name for node in cluster.nodes()] == ["h1", "h2"]
        operation = cluster.start("made")
        assert [one.name for one in cluster.operations()] == [operation.name]
        assert cluster.operation(operation.name).refresh().phase is OperationPhase.PENDING
        assert operation.abort().phase in {OperationPhase.TERMINATING, OperationPhase.PENDING}
        cluster.delete_vm("made")
        assert list(cluster.follow(made))[-1] is None
        with pytest.raises(NotFound):
            cluster.vm("made")
        with pytest.raises(Refused, match="works on Redis itself"):
            cluster.adopt("h1")

    def test_aborts_what_is_under_way(self, root: Remote, cluster: Cluster) -> None:
        vm = a_vm("linux-vm", node="n1", policy=RunPolicy.MANUAL)
        root.store.must_commit(root.store.batch().create(vm).create(granted_operation("move", "linux-vm")))
        operation = cluster.operation("move")
        done = threading.Thread(target=operation.abort)
        done.start()
        stored = "default/move"
        wait_until(
            lambda: root.store.get(VirtualMachineOperation, stored).metadata.deletion_timestamp, 20, "it is marked"
        )
        root.step("move", Reason.ABORTED, "aborted", phase=OperationPhase.FAILED, grant=None)
        done.join(30)
        assert not done.is_alive()
        assert operation.phase is OperationPhase.FAILED
