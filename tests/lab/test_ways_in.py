"""The ways in, on a real herd: Celery's own, Python's, virsh behind our back, a node's rights in Redis, Flower."""

import base64
import http.client
import json
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from orchestrator.cluster import Operation, Progress
from orchestrator.errors import Refused, StoreUnavailable
from orchestrator.queues import lifecycle_queue, migrate_queue
from orchestrator.resources import NodeInventory, OperationPhase, SeenDomain, find_condition
from orchestrator.store import access, keys
from orchestrator.store.node_store import NodeStore
from tests.builders import a_lease
from tests.lab import outside
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.host import LabHost
from tests.lab.lab import Lab
from tests.lab.mutants import replaced
from tests.lab.namespaces import REPOSITORY, LabError
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(240)


def virsh(host: LabHost, *arguments: str) -> str:
    """Run virsh as a person on that host would, behind the product's back."""
    return host.run(["virsh", "--quiet", *arguments]).stdout


# --- Celery and Python ------------------------------------------------------------------------------------------------

PLAIN_PROGRAM = """
import json, sys
from orchestrator import tasks

def outcome(result):
    try:
        return result.get(timeout=60)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

asked = json.loads(sys.argv[1])
print(json.dumps([outcome(getattr(tasks, name).delay(*args, **more)) for name, args, more in asked]))
"""


def call_tasks(herd: LabHerd, *asked: tuple[str, list[str], dict[str, Any]]) -> list[Any]:
    """Call tasks one after the other as any Python program does that knows where Redis is, and nothing else."""
    done = herd.lab.control.run(
        [sys.executable, "-c", PLAIN_PROGRAM, json.dumps(asked)],
        env={"VMHERD_REDIS_URL": herd.redis.url_for_hosts},
        cwd=REPOSITORY,
        timeout=120,
    )
    results: list[Any] = json.loads(done.stdout)
    return results


def test_celerys_own_way_in_gives_the_outcome_or_the_refusal(herd: LabHerd) -> None:
    vm = herd.lab.blank("linux-vm")
    herd.start_guests((vm, "h1"), up=False)
    evicted, migrated, unknown, nowhere = call_tasks(
        herd,
        ("evict", ["linux-vm"], {}),
        ("migrate", ["linux-vm"], {"node": "h1"}),
        ("evict", ["no-such-vm"], {}),
        ("migrate", ["linux-vm"], {"node": "no-such-node"}),
    )
    assert (evicted["phase"], evicted["node"]) == ("Completed", "h2")
    assert evicted["message"] == "runs on node h2"
    assert evicted["operation"].startswith("evict-linux-vm-")
    assert evicted["downtime_ms"] >= 0
    assert (migrated["phase"], migrated["node"]) == ("Completed", "h1")
    assert unknown == "RuntimeError: VirtualMachine 'no-such-vm' not found in namespace 'default'"
    assert nowhere == "RuntimeError: Node 'no-such-node' not found (spec.migrate.nodeName)"
    outside.assert_runs_once(herd, vm, "h1")


def test_a_task_whose_operation_was_deleted_before_it_began_ends_too(herd: LabHerd) -> None:
    vm = herd.lab.blank("linux-vm")
    herd.start_guests((vm, "h1"), up=False)
    for node in ("h2", "h3"):
        herd.cluster.cordon(node)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(call_tasks, herd, ("evict", ["linux-vm"], {}))
        wait_until(lambda: active(herd), 30, "the operation is there")
        (operation,) = active(herd)
        operation.abort()
        (result,) = answer.result(120)
    assert result["operation"] == operation.name
    assert "deleted before it began" in result["message"]
    outside.assert_runs_once(herd, vm, "h1")


def active(herd: LabHerd) -> list[Operation]:
    """The operations that have not ended."""
    return [Operation(herd.cluster, it) for it in herd.cluster.operations() if it.is_active]


def test_progress_never_falls_and_ends_at_100(herd: LabHerd) -> None:
    # It dirties faster than it is sent, so what remains grows again with each pass over its memory.
    guest = herd.lab.guest("linux-vm", address="192.0.2.101", memory_mib=160, dirty_mib_s=60, working_set_mib=32)
    herd.start_guests((guest, "h1"))
    source = herd.lab.host("h1")
    with replaced(herd, "control", settings={"VMHERD_BANDWIDTH_MIB_S": "10"}), ThreadPoolExecutor() as pool:
        following = pool.submit(list, herd.cluster.evict("linux-vm").progress(timeout=100))
        wait_until(lambda: outside.job(source, guest).get("memory_iteration", 0) >= 4, 60, "a fourth pass over it")
        guest.set_dirty_rate(0)
        shown: list[Progress] = following.result()
    percents = [progress.percent for progress in shown]
    assert percents == sorted(percents)
    assert len({percent for percent in percents if 10 <= percent <= 90}) >= 3, percents
    assert (percents[-1], shown[-1].phase) == (100, OperationPhase.COMPLETED)
    assert list(dict.fromkeys(progress.phase for progress in shown)) == ["Pending", "InProgress", "Completed"]
    assert guest.trouble() == ""


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals_name_the_thing_and_the_reason(herd: LabHerd) -> None:
    vm = herd.lab.blank("linux-vm")
    herd.start_guests((vm, "h1"), up=False)

    with pytest.raises(LabError, match=r"exit 1: vmherd: VirtualMachine 'no-such-vm' not found in namespace 'default'"):
        herd.vmherd("evict", "no-such-vm")

    virsh(herd.lab.host("h1"), "suspend", vm.domain)
    herd.wait_vm("linux-vm", lambda it: it.status.phase == "Pause")
    with pytest.raises(LabError, match=r"Evict is not applicable: VirtualMachine 'linux-vm' is Pause, not Running"):
        herd.vmherd("evict", "linux-vm")
    virsh(herd.lab.host("h1"), "resume", vm.domain)
    herd.wait_vm("linux-vm", lambda it: it.status.phase == "Running")

    # No node fits: it waits, and says why.
    for node in ("h2", "h3"):
        herd.vmherd("cordon", node)
    name = herd.vmherd("evict", "linux-vm", "--no-wait").strip()
    told = "0/3 nodes: 2 cordoned, 1 where it runs"
    waiting = herd.wait_operation(name, lambda it: it.message == told)
    condition = find_condition(waiting.status.conditions, "Completed")
    assert condition is not None
    assert (waiting.status.phase, condition.reason) == ("Pending", "TargetUnschedulable")
    assert told in herd.vmherd("get", "vmop", "-o", "wide")

    # A second operation of the VM is refused while the first has not ended.
    with pytest.raises(Refused, match=f"Previously created operation '{name}' should finish first"):
        herd.cluster.evict("linux-vm")

    # It goes when a node fits.
    herd.vmherd("uncordon", "h3")
    ended = herd.wait_operation(name, lambda it: not it.is_active)
    assert ended.status.phase is OperationPhase.COMPLETED
    outside.assert_runs_once(herd, vm, "h3")


# --- behind our back --------------------------------------------------------------------------------------------------


def test_what_virsh_does_behind_our_back_appears_by_itself(herd: LabHerd) -> None:
    one, two = herd.lab.host("h1"), herd.lab.host("h2")
    vm = herd.lab.blank("linux-vm")
    herd.start_guests((vm, "h1"), up=False)

    virsh(one, "migrate", "--live", "--p2p", vm.domain, two.migration_uri)
    herd.wait_vm("linux-vm", lambda it: (it.status.phase, it.status.node_name) == ("Running", "h2"))
    assert seen_on(herd, "h2", vm) == "running"
    wait_until(lambda: seen_on(herd, "h1", vm) in {"", "absent"}, 20, "it is seen no more on h1")
    assert re.search(r"^linux-vm +Running +h2 ", herd.vmherd("get", "vm"), re.MULTILINE)

    virsh(two, "suspend", vm.domain)
    herd.wait_vm("linux-vm", lambda it: it.status.phase == "Pause")
    virsh(two, "resume", vm.domain)
    herd.wait_vm("linux-vm", lambda it: it.status.phase == "Running")
    # And it can be moved on, as any other.
    assert herd.cluster.evict("linux-vm").wait(timeout=60).phase is OperationPhase.COMPLETED
    where = herd.cluster.vm("linux-vm").status.node_name
    outside.assert_runs_once(herd, vm, where)

    # Its policy brings back what somebody destroyed: as its next incarnation, and once.
    before = herd.cluster.vm("linux-vm").status.incarnation
    virsh(herd.lab.host(where), "destroy", vm.domain)
    again = herd.wait_vm("linux-vm", lambda it: it.status.phase == "Running" and it.status.incarnation > before)
    assert again.status.incarnation == before + 1
    outside.assert_runs_once(herd, vm, again.status.node_name)


def test_domains_that_are_not_ours_are_counted_and_never_touched(herd: LabHerd) -> None:
    lab, host = herd.lab, herd.lab.host("h2")
    ours = lab.blank("linux-vm")
    foreign = lab.blank("by-hand", namespace="nobody", memory_mib=48)
    herd.start_guests((ours, "h1"), up=False)
    # One that runs, and one that is only defined.
    definition = lab.directory / "by-hand.xml"
    definition.write_text(foreign.xml)
    virsh(host, "create", str(definition))
    defined = lab.blank("defined", namespace="nobody")
    definition.write_text(defined.xml)
    virsh(host, "define", str(definition))
    pid = host.qemu_pid(foreign.uuid)

    wait_until(lambda: seen_on(herd, "h2", foreign) == "running", 20, "it is in the inventory")
    wait_until(lambda: seen_on(herd, "h2", defined) == "shutoff", 20, "the defined one is too")
    assert inventory(herd, "h2")[foreign.uuid].vm == ""
    assert herd.cluster.store.redis.hget(keys.claims("h2"), f"domain/{foreign.uuid}") == "48 1000"
    assert "by-hand" not in herd.vmherd("get", "vm", "-A")

    # It takes room: its node is the fuller one.
    assert herd.cluster.evict("linux-vm").wait(timeout=60).resource.status.target_node == "h3"
    assert herd.cluster.migrate("linux-vm", node="h2").wait(timeout=60).phase is OperationPhase.COMPLETED
    herd.processes["h2/agent"].kill()
    herd.processes["h2/agent"].wait_restarts(1, 30)
    herd.wait_ready(["h1", "h2", "h3"])
    assert host.qemu_pid(foreign.uuid) == pid
    assert virsh(host, "domstate", foreign.domain).strip() == "running"
    assert virsh(host, "domstate", defined.domain).strip() == "shut off"

    virsh(host, "destroy", foreign.domain)
    virsh(host, "undefine", defined.domain)
    wait_until(lambda: not {foreign.uuid, defined.uuid} & set(inventory(herd, "h2")), 20, "they are gone from it")
    assert herd.cluster.store.redis.hget(keys.claims("h2"), f"domain/{foreign.uuid}") is None


def inventory(herd: LabHerd, node: str) -> dict[str, SeenDomain]:
    """What a node's inventory has, by UUID."""
    return herd.cluster.store.get(NodeInventory, node).domains


def seen_on(herd: LabHerd, node: str, guest: Guest) -> str:
    """A domain's state by a node's inventory; empty if that does not have it."""
    seen = inventory(herd, node).get(guest.uuid)
    return seen.state if seen is not None else ""


# --- a node's rights --------------------------------------------------------------------------------------------------


def test_a_nodes_redis_user_can_touch_nothing_but_its_own(herd: LabHerd) -> None:
    client = redis.Redis(
        unix_socket_path=str(herd.redis.socket_path),
        username=access.user_name("h1"),
        password=herd._passwords["h1"],
        decode_responses=True,
    )
    # What it must be able to do, it can.
    NodeStore(client, "h1").report("Nothing", {})
    assert client.get(keys.lease("h1"))
    assert client.hgetall(keys.orders("h1")) == {}

    lua = "return redis.call('SET', KEYS[1], 'x')"
    refused: dict[str, Callable[[], object]] = {
        "another's lease": lambda: client.set(keys.lease("h2"), "{}"),
        "another's lease, read": lambda: client.get(keys.lease("h2")),
        "another's lease, by a script": lambda: client.eval(lua, 1, keys.lease("h2")),
        "another's lease, by a script that does not declare it": lambda: client.eval(
            f"return redis.call('SET', '{keys.lease('h2')}', 'x')", 0
        ),
        "the lease of a name that begins like its own": lambda: client.set(keys.lease("h10"), "{}"),
        "another's reports": lambda: client.xadd(keys.reports("h2"), {"kind": "Ended", "body": "{}"}),
        "a script of the product's, for another": lambda: NodeStore(client, "h2").renew_lease(a_lease()),
        "its own grants": lambda: client.hset(keys.grants("h1"), "default/x", "{}"),
        "another's grants": lambda: client.hgetall(keys.grants("h2")),
        "its own orders": lambda: client.hdel(keys.orders("h1"), "x"),
        "the herd's slots": lambda: client.srem(keys.SLOTS_CLUSTER, "default/x"),
        "its own slot": lambda: client.srem(keys.slots_outbound("h1"), "default/x"),
        "another's slot": lambda: client.sadd(keys.slots_outbound("h2"), "default/x"),
        "reservations": lambda: client.hset(keys.claims("h1"), "vm/default/x", "0 0"),
        "who is schedulable": lambda: client.sadd(keys.SCHEDULABLE, "h1"),
        "documents": lambda: client.hset(keys.resources("VirtualMachine"), "default/x", "1 1 {}"),
        "documents, read": lambda: client.hgetall(keys.resources("VirtualMachine")),
        "the change stream": lambda: client.xadd(keys.CHANGES, {"type": "DELETED"}),
        "the record of which Redis this is": lambda: client.hset(keys.IDENTITY, "state", "normal"),
        "the epochs": lambda: client.incr(keys.EPOCH),
        "how far its reports are read": lambda: client.hset(keys.CURSORS, "h1", "0-0"),
        "the control queue": lambda: client.lpush("control", "{}"),
        "the liveness queue": lambda: client.lpush("liveness", "{}"),
        "another's migrations": lambda: client.lpush(migrate_queue("h2"), "{}"),
        "another's migrations, read": lambda: client.rpop(migrate_queue("h2")),
        "another's lifecycle": lambda: client.lpush(lifecycle_queue("h2"), "{}"),
        "another's messages under way": lambda: client.hgetall(access.unacked_prefix("h2", "migrate")),
        "the bindings of a queue that is not its own": lambda: client.sadd("_kombu.binding.control", "x"),
        "results of tasks": lambda: client.set("celery-task-meta-x", "{}"),
        "remote control of workers": lambda: client.publish("/0.celery.pidbox", "{}"),
        "all keys' names": lambda: client.keys("*"),
        "all keys' names, slowly": client.scan,
        "all of it": client.flushall,
        "the configuration": lambda: client.config_get("*"),
        "its own rights": lambda: client.acl_setuser("node-h1", keys=["*"]),
        "what others do": client.slowlog_get,
    }
    for what, attempt in refused.items():
        told = told_by(attempt)
        assert re.search(r"no permissions|can't (access|run)", told, re.IGNORECASE), f"{what}: {told}"
    client.close()


def told_by(attempt: Callable[[], object]) -> str:
    """The error of an attempt at something; empty if it is done."""
    try:
        attempt()
    except (redis.exceptions.ResponseError, StoreUnavailable) as error:
        return str(error)
    return ""


# --- Flower -----------------------------------------------------------------------------------------------------------

FLOWER_PORT = 5555
FLOWER_PASSWORD = "let-me-see"


class Flower:
    """`vmherd run flower`, asked from where it runs."""

    def __init__(self, herd: LabHerd) -> None:
        self._control = herd.lab.control
        env = herd.environment(VMHERD_REDIS_URL=herd.redis.url_for_hosts, VMHERD_FLOWER_PASSWORD=FLOWER_PASSWORD)
        argv = [sys.executable, "-m", "orchestrator.cli", "run", "flower"]
        self._process = self._control.popen(argv, env=env, log="flower", cwd=REPOSITORY)

    def __enter__(self) -> "Flower":
        wait_until(self._is_up, 40, "Flower answers", interval=0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_up(self) -> bool:
        assert self._process.poll() is None, "Flower has ended; see its log"
        try:
            return self.ask("/")[0] == http.HTTPStatus.OK
        except OSError:
            return False

    def ask(self, path: str, method: str = "GET", password: str | None = FLOWER_PASSWORD) -> tuple[int, str]:
        """Return the status and the body of an answer."""
        client = http.client.HTTPConnection("127.0.0.1", FLOWER_PORT, timeout=20)
        client.sock = self._control.connect(("127.0.0.1", FLOWER_PORT), 20)
        credentials = base64.b64encode(f"vmherd:{password}".encode()).decode()
        headers = {"Authorization": f"Basic {credentials}"} if password is not None else {}
        try:
            client.request(method, path, body="{}" if method == "POST" else None, headers=headers)
            answer = client.getresponse()
            return answer.status, answer.read().decode()
        finally:
            client.close()

    def get(self, path: str) -> Any:
        """Return what its API tells."""
        status, body = self.ask(path)
        assert status == http.HTTPStatus.OK, f"{path}: {status} {body}"
        return json.loads(body)


def test_flower_shows_workers_tasks_and_queues_and_changes_nothing(herd: LabHerd) -> None:
    lab = herd.lab
    vm = lab.blank("linux-vm")
    herd.start_guests((vm, "h1"), up=False)
    with Flower(herd) as flower:
        workers = {f"{role}@{host.name}" for host in lab.hosts for role in ("migrate", "lifecycle")}
        wait_until(
            lambda: workers <= {name for name, alive in flower.get("/api/workers?status=1").items() if alive},
            30,
            lambda: f"workers {sorted(workers)}; there are {flower.get('/api/workers?status=1')}",
            interval=0.3,
        )
        operation = herd.cluster.evict("linux-vm").wait(timeout=60)

        def migrations() -> list[dict[str, Any]]:
            return [task for task in flower.get("/api/tasks").values() if task["name"] == "node.migrate"]

        wait_until(lambda: [t for t in migrations() if t["state"] == "SUCCESS"], 20, lambda: str(migrations()))
        (task,) = migrations()
        assert task["worker"] == "migrate@h1"
        assert "default/linux-vm" in task["args"]
        assert operation.name in task["args"]

        queues = {queue["name"] for queue in flower.get("/api/queues/length")["active_queues"]}
        own = {queue(host.name) for host in lab.hosts for queue in (migrate_queue, lifecycle_queue)}
        assert {"control", "liveness", "fencing", *own} <= queues

        for path in ("/", "/api/workers", "/api/tasks", "/api/queues/length", "/tasks"):
            for password in (None, "wrong"):
                assert flower.ask(path, password=password)[0] == http.HTTPStatus.UNAUTHORIZED, path
        for path in (
            "/api/worker/shutdown/migrate@h1",
            "/api/worker/pool/grow/migrate@h1",
            "/api/task/async-apply/vmherd.evict",
            "/api/task/send-task/vmherd.evict",
            f"/api/task/revoke/{task['uuid']}?terminate=true",
            f"/api/task/abort/{task['uuid']}",
        ):
            assert flower.ask(path, "POST")[0] == http.HTTPStatus.FORBIDDEN, path
        assert_loopback_only(lab)


def assert_loopback_only(lab: Lab) -> None:
    """Nobody but the machine itself reaches it."""
    with pytest.raises(ConnectionRefusedError):
        lab.control.connect((lab.control.address, FLOWER_PORT))
    with pytest.raises(ConnectionRefusedError):
        lab.hosts[0].space.connect((lab.control.address, FLOWER_PORT))
