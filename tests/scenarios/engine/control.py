"""The control plane's processes: beat, control workers, liveness, intake. The services are the real ones."""

from collections.abc import Callable

from orchestrator.errors import Conflict, StoreUnavailable, VersionExpired
from orchestrator.intake import Intake
from orchestrator.queues import CONTROL, FENCING, LIVENESS, TICK_PERIOD_S, Message, Task
from orchestrator.services import capacity, rebalancing
from orchestrator.services.agents import AgentWatch
from orchestrator.services.context import Context
from orchestrator.services.failover import recover_node
from orchestrator.services.fencing import Tools, power_on_again, read_power, read_powers, run_fencing
from orchestrator.services.firmware import keep_firmware
from orchestrator.services.granting import grant_pending
from orchestrator.services.herd import Herd
from orchestrator.services.housekeeping import remove_old_events, remove_old_operations
from orchestrator.services.liveness import Liveness
from orchestrator.services.reconcile import reconcile
from orchestrator.store.follower import Follower
from tests.scenarios.engine.mail import Handlers, serve
from tests.scenarios.engine.processes import Processes
from tests.scenarios.engine.redis_time import SimulatedRedis
from tests.scenarios.engine.schedule import Process, Schedule

_RETRY_S = 0.5
_TICKS = {"reconcile": (Task.RECONCILE, CONTROL), "liveness": (Task.LIVENESS, LIVENESS)}
_TICKS |= {"housekeeping": (Task.HOUSEKEEPING, CONTROL), "rebalance": (Task.REBALANCE, CONTROL)}
_TICKS |= {"capacity": (Task.CAPACITY, CONTROL), "power": (Task.POWER, FENCING)}


class SteppedFollower(Follower):
    """A follower without a thread: it catches up when it is asked to."""

    schedule: Schedule

    def start(self) -> "SteppedFollower":
        """Load everything."""
        self._reload()
        return self

    def sync(self, timeout_s: float = 5.0) -> None:
        """Take in all that was committed before this call."""
        with self.schedule.uninterrupted():
            wanted = self.store.version()
            try:
                while self.version < wanted:
                    for change in self.store.changes(self.version, 1):
                        self._take(change)
            except VersionExpired:
                self._reload()
            if self.version > wanted and self.store.version() < self.version:
                self._reload()  # this Redis lost its last changes


def stepped_herd(ctx: Context, schedule: Schedule) -> Herd:
    """Make a process's copy of the herd."""
    herd = Herd(ctx.store)
    follower = SteppedFollower(ctx.store, herd.follower.kinds, herd.follower.on_change)
    follower.schedule = schedule
    herd.follower = follower
    return herd


class ControlPlane:
    """Starts the processes.

    Args:
        ctx: What the services work with.
        processes: Where they are added.
        client: Of Redis.
        tools: What reaches out of the herd.
    """

    def __init__(self, ctx: Context, processes: Processes, client: SimulatedRedis, tools: Tools) -> None:
        self._ctx = ctx
        self._tools = tools
        self._client = client
        self._schedule = processes.schedule
        for name, run in {
            "beat": self._beat,
            "control": self._control,
            "liveness": self._liveness,
            "intake": self._intake,
            "fencing": self._fencing,
        }.items():
            processes.add(name, self._one_thread(run))

    def _one_thread(self, run: Callable[[], None]) -> Callable[[Process], None]:
        def start(process: Process) -> None:
            self._schedule.spawn(process, "main", run)

        return start

    def _beat(self) -> None:
        number = 0
        while True:
            for name, (task, queue) in _TICKS.items():
                if number % TICK_PERIOD_S[name] == 0:
                    self._ctx.messenger.send(Message(task, queue))
            number += 1
            self._schedule.wait(lambda: False, 1.0)

    def _control(self) -> None:
        herd = self._loaded()

        def housekeeping() -> None:
            remove_old_events(self._ctx)
            remove_old_operations(self._ctx)
            keep_firmware(self._ctx, herd)

        handlers = {
            Task.GRANT: lambda: grant_pending(self._ctx, herd),
            Task.RECONCILE: lambda: reconcile(self._ctx, herd),
            Task.HOUSEKEEPING: housekeeping,
            Task.REBALANCE: lambda: rebalancing.scan(self._ctx, herd),
            Task.CAPACITY: lambda: capacity.watch(self._ctx, herd),
        }
        serve(self._client, self._schedule, CONTROL, handlers)

    def _liveness(self) -> None:
        herd = self._loaded()
        liveness, agents = Liveness(self._ctx, herd), AgentWatch(self._ctx, herd)

        def scan() -> None:
            herd.follower.sync()
            agents.scan()
            liveness.watch(TICK_PERIOD_S["liveness"])

        serve(self._client, self._schedule, LIVENESS, {Task.LIVENESS: scan})

    def _fencing(self) -> None:
        herd = self._loaded()
        handlers: Handlers = {
            Task.FENCE: lambda node: run_fencing(self._ctx, self._tools, node),
            Task.FAILOVER: lambda node: recover_node(self._ctx, herd, node),
            Task.POWER_ON: lambda node: power_on_again(self._ctx, self._tools, node),
            Task.POWER: lambda: read_powers(self._ctx),
            Task.READ_POWER: lambda node: read_power(self._ctx, self._tools, node),
        }
        serve(self._client, self._schedule, FENCING, handlers)

    def _intake(self) -> None:
        intake = Intake(self._ctx)
        while True:
            try:
                intake.round()
            except (StoreUnavailable, Conflict):
                self._schedule.wait(lambda: False, _RETRY_S)

    def _loaded(self) -> Herd:
        herd = stepped_herd(self._ctx, self._schedule)
        while True:
            try:
                return herd.start()
            except StoreUnavailable:
                self._schedule.wait(lambda: False, _RETRY_S)
