"""What every hypervisor driver promises of the ways to migrate: post-copy, parallel connections, copied disks."""

import threading

import pytest

from tests.contract.hypervisor_hosts import (
    BUSY_CAP_MIB_S,
    BUSY_MIB,
    LOCAL_DISK_MIB,
    RESTLESS_MIB_S,
    UNCAPPED_MIB_S,
    HostPair,
)
from tests.contract.machines import MARKER, Machine, Watcher, migration, promptly, read, sent, state
from tests.waiting import wait_until
from workers.hypervisor.port import DomainState, EventKind, MigrationEnd, MigrationRequest, MigrationResult

# --- post-copy ------------------------------------------------------------------------------------------------------


def test_post_copy_ends_what_would_not_end(pair: HostPair, machine: Machine) -> None:
    started = pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    target = Watcher(pair.target)
    with migration(pair, machine, post_copy=True, channels=2) as running:
        assert promptly(lambda: pair.source.start_post_copy(machine.uuid))
        wait_until(lambda: state(pair.source, machine) is DomainState.POSTCOPY, message="the source in post-copy")
        wait_until(lambda: state(pair.target, machine) is DomainState.POSTCOPY, message="the target in post-copy")
        first = pair.source.job(machine.uuid)
        assert first is not None
        # What is left of the memory takes seconds: the cap holds for post-copy too.
        enough = first.processed_bytes + 20 * 2**20
        wait_until(lambda: running.done() or sent(pair.source, machine) > enough, message="a fourth of the memory")
        assert not running.done(), "it keeps to no bandwidth"
        last = pair.source.job(machine.uuid)
        assert last is not None
        mib_per_s = (last.processed_bytes - first.processed_bytes) / 2**20 / (last.elapsed_ms - first.elapsed_ms) * 1000
        assert mib_per_s == pytest.approx(BUSY_CAP_MIB_S, rel=0.25)
        left, arrived = read(pair.source, machine), read(pair.target, machine)
        assert left.marker == arrived.marker == MARKER
        assert left.has_job
        assert arrived.has_job
        assert pair.source.abort(machine.uuid) is False, "no way leads back"
        assert pair.target.abort(machine.uuid) is False
        assert not running.done()
    assert running.result() == MigrationResult(MigrationEnd.SUCCEEDED)
    assert pair.source.domain(machine.uuid) is None
    arrived = read(pair.target, machine)
    assert (arrived.state, arrived.reason, arrived.has_job) == (DomainState.RUNNING, "migrated", False)
    assert (arrived.marker, arrived.memory_mib) == (started.marker, started.memory_mib)
    target.wait_for(EventKind.RESUMED, machine)
    assert pair.target.completed_job(machine.uuid) == {}


def test_post_copy_has_to_be_allowed_at_the_start(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine) as running:
        assert pair.source.start_post_copy(machine.uuid) is False
        assert not running.done()
        assert state(pair.source, machine) is DomainState.RUNNING
        assert pair.source.abort(machine.uuid)
    assert running.result().end is MigrationEnd.ABORTED


def test_a_migration_that_may_be_switched_may_also_be_aborted(pair: HostPair, machine: Machine) -> None:
    started = pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine, post_copy=True) as running:
        assert pair.target.start_post_copy(machine.uuid) is False, "that is the source's to do"
        assert pair.source.abort(machine.uuid)
    assert running.result().end is MigrationEnd.ABORTED
    assert pair.source.domain(machine.uuid) == started


def test_there_may_be_nothing_to_switch(pair: HostPair, machine: Machine) -> None:
    assert pair.source.start_post_copy(machine.uuid) is False
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    assert pair.source.start_post_copy(machine.uuid) is False
    assert state(pair.source, machine) is DomainState.RUNNING


def test_a_target_that_dies_in_post_copy_takes_the_guest_with_it(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine, post_copy=True) as running:
        assert pair.source.start_post_copy(machine.uuid)
        wait_until(lambda: state(pair.target, machine) is DomainState.POSTCOPY, message="the target in post-copy")
        pair.kill_machine("target", machine.uuid)
    assert running.result().end in (MigrationEnd.FAILED, MigrationEnd.UNKNOWN)
    wait_until(lambda: pair.target.domain(machine.uuid) is None, message="the target's copy to be gone")
    # Half of its memory is gone: what is left must never pass for a machine that can be resumed.
    wait_until(
        lambda: state(pair.source, machine) in (DomainState.POSTCOPY_FAILED, None),
        message=lambda: f"the source to know, and not {state(pair.source, machine)}",
    )
    pair.source.destroy(machine.uuid)
    assert pair.source.domain(machine.uuid) is None


# --- parallel connections -------------------------------------------------------------------------------------------


def test_parallel_connections_share_one_cap(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine, channels=4) as running:
        wait_until(
            lambda: (job := pair.source.job(machine.uuid)) is not None and job.processed_bytes > BUSY_MIB * 2**20,
            20,
            "a pass over memory",
        )
        assert not running.done(), "at four times the cap it would have ended"
        assert pair.source.abort(machine.uuid)
    assert running.result().end is MigrationEnd.ABORTED


def test_a_machine_arrives_over_parallel_connections(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.busy_xml(machine.name, machine.uuid), MARKER)
    result = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S, channels=4))
    assert result == MigrationResult(MigrationEnd.SUCCEEDED)
    assert state(pair.target, machine) is DomainState.RUNNING
    assert pair.source.domain(machine.uuid) is None


# --- disks ----------------------------------------------------------------------------------------------------------


def test_a_local_disk_keeps_a_machine(pair: HostPair, machine: Machine) -> None:
    started = pair.source.start(pair.local_disk_xml(machine.name, machine.uuid), MARKER)
    result = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S))
    assert result.end in (MigrationEnd.NOT_STARTED, MigrationEnd.FAILED)
    assert result.message
    assert pair.source.domain(machine.uuid) == started
    assert pair.target.domain(machine.uuid) is None


def test_a_local_disk_is_copied(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.local_disk_xml(machine.name, machine.uuid), MARKER)
    assert not pair.has_local_disk("target", machine.uuid)
    request = MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S, copy_disks=("vda",))
    assert pair.source.migrate(request) == MigrationResult(MigrationEnd.SUCCEEDED)
    assert state(pair.target, machine) is DomainState.RUNNING
    assert pair.has_local_disk("target", machine.uuid)
    assert pair.has_local_disk("source", machine.uuid), "nobody deletes it"


def test_the_copy_of_a_disk_keeps_to_the_bandwidth(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.local_disk_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine, LOCAL_DISK_MIB // 5, copy_disks=("vda",)) as running:
        two_thirds = LOCAL_DISK_MIB * 2**20 * 2 // 3
        wait_until(lambda: running.done() or sent(pair.source, machine) > two_thirds, 20, "two thirds of the disk")
        assert not running.done()
        job = pair.source.job(machine.uuid)
        assert job is not None
        assert job.total_bytes >= LOCAL_DISK_MIB * 2**20
        assert job.elapsed_ms > 2000, "without a cap it takes a tenth of that"
        assert pair.source.abort(machine.uuid)
    assert running.result().end is MigrationEnd.ABORTED
    wait_until(lambda: pair.target.domain(machine.uuid) is None, message="the target's copy to be gone")
    assert state(pair.source, machine) is DomainState.RUNNING
    again = MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S, copy_disks=("vda",))
    assert pair.source.migrate(again).end is MigrationEnd.SUCCEEDED, "what the first attempt left is no hindrance"
    assert pair.has_local_disk("target", machine.uuid)


# --- the dirty rate -------------------------------------------------------------------------------------------------


def test_the_dirty_rate_of_guests(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    idle = Machine(f"{machine.name}-idle", str(machine.uuid[:-4] + "0000"))
    pair.source.start(pair.blank_xml(idle.name, idle.uuid), MARKER)

    def rate() -> float:
        measured = pair.source.dirty_rate(machine.uuid, 1)
        return measured if measured is not None and measured > 0.5 * RESTLESS_MIB_S else 0.0

    # The first measurement may still see it boot. Sampling counts pages at random: some 20 % this way or that.
    assert wait_until(rate, 20, "a dirty rate") < 1.5 * RESTLESS_MIB_S
    quiet = pair.source.dirty_rate(idle.uuid, 0.5)
    assert quiet is not None
    assert quiet < 3
    assert state(pair.source, machine) is state(pair.source, idle) is DomainState.RUNNING


def test_a_dirty_rate_that_cant_be_told(pair: HostPair, machine: Machine) -> None:
    assert pair.source.dirty_rate(machine.uuid, 1) is None
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine) as running:
        assert promptly(lambda: pair.source.dirty_rate(machine.uuid, 1)) is None
        assert promptly(lambda: pair.target.dirty_rate(machine.uuid, 1)) is None
        assert not running.done()
        pair.source.abort(machine.uuid)
    pair.pause("source", machine.uuid)
    assert pair.source.dirty_rate(machine.uuid, 1) is None


def test_a_machine_is_read_while_its_dirty_rate_is_measured(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    rates: list[float | None] = []
    measuring = threading.Thread(target=lambda: rates.append(pair.source.dirty_rate(machine.uuid, 2)))
    measuring.start()
    while measuring.is_alive():
        assert promptly(lambda: state(pair.source, machine)) is DomainState.RUNNING
    assert len(rates) == 1


@pytest.mark.parametrize("channels", [0, -1])
def test_fewer_than_one_connection_is_one(pair: HostPair, machine: Machine, channels: int) -> None:
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    result = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S, channels=channels))
    assert result.end is MigrationEnd.SUCCEEDED
