"""What every hypervisor driver promises of a machine's life: asked to power off, claimed, adopted and released."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest

from orchestrator.errors import DomainNotFound, HypervisorError, HypervisorUnavailable
from tests.contract.hypervisor_hosts import CONSOLE_PASSWORD, HostPair, Lack
from tests.contract.machines import (
    MARKER,
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
from workers.hypervisor.port import Definition, DomainState, EventKind

# --- graceful stops, and what a guest does by itself ----------------------------------------------------------------


def test_a_guest_that_obeys_powers_off(pair: HostPair, machine: Machine) -> None:
    watcher = Watcher(pair.source)
    pair.source.start(pair.obedient_xml(machine.name, machine.uuid), MARKER)

    def ask_until_stopped() -> bool:
        if state(pair.source, machine) is DomainState.RUNNING:
            promptly(lambda: pair.source.shutdown(machine.uuid))
        return pair.source.domain(machine.uuid) is None

    # A guest that still boots does not feel the button, so it may have to be pressed again.
    wait_until(ask_until_stopped, 20, "the guest to power off", interval=0.5)
    stopped = watcher.wait_for(EventKind.STOPPED, machine)
    assert (stopped.detail, stopped.reason) == ("shutdown", "guest")


def test_a_guest_may_ignore_that_it_is_asked(pair: HostPair, machine: Machine) -> None:
    obedient = new_machine()
    started = pair.source.start(pair.blank_xml(machine.name, machine.uuid), MARKER)
    pair.source.start(pair.obedient_xml(obedient.name, obedient.uuid), MARKER)

    def ask_both() -> bool:
        pair.source.shutdown(machine.uuid)
        if state(pair.source, obedient) is DomainState.RUNNING:
            pair.source.shutdown(obedient.uuid)
        return pair.source.domain(obedient.uuid) is None

    wait_until(ask_both, 20, "the other guest to power off", interval=0.5)
    assert pair.source.domain(machine.uuid) == started


def test_a_guest_with_an_agents_channel_and_no_agent_is_asked_otherwise(pair: HostPair, machine: Machine) -> None:
    assert pair.source.start(pair.agent_xml(machine.name, machine.uuid), MARKER).agent is False
    assert pair.source.domains()[0].agent is False
    promptly(lambda: pair.source.shutdown(machine.uuid))
    assert state(pair.source, machine) is DomainState.RUNNING


def test_a_paused_guest_is_not_asked(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.obedient_xml(machine.name, machine.uuid), MARKER)
    pair.pause("source", machine.uuid)
    with pytest.raises(HypervisorError, match="paused"):
        pair.source.shutdown(machine.uuid)
    assert state(pair.source, machine) is DomainState.PAUSED


def test_a_guest_that_migrates_is_not_asked(pair: HostPair, machine: Machine) -> None:
    pair.source.start(pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine) as running:
        for host in (pair.source, pair.target):
            with pytest.raises(HypervisorError):
                promptly(lambda host=host: host.shutdown(machine.uuid))  # type: ignore[misc]  # a default's type
        assert not running.done()
        pair.source.abort(machine.uuid)


def test_what_does_not_run_is_not_asked(pair: HostPair, machine: Machine) -> None:
    with pytest.raises(DomainNotFound):
        pair.source.shutdown(machine.uuid)
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), None)
    pair.source.destroy(machine.uuid)
    with pytest.raises(DomainNotFound):
        pair.source.shutdown(machine.uuid)


def test_a_guests_reboot_is_told_and_leaves_it_running(pair: HostPair, machine: Machine) -> None:
    watcher = Watcher(pair.source)
    started = pair.source.start(pair.rebooting_xml(machine.name, machine.uuid), MARKER)
    watcher.wait_for(EventKind.REBOOTED, machine)
    assert pair.source.domain(machine.uuid) == started
    kinds = [kind for kind, _ in watcher.of(machine)]
    assert EventKind.STOPPED not in kinds
    assert kinds.count(EventKind.STARTED) == 1


# --- how a machine is configured ------------------------------------------------------------------------------------


def test_a_machine_can_be_started_from_its_live_definition(pair: HostPair, machine: Machine) -> None:
    first = pair.source.start(pair.equipped_xml(machine.name, machine.uuid), MARKER)
    definition = defined(pair, machine)
    assert (definition.inactive_xml, definition.autostart, definition.snapshots) == ("", False, 0)
    pair.source.destroy(machine.uuid)
    again = pair.target.start(definition.live_xml, replace(MARKER, incarnation=4))
    assert again == replace(first, marker=replace(MARKER, incarnation=4))


def test_a_persistent_machine_has_two_definitions(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), None)
    running = defined(pair, machine)
    assert running.live_xml
    assert running.inactive_xml
    assert running.autostart
    assert not running.secrets
    pair.source.destroy(machine.uuid)
    assert defined(pair, machine) == replace(running, live_xml="")


def test_secrets_are_told_when_asked_for(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.secret_xml(machine.name, machine.uuid), None)
    without, with_them = defined(pair, machine), pair.source.definition(machine.uuid, secrets=True)
    assert with_them is not None
    assert (without.secrets, with_them.secrets) == (False, True)
    for xml in (without.live_xml, without.inactive_xml):
        assert CONSOLE_PASSWORD not in xml
    for xml in (with_them.live_xml, with_them.inactive_xml):
        assert CONSOLE_PASSWORD in xml


def test_a_machine_that_is_not_there_has_no_definition(pair: HostPair, machine: Machine) -> None:
    assert pair.source.definition(machine.uuid) is None


def defined(pair: HostPair, machine: Machine) -> Definition:
    definition = pair.source.definition(machine.uuid)
    assert definition is not None
    return definition


# --- whose a machine is ---------------------------------------------------------------------------------------------


def test_a_running_machine_is_claimed_and_let_go(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), None)
    before = defined(pair, machine)
    assert read(pair.source, machine).marker is None
    pair.source.unmark(machine.uuid)
    newer = replace(MARKER, incarnation=4, epoch=57)
    for marker in (MARKER, newer):
        pair.source.mark(machine.uuid, marker)
        assert read(pair.source, machine).marker == marker
    assert defined(pair, machine).inactive_xml == before.inactive_xml, "only the running machine is marked"
    pair.source.unmark(machine.uuid)
    assert read(pair.source, machine).marker is None
    assert defined(pair, machine).inactive_xml == before.inactive_xml


def test_a_marker_outlives_the_daemon_and_a_migration(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.busy_xml(machine.name, machine.uuid), None)
    pair.source.mark(machine.uuid, MARKER)
    pair.kill_daemon("source")
    pair.start_daemon("source")
    assert read(pair.source, machine).marker == MARKER
    with migration(pair, machine) as running:
        pass
    assert running.result().message == ""
    assert read(pair.target, machine).marker == MARKER


def test_what_does_not_run_is_not_claimed(pair: HostPair, machine: Machine) -> None:
    def check_not_found() -> None:
        with pytest.raises(DomainNotFound):
            pair.source.mark(machine.uuid, MARKER)
        with pytest.raises(DomainNotFound):
            pair.source.unmark(machine.uuid)

    check_not_found()
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), None)
    pair.source.destroy(machine.uuid)
    check_not_found()
    assert read(pair.source, machine).marker is None


def test_a_machine_that_migrates_stays_whose_it_is(pair: HostPair, machine: Machine) -> None:
    """Some hypervisors would wait for the migration's end and then say that there is no such machine."""
    pair.start_persistent("source", pair.restless_xml(machine.name, machine.uuid), MARKER)
    with migration(pair, machine) as running:
        refused: list[Callable[[], None]] = [
            lambda: pair.source.mark(machine.uuid, replace(MARKER, epoch=57)),
            lambda: pair.source.unmark(machine.uuid),
            lambda: pair.source.undefine(machine.uuid),
        ]
        for call in refused:
            with pytest.raises(HypervisorError):
                promptly(call)
        assert not running.done()
        pair.source.abort(machine.uuid)
    left = read(pair.source, machine)
    assert (left.marker, left.persistent) == (MARKER, True)


# --- adopted and released -------------------------------------------------------------------------------------------


def test_a_running_machine_is_adopted_and_released_as_it_was(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), None)
    running, before = read(pair.source, machine), defined(pair, machine)
    pair.source.undefine(machine.uuid)
    assert read(pair.source, machine) == replace(running, persistent=False)
    assert defined(pair, machine) == replace(before, inactive_xml="", autostart=False)
    pair.source.undefine(machine.uuid)
    pair.source.define(before.inactive_xml, autostart=before.autostart)
    assert read(pair.source, machine) == running
    assert defined(pair, machine) == before


def test_an_adopted_machine_is_forgotten_when_it_stops(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), None)
    pair.source.undefine(machine.uuid)
    pair.source.destroy(machine.uuid)
    assert pair.source.domain(machine.uuid) is None
    pair.source.undefine(machine.uuid)


def test_an_adopted_machine_outlives_the_daemon(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), None)
    pair.source.undefine(machine.uuid)
    running = read(pair.source, machine)
    pair.kill_daemon("source")
    pair.start_daemon("source")
    assert pair.source.domain(machine.uuid) == replace(running, reason=read(pair.source, machine).reason)


def test_what_does_not_run_is_not_undefined(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), None)
    pair.source.destroy(machine.uuid)
    before = defined(pair, machine)
    with pytest.raises(HypervisorError, match="does not run"):
        pair.source.undefine(machine.uuid)
    assert defined(pair, machine) == before


def test_a_machine_with_snapshots_is_not_undefined(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), None)
    pair.add_snapshot("source", machine.uuid)
    before = defined(pair, machine)
    assert before.snapshots == 1
    with pytest.raises(HypervisorError, match="snapshot"):
        pair.source.undefine(machine.uuid)
    assert defined(pair, machine) == before


def test_a_machine_is_defined_that_does_not_run(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), None)
    xml = defined(pair, machine).inactive_xml
    for autostart in (True, False):
        pair.target.define(xml, autostart=autostart)
        there = read(pair.target, machine)
        assert (there.state, there.persistent) == (DomainState.SHUTOFF, True)
        definition = pair.target.definition(machine.uuid)
        assert definition == Definition(live_xml="", inactive_xml=xml, autostart=autostart)


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "<domain><name>x</name>",
        "<domain><name>x</name></domain>",
        "<network><name>x</name><uuid>5e21a3d0-9a53-4d5c-8a39-6b8f7b8a4c11</uuid></network>",
    ],
    ids=["empty", "broken", "without-uuid", "network"],
)
def test_a_bad_definition_is_refused(pair: HostPair, xml: str) -> None:
    with pytest.raises(HypervisorError, match="XML"):
        pair.source.define(xml, autostart=False)
    assert pair.source.domains() == []


def test_a_definition_with_anothers_name_is_refused(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), None)
    other = new_machine()
    with pytest.raises(HypervisorError):
        pair.source.define(pair.blank_xml(machine.name, other.uuid), autostart=False)
    assert [domain.uuid for domain in pair.source.domains()] == [machine.uuid]


# --- preflight ------------------------------------------------------------------------------------------------------


def test_a_machine_that_fits(pair: HostPair, machine: Machine) -> None:
    assert pair.target.preflight(pair.equipped_xml(machine.name, machine.uuid)) == []
    pair.source.start(pair.equipped_xml(machine.name, machine.uuid), MARKER)
    assert pair.target.preflight(defined(pair, machine).live_xml) == []


WORDS: dict[Lack, tuple[str, ...]] = {
    "cpu": ("CPU", "Nowhere"),
    "machine": ("machine", "nowhere"),
    "disk": ("disk vda", "nowhere"),
    "cdrom": ("CD-ROM", "nowhere"),
    "bridge": ("bridge nowhere",),
    "network": ("network nowhere",),
    "hostdev": ("host device pci 0000:03:00.1",),
    "tpm": ("TPM",),
}


@pytest.mark.parametrize("lack", get_args(Lack))
def test_what_a_machine_lacks_is_named(pair: HostPair, machine: Machine, lack: Lack) -> None:
    problems = pair.target.preflight(pair.unfit_xml(machine.name, machine.uuid, lack))
    assert problems
    for problem in problems:  # of nothing else
        assert "\n" not in problem
        for word in WORDS[lack]:
            assert word in problem


def test_a_local_disk_is_a_problem_unless_it_is_copied(pair: HostPair, machine: Machine) -> None:
    xml = pair.local_disk_xml(machine.name, machine.uuid)
    (problem,) = pair.target.preflight(xml)
    assert "disk vda" in problem
    assert pair.target.preflight(xml, ("vda",)) == []
    (problem,) = pair.target.preflight(xml, ("vda", "vdb"))
    assert "disk vdb" in problem


def test_a_name_that_is_taken_is_a_problem(pair: HostPair, machine: Machine) -> None:
    other = new_machine()
    pair.target.start(pair.blank_xml(machine.name, other.uuid), MARKER)
    (problem,) = pair.target.preflight(pair.blank_xml(machine.name, machine.uuid))
    assert machine.name in problem
    assert other.uuid in problem
    assert pair.target.preflight(pair.blank_xml(machine.name, other.uuid)) == []


@pytest.mark.parametrize("xml", ["", "<domain>", "<network><name>x</name></network>"])
def test_what_is_no_machine_has_no_preflight(pair: HostPair, xml: str) -> None:
    with pytest.raises(HypervisorError, match="XML"):
        pair.target.preflight(xml)


# --- hosts that are busy, or away -----------------------------------------------------------------------------------


def test_a_hanging_machine_does_not_hang_the_caller(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), None)
    before = defined(pair, machine)
    pair.freeze_machine("source", machine.uuid)
    try:
        assert promptly(lambda: pair.source.definition(machine.uuid)) == before
        asked = in_background(lambda: pair.source.shutdown(machine.uuid))
        assert isinstance(asked.exception(20), HypervisorError | None)
        assert in_background(lambda: pair.source.dirty_rate(machine.uuid, 1)).result(20) is None
    finally:
        pair.thaw_machine("source", machine.uuid)
    wait_until(lambda: not read(pair.source, machine).has_job, message="the machine to answer")
    assert state(pair.source, machine) is DomainState.RUNNING


def test_a_daemon_that_is_away_changes_nothing(pair: HostPair, machine: Machine) -> None:
    pair.start_persistent("source", pair.blank_xml(machine.name, machine.uuid), None)
    running, before = read(pair.source, machine), defined(pair, machine)
    pair.kill_daemon("source")
    calls: list[Callable[[], object]] = [
        lambda: pair.source.shutdown(machine.uuid),
        lambda: pair.source.start_post_copy(machine.uuid),
        lambda: pair.source.dirty_rate(machine.uuid, 1),
        lambda: pair.source.preflight(pair.blank_xml(machine.name, machine.uuid)),
        lambda: pair.source.definition(machine.uuid),
        lambda: pair.source.mark(machine.uuid, MARKER),
        lambda: pair.source.unmark(machine.uuid),
        lambda: pair.source.define(before.inactive_xml, autostart=False),
        lambda: pair.source.undefine(machine.uuid),
    ]
    for call in calls:
        with pytest.raises(HypervisorUnavailable):
            promptly(call)
    pair.start_daemon("source")
    assert read(pair.source, machine) == running
    # The live XML's number of the run may be another now.
    assert replace(defined(pair, machine), live_xml="") == replace(before, live_xml="")
