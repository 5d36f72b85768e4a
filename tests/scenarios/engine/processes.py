"""The processes of a herd: killed, frozen, cut off from Redis, and started again, as a scenario's script says.

Killing takes effect between two effects of a process: a command to Redis, or a call of a hypervisor. `Trap` names such
a point: `kill migrate@n1 after claim`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import redis

from tests.scenarios.engine.schedule import Killed, Process, Schedule

RESTART_AFTER_S = 1.0
"""As long as systemd waits before it starts what has died."""


@dataclass
class Trap:
    """What is to happen to a process at one point of its work, once.

    Attributes:
        process: Its name.
        moment: `before` or `after`.
        point: A command to Redis (scripts by their names: `claim`, `commit`, `report`), or a hypervisor's method.
        spring: What is done then.
    """

    process: str
    moment: str
    point: str
    spring: Callable[[], None]


class Processes:
    """All processes of the herd, by name.

    Args:
        schedule: That runs them.
        tell: Told what becomes of them.
    """

    def __init__(self, schedule: Schedule, tell: Callable[[str, str], None]) -> None:
        self.schedule = schedule
        self.traps: list[Trap] = []
        self.cut: set[str] = set()
        self._tell = tell
        self._starts: dict[str, Callable[[Process], None]] = {}
        self._alive: dict[str, Process] = {}
        self._numbers = 0

    def add(self, name: str, start: Callable[[Process], None]) -> None:
        """Add one, and start it; `start` spawns its threads."""
        self._starts[name] = start
        self.start(name)

    def add_command(self, name: str, run: Callable[[], None]) -> None:
        """Add one that does something and ends; each `start` runs it once."""

        def start(process: Process) -> None:
            def once() -> None:
                run()
                self._alive.pop(name, None)

            self.schedule.spawn(process, "main", once)

        self._starts[name] = start

    def start(self, name: str) -> None:
        """Start one that does not run."""
        if name in self._alive:
            return
        self._numbers += 1
        process = Process(name, self._numbers)
        process.began_at = self.schedule.now
        self._alive[name] = process
        self._starts[name](process)

    def kill(self, name: str, *, restart_after_s: float | None = RESTART_AFTER_S) -> None:
        """Kill one that runs. It is started again, unless that is None.

        Raises:
            Killed: It is the one that calls.
        """
        process = self._alive.pop(self.known(name), None)
        if process is None:
            return
        self._tell("process", f"{name} is killed")
        process.is_alive = process.is_frozen = False
        if restart_after_s is not None:
            self.schedule.at(self.schedule.now + restart_after_s, lambda: self._restart(name))
        if self.schedule.current is not None and self.schedule.current.process is process:
            raise Killed

    def _restart(self, name: str) -> None:
        if name not in self._alive:
            self._tell("process", f"{name} is started")
            self.start(name)

    def freeze(self, name: str, *, frozen: bool) -> None:
        """Stop one as SIGSTOP does, or let it go on."""
        process = self._alive.get(self.known(name))
        if process is not None:
            process.is_frozen = frozen
            self._tell("process", f"{name} " + ("stands still" if frozen else "goes on"))

    def find(self, name: str) -> Process | None:
        """Give one that runs."""
        return self._alive.get(name)

    def names(self, node: str | None = None) -> list[str]:
        """Name all, or those of a node."""
        return [name for name in self._starts if node is None or name.endswith(f"@{node}")]

    def known(self, name: str) -> str:
        """Check that there is a process of that name.

        Raises:
            ValueError: A script named another.
        """
        if name not in self._starts:
            raise ValueError(f"no process {name!r}: there are {', '.join(self._starts)}")
        return name

    def check(self, moment: str, point: str) -> None:
        """Stand before or after an effect of the process that runs now: where it dies, or finds that Redis is gone.

        Raises:
            Killed: It was killed.
        """
        strand = self.schedule.current
        if strand is None:
            return
        if not strand.process.is_alive:
            raise Killed
        for trap in self.traps:
            if (trap.process, trap.moment, trap.point) == (strand.process.name, moment, point):
                self.traps.remove(trap)
                trap.spring()
                return

    def reach_redis(self, command: str) -> None:
        """Stand before a command to Redis.

        Raises:
            redis.exceptions.ConnectionError: The node, or the process, is cut off.
        """
        self.check("before", command)
        strand = self.schedule.current
        if strand is not None and self.cut & {strand.process.name, strand.process.node}:
            raise redis.exceptions.ConnectionError("cut off (scenario)")
