"""Faults: what may befall simulated hosts and machines, and what people do there behind the herd's back.

Machines are named by UUID, domain name or `project/name`; hosts by their names.
"""

from typing import Final

from orchestrator.errors import HypervisorError
from workers.hypervisor.domain_xml import identity_of
from workers.hypervisor.port import DomainEvent, DomainState, EventKind
from workers.hypervisor.simulated_definitions import define
from workers.hypervisor.simulated_host import SimulatedHost
from workers.hypervisor.simulated_machine import Guest, Machine
from workers.hypervisor.simulated_spec import Daemon, Failure
from workers.hypervisor.simulated_world import World

_KEEPALIVE_S: Final = 10.0
"""The libvirt driver's: a connection to a daemon that hangs is given up after that."""
_HALF_MADE_S: Final = 1.0
"""How long a daemon that is back shows what is left of an incoming copy (1 to 3 s, measured)."""
_RESUMES_S: Final = 1.0
"""Until a daemon that is back resumes what was stopped for a switch-over that never came."""


class Faults:
    """Causes faults in a world, and undoes them.

    Raises (every method):
        HypervisorError: There is no such host or machine, or it is not in a state for that.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    # --- hosts ----------------------------------------------------------------------------------------------------

    def power_off(self, host: str) -> None:
        """Cut a host's power: its daemon and its machines are gone at once."""
        self._cut(self._world.host(host))

    def power_on(self, host: str) -> None:
        """Give it power again: what is defined is there, and what has autostart starts. Nothing if it has power."""
        here = self._world.host(host)
        if here.daemon is Daemon.NO_POWER:
            here.daemon = Daemon.ANSWERS
            here.boots += 1
            for machine in list(here.machines.values()):
                if machine.autostart and not machine.is_active:
                    here.run(machine)
            self._found(here)

    def shut_down(self, host: str) -> None:
        """Shut a host down in an orderly way: QEMUs get SIGTERM, then the power goes."""
        here = self._world.host(host)
        for machine in list(here.machines.values()):
            here.end(machine, "shutdown", by="host")
        self._cut(here)

    def kill_daemon(self, host: str) -> None:
        """End a host's daemon at once; machines run on. Nothing if it does not run."""
        here = self._world.host(host)
        if here.daemon not in (Daemon.ANSWERS, Daemon.HANGS):
            return
        here.daemon = Daemon.DEAD
        for machine in list(here.machines.values()):
            if machine.migration is not None:
                machine.migration.daemon_gone(machine)
        self._world.lose_calls(here)
        self._lost(here)

    def start_daemon(self, host: str) -> None:
        """Start it again. Nothing if it runs."""
        here = self._world.host(host)
        if here.daemon is not Daemon.DEAD:
            return
        here.daemon = Daemon.ANSWERS
        for machine in list(here.machines.values()):
            if machine.is_half_made:
                self._world.timeline.after(_HALF_MADE_S, lambda machine=machine: here.end(machine, "failed"))  # type: ignore[misc]
            if machine.resumes_with_daemon:
                machine.resumes_with_daemon = False
                self._world.timeline.after(_RESUMES_S, lambda machine=machine: _resume(here, machine))  # type: ignore[misc]
        self._found(here)

    def freeze_daemon(self, host: str) -> None:
        """Let a host's daemon accept connections and answer nothing."""
        here = self._world.host(host)
        if here.daemon is not Daemon.ANSWERS:
            raise HypervisorError(f"simulated host {host} can't hang: its daemon is {here.daemon}")
        here.daemon = Daemon.HANGS

        def give_up() -> None:
            if here.daemon is Daemon.HANGS:
                self._world.lose_calls(here)
                self._lost(here)

        self._world.timeline.after(_KEEPALIVE_S, give_up)

    def thaw_daemon(self, host: str) -> None:
        """Undo `freeze_daemon`."""
        here = self._world.host(host)
        if here.daemon is Daemon.HANGS:
            here.daemon = Daemon.ANSWERS
            self._found(here)

    def reinstall(self, host: str) -> None:
        """Make a host as new: powered, nothing on it, nothing wrong with it."""
        self.heal(host)
        here = self._world.host(host)
        self._cut(here)
        here.machines.clear()
        here.fail_starts.clear()
        here.files = set(here.spec.files)
        self.power_on(host)

    def add_file(self, host: str, path: str) -> None:
        """Give a host a file of its own."""
        self._world.host(host).files.add(path)

    def slow(self, host: str, seconds: float) -> None:
        """Let each call to a host's daemon take longer by some simulated seconds; 0 undoes it."""
        self._world.host(host).delay_s = max(0.0, seconds)

    def lose_reply(self, host: str, method: str) -> None:
        """Carry out the next call of a port's method, and lose the answer."""
        self._world.lost_replies[self._world.host(host).name, method] += 1

    def _cut(self, here: SimulatedHost) -> None:
        if here.daemon is Daemon.NO_POWER:
            return
        here.daemon = Daemon.NO_POWER
        for machine in list(here.machines.values()):
            move, machine.migration = machine.migration, None
            here.end(machine, "crashed")
            if move is not None:
                move.power_gone(machine)
        self._world.lose_calls(here)
        self._lost(here)

    def _lost(self, here: SimulatedHost) -> None:
        for subscription in here.subscriptions:
            if not subscription.is_lost:
                subscription.is_lost = True
                subscription.tell(DomainEvent(EventKind.LOST))

    def _found(self, here: SimulatedHost) -> None:
        for subscription in here.subscriptions:
            if subscription.is_lost:
                subscription.is_lost = False
                subscription.tell(DomainEvent(EventKind.RESYNC))

    # --- machines -------------------------------------------------------------------------------------------------

    def fail_start(self, vm: str, message: str = "Cannot allocate memory", *, times: int = 0, host: str = "") -> None:
        """Let coming starts fail.

        Args:
            vm: The machine; empty: whichever.
            message: The hypervisor's words.
            times: How often; 0: always.
            host: On which host; empty: on all.
        """
        hosts = [self._world.host(host)] if host else list(self._world.hosts.values())
        failure = Failure(message, times)
        for here in hosts:
            here.fail_starts[vm] = failure

    def fail_migration(
        self, key: str, message: str = "QEMU unexpectedly closed the monitor", *, times: int = 0
    ) -> None:
        """Let coming migrations of a machine, or from a host, fail on their way; `times` as in `fail_start`."""
        self._world.fail_migrations[key] = Failure(f"internal error: {message}", times)

    def heal(self, key: str = "") -> None:
        """Undo what was set by `fail_start`, `fail_migration`, `slow`, `freeze` and `freeze_daemon`.

        Args:
            key: A machine or a host; empty: all.
        """
        for name, here in self._world.hosts.items():
            if key in ("", name):
                here.delay_s = 0.0
                self.thaw_daemon(name)
            for machine in list(here.machines.values()):
                if machine.is_frozen and key in ("", name, *machine.keys):
                    machine.thaw()
            _forget(here.fail_starts, key)
        _forget(self._world.fail_migrations, key)

    def freeze(self, vm: str, host: str = "") -> None:
        """Stop a machine's process, so that its daemon gets no answer from it."""
        self._machine(vm, host).freeze()

    def thaw(self, vm: str, host: str = "") -> None:
        """Undo `freeze`."""
        self._machine(vm, host).thaw()

    def kill(self, vm: str, host: str = "") -> None:
        """End a machine's process at once (SIGKILL)."""
        machine = self._machine(vm, host)
        self._world.host(machine.host.name).kill(machine)

    def terminate(self, vm: str, host: str = "") -> None:
        """Ask a machine's process to end (SIGTERM), as a host's shutdown does."""
        self._end(vm, host, "shutdown")

    def destroy(self, vm: str, host: str = "") -> None:
        """Destroy a machine behind the herd's back, as `virsh destroy` does."""
        self._end(vm, host, "destroyed")

    def pause(self, vm: str, host: str = "") -> None:
        """Pause a machine, as `virsh suspend` does."""
        machine = self._machine(vm, host)
        self._world.host(machine.host.name).pause(machine)

    def guest_poweroff(self, vm: str) -> None:
        """Let the guest power itself off."""
        self._guest(vm).power_off()

    def guest_reboot(self, vm: str) -> None:
        """Let the guest reboot itself."""
        self._guest(vm).reboot()

    def guest_panic(self, vm: str) -> None:
        """Let the guest panic."""
        self._guest(vm).panic()

    def ignore_shutdown(self, vm: str) -> None:
        """Let the guest ignore from now on, until it is started anew, that it is asked to power off."""
        self._guest(vm).ignores_shutdown = True

    def start_persistent(self, host: str, domain_xml: str, *, autostart: bool = True) -> None:
        """Define and start a machine, as a person does with virsh."""
        here = self._world.host(host)
        define(here, domain_xml, autostart=autostart)
        here.run(here.machines[identity_of(domain_xml)])

    def add_snapshot(self, vm: str, host: str = "") -> None:
        """Give a machine a snapshot, as a person may."""
        self._machine(vm, host).snapshots += 1

    def _end(self, vm: str, host: str, detail: str) -> None:
        machine = self._machine(vm, host)
        if not machine.is_active:
            raise HypervisorError(f"VM {vm} does not run")
        machine.is_frozen = False
        self._world.host(machine.host.name).end(machine, detail, by="host")

    def _machine(self, vm: str, host: str) -> Machine:
        if not host:
            return self._world.find(vm)
        found = [m for m in self._world.host(host).machines.values() if vm in m.keys]
        if not found:
            raise HypervisorError(f"simulated host {host} has no VM {vm!r}")
        return found[0]

    def _guest(self, vm: str) -> Guest:
        guest = self._world.find(vm).guest
        if guest is None:
            raise HypervisorError(f"VM {vm} does not run")
        return guest


def _resume(here: SimulatedHost, machine: Machine) -> None:
    if machine.state is DomainState.PAUSED_MIGRATED:
        here.go_on(machine)


def _forget(failures: dict[str, Failure], key: str) -> None:
    if key:
        failures.pop(key, None)
    else:
        failures.clear()
