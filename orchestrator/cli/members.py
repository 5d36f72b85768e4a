"""The processes of a simulated herd, each kept running by its supervisor: started, and started again when it ends."""

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

_FIRST_DELAY_S: Final = 0.2
_LONGEST_DELAY_S: Final = 10.0
_STEADY_S: Final = 10.0
"""A process that ran for so long is started again without more delay."""
_PR_SET_PDEATHSIG: Final = 1


class Member:
    """One process of the herd.

    Args:
        name: `control-1`, `agent@n1`.
        start: Starts it, has `has_ended` called at its end, and gives its process id.
        node: The node that it belongs to; empty for the control plane's.

    Attributes:
        pid: 0 while it does not run.
        restarts: How often it was started again.
        trouble: Why it could not be started, the last time.
    """

    def __init__(self, name: str, start: "Callable[[Member], Awaitable[int]]", node: str = "") -> None:
        self.name = name
        self.node = node
        self.pid = 0
        self.restarts = 0
        self.trouble = ""
        self._start = start
        self._ended = asyncio.Event()
        self._may_run = asyncio.Event()
        self._may_run.set()

    @property
    def is_held(self) -> bool:
        """Whether it is not to run."""
        return not self._may_run.is_set()

    def hold(self) -> None:
        """Kill it, and start it no more."""
        self._may_run.clear()
        self.kill()

    def release(self) -> None:
        """Undo `hold`."""
        self._may_run.set()

    def kill(self) -> None:
        """End it at once; it is started again unless it is held."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def has_ended(self) -> None:
        """Hear that it has ended."""
        self._ended.set()

    async def wait_for_end(self) -> None:
        """Wait until it has ended; returns at once if it does not run."""
        if self.pid:
            await self._ended.wait()

    async def keep(self) -> None:
        """Start it, and again whenever it ends: later and later if it ends soon."""
        loop = asyncio.get_running_loop()
        delay_s = _FIRST_DELAY_S
        while True:
            await self._may_run.wait()
            began = loop.time()
            self._ended.clear()
            try:
                self.pid = await self._start(self)
                self.trouble = ""
                await self._ended.wait()
            except (OSError, ConnectionError) as error:
                self.trouble = str(error)
            self.pid = 0
            await asyncio.sleep(delay_s)
            delay_s = _FIRST_DELAY_S if loop.time() - began >= _STEADY_S else min(2 * delay_s, _LONGEST_DELAY_S)
            self.restarts += 1


class Launcher:
    """Starts programs that the kernel kills when this process ends.

    Args:
        logs: Folder of their logs.
        environment: Theirs.
        lock: A descriptor that they inherit.
    """

    def __init__(self, logs: Path, environment: Mapping[str, str], lock: int) -> None:
        self._logs = logs
        self._environment = environment
        self._lock = lock
        self._waits: set[asyncio.Future[None]] = set()

    async def start(self, member: Member, *words: str, piped: bool = False) -> asyncio.subprocess.Process:
        """Start a program; its standard input and output are pipes, or nothing and its log."""
        parent, libc = os.getpid(), ctypes.CDLL(None)

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
            if os.getppid() != parent:
                os._exit(1)

        with (self._logs / f"{member.name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *words,
                env=self._environment,
                stdin=asyncio.subprocess.PIPE if piped else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if piped else log,
                stderr=log,
                start_new_session=True,
                pass_fds=(self._lock,),
                preexec_fn=die_with_parent,
            )
        waiting = asyncio.ensure_future(_wait(process, member))
        self._waits.add(waiting)
        waiting.add_done_callback(self._waits.discard)
        return process


def bound_logs(folder: Path, most_bytes: int) -> None:
    """Keep each log of a folder small: what is beyond a size becomes `NAME.log.old`, in place of the one before.

    Processes go on writing to the file that they have open, at its end, which is its beginning then. What one writes
    between the copy and the cut is lost.
    """
    for log in folder.glob("*.log"):
        if log.stat().st_size > most_bytes:
            draft = log.with_suffix(".log.new")
            shutil.copyfile(log, draft)
            os.truncate(log, 0)
            draft.replace(log.with_suffix(".log.old"))


async def _wait(process: asyncio.subprocess.Process, member: Member) -> None:
    await process.wait()
    member.has_ended()


class Zygote:
    """This process's end of a zygote; see `workers.simulation_zygote`."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._is_there = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._starting: dict[str, asyncio.Future[int]] = {}
        self._members: dict[str, Member] = {}

    def attach(self, process: asyncio.subprocess.Process) -> None:
        """Take a zygote that was just started."""
        self._process = process
        self._is_there.set()
        self._reading = asyncio.ensure_future(self._read(process))

    async def start(self, member: Member, request: dict[str, Any]) -> int:
        """Have a process forked, as soon as the zygote is there; gives its id.

        Raises:
            ConnectionError: The zygote ended at that very time.
        """
        await self._is_there.wait()
        process = self._process
        if process is None or process.stdin is None:
            raise ConnectionError("the zygote is not there")
        self._members[member.name] = member
        self._starting[member.name] = asyncio.get_running_loop().create_future()
        process.stdin.write(json.dumps({"start": member.name, **request}).encode() + b"\n")
        return await self._starting[member.name]

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        if process.stdout is None:
            raise ConnectionError("the zygote was started without pipes")
        async for line in process.stdout:
            told = json.loads(line)
            if "started" in told:
                starting = self._starting.pop(told["started"])
                if not starting.done():  # cancelled: all is being ended
                    starting.set_result(int(told["pid"]))
            else:
                self._members[told["ended"]].has_ended()
        if self._process is process:
            self._process = None
            self._is_there.clear()
        for starting in self._starting.values():
            starting.set_exception(ConnectionError("the zygote ended"))
        self._starting.clear()
        for member in self._members.values():  # the kernel ends them with it
            member.has_ended()
