"""Processes are killed, paused and restarted, messages doubled and lost, in the midst of real migrations.

Whatever happens: the guest runs on, once; libvirt never has two migrations of it; the operation ends Completed, or the
guest is back on its source and is then moved; and no slot, reservation, grant or order is left.
"""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator import Operation
from orchestrator.resources import GrantState, OperationPhase, VirtualMachine
from orchestrator.store import keys
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.observer import DoubleRunObserver, max_concurrent, observed_migrations, stream_migrations
from tests.waiting import wait_until

SETTINGS = {"VMHERD_BANDWIDTH_MIB_S": "20"}
"""A migration of a guest takes some seconds: time enough to hurt it in the middle."""

ENDS_WITHIN_S = 60


@pytest.fixture
def herd(module_herd: LabHerd) -> Iterator[LabHerd]:
    """The module's herd, with one guest for all tests: booting one for each would take longer than they do."""
    module_herd.wait_ready([host.name for host in module_herd.lab.hosts])
    yield module_herd
    wait_until(lambda: not module_herd.leftovers(), 30, lambda: f"no leftovers: {module_herd.leftovers()}")


@pytest.fixture
def guest(herd: LabHerd) -> Guest:
    """The guest, running and well, wherever the test before left it."""
    guest = herd.lab.guest("linux-vm", address="192.0.2.101", memory_mib=160)
    vm = herd.cluster.store.find(VirtualMachine, "default/linux-vm")
    if vm is None or vm.status.phase != "Running" or not guest.is_up():
        herd.clear()  # the first test, or one before this failed
        herd.start_guests((guest, ""))
    return guest


@pytest.fixture
def source(herd: LabHerd, guest: Guest) -> str:
    """The node on which the guest runs."""
    del guest
    return herd.cluster.vm("linux-vm").status.node_name


@pytest.fixture
def fault_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where faulty processes remember that they died."""
    monkeypatch.setenv("VMHERD_FAULT_DIR", str(tmp_path))
    return tmp_path


@contextlib.contextmanager
def faulty(herd: LabHerd, name: str, fault: str) -> Iterator[None]:
    """Run one process of the herd with a fault inside; put the sound one back at the end."""

    def start(entry: list[str] | None) -> None:
        if name in herd.processes:
            herd.processes.pop(name).stop()
        if "/" in name:
            host, process = name.split("/")
            herd.start_node(host, process, entry)
        else:
            herd.start_control(name, entry)

    start(["-m", "tests.lab.faulty", fault])
    try:
        yield
    finally:
        start(None)


@contextlib.contextmanager
def watched(herd: LabHerd, guest: Guest) -> Iterator[None]:
    """Check what must hold throughout: one run of the guest, one migration at a time, the same guest afterwards."""
    began = time.time()
    before = guest.status()
    double = DoubleRunObserver(herd.lab)
    yield
    double.check()
    migrations = observed_migrations(herd.lab, since=began)
    assert max_concurrent(migrations) <= 1, migrations
    after = guest.wait_ticks(5)
    assert after.boot_id == before.boot_id, "another machine answers"
    assert after.ticks > before.ticks
    assert guest.healthy(), guest.trouble()


def ends_moved(herd: LabHerd, operation: Operation, source: str) -> None:
    """The operation completes, and the VM is not where it was."""
    operation.wait(ENDS_WITHIN_S)
    assert operation.phase is OperationPhase.COMPLETED, operation.message
    vm = herd.cluster.vm("linux-vm")
    assert vm.status.phase == "Running"
    assert vm.status.node_name == operation.resource.status.target_node != source
    wait_until(lambda: not herd.leftovers(), 10, lambda: str(herd.leftovers()))


def migrating(herd: LabHerd, operation: Operation) -> None:
    """Wait until libvirt migrates."""
    wait_until(
        lambda: any(m.outcome == "unfinished" for m in stream_migrations(herd.lab)) and _state(operation) == "Running",
        30,
        "libvirt migrates",
    )


def _state(operation: Operation) -> str:
    grant = operation.refresh().resource.status.grant
    return grant.state.value if grant else ""


def test_worker_dead_before_it_takes_the_message(herd: LabHerd, guest: Guest, source: str) -> None:
    worker = herd.processes[f"{source}/migrate"]
    with watched(herd, guest):
        worker.hold()
        worker.kill()
        operation = herd.cluster.evict("linux-vm")
        wait_until(lambda: _state(operation) == GrantState.GRANTED, 20, "granted")
        worker.release()
        ends_moved(herd, operation, source)


@pytest.mark.parametrize("fault", ["die:claim:before", "die:claim:after", "die:ended:before", "die:ended:after"])
def test_worker_killed_around_the_call(herd: LabHerd, guest: Guest, source: str, fault_dir: Path, fault: str) -> None:
    with faulty(herd, f"{source}/migrate", fault):
        with watched(herd, guest):
            ends_moved(herd, herd.cluster.evict("linux-vm"), source)
        assert list(fault_dir.iterdir()), "the worker was to die"


def test_worker_killed_in_mid_migration(herd: LabHerd, guest: Guest, source: str) -> None:
    with watched(herd, guest):
        operation = herd.cluster.evict("linux-vm")
        migrating(herd, operation)
        herd.processes[f"{source}/migrate"].kill()
        ends_moved(herd, operation, source)


def test_worker_killed_and_then_aborted(herd: LabHerd, guest: Guest, source: str) -> None:
    """The job goes on without its worker; the abort must reach it all the same."""
    host = herd.lab.host(source)
    with watched(herd, guest):
        operation = herd.cluster.evict("linux-vm")
        migrating(herd, operation)
        host.shape(rate_mbit=8)  # a minute and more to go, whatever else this machine does
        herd.processes[f"{source}/migrate"].kill()
        operation.abort(ENDS_WITHIN_S)
        assert operation.phase is OperationPhase.FAILED, operation.message
        assert "aborted" in operation.message
        assert herd.cluster.vm("linux-vm").status.node_name == source
        host.unshape()


def test_holder_paused_beyond_its_grant(herd: LabHerd, guest: Guest, source: str) -> None:
    """It is killed while it is paused; what it would have done next is never done."""
    worker = herd.processes[f"{source}/migrate"]
    with watched(herd, guest):
        operation = herd.cluster.evict("linux-vm")
        wait_until(lambda: _state(operation) in {GrantState.RUNNING, GrantState.SETTLING}, 20, "taken")
        paused, restarts = worker.pid, worker.restarts
        worker.pause()
        ends_moved(herd, operation, source)
        worker.resume()
        worker.wait_restarts(restarts + 1)
        assert worker.pid != paused
        node = herd.cluster.vm("linux-vm").status.node_name
        guest.wait_ticks(20)
        assert herd.cluster.vm("linux-vm").status.node_name == node, "the paused holder did something"


def test_worker_paused_before_it_takes_the_grant(herd: LabHerd, guest: Guest, source: str) -> None:
    worker = herd.processes[f"{source}/migrate"]
    with watched(herd, guest):
        worker.pause()
        operation = herd.cluster.evict("linux-vm")
        ends_moved(herd, operation, source)
        worker.resume()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(1, 7))
def test_intake_killed_at_each_commit(
    herd: LabHerd, guest: Guest, source: str, fault_dir: Path, number: int, when: str
) -> None:
    with faulty(herd, "intake", f"die:commit:{number}:{when}"), watched(herd, guest):
        ends_moved(herd, herd.cluster.evict("linux-vm"), source)
    assert list(fault_dir.iterdir()), "intake was to die"


@pytest.mark.parametrize("when", ["before", "after"])
def test_control_worker_killed_at_the_grant(
    herd: LabHerd, guest: Guest, source: str, fault_dir: Path, when: str
) -> None:
    with faulty(herd, "control", f"die:commit:1:{when}"), watched(herd, guest):
        ends_moved(herd, herd.cluster.evict("linux-vm"), source)
    assert list(fault_dir.iterdir()), "the control worker was to die"


def test_control_plane_killed_at_random(herd: LabHerd, guest: Guest) -> None:
    """`kill -9` of control worker and intake again and again, at moments that nobody chose."""
    chance = random.Random(2026)
    with watched(herd, guest):
        for _ in range(3):
            source = herd.cluster.vm("linux-vm").status.node_name
            operation = herd.cluster.evict("linux-vm")
            for _ in range(4):
                time.sleep(chance.uniform(0.0, 1.5))  # the moment is the test
                herd.processes[chance.choice(["control", "intake"])].kill()
            ends_moved(herd, operation, source)


def test_redis_killed_and_restarted_in_mid_migration(herd: LabHerd, guest: Guest, source: str) -> None:
    with watched(herd, guest):
        operation = herd.cluster.evict("linux-vm")
        migrating(herd, operation)
        herd.redis.kill()
        herd.redis.start()
        wait_until(lambda: _answers(operation.refresh), 20, "Redis answers")
        ends_moved(herd, operation, source)
        assert herd.cluster.store.redis.hget(keys.IDENTITY, "state") == "normal"
        assert herd.cluster.store.version() > 2**20, "the counter skips ahead"


def test_redis_away_while_the_migration_ends(herd: LabHerd, guest: Guest, source: str) -> None:
    """The end comes while nobody can be told: it is told when Redis is back."""
    with watched(herd, guest):
        operation = herd.cluster.evict("linux-vm")
        migrating(herd, operation)
        herd.redis.kill()
        wait_until(lambda: all(m.outcome != "unfinished" for m in observed_migrations(herd.lab)), 30, "libvirt is done")
        herd.redis.start()
        wait_until(lambda: _answers(operation.refresh), 20, "Redis answers")
        ends_moved(herd, operation, source)


@pytest.mark.parametrize("fault", ["double", "lose"])
def test_messages_doubled_and_lost(herd: LabHerd, guest: Guest, source: str, fault: str) -> None:
    """Of the control worker and of intake: between them they send every message but the first wake-up."""
    with faulty(herd, "control", fault), faulty(herd, "intake", fault), watched(herd, guest):
        ends_moved(herd, herd.cluster.evict("linux-vm"), source)


def _answers(call: Callable[[], object]) -> bool:
    try:
        call()
    except Exception:  # noqa: BLE001 - whatever is wrong with it, it does not answer yet
        return False
    return True
