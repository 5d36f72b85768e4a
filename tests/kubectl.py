"""The real kubectl against the real `vmherd api` process, with TLS and a token, as a person has it."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

import httpx

from tests.lab.supervised import Supervised
from tests.processes import REPOSITORY, Processes
from tests.redis_server import free_port
from tests.requirements import need_kubectl
from tests.waiting import wait_until


class Kubectl:
    """Runs kubectl with one kubeconfig.

    Args:
        kubeconfig: Names the server and the token.
        folder: For its caches.
    """

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self.program = need_kubectl()
        self.kubeconfig = kubeconfig
        self.folder = folder

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("VMHERD_", "KUBE"))}
        cache = str(self.folder / "kube-cache")
        return {**kept, "KUBECONFIG": str(self.kubeconfig), "KUBECACHEDIR": cache, "HOME": str(self.folder)}

    def run(
        self, *arguments: str, stdin: str = "", timeout: float = 60, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [self.program, *arguments],
            input=stdin,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def ok(self, *arguments: str, stdin: str = "", timeout: float = 60) -> str:
        """Standard output of a command that must succeed and complain of nothing."""
        done = self.run(*arguments, stdin=stdin, timeout=timeout)
        assert (done.returncode, done.stderr) == (0, ""), (arguments, done)
        return done.stdout

    def refused(self, *arguments: str, stdin: str = "") -> str:
        """Standard error of a command that must fail."""
        done = self.run(*arguments, stdin=stdin)
        assert done.returncode != 0, (arguments, done)
        return done.stderr

    def beside(self, *arguments: str) -> "Beside":
        """Begin a command that runs beside the test. A context manager."""
        return Beside(self, arguments)


class Beside:
    """A kubectl that runs beside the test.

    Attributes:
        lines: Of its output so far, errors among them.
    """

    def __init__(self, kubectl: Kubectl, arguments: tuple[str, ...]) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [kubectl.program, *arguments],
            env=kubectl.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.ended()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip("\n") for line in self.process.stdout)

    def wait_for(self, *words: str, timeout: float = 60) -> str:
        """Wait for a line that has all of these in it; gives it."""

        def find() -> str:
            return next((line for line in list(self.lines) if all(word in line for word in words)), "")

        return wait_until(find, timeout, lambda: f"{words} in:\n" + "\n".join(self.lines))

    def ended(self, timeout: float = 60) -> int:
        """Wait for its end; gives its exit code."""
        code = self.process.wait(timeout)
        self._thread.join()
        return code


class ApiProcess:
    """The API as a process of its own, started again whenever it ends.

    Args:
        processes: That stop it at the end.
        folder: For its CA, tokens and kubeconfigs.
        url: Of Redis, as `vmherd token` reaches it too.
        environment: Settings of its own.
    """

    def __init__(self, processes: Processes, folder: Path, url: str, name: str = "api", **environment: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.server = f"https://127.0.0.1:{self.port}"
        self.environment = {
            "VMHERD_REDIS_URL": url,
            "VMHERD_TLS_DIR": str(folder / "tls"),
            "VMHERD_API_PORT": str(self.port),
            **environment,
        }
        self._log = processes.log_file(name)
        self.process: Supervised = processes.start(name, "-m", "orchestrator.cli", "api", **self.environment)

    def wait_ready(self) -> Self:
        """Wait until it answers with what is newest."""
        wait_until(self._is_ready, 60, lambda: f"the API is ready: {self._log.read_text()[-2000:]}")
        return self

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.server}/readyz", verify=False, timeout=5).status_code == 200  # noqa: S501 - its CA is being made
        except httpx.HTTPError:
            return False

    def kubectl(self, name: str = "root", role: str = "admin", *more: str) -> Kubectl:
        """Give kubectl as a person has it who was given a token."""
        return Kubectl(self.kubeconfig(name, role, *more), self.folder)

    def kubeconfig(self, name: str = "root", role: str = "admin", *more: str) -> Path:
        """Make a token and a kubeconfig with the product's own commands."""
        token, config = self.folder / f"{name}.token", self.folder / f"{name}.kubeconfig"
        if not config.exists():
            self.vmherd("token", "create", name, "--role", role, "--to-file", str(token), *more)
            self.vmherd("kubeconfig", "--server", self.server, "--token-file", str(token), "--to-file", str(config))
        return config

    def vmherd(self, *arguments: str) -> str:
        """Run the CLI on the machine of the server."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("VMHERD_")}
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli", *arguments],
            env={**kept, **self.environment},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done
        return done.stdout
