"""The world of simulated hosts: everything that is true of them, and every fault that may befall them.

No thread, no socket, and no time of its own: the clock is handed in, and whoever holds the world brings it up to date.
What happens by itself (a migration's end, a guest's poweroff) has happened after the next look that falls behind its
moment; `next_at` says which moment that is. So one world serves processes that live in real time
(`workers.simulation`) and tests that jump from event to event.

A call of the port is asked with `call`, which never blocks and never raises: it gives a future. What blocks in libvirt
(a migration, the destruction of a QEMU that hangs) is a future that is not done yet.

There are no image locks: a machine that is started twice runs twice, so that a test can see it.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any, Final

from orchestrator.errors import HypervisorError, HypervisorUnavailable, VmherdError
from workers.hypervisor.port import MigrationRequest, MigrationResult
from workers.hypervisor.simulated_definitions import define, mark, preflight, read_definition, undefine
from workers.hypervisor.simulated_host import SimulatedHost, settle
from workers.hypervisor.simulated_machine import Machine
from workers.hypervisor.simulated_migration import Migration, begin_migration, on_migration
from workers.hypervisor.simulated_spec import (
    Daemon,
    Failure,
    HostSpec,
    Subscription,
    broken_off,
    due_failure,
    unanswered,
)
from workers.hypervisor.simulated_time import Timeline

OPEN_TIMEOUT_S: Final = 5.0
"""The libvirt driver's, for a connection to a daemon that hangs."""
_PLAIN: Final = frozenset(
    {"host", "domains", "domain", "job", "completed_job", "addresses", "dirty_rate", "start", "destroy", "shutdown"}
    | {"resume", "boot_id", "use"}
)
"""Methods of the port that are methods of `SimulatedHost`."""


class World:
    """Simulated hosts.

    Args:
        clock: Monotonic, in seconds.
        speed_up: Simulated seconds that pass in one of the clock's.
        hosts: What there is; `add_host` adds more.

    Attributes:
        hosts: By name.
        timeline: In which they live.
        fail_migrations: Coming migrations that fail, by UUID, domain name, `project/name` or source host.
        lost_replies: How often the answer of a call will be lost, by host and method.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, speed_up: float = 1.0, hosts: Iterable[HostSpec] = ()
    ) -> None:
        self.hosts: dict[str, SimulatedHost] = {}
        self.timeline = Timeline(clock, speed_up)
        self._peers: dict[str, SimulatedHost] = {}
        self._open: dict[Future[Any], tuple[SimulatedHost, str]] = {}
        self.fail_migrations: dict[str, Failure] = {}
        self.lost_replies: Counter[tuple[str, str]] = Counter()
        for spec in hosts:
            self.add_host(spec)

    def add_host(self, spec: HostSpec) -> SimulatedHost:
        """Add a host, which has power and nothing on it."""
        host = SimulatedHost(spec, self.timeline)
        self.hosts[spec.name] = self._peers[host.uri] = host
        return host

    # --- time -----------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Simulated seconds since the beginning, at the last look."""
        return self.timeline.now

    def advance(self) -> None:
        """Let everything happen that has fallen due."""
        self.timeline.advance()

    def next_at(self) -> float | None:
        """By the clock, when the next thing happens by itself; None if nothing will."""
        return self.timeline.next_at()

    # --- what drivers ask -----------------------------------------------------------------------------------------

    def call(self, name: str, method: str, *arguments: Any) -> "Future[Any]":
        """Ask a host's daemon something.

        Args:
            name: The host's.
            method: Of the port, except `watch` and `close`.
            arguments: Its arguments, keywords in the port's order.

        Returns:
            The answer, or the error that the port's method raises, when the call has ended.
        """
        self.advance()
        answer: Future[Any] = Future()
        host = self.hosts.get(name)
        if host is None:
            answer.set_exception(HypervisorUnavailable(f"there is no simulated host {name!r}"))
            return answer
        self._open[answer] = (host, method)
        answer.add_done_callback(lambda done: self._open.pop(done, None))
        carry_out = partial(self._carry_out, host, method, arguments, answer)
        if host.delay_s:
            self.timeline.after(host.delay_s, carry_out)
        else:
            carry_out()
        return answer

    def _carry_out(self, host: SimulatedHost, method: str, arguments: tuple[Any, ...], answer: "Future[Any]") -> None:
        if answer.done():
            return  # its daemon died meanwhile
        match host.daemon:
            case Daemon.DEAD | Daemon.NO_POWER:
                self._refuse(host, method, answer, "does not answer: Connection refused")
                return
            case Daemon.HANGS:
                why = f"did not answer within {OPEN_TIMEOUT_S:g} s"

                def look_again() -> None:
                    if host.daemon is Daemon.ANSWERS:
                        self._carry_out(host, method, arguments, answer)
                    else:
                        self._refuse(host, method, answer, why)

                self.timeline.after(OPEN_TIMEOUT_S, look_again)
                return
            case Daemon.ANSWERS:
                pass
        try:
            given = self._ask(host, method, arguments)
        except VmherdError as error:
            settle(answer, error=error)
            return
        if self.lost_replies[host.name, method] > 0:
            self.lost_replies[host.name, method] -= 1
            self._lose(host, method, answer)
        elif isinstance(given, Future):
            given.add_done_callback(partial(_pass_on, answer))
        else:
            settle(answer, given)

    def _ask(self, host: SimulatedHost, method: str, arguments: tuple[Any, ...]) -> Any:
        match method, arguments:
            case "migrate", (request,):
                return self._migrate(host, request)
            case "abort", (uuid,):
                return on_migration(host, uuid, "abort of the migration", Migration.abort)
            case "start_post_copy", (uuid,):
                return on_migration(host, uuid, "switch to post-copy", Migration.start_post_copy)
            case "preflight", (domain_xml, copied_disks):
                return preflight(host, domain_xml, tuple(copied_disks))
            case "definition", (uuid, secrets):
                return read_definition(host, uuid, secrets=secrets)
            case "mark", (uuid, marker):
                return mark(host, uuid, marker)
            case "unmark", (uuid,):
                return mark(host, uuid, None)
            case "define", (domain_xml, autostart):
                return define(host, domain_xml, autostart=autostart)
            case "undefine", (uuid,):
                return undefine(host, uuid)
            case _ if method in _PLAIN:
                return getattr(host, method)(*arguments)
            case _:
                raise HypervisorError(f"a simulated host can't be asked to {method!r}{arguments}")

    def _migrate(self, host: SimulatedHost, request: MigrationRequest) -> "Future[MigrationResult]":
        machine = host.machines.get(request.uuid)
        keys = () if machine is None else (*sorted(machine.keys), host.name)
        failure = due_failure(self.fail_migrations, keys)
        return begin_migration(host, self._peers, request, failure)

    def _refuse(self, host: SimulatedHost, method: str, answer: "Future[Any]", why: str) -> None:
        _give(answer, unanswered(method, f"simulated host {host.name} {why}"))

    def lose_calls(self, host: SimulatedHost) -> None:
        """Break all connections to a host's daemon."""
        for answer, (asked, method) in list(self._open.items()):
            if asked is host:
                self._lose(host, method, answer)

    def _lose(self, host: SimulatedHost, method: str, answer: "Future[Any]") -> None:
        """Answer a call that is under way, or done, as it is answered when its connection breaks."""
        _give(answer, broken_off(method, f"the connection to simulated host {host.name} broke during {method}"))

    def subscribe(self, name: str, wake: Callable[[], None]) -> Subscription:
        """Watch a host; `unsubscribe` ends that.

        Args:
            name: The host's.
            wake: Called for each event; must not call the world.

        Raises:
            HypervisorUnavailable: Its daemon does not answer now.
        """
        self.advance()
        host = self.hosts.get(name)
        if host is None or host.daemon is not Daemon.ANSWERS:
            raise HypervisorUnavailable(f"simulated host {name} does not answer")
        subscription = Subscription(name, wake)
        host.subscriptions.append(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Watch no more. Idempotent."""
        watchers = self.hosts[subscription.host].subscriptions
        if subscription in watchers:
            watchers.remove(subscription)

    # --- what is true, whatever daemons say -----------------------------------------------------------------------

    def find(self, key: str) -> Machine:
        """Give the copy of a machine in which its guest runs; any copy, if it runs in none.

        Args:
            key: A UUID, a domain's name, or `project/name`.

        Raises:
            HypervisorError: No host has it.
        """
        self.advance()
        found = [m for host in self.hosts.values() for m in host.machines.values() if key in m.keys]
        if not found:
            raise HypervisorError(f"no simulated host has a VM {key!r}")
        return max(found, key=lambda machine: machine.guest is not None and machine.guest.machine is machine)

    def executing(self, uuid: str) -> list[str]:
        """Name the hosts on which a machine's CPUs run, sorted: two are one too many."""
        self.advance()
        return sorted(n for n, h in self.hosts.items() if uuid in h.machines and h.machines[uuid].executes)

    def host(self, name: str) -> SimulatedHost:
        """Give a host.

        Raises:
            HypervisorError: There is none of that name.
        """
        self.advance()
        host = self.hosts.get(name)
        if host is None:
            raise HypervisorError(f"there is no simulated host {name!r}: {', '.join(sorted(self.hosts))}")
        return host


def _give(answer: "Future[Any]", outcome: MigrationResult | Exception) -> None:
    if isinstance(outcome, Exception):
        settle(answer, error=outcome)
    else:
        settle(answer, outcome)


def _pass_on(answer: "Future[Any]", given: "Future[Any]") -> None:
    error = given.exception()
    if error is None:
        settle(answer, given.result())
    elif isinstance(error, Exception):
        settle(answer, error=error)
