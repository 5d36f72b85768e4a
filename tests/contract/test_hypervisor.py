"""What every hypervisor driver promises (`workers.hypervisor.port`), on a pair of hosts.

Of what a machine's operations ask (shutdown, definition, preflight) `test_hypervisor_changes` tells, of the ways to
migrate `test_hypervisor_migration`.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import pytest

from orchestrator.errors import DomainNotFound, HypervisorError, HypervisorUnavailable
from tests.contract.hypervisor_hosts import BUSY_CAP_MIB_S, UNCAPPED_MIB_S, HostPair, Side
from tests.contract.machines import (
    MARKER,
    PROMPT_S,
    Machine,
    Watcher,
    in_background,
    migration,
    new_machine,
    promptly,
    read,
    state,
)
from tests.waiting import wait_until
from workers.hypervisor.port import (
    Domain,
    DomainEvent,
    DomainExists,
    DomainState,
    EventKind,
    Hypervisor,
    Job,
    MigrationEnd,
    MigrationRequest,
    MigrationResult,
)

# --- hosts, starts, readings --------------------------------------------------------------------------------------


def test_hosts_tell_who_they_are(pair: HostPair) -> None:
    source, target = pair.source.host(), pair.target.host()
    assert source.uuid != target.uuid
    assert source.hostname != target.hostname
    for host in (source, target):
        assert host.cpus >= 1
        assert host.memory_mib > 256
        assert host.cpu_model
        assert host.hypervisor_version
        assert host.libvirt_version


def test_hosts_tell_what_is_in_use(pair: HostPair, machine: Machine) -> None:
    before = pair.source.use()
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    wait_until(lambda: pair.source.use().busy_s > before.busy_s, 10, "its CPUs have done something")
    wait_until(lambda: pair.source.use().idle_s > before.idle_s, 10, "and nothing")
    assert 0 < pair.source.use().memory_mib <= pair.source.host().memory_mib


def test_a_started_machine_is_read_back(pair: HostPair, machine: Machine) -> None:
    started = pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    assert started == pair.source.domain(machine.uuid)
    assert started == Domain(
        uuid=machine.uuid,
        name=machine.name,
        state=DomainState.RUNNING,
        reason="booted",
        marker=MARKER,
        memory_mib=16,
        vcpus=1,
    )
    assert pair.target.domain(machine.uuid) is None


def test_the_marker_of_this_start_replaces_an_older_one(pair: HostPair, machine: Machine) -> None:
    xml = pair.blank_xml(machine.name, machine.uuid)
    pair.source.start(xml, MARKER)
    pair.source.destroy(machine.uuid)
    newer = replace(MARKER, incarnation=4, epoch=57)
    assert pair.source.start(xml, newer).marker == newer


def test_all_machines_are_listed_by_name(pair: HostPair) -> None:
    machines = sorted((new_machine() for _ in range(3)), key=lambda machine: machine.name)
    for machine in reversed(machines):
        pair.source.start(pair.blank_xml(machine.name, machine.uuid), replace(MARKER, name=machine.name))
    listed = pair.source.domains()
    assert [domain.name for domain in listed] == [machine.name for machine in machines]
    assert listed == [pair.source.domain(machine.uuid) for machine in machines]
    assert pair.target.domains() == []


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "<domain><name>x</name>",
        "<network><name>x</name></network>",
        "<domain><name>x</name></domain>",
        "<domain><name>x</name><uuid>no uuid</uuid></domain>",
        "<domain><uuid>5e21a3d0-9a53-4d5c-8a39-6b8f7b8a4c11</uuid></domain>",
    ],
    ids=["empty", "broken", "network", "without-uuid", "bad-uuid", "without-name"],
)
def test_a_bad_description_is_refused(pair: HostPair, xml: str) -> None:
    with pytest.raises(HypervisorError, match="XML"):
        pair.source.start(xml, MARKER)
    assert pair.source.domains() == []


def test_a_start_that_fails_leaves_nothing(pair: HostPair, machine: Machine) -> None:
    with pytest.raises(HypervisorError) as caught:
        pair.source.start(pair.refused_xml(machine.name, machine.uuid), MARKER)
    assert not isinstance(caught.value, DomainExists | HypervisorUnavailable)
    assert machine.uuid in str(caught.value)
    assert pair.source.domain(machine.uuid) is None


def test_a_machine_is_not_started_twice(pair: HostPair, machine: Machine) -> None:
    xml = pair.blank_xml(machine.name, machine.uuid)
    first = pair.source.start(xml, MARKER)
    with pytest.raises(DomainExists):
        pair.source.start(xml, replace(MARKER, incarnation=4))
    assert pair.source.domain(machine.uuid) == first


def test_a_name_is_not_used_twice(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    other = new_machine()
    with pytest.raises(HypervisorError) as caught:
        pair.source.start(pair.blank_xml(machine.name, other.uuid), MARKER)
    assert not isinstance(caught.value, DomainExists)
    assert pair.source.domain(other.uuid) is None


def test_destroy_is_idempotent(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    pair.source.destroy(machine.uuid)
    assert pair.source.domain(machine.uuid) is None
    assert pair.source.domains() == []
    pair.source.destroy(machine.uuid)


def test_two_may_destroy_at_once(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    both = [in_background(lambda: pair.source.destroy(machine.uuid)) for _ in range(2)]
    for one in both:
        one.result(60)
        assert pair.source.domain(machine.uuid) is None


def test_a_frozen_machine_is_destroyed(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    pair.freeze_machine("source", machine.uuid)
    pair.source.destroy(machine.uuid)
    assert pair.source.domain(machine.uuid) is None


def test_a_paused_machine_is_resumed(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    pair.pause("source", machine.uuid)
    paused = read(pair.source, machine)
    assert (paused.state, paused.reason, paused.has_job) == (DomainState.PAUSED, "user", False)
    pair.source.resume(machine.uuid)
    assert state(pair.source, machine) is DomainState.RUNNING
    pair.source.resume(machine.uuid)
    assert state(pair.source, machine) is DomainState.RUNNING


def test_what_is_not_there(pair: HostPair, machine: Machine) -> None:
    assert pair.source.domain(machine.uuid) is None
    assert pair.source.job(machine.uuid) is None
    assert pair.source.abort(machine.uuid) is False
    assert pair.source.completed_job(machine.uuid) == {}
    assert pair.source.addresses(machine.uuid) == []
    with pytest.raises(DomainNotFound):
        pair.source.resume(machine.uuid)
    request = MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S)
    assert pair.source.migrate(request).end is MigrationEnd.NOT_STARTED


def test_a_machine_without_network_has_no_address(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    assert promptly(lambda: pair.source.addresses(machine.uuid)) == []


# --- migration ----------------------------------------------------------------------------------------------------


def test_a_migration_moves_the_machine(pair: HostPair, machine: Machine) -> None:
    started = pair.source.start(pair.busy_xml(machine.name, machine.uuid), MARKER)
    result = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S, auto_converge=True))
    assert result == MigrationResult(MigrationEnd.SUCCEEDED)
    assert pair.source.domains() == []
    assert pair.target.domain(machine.uuid) == replace(started, reason="migrated")
    figures = pair.target.completed_job(machine.uuid)
    always = {"downtime_ms", "elapsed_ms", "total_bytes", "processed_bytes"}
    assert always <= figures.keys() <= always | {"iterations", "throttle_percent"}
    assert figures["processed_bytes"] > 0
    assert figures["downtime_ms"] <= figures["elapsed_ms"]
    assert pair.target.completed_job(machine.uuid) == figures, "reading them must not consume them"


def test_a_persistent_machine_arrives_transient(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), MARKER)
    assert read(pair.source, machine).persistent
    result = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S))
    assert result.end is MigrationEnd.SUCCEEDED
    assert pair.source.domains() == []
    arrived = read(pair.target, machine)
    assert not arrived.persistent
    assert arrived.marker == MARKER


def test_a_persistent_machine_stays_defined_when_destroyed(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), MARKER)
    pair.source.destroy(machine.uuid)
    left = read(pair.source, machine)
    assert (left.state, left.reason, left.persistent) == (DomainState.SHUTOFF, "destroyed", True)
    pair.source.destroy(machine.uuid)


def test_both_sides_while_it_migrates(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine) as running:
        for source, target in (
            (read(pair.source, machine), read(pair.target, machine)),
            (pair.source.domains()[0], pair.target.domains()[0]),
        ):
            assert (source.state, source.has_job) == (DomainState.RUNNING, True)
            assert source.job is not None
            assert source.job.outgoing
            assert (target.state, target.has_job) == (DomainState.INCOMING, True)
            assert target.job == Job(outgoing=False)
            assert source.marker == target.marker == MARKER
        with pytest.raises(HypervisorError):
            pair.target.resume(machine.uuid)
        assert not running.done()
        assert pair.source.abort(machine.uuid)


def test_a_migration_is_followed(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.busy_xml(machine.name, machine.uuid), MARKER)
    seen: list[Job] = []
    with migration(pair, machine) as running:
        while not running.done():
            # At its very end, while the source's process is ended, there may be no answer.
            with suppress(HypervisorUnavailable):
                job = pair.source.job(machine.uuid)
                if job is not None:
                    seen.append(job)
    assert running.result().end is MigrationEnd.SUCCEEDED
    assert len(seen) > 10
    for before, after in pairwise(seen):
        assert before.elapsed_ms <= after.elapsed_ms
        assert before.processed_bytes <= after.processed_bytes
        assert before.iteration <= after.iteration
        assert after.total_bytes > 0
    assert pair.source.job(machine.uuid) is None
    assert pair.target.job(machine.uuid) is None


def test_a_migration_keeps_to_its_bandwidth(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine):
        first = figures_after(pair.source, machine, 8 * 2**20)
        last = figures_after(pair.source, machine, first.processed_bytes + 60 * 2**20)
        pair.source.abort(machine.uuid)
    seconds = (last.elapsed_ms - first.elapsed_ms) / 1000
    mib_per_s = (last.processed_bytes - first.processed_bytes) / 2**20 / seconds
    assert mib_per_s == pytest.approx(BUSY_CAP_MIB_S, rel=0.1)


def figures_after(host: Hypervisor, machine: Machine, sent_bytes: int) -> Job:
    def figures() -> Job | None:
        job = host.job(machine.uuid)
        return job if job is not None and job.processed_bytes >= sent_bytes else None

    job = wait_until(figures, 20, f"{sent_bytes} bytes to be sent")
    assert job is not None
    return job


@pytest.mark.parametrize("bandwidth", [0, -1])
def test_a_migration_without_bandwidth_is_refused(pair: HostPair, machine: Machine, bandwidth: int) -> None:
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    result = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, bandwidth))
    assert result.end is MigrationEnd.NOT_STARTED
    assert state(pair.source, machine) is DomainState.RUNNING


def test_an_aborted_migration_leaves_the_machine_where_it_was(pair: HostPair, machine: Machine) -> None:
    started = pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine) as running:
        assert promptly(lambda: pair.source.abort(machine.uuid))
    assert running.result().end is MigrationEnd.ABORTED
    assert running.result().message
    assert pair.source.domain(machine.uuid) == started
    wait_until(lambda: pair.target.domain(machine.uuid) is None, message="the target's copy to be gone")


def test_there_may_be_nothing_to_abort(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    assert pair.source.abort(machine.uuid) is False
    assert state(pair.source, machine) is DomainState.RUNNING


def test_the_target_does_not_abort(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine) as running:
        assert pair.target.abort(machine.uuid) is False
        assert not running.done()
        assert pair.source.abort(machine.uuid)


def test_a_target_that_is_away(pair: HostPair, machine: Machine) -> None:
    started = pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    result = pair.source.migrate(MigrationRequest(machine.uuid, pair.away_uri, UNCAPPED_MIB_S))
    assert result.end is MigrationEnd.NOT_STARTED
    assert result.message
    assert pair.source.domain(machine.uuid) == started


def test_a_source_whose_daemon_is_away(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    pair.kill_daemon("source")
    result = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S))
    assert result.end is MigrationEnd.NOT_STARTED
    pair.start_daemon("source")
    assert state(pair.source, machine) is DomainState.RUNNING


def test_a_machine_migrates_once_at_a_time(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine) as running:
        second = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S))
        assert second.end is MigrationEnd.NOT_STARTED
        assert not running.done()
        pair.source.abort(machine.uuid)
    assert running.result().end is MigrationEnd.ABORTED


def test_the_target_has_the_machine_already(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    other = pair.target.start(pair.blank_xml(machine.name, machine.uuid), replace(MARKER, incarnation=4))
    result = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S))
    assert result.end in (MigrationEnd.NOT_STARTED, MigrationEnd.FAILED)
    assert state(pair.source, machine) is DomainState.RUNNING
    assert pair.target.domain(machine.uuid) == other


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_machine_whose_process_dies_while_it_migrates(pair: HostPair, machine: Machine, side: Side) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine) as running:
        pair.kill_machine(side, machine.uuid)
    assert running.result().end is MigrationEnd.FAILED
    wait_until(lambda: pair.target.domain(machine.uuid) is None, message="the target's copy to be gone")
    left = None if side == "source" else DomainState.RUNNING
    wait_until(lambda: state(pair.source, machine) is left, message=f"{left} on the source")


# --- readings of a host that is busy or hangs -----------------------------------------------------------------------


def test_readings_answer_while_machines_migrate_and_hang(pair: HostPair, machine: Machine) -> None:
    frozen = new_machine()
    pair.source.start(pair.blank_xml(frozen.name, frozen.uuid), MARKER)
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine) as running:
        for at_work in (frozen, machine):
            pair.freeze_machine("source", at_work.uuid)
        try:
            for _ in range(3):
                assert len(promptly(pair.source.domains)) == 2
                assert promptly(lambda: read(pair.source, frozen)).state is DomainState.RUNNING
                # Its figures would have to come from its process; that there is a job is known without them.
                moving = promptly(lambda: read(pair.source, machine))
                assert (moving.state, moving.marker, moving.has_job) == (DomainState.RUNNING, MARKER, True)
                assert promptly(lambda: state(pair.target, machine)) is DomainState.INCOMING
                assert promptly(lambda: pair.source.completed_job(machine.uuid)) == {}
        finally:
            for at_work in (frozen, machine):
                pair.thaw_machine("source", at_work.uuid)
        wait_until(lambda: read(pair.source, machine).job, message="the job's figures after the thaw")
        assert not read(pair.source, frozen).has_job
        assert not running.done()
        pair.source.abort(machine.uuid)


def test_many_ask_at_once(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine):
        askers = [in_background(lambda: read(pair.source, machine)) for _ in range(40)]
        for asker in askers:
            reading = asker.result(PROMPT_S)
            assert reading.state is DomainState.RUNNING
            assert reading.job is not None
        pair.source.abort(machine.uuid)


# --- daemons that die -----------------------------------------------------------------------------------------------


def test_a_daemon_that_is_away_and_back(pair: HostPair, machine: Machine) -> None:
    watcher = Watcher(pair.source)
    started = pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    pair.kill_daemon("source")
    calls: list[Callable[[], object]] = [
        pair.source.host,
        pair.source.domains,
        lambda: pair.source.domain(machine.uuid),
        lambda: pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER),
        lambda: pair.source.destroy(machine.uuid),
        lambda: pair.source.resume(machine.uuid),
        lambda: pair.source.job(machine.uuid),
        lambda: pair.source.abort(machine.uuid),
        lambda: pair.source.completed_job(machine.uuid),
        lambda: pair.source.addresses(machine.uuid),
    ]
    for call in calls:
        with pytest.raises(HypervisorUnavailable):
            promptly(call)
    watcher.wait_for(EventKind.LOST)
    pair.start_daemon("source")
    assert pair.source.domain(machine.uuid) == started, "the marker too outlives the daemon"
    watcher.wait_for(EventKind.RESYNC)
    pair.source.destroy(machine.uuid)
    watcher.wait_for(EventKind.STOPPED, machine)
    kinds = [event.kind for event in watcher.events]
    assert kinds.index(EventKind.LOST) < kinds.index(EventKind.RESYNC) < kinds.index(EventKind.STOPPED)
    assert kinds.count(EventKind.LOST) == kinds.count(EventKind.RESYNC) == 1


def test_a_daemon_that_restarted_while_nobody_asked(pair: HostPair, machine: Machine) -> None:
    started = pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    assert pair.source.domain(machine.uuid) == started
    pair.kill_daemon("source")
    pair.start_daemon("source")
    assert pair.source.domain(machine.uuid) == started
    assert pair.source.job(machine.uuid) is None


def test_a_watcher_is_refused_while_the_daemon_is_away(pair: HostPair) -> None:
    pair.kill_daemon("source")
    with pytest.raises(HypervisorUnavailable):
        promptly(lambda: pair.source.watch(print))
    pair.start_daemon("source")
    Watcher(pair.source)


def test_the_targets_daemon_dies_while_it_migrates(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine) as running:
        pair.kill_daemon("target")
    assert running.result().end in (MigrationEnd.UNKNOWN, MigrationEnd.FAILED)
    assert running.result().message
    with pytest.raises(HypervisorUnavailable):
        pair.target.domain(machine.uuid)
    pair.start_daemon("target")
    # Its half-made copy may be seen until the daemon has thrown it away, and must not pass for a source's.
    while (copy := pair.target.domain(machine.uuid)) is not None:
        assert (copy.state, copy.has_job) == (DomainState.INCOMING, True)
    wait_until(lambda: not read(pair.source, machine).has_job, message="the source's job to end")
    assert state(pair.source, machine) is DomainState.RUNNING


def test_the_sources_daemon_dies_while_it_migrates(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine) as running:
        pair.kill_daemon("source")
    assert running.result().end is MigrationEnd.UNKNOWN
    assert running.result().message
    pair.start_daemon("source")
    wait_until(lambda: pair.target.domain(machine.uuid) is None, message="the target's copy to be gone")
    wait_until(lambda: not read(pair.source, machine).has_job, message="no job on the source")
    left = read(pair.source, machine)
    assert (left.state, left.marker) == (DomainState.RUNNING, MARKER)
    again = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S))
    assert again.end is MigrationEnd.SUCCEEDED


def test_the_sources_daemon_dies_after_switch_over(pair: HostPair, machine: Machine) -> None:
    """The source keeps a paused copy that nothing cleans up: it must be told from a target's, and be destroyed."""
    killed = threading.Event()

    def kill_on_resume(event: DomainEvent) -> None:
        if event.kind is EventKind.RESUMED and not killed.is_set():
            pair.kill_daemon("source")
            killed.set()

    pair.source.start(pair.busy_xml(machine.name, machine.uuid), MARKER)
    pair.target.watch(kill_on_resume)
    result = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S))
    assert result.end is MigrationEnd.UNKNOWN
    assert killed.wait(PROMPT_S)
    pair.start_daemon("source")
    wait_until(lambda: not read(pair.target, machine).has_job, message="the target's job to end")
    arrived, left = read(pair.target, machine), read(pair.source, machine)
    assert (arrived.state, arrived.reason) == (DomainState.RUNNING, "migrated")
    assert (left.state, left.has_job) == (DomainState.PAUSED_MIGRATED, False)
    assert left.marker == arrived.marker == MARKER
    assert pair.source.domains() == [left]
    pair.source.destroy(machine.uuid)
    assert pair.source.domain(machine.uuid) is None
    assert pair.target.domain(machine.uuid) == arrived


# --- events -------------------------------------------------------------------------------------------------------


def test_a_start_and_a_destroy_are_told(pair: HostPair, machine: Machine) -> None:
    watcher = Watcher(pair.source)
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    assert watcher.wait_for(EventKind.STARTED, machine).detail == "booted"
    pair.source.destroy(machine.uuid)
    stopped = watcher.wait_for(EventKind.STOPPED, machine)
    assert (stopped.detail, stopped.reason) == ("destroyed", "")


def test_a_process_that_dies_is_told(pair: HostPair, machine: Machine) -> None:
    watcher = Watcher(pair.source)
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    pair.kill_machine("source", machine.uuid)
    stopped = watcher.wait_for(EventKind.STOPPED, machine)
    assert stopped.detail in ("failed", "crashed")
    wait_until(lambda: pair.source.domain(machine.uuid) is None, message="the machine to be gone")
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)


def test_who_shut_a_machine_down_is_told(pair: HostPair, machine: Machine) -> None:
    watcher = Watcher(pair.source)
    pair.source.start(pair.poweroff_xml(machine.name, machine.uuid), MARKER)
    stopped = watcher.wait_for(EventKind.STOPPED, machine)
    assert (stopped.detail, stopped.reason) == ("shutdown", "guest")
    by_host = new_machine()
    pair.source.start(pair.blank_xml(by_host.name, by_host.uuid), MARKER)
    pair.terminate_machine("source", by_host.uuid)
    stopped = watcher.wait_for(EventKind.STOPPED, by_host)
    assert (stopped.detail, stopped.reason) == ("shutdown", "host")


def test_a_guest_that_panics_may_leave_its_domain_which_runs_nothing_until_it_is_destroyed(
    pair: HostPair, machine: Machine
) -> None:
    watcher = Watcher(pair.source)
    pair.source.start(pair.panic_xml(machine.name, machine.uuid), MARKER)
    assert watcher.wait_for(EventKind.CHANGED, machine).detail == "crashed-panicked"
    assert state(pair.source, machine) is DomainState.CRASHED
    with pytest.raises(HypervisorError):
        pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    pair.source.destroy(machine.uuid)
    assert watcher.wait_for(EventKind.STOPPED, machine).detail == "destroyed"
    assert state(pair.source, machine) is None
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)


def test_a_pause_and_a_resume_are_told(pair: HostPair, machine: Machine) -> None:
    watcher = Watcher(pair.source)
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    pair.pause("source", machine.uuid)
    assert watcher.wait_for(EventKind.SUSPENDED, machine).detail == "paused"
    resumed_before = watcher.of(machine).count((EventKind.RESUMED, "unpaused"))
    pair.source.resume(machine.uuid)
    wait_until(lambda: watcher.of(machine).count((EventKind.RESUMED, "unpaused")) > resumed_before)


def test_a_migration_is_told_on_both_sides(pair: HostPair, machine: Machine) -> None:
    source, target = Watcher(pair.source), Watcher(pair.target)
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    result = pair.source.migrate(MigrationRequest(machine.uuid, pair.target_uri, UNCAPPED_MIB_S))
    assert result.end is MigrationEnd.SUCCEEDED
    assert source.wait_for(EventKind.STOPPED, machine).detail == "migrated"
    assert target.wait_for(EventKind.RESUMED, machine).detail == "migrated"
    arrival = target.of(machine)
    assert arrival.index((EventKind.STARTED, "migrated")) < arrival.index((EventKind.RESUMED, "migrated"))
    departure = source.of(machine)
    assert departure.index((EventKind.SUSPENDED, "migrated")) < departure.index((EventKind.STOPPED, "migrated"))


def test_a_watcher_may_ask_and_may_fail(pair: HostPair, machine: Machine) -> None:
    answers: list[DomainState | None] = []

    def ask(event: DomainEvent) -> None:
        if event.kind is EventKind.STARTED:
            answers.append(state(pair.source, machine))
            raise RuntimeError("a watcher's fault")
        if event.kind is EventKind.STOPPED:
            answers.append(state(pair.source, machine))

    pair.source.watch(ask)
    pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    wait_until(lambda: len(answers) == 1)
    pair.source.destroy(machine.uuid)
    wait_until(lambda: len(answers) == 2)
    assert answers == [DomainState.RUNNING, None]


def test_there_is_one_watcher(pair: HostPair) -> None:
    Watcher(pair.source)
    with pytest.raises(HypervisorError):
        pair.source.watch(print)


def test_closing_twice_is_no_error(pair: HostPair, machine: Machine) -> None:
    watcher = Watcher(pair.source)
    pair.source.close()
    pair.source.close()
    with pytest.raises(HypervisorError):
        pair.source.domains()
    pair.target.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    assert watcher.events == []
