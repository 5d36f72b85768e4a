"""A simulated herd on this machine: where it lives, what it is, and how it is spoken to.

All of it is one directory, of this user alone: Redis's data and socket, the world's socket, the supervisor's, logs, and
`herd.json`. One file in it is locked as long as any process of the herd runs: each inherits the lock from the
supervisor. So "is it running" and "are all of its processes gone" are asked of the kernel, and no process has to be
searched for.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from orchestrator.cli.terminal import tell
from orchestrator.errors import HypervisorError, Invalid, NotFound, Refused
from orchestrator.settings import settings

DIRECTORY_VARIABLE: Final = "VMHERD_SIM_DIR"
URL_VARIABLE: Final = "VMHERD_REDIS_URL"
_LONGEST_SOCKET_PATH: Final = 107
_ANSWER_TIMEOUT_S: Final = 30.0
_LOOK_EVERY_S: Final = 0.05
_STOP_S: Final = 30.0
_LOCK: Final = "lock"


@dataclass(frozen=True, slots=True)
class HerdSpec:
    """What a simulated herd is.

    Attributes:
        nodes: Names of its nodes.
        speed_up: How much faster than ours its hosts' time runs.
        node_cpus: CPUs of each node.
        node_memory_mib: Memory of each node.
        password: Of Redis's user `default`.
        made: Directories that were made for it, the last one first.
    """

    nodes: tuple[str, ...]
    speed_up: float
    node_cpus: int
    node_memory_mib: int
    password: str
    made: tuple[str, ...] = ()


class HerdDirectory:
    """The directory of a simulated herd; it may be missing."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.redis_socket = self.path / "redis.sock"
        self.world_socket = self.path / "world.sock"
        self.control_socket = self.path / "control.sock"
        self.logs = self.path / "log"
        self._spec = self.path / "herd.json"
        self._lock = self.path / _LOCK

    @property
    def spec(self) -> HerdSpec | None:
        """What stands in `herd.json`; None if this is no herd's directory."""
        try:
            found = json.loads(self._spec.read_text())
            return HerdSpec(**{**found, "nodes": tuple(found["nodes"]), "made": tuple(found["made"])})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise Invalid(f"{self._spec} is not vmherd's: {error}") from error

    @property
    def redis_url(self) -> str:
        """Where the control plane reaches its Redis."""
        spec = self.spec
        return self.redis_url_of("", spec.password if spec else "")

    def redis_url_of(self, user: str, password: str) -> str:
        """Where a user of Redis reaches it."""
        return f"unix://{user}:{password}@{self.redis_socket}?db=0"

    def make(self, spec: HerdSpec) -> int:
        """Make the directory, or take an empty one, or what a herd left that was killed.

        Returns:
            A descriptor of its lock; the directory is locked for as long as any process has it.

        Raises:
            Refused: It has something else in it, or a herd that runs.
            Invalid: Its path is too long for a socket.
        """
        if len(os.fsencode(str(self.control_socket))) > _LONGEST_SOCKET_PATH:
            raise Invalid(f"{self.path} is too long a path for a socket: choose another --dir")
        if self.spec is None and self.path.is_dir() and {entry.name for entry in self.path.iterdir()} - {_LOCK}:
            raise Refused(f"{self.path} is not empty, and no simulated herd is in it: choose another --dir")
        missing = [str(folder) for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = self._hold()
        before = self.spec
        if before is not None:
            missing = list(before.made)
            self._empty()
        draft = self._spec.with_suffix(".new")
        draft.touch(mode=0o600)
        draft.write_text(json.dumps({**asdict(spec), "made": missing}))
        draft.replace(self._spec)
        for folder in (self.logs, self.path / "redis", self.path / "nodes"):
            folder.mkdir(mode=0o700)
        return lock

    def _hold(self) -> int:
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Refused(f"a simulated herd runs already in {self.path}: vmherd down ends it") from None
        return descriptor

    def sign(self, lock: int) -> None:
        """Write into the lock that this process is the supervisor."""
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)

    def remove(self) -> None:
        """Remove all that `make` made; a directory that was there before is left, empty."""
        spec = self.spec
        if spec is None:
            return
        self._empty()
        self._lock.unlink(missing_ok=True)
        for folder in spec.made:
            with contextlib.suppress(OSError):  # somebody else uses it by now, or it is gone
                Path(folder).rmdir()

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry not in (self._spec, self._lock):
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        self._spec.unlink()  # last: what an interrupted removal leaves is known as ours

    def stop(self) -> bool:
        """End the herd, and remove what is left of it.

        Returns:
            Whether there was one, running or left over by one that was killed.
        """
        try:
            lock = os.open(self._lock, os.O_RDWR)
        except (FileNotFoundError, NotADirectoryError):
            lock = -1
        if lock >= 0:
            # The file may be removed meanwhile: the lock lives on with the descriptors of those who have it.
            try:
                supervisor = os.pread(lock, 20, 0).decode()
                with contextlib.suppress(NotFound, OSError):
                    self.ask_supervisor(ask="stop")
                if not _wait_for_lock(lock, _STOP_S):
                    if supervisor.isdigit():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(supervisor), signal.SIGKILL)  # and the kernel all others
                    if not _wait_for_lock(lock, _STOP_S):
                        raise Refused(f"some process of the simulated herd in {self.path} does not end")
            finally:
                os.close(lock)
        was_there = self.spec is not None or lock >= 0
        self.remove()
        return was_there

    def is_running(self) -> bool:
        """Whether any process of the herd runs."""
        try:
            descriptor = os.open(self._lock, os.O_RDWR)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def ask_supervisor(self, **request: Any) -> Any:
        """Ask the supervisor something; see `supervisor`.

        Raises:
            NotFound: None runs.
            Refused: It can't do that.
        """
        try:
            answer = _request(self.control_socket, request)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            raise NotFound(f"no simulated herd runs in {self.path}: vmherd up --simulated 3 starts one") from None
        if "error" in answer:
            raise Refused(str(answer["error"]))
        return answer.get("value")

    def ask_world(self, **request: Any) -> Any:
        """Ask the world, or cause a fault there: the protocol is `workers.hypervisor.simulated_wire`'s.

        Raises:
            NotFound: No simulated herd runs.
            HypervisorError: The world refuses.
        """
        try:
            answer = _request(self.world_socket, request)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            raise NotFound(f"no simulated herd runs in {self.path}: vmherd up --simulated 3 starts one") from None
        if "error" in answer:
            raise HypervisorError(str(answer.get("message", answer["error"])))
        return answer.get("value")


def _wait_for_lock(descriptor: int, timeout_s: float) -> bool:
    """Wait until nobody else has a lock; whether that is so."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_EVERY_S)
        else:
            return True


def _request(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_TIMEOUT_S)
        connection.connect(str(path))
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as lines:
            answer = json.loads(lines.readline() or b'{"error": "it ended"}')
    return answer if isinstance(answer, dict) else {"error": f"an answer that is no object: {answer!r}"}


def default_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Give where a simulated herd lives unless another directory is named."""
    if named := environment.get(DIRECTORY_VARIABLE):
        return Path(named)
    state = environment.get("XDG_STATE_HOME") or ""
    base = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    return base / "vmherd" / "sim"


def use_running_herd() -> None:
    """Speak to the simulated herd that runs on this machine, unless `VMHERD_REDIS_URL` names another, and say so."""
    if URL_VARIABLE in os.environ:
        return
    try:
        directory = HerdDirectory(default_directory())
        if directory.spec is None or not directory.is_running():
            return
    except (OSError, RuntimeError, Invalid):  # not ours to read, no home
        return
    os.environ[URL_VARIABLE] = directory.redis_url
    settings.cache_clear()
    tell(f"the simulated herd in {directory.path} (VMHERD_REDIS_URL is not set)")
