"""A process that comes back whenever it ends, as under systemd's `Restart=always`, and can be hurt on the way."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Self

from tests.lab.cleanup import freeze
from tests.lab.namespaces import LabError


class Supervised:
    """A supervised process. It is started at once; a context manager that stops it.

    Before a new start, what the dead process left in its process group is killed (systemd's `KillMode=control-group`);
    so the factory should give it a group of its own, as `Place.popen` does.

    Args:
        popen_factory: Starts the process. If it raises (the host has no power), it is called again later.
        name: For messages.
        delay_s: Seconds from an end to the next start.
    """

    def __init__(
        self, popen_factory: Callable[[], "subprocess.Popen[bytes]"], name: str, *, delay_s: float = 0.2
    ) -> None:
        self.name = name
        self.restarts = 0
        self._factory = popen_factory
        self._delay_s = delay_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._may_start = threading.Event()
        self._may_start.set()
        self._stopping = threading.Event()
        self._process = popen_factory()
        self._thread = threading.Thread(target=self._keep, name=f"supervised {name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Supervised({self.name}, pid {self.pid}, {self.restarts} restarts)"

    @property
    def pid(self) -> int | None:
        """The running process's id, or None while none runs."""
        with self._lock:
            return None if self._process is None or self._process.poll() is not None else self._process.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the process a signal; nothing happens if none runs. If that ends it, it is started again."""
        with self._lock:
            if self._process is not None:
                self._process.send_signal(number)

    def pause(self) -> None:
        """Freeze the process (SIGSTOP); nothing happens if none runs."""
        if (pid := self.pid) is not None:
            freeze(pid)

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""
        self.kill(signal.SIGCONT)

    def hold(self) -> None:
        """From now on start it no more when it ends; see `release`."""
        self._may_start.clear()

    def release(self) -> None:
        """Undo `hold`; it is started if it isn't running."""
        self._may_start.set()

    def wait_restarts(self, at_least: int, timeout: float = 10.0) -> None:
        """Return once it was restarted this often in all, and runs.

        Raises:
            LabError: It was not, in `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while self.restarts < at_least or self.pid is None:
            if time.monotonic() > deadline:
                raise LabError(f"{self!r} was not restarted {at_least} times")
            time.sleep(0.01)

    def stop(self, timeout: float = 10.0) -> None:
        """End it for good: SIGTERM, and SIGKILL after `timeout` seconds; with it, what it left in its process group."""
        self._stopping.set()
        self._may_start.set()
        with self._lock:
            process = self._process
        if process is not None:
            process.terminate()
            process.send_signal(signal.SIGCONT)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _kill_group(process)
        self._thread.join()

    def _keep(self) -> None:
        while True:
            if self._process is not None:
                self._process.wait()
                _kill_group(self._process)
            self._stopping.wait(self._delay_s)
            self._may_start.wait()
            with self._lock:
                if self._stopping.is_set():
                    return
                # Whatever the factory raises, the next try may succeed: a host without power, a namespace being remade.
                with contextlib.suppress(Exception):
                    self._process = None
                    self._process = self._factory()
                    self.restarts += 1


def _kill_group(dead: "subprocess.Popen[bytes]") -> None:
    """Kill what a dead process left in the group that it led; never this process's own group."""
    if dead.pid != os.getpgrp():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(dead.pid, signal.SIGKILL)
