"""Maintenance on real hosts: nodes emptied by `vmherd drain`, what interrupts that, and a rolling maintenance."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from orchestrator.queues import lifecycle_queue, migrate_queue
from orchestrator.resources import NodeDrain, VmPhase
from orchestrator.resources.drain import DrainPhase
from tests.browser.browsing import chromium, screenshot
from tests.browser.flower import Row, lengths, reading, tasks
from tests.kubectl import ApiProcess, Kubectl
from tests.lab import outside
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.lab import Lab
from tests.lab.observer import DoubleRunObserver, ObservedMigration, stream_migrations
from tests.lab.test_adoption import define, plain
from tests.processes import Processes
from tests.redis_server import free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(240)

SETTINGS = {"VMHERD_BANDWIDTH_MIB_S": "40"}
BALLAST_MIB = 120
"""Of a machine whose migration takes three seconds."""
GUIDE = ("--ignore-daemonsets", "--delete-emptydir-data")
"""Flags as the platform's guide to maintenance has them."""
LIKES_H1: dict[str, Any] = {
    "affinity": {
        "nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 100,
                    "preference": {
                        "matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["h1"]}]
                    },
                }
            ]
        }
    }
}
VM_ONLY = ("--pod-selector", "vm.kubevirt.internal.virtualization.deckhouse.io/name", "--delete-emptydir-data")


@pytest.fixture(scope="module")
def kubectl(module_herd: LabHerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    """Kubectl on an API server that reaches the lab's Redis from outside."""
    folder = tmp_path_factory.mktemp("api")
    with Processes(module_herd.redis.url, folder) as processes:
        yield ApiProcess(processes, folder, module_herd.redis.url).wait_ready().kubectl("maintainer")


@pytest.fixture(autouse=True)
def never_twice(herd: LabHerd) -> Iterator[None]:
    """Whatever happens, no guest runs twice."""
    doubles = DoubleRunObserver(herd.lab)
    yield
    doubles.check()


def begin(herd: LabHerd, *arguments: str) -> "subprocess.Popen[str]":
    """Begin a command as a person would, with its lines on standard output, and its complaints among them."""
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        env={**os.environ, **herd.environment(VMHERD_REDIS_URL=herd.redis.url)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def drain_of(herd: LabHerd, node: str) -> NodeDrain:
    return herd.cluster.store.get(NodeDrain, node)


def four(lab: Lab) -> list[Guest]:
    return [lab.guest(f"guest-{n}", address=f"192.0.2.{100 + n}") for n in range(1, 5)]


def moves_of(herd: LabHerd, guest: Guest) -> list[ObservedMigration]:
    """A guest's migrations, by the hosts' own record."""
    return [seen for seen in stream_migrations(herd.lab) if seen.domain == guest.domain]


def nodes_of(herd: LabHerd, guests: list[Guest]) -> set[str]:
    return {herd.cluster.vm(guest.name).status.node_name for guest in guests}


@pytest.mark.kubectl
def test_a_node_of_four_guests_is_drained_by_both_commands(herd: LabHerd, kubectl: Kubectl) -> None:
    guests = four(herd.lab)
    first, newcomer = herd.lab.blank("first"), herd.lab.blank("newcomer")
    herd.start_guests(*((guest, "h1") for guest in guests))
    herd.cluster.create(herd.manifest(first, **LIKES_H1))
    landed = herd.wait_vm(first.name, lambda vm: vm.status.phase is VmPhase.RUNNING)
    assert landed.status.node_name == "h1", "where the newcomer would land but for the drain"
    before = {guest.name: guest.wait_ticks(1) for guest in guests}
    plan = herd.vmherd("drain", "h1", "--dry-run")
    assert all(f"default/{guest.name}" in plan for guest in guests)
    assert not herd.cluster.node("h1").spec.unschedulable

    drain = begin(herd, "drain", "h1", *GUIDE)
    wait_until(lambda: herd.cluster.node("h1").spec.unschedulable, 30, "it is cordoned")
    herd.cluster.create(herd.manifest(newcomer, **LIKES_H1))
    herd.wait_vm(newcomer.name, lambda vm: vm.status.phase is VmPhase.RUNNING)
    assert herd.cluster.vm(newcomer.name).status.node_name != "h1"
    said, _ = drain.communicate(timeout=120)

    assert drain.returncode == 0, said
    assert "node/h1 drained" in said
    assert herd.lab.host("h1").connect().listAllDomains() == []
    assert "h1" not in nodes_of(herd, guests)
    for guest in guests:
        after = guest.wait_ticks(1)
        assert after.boot_id == before[guest.name].boot_id
        assert len(moves_of(herd, guest)) == 1

    herd.vmherd("uncordon", "h1", "--bring-back")
    wait_until(lambda: drain_of(herd, "h1").status.phase is DrainPhase.RETURNED, 90, "they are back")
    assert nodes_of(herd, guests) == {"h1"}, drain_of(herd, "h1").status.message
    with kubectl.beside("drain", "h1", *GUIDE) as second:
        assert second.ended(120) == 0, "\n".join(second.lines)
        second.wait_for("node/h1 drained")
    assert drain_of(herd, "h1").status.phase is DrainPhase.DRAINED, "the same drain, VM by VM"
    for guest in guests:
        assert guest.wait_ticks(1).boot_id == before[guest.name].boot_id
        assert len(moves_of(herd, guest)) == 3
        outside.assert_runs_once(herd, guest, herd.cluster.vm(guest.name).status.node_name)


def test_vms_only_and_the_way_home_while_what_is_not_ours_stays(herd: LabHerd) -> None:
    vm, other = herd.lab.blank("ours"), herd.lab.blank("not-ours")
    herd.start_guests((vm, "h1"), up=False)

    define(herd, herd.lab.host("h1"), plain(other, "not-ours"))
    said = herd.vmherd("drain", "h1", *VM_ONLY)
    assert "node/h1 drained" in said
    assert outside.states(herd.lab, other) == {"h1": "running"}
    outside.assert_runs_once(herd, vm, herd.cluster.vm(vm.name).status.node_name)
    assert herd.cluster.vm(vm.name).status.node_name != "h1"
    herd.vmherd("uncordon", "h1", "--bring-back")
    wait_until(lambda: drain_of(herd, "h1").status.phase is DrainPhase.RETURNED, 60, "it is back")
    outside.assert_runs_once(herd, vm, "h1")


@pytest.fixture
def flower(module_herd: LabHerd, tmp_path: Path) -> Iterator[Page]:
    """Flower in a browser; it reaches the lab's Redis from outside."""
    password, port = "flower-of-the-lab", free_port()
    settings = {"VMHERD_FLOWER_PASSWORD": password, "VMHERD_FLOWER_PORT": str(port)}
    with Processes(module_herd.redis.url, tmp_path, **settings) as processes, chromium() as browser:
        processes.run("flower", "flower")
        with reading(browser, f"http://127.0.0.1:{port}", password) as page:
            yield page


@pytest.mark.browser
def test_flower_shows_who_moves_what_in_a_drain_and_how_much_waits_in_each_queue(herd: LabHerd, flower: Page) -> None:
    vms = [outside.laden(herd.lab, f"shown-{n}", ballast_mib=BALLAST_MIB) for n in range(1, 4)]
    herd.start_guests(*((vm, "h1") for vm in vms), up=False)
    redis, worker = herd.cluster.store.redis, herd.processes["h1/migrate"]
    queues = [name for host in herd.lab.hosts for name in (migrate_queue(host.name), lifecycle_queue(host.name))]

    def waiting() -> dict[str, int]:
        return {name: redis.llen(name) for name in queues}

    def shown() -> dict[str, Row]:
        """By VM, what Flower lists of its migration."""
        listed = tasks(flower, "node.migrate")
        return {vm.name: row for vm in vms for row in reversed(listed) if f"/{vm.name}'" in row.args}

    worker.hold()
    worker.kill()
    try:
        drain = begin(herd, "drain", "h1", *GUIDE)
        wait_until(lambda: waiting()[migrate_queue("h1")] > 0, 60, "a message waits for the worker that is away")

        def is_right() -> bool:
            """Compare with Redis, in which nothing may have changed meanwhile."""
            before, listed = waiting(), lengths(flower)
            return before == waiting() == {name: listed[name] for name in queues} and before[migrate_queue("h1")] > 0

        wait_until(is_right, 60, lambda: f"the lengths of {waiting()}", interval=0.2)
        flower.screenshot(path=screenshot("flower-lab-broker"), full_page=True)
    finally:
        worker.release()
    wait_until(lambda: any(row.state == "STARTED" for row in shown().values()), 90, lambda: f"one under way: {shown()}")
    flower.screenshot(path=screenshot("flower-lab-tasks"), full_page=True)
    said, _ = drain.communicate(timeout=120)
    assert drain.returncode == 0, said
    wait_until(
        lambda: [row.state for row in shown().values()] == ["SUCCESS"] * len(vms),
        60,
        lambda: f"all ended: {shown()}",
        interval=0.5,
    )
    done = shown()
    for vm in vms:
        assert done[vm.name].worker == "migrate@h1", "the source's own worker moved it"
        operation = drain_of(herd, "h1").vms[f"default/{vm.name}"].operation
        assert operation in done[vm.name].args, "the operation is named"
        assert herd.cluster.vm(vm.name).status.node_name != "h1"
    herd.vmherd("uncordon", "h1")


def test_ctrl_c_stops_what_has_not_begun(herd: LabHerd) -> None:
    vms = [outside.laden(herd.lab, f"laden-{n}", ballast_mib=BALLAST_MIB) for n in range(1, 4)]
    herd.start_guests(*((vm, "h1") for vm in vms), up=False)
    drain = begin(herd, "drain", "h1", *GUIDE)
    wait_until(lambda: any(moves_of(herd, vm) for vm in vms), 60, "one is being sent", interval=0.05)
    drain.send_signal(signal.SIGINT)
    said, _ = drain.communicate(timeout=60)
    assert drain.returncode == 130, said
    assert "still moving: laden-" in said
    assert "stays cordoned: vmherd uncordon h1" in said
    wait_until(lambda: not herd.cluster.store.redis.hlen("active-operations"), 60, "what had begun has ended")
    moved = [vm for vm in vms if moves_of(herd, vm)]
    assert 1 <= len(moved) < 3
    assert herd.cluster.node("h1").spec.unschedulable
    assert drain_of(herd, "h1").status.phase is DrainPhase.CANCELLED
    herd.vmherd("uncordon", "h1")
    herd.cluster.migrate(moved[0].name, node="h1").wait(60)
    outside.assert_runs_once(herd, moved[0], "h1")


def test_the_control_plane_dies_in_the_midst_of_a_drain(herd: LabHerd) -> None:
    vms = [outside.laden(herd.lab, f"moving-{n}", ballast_mib=BALLAST_MIB) for n in range(1, 4)]
    herd.start_guests(*((vm, "h1") for vm in vms), up=False)
    client = begin(herd, "drain", "h1")
    wait_until(lambda: any(moves_of(herd, vm) for vm in vms), 60, "one is being sent", interval=0.05)
    client.kill()
    client.communicate()
    kill_the_control_plane(herd)
    wait_until(lambda: drain_of(herd, "h1").status.phase is DrainPhase.DRAINED, 120, "it is drained")
    assert outside.states(herd.lab, vms[0]).keys().isdisjoint({"h1"})
    for vm in vms:
        assert [seen.outcome for seen in moves_of(herd, vm)] == ["completed"], vm.name
        outside.assert_runs_once(herd, vm, herd.cluster.vm(vm.name).status.node_name)


def test_a_rolling_maintenance_outlives_whoever_runs_it(herd: LabHerd, tmp_path: Path) -> None:
    vms = [outside.laden(herd.lab, f"rolling-{n}", ballast_mib=BALLAST_MIB) for n in range(1, 3)]
    herd.start_guests(*((vm, "h1") for vm in vms), up=False)
    record = tmp_path / "hooks"
    arguments = ("maintain", "h1", "h2", "--name", "spring", "--hook", f"echo $VMHERD_NODE $VMHERD_ATTEMPT >> {record}")
    first = begin(herd, *arguments)
    wait_until(lambda: any(moves_of(herd, vm) for vm in vms), 60, "one is being sent", interval=0.05)
    first.kill()
    first.communicate()
    kill_the_control_plane(herd)
    wait_until(lambda: drain_of(herd, "h1").status.phase is DrainPhase.DRAINED, 120, "it is drained all the same")
    assert not record.exists()
    second = begin(herd, *arguments)
    store = herd.cluster.store
    wait_until(lambda: store.find(NodeDrain, "h2") is not None, 90, "the second node's turn has come", interval=0.05)
    kill_the_control_plane(herd)
    said, _ = second.communicate(timeout=150)
    assert second.returncode == 0, said
    assert record.read_text() == "h1 1\nh2 1\n"
    assert not any(herd.cluster.node(name).spec.unschedulable for name in ("h1", "h2"))
    for vm in vms:
        moves = moves_of(herd, vm)
        assert [seen.outcome for seen in moves] == ["completed"] * len(moves)
        sources = [seen.source for seen in moves]
        assert sources in (["h1"], ["h1", "h2"]), "once off each node that it was on"
        outside.assert_runs_once(herd, vm, herd.cluster.vm(vm.name).status.node_name)


def kill_the_control_plane(herd: LabHerd) -> None:
    """All that decides dies at once; the processes come back by themselves."""
    for name in ("control", "beat-1", "beat-2"):
        herd.processes[name].kill()
