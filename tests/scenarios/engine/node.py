"""A node: its agent and its workers, on a simulated host. The code that runs in them is the real one."""

from collections.abc import Callable
from typing import Any

from orchestrator.errors import HypervisorError, HypervisorUnavailable
from orchestrator.queues import STARTS_PER_NODE, Task, lifecycle_queue, migrate_queue
from orchestrator.settings import settings
from orchestrator.store.node_store import NodeStore
from tests.scenarios.engine.heartbeat import PeerNetwork, SimulatedHeartbeat, Tells, Watchdog
from tests.scenarios.engine.mail import Handlers, serve
from tests.scenarios.engine.processes import Processes
from tests.scenarios.engine.redis_time import SimulatedRedis
from tests.scenarios.engine.schedule import Killed, Process, Schedule
from workers.adoption import run_adoption
from workers.agent import Agent
from workers.hypervisor.port import Domain, DomainEvent
from workers.hypervisor.simulated import SimulatedHypervisor
from workers.hypervisor.simulated_faults import Faults
from workers.hypervisor.simulated_world import World
from workers.lifecycle import run_repair, run_start, run_stop
from workers.migration import run_migration
from workers.shutdown import begin as begin_shutdown
from workers.shutdown import end as end_shutdown

SERVICES = ("heartbeat", "agent", "migrate", "lifecycle")
_YOUNG_GRANTS = 3
"""As in `workers.holder`."""

Called = Callable[[str, str, tuple[Any, ...]], None]


class ProcessLink:
    """One process's way to its host's daemon; see `workers.hypervisor.simulated.Link`.

    Args:
        world: Where the host is.
        host: Its name.
        process: Whose it is.
        processes: May kill it before or after a call.
        called: Told of each call: host, method, arguments.
    """

    def __init__(self, world: World, host: str, process: Process, processes: Processes, called: Called) -> None:
        self._world, self._host, self._process = world, host, process
        self._processes, self._called = processes, called
        self._is_closed = False

    def ask(self, method: str, *arguments: Any) -> Any:
        """Ask the host's daemon, and wait in simulated time."""
        self._processes.check("before", method)
        self._processes.schedule.point()
        self._called(self._host, method, arguments)
        answer = self._world.call(self._host, method, *arguments)
        self._processes.schedule.wait(answer.done)
        self._processes.check("after", method)
        return answer.result(0)

    def watch(self, callback: Callable[[DomainEvent], None]) -> None:
        """Tell of events, from a thread of the process."""
        schedule = self._processes.schedule
        subscription = self._world.subscribe(self._host, lambda: None)

        def tell() -> None:
            try:
                while not self._is_closed:
                    schedule.wait(lambda: bool(subscription.events) or self._is_closed)
                    for event in subscription.take():
                        callback(event)
            finally:
                self._world.unsubscribe(subscription)

        schedule.spawn(self._process, "events", tell)

    def close(self) -> None:
        """Tell nothing any more."""
        self._is_closed = True


class Node:
    """One node of the herd.

    Args:
        name: Its own, and its host's.
        world: Where its host is.
        client: Of Redis, with the node's rights.
        processes: Where its own are added.
        called: See `ProcessLink`.
        network: To its peers.
        has_watchdog: Its host has one.
        tell: Told what its heartbeat would log.
    """

    def __init__(
        self,
        name: str,
        world: World,
        client: SimulatedRedis,
        processes: Processes,
        called: Called,
        network: PeerNetwork,
        *,
        has_watchdog: bool,
        tell: Tells,
    ) -> None:
        self.name = name
        self._world = world
        self._client = client
        self._processes = processes
        self._schedule: Schedule = processes.schedule
        self._called = called
        self._network = network
        self._tell = tell
        self.watchdog = Watchdog(processes.schedule, self._be_reset) if has_watchdog else None
        processes.add(f"heartbeat@{name}", self._start_heartbeat)
        processes.add(f"agent@{name}", self._start_agent)
        processes.add(f"migrate@{name}", self._start_worker("migrate", migrate_queue(name), 1))
        processes.add(f"lifecycle@{name}", self._start_worker("lifecycle", lifecycle_queue(name), STARTS_PER_NODE))
        processes.add_command(f"shutdown@{name}", self._shut_down)
        processes.add_command(f"boot@{name}", lambda: end_shutdown(NodeStore(client, name)))
        processes.start(f"boot@{name}")

    def power_off(self) -> None:
        """Cut its power: the host, and all that ran there."""
        if self.watchdog is not None:
            self.watchdog.disarm()
        Faults(self._world).power_off(self.name)
        for name in self._processes.names(self.name):
            self._processes.kill(name, restart_after_s=None)

    def _be_reset(self) -> None:
        self._tell(f"host/{self.name}", "is reset by its watchdog")
        self.power_off()

    def power_on(self) -> None:
        """Boot it again."""
        Faults(self._world).power_on(self.name)
        for role in (*SERVICES, "boot"):
            self._processes.start(f"{role}@{self.name}")

    def shut_down(self) -> None:
        """Shut it down in an orderly way, as systemd does: the unit `vmherd-guests` first, then the power goes."""
        self._processes.start(f"shutdown@{self.name}")

    def _shut_down(self) -> None:
        process = self._processes.find(f"shutdown@{self.name}")
        assert process is not None
        begin_shutdown(NodeStore(self._client, self.name), self._hypervisor(process), settings())
        self._schedule.at(self._schedule.now, self.power_off)

    def kill_holder(self, role: str, claimed_by: str) -> None:
        """As `workers.holder.kill`."""
        name = f"{role}@{self.name}"
        process = self._processes.find(name)
        if process is None:
            return
        is_young = self._schedule.now - process.began_at < _YOUNG_GRANTS * settings().grant_ttl
        if claimed_by != process.holder and (claimed_by or is_young):
            return
        self._processes.kill(name)

    def _hypervisor(self, process: Process) -> SimulatedHypervisor:
        link = ProcessLink(self._world, self.name, process, self._processes, self._called)
        return SimulatedHypervisor(link, self.name)

    def _start_heartbeat(self, process: Process) -> None:
        def run() -> None:
            SimulatedHeartbeat(
                process,
                NodeStore(self._client, self.name),
                self._processes,
                self._network,
                self.watchdog,
                self._world.host(self.name).boot_id(),
                self._tell,
            ).run()

        self._schedule.spawn(process, "main", run)

    def _look(self, process: Process, host: str) -> list[Domain]:
        """Look at another host, as far as the network goes."""
        if {host, self.name} & self._network.cut:
            raise HypervisorUnavailable(f"host {host} is not reached")
        return SimulatedHypervisor(
            ProcessLink(self._world, host, process, self._processes, self._called), host
        ).domains()

    def _start_agent(self, process: Process) -> None:
        def run() -> None:
            agent = Agent(
                NodeStore(self._client, self.name),
                self._hypervisor(process),
                f"simulated://{self.name}",
                kill=self.kill_holder,
                look=lambda uri: self._look(process, uri.rpartition("/")[2]),
                boot_id=self._world.host(self.name).boot_id(),
            )
            try:
                agent.run()
            except HypervisorError:  # it ends, and is started again
                self._processes.kill(process.name)
            raise Killed

        self._schedule.spawn(process, "main", run)

    def _start_worker(self, role: str, queue: str, threads: int) -> Callable[[Process], None]:
        def start(process: Process) -> None:
            store, hypervisor = NodeStore(self._client, self.name), self._hypervisor(process)

            def grants(run: Callable[[NodeStore, SimulatedHypervisor, str, str, int], str]) -> Callable[..., str]:
                return lambda _vm, operation, epoch: run(store, hypervisor, process.holder, operation, epoch)

            handlers: Handlers = {
                Task.NODE_MIGRATE: grants(run_migration),
                Task.NODE_START: grants(run_start),
                Task.NODE_STOP: grants(run_stop),
                Task.NODE_SETTLE: lambda _vm, order, _kind: run_repair(store, hypervisor, order),
                Task.NODE_ADOPT: lambda _vm, order, _kind: run_adoption(store, hypervisor, order),
            }
            for number in range(threads):
                name = f"{role} {number}"
                self._schedule.spawn(process, name, lambda: serve(self._client, self._schedule, queue, handlers))

        return start
