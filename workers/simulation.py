"""The simulated hosts' process: `python -m workers.simulation --socket PATH --hosts n1,n2`.

It holds everything that is true of simulated hosts, outside of all workers: killing those kills no machine, and a
migration goes on without whoever began it, as with libvirtd. One thread serves all connections
(`workers.hypervisor.simulated_wire`), so the world needs no lock; what is to happen by itself has one timer.
"""

import argparse
import asyncio
import contextlib
import inspect
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import HypervisorError, VmherdError
from workers.hypervisor.port import DomainState
from workers.hypervisor.simulated_faults import Faults
from workers.hypervisor.simulated_spec import HostSpec
from workers.hypervisor.simulated_wire import (
    MOST_BYTES,
    error_message,
    event_message,
    pack,
    read_arguments,
    unpack,
    value_message,
)
from workers.hypervisor.simulated_world import World

_BACKLOG: Final = 1024


class WorldServer:
    """Serves a world.

    Args:
        world: In this machine's monotonic time.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._faults = Faults(world)
        self._timer: asyncio.TimerHandle | None = None

    async def serve(self, path: Path, stop: asyncio.Event) -> None:
        """Serve on a Unix socket until `stop` is set.

        Raises:
            OSError: The socket can't be made.
        """
        server = await asyncio.start_unix_server(self._answer, path, limit=MOST_BYTES, backlog=_BACKLOG)
        try:
            await stop.wait()
        finally:
            server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            if line:
                await self._answer_request(unpack(line), reader, writer)
        except VmherdError as error:
            writer.write(pack(error_message(error)))
        except (ConnectionError, ValueError, asyncio.IncompleteReadError):
            pass  # whoever asked is gone, or sent more than a line may have
        finally:
            with contextlib.suppress(ConnectionError):
                writer.close()
                await writer.wait_closed()

    async def _answer_request(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        host = str(request.get("host", ""))
        if "call" in request:
            writer.write(pack(await self._call(host, str(request["call"]), request.get("arguments"))))
        elif "watch" in request:
            await self._watch(host, reader, writer)
        elif "fault" in request:
            self._cause(str(request["fault"]), request.get("arguments"))
            writer.write(pack({"value": None}))
        elif "look" in request:
            writer.write(pack({"value": self._look()}))
        else:
            raise HypervisorError("a request has one of: call, watch, fault, look")

    async def _call(self, host: str, method: str, arguments: Any) -> dict[str, Any]:
        answer = self._world.call(host, method, *read_arguments(method, arguments))
        self._set_timer()
        if not answer.done():
            # Shielded: the world's future must not be cancelled when whoever asked goes away.
            await asyncio.shield(asyncio.wrap_future(answer))
        return value_message(method, answer.result())

    async def _watch(self, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        news = asyncio.Event()
        subscription = self._world.subscribe(host, news.set)
        gone = asyncio.ensure_future(reader.read())  # ends when the watcher closes the connection
        gone.add_done_callback(lambda _: news.set())
        try:
            writer.write(pack({"value": None}))
            while not gone.done():
                await writer.drain()
                await news.wait()
                news.clear()
                for event in subscription.take():
                    writer.write(pack(event_message(event)))
        finally:
            self._world.unsubscribe(subscription)
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await gone

    def _cause(self, fault: str, arguments: Any) -> None:
        method = getattr(self._faults, fault, None) if not fault.startswith("_") else None
        if method is None or not isinstance(arguments, dict):
            raise HypervisorError(f"there is no fault {fault!r}")
        try:
            inspect.signature(method).bind(**arguments)
        except TypeError as error:
            raise HypervisorError(f"{fault}: {error}") from error
        self._world.advance()
        method(**arguments)
        self._set_timer()

    def _look(self) -> dict[str, Any]:
        self._world.advance()
        return {
            "now": self._world.now,
            "hosts": {
                name: {
                    "daemon": host.daemon.value,
                    "running": sum(m.state is DomainState.RUNNING for m in host.machines.values()),
                    "machines": len(host.machines),
                    "frozen": sorted(m.description.name for m in host.machines.values() if m.is_frozen),
                    "delay_s": host.delay_s,
                    "files": sorted(host.files),
                }
                for name, host in sorted(self._world.hosts.items())
            },
        }

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._world.next_at()
        if due is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, due - time.monotonic()), self._advance)

    def _advance(self) -> None:
        self._world.advance()
        self._set_timer()


def main(words: Sequence[str] | None = None) -> None:
    """Run a world until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m workers.simulation", description="Simulated hosts.")
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket to serve on.")
    parser.add_argument("--hosts", required=True, help="Their names: n1,n2,n3.")
    parser.add_argument("--speed-up", type=float, default=1.0, help="Simulated seconds in a second.")
    parser.add_argument("--cpus", type=int, default=16, help="Of each host.")
    parser.add_argument("--memory-mib", type=int, default=65_536, help="Of each host.")
    chosen = parser.parse_args(words)
    specs = [HostSpec(name, chosen.cpus, chosen.memory_mib) for name in chosen.hosts.split(",")]
    try:
        world = World(time.monotonic, chosen.speed_up, specs)
    except ValueError as error:
        parser.error(str(error))
    run(world, chosen.socket)


def run(world: World, path: Path) -> None:
    """Serve a world on a Unix socket until SIGTERM or SIGINT."""

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await WorldServer(world).serve(path, stop)
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - nothing else runs any more
        os._exit(0)  # connections that wait for something in the world hold up nothing

    path.unlink(missing_ok=True)  # of a process that was killed
    os.umask(0o077)
    asyncio.run(serve())


if __name__ == "__main__":
    main()
