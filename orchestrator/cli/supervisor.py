"""The supervisor of a simulated herd: starts its processes, starts again what ends, and takes all down with itself.

`python -m orchestrator.cli.supervisor DIRECTORY LOCK` runs until SIGTERM or a request, and removes the directory at its
end. The kernel kills each process when its parent ends in whatever way, so a killed supervisor leaves none. A node's
processes are forked by zygotes (`workers.simulation_zygote`), each under its own user of Redis, as in production.

On `control.sock` it takes one line of JSON and answers one: `{"ask": "status"}`, `{"ask": "stop"}`,
`{"ask": "power-off", "node": "n1"}` (its processes are killed, and not started again) and `{"ask": "power-on", ...}`.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Final

from orchestrator.cli.members import Launcher, Member, Zygote, bound_logs
from orchestrator.cli.run import worker_arguments
from orchestrator.cli.simulated_herd import HerdDirectory, HerdSpec
from orchestrator.errors import Invalid, StoreUnavailable, VmherdError
from orchestrator.store import access
from orchestrator.store.connection import connect, redis_errors

_REDIS_STARTS_S: Final = 20.0
_LOOK_EVERY_S: Final = 0.05
_STOP_S: Final = 10.0
_LOGS_EVERY_S: Final = 10.0
_LOG_BYTES: Final = 4 * 2**20
"""Of each of its logs, and as much of the part before: a detached herd may run for weeks."""
_BETWEEN_NODES_S: Final = 0.05
"""Hundreds of processes that begin at once would starve those that are up."""
_ROLES: Final = ("migrate", "lifecycle")
_CONTROL_PLANE: Final = (
    *(("control-1", "control"), ("control-2", "control"), ("liveness", "liveness"), ("fencing", "fencing")),
    *(("intake", "intake"), ("beat-1", "beat"), ("beat-2", "beat")),
)
_REDIS_CONF: Final = """\
port 0
unixsocket {socket}
unixsocketperm 700
dir {folder}
aclfile {folder}/users.acl
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
maxclients 20000
"""


class Supervisor:
    """Keeps a herd's processes running.

    Args:
        directory: Of the herd; made already.
        spec: What it is.
        lock: The descriptor of the directory's lock, which all processes inherit.
    """

    def __init__(self, directory: HerdDirectory, spec: HerdSpec, lock: int) -> None:
        self.directory = directory
        self.spec = spec
        self._stop = asyncio.Event()
        self._members: dict[str, Member] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._zygotes = {run: Zygote() for run in ("heartbeat", "agent", "celery")}
        self._passwords: dict[str, str] = {}
        ours = {"VMHERD_REDIS_URL": directory.redis_url, "VMHERD_LOG_FORMAT": "json", "PYTHONUNBUFFERED": "1"}
        self._environment = {**os.environ, **ours}
        self._launcher = Launcher(directory.logs, self._environment, lock)

    async def run(self) -> None:
        """Run the herd until it is stopped.

        Raises:
            VmherdError: It can't be started.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        server = await asyncio.start_unix_server(self._answer, self.directory.control_socket)
        starting = asyncio.ensure_future(self._start_all())
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            self._keepers.append(asyncio.ensure_future(self._bound_logs()))
            await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
            await stopped
        finally:
            server.close()
            for task in (starting, stopped, *self._keepers):
                task.cancel()
            await asyncio.gather(starting, stopped, *self._keepers, return_exceptions=True)
            await self._end_all()

    async def _start_all(self) -> None:
        self._keep("redis", self._program(*self._redis_command()))
        await self._await_redis()
        await asyncio.to_thread(self._enroll)
        self._keep("world", self._program(sys.executable, "-m", "workers.simulation", *self._world_arguments()))
        for run in self._zygotes:
            self._keep(f"zygote-{run}", self._zygote(run))
        for name, role in _CONTROL_PLANE:
            self._keep(name, self._program(sys.executable, "-m", "orchestrator.cli", "run", role))
        for node in self.spec.nodes:
            await asyncio.sleep(_BETWEEN_NODES_S)
            self._keep(f"heartbeat@{node}", self._forked("heartbeat", node), node)
            self._keep(f"agent@{node}", self._forked("agent", node), node)
            for role in _ROLES:
                self._keep(f"{role}@{node}", self._forked("celery", node, role), node)

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(_LOGS_EVERY_S)
            with contextlib.suppress(OSError):  # a full disk, say: nobody can be told but by a log
                await asyncio.to_thread(bound_logs, self.directory.logs, _LOG_BYTES)

    def _keep(self, name: str, start: Callable[[Member], Awaitable[int]], node: str = "") -> None:
        member = self._members[name] = Member(name, start, node)
        self._keepers.append(asyncio.ensure_future(member.keep()))

    # --- how each is started ----------------------------------------------------------------------------------------

    def _program(self, *words: str) -> Callable[[Member], Awaitable[int]]:
        async def start(member: Member) -> int:
            return (await self._launcher.start(member, *words)).pid

        return start

    def _zygote(self, run: str) -> Callable[[Member], Awaitable[int]]:
        async def start(member: Member) -> int:
            words = (sys.executable, "-m", "workers.simulation_zygote", run)
            process = await self._launcher.start(member, *words, piped=True)
            self._zygotes[run].attach(process)
            return process.pid

        return start

    def _forked(self, run: str, node: str, role: str = "") -> Callable[[Member], Awaitable[int]]:
        environment = {
            **self._environment,
            "VMHERD_NODE": node,
            "VMHERD_REDIS_URL": self.directory.redis_url_of(access.user_name(node), self._passwords[node]),
            "VMHERD_LIBVIRT_URI": f"simulated+unix://{self.directory.world_socket}?host={node}",
            "VMHERD_STATE_DIR": str(self.directory.path / "nodes" / node),
            "VMHERD_WATCHDOG": "off",  # this machine's own resets nobody here
            "VMHERD_PEER_ADDRESS": "127.0.0.1:0",
            **({"VMHERD_WORKER_ROLE": role} if role else {}),
        }
        arguments = worker_arguments(node, role) if role else ()

        async def start(member: Member) -> int:
            log = str(self.directory.logs / f"{member.name}.log")
            boot = {"VMHERD_BOOT_ID": await asyncio.to_thread(self._boot_id, node)} if run == "heartbeat" else {}
            request = {"run": run, "arguments": arguments, "environment": environment | boot, "log": log}
            return await self._zygotes[run].start(member, request)

        return start

    def _boot_id(self, node: str) -> str:
        """Ask the world for a host's boot id: a heartbeat loads nothing that could."""
        try:
            return str(self.directory.ask_world(host=node, call="boot_id", arguments=[]))
        except VmherdError as error:
            raise ConnectionError(f"the world does not answer yet: {error}") from error

    def _redis_command(self) -> tuple[str, ...]:
        program = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin")
        if program is None:
            raise Invalid("there is no redis-server on this machine: install Debian's package redis-server")
        folder = self.directory.path / "redis"
        for name, text in (
            ("users.acl", f"user default on >{self.spec.password} ~* &* +@all\n"),
            ("redis.conf", _REDIS_CONF.format(socket=self.directory.redis_socket, folder=folder)),
        ):
            (folder / name).touch(mode=0o600)
            (folder / name).write_text(text)
        return program, str(folder / "redis.conf")

    async def _await_redis(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _REDIS_STARTS_S
        while True:
            try:
                await asyncio.to_thread(self._ping)
            except StoreUnavailable as error:
                if loop.time() > deadline:
                    log = (self.directory.logs / "redis.log").read_text()[-500:]
                    raise StoreUnavailable(f"redis-server does not start ({error}): {log}") from error
                await asyncio.sleep(_LOOK_EVERY_S)
            else:
                return

    def _ping(self) -> None:
        client = connect(self.directory.redis_url, timeout_s=2.0, retries=0)
        try:
            with redis_errors(client):
                client.ping()
        finally:
            client.close()

    def _enroll(self) -> None:
        client = connect(self.directory.redis_url)
        for node in self.spec.nodes:
            self._passwords[node] = access.enroll(client, node)
        client.close()

    def _world_arguments(self) -> tuple[str, ...]:
        spec = self.spec
        return (
            *("--socket", str(self.directory.world_socket), "--hosts", ",".join(spec.nodes)),
            *("--speed-up", str(spec.speed_up), "--cpus", str(spec.node_cpus)),
            *("--memory-mib", str(spec.node_memory_mib)),
        )

    # --- the end, and what it is asked ------------------------------------------------------------------------------

    async def _end_all(self) -> None:
        """End what runs, by force: nothing of it is kept. First what zygotes forked, since they tell its end."""
        forked = [member for member in self._members.values() if member.node]
        await _end(forked)
        await _end(member for member in self._members.values() if not member.node)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            try:
                request = json.loads(await reader.readline())
                answer = {"value": self._do(str(request.get("ask")), str(request.get("node", "")))}
            except (ValueError, AttributeError, VmherdError) as error:
                answer = {"error": str(error)}
            writer.write(json.dumps(answer).encode() + b"\n")
            writer.close()
            await writer.wait_closed()

    def _do(self, ask: str, node: str) -> Any:
        match ask:
            case "status":
                return [
                    {"name": m.name, "pid": m.pid, "restarts": m.restarts, "held": m.is_held, "trouble": m.trouble}
                    for m in self._members.values()
                ]
            case "stop":
                self._stop.set()
            case "power-off":
                for member in self._of(node):
                    member.hold()
            case "power-on":
                for member in self._of(node):
                    member.release()
            case _:
                raise Invalid(f"a supervisor can't be asked for {ask!r}")
        return None

    def _of(self, node: str) -> list[Member]:
        found = [member for member in self._members.values() if node and member.node == node]
        if not found:
            raise Invalid(f"the simulated herd has no node {node!r}: {', '.join(self.spec.nodes)}")
        return found


async def _end(members: Iterable[Member]) -> None:
    running = [member for member in members if member.pid]
    for member in running:
        member.kill()
    if running:
        await asyncio.wait([asyncio.ensure_future(member.wait_for_end()) for member in running], timeout=_STOP_S)


def main() -> None:
    """Run the herd of a directory that was made for it; the lock's descriptor is inherited."""
    directory, lock = HerdDirectory(Path(sys.argv[1])), int(sys.argv[2])
    os.umask(0o077)
    directory.sign(lock)
    spec = directory.spec
    if spec is None:
        raise SystemExit(f"vmherd: {directory.path} has no simulated herd")
    try:
        asyncio.run(Supervisor(directory, spec, lock).run())
    except VmherdError as error:
        raise SystemExit(f"vmherd: {error}") from None
    directory.remove()


if __name__ == "__main__":
    main()
