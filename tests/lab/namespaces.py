"""Places in which a test runs programs: network namespaces with names.

A namespace is a name under `/run/netns` (so `ip netns exec NAME ...` works for a person who debugs) of the form
`vmherd.LAB.WHO`. Lab names hold no dot, hence the names of two labs never share a prefix.
"""

import ctypes
import http.client
import os
import re
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.lab.cleanup import NETNS

FILES = Path(__file__).parent / "files"
REPOSITORY = Path(__file__).resolve().parents[2]

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """The lab could not do what the test asked; the message says what and why."""


class LabUnsupported(LabError):
    """This machine lacks what one fault needs, a kernel feature or a tool; the rest of the lab works."""


def checked_name(name: str, *, longest: int) -> str:
    """Return `name` if it may be part of namespace, interface and path names.

    Raises:
        ValueError: It is not a lower-case DNS label of at most `longest` characters.
    """
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name) or len(name) > longest:
        raise ValueError(f"{name!r}: need a DNS label of at most {longest} characters")
    return name


def namespace_name(lab: str, who: str) -> str:
    """Return the name under `/run/netns` of one member of a lab."""
    return f"vmherd.{lab}.{who}"


def command(argv: Sequence[str], *, stdin: str | None = None, timeout: float = 60.0) -> str:
    """Run a short system command and return its output.

    Raises:
        LabError: It failed; the message holds what it printed.
    """
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(argv)}: exit {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


class Place(ABC):
    """Somewhere programs can be run; see `popen` and `run`.

    Args:
        logs: Folder of the log files, shared by a lab's places.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs

    @abstractmethod
    def _enter(self) -> list[str]:
        """Return the command that runs its arguments in this place, without a process in between."""

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        log: str | None = None,
        cwd: str | Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program in this place, in a session (and process group) of its own.

        Args:
            argv: The program and its arguments.
            env: Added to this process's environment.
            log: Name of the log: both outputs are appended to `logs/<log>.log`. None: they are thrown away.
            cwd: Its working directory; this process's by default.

        Returns:
            The process: its `pid` is the program's own, as all that comes before it is replaced by exec.
        """
        output = self._open_log(log)
        try:
            return subprocess.Popen(
                self._argv(argv, cwd),
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        finally:
            if output >= 0:
                os.close(output)

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        log: str | None = None,
        cwd: str | Path | None = None,
        stdin: str | None = None,
        timeout: float = 60.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in this place to its end and return what it printed.

        Args:
            argv: The program and its arguments.
            env: Added to this process's environment.
            log: If given, the outputs are appended to this log too.
            cwd: Its working directory; this process's by default.
            stdin: What it reads.
            timeout: Seconds, then it is killed and `subprocess.TimeoutExpired` raised.
            check: Raise if it fails.

        Raises:
            LabError: `check` is set and the program failed.
        """
        done = subprocess.run(
            self._argv(argv, cwd),
            env={**os.environ, **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if log is not None:
            with (self._logs / f"{log}.log").open("a") as file:
                file.write(done.stdout + done.stderr)
        if check and done.returncode != 0:
            raise LabError(f"{' '.join(argv)}: exit {done.returncode}: {(done.stderr or done.stdout).strip()}")
        return done

    def _argv(self, argv: Sequence[str], cwd: str | Path | None) -> list[str]:
        # nsenter into a mount namespace lands in "/", so the folder is entered again afterwards.
        return [*self._enter(), "env", f"--chdir={cwd or Path.cwd()}", *argv]

    def _open_log(self, log: str | None) -> int:
        if log is None:
            return subprocess.DEVNULL
        return os.open(self._logs / f"{log}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


class Namespace(Place):
    """A named network namespace that shares this machine's file system.

    Args:
        name: Its name under `/run/netns`.
        logs: Folder of the log files.
        address: Its IPv4 address in the lab, if it has one.
    """

    def __init__(self, name: str, logs: Path, address: str = "") -> None:
        super().__init__(logs)
        self.name = name
        self.address = address
        self.path = NETNS / name

    def _enter(self) -> list[str]:
        return ["nsenter", f"--net={self.path}", "--"]

    def open_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, proto: int = 0
    ) -> socket.socket:
        """Return a socket of this namespace, usable from this process as any other.

        A socket belongs for ever to the namespace in which it was made. So this thread enters, makes it, and leaves;
        other threads are not touched, as setns(2) on a network namespace is the calling thread's affair.
        """
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _setns(there)
                try:
                    return socket.socket(family, kind, proto)
                finally:
                    _setns(home)
            finally:
                os.close(there)
        finally:
            os.close(home)

    def connect(self, address: tuple[str, int], timeout: float = 5.0) -> socket.socket:
        """Return a TCP connection from this namespace to `address`.

        Raises:
            OSError: Refused, unreachable, or not answered in `timeout` seconds.
        """
        connection = self.open_socket()
        try:
            connection.settimeout(timeout)
            connection.connect(address)
        except BaseException:
            connection.close()
            raise
        return connection

    def http_get(self, host: str, path: str, *, port: int = 80, timeout: float = 5.0) -> str:
        """Return the body of `http://host:port/path`, asked from this namespace.

        Raises:
            OSError: No connection, or no answer in `timeout` seconds; `ConnectionError` if the status is not 200.
        """
        client = http.client.HTTPConnection(host, port, timeout=timeout)
        client.sock = self.connect((host, port), timeout)
        try:
            client.request("GET", path)
            answer = client.getresponse()
            body = answer.read().decode()
        except http.client.HTTPException as error:
            raise ConnectionError(f"http://{host}:{port}{path}: {error!r}") from error
        finally:
            client.close()
        if answer.status != http.HTTPStatus.OK:
            raise ConnectionError(f"http://{host}:{port}{path}: {answer.status} {answer.reason}")
        return body


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")
