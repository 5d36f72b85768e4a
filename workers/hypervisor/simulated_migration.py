"""One simulated live migration: its course, and what becomes of it when something on either side goes away.

As measured on libvirt (`libvirt.md`, sections 1, 2, 4, 5 and 6). The commit point is the moment at which the target
runs: before it every failure leaves the guest on the source, after it on the target. The call's answer is another
matter, and is lost with the source's daemon.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from enum import StrEnum
from typing import Final

from workers.hypervisor.domain_needs import needs_of
from workers.hypervisor.port import DomainState, EventKind, Job, MigrationEnd, MigrationRequest, MigrationResult
from workers.hypervisor.simulated_cpu import cpu_problems
from workers.hypervisor.simulated_host import SimulatedHost, answered, settle
from workers.hypervisor.simulated_machine import Machine
from workers.hypervisor.simulated_precopy import SWITCH_OVER_S, Link, Load, Pass, first_pass, next_pass
from workers.hypervisor.simulated_spec import Daemon
from workers.hypervisor.simulated_time import Timer

_MIB: Final = 2**20
_PAGES_PER_MIB: Final = 256
_ABORT_S: Final = 0.05
_FINISH_S: Final = 1.2
"""From the target's running to the end of the source's process, and with it the call's end."""
_KEEPALIVE_S: Final = 27.0
"""Until either side notices that the other's host is gone (libvirt.md, section 3)."""
_CLEANED_S: Final = 1.0
"""Until the target throws away what came from a source whose daemon died."""


class Phase(StrEnum):
    """How far a migration is."""

    COPYING = "copying"
    """Disks, then memory, in passes; the guest runs on the source."""
    SWITCHING = "switching"
    """The guest stands still, and the rest is sent."""
    POST_COPY = "post-copy"
    """The guest runs on the target, and its memory follows."""
    FINISHING = "finishing"
    """The guest runs on the target; the source's process is yet to be ended."""
    ENDED = "ended"


def begin_migration(
    source: SimulatedHost, peers: Mapping[str, SimulatedHost], request: MigrationRequest, failure: str
) -> "Future[MigrationResult]":
    """Begin a migration, or refuse it.

    Args:
        source: The host that is asked.
        peers: All hosts, by the URIs under which others reach them.
        request: What is asked.
        failure: Why it fails on its way; empty if it does not.
    """
    machine, target = source.machines.get(request.uuid), peers.get(request.target_uri)
    refusal = _refusal(source, machine, target, request)
    if refusal or machine is None or target is None:
        return answered(MigrationResult(MigrationEnd.NOT_STARTED, refusal))
    problem = _arrival_problem(target, machine, request)
    if problem:
        return answered(MigrationResult(MigrationEnd.FAILED, problem))
    answer: Future[MigrationResult] = Future()
    Migration(source, target, machine, request, answer).begin(failure)
    return answer


def _refusal(
    source: SimulatedHost, machine: Machine | None, target: SimulatedHost | None, request: MigrationRequest
) -> str:
    if request.bandwidth_mib_s < 1:
        return "a migration needs a bandwidth of at least 1 MiB/s"
    if machine is None:
        return f"Domain not found: no domain with matching uuid '{request.uuid}'"
    if machine.state not in (DomainState.RUNNING, DomainState.PAUSED):
        return "Requested operation is not valid: domain is not running"
    if machine.has_job:
        return "Requested operation is not valid: another migration job is already running for the domain"
    if target is None or target.daemon is not Daemon.ANSWERS:
        return f"unable to connect to server at '{request.target_uri}': No route to host"
    if target is source:
        return "attempt to migrate guest to the same host"
    if bound := needs_of(machine.xml).problems:
        return f"Requested operation is not valid: {bound[0]}"
    unknown = [disk for disk in request.copy_disks if disk not in machine.description.disks]
    return f"invalid argument: disk target {unknown[0]} not found" if unknown else ""


def _arrival_problem(target: SimulatedHost, machine: Machine, request: MigrationRequest) -> str:
    if (there := target.machines.get(request.uuid)) is not None and there.is_active:
        return f"operation failed: domain '{there.description.name}' already exists with uuid {request.uuid}"
    needs, spec = needs_of(machine.xml), target.spec
    problems = cpu_problems(spec.cpu_model, needs) + target.lacks(machine.description, request.copy_disks)
    for problem in problems:
        return f"internal error: {problem}"
    for bridge in needs.bridges:
        if spec.bridges is not None and bridge not in spec.bridges:
            return f"Cannot get interface MTU on '{bridge}': No such device"
    for network in needs.networks:
        if spec.networks is not None and network not in spec.networks:
            return f"Network not found: no network with matching name '{network}'"
    return ""


class Migration:
    """One migration that has begun; see `workers.hypervisor.simulated_machine.Move`."""

    def __init__(
        self,
        source: SimulatedHost,
        target: SimulatedHost,
        machine: Machine,
        request: MigrationRequest,
        answer: "Future[MigrationResult]",
    ) -> None:
        self.source, self.target = source, target
        self.machine = machine
        self.request = request
        self.answer = answer
        self.phase = Phase.COPYING
        self.arriving = Machine(
            target, machine.xml, machine.description, DomainState.INCOMING, "migration", migration=self
        )
        self._timeline = source.timeline
        self._link = Link(request.bandwidth_mib_s, request.auto_converge)
        self._disks_mib = machine.description.behaviour.disk_mib * len(request.copy_disks)
        self._load = machine.description.load
        self._was_paused = machine.state is DomainState.PAUSED
        if self._was_paused:
            self._load = Load(self._load.used_mib, 0, 0)
        self._pass = Pass(number=0, mib=self._disks_mib) if self._disks_mib else first_pass(self._load)
        self._began_at = self._pass_began_at = self._timeline.now
        self._downtime_s = 0.0
        self._stalls = 0
        self._is_cut = False
        self._stalled_at = 0.0
        self._timer: Timer | None = None

    def begin(self, failure: str) -> None:
        """Begin it."""
        self.machine.migration = self
        self.target.machines[self.request.uuid] = self.arriving
        self.target.tell(EventKind.STARTED, self.arriving, "migrated")
        if failure:
            half = self._pass.seconds(self._link) / 2
            self._timer = self._timeline.after(half, lambda: self._fail(MigrationEnd.FAILED, failure))
        else:
            self._set_timer()
        if self.machine.is_frozen:
            self.stall()

    # --- its course -------------------------------------------------------------------------------------------------

    def figures(self, machine: Machine) -> Job:
        """Give its figures as one side sees them."""
        if machine is self.arriving:
            return Job(outgoing=False)
        sent = self._pass.sent_mib(self._link, self._pass_elapsed_s())
        memory = self.machine.description.memory_mib
        return Job(
            outgoing=True,
            elapsed_ms=round((self._timeline.now - self._began_at) * 1000),
            total_bytes=round((memory + self._disks_mib) * _MIB),
            processed_bytes=round((self._pass.sent_before_mib + sent) * _MIB),
            remaining_bytes=round((self._pass.mib - sent) * _MIB),
            memory_bps=0 if self._stalls else round(self._link.mib_s * _MIB),
            dirty_pages_per_s=round(self._pass.dirtied_before_mib_s * _PAGES_PER_MIB),
            iteration=self._pass.number,
            throttle_percent=self._pass.throttle_percent,
        )

    def _pass_elapsed_s(self) -> float:
        return (self._stalled_at if self._stalls else self._timeline.now) - self._pass_began_at

    def _set_timer(self) -> None:
        left_s = self._pass.seconds(self._link) - self._pass_elapsed_s()
        self._timer = self._timeline.after(left_s, self._pass_done)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin_pass(self, following: Pass) -> None:
        self._pass = following
        self._pass_began_at = self._timeline.now
        self._set_timer()

    def _pass_done(self) -> None:
        match self.phase:
            case Phase.COPYING:
                done = self._pass
                if done.number == 0:
                    self.target.files.update(self.machine.description.disks[d] for d in self.request.copy_disks)
                    self._begin_pass(replace(first_pass(self._load), sent_before_mib=done.mib))
                    return
                following = next_pass(done, self._load, self._link)
                if following.is_last:
                    self._stop_guest()
                    self._downtime_s = following.seconds(self._link)
                self._begin_pass(following)
            case Phase.SWITCHING | Phase.POST_COPY:
                self._arrive()
            case Phase.FINISHING | Phase.ENDED:
                pass

    def _stop_guest(self) -> None:
        self.phase = Phase.SWITCHING
        self.machine.become(DomainState.PAUSED_MIGRATED, "migration")
        self.source.tell(EventKind.SUSPENDED, self.machine, "migrated")

    def _arrive(self) -> None:
        self._hand_over()
        was_post_copy = self.phase is Phase.POST_COPY  # of one that ended so libvirt keeps no figures
        self.phase = Phase.FINISHING
        seconds = self._timeline.now - self._began_at
        self.arriving.migration = None
        self.arriving.completed = (
            {}
            if was_post_copy
            else {
                "downtime_ms": round(self._downtime_s * 1000),
                "elapsed_ms": round(seconds * 1000),
                "total_bytes": round((self.machine.description.memory_mib + self._disks_mib) * _MIB),
                "processed_bytes": round((self._pass.sent_before_mib + self._pass.mib) * _MIB),
            }
        )
        if self._was_paused:
            self.arriving.become(DomainState.PAUSED, "user")
            self.target.tell(EventKind.SUSPENDED, self.arriving, "paused")
        else:
            self.arriving.become(DomainState.RUNNING, "migrated")
            self.target.tell(EventKind.RESUMED, self.arriving, "migrated")
        self._timer = self._timeline.after(_FINISH_S, self._leave)

    def _hand_over(self) -> None:
        """Let the guest belong to the target; the source keeps older memory of it."""
        guest = self.machine.guest
        if guest is not None and guest.machine is self.machine:
            guest.machine = self.arriving
            self.arriving.guest = guest

    def _leave(self) -> None:
        self.phase = Phase.ENDED
        self.machine.migration = None
        self.machine.inactive_xml, self.machine.autostart = "", False  # it leaves no definition
        self.source.end(self.machine, "migrated")
        self.source.tell(EventKind.CHANGED, self.machine, "job-completed")
        self._answer(MigrationEnd.SUCCEEDED)

    # --- what is asked of it ----------------------------------------------------------------------------------------

    def abort(self) -> bool:
        """Ask that it be aborted; see `Hypervisor.abort`."""
        match self.phase:
            case Phase.COPYING | Phase.SWITCHING:
                if not self._is_cut:  # else it ends when the loss of the target is noticed
                    self._stop_timer()
                    words = "operation aborted: migration out job: canceled by client"
                    self._timer = self._timeline.after(_ABORT_S, lambda: self._fail(MigrationEnd.ABORTED, words))
                return True
            case Phase.FINISHING:
                return True  # accepted, and too late
            case Phase.POST_COPY | Phase.ENDED:
                return False

    def start_post_copy(self) -> bool:
        """Switch to post-copy; see `Hypervisor.start_post_copy`."""
        if self.phase is not Phase.COPYING or not self.request.post_copy or self._pass.number == 0 or self._was_paused:
            return False
        elapsed_s = self._pass_elapsed_s()
        sent_mib = self._pass.sent_mib(self._link, elapsed_s)
        left_mib = self._pass.mib - sent_mib + self._load.dirtied_mib(elapsed_s, self._pass.throttle_percent)
        self._stop_timer()
        self.phase = Phase.POST_COPY
        self.machine.become(DomainState.POSTCOPY, "postcopy")
        self.source.tell(EventKind.SUSPENDED, self.machine, "postcopy")
        self._hand_over()
        self.arriving.become(DomainState.POSTCOPY, "postcopy")
        self.target.tell(EventKind.RESUMED, self.arriving, "postcopy")
        self._downtime_s = SWITCH_OVER_S
        self._begin_pass(
            Pass(
                number=self._pass.number,
                mib=min(left_mib, self._load.used_mib),
                sent_before_mib=self._pass.sent_before_mib + sent_mib,
                dirtied_before_mib_s=self._pass.dirtied_before_mib_s,
                throttle_percent=0,
            )
        )
        return True

    # --- what goes wrong --------------------------------------------------------------------------------------------

    def stall(self) -> None:
        """Stand still: a process of it hangs, or the target's host is gone."""
        self._stalls += 1
        if self._stalls == 1 and self.phase is not Phase.FINISHING:
            self._stalled_at = self._timeline.now
            self._stop_timer()

    def go_on(self) -> None:
        """Undo one `stall`."""
        self._stalls -= 1
        if self._stalls == 0 and self.phase in (Phase.COPYING, Phase.SWITCHING, Phase.POST_COPY):
            self._pass_began_at += self._timeline.now - self._stalled_at
            self._set_timer()

    def process_gone(self, machine: Machine) -> None:
        """One side's process is gone."""
        if self.phase is Phase.POST_COPY:
            self._break_post_copy(
                MigrationEnd.FAILED, "operation failed: job 'migration out' failed in post-copy phase"
            )
        elif self.phase is Phase.FINISHING:
            self._end(MigrationEnd.SUCCEEDED)
        elif machine is self.machine:
            self._fail(MigrationEnd.FAILED, "operation failed: domain is not running")
        else:
            self._fail(MigrationEnd.FAILED, "operation failed: job 'migration out' unexpectedly failed")

    def daemon_gone(self, machine: Machine) -> None:
        """One side's daemon died; processes run on."""
        words = "internal error: client socket is closed"
        if machine is self.machine:
            words = "End of file while reading data: Input/output error"
        match self.phase:
            case Phase.POST_COPY:  # the two processes bring it to an end without them
                self._answer(MigrationEnd.UNKNOWN, words)
            case Phase.FINISHING:  # nobody ends the source's process
                self._end(MigrationEnd.UNKNOWN, words)
            case Phase.COPYING | Phase.SWITCHING if machine is self.machine:
                machine.resumes_with_daemon = self.phase is Phase.SWITCHING
                self._end(MigrationEnd.UNKNOWN, words)
                self._timeline.after(_CLEANED_S, self._discard_arriving)
            case Phase.COPYING | Phase.SWITCHING:
                self._fail(MigrationEnd.UNKNOWN, words, keep_arriving=True)
                self.arriving.is_half_made = True
            case Phase.ENDED:
                pass

    def power_gone(self, machine: Machine) -> None:
        """One side's host has no power any more, and its machines are gone."""
        words = "internal error: connection closed due to keepalive timeout"
        if self.phase is Phase.POST_COPY:
            self._break_post_copy(MigrationEnd.UNKNOWN, words)
        elif machine is self.machine:
            if self.phase is not Phase.FINISHING:
                self._timeline.after(_KEEPALIVE_S, self._discard_arriving)
            self._end(MigrationEnd.UNKNOWN, words)
        elif self.phase is Phase.FINISHING:  # the source succeeds all the same, some time later
            self._stop_timer()
            self._timer = self._timeline.after(_KEEPALIVE_S, self._leave)
        else:
            self.stall()
            self._is_cut = True
            self._timeline.after(_KEEPALIVE_S, lambda: self._fail(MigrationEnd.UNKNOWN, words))

    def _break_post_copy(self, end: MigrationEnd, words: str) -> None:
        self._end(end, words)
        for host, machine in ((self.source, self.machine), (self.target, self.arriving)):
            if host.machines.get(self.request.uuid) is machine and machine.is_active:
                machine.become(DomainState.POSTCOPY_FAILED, "postcopy-failed")
                host.tell(EventKind.SUSPENDED, machine, "postcopy-failed")

    def _fail(self, end: MigrationEnd, words: str, *, keep_arriving: bool = False) -> None:
        """End it with the guest on the source, if that has a process still."""
        if self.phase is Phase.ENDED:
            return
        was_switching = self.phase is Phase.SWITCHING
        self._end(end, words)
        if not keep_arriving:
            self._discard_arriving()
        if was_switching and self.machine.is_active:
            if self._was_paused:
                self.machine.become(DomainState.PAUSED, "user")
            else:
                self.source.go_on(self.machine, "migration-canceled")

    def _discard_arriving(self) -> None:
        self.target.end(self.arriving, "destroyed", by="host")

    def _end(self, end: MigrationEnd, words: str = "") -> None:
        self._stop_timer()
        self.phase = Phase.ENDED
        self.machine.migration = self.arriving.migration = None
        self._answer(end, words)

    def _answer(self, end: MigrationEnd, words: str = "") -> None:
        settle(self.answer, MigrationResult(end, words))


def on_migration(source: SimulatedHost, uuid: str, what: str, ask: Callable[[Migration], bool]) -> "Future[bool]":
    """Ask something of the migration from a host; False where there is none. A process that hangs does it later."""
    machine = source.machines.get(uuid)
    move = machine.migration if machine is not None else None
    if machine is None or not isinstance(move, Migration) or move.machine is not machine:
        return answered(False)
    return source.when_it_answers(machine, what, lambda: ask(move))
