"""A simulated host: what its daemon answers and does, as libvirt's does (`libvirt_driver`).

A method answers at once, or with a future that is fulfilled when the call ends. Whether the daemon can be asked at all
is not looked at here but by `simulated_world`.
"""

import re
import uuid as uuids
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from orchestrator.errors import DomainNotFound, HypervisorError, HypervisorUnavailable, OutcomeUnknown
from workers.hypervisor.domain_needs import needs_of
from workers.hypervisor.domain_xml import with_marker
from workers.hypervisor.port import (
    Domain,
    DomainEvent,
    DomainExists,
    DomainState,
    EventKind,
    Host,
    HostUse,
    Job,
    Marker,
    StorageLocked,
    is_lock_refusal,
)
from workers.hypervisor.simulated_cpu import cpu_problems, host_cpu
from workers.hypervisor.simulated_guest import Description, describe, normalised
from workers.hypervisor.simulated_machine import Guest, Machine
from workers.hypervisor.simulated_spec import Daemon, Failure, HostSpec, Subscription, due_failure
from workers.hypervisor.simulated_time import Timeline

T = TypeVar("T")

CHANGE_DEADLINE_S: Final = 5.0
"""The libvirt driver's, for calls that wait for a QEMU that hangs; they take effect when it goes on."""
_BUSY_SHARE: Final = 0.25
_FIGURES_DEADLINE_S: Final = 4.0
_DESTROY_FROZEN_S: Final = 12.0
"""SIGTERM, and SIGKILL after 10 s."""
_NOTICED_S: Final = 1.2
"""From a process's death to the daemon's noticing (libvirt.md, section 9)."""
_MACHINE_TYPES: Final = re.compile(r"(pc|q35|virt|microvm)|(pc-i440fx|pc-q35|virt)-\d+\.\d+|")


class SimulatedHost:
    """One host.

    Args:
        spec: What it has.
        timeline: In which it lives.

    Attributes:
        machines: By UUID.
        fail_starts: Coming starts that fail, by UUID, domain name or `project/name`; the key "" stands for all.
    """

    def __init__(self, spec: HostSpec, timeline: Timeline) -> None:
        self.spec = spec
        self.name = spec.name
        self.timeline = timeline
        self.daemon = Daemon.ANSWERS
        self.delay_s = 0.0
        self.boots = 1
        self.machines: dict[str, Machine] = {}
        self.files = set(spec.files)
        self.fail_starts: dict[str, Failure] = {}
        self.subscriptions: list[Subscription] = []
        self._use = HostUse(0.0, 0.0, 0)
        self._use_at = timeline.now

    @property
    def uri(self) -> str:
        """Where other hosts reach it."""
        return f"simulated://{self.name}"

    # --- readings -------------------------------------------------------------------------------------------------

    def host(self) -> Host:
        """Read what it is."""
        return Host(
            hostname=self.name,
            uuid=str(uuids.uuid5(uuids.NAMESPACE_URL, self.uri)),
            cpus=self.spec.cpus,
            memory_mib=self.spec.memory_mib,
            cpu_model=self.spec.cpu_model,
            hypervisor_version=f"QEMU {self.spec.qemu}",
            libvirt_version="9.0.0",
            cpu=host_cpu(self.spec.cpu_model),
        )

    def use(self) -> HostUse:
        """Read what is in use of it: a quarter of its running guests' CPUs, as few are busy all the time."""
        running = [one for one in self.domains() if one.state is DomainState.RUNNING]
        seconds, self._use_at = self.timeline.now - self._use_at, self.timeline.now
        busy = min(self.spec.cpus, _BUSY_SHARE * sum(one.vcpus for one in running))
        self._use = HostUse(
            self._use.busy_s + seconds * busy,
            self._use.idle_s + seconds * (self.spec.cpus - busy),
            sum(one.memory_mib for one in running),
        )
        return self._use

    def boot_id(self) -> str:
        """Name its present boot."""
        return str(uuids.uuid5(uuids.NAMESPACE_URL, f"{self.uri}/{self.boots}"))

    def domains(self) -> list[Domain]:
        """Read all domains, ordered by name."""
        found = [machine.reading() for machine in self.machines.values()]
        return sorted(found, key=lambda domain: (domain.name, domain.uuid))

    def domain(self, uuid: str) -> Domain | None:
        """Read one domain."""
        machine = self.machines.get(uuid)
        return None if machine is None else machine.reading()

    def job(self, uuid: str) -> "Job | Future[Any] | None":
        """Read the job on a domain."""
        machine = self.machines.get(uuid)
        if machine is None or not machine.has_job:
            return None
        if machine.is_silent:
            words = f"{self.name} says nothing about the job of domain {uuid}: its QEMU hangs"
            return self.fail_later(_FIGURES_DEADLINE_S, HypervisorUnavailable(words))
        return machine.reading().job

    def completed_job(self, uuid: str) -> dict[str, int]:
        """Read the figures of the migration by which a domain came."""
        machine = self.machines.get(uuid)
        return {} if machine is None else dict(machine.completed)

    def addresses(self, uuid: str) -> list[str]:
        """Read a guest's addresses."""
        machine = self.machines.get(uuid)
        if machine is None or machine.guest is None or not machine.guest.is_up or not machine.is_active:
            return []
        return [machine.description.address] if machine.description.address else []

    def dirty_rate(self, uuid: str, seconds: float) -> "Future[float | None]":
        """Measure how fast a guest dirties memory."""
        answer: Future[float | None] = Future()

        def measured() -> None:
            machine = self.machines.get(uuid)
            if machine is None or machine.state is not DomainState.RUNNING or machine.has_job or machine.is_frozen:
                settle(answer, None)
            else:  # sampling finds about four fifths of it
                settle(answer, 0.8 * machine.description.load.dirtied_mib(seconds) / seconds)

        machine = self.machines.get(uuid)
        if machine is None or machine.state is not DomainState.RUNNING or machine.has_job:
            answer.set_result(None)
        else:
            self.timeline.after(seconds + (CHANGE_DEADLINE_S if machine.is_frozen else 0), measured)
        return answer

    # --- changes --------------------------------------------------------------------------------------------------

    def start(self, domain_xml: str, marker: Marker) -> Domain:
        """Start a transient domain."""
        marked_xml, uuid = with_marker(domain_xml, marker)
        if (there := self.machines.get(uuid)) is not None and there.is_active:
            raise DomainExists(f"domain {uuid} was not started, as {self.name} already has it")
        description = describe(marked_xml)
        self._check_can_run(description, f"{marker.project}/{marker.name}")
        for problem in cpu_problems(self.spec.cpu_model, needs_of(marked_xml)):
            raise HypervisorError(f"domain {uuid} was not started: {problem}")
        if there is not None:
            raise DomainExists(f"domain {uuid} was not started, as {self.name} has it defined")
        machine = Machine(self, normalised(marked_xml), description, DomainState.SHUTOFF, "unknown")
        self.machines[uuid] = machine
        self.run(machine)
        return machine.reading()

    def run(self, machine: Machine) -> None:
        """Start the process of a machine that has none."""
        machine.guest = Guest(machine.description, self.timeline)
        machine.guest.machine = machine
        machine.completed.clear()
        machine.become(DomainState.RUNNING, "booted")
        machine.guest.boot()
        self.tell(EventKind.RESUMED, machine, "unpaused")
        self.tell(EventKind.STARTED, machine, "booted")

    def _check_can_run(self, description: Description, vm: str) -> None:
        uuid = description.uuid
        for machine in self.machines.values():
            if machine.description.name == description.name and machine.description.uuid != uuid:
                raise HypervisorError(
                    f"domain {uuid} was not started: the name {description.name} is taken by {machine.description.uuid}"
                )
        if failure := due_failure(self.fail_starts, (uuid, description.name, vm, "")):
            error = StorageLocked if is_lock_refusal(failure) else HypervisorError
            raise error(f"domain {uuid} was not started: {failure}")
        problem = next(iter(self.lacks(description)), "")
        if problem:
            raise HypervisorError(f"domain {uuid} was not started: {problem}")

    def lacks(self, description: Description, copied_disks: tuple[str, ...] = ()) -> list[str]:
        """Say what a process of that description would not find here."""
        problems = machine_problems(description.machine)
        for target, path in description.disks.items():
            if path and target not in copied_disks and not self.has_file(path):
                problems.append(f"Cannot access storage file '{path}': No such file or directory")
        return problems

    def has_file(self, path: str) -> bool:
        """Whether a file is there."""
        return path in self.files or any(path.startswith(folder) for folder in self.spec.shared_paths)

    def destroy(self, uuid: str) -> "Future[None]":
        """Stop a domain at once."""
        answer: Future[None] = Future()

        def end() -> None:
            machine = self.machines.get(uuid)
            if machine is not None and machine.is_active:
                machine.is_frozen = False
                self.end(machine, "destroyed", by="host")
            settle(answer, None)

        machine = self.machines.get(uuid)
        if machine is not None and machine.is_frozen:
            self.timeline.after(_DESTROY_FROZEN_S, end)
        else:
            end()
        return answer

    def shutdown(self, uuid: str) -> None:
        """Ask a guest to power off."""
        machine = self.machines.get(uuid)
        if machine is None or not machine.is_active:
            raise DomainNotFound(f"domain {uuid} does not run on {self.name}")
        if machine.state is not DomainState.RUNNING:
            raise HypervisorError(f"domain {uuid} can't be asked to power off: it is {machine.state}")
        if machine.has_job:
            raise HypervisorError(f"domain {uuid} can't be asked to power off while a job is active on it")
        if machine.guest is None:
            return
        if machine.is_frozen:
            machine.queued.append(machine.guest.press_power_button)
        else:
            machine.guest.press_power_button()

    def resume(self, uuid: str) -> "Future[None] | None":
        """Let a paused domain run."""
        machine = self.machines.get(uuid)
        if machine is None:
            raise DomainNotFound(f"{self.name} has no domain {uuid}")
        if machine.state is DomainState.RUNNING:
            return None
        if machine.has_job:
            raise HypervisorError(f"domain {uuid} is not resumed while a job is active on it ({machine.state})")
        if machine.state not in (DomainState.PAUSED, DomainState.PAUSED_MIGRATED):
            raise HypervisorError(f"domain {uuid} was not resumed: it is {machine.state}")
        return self.when_it_answers(machine, "resume", lambda: self.go_on(machine))

    def go_on(self, machine: Machine, reason: str = "unpaused") -> None:
        """Let a paused machine run, though it ran on elsewhere since: nothing in a host can know that."""
        if machine.guest is not None and machine.guest.machine is not machine:
            machine.guest = machine.guest.copy_for(machine)
        machine.become(DomainState.RUNNING, reason)
        self.tell(EventKind.RESUMED, machine, "unpaused")

    def when_it_answers(self, machine: Machine, what: str, action: Callable[[], T]) -> "Future[T]":
        """Do something that a machine's process has to answer to.

        Raises:
            OutcomeUnknown: It hangs (told by the future); it will do it when it goes on.
        """
        if not machine.is_frozen:
            return answered(action())
        machine.queued.append(action)
        words = f"{what} of domain {machine.description.uuid}: no answer for {CHANGE_DEADLINE_S:g} s, its QEMU may hang"
        return self.fail_later(CHANGE_DEADLINE_S, OutcomeUnknown(words))

    def fail_later(self, seconds: float, error: Exception) -> "Future[Any]":
        """Give a future that fails after some time."""
        answer: Future[Any] = Future()
        self.timeline.after(seconds, lambda: settle(answer, error=error))
        return answer

    # --- what machines and people do --------------------------------------------------------------------------------

    def pause(self, machine: Machine) -> None:
        """Pause a machine, as a person does."""
        if machine.state is DomainState.RUNNING:
            machine.become(DomainState.PAUSED, "user")
            self.tell(EventKind.SUSPENDED, machine, "paused")

    def kill(self, machine: Machine) -> None:
        """End a machine's process without a word; its daemon notices a little later."""
        machine.is_dying = True
        if machine.migration is not None:
            machine.migration.stall()
        self.timeline.after(_NOTICED_S, lambda: self.end(machine, "failed"))

    def end(self, machine: Machine, detail: str, *, by: str = "", silently: bool = False) -> None:
        """See a machine's process gone.

        Args:
            machine: Of this host.
            detail: Of the event STOPPED; `failed` leaves a persistent one as crashed.
            by: `guest` or `host`, which the event SHUTDOWN tells.
            silently: Without events.
        """
        if self.machines.get(machine.description.uuid) is not machine or not machine.is_active:
            return
        move, machine.migration = machine.migration, None
        if machine.guest is not None and machine.guest.machine is machine:
            machine.guest.end()
        machine.guest = None
        machine.is_frozen = machine.is_dying = machine.is_half_made = machine.resumes_with_daemon = False
        machine.queued.clear()
        reason = "crashed" if detail == "failed" else detail
        machine.become(DomainState.SHUTOFF, reason)
        if machine.inactive_xml:
            machine.xml, machine.description = machine.inactive_xml, describe(machine.inactive_xml)
        else:
            del self.machines[machine.description.uuid]
        if not silently:
            if by:
                self.tell(EventKind.CHANGED, machine, f"shutdown-{by}")
            self.tell(EventKind.STOPPED, machine, detail, by if detail == "shutdown" else "")
        if move is not None:
            move.process_gone(machine)

    def agent_changed(self, machine: Machine, *, connected: bool) -> None:
        """A guest's agent came or went."""
        self.tell(EventKind.CHANGED, machine, "agent-connected" if connected else "agent-disconnected")

    def powered_off(self, machine: Machine) -> None:
        """A guest powered off."""
        self.end(machine, "shutdown", by="guest")

    def rebooted(self, machine: Machine) -> None:
        """A guest rebooted."""
        if machine.description.on_reboot == "destroy":  # looks like a poweroff (libvirt.md, section 9)
            self.end(machine, "shutdown", by="guest")
        elif machine.guest is not None:
            machine.guest.boot()
            for _ in range(2):  # libvirt tells it two or three times
                self.tell(EventKind.REBOOTED, machine)

    def panicked(self, machine: Machine) -> None:
        """A guest panicked."""
        match machine.description.on_crash:
            case "preserve":
                machine.become(DomainState.CRASHED, "panicked")
                self.tell(EventKind.CHANGED, machine, "crashed-panicked")
            case "restart":
                self.rebooted(machine)
            case _:
                self.tell(EventKind.CHANGED, machine, "crashed-panicked")
                self.end(machine, "crashed")

    def tell(self, kind: EventKind, machine: Machine, detail: str = "", reason: str = "") -> None:
        """Tell those who watch; nobody hears it while the daemon is away."""
        if self.daemon is Daemon.ANSWERS:
            for subscription in self.subscriptions:
                subscription.tell(DomainEvent(kind, machine.description.uuid, detail, reason))


def machine_problems(machine: str) -> list[str]:
    """Say if a machine type is not known."""
    if _MACHINE_TYPES.fullmatch(machine):
        return []
    return [f"machine {machine}: the emulator does not support machine type '{machine}'"]


def answered(value: T) -> "Future[T]":
    """Give a future that is fulfilled."""
    answer: Future[T] = Future()
    answer.set_result(value)
    return answer


def settle(answer: "Future[Any]", value: object = None, error: Exception | None = None) -> None:
    """Fulfil a future, unless it is done: the daemon may have gone meanwhile, or whoever waited."""
    if answer.done():
        return
    if error is None:
        answer.set_result(value)
    else:
        answer.set_exception(error)
