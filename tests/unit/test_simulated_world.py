"""Simulated hosts in time that jumps: what the contract's suite can't see from outside, or not at will."""

from typing import Any

import pytest

from orchestrator.errors import HypervisorError, HypervisorUnavailable, OutcomeUnknown
from workers.hypervisor.port import (
    DomainExists,
    DomainState,
    EventKind,
    Marker,
    MigrationEnd,
    MigrationRequest,
    MigrationResult,
)
from workers.hypervisor.simulated_faults import Faults
from workers.hypervisor.simulated_guest import Behaviour
from workers.hypervisor.simulated_spec import HostSpec
from workers.hypervisor.simulated_world import World

UUID = "5e21a3d0-9a53-4d5c-8a39-6b8f7b8a4c11"
MARKER = Marker("default", "web", 1, 1)
RESTLESS = Behaviour(dirty_mib_s=1000, working_set_mib=500)


def xml(behaviour: Behaviour | None = None, *devices: str) -> str:
    element = (behaviour or Behaviour()).element()
    return (
        f"<domain type='kvm'><name>default.web</name><uuid>{UUID}</uuid><metadata>{element}</metadata>"
        f"<memory unit='MiB'>1000</memory><vcpu>1</vcpu><devices>{''.join(devices)}</devices></domain>"
    )


class Hosts:
    """Two hosts in a time of their own."""

    def __init__(self, speed_up: float = 1.0) -> None:
        self.clock = 100.0
        self.world = World(lambda: self.clock, speed_up, [HostSpec("h1"), HostSpec("h2")])
        self.faults = Faults(self.world)
        self.events = {name: self.world.subscribe(name, lambda: None) for name in self.world.hosts}

    def ask(self, host: str, method: str, *arguments: Any) -> Any:
        """Give an answer that comes at once."""
        answer = self.world.call(host, method, *arguments)
        assert answer.done(), method
        return answer.result(0)

    def start(self, behaviour: Behaviour | None = None, *devices: str, host: str = "h1") -> None:
        self.ask(host, "start", xml(behaviour, *devices), MARKER)

    def begin(self, bandwidth: int = 100, **more: Any) -> Any:
        """Begin to migrate from h1 to h2."""
        return self.world.call("h1", "migrate", MigrationRequest(UUID, "simulated://h2", bandwidth, **more))

    def after(self, seconds: float) -> None:
        """Let so many seconds of the clock pass, from event to event."""
        end = self.clock + seconds
        while (due := self.world.next_at()) is not None and due <= end:
            self.clock = max(self.clock, due)
            self.world.advance()
        self.clock = end
        self.world.advance()

    def state(self, host: str) -> DomainState | None:
        domain = self.ask(host, "domain", UUID)
        return None if domain is None else domain.state

    def told(self, host: str) -> list[str]:
        return [f"{event.kind} {event.detail}".strip() for event in self.events[host].take()]


@pytest.fixture
def hosts() -> Hosts:
    return Hosts()


def until_switch_over(hosts: Hosts) -> None:
    for _ in range(1000):
        due = hosts.world.next_at()
        assert due is not None
        hosts.after(due - hosts.clock)
        if hosts.state("h1") is DomainState.PAUSED_MIGRATED:
            return
    raise AssertionError("it does not switch over")


# --- time -----------------------------------------------------------------------------------------------------------


def test_nothing_happens_by_itself(hosts: Hosts) -> None:
    hosts.start(Behaviour(poweroff_after_s=5))
    assert hosts.world.next_at() == pytest.approx(102)
    hosts.clock += 60
    assert hosts.world.host("h1").machines == {}, "a look makes up for all that was due"


def test_time_may_run_faster() -> None:
    hosts = Hosts(speed_up=10)
    hosts.start(Behaviour(poweroff_after_s=50))
    hosts.after(4.9)
    assert hosts.state("h1") is DomainState.RUNNING
    hosts.after(0.2)
    assert hosts.state("h1") is None


def test_a_clock_that_is_set_to_the_next_moment_has_reached_it() -> None:
    for speed_up in (1.0, 3.0, 7.3):
        hosts = Hosts(speed_up)
        hosts.clock += 0.123456789
        for boot_s in (0.1, 0.7, 1.1):
            hosts.start(Behaviour(boot_s=boot_s))
            hosts.clock = hosts.world.next_at() or 0.0
            hosts.world.advance()
            assert hosts.world.next_at() is None
            hosts.ask("h1", "destroy", UUID)


@pytest.mark.parametrize("speed_up", [0, -1])
def test_time_does_not_stand_still(speed_up: float) -> None:
    with pytest.raises(ValueError, match="speed-up"):
        Hosts(speed_up)


# --- migrations -----------------------------------------------------------------------------------------------------


def test_a_migration_takes_what_memory_and_bandwidth_give(hosts: Hosts) -> None:
    hosts.start(Behaviour(dirty_mib_s=0))
    result = hosts.begin(bandwidth=100)
    hosts.after(9.9)
    assert hosts.state("h2") is DomainState.INCOMING
    assert hosts.world.executing(UUID) == ["h1"]
    hosts.after(0.2)
    assert hosts.world.executing(UUID) == ["h2"]
    assert not result.done(), "the source's process is yet to be ended"
    hosts.after(2)
    assert result.result(0) == MigrationResult(MigrationEnd.SUCCEEDED)
    assert hosts.told("h2") == ["started migrated", "resumed migrated"]
    assert hosts.told("h1")[-3:] == ["suspended migrated", "stopped migrated", "changed job-completed"]


def test_a_guests_timers_go_along(hosts: Hosts) -> None:
    hosts.start(Behaviour(dirty_mib_s=0, poweroff_after_s=20))
    hosts.begin(bandwidth=100)
    hosts.after(19)
    assert hosts.world.executing(UUID) == ["h2"]
    hosts.after(2)
    assert hosts.state("h2") is None
    assert hosts.told("h2")[-1] == "stopped shutdown"


def test_a_guest_that_powers_off_while_it_migrates(hosts: Hosts) -> None:
    hosts.start(Behaviour(dirty_mib_s=0, poweroff_after_s=5))
    result = hosts.begin(bandwidth=100)
    hosts.after(6)
    assert result.result(0).end is MigrationEnd.FAILED
    assert (hosts.state("h1"), hosts.state("h2")) == (None, None)


def test_an_abort_while_the_guest_stands_still(hosts: Hosts) -> None:
    hosts.start()
    result = hosts.begin()
    until_switch_over(hosts)
    assert hosts.ask("h1", "abort", UUID)
    hosts.after(1)
    assert result.result(0).end is MigrationEnd.ABORTED
    assert hosts.world.executing(UUID) == ["h1"]
    assert hosts.state("h2") is None


def test_an_abort_that_is_too_late_is_accepted(hosts: Hosts) -> None:
    hosts.start(Behaviour(dirty_mib_s=0))
    result = hosts.begin()
    hosts.after(10.2)
    assert hosts.world.executing(UUID) == ["h2"]
    assert hosts.ask("h1", "abort", UUID)
    hosts.after(5)
    assert result.result(0).end is MigrationEnd.SUCCEEDED
    assert hosts.ask("h1", "abort", UUID) is False


def test_a_killed_process_never_arrives(hosts: Hosts) -> None:
    """It is noticed a second after its death: what would have switched over within that second must not."""
    hosts.start(Behaviour(dirty_mib_s=0))
    result = hosts.begin()
    hosts.after(9.8)
    hosts.faults.kill(UUID, "h1")
    hosts.after(0.5)
    assert hosts.world.executing(UUID) == []
    hosts.after(2)
    assert result.result(0).end is MigrationEnd.FAILED
    assert (hosts.state("h1"), hosts.state("h2")) == (None, None)


def test_a_source_whose_daemon_dies_at_the_switch_over_goes_on_when_it_is_back(hosts: Hosts) -> None:
    hosts.start()
    result = hosts.begin()
    until_switch_over(hosts)
    hosts.faults.kill_daemon("h1")
    assert result.result(0).end is MigrationEnd.UNKNOWN
    hosts.after(5)
    assert hosts.world.executing(UUID) == []
    assert hosts.state("h2") is None
    hosts.faults.start_daemon("h1")
    hosts.after(2)
    assert hosts.world.executing(UUID) == ["h1"]


def test_a_target_without_power_is_noticed_by_keepalive(hosts: Hosts) -> None:
    hosts.start(RESTLESS)
    result = hosts.begin()
    hosts.after(5)
    hosts.faults.power_off("h2")
    assert hosts.ask("h1", "abort", UUID), "accepted, and of no avail"
    hosts.after(20)
    assert not result.done()
    hosts.after(10)
    assert result.result(0).end is MigrationEnd.UNKNOWN
    assert hosts.world.executing(UUID) == ["h1"]
    assert not hosts.ask("h1", "domain", UUID).has_job


def test_a_source_without_power_leaves_the_targets_copy_for_a_while(hosts: Hosts) -> None:
    hosts.start(RESTLESS)
    hosts.begin()
    hosts.after(5)
    hosts.faults.power_off("h1")
    hosts.after(20)
    assert hosts.state("h2") is DomainState.INCOMING
    hosts.after(10)
    assert hosts.state("h2") is None


def test_a_copy_that_is_resumed_from_older_memory_runs_twice(hosts: Hosts) -> None:
    hosts.start(Behaviour(dirty_mib_s=0))
    hosts.begin()
    hosts.after(10.2)
    hosts.faults.kill_daemon("h1")
    hosts.faults.start_daemon("h1")
    assert hosts.state("h1") is DomainState.PAUSED_MIGRATED
    hosts.ask("h1", "resume", UUID)
    assert hosts.world.executing(UUID) == ["h1", "h2"]


def test_a_guest_in_post_copy_is_lost_with_its_source(hosts: Hosts) -> None:
    hosts.start(RESTLESS)
    result = hosts.begin(post_copy=True)
    hosts.after(30)
    assert hosts.ask("h1", "start_post_copy", UUID)
    assert hosts.world.executing(UUID) == ["h2"]
    hosts.faults.power_off("h1")
    assert result.result(0).end is MigrationEnd.UNKNOWN
    assert hosts.state("h2") is DomainState.POSTCOPY_FAILED
    assert hosts.world.executing(UUID) == []


def test_a_migration_fails_on_its_way_as_often_as_told(hosts: Hosts) -> None:
    hosts.start()
    hosts.faults.fail_migration("default/web", times=1)
    first = hosts.begin()
    hosts.after(30)
    assert first.result(0).end is MigrationEnd.FAILED
    assert hosts.world.executing(UUID) == ["h1"]
    second = hosts.begin()
    hosts.after(30)
    assert second.result(0).end is MigrationEnd.SUCCEEDED


# --- guests and faults ------------------------------------------------------------------------------------------------


def test_a_guest_obeys_once_it_is_up(hosts: Hosts) -> None:
    hosts.start(Behaviour(boot_s=10, shutdown_s=3))
    hosts.ask("h1", "shutdown", UUID)
    hosts.after(20)
    assert hosts.state("h1") is DomainState.RUNNING, "it did not feel the button while it booted"
    hosts.ask("h1", "shutdown", UUID)
    hosts.after(2.9)
    assert hosts.state("h1") is DomainState.RUNNING
    hosts.after(0.2)
    assert hosts.state("h1") is None


def test_a_guest_that_ignores_it(hosts: Hosts) -> None:
    hosts.start()
    hosts.after(5)
    hosts.faults.ignore_shutdown("default/web")
    hosts.ask("h1", "shutdown", UUID)
    hosts.after(100)
    assert hosts.state("h1") is DomainState.RUNNING


def test_a_paused_guest_does_later_what_fell_due(hosts: Hosts) -> None:
    hosts.start(Behaviour(poweroff_after_s=5))
    hosts.faults.pause(UUID)
    hosts.after(60)
    assert hosts.state("h1") is DomainState.PAUSED
    hosts.ask("h1", "resume", UUID)
    assert hosts.state("h1") is None


def test_an_agent_and_an_address_come_with_the_guest(hosts: Hosts) -> None:
    channel = "<channel type='unix'><target name='org.qemu.guest_agent.0'/></channel>"
    hosts.start(Behaviour(boot_s=10), channel, "<interface type='network'><source network='lan'/></interface>")
    assert hosts.ask("h1", "domain", UUID).agent is False
    assert hosts.ask("h1", "addresses", UUID) == []
    hosts.after(11)
    assert hosts.ask("h1", "domain", UUID).agent is True
    assert len(hosts.ask("h1", "addresses", UUID)) == 1
    assert hosts.told("h1")[-1] == "changed agent-connected"
    hosts.faults.guest_reboot(UUID)
    assert hosts.ask("h1", "domain", UUID).agent is False


def test_a_panic_ends_a_machine_and_is_told(hosts: Hosts) -> None:
    hosts.start()
    hosts.faults.guest_panic("default.web")
    assert hosts.state("h1") is None
    assert hosts.told("h1")[-2:] == ["changed crashed-panicked", "stopped crashed"]


def test_starts_fail_as_often_as_told(hosts: Hosts) -> None:
    hosts.faults.fail_start("default/web", "no room", times=1)
    with pytest.raises(HypervisorError, match="no room"):
        hosts.start()
    hosts.start()
    assert hosts.state("h1") is DomainState.RUNNING


def test_starts_fail_until_healed(hosts: Hosts) -> None:
    hosts.faults.fail_start("", "no room", host="h1")
    for _ in range(3):
        with pytest.raises(HypervisorError, match="no room"):
            hosts.start()
    hosts.start(host="h2")
    hosts.ask("h2", "destroy", UUID)
    hosts.faults.heal()
    hosts.start()


def test_a_lost_reply_hides_a_start(hosts: Hosts) -> None:
    hosts.faults.lose_reply("h1", "start")
    with pytest.raises(OutcomeUnknown):
        hosts.start()
    assert hosts.state("h1") is DomainState.RUNNING
    with pytest.raises(DomainExists):
        hosts.start()


def test_a_slow_host_answers_later(hosts: Hosts) -> None:
    hosts.faults.slow("h1", 3)
    answer = hosts.world.call("h1", "start", xml(), MARKER)
    hosts.after(2.9)
    assert not answer.done()
    assert hosts.world.executing(UUID) == []
    hosts.after(0.2)
    assert answer.result(0).state is DomainState.RUNNING


def test_a_daemon_that_hangs_is_given_up(hosts: Hosts) -> None:
    hosts.start(RESTLESS)
    migrating = hosts.begin()
    hosts.faults.freeze_daemon("h1")
    asked = hosts.world.call("h1", "domains")
    hosts.after(6)
    assert isinstance(asked.exception(0), HypervisorUnavailable)
    hosts.after(5)
    assert migrating.result(0).end is MigrationEnd.UNKNOWN
    assert hosts.told("h1")[-1] == EventKind.LOST
    hosts.faults.heal("h1")
    assert hosts.told("h1") == [EventKind.RESYNC]
    assert hosts.ask("h1", "domain", UUID).has_job


def test_a_hanging_machine_does_what_it_was_asked_when_it_goes_on(hosts: Hosts) -> None:
    hosts.start(RESTLESS)
    result = hosts.begin()
    hosts.after(3)
    hosts.faults.freeze(UUID, "h1")
    aborting = hosts.world.call("h1", "abort", UUID)
    hosts.after(60)
    assert isinstance(aborting.exception(0), OutcomeUnknown)
    assert not result.done()
    hosts.faults.thaw(UUID, "h1")
    hosts.after(1)
    assert result.result(0).end is MigrationEnd.ABORTED
    assert hosts.world.executing(UUID) == ["h1"]


def test_no_power_takes_all_and_boots_what_has_autostart(hosts: Hosts) -> None:
    hosts.start()
    other = xml().replace(UUID, UUID[:-1] + "2").replace("default.web", "by-hand")
    hosts.faults.start_persistent("h1", other)
    before = hosts.ask("h1", "boot_id")
    hosts.faults.power_off("h1")
    assert hosts.world.executing(UUID) == []
    with pytest.raises(HypervisorUnavailable):
        hosts.ask("h1", "domains")
    with pytest.raises(HypervisorUnavailable):
        hosts.world.subscribe("h1", lambda: None)
    assert hosts.told("h1")[-1] == EventKind.LOST
    hosts.faults.power_on("h1")
    assert [(d.name, d.state) for d in hosts.ask("h1", "domains")] == [("by-hand", DomainState.RUNNING)]
    assert hosts.ask("h1", "boot_id") != before
    assert hosts.told("h1")[-1] == EventKind.RESYNC


def test_an_orderly_shutdown_is_the_hosts_doing(hosts: Hosts) -> None:
    hosts.start()
    hosts.events["h1"].take()
    hosts.faults.shut_down("h1")
    events = hosts.events["h1"].take()
    assert [(e.kind, e.detail, e.reason) for e in events][1:] == [
        (EventKind.STOPPED, "shutdown", "host"),
        (EventKind.LOST, "", ""),
    ]


def test_faults_name_what_is_not_there(hosts: Hosts) -> None:
    with pytest.raises(HypervisorError, match="h9"):
        hosts.faults.power_off("h9")
    with pytest.raises(HypervisorError, match="default/web"):
        hosts.faults.kill("default/web")


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ("dirty-mib-s='much'", "dirty-mib-s"),
        ("boot-s='-1'", "boot-s"),
        ("sleeps='yes'", "sleeps"),
        ("has-agent='1'", "no"),
    ],
)
def test_a_wrong_behaviour_is_refused(hosts: Hosts, attributes: str, word: str) -> None:
    wrong = xml().replace("<simulated:guest", f"<simulated:guest {attributes}")
    with pytest.raises(HypervisorError, match=word):
        hosts.ask("h1", "start", wrong, MARKER)
    assert hosts.ask("h1", "domains") == []
