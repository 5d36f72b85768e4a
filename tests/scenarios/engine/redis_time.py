"""A redis-server that lives in simulated time, and clients of it whose waits are simulated too.

A blocking read must not block: it looks, and waits in simulated time until someone has written to the stream.
"""

import hashlib
import json
import mmap
import os
import re
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from importlib import resources as package_files
from pathlib import Path
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from orchestrator.store import connection
from tests.redis_server import RedisServer
from tests.requirements import need_program
from tests.scenarios.engine.schedule import Schedule

EPOCH = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
"""The time of day at which every scenario begins."""
_SOURCE = Path(__file__).with_name("redis_time.c")
_LUA = tuple(file.name.removesuffix(".lua") for file in (package_files.files("orchestrator.store") / "lua").iterdir())
_scripts: dict[str, str] = {}
_STREAMS = re.compile(r"wake:[a-z0-9-]+|node:\{[a-z0-9-]+\}:reports")


class TimeOfDay:
    """The time of day of a scenario and of its Redis: a file that redis-server has mapped."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, 8)
        self._page = mmap.mmap(descriptor, 8)
        os.close(descriptor)
        self.path = path
        self.set(0.0)

    def set(self, seconds: float) -> None:
        """Say how many seconds have passed since `EPOCH`."""
        self._now = EPOCH + timedelta(seconds=seconds)
        self._page[:8] = struct.pack("=q", int(EPOCH.timestamp()) * 1_000_000 + round(seconds * 1_000_000))

    def now(self) -> datetime:
        """Give it, aware."""
        return self._now


def start_redis(folder: Path, clock: TimeOfDay) -> RedisServer:
    """Start a redis-server that lives by that clock; it keeps what it was told over a kill."""
    library = folder / "redis_time.so"
    compiler = need_program("gcc", "gcc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, _SOURCE], check=True)
    environment = {"LD_PRELOAD": str(library), "SIMULATED_CLOCK": str(clock.path)}
    # jemalloc's thread would wait for moments of the simulated time in the real one, which means not at all. What was
    # written outlives a kill of the process without fsync.
    arguments = ("--jemalloc-bg-thread", "no", "--appendfsync", "no")
    server = RedisServer(folder, is_durable=True, environment=environment, arguments=arguments)
    server.start()
    return server


class Touched:
    """How often streams and lists were written, by anyone; tells those that wait when to look again."""

    def __init__(self) -> None:
        self.times: Counter[str] = Counter()
        self.commits = 0
        self.on_report: Callable[[str, str, dict[str, Any], int], None] = lambda *_: None

    def note(self, args: tuple[Any, ...], answer: Any) -> None:
        """Take note of a command and of its answer."""
        match args[0]:
            case "EVALSHA":
                name = name_of(args)
                self.commits += name == "commit"
                for argument in args[3:]:
                    self.times.update(_STREAMS.findall(str(argument)))
                if name == "report":
                    node = str(args[3])[len("node:{") : str(args[3]).index("}")]
                    self.on_report(node, str(args[-3]), json.loads(args[-1]), int(answer))
            case "LPUSH" | "XADD":
                self.times[str(args[1])] += 1
            case _:
                pass

    def all(self) -> None:
        """Have everyone look again: their connections broke."""
        self.times.update(list(self.times))


def name_of(command: tuple[Any, ...]) -> str:
    """Name a command: `hget`; a script by its own name: `commit`, `claim`, `report`."""
    if command[0] != "EVALSHA":
        return str(command[0]).lower()
    if command[1] not in _scripts:
        sources = {name: connection._source(name).encode() for name in _LUA}
        _scripts.update({hashlib.sha1(text).hexdigest(): name for name, text in sources.items()})  # noqa: S324 - Redis's
    return _scripts[str(command[1])]


def _ordered(command: str, answer: Any) -> Any:
    """Put in order what Redis gives in an order that is another one in each of its processes."""
    match command, answer:
        case "hgetall", dict():
            return dict(sorted(answer.items()))
        case "hkeys", list():
            return sorted(answer)
        case "load", [version, run_id, *kinds]:
            pairs = [sorted(zip(kind[::2], kind[1::2], strict=True)) for kind in kinds]
            return [version, run_id, *([text for pair in kind for text in pair] for kind in pairs)]
        case _:
            return answer


class SimulatedRedis(redis.Redis):
    """A client whose commands are points at which a thread may be interrupted or killed; it waits in simulated time.

    Attributes:
        before: Told each command; may raise.
        after: Likewise once it is done.
    """

    schedule: Schedule
    touched: Touched
    before: Callable[[str], None]
    after: Callable[[str], None]

    @classmethod
    def connect(cls, url: str, schedule: Schedule, touched: Touched) -> "SimulatedRedis":
        """Open a client; it does not try again what failed."""
        options = {"decode_responses": True, "socket_timeout": 10, "single_connection_client": True}
        client = cast("SimulatedRedis", cls.from_url(url, **options, retry=Retry(NoBackoff(), 0)))
        client.schedule, client.touched = schedule, touched
        client.before = client.after = lambda _: None
        return client

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send a command."""
        name = name_of(args)
        self.before(name)
        self.schedule.point()
        answer = super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        self.touched.note(args, answer)
        self.after(name)
        return _ordered(name, answer)

    def pipeline(self, *args: Any, **options: Any) -> Any:
        """Begin a pipeline; it is sent as one."""
        self.before("pipeline")
        self.schedule.point()
        return super().pipeline(*args, **options)

    def xread(  # type: ignore[override] # as much of it as is used
        self, streams: Mapping[Any, Any], count: int | None = None, block: int | None = None
    ) -> Any:
        """Read streams, waiting in simulated time."""
        if block is None:
            return super().xread(dict(streams), count=count)
        end = self.schedule.now + block / 1000
        while True:
            seen = {name: self.touched.times[name] for name in streams}
            answer = super().xread(dict(streams), count=count)
            left = end - self.schedule.now
            if answer or left <= 0:
                return answer
            if not self.schedule.wait(lambda: any(self.touched.times[n] != seen[n] for n in seen), left):  # noqa: B023
                return answer

    def take(self, queue: str, timeout_s: float) -> Any:
        """Take the oldest message of a queue, waiting in simulated time; None when none came."""
        seen = self.touched.times[queue]
        text = self.rpop(queue)
        if text is None and self.schedule.wait(lambda: self.touched.times[queue] != seen, timeout_s):
            text = self.rpop(queue)
        return None if text is None else json.loads(str(text))
