"""Flower of the demo: on this machine's own loopback, while the Redis that it watches is inside the lab's namespaces.

It reaches Redis by its Unix socket, which knows no namespaces. As it runs outside of them, a teardown of the lab does
not find it: the kernel kills it when the demo's process ends in whatever way.
"""

import base64
import contextlib
import http.client
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.lab.namespaces import REPOSITORY

USER = "vmherd"
USUAL_PORT = 5555


class Flower:
    """One Flower process. Start it from the main thread: the kernel's promise is kept to the thread that starts it.

    Attributes:
        password: Of user `vmherd`.
    """

    def __init__(self) -> None:
        self.password = secrets.token_hex(4)
        self._port = USUAL_PORT
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, env: Mapping[str, str], log: Path) -> None:
        """Start it; on another port if the usual one is taken.

        Args:
            env: The whole environment, with VMHERD_REDIS_URL.
            log: Where its output goes.
        """
        self._port = _free_port()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "orchestrator.cli", "run", "flower"],
                cwd=REPOSITORY,
                env={**env, "VMHERD_FLOWER_PASSWORD": self.password, "VMHERD_FLOWER_PORT": str(self._port)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C in the terminal is the demo's to handle
            )

    @property
    def url(self) -> str:
        """Where a browser finds it, once it was started."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def has_ended(self) -> bool:
        """Whether it was started and has ended."""
        return self._process is not None and self._process.poll() is not None

    def answers(self) -> bool:
        """Whether it serves its pages to who has the password."""
        word = base64.b64encode(f"{USER}:{self.password}".encode()).decode()
        client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=1)
        try:
            client.request("GET", "/api/queues/length", headers={"Authorization": f"Basic {word}"})
            return client.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            client.close()

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _free_port() -> int:
    for port in (USUAL_PORT, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    return USUAL_PORT
