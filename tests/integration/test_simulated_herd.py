"""`vmherd up --simulated`: a whole herd of real processes, looked at, hurt, and taken down without a trace."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import has_ended
from tests.requirements import need_program
from tests.waiting import wait_until

NODES = 3
VMS = 6
pytestmark = pytest.mark.timeout(180)


class Herd:
    """Runs the command against a simulated herd of the test's own."""

    def __init__(self, state: Path) -> None:
        need_program("redis-server", "redis-server")
        self.state = state
        self.path = state / "vmherd" / "sim"

    def environment(self, **more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("VMHERD_")}
        return {**kept, "XDG_STATE_HOME": str(self.state), "COLUMNS": "160", **more}

    def begin(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", *arguments],
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        with self.begin(*arguments, **environment) as process:
            out, err = process.communicate(timeout=120)
            return process.returncode, out, err

    def ok(self, *arguments: str) -> str:
        code, out, err = self.run(*arguments)
        assert code == 0, (arguments, out, err)
        assert "Traceback" not in err
        return out

    def refused(self, *arguments: str, **environment: str) -> str:
        code, _, err = self.run(*arguments, **environment)
        assert code == 1, err
        assert err.startswith("vmherd: ")
        assert err.count("\n") == 1, err
        return err

    def down(self) -> None:
        self.run("down")

    def pids(self) -> list[int]:
        """All processes that know of its directory, but for those that ended."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                known = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if os.fsencode(self.path) in known and not has_ended(int(folder.name)):
                found.append(int(folder.name))
        return found

    def pid(self, member: str) -> int:
        for line in self.ok("sim", "status").splitlines():
            if line.startswith(f"{member} "):
                word = line.split()[1]
                return int(word) if word.isdigit() else 0
        raise AssertionError(f"no {member}")

    def get(self, kind: str) -> dict[str, Any]:
        items = yaml.safe_load(self.ok("get", kind, "-o", "yaml"))["items"]
        return {item["metadata"]["name"]: item["status"] for item in items}

    def phases(self) -> dict[str, str]:
        return {name: status["phase"] for name, status in self.get("vm").items()}

    def node_of(self, vm: str) -> str:
        node: str = self.get("vm")[vm]["nodeName"]
        return node

    def wait(self, look: Callable[[], object], what: str, timeout: float = 60) -> None:
        wait_until(look, timeout, lambda: f"{what}; {self.run('get', 'vm')}; {self.run('get', 'event')}", interval=0.3)

    def all_run(self) -> bool:
        return set(self.phases().values()) == {"Running"}


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    """A herd that is up."""
    herd = Herd(tmp_path_factory.mktemp("herd"))
    try:
        out = herd.ok("up", "--simulated", str(NODES), "--vms", str(VMS), "--detach", "--speed-up", "5")
        assert f"{NODES} nodes Ready, {VMS} VMs Running" in out
        yield herd
    finally:
        herd.down()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Herd]:
    """No herd yet; what a test starts is ended."""
    herd = Herd(tmp_path)
    try:
        yield herd
    finally:
        herd.down()


# --- a herd that is up ------------------------------------------------------------------------------------------------


def test_it_is_found_by_itself_and_all_run(herd: Herd) -> None:
    code, out, err = herd.run("get", "vm")
    assert code == 0
    assert out.count("Running") == VMS
    assert err == f"vmherd: the simulated herd in {herd.path} (VMHERD_REDIS_URL is not set)\n"
    assert sorted(herd.get("node")) == ["node-1", "node-2", "node-3"]
    assert {herd.node_of(vm) for vm in herd.phases()} == {"node-1", "node-2", "node-3"}


def test_a_url_that_is_set_counts(herd: Herd) -> None:
    assert "127.0.0.1:1/0" in herd.refused("get", "vm", VMHERD_REDIS_URL="redis://127.0.0.1:1/0")


def test_a_second_one_is_refused(herd: Herd) -> None:
    assert "runs already" in herd.refused("up", "--simulated", "2")
    assert herd.all_run()


def test_a_vm_is_evicted(herd: Herd) -> None:
    before = herd.node_of("vm-1")
    assert "Completed" in herd.ok("evict", "vm-1")
    assert herd.node_of("vm-1") != before
    status = herd.ok("sim", "status")
    as_data = json.loads(herd.ok("sim", "status", "-o", "json"))
    assert sum(host["running"] for host in as_data["hosts"].values()) == VMS
    assert {"control-1", "control-2"} <= {member["name"] for member in as_data["processes"]}
    assert sum(int(line.split()[2]) for line in status.splitlines() if line.startswith("node-")) == VMS


def test_what_is_in_use_of_each_host_is_shown(herd: Herd) -> None:
    def nodes() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(herd.ok("top", "--once", "-o", "json"))["nodes"]
        return found

    wait_until(lambda: all(node["use"] is not None for node in nodes()), 60, lambda: str(nodes()), interval=2)
    uses = [node["use"] for node in nodes()]
    assert all(0 <= use["cpu"] < 1 for use in uses)
    assert sum(use["cpu"] for use in uses) > 0
    assert sum(use["memory_mib"] for use in uses) > 0


def test_killed_workers_end_no_vm_and_come_back(herd: Herd) -> None:
    node = herd.node_of("vm-2")
    members = [f"agent@{node}", f"migrate@{node}", f"lifecycle@{node}", "control-1", "intake"]
    before = {member: herd.pid(member) for member in members}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    herd.wait(lambda: all(herd.pid(m) not in (0, before[m]) for m in members), "the processes to be back")
    herd.wait(herd.all_run, "all VMs to run")
    assert herd.node_of("vm-2") == node
    assert "Completed" in herd.ok("evict", "vm-2", "--timeout", "60s")


def test_a_killed_zygote_takes_its_processes_along_and_all_come_back(herd: Herd) -> None:
    members = ["zygote-agent", "agent@node-1", "agent@node-2", "agent@node-3"]
    before = {member: herd.pid(member) for member in members}
    os.kill(before["zygote-agent"], signal.SIGKILL)
    herd.wait(lambda: all(has_ended(pid) for pid in before.values()), "its processes to end")
    herd.wait(lambda: all(herd.pid(m) not in (0, before[m]) for m in members), "them to be back")
    herd.wait(lambda: all("True" in str(s["conditions"]) for s in herd.get("node").values()), "all nodes Ready")


def test_a_nodes_processes_have_its_own_user_of_redis(herd: Herd) -> None:
    environment = (Path("/proc") / str(herd.pid("control-1")) / "environ").read_bytes().decode()
    url = next(line for line in environment.split("\0") if line.startswith("VMHERD_REDIS_URL="))
    cli = need_program("redis-cli", "redis-tools")
    password = url.partition("//:")[2].partition("@")[0]
    command = [str(cli), "-s", str(herd.path / "redis.sock"), "--no-auth-warning", "-a", password, "CLIENT", "LIST"]
    clients = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    users = {word for line in clients.splitlines() for word in line.split() if word.startswith("user=")}
    assert users == {"user=default", *(f"user=node-node-{number}" for number in range(1, NODES + 1))}


def test_a_crash_and_a_destroy_are_made_good(herd: Herd) -> None:
    herd.wait(herd.all_run, "all VMs to run")
    before = herd.get("vm")
    herd.ok("sim", "crash", "vm-3")
    herd.ok("sim", "destroy", "vm-4")
    for vm in ("vm-3", "vm-4"):
        started = before[vm]["incarnation"]
        herd.wait(lambda vm=vm, at=started: herd.get("vm")[vm]["incarnation"] > at, f"{vm} started anew")  # type: ignore[misc]
    herd.wait(herd.all_run, "all VMs to run")


def test_power_is_lost_and_comes_back(herd: Herd) -> None:
    herd.wait(herd.all_run, "all VMs to run")
    node = "node-2"
    herd.ok("sim", "power-off", node)
    herd.wait(lambda: herd.pid(f"agent@{node}") == 0 and herd.pid(f"migrate@{node}") == 0, "its processes to be gone")
    assert any(line.split()[:3] == [node, "no", "power"] for line in herd.ok("sim", "status").splitlines())
    herd.wait(lambda: "NotReady" in herd.ok("get", "node", node), f"{node} NotReady")
    herd.ok("sim", "power-on", node)
    herd.wait(lambda: "NotReady" not in herd.ok("get", "node", node), f"{node} Ready")
    herd.wait(herd.all_run, "all VMs to run again")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("power-off", "node-9"), "node-9"),
        (("crash", "vm-99"), "vm-99"),
        (("slow", "vm-1", "3"), "vm-1"),
        (("fail-start", "vm-1", "--node", "mars"), "mars"),
    ],
)
def test_what_is_not_there_has_no_faults(herd: Herd, words: tuple[str, ...], said: str) -> None:
    assert said in herd.refused("sim", *words)


# --- and down ---------------------------------------------------------------------------------------------------------


def test_down_leaves_nothing(fresh: Herd) -> None:
    fresh.ok("up", "--simulated", "1", "--detach")
    assert len(fresh.pids()) >= 12
    assert "is down" in fresh.ok("down")
    assert fresh.pids() == []
    assert list(fresh.state.iterdir()) == []
    assert "no simulated herd" in fresh.refused("down")


def test_a_directory_that_was_there_stays(fresh: Herd) -> None:
    there = fresh.state / "there"
    there.mkdir()
    with fresh.begin("up", "--simulated", "1", "--detach", "--dir", str(there)) as process:
        out, _ = process.communicate(timeout=60)
    assert f"export VMHERD_SIM_DIR={there}" in out
    assert "node-1" in fresh.run("get", "node", VMHERD_SIM_DIR=str(there))[1]
    fresh.ok("down", "--dir", str(there))
    assert list(there.iterdir()) == []


def test_a_directory_with_something_else_in_it_is_refused(fresh: Herd) -> None:
    theirs = fresh.state / "theirs"
    theirs.mkdir()
    (theirs / "letter").write_text("mine")
    assert "not empty" in fresh.refused("up", "--simulated", "1", "--dir", str(theirs))
    assert [entry.name for entry in theirs.iterdir()] == ["letter"]
    assert "no simulated herd" in fresh.refused("down", "--dir", str(theirs))
    assert [entry.name for entry in theirs.iterdir()] == ["letter"]


@pytest.mark.parametrize("detach", [(), ("--detach",)], ids=["foreground", "detached"])
def test_an_interruption_while_it_comes_up_leaves_nothing(fresh: Herd, detach: tuple[str, ...]) -> None:
    with fresh.begin("up", "--simulated", "2", *detach) as process:
        wait_until(lambda: len(fresh.pids()) > 5, 30, "some processes")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "vmherd: the simulated herd is down\n"
    assert fresh.pids() == []
    assert list(fresh.state.iterdir()) == []


def test_it_ends_with_its_foreground(fresh: Herd) -> None:
    with fresh.begin("up", "--simulated", "1") as process:
        assert process.stdout is not None
        wait_until(lambda: "Ctrl-C ends it." in (process.stdout.readline() if process.stdout else ""), 60, "it is up")
        process.kill()
        process.wait(10)
        wait_until(lambda: fresh.pids() == [], 30, lambda: f"no process: {fresh.pids()}")
    wait_until(lambda: list(fresh.state.iterdir()) == [], 10, "no file")


def test_a_killed_supervisor_leaves_no_process_and_down_the_rest(fresh: Herd) -> None:
    fresh.ok("up", "--simulated", "1", "--detach")
    os.kill(int((fresh.path / "lock").read_text()), signal.SIGKILL)
    wait_until(lambda: fresh.pids() == [], 10, lambda: f"no process: {fresh.pids()}")
    code, _, err = fresh.run("get", "node")
    assert (code, "simulated" in err) == (1, False), "it is not taken for a herd that runs"
    fresh.ok("down")
    assert list(fresh.state.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"VMHERD_LEASE_TTL": "1"}, "VMHERD_LEASE_TTL"), ({"PATH": "/nowhere"}, "install Debian's package redis-server")],
    ids=["bad-setting", "no-redis-server"],
)
def test_it_says_why_it_does_not_come_up(fresh: Herd, environment: dict[str, str], said: str) -> None:
    assert said in fresh.refused("up", "--simulated", "1", **environment)
    assert fresh.pids() == []
    assert list(fresh.state.iterdir()) == []


def test_what_does_not_fit_is_said_before_anything_is_started(fresh: Herd) -> None:
    said = fresh.refused("up", "--simulated", "2", "--vms", "10", "--memory", "20Gi")
    assert "10 VMs don't fit on 2 nodes, of which each takes 3" in said
    assert list(fresh.state.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("--simulated", "0"),
        ("--simulated", "many"),
        ("--simulated", "2", "--vms", "-1"),
        ("--simulated", "2", "--memory", "a lot"),
        ("--simulated", "2", "--node-size", "64Gi"),
        ("--simulated", "2", "--speed-up", "0"),
        (),
    ],
)
def test_wrong_usage_is_said(fresh: Herd, words: tuple[str, ...]) -> None:
    code, _, err = fresh.run("up", *words)
    assert code == 2
    assert "Traceback" not in err
    assert list(fresh.state.iterdir()) == []
