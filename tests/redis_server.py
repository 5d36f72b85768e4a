"""A real redis-server for tests: on loopback, in a folder of its own, and never left behind."""

import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.requirements import need_program
from tests.waiting import wait_until


def free_port() -> int:
    """A TCP port that nobody listened on a moment ago. Someone else may take it: be ready to try again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisServer:
    """One redis-server process; it can be killed, frozen, and started again on the same port and data.

    The kernel kills it when the test run's process ends in whatever way (`setpriv --pdeathsig`), so start it from the
    main thread.

    Args:
        folder: Its data, configuration and log; made if missing.
        is_durable: Append-only file with `appendfsync always`, as in production; else nothing survives a kill.
        environment: Besides this process's own.
        arguments: Of redis-server, besides those that it always gets.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_durable: bool = False,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.is_durable = is_durable
        self.environment = dict(environment or {})
        self.arguments = tuple(arguments)
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of database 0, which is the only one that is used."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def is_running(self) -> bool:
        """Whether its process is there, frozen or not."""
        return self._process is not None and self._process.poll() is None

    def client(self) -> redis.Redis:
        """A new client that gives text. The caller closes it."""
        return redis.Redis.from_url(self.url, decode_responses=True)

    def start(self) -> None:
        """Start it, or start it again, and wait until it has loaded its data and answers.

        Raises:
            RuntimeError: It ended at once; the message has its log.
        """
        if self.is_running:
            return
        attempts = 1 if self.port else 5  # a port that was free may be taken by the time that redis-server wants it
        for _ in range(attempts):
            port = self.port or free_port()
            self._process = self._spawn(port)
            if self._is_up(port):
                self.port = port
                return
        raise RuntimeError(f"redis-server does not start:\n{(self.folder / 'log').read_text()}")

    def kill(self) -> None:
        """End it without warning, as a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Freeze it: connections stay open, and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen one go on."""
        self._signal(signal.SIGCONT)

    def clear(self) -> None:
        """Make it as new for the next test: no keys, no users but the default one, no scripts, no clients' settings."""
        with self.client() as client:
            client.flushall()
            client.script_flush()
            users = [user for user in client.acl_users() if user != "default"]
            if users:
                client.acl_deluser(*users)

    def _spawn(self, port: int) -> "subprocess.Popen[bytes]":
        self.folder.mkdir(parents=True, exist_ok=True)
        users = self.folder / "users.acl"
        users.touch()
        persistence = ("yes", "--appendfsync", "always") if self.is_durable else ("no",)
        command = (
            need_program("setpriv", "util-linux"),
            *("--pdeathsig", "KILL"),
            need_program("redis-server", "redis-server"),
            *("--bind", "127.0.0.1", "--port", str(port), "--dir", self.folder, "--save", ""),
            *("--aclfile", users, "--maxmemory-policy", "noeviction", "--appendonly", *persistence),
            *self.arguments,
        )
        with (self.folder / "log").open("wb") as log:
            return subprocess.Popen(
                [os.fspath(word) for word in command],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C ends the tests first, and it when they have ended
            )

    def _is_up(self, port: int) -> bool:
        def has_answered_or_ended() -> bool:
            return not self.is_running or self._pings(port)

        wait_until(has_answered_or_ended, 20, "redis-server answers")
        return self.is_running

    @staticmethod
    def _pings(port: int) -> bool:
        with redis.Redis(port=port, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:  # not listening yet, or loading its data
                return False

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise RuntimeError("redis-server is not running")
        self._process.send_signal(number)
