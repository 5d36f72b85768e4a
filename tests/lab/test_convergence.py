"""Guests that write their memory faster than it is sent: what was foreseen of their migrations, and what came.

The link carries 20 MiB/s, by the product's own cap. A guest of 192 MiB rewrites 64 MiB of it, at a rate that is set
while it runs. After each migration, and each that was aborted, the guest must be well: emulation loses writes in long
pre-copies unless the lab's wrapper of QEMU sees to it (libvirt.md, section 0).
"""

import time
from dataclasses import dataclass
from typing import Any

import pytest

from orchestrator.resources import Event, OperationPhase, VirtualMachineOperation, find_condition
from orchestrator.resources.vm import LiveMigrationPolicy
from orchestrator.resources.vmop import POST_COPY_ANNOTATION, MigrationOutcome, Prediction
from tests.lab import outside
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.mutants import replaced
from tests.lab.observer import DoubleRunObserver, stream_migrations

pytestmark = pytest.mark.timeout(300)

BANDWIDTH_MIB_S = 20
SLOW_MIB_S = 5
"""A pass of 64 MiB takes longer than the 10 s without a new minimum of what is left: at the end of each pass, which is
seen a little earlier or later, there may be one."""
TIME_S = 15
LONG_S = 50
"""The first pass, of the memory that the guest has touched, and those 10 s."""
SETTINGS = {
    "VMHERD_BANDWIDTH_MIB_S": str(BANDWIDTH_MIB_S),
    "VMHERD_DIRTY_RATE_SAMPLE": "2",  # emulated guests write in bursts
    "VMHERD_COMPLETION_TIMEOUT_PER_GIB": str(TIME_S),  # a guest of less than a GiB has the time of one
}
RATES_MIB_S = (0, 3, 8, 14, 80)
BUSY_MIB_S = 80


@dataclass(frozen=True)
class Row:
    """One migration of the table."""

    dirties_mib_s: int
    prediction: Prediction
    outcome: MigrationOutcome
    phase: OperationPhase

    def __str__(self) -> str:
        foreseen, seen = self.prediction, self.outcome
        rate = "-" if foreseen.dirty_rate_mib_s is None else f"{foreseen.dirty_rate_mib_s:.0f}"
        converges = {True: "yes", False: "no", None: "perhaps"}[foreseen.converges]
        duration = "-" if foreseen.duration_s is None else f"{foreseen.duration_s:.1f} s"
        downtime = "-" if seen.downtime_ms is None else f"{seen.downtime_ms} ms"
        return (
            f"| {self.dirties_mib_s} | {rate} | {converges} | {duration} | {self.phase} | {seen.duration_s:.1f} s "
            f"| {seen.transferred_mib} | {seen.iterations} | {downtime} |"
        )


HEADER = """\
| dirties, MiB/s | measured | converges? | foreseen | came to | took | MiB sent | passes | guest stopped |
|---|---|---|---|---|---|---|---|---|"""


def migrated(herd: LabHerd, guest: Guest, told: list[str] | None = None) -> VirtualMachineOperation:
    """Evict a guest; the operation at its end. The guest is well, and runs once.

    Args:
        told: Gets the reasons that the operation gave on its way, in order.
    """
    before = guest.wait_ticks(1)
    source = herd.cluster.vm(guest.name).status.node_name
    begun = herd.cluster.evict(guest.name)
    for shown in herd.cluster.follow(begun.resource, time.monotonic() + 200):
        if shown is None or not shown.is_active:
            break
        if told is not None and shown.status.conditions:
            told.append(reason_of(shown))
    operation = begun.wait(timeout=10).resource
    assert operation.status.prediction is not None
    assert operation.status.prediction.dirty_rate_mib_s is not None, "it was measured"
    where = operation.status.target_node if operation.status.phase is OperationPhase.COMPLETED else source
    outside.assert_runs_once(herd, guest, where)
    assert guest.trouble() == ""
    assert guest.status().boot_id == before.boot_id
    assert herd.leftovers() == {}
    return operation


def change(herd: LabHerd, guest: Guest, policy: LiveMigrationPolicy, annotations: dict[str, str] | None = None) -> None:
    """Change how a VM may migrate."""
    vm, store = herd.cluster.vm(guest.name), herd.cluster.store
    spec = vm.spec.with_(live_migration_policy=policy)
    new = vm.with_(spec=spec, metadata=vm.metadata.with_(annotations=annotations or {}))
    store.must_commit(store.batch().put(vm, new))


def reason_of(operation: VirtualMachineOperation) -> str:
    condition = find_condition(operation.status.conditions, "Completed")
    assert condition is not None
    return condition.reason


def busy_guest(herd: LabHerd, name: str, address: str, **more: Any) -> Guest:
    guest = herd.lab.guest(name, address=address, dirty_mib_s=BUSY_MIB_S, working_set_mib=64, **more)
    herd.start_guests((guest, "h1"))
    guest.wait_ticks(15)
    return guest


def assert_it_is_left_alone(herd: LabHerd, guest: Guest) -> VirtualMachineOperation:
    """AlwaysSafe: it may not be throttled, and nothing else ends it. It runs on as if nothing had been."""
    since = time.time()
    change(herd, guest, LiveMigrationPolicy.ALWAYS_SAFE)
    told: list[str] = []
    operation = migrated(herd, guest, told)
    assert (operation.status.phase, reason_of(operation)) == (OperationPhase.FAILED, "OperationFailed")
    assert f"it did not complete in its time ({LONG_S} s); it runs on node h1" in operation.message
    assert told.index("Syncing") < told.index("NotConverging"), "it is said while it lasts"
    assert set(told[told.index("NotConverging") :]) <= {"NotConverging", "Syncing", "OutcomeUnknown"}
    warned = [e for e in herd.cluster.store.all(Event) if e.reason == "MigrationNotConverging"]
    assert operation.name in {event.involved_object.name for event in warned}
    assert operation.status.attempts == 1  # it would only time out again
    assert operation.status.prediction is not None
    # Where the lab's CPUs are busy, an emulated guest may hardly write during those two seconds, and much afterwards.
    rate = operation.status.prediction.dirty_rate_mib_s
    assert rate is not None
    assert operation.status.prediction.converges is False or rate < SLOW_MIB_S
    assert operation.status.outcome is not None
    assert operation.status.outcome.throttle_percent == 0
    assert [seen.outcome for seen in stream_migrations(herd.lab, since=since)] == ["cancelled"]
    return operation


def assert_it_ends_by_post_copy(herd: LabHerd, guest: Guest) -> VirtualMachineOperation:
    """Where that is allowed, it goes on at the target when its time is over."""
    change(herd, guest, LiveMigrationPolicy.ALWAYS_SAFE, {POST_COPY_ANNOTATION: "true"})
    operation = migrated(herd, guest)
    assert operation.status.phase is OperationPhase.COMPLETED, operation.message
    assert operation.status.outcome is not None
    assert operation.status.outcome.post_copy
    return operation


def assert_it_is_throttled(herd: LabHerd, guest: Guest) -> VirtualMachineOperation:
    """AlwaysForced: it is slowed down until it converges."""
    change(herd, guest, LiveMigrationPolicy.ALWAYS_FORCED)
    operation = migrated(herd, guest)
    assert operation.status.phase is OperationPhase.COMPLETED, operation.message
    assert operation.status.outcome is not None
    assert operation.status.outcome.throttle_percent > 0
    assert not operation.status.outcome.post_copy
    return operation


def test_what_was_foreseen_beside_what_came(herd: LabHerd, capsys: pytest.CaptureFixture[str]) -> None:
    guest = herd.lab.guest("table", address="192.0.2.101", dirty_mib_s=RATES_MIB_S[-1], working_set_mib=64)
    doubles = DoubleRunObserver(herd.lab)
    herd.start_guests((guest, "h1"))
    rows = []
    for rate in RATES_MIB_S:
        guest.set_dirty_rate(rate)
        guest.wait_ticks(10)  # what it dirties takes a moment to follow
        operation = migrated(herd, guest)
        status = operation.status
        assert status.prediction is not None
        assert status.outcome is not None
        rows.append(Row(rate, status.prediction, status.outcome, status.phase))
        assert status.phase in {OperationPhase.COMPLETED, OperationPhase.FAILED}, operation.message
    with capsys.disabled():
        print(f"\nA guest of {guest.memory_mib} MiB over {BANDWIDTH_MIB_S} MiB/s, {TIME_S} s at most:\n\n{HEADER}")
        print("\n".join(str(row) for row in rows))
    idle, busy = rows[0], rows[-1]
    assert (idle.prediction.converges, idle.phase) == (True, OperationPhase.COMPLETED)
    assert idle.prediction.dirty_rate_mib_s is not None
    assert busy.prediction.dirty_rate_mib_s is not None
    assert idle.prediction.dirty_rate_mib_s < busy.prediction.dirty_rate_mib_s
    for row in rows:
        assert row.outcome.iterations > 0
        assert (row.outcome.downtime_ms is not None) == (row.phase is OperationPhase.COMPLETED)
    doubles.check()


def test_a_busy_guest_is_left_alone_or_throttled_or_ends_by_post_copy(
    herd: LabHerd, capsys: pytest.CaptureFixture[str]
) -> None:
    guest = busy_guest(herd, "busy", "192.0.2.102")
    doubles = DoubleRunObserver(herd.lab)
    told = []
    # However the emulated guest is held up, in such a pass it never writes so little that it fits into the downtime.
    slow = {"VMHERD_BANDWIDTH_MIB_S": str(SLOW_MIB_S), "VMHERD_COMPLETION_TIMEOUT_PER_GIB": str(LONG_S)}
    with replaced(herd, "control", settings=slow):
        told.append((f"AlwaysSafe, {SLOW_MIB_S} MiB/s", assert_it_is_left_alone(herd, guest)))
        told.append((f"AlwaysSafe and post-copy, {SLOW_MIB_S} MiB/s", assert_it_ends_by_post_copy(herd, guest)))
    more = {
        "VMHERD_BANDWIDTH_MIB_S": "24",
        "VMHERD_COMPLETION_TIMEOUT_PER_GIB": "150",
        "VMHERD_DIRTY_RATE_SAMPLE": "1",  # at that bandwidth a longer one is not worth it
    }
    with replaced(herd, "control", settings=more):
        told.append(("AlwaysForced, 24 MiB/s", assert_it_is_throttled(herd, guest)))
    with capsys.disabled():
        print(f"\nA guest that dirties {BUSY_MIB_S} MiB/s:")
        for how, operation in told:
            shown = herd.vmherd("describe", "vmop", operation.name)
            lines = [line for line in shown.splitlines() if line.startswith(("Predicted:", "Measured:"))]
            assert len(lines) == 2, shown
            print(f"{how}: {operation.status.phase}\n  " + "\n  ".join(lines))
    doubles.check()
