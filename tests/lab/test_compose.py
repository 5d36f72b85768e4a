"""compose.yaml on a real Docker engine: the control plane comes up, a lab's host joins it, and a guest migrates."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import outside
from tests.lab.docker_engine import DockerEngine
from tests.lab.guest import Guest
from tests.lab.herd import NODE_PROCESSES
from tests.lab.host import LabHost
from tests.lab.lab import Lab, require_lab
from tests.lab.namespaces import REPOSITORY
from tests.lab.network import CONTROL_ADDRESS
from tests.waiting import wait_until

SERVICES = ("redis", "api", "control", "liveness", "fencing", "intake", "beat-1", "beat-2", "flower")
PASSWORDS = {"VMHERD_REDIS_PASSWORD": "compose0redis0password", "VMHERD_FLOWER_PASSWORD": "compose0flower0password"}
"""Of the lab's containers; neither may stand in the image."""


class Compose:
    """The control plane in containers, and one way to speak to it."""

    def __init__(self, engine: DockerEngine, lab: Lab, project: Path) -> None:
        self.engine = engine
        self._lab = lab
        self._project = project

    def run(self, *arguments: str, timeout: float = 100.0) -> str:
        return self.engine.compose(self._project, *arguments, timeout=timeout)

    def health(self) -> dict[str, str]:
        """By service, its container's health."""
        found = {}
        for one in self.engine.docker("ps", "--all", "--quiet").split():
            state = json.loads(self.engine.docker("inspect", one))[0]
            name = state["Config"]["Labels"]["com.docker.compose.service"]
            found[name] = state["State"].get("Health", {}).get("Status", state["State"]["Status"])
        return found

    def vmherd(self, *arguments: str) -> str:
        return self.run("exec", "-T", "control", "vmherd", *arguments)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    require_lab()
    with Lab(hosts=2, name="compose") as lab:
        yield lab


@pytest.fixture(scope="module")
def engine(lab: Lab) -> Iterator[DockerEngine]:
    with DockerEngine(lab) as engine:
        engine.import_base_images()
        engine.build("vmherd")
        yield engine


@pytest.fixture(scope="module")
def compose(engine: DockerEngine, lab: Lab) -> Compose:
    """As a person would: a copy of what is needed, and an .env."""
    project = lab.directory / "project"
    shutil.copytree(REPOSITORY / "config", project / "config")
    shutil.copy(REPOSITORY / "compose.yaml", project)
    settings = {**PASSWORDS, "VMHERD_REDIS_BIND": CONTROL_ADDRESS, "VMHERD_API_BIND": CONTROL_ADDRESS}
    settings |= {"VMHERD_DIRTY_RATE_SAMPLE": "0", "VMHERD_LEASE_TTL": "6", "VMHERD_HEARTBEAT": "1"}
    (project / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    return Compose(engine, lab, project)


def run_node(lab: Lab, host: LabHost, name: str, words: list[str], env: dict[str, str]) -> None:
    """Run one process of a node on a host, as systemd would."""
    argv = [sys.executable, "-m", "orchestrator.cli", *words]
    lab.supervise(lambda: host.popen(argv, env=env, log=f"{host.name}-{name}", cwd=REPOSITORY), f"{host.name}/{name}")


def create(lab: Lab, redis_url: str, guest: Guest) -> None:
    """Create a guest's VM with the command of a person who is on this machine, outside of the containers."""
    manifest = {
        "apiVersion": "virtualization.deckhouse.io/v1alpha2",
        "kind": "VirtualMachine",
        "metadata": {"name": guest.name, "uid": guest.uuid},
        "spec": {
            "memory": {"size": f"{guest.memory_mib}Mi"},
            "cpu": {"cores": 1},
            "domainTemplate": guest.xml,
            "ipAddress": guest.address,
        },
    }
    argv = [sys.executable, "-m", "orchestrator.cli", "create", "-f", "-"]
    env = {"VMHERD_REDIS_URL": redis_url, "PYTHONPATH": str(REPOSITORY)}
    lab.control.run(argv, env=env, stdin=json.dumps(manifest), cwd=REPOSITORY)


@pytest.mark.timeout(600)  # most of it is the image's build, on a machine that does something else too
def test_the_control_plane_comes_up_a_host_joins_and_a_guest_migrates(lab: Lab, compose: Compose) -> None:
    compose.run("up", "--detach", "--no-build", timeout=200)
    healthy = dict.fromkeys(SERVICES, "healthy")
    wait_until(lambda: compose.health() == healthy, 150, lambda: f"all healthy: {compose.health()}", interval=1)

    # A setting of .env has reached the processes, and none of them is root or can write.
    told = compose.run(
        "exec", "-T", "control", "python", "-c", "import os; print(os.getuid(), os.environ['VMHERD_LEASE_TTL'])"
    )
    assert told.split() == ["10001", "6"]
    assert "Read-only" in compose.run("exec", "-T", "control", "sh", "-c", "touch /opt/vmherd/x 2>&1; true")

    # Hosts join as README says: by what `node enroll` prints.
    redis_url = f"redis://:{PASSWORDS['VMHERD_REDIS_PASSWORD']}@{CONTROL_ADDRESS}:6379/0"
    for host in lab.hosts:
        printed = compose.vmherd("node", "enroll", host.name, "--address", f"{CONTROL_ADDRESS}:6379")
        given = dict(line.split("=", 1) for line in printed.splitlines() if line.startswith("VMHERD_"))
        assert PASSWORDS["VMHERD_REDIS_PASSWORD"] not in printed
        env = {**given, "PYTHONPATH": str(REPOSITORY), "VMHERD_LOG_FORMAT": "json", "VMHERD_NODE": host.name}
        env |= {"VMHERD_MIGRATION_URI": host.migration_uri, "VMHERD_ASSUME_SHARED_STORAGE": "true"}
        env |= {
            "VMHERD_DOMAIN_TYPE": "qemu",
            "VMHERD_CPU_SHARES": "false",
            "VMHERD_LEASE_TTL": "6",
            "VMHERD_HEARTBEAT": "1",
        }
        for name, words in NODE_PROCESSES.items():
            run_node(lab, host, name, words, env)

    def ready() -> bool:
        nodes = json.loads(compose.vmherd("get", "node", "-o", "json"))["items"]
        conditions = [c["status"] for node in nodes for c in node["status"]["conditions"] if c["type"] == "Ready"]
        return conditions == ["True", "True"]

    wait_until(ready, 60, lambda: compose.vmherd("get", "node"), interval=0.5)
    guest = lab.guest("linux-vm", address="192.0.2.101", memory_mib=160)
    create(lab, redis_url, guest)
    guest.wait_up(90)
    before = json.loads(compose.vmherd("get", "vm", "linux-vm", "-o", "json"))["status"]["nodeName"]
    compose.vmherd("evict", "linux-vm")
    status = json.loads(compose.vmherd("get", "vm", "linux-vm", "-o", "json"))["status"]
    assert (status["phase"], status["nodeName"]) == ("Running", ({"h1", "h2"} - {before}).pop())
    assert outside.job(lab.host(before), guest) == {}
    assert guest.trouble() == ""

    # Redis loses nothing of it when everything is stopped and started again.
    compose.run("restart", "--timeout", "5", timeout=200)
    wait_until(lambda: compose.health() == healthy, 150, lambda: f"healthy again: {compose.health()}", interval=1)
    wait_until(ready, 60, lambda: compose.vmherd("get", "node"), interval=0.5)
    assert json.loads(compose.vmherd("get", "vm", "linux-vm", "-o", "json"))["status"]["nodeName"] == status["nodeName"]
