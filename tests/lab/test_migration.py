"""A guest moves: what a person sees of it, how fast it may go, and how it is called off."""

import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.cluster import Operation
from orchestrator.errors import NotFound
from orchestrator.resources import Event, GrantState, Node, OperationPhase, VirtualMachineOperation
from tests.lab import outside
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.host import LabHost
from tests.lab.lab import Lab
from tests.lab.mutants import replaced
from tests.lab.observer import DoubleRunObserver, downtimes, observed_migrations, qemu_runs, stream_migrations
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(240)

PLATFORM_MANIFEST = """\
apiVersion: virtualization.deckhouse.io/v1alpha2
kind: VirtualMachineOperation
metadata:
  generateName: evict-linux-vm-
spec:
  virtualMachineName: linux-vm
  type: Evict
"""

FIVE_GBIT_BYTES = 5_000_000_000 // 8


class VmWatch:
    """`vmherd get vm -w`, running beside the test; a context manager."""

    def __init__(self, herd: LabHerd, log: str) -> None:
        self._file = herd.lab.logs / f"{log}.log"
        self._process = herd.lab.control.popen(
            [sys.executable, "-m", "orchestrator.cli", "get", "vm", "-w"],
            env=herd.environment(VMHERD_REDIS_URL=herd.redis.url_for_hosts),
            log=log,
        )

    def __enter__(self) -> "VmWatch":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def rows(self, name: str) -> list[dict[str, str]]:
        """What it has printed about a VM, by column, oldest first."""
        header, *lines = self._file.read_text().splitlines() or [""]
        rows = [dict(zip(header.split(), line.split(), strict=True)) for line in lines]
        return [row for row in rows if row["NAME"] == name]


def events_about(herd: LabHerd, kind: str, name: str) -> list[str]:
    """The reasons of the events about a resource, oldest first."""
    found = [
        e for e in herd.cluster.store.all(Event) if (e.involved_object.kind, e.involved_object.name) == (kind, name)
    ]
    return [event.reason for event in sorted(found, key=lambda event: event.created_version)]


def test_the_platforms_manifest_moves_a_guest_under_a_watch(herd: LabHerd, capsys: pytest.CaptureFixture[str]) -> None:
    lab = herd.lab
    guest = lab.guest("linux-vm", address="192.0.2.101", dirty_mib_s=2, working_set_mib=16)
    doubles = DoubleRunObserver(lab)
    herd.start_guests((guest, "h1"))
    before = guest.wait_ticks(1)
    with VmWatch(herd, "watch-vm") as watch, lab.sampler(guest) as sampler:
        wait_until(lambda: watch.rows("linux-vm"), 20, "the watch shows the VM")
        created = herd.vmherd("create", "-f", "-", stdin=PLATFORM_MANIFEST)
        match = re.search(r"\bevict-linux-vm-\w+", created)
        assert match is not None, created
        operation = herd.cluster.operation(match[0]).wait(timeout=90)
        assert operation.phase is OperationPhase.COMPLETED, operation.message
        target = operation.resource.status.target_node
        assert target in {"h2", "h3"}
        wait_until(lambda: watch.rows("linux-vm")[-1]["NODE"] == target, 20, lambda: str(watch.rows("linux-vm")))
        after = guest.wait_ticks(1)
        samples = sampler.stop()
        rows = watch.rows("linux-vm")

    phases = [row["PHASE"] for row in rows]
    changes = [phase for index, phase in enumerate(phases) if index == 0 or phases[index - 1] != phase]
    assert changes == ["Running", "Migrating", "Running"]
    assert [row["NODE"] for row in rows if row["PHASE"] == "Migrating"] == ["h1"] * phases.count("Migrating")
    assert (rows[0]["NODE"], rows[-1]["NODE"]) == ("h1", target)
    assert {row["IPADDRESS"] for row in rows} == {guest.address}

    assert after.boot_id == before.boot_id
    assert after.ticks > before.ticks
    assert after.uptime_s > before.uptime_s
    assert guest.trouble() == ""
    doubles.check()

    (seen,) = downtimes(lab)[guest.domain]
    said_ms = operation.resource.status.downtime_ms
    with capsys.disabled():
        print(
            f"\ndowntime: linux-vm (192 MiB, dirties 2 MiB/s) h1 -> {target}: {said_ms} ms by status.downtimeMs, "
            f"{seen * 1000:.0f} ms by the QEMUs' own events, {samples.longest_gap_s * 1000:.0f} ms without an answer "
            f"to pings from outside ({samples.sent} sent)"
        )
    assert said_ms is not None
    assert said_ms <= (samples.longest_gap_s + 0.1) * 1000

    outside.assert_runs_once(herd, guest, target)
    assert lab.host("h1").connect().listAllDomains() == []  # no definition is left either
    assert lab.host(target).connect().lookupByUUIDString(guest.uuid).isPersistent() == 0
    for kind, name in (("VirtualMachine", "linux-vm"), ("VirtualMachineOperation", operation.name)):
        reasons = [reason for reason in events_about(herd, kind, name) if reason.startswith("Migration")]
        assert reasons == ["MigrationStarted", "MigrationSucceeded"], kind


def test_migrate_goes_where_it_is_told(herd: LabHerd) -> None:
    vm = herd.lab.blank("chosen")
    herd.start_guests((vm, "h1"), up=False)
    # Left to itself it would go to h2, the first of two equals.
    herd.vmherd("migrate", "chosen", "--node", "h3")
    outside.assert_runs_once(herd, vm, "h3")
    store = herd.cluster.store
    for name, disk in (("h1", "spinning"), ("h2", "ssd")):
        node = store.get(Node, name)
        labels = {**node.metadata.labels, "disk": disk}
        store.must_commit(store.batch().put(node, node.with_(metadata=node.metadata.with_(labels=labels))))
    operation = herd.cluster.migrate("chosen", node_selector={"disk": "ssd"}).wait(timeout=60)
    assert operation.phase is OperationPhase.COMPLETED, operation.message
    outside.assert_runs_once(herd, vm, "h2")


def test_the_default_bandwidth_is_five_gigabit(herd: LabHerd) -> None:
    vm = outside.laden(herd.lab, "default-rate", ballast_mib=256)
    source = herd.lab.host("h1")
    herd.start_guests((vm, "h1"), up=False)
    by_itself = outside.max_bandwidth(source, vm)
    operation = herd.cluster.evict(vm.name)
    # From before the first byte is sent to the end of the source's QEMU it is what libvirt was asked for.
    asked = wait_until(lambda: _changed(outside.max_bandwidth(source, vm), by_itself), 30, "libvirt sets the bandwidth")
    assert asked == 596 * outside.MIB
    assert asked <= FIVE_GBIT_BYTES < asked + outside.MIB
    assert operation.wait(timeout=60).phase is OperationPhase.COMPLETED


def _changed(value: int | None, before: int | None) -> int | None:
    assert value is not None, "the migration was over before its bandwidth was seen"
    return value if value != before else None


def test_a_bandwidth_of_20_mib_s_holds(herd: LabHerd, capsys: pytest.CaptureFixture[str]) -> None:
    vm = outside.laden(herd.lab, "slow-rate", ballast_mib=120)
    source = herd.lab.host("h1")
    herd.start_guests((vm, "h1"), up=False)
    with replaced(herd, "control", settings={"VMHERD_BANDWIDTH_MIB_S": "20"}):
        operation = herd.cluster.evict(vm.name)
        samples = _measure(source, vm)
        assert outside.max_bandwidth(source, vm) == 20 * outside.MIB
        assert operation.wait(timeout=90).phase is OperationPhase.COMPLETED
    (first, last) = samples
    by_libvirt = (last["data_processed"] - first["data_processed"]) / (last["time_elapsed"] - first["time_elapsed"])
    by_cable = (last["sent"] - first["sent"]) / (last["at"] - first["at"])
    rates = {"libvirt's job statistics": by_libvirt * 1000 / outside.MIB, "the host's cable": by_cable / outside.MIB}
    with capsys.disabled():
        for who, rate in rates.items():
            print(f"\nbandwidth: 20 MiB/s asked, {rate:.2f} MiB/s by {who}, over {last['at'] - first['at']:.1f} s")
    for who, rate in rates.items():
        assert 18 <= rate <= 22, who


def _measure(source: LabHost, vm: Guest) -> tuple[dict[str, float], dict[str, float]]:
    """Look at a migration in its steady state: once after some MiB were sent, and once before the last ones are."""

    def look(stats_wanted: Callable[[dict[str, int]], bool]) -> Callable[[], dict[str, float]]:
        def attempt() -> dict[str, float]:
            stats = outside.job(source, vm)
            if not stats or not stats_wanted(stats):
                return {}
            return {**stats, "at": time.monotonic(), "sent": outside.sent_bytes(source)}

        return attempt

    first = wait_until(look(lambda stats: stats["data_processed"] > 4 * outside.MIB), 30, "it is being sent")
    last = wait_until(look(lambda stats: stats["data_processed"] > 100 * outside.MIB), 60, "most of it was sent")
    return first, last


@pytest.fixture(scope="class")
def _crawling(module_herd: LabHerd) -> Iterator[None]:
    """Migrations take as long as a test wants them to: 1 MiB/s, until it sets another speed from outside."""
    with replaced(module_herd, "control", settings={"VMHERD_BANDWIDTH_MIB_S": "1"}):
        yield


@pytest.mark.usefixtures("_crawling")
class TestAborts:
    def test_deleting_a_pending_operation_leaves_the_vm_where_it_is(self, herd: LabHerd) -> None:
        lab = herd.lab
        blocker = outside.laden(lab, "blocker", ballast_mib=24)
        stays, later = lab.blank("stays"), lab.blank("later")
        herd.start_guests((blocker, "h1"), (stays, "h1"), (later, "h1"), up=False)
        since = time.time()

        # Behind the source's slot.
        first = herd.cluster.evict("blocker")
        wait_until(lambda: outside.job(lab.host("h1"), blocker), 30, "the first migration's job")
        second = herd.cluster.evict("stays")
        herd.wait_operation(second.name, lambda op: "outbound slot of node h1" in op.message)
        herd.vmherd("delete", "vmop", second.name)
        with pytest.raises(NotFound):
            second.refresh()
        outside.release(lab.host("h1"), blocker)
        assert first.wait(timeout=60).phase is OperationPhase.COMPLETED

        # Behind a herd without a target.
        for node in ("h2", "h3"):
            herd.cluster.cordon(node)
        third = herd.cluster.evict("stays")
        herd.wait_operation(third.name, lambda op: "2 cordoned" in op.message)
        herd.vmherd("delete", "vmop", third.name)
        for node in ("h2", "h3"):
            herd.cluster.uncordon(node)

        # One that came after them has taken the slot and the targets that they waited for: their time has passed.
        assert herd.cluster.evict("later").wait(timeout=60).phase is OperationPhase.COMPLETED
        assert [seen.domain for seen in observed_migrations(lab, since=since)] == [blocker.domain, later.domain]
        assert [seen.domain for seen in stream_migrations(lab, since=since)] == [blocker.domain, later.domain]
        assert [call["operation"] for call in hook_calls(lab, stays, since)] == []
        outside.assert_runs_once(herd, stays, "h1")

    def test_deleting_one_in_progress_stops_libvirts_job_and_the_guest_does_not_notice(self, herd: LabHerd) -> None:
        lab, source = herd.lab, herd.lab.host("h1")
        guest = lab.guest("unmoved", address="192.0.2.102", dirty_mib_s=2, working_set_mib=16)
        herd.start_guests((guest, "h1"))
        before = guest.wait_ticks(1)
        operation = herd.cluster.evict("unmoved")
        shown = herd.wait_operation(operation.name, lambda op: op.status.progress >= 10)
        assert shown.status.phase is OperationPhase.IN_PROGRESS
        assert outside.job(source, guest)
        assert outside.states(lab, guest) == {"h1": "running", shown.status.target_node: "paused"}

        told = herd.vmherd("delete", "vmop", operation.name)

        assert "Aborted: aborted; it runs on node h1" in told
        assert outside.job(source, guest) == {}
        outside.assert_runs_once(herd, guest, "h1")
        assert herd.leftovers() == {}
        with pytest.raises(NotFound):
            operation.refresh()
        assert_aborted(operation.wait(timeout=10))  # who asks now is told all the same
        after = guest.wait_ticks(1)
        assert after.boot_id == before.boot_id
        assert guest.trouble() == ""
        assert streams_of(lab, guest) == ["cancelled"]
        assert len(running_times(lab, guest)) == 1, "its processors were stopped for a while"
        assert events_about(herd, "VirtualMachine", "unmoved")[-1] == "MigrationAborted"

        # Its slots are free: it goes when it is asked to again.
        again = herd.cluster.evict("unmoved")
        outside.release(source, guest)
        assert again.wait(timeout=60).phase is OperationPhase.COMPLETED
        assert guest.trouble() == ""

    def test_an_abort_before_the_job_exists_is_heeded(self, herd: LabHerd, tmp_path: Path) -> None:
        lab = herd.lab
        vm = outside.laden(lab, "early", ballast_mib=8)
        herd.start_guests((vm, "h1"), up=False)
        since = time.time()

        # Granted, and its worker has not taken the message: it does so afterwards, and does nothing.
        worker = herd.processes["h1/migrate"]
        worker.pause()
        operation = herd.cluster.evict("early")
        herd.wait_operation(operation.name, lambda op: op.status.grant is not None)
        with aborting(operation):
            worker.resume()
        assert_aborted(operation)
        assert hook_calls(lab, vm, since) == []
        outside.assert_runs_once(herd, vm, "h1")

        # Taken, and about to be begun: the abort is heard when there is nothing yet to be aborted.
        held = replaced(herd, "h1/migrate", fault="hold:migrate", settings={"VMHERD_FAULT_DIR": str(tmp_path)})
        log = lab.logs / "h1-migrate.log"
        with held:
            operation = herd.cluster.evict("early")
            herd.wait_operation(operation.name, lambda op: _state(op) is GrantState.RUNNING)
            heard = log.read_text().count("abort asked for")
            with aborting(operation):
                wait_until(lambda: log.read_text().count("abort asked for") > heard, 20, "the worker has heard it")
                (tmp_path / "go").touch()
            assert_aborted(operation)
        assert streams_of(lab, vm) in ([], ["cancelled"])
        outside.assert_runs_once(herd, vm, "h1")

    def test_an_abort_at_any_time_ends_in_one_running_vm(self, herd: LabHerd) -> None:
        lab = herd.lab
        vm = outside.laden(lab, "any-time", ballast_mib=3)
        herd.start_guests((vm, "h1"), up=False)
        doubles = DoubleRunObserver(lab)
        node = "h1"
        outcomes = []
        for after_ms in (0, 5, 20, 50, 100, 200, 400, 800):
            since = time.time()
            operation = herd.cluster.evict("any-time")
            # The moments are what is tried out here; nothing is waited for.
            threading.Event().wait(after_ms / 1000)
            operation.abort(timeout=60)
            seen = observed_migrations(lab, since=since)
            match operation.phase:
                case OperationPhase.PENDING | OperationPhase.TERMINATING:
                    assert seen == [], f"{after_ms} ms: it was deleted before it began"
                    outcomes.append("deleted")
                case OperationPhase.FAILED:
                    assert_aborted(operation)
                    assert [s.outcome for s in seen if s.outcome == "completed"] == [], f"{after_ms} ms"
                    outcomes.append("aborted")
                case _:
                    assert operation.phase is OperationPhase.COMPLETED, f"{after_ms} ms: {operation.message}"
                    assert "too late to abort" in operation.message
                    node = operation.resource.status.target_node
                    outcomes.append("completed")
            outside.assert_runs_once(herd, vm, node)
            assert herd.leftovers() == {}, f"{after_ms} ms"
        assert outcomes[0] in {"deleted", "aborted"}
        assert "aborted" in outcomes
        doubles.check()

    def test_an_abort_that_comes_too_late_says_so(self, herd: LabHerd) -> None:
        lab = herd.lab
        vm = outside.laden(lab, "too-late", ballast_mib=8)
        herd.start_guests((vm, "h1"), up=False)
        operation = herd.cluster.evict("too-late")
        outside.release(lab.host("h1"), vm)
        # It has moved, and the herd has not heard of that when the abort comes.
        herd.processes["intake"].pause()
        try:
            (moved_to,) = wait_until(lambda: set(outside.states(lab, vm)) - {"h1"} if is_over(lab, vm) else set(), 30)
            with aborting(operation):
                herd.processes["intake"].resume()
        finally:
            herd.processes["intake"].resume()
        assert operation.phase is OperationPhase.COMPLETED
        assert operation.message == f"runs on node {moved_to}; it was too late to abort"
        outside.assert_runs_once(herd, vm, moved_to)


def hook_calls(lab: Lab, guest: Guest, since: float) -> list[dict[str, object]]:
    """The calls of libvirt's hook about a domain, on all hosts."""
    calls = [call for host in lab.hosts for call in host.hook_records()]
    return [call for call in calls if call["domain"] == guest.domain and call["at"] >= since]


def streams_of(lab: Lab, guest: Guest) -> list[str]:
    """How each migration of a guest ended, as its QEMUs saw it."""
    return [seen.outcome for seen in stream_migrations(lab) if seen.domain == guest.domain]


def is_over(lab: Lab, guest: Guest) -> bool:
    """Whether a migration is over for libvirt too: nothing is left on the source."""
    return streams_of(lab, guest) == ["completed"] and set(outside.states(lab, guest).values()) == {"running"}


def running_times(lab: Lab, guest: Guest) -> list[object]:
    """The uninterrupted times in which the guest's processors ran, on all hosts."""
    return [time for run in qemu_runs(lab.recorder.records()) if run.uuid == guest.uuid for time in run.running]


@contextlib.contextmanager
def aborting(operation: Operation) -> Iterator[None]:
    """Ask for an abort; after the block has made way for it, wait until the operation has ended."""
    thread = threading.Thread(target=operation.abort)
    thread.start()
    name, cluster = operation.name, operation._cluster
    wait_until(lambda: cluster.operation(name).phase is OperationPhase.TERMINATING, 10, "the abort is asked for")
    try:
        yield
    finally:
        thread.join(60)


def assert_aborted(operation: Operation) -> None:
    """It ended, and by the abort."""
    conditions = {c.type: c.reason for c in operation.resource.status.conditions}
    assert (operation.phase, conditions["Completed"]) == (OperationPhase.FAILED, "Aborted"), operation.message


def _state(operation: VirtualMachineOperation) -> GrantState | None:
    return operation.status.grant.state if operation.status.grant is not None else None
