"""A simulated machine: its copy on one host, and the guest in it, which goes along when the machine migrates.

What a guest does by itself (boot, power off, reboot, panic) happens only while a copy of it executes. What falls due
while it is paused or its process hangs, it does when it goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from workers.hypervisor.domain_xml import ParsedDomain, parse_domain
from workers.hypervisor.port import Domain, DomainState, Job
from workers.hypervisor.simulated_guest import Description
from workers.hypervisor.simulated_time import Timeline, Timer


@lru_cache(maxsize=10_000)
def _parse(domain_xml: str) -> ParsedDomain:
    return parse_domain(domain_xml)


class Surroundings(Protocol):
    """What a guest's own doing means to the host that it runs on."""

    name: str

    def agent_changed(self, machine: "Machine", *, connected: bool) -> None: ...  # noqa: D102
    def powered_off(self, machine: "Machine") -> None: ...  # noqa: D102
    def rebooted(self, machine: "Machine") -> None: ...  # noqa: D102
    def panicked(self, machine: "Machine") -> None: ...  # noqa: D102


class Move(Protocol):
    """The migration that is active on a machine, on either side."""

    def figures(self, machine: "Machine") -> Job: ...  # noqa: D102
    def stall(self) -> None: ...  # noqa: D102
    def go_on(self) -> None: ...  # noqa: D102
    def process_gone(self, machine: "Machine") -> None: ...  # noqa: D102
    def daemon_gone(self, machine: "Machine") -> None: ...  # noqa: D102
    def power_gone(self, machine: "Machine") -> None: ...  # noqa: D102
    def abort(self) -> bool: ...  # noqa: D102
    def start_post_copy(self) -> bool: ...  # noqa: D102


class Guest:
    """What runs in a machine.

    Args:
        description: Of the machine.
        timeline: In which it lives.

    Attributes:
        is_up: It has booted.
        ignores_shutdown: It does nothing when asked to power off.
        machine: The copy in which it executes, or would.
    """

    def __init__(self, description: Description, timeline: Timeline) -> None:
        self.description = description
        self.is_up = False
        self.ignores_shutdown = description.behaviour.ignores_shutdown
        self.machine: Machine | None = None
        self._timeline = timeline
        self._timers: list[Timer] = []
        self._deferred: list[Callable[[], None]] = []

    @property
    def has_agent(self) -> bool:
        """Whether its agent answers."""
        return self.is_up and self.description.has_agent_channel and self.description.behaviour.has_agent

    def boot(self) -> None:
        """Begin to boot, at its start or anew."""
        self.end()
        behaviour = self.description.behaviour
        self._set(behaviour.boot_s, self._come_up)
        for seconds, action in (
            (behaviour.poweroff_after_s, self.power_off),
            (behaviour.reboot_after_s, self.reboot),
            (behaviour.crash_after_s, self.panic),
        ):
            if seconds:
                self._set(seconds, action)

    def end(self) -> None:
        """Do nothing any more."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._deferred.clear()
        self.is_up = False

    def copy_for(self, machine: "Machine") -> "Guest":
        """Give a second guest, which goes on from older memory: the source's copy of one that runs on the target."""
        twin = Guest(self.description, self._timeline)
        twin.is_up, twin.machine = self.is_up, machine
        return twin

    def press_power_button(self) -> None:
        """Ask it to power off; it may not hear that, or ignore it."""
        if self.is_up and not self.ignores_shutdown:
            self._set(self.description.behaviour.shutdown_s, self.power_off)

    def power_off(self) -> None:
        """Power off, or do so as soon as it goes on."""
        self._do(lambda host, machine: host.powered_off(machine), self.power_off)

    def reboot(self) -> None:
        """Reboot, or do so as soon as it goes on."""
        self._do(lambda host, machine: host.rebooted(machine), self.reboot)

    def panic(self) -> None:
        """Panic, or do so as soon as it goes on."""
        self._do(lambda host, machine: host.panicked(machine), self.panic)

    def go_on(self) -> None:
        """Do what fell due while it stood still."""
        deferred, self._deferred = self._deferred, []
        for action in deferred:
            action()

    def _come_up(self) -> None:
        machine = self.machine
        if machine is None or not machine.executes:
            self._deferred.append(self._come_up)
            return
        self.is_up = True
        if self.has_agent:
            machine.host.agent_changed(machine, connected=True)

    def _do(self, act: Callable[[Surroundings, "Machine"], None], again: Callable[[], None]) -> None:
        machine = self.machine
        if machine is None or not machine.executes:
            self._deferred.append(again)
        else:
            act(machine.host, machine)

    def _set(self, seconds: float, action: Callable[[], None]) -> None:
        self._timers.append(self._timeline.after(seconds, action))


@dataclass(eq=False)
class Machine:
    """One host's copy of a machine.

    Attributes:
        host: Where it is.
        xml: Of the process that runs; of the definition while none does.
        description: What stands in it.
        guest: None while no process runs.
        inactive_xml: Of the persistent definition; empty for a transient one.
        migration: The job on it.
        is_frozen: Its process answers nothing.
        is_dying: Its process is gone, and the daemon has not noticed yet.
        is_half_made: What is left of an incoming copy whose daemon died.
        resumes_with_daemon: The daemon resumes it when it is back.
        completed: Figures of the migration by which it came.
        queued: What was asked of a frozen process, to be done when it answers again.
    """

    host: Surroundings
    xml: str
    description: Description
    state: DomainState
    reason: str
    guest: Guest | None = None
    inactive_xml: str = ""
    autostart: bool = False
    snapshots: int = 0
    migration: Move | None = None
    is_frozen: bool = False
    is_dying: bool = False
    is_half_made: bool = False
    resumes_with_daemon: bool = False
    completed: dict[str, int] = field(default_factory=dict)
    queued: list[Callable[[], object]] = field(default_factory=list)

    @property
    def keys(self) -> set[str]:
        """What it is called by: its UUID, its domain's name, and `project/name` if it is marked."""
        marker = _parse(self.xml).marker
        return {self.description.uuid, self.description.name} | (
            {f"{marker.project}/{marker.name}"} if marker else set()
        )

    @property
    def is_active(self) -> bool:
        """Whether it has a process, as far as its host's daemon knows."""
        return self.state is not DomainState.SHUTOFF

    @property
    def executes(self) -> bool:
        """Whether the guest's CPUs run here."""
        runs = self.state in (DomainState.RUNNING, DomainState.POSTCOPY) and not self.is_frozen and not self.is_dying
        return runs and self.guest is not None and self.guest.machine is self

    @property
    def has_job(self) -> bool:
        """Whether a migration is active on it."""
        return self.migration is not None or self.is_half_made

    @property
    def is_silent(self) -> bool:
        """Whether figures of its job can't be had."""
        return self.is_half_made or (self.is_frozen and self.state is not DomainState.INCOMING)

    def become(self, state: DomainState, reason: str) -> None:
        """Change what it does."""
        self.state, self.reason = state, reason
        if self.executes and self.guest is not None:
            self.guest.go_on()

    def freeze(self) -> None:
        """Let its process answer nothing and do nothing."""
        self.is_frozen = True
        if self.migration is not None:
            self.migration.stall()

    def thaw(self) -> None:
        """Let it go on, and do what it was asked meanwhile."""
        self.is_frozen = False
        if self.migration is not None:
            self.migration.go_on()
        queued, self.queued = self.queued, []
        for action in queued:
            action()
        if self.executes and self.guest is not None:
            self.guest.go_on()

    def reading(self) -> Domain:
        """Give it as the port does."""
        parsed = _parse(self.xml)
        job = None
        if self.migration is not None and not self.is_silent:
            job = self.migration.figures(self)
        agent = None
        if self.description.has_agent_channel:
            agent = self.guest is not None and self.executes and self.guest.has_agent
        return Domain(
            uuid=self.description.uuid,
            name=parsed.name,
            state=self.state,
            reason=self.reason,
            marker=parsed.marker,
            memory_mib=parsed.memory_mib,
            vcpus=parsed.vcpus,
            persistent=bool(self.inactive_xml),
            job=job,
            has_job=self.has_job,
            agent=agent,
        )
