"""compose.yaml on a real Docker engine: the control plane comes up, lab hosts join it, and a guest migrates."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import expect

from tests.browser.browsing import chromium, screenshot
from tests.ipmi import SimulatedBmc
from tests.lab import outside
from tests.lab.cleanup import cgroups_of, leftovers, tear_down
from tests.lab.docker_engine import DockerEngine
from tests.lab.guest import Guest
from tests.lab.herd import NODE_PROCESSES
from tests.lab.host import LabHost
from tests.lab.lab import Lab, require_lab
from tests.lab.namespaces import REPOSITORY, LabError
from tests.lab.network import CONTROL_ADDRESS
from tests.processes import has_ended
from tests.requirements import need_program
from tests.waiting import wait_until

SERVICES = {"redis", "api", "control", "liveness", "fencing", "intake", "beat-1", "beat-2", "flower"}
MEASURED = ("api", "beat", "control", "fencing", "intake", "liveness")
"""Jobs of Prometheus; of beats there are two."""
PASSWORDS = {
    "VMHERD_REDIS_PASSWORD": "compose0redis0password",
    "VMHERD_FLOWER_PASSWORD": "compose0flower0password",
    "BMC_PASSWORD": SimulatedBmc.password,
}
"""Of the lab's containers; none may stand in the image."""
USER = 10001
"""As which all of ours run."""
TIMES = {"VMHERD_LEASE_TTL": "6", "VMHERD_WATCHDOG_TIMEOUT": "3", "VMHERD_HEARTBEAT": "1"}
"""Of nodes and control plane alike."""
WITNESS = "control-1"
LIMITED = {
    "services": {"witness": {"ulimits": {"rtprio": 0, "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]}}}
}
"""Over compose.yaml, where its limits can't be given."""
pytestmark = pytest.mark.timeout(900)  # most of it is the image's build, on a machine that does something else too


class Compose:
    """The control plane in containers, and ways to speak to it."""

    def __init__(self, engine: DockerEngine, lab: Lab, project: Path) -> None:
        self.engine = engine
        self._lab = lab
        self._project = project

    def run(self, *arguments: str, timeout: float = 300.0) -> str:
        return self.engine.compose(self._project, *arguments, timeout=timeout)

    def vmherd(self, *arguments: str) -> str:
        """Run a command in a container, as whoever administers the control plane does."""
        return self.run("exec", "-T", "control", "vmherd", *arguments)

    def containers(self) -> dict[str, dict[str, object]]:
        """By service, what `docker inspect` says of its container."""
        found = json.loads(self.engine.docker("inspect", *self.engine.docker("ps", "--all", "--quiet").split()))
        return {one["Config"]["Labels"]["com.docker.compose.service"]: one for one in found}

    def health(self) -> dict[str, str]:
        states = {name: one["State"] for name, one in self.containers().items()}
        return {name: state.get("Health", {}).get("Status", "none") for name, state in states.items()}  # type: ignore[attr-defined]

    def wait_healthy(self, services: set[str]) -> None:
        wanted = dict.fromkeys(services, "healthy")
        wait_until(lambda: self.health() == wanted, 300, self._troubles, interval=1)

    def _troubles(self) -> str:
        """What those that are not healthy wrote last."""
        health = self.health()
        ill = [name for name, state in health.items() if state != "healthy"]
        return f"all healthy: {health}\n{self.run('logs', '--no-color', '--tail=15', *ill)}"

    def set(self, settings: Mapping[str, str]) -> None:
        with (self._project / ".env").open("a") as file:
            file.writelines(f"{name}={value}\n" for name, value in settings.items())


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    require_lab()
    with Lab(hosts=2, name="compose") as lab:
        yield lab


@pytest.fixture(scope="module")
def compose(lab: Lab) -> Iterator[Compose]:
    """As a person would: an image that is built, a copy of what is needed, and an .env."""
    project = lab.directory / "project"
    shutil.copytree(REPOSITORY / "config", project / "config")
    shutil.copy(REPOSITORY / "compose.yaml", project)
    secrets = project / "secrets"
    secrets.mkdir(mode=0o700)
    (secrets / "bmc-h1").write_text(f"{SimulatedBmc.password}\n")
    for path in (secrets, secrets / "bmc-h1"):
        shutil.chown(path, USER, USER)
    with DockerEngine(lab) as engine:
        engine.import_base_images()
        engine.build("vmherd")
        compose = Compose(engine, lab, project)
        binds = {f"VMHERD_{name}": CONTROL_ADDRESS for name in ("REDIS_BIND", "API_BIND", "TLS_NAMES")}
        compose.set({**PASSWORDS, **binds, **TIMES, "VMHERD_DIRTY_RATE_SAMPLE": "0"})
        if not may_raise_limits():
            (project / "compose.override.yaml").write_text(json.dumps(LIMITED))
        compose.run("up", "--detach", "--no-build")
        yield compose


def may_raise_limits() -> bool:
    """Whether an engine can give containers other limits than this process has: not in every sandbox, even as root."""
    return subprocess.run(["prlimit", "--rtprio=50", "true"], capture_output=True, check=False).returncode == 0


class Client:
    """`vmherd` of a person on another machine, by the API."""

    def __init__(self, lab: Lab, compose: Compose, name: str = "alice") -> None:
        self._lab = lab
        ca = lab.directory / "ca.crt"
        ca.write_text(compose.run("exec", "-T", "api", "cat", "/var/lib/vmherd/tls/ca.crt"))
        token = compose.vmherd("token", "create", name, "--role", "admin").strip()
        self._env = {
            "VMHERD_SERVER": f"https://{CONTROL_ADDRESS}:8080",
            "VMHERD_TOKEN": token,
            "VMHERD_CA_FILE": str(ca),
            "PYTHONPATH": str(REPOSITORY),
        }

    def vmherd(self, *arguments: str, stdin: str | None = None) -> str:
        argv = [sys.executable, "-m", "orchestrator.cli", *arguments]
        return self._lab.control.run(argv, env=self._env, stdin=stdin, cwd=REPOSITORY, timeout=180).stdout

    def vm(self, name: str) -> dict[str, str]:
        status: dict[str, str] = json.loads(self.vmherd("get", "vm", name, "-o", "json"))["status"]
        return status

    def nodes(self) -> dict[str, str]:
        """By node, whether it is Ready; or why nobody can say, as just after a restart of Redis."""
        try:
            nodes = json.loads(self.vmherd("get", "node", "-o", "json"))["items"]
        except LabError as error:
            return {"nobody knows": str(error)}
        conditions = [(node["metadata"]["name"], c) for node in nodes for c in node["status"]["conditions"]]
        return {name: one["status"] for name, one in conditions if one["type"] == "Ready"}

    def wait_ready(self, *names: str) -> None:
        wanted = dict.fromkeys(names, "True")
        wait_until(lambda: self.nodes() == wanted, 120, lambda: f"{wanted}: {self.nodes()}", interval=0.5)


def enrolled(compose: Compose, name: str, *more: str) -> dict[str, str]:
    """Enrol a host as README says, and give the environment that is printed."""
    printed = compose.vmherd("node", "enroll", name, "--address", f"{CONTROL_ADDRESS}:6379", *more)
    assert PASSWORDS["VMHERD_REDIS_PASSWORD"] not in printed
    return dict(line.split("=", 1) for line in printed.splitlines() if line.startswith("VMHERD_"))


def join(lab: Lab, host: LabHost, given: dict[str, str]) -> None:
    """Run a node's processes on a host, as systemd would."""
    env = {**given, **TIMES, "PYTHONPATH": str(REPOSITORY), "VMHERD_LOG_FORMAT": "json", "VMHERD_WATCHDOG": "off"}
    env |= {"VMHERD_MIGRATION_URI": host.migration_uri, "VMHERD_ASSUME_SHARED_STORAGE": "true"}
    env |= {"VMHERD_DOMAIN_TYPE": "qemu", "VMHERD_CPU_SHARES": "false"}
    for name, words in NODE_PROCESSES.items():
        argv, log = [sys.executable, "-m", "orchestrator.cli", *words], f"{host.name}-{name}"
        lab.supervise(lambda argv=argv, log=log: host.popen(argv, env=env, log=log, cwd=REPOSITORY), log)  # type: ignore[misc]


def manifest(guest: Guest) -> str:
    spec = {"memory": {"size": f"{guest.memory_mib}Mi"}, "cpu": {"cores": 1}, "domainTemplate": guest.xml}
    return json.dumps(
        {
            "apiVersion": "virtualization.deckhouse.io/v1alpha2",
            "kind": "VirtualMachine",
            "metadata": {"name": guest.name, "uid": guest.uuid},
            "spec": {**spec, "ipAddress": guest.address},
        }
    )


def test_hosts_join_the_control_plane_in_containers_and_a_guest_migrates(lab: Lab, compose: Compose) -> None:
    compose.wait_healthy(SERVICES)
    client = Client(lab, compose)
    for host in lab.hosts:
        join(lab, host, enrolled(compose, host.name))
    witness = enrolled(compose, WITNESS, "--witness")
    compose.set(
        {"VMHERD_WITNESS_NODE": witness["VMHERD_NODE"], "VMHERD_WITNESS_REDIS_URL": witness["VMHERD_REDIS_URL"]}
    )
    compose.run("--profile", "witness", "up", "--detach", "--no-build", "witness")
    client.wait_ready("h1", "h2", WITNESS)
    compose.wait_healthy({*SERVICES, "witness"})
    look_at_its_priority(compose)

    guest = lab.guest("linux-vm", address="192.0.2.101", memory_mib=160)
    client.vmherd("create", "-f", "-", stdin=manifest(guest))
    guest.wait_up(120)
    before = client.vm(guest.name)["nodeName"]
    boot_id = guest.wait_ticks(1).boot_id
    client.vmherd("evict", guest.name)
    after = client.vm(guest.name)
    assert (after["phase"], after["nodeName"]) == ("Running", ({"h1", "h2"} - {before}).pop())
    assert guest.wait_ticks(1).boot_id == boot_id
    assert outside.states(lab, guest) == {after["nodeName"]: "running"}
    assert guest.trouble() == ""

    look_at_the_console(lab, compose, guest, after["nodeName"])

    # Redis's volume keeps VMs, nodes' users and tokens.
    compose.run("restart", "redis")
    compose.wait_healthy({*SERVICES, "witness"})
    client.wait_ready("h1", "h2", WITNESS)
    assert client.vm(guest.name)["nodeName"] == after["nodeName"]
    assert outside.states(lab, guest) == {after["nodeName"]: "running"}


def look_at_its_priority(compose: Compose) -> None:
    """A witness has its unit's priority, or says that it can't have it here."""
    look = "import os, pathlib; print({os.sched_getscheduler(int(one.parent.name)) == os.SCHED_RR for one in "
    look += "pathlib.Path('/proc').glob('[0-9]*/cmdline') if one.read_bytes().endswith(b'.heartbeat\\0witness\\0')})"
    found = compose.run("exec", "-T", "witness", "python", "-c", look).strip()
    refused = "chrt: failed to set pid 0's policy" in compose.run("logs", "--no-color", "witness")
    assert (found, refused) in {("{True}", False), ("{False}", True)}


def look_at_the_console(lab: Lab, compose: Compose, guest: Guest, node: str) -> None:
    """Its container can write nothing, and has nobody's home: what a page needs besides the image shows here."""
    token = compose.vmherd("token", "create", "bob", "--role", "admin").strip()
    with chromium(namespace=lab.control.path, address=CONTROL_ADDRESS) as browser:
        server = f"https://{CONTROL_ADDRESS}:8080"
        page = browser.new_context(base_url=server, ignore_https_errors=True).new_page()  # its CA is the herd's own
        page.set_default_timeout(60_000)
        page.goto("/console/")
        page.get_by_label("API token").fill(token)
        page.get_by_role("button", name="Sign in").click()
        for label in ("Projects", "default", "Virtualization", "Virtual Machines"):
            page.get_by_role("link", name=label, exact=True).click()
        expect(page.locator(f'tr[data-row="default/{guest.name}"]')).to_contain_text(node)
        page.get_by_role("link", name=guest.name, exact=True).click()
        expect(page.get_by_role("heading", name="Conditions")).to_be_visible()
        for label in ("System", "Nodes", "Nodes of all groups"):
            page.get_by_role("link", name=label, exact=True).click()
        expect(page.locator(f'tr[data-row="{node}"]')).to_contain_text("in use", timeout=60_000)
        page.screenshot(path=screenshot("compose-nodes"))


def test_the_containers_ask_a_bmc_with_the_agents_of_their_image(lab: Lab, compose: Compose) -> None:
    """By a password of the secrets' folder, and by one of the environment; in `fencing`, and in `api` for clients."""
    program, client = need_program("ipmi_sim", "openipmi"), Client(lab, compose, "carol")
    space = ("ip", "netns", "exec", lab.control.name)
    with SimulatedBmc(lab.directory / "bmc", program, address=CONTROL_ADDRESS, port=9001, prefix=space) as bmc:
        given = bmc.config()
        options = [word for pair in given.options.items() for word in ("--option", "=".join(pair))]
        for name, password in (
            ("h1", "--password-file=/etc/vmherd/secrets/bmc-h1"),
            ("h2", "--password-env=BMC_PASSWORD"),
        ):
            client.vmherd("fence", "set", name, "--agent", given.agent, *options, password)
            bmc.power = "1"
            in_fencing = compose.run("exec", "-T", "fencing", "vmherd", "fence", "test", name)
            bmc.power = "0"
            assert (in_fencing.strip(), client.vmherd("fence", "test", name).strip()) == (
                f"node/{name} power is on",
                f"node/{name} power is off",
            )
            client.vmherd("fence", "set", name, "--no-bmc")


def test_nothing_secret_is_in_the_image_and_no_container_is_root_or_can_write(compose: Compose) -> None:
    history = compose.engine.docker("history", "--no-trunc", "vmherd")
    (image,) = json.loads(compose.engine.docker("inspect", "vmherd"))
    assert image["Config"]["User"] == "10001:10001"
    names = [setting.partition("=")[0] for setting in image["Config"]["Env"]]
    assert sorted(names) == ["PATH", "PYTHONUNBUFFERED"]
    for password in PASSWORDS.values():
        assert password not in history
        assert password not in json.dumps(image)
    assert "PIP_FIND_LINKS" not in json.dumps(image), "where it was built is nobody's affair"

    script = "import os; print(os.getuid(), os.environ['VMHERD_LEASE_TTL'])"
    assert compose.run("exec", "-T", "control", "python", "-c", script).split() == ["10001", TIMES["VMHERD_LEASE_TTL"]]
    refused = compose.run("exec", "-T", "control", "sh", "-c", "echo x > /opt/vmherd/x || echo refused")
    assert refused.strip() == "refused"
    redis = compose.run("exec", "-T", "redis", "cat", "/proc/1/status")
    assert "CapEff:\t0000000000000000" in redis
    uids = next(line.split()[1:] for line in redis.splitlines() if line.startswith("Uid:"))
    assert "0" not in uids


def test_prometheus_reads_each_service(lab: Lab, compose: Compose) -> None:
    """By the names that Docker gives them; its program is Debian's, its configuration ours."""
    compose.engine.make_prometheus_image(services()["prometheus"]["image"])
    compose.run("--profile", "monitoring", "up", "--detach", "--no-build", "prometheus")
    told: dict[str, str] = {}

    def reads_all() -> bool:
        try:
            answer = lab.control.http_get("127.0.0.1", "/api/v1/targets", port=9090)
        except OSError:
            return False
        found = json.loads(answer)["data"]["activeTargets"]
        told.clear()
        told.update({one["scrapeUrl"]: f"{one['labels']['job']} {one['health']} {one['lastError']}" for one in found})
        up = sorted(line.split()[0] for line in told.values() if line.split()[1] == "up")
        return up == sorted([*(f"vmherd-{name}" for name in MEASURED), "vmherd-beat"])

    wait_until(reads_all, 120, lambda: f"Prometheus reads each service: {told}", interval=1)
    compose.wait_healthy({*SERVICES, "witness", "prometheus"})


def test_each_service_of_the_file_was_brought_up(compose: Compose) -> None:
    """Of Grafana, of which Debian has no package, the dashboards' queries are checked instead (test_dashboards)."""
    assert set(compose.containers()) == services().keys() - {"grafana"}


def services() -> dict[str, dict[str, Any]]:
    """Those of compose.yaml."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]
    return found


def test_a_lab_whose_owner_was_killed_takes_its_containers_along(lab: Lab, compose: Compose) -> None:
    """The last one here: what `cleanup` does for a killed test, beside an engine with all its containers."""
    assert len(compose.containers()) > len(SERVICES)
    processes = {int(pid) for folder in cgroups_of(lab.name) for pid in (folder / "cgroup.procs").read_text().split()}
    assert len(processes) >= len(SERVICES)
    tear_down(lab.name)
    assert leftovers(lab.name) == []
    assert all(map(has_ended, processes))
