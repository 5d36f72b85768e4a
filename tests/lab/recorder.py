"""The lab's recorder: writes down what each QEMU of the lab says of itself, from its start to its end.

The emulator wrapper gives each QEMU a second QMP monitor for it. So the record depends neither on the product nor on
libvirtd: it goes on while either is dead, and its times are QEMU's own, to the microsecond. The record is what
`observer` draws its conclusions from.

One line per fact, in `LAB/qemu.jsonl`, with `at` (CLOCK_REALTIME, seconds), `uuid`, `host`, `pid` and `kind`:
`seen` (with `domain`, `incoming`, `status`, `running`), `event` (with `event`, `data`) or `gone`.

    python -m tests.lab.recorder LAB_DIRECTORY
"""

import json
import os
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tests.lab.cleanup import command_line
from tests.lab.namespaces import REPOSITORY, LabError, Namespace

_POLL_S = 0.02


class Recorder:
    """The recorder of one lab, as a process in the lab's switch namespace, so that a teardown finds it.

    Args:
        switch: The namespace.
        directory: The lab's folder.
    """

    def __init__(self, switch: Namespace, directory: Path) -> None:
        self.file = directory / "qemu.jsonl"
        self._sockets = directory / "qmp"
        self.file.touch()
        argv = [sys.executable, "-m", "tests.lab.recorder", str(directory)]
        self._process: subprocess.Popen[bytes] = switch.popen(
            argv, env={"PYTHONPATH": str(REPOSITORY)}, log="recorder", cwd=REPOSITORY
        )
        self._syncs = 0

    def records(self) -> list[dict[str, Any]]:
        """Return all records up to now, oldest first.

        Raises:
            LabError: The recorder is dead or doesn't keep up: what it has is not the whole truth.
        """
        self._sync()
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    def reap(self) -> None:
        """Collect the recorder's exit code after a teardown."""
        self._process.wait(5)

    def _sync(self, timeout: float = 10.0) -> None:
        """Return when the recorder has read all that was sent before this call."""
        self._syncs += 1
        mark = self._sockets / f".sync-{os.getpid()}-{self._syncs}"
        mark.touch()
        deadline = time.monotonic() + timeout
        while mark.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise LabError("the recorder is dead or stuck; see logs/recorder.log")
            time.sleep(_POLL_S / 4)


class _Monitor:
    """A connection to one QEMU's monitor."""

    def __init__(self, path: Path, output: TextIO) -> None:
        uuid, host, pid = path.name.split(".")
        self.path = path
        self._output = output
        self._pid = int(pid)
        self._who = {"uuid": uuid, "host": host, "pid": self._pid}
        self._domain = ""
        self._buffer = b""
        self.connection = socket.socket(socket.AF_UNIX)
        try:
            self.connection.connect(str(path))
            for execute in ("qmp_capabilities", "query-name", "query-status"):
                self.connection.sendall(json.dumps({"execute": execute, "id": execute}).encode())
        except OSError:
            self.connection.close()
            raise
        self.connection.setblocking(False)

    def read(self) -> bool:
        """Write down what arrived; False at the end, which is QEMU's."""
        try:
            chunk = self.connection.recv(1 << 16)
        except BlockingIOError:
            return True
        except ConnectionError:
            chunk = b""
        if not chunk:
            self._write(time.time(), "gone")
            self.connection.close()
            self.path.unlink(missing_ok=True)
            return False
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                self._take(json.loads(line))
        return True

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            stamp = message["timestamp"]
            at = stamp["seconds"] + stamp["microseconds"] / 1e6
            self._write(at, "event", event=message["event"], data=message.get("data", {}))
        elif message.get("id") == "query-name":
            self._domain = message["return"].get("name", "")
        elif message.get("id") == "query-status":
            incoming = " -incoming " in command_line(self._pid)
            found = message["return"]
            self._write(
                time.time(),
                "seen",
                domain=self._domain,
                incoming=incoming,
                status=found["status"],
                running=found["running"],
            )

    def _write(self, at: float, kind: str, **more: Any) -> None:
        self._output.write(json.dumps({"at": at, **self._who, "kind": kind, **more}) + "\n")


def record(directory: Path) -> None:
    """Record for ever; the teardown of the lab ends it."""
    folder = directory / "qmp"
    monitors: dict[str, _Monitor] = {}
    with (directory / "qemu.jsonl").open("a") as output, selectors.DefaultSelector() as selector:
        while True:
            names = [path.name for path in folder.iterdir()]
            for name in names:
                if not name.startswith(".") and name not in monitors:
                    try:
                        monitors[name] = _Monitor(folder / name, output)
                    except ConnectionRefusedError:
                        # Bound and not yet listening: next time. Or dead before we came: then its pid is gone.
                        if not Path("/proc", name.rpartition(".")[2]).exists():
                            (folder / name).unlink(missing_ok=True)
                        continue
                    selector.register(monitors[name].connection, selectors.EVENT_READ, name)
            for key, _ in selector.select(_POLL_S):
                _read(key.data, monitors, selector)
            output.flush()
            if any(name.startswith(".sync-") for name in names):
                # What was sent before the mark was made is in the sockets' buffers by now; one more look takes it out.
                for key, _ in selector.select(0):
                    _read(key.data, monitors, selector)
                output.flush()
                for name in names:
                    if name.startswith(".sync-"):
                        (folder / name).unlink()


def _read(name: str, monitors: dict[str, _Monitor], selector: selectors.BaseSelector) -> None:
    connection = monitors[name].connection
    number = connection.fileno()
    if not monitors[name].read():
        selector.unregister(number)
        del monitors[name]


if __name__ == "__main__":
    record(Path(sys.argv[1]))
