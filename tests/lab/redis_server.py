"""A real Redis in the lab, set up as in production: append-only file with fsync, ACL file, password, no eviction."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

from tests.lab.cleanup import freeze
from tests.lab.namespaces import LabError, Namespace

_CONF = """\
port {port}
bind {address} 127.0.0.1
protected-mode no
unixsocket {socket}
unixsocketperm 700
dir {directory}
aclfile {directory}/users.acl
appendonly yes
appendfsync always
save ""
maxmemory-policy noeviction
"""


class RedisServer:
    """One Redis server. Made, and started, by `Lab.start_redis`.

    Attributes:
        password: The default user's.
        directory: Its data and configuration.
        socket_path: Its Unix socket, reachable from outside of the lab's namespaces.
        url_for_hosts: Its address for whoever is in a namespace of the lab.
        url: Its address from outside of the namespaces, for redis-py.
        kombu_url: The same for kombu and Celery.
    """

    def __init__(self, space: Namespace, directory: Path, *, name: str, port: int, password: str) -> None:
        self.name = name
        self.password = password
        self.directory = directory
        self.socket_path = directory / "redis.sock"
        self.url_for_hosts = f"redis://:{quote(password)}@{space.address}:{port}/0"
        self.url = f"unix://:{quote(password)}@{self.socket_path}?db=0"
        self.kombu_url = f"redis+socket://:{quote(password)}@{self.socket_path}?virtual_host=0"
        self._space = space
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir()
        (directory / "users.acl").write_text(f"user default on >{password} ~* &* +@all\n")
        (directory / "redis.conf").write_text(
            _CONF.format(port=port, address=space.address, directory=directory, socket=self.socket_path)
        )

    @property
    def pid(self) -> int | None:
        """The server's process id, or None if it isn't running."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def start(self, timeout: float = 20.0) -> None:
        """Start it (it must not be running) with the data of before; returns when it answers.

        Raises:
            LabError: It exited, or has not answered in `timeout` seconds.
        """
        if self.pid is not None:
            raise LabError(f"redis {self.name} is running")
        # A killed server leaves its socket's file; a probe of it must not be taken for an answer.
        self.socket_path.unlink(missing_ok=True)
        argv = ["redis-server", str(self.directory / "redis.conf")]
        self._process = self._space.popen(argv, log=f"redis-{self.name}")
        deadline = time.monotonic() + timeout
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"redis {self.name} does not start; see logs/redis-{self.name}.log")
            time.sleep(0.01)

    def answers(self) -> bool:
        """Return whether it answers a PING, which it does not while it still loads its data."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(str(self.socket_path))
            probe.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
            received = b""
            while received.count(b"\r\n") < 2 and (chunk := probe.recv(4096)):
                received += chunk
            return received == b"+OK\r\n+PONG\r\n"
        return False

    def kill(self) -> None:
        """End it without a chance to say goodbye (SIGKILL); the data stay."""
        self._signal(signal.SIGKILL)
        self._wait()

    def stop(self) -> None:
        """End it properly (SIGTERM); the data stay. Nothing happens if it isn't running."""
        if self.pid is not None:
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGTERM)
            self._wait()

    def pause(self) -> None:
        """Freeze it (SIGSTOP): connections stay open and nothing is answered."""
        if (pid := self.pid) is None:
            raise LabError(f"redis {self.name} is not running")
        freeze(pid)

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if (pid := self.pid) is None:
            raise LabError(f"redis {self.name} is not running")
        os.kill(pid, number)

    def _wait(self) -> None:
        if self._process is not None:
            self._process.wait(20)
