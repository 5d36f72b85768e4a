# ruff: noqa: INP001 - no package: the guest runs it as it is
"""What runs in the guest with a watchdog, as its first process: it does what the test says, one line of JSON at a time.

It speaks through the second serial port, and answers each line with one. The product's code is in /opt.
"""

import json
import os
import signal
import subprocess
import sys
import termios
import tty
from pathlib import Path
from typing import Any

sys.path.insert(0, "/opt")

from workers.watchdog import LinuxWatchdog, WatchdogFailed

_DEVICE = Path("/dev/watchdog0")
_LOG = Path("/tmp/heartbeat.log")


class Guest:
    """What can be asked for, by name."""

    def __init__(self) -> None:
        self._device = LinuxWatchdog(_DEVICE)
        self._heartbeat: subprocess.Popen[bytes] | None = None

    def open(self, timeout_s: int) -> list[Any]:
        armed = self._device.open(timeout_s)
        return [armed.identity, armed.timeout_s]

    def feed(self) -> None:
        self._device.feed()

    def disarm(self) -> None:
        self._device.disarm()

    def abandon(self) -> None:
        """As if the process that has it dies."""
        if self._device._descriptor is not None:
            os.close(self._device._descriptor)
        self._device = LinuxWatchdog(_DEVICE)

    def open_twice(self) -> None:
        """As another process would, while it is open."""
        LinuxWatchdog(_DEVICE).open(30)

    def start(self, environment: dict[str, str]) -> int:
        """Start the product's heartbeat."""
        with _LOG.open("wb") as log:
            self._heartbeat = subprocess.Popen(
                [sys.executable, "-m", "workers.heartbeat"],
                env={**os.environ, "PYTHONPATH": "/opt", "PYTHONDONTWRITEBYTECODE": "1", **environment},
                stdout=log,
                stderr=log,
            )
        return self._heartbeat.pid

    def signal(self, name: str) -> None:
        if self._heartbeat is not None:
            self._heartbeat.send_signal(getattr(signal, name))

    def wait(self) -> int | None:
        """Wait for the heartbeat's end, 10 s at most."""
        return self._heartbeat.wait(10) if self._heartbeat is not None else None

    def log(self) -> str:
        return _LOG.read_text()

    def status(self) -> str:
        pid = self._heartbeat.pid if self._heartbeat is not None else 0
        return Path(f"/proc/{pid}/status").read_text()

    def module(self) -> str:
        return Path("/sys/class/watchdog/watchdog0/identity").read_text().strip()


def main() -> None:
    port = os.open("/dev/ttyS1", os.O_RDWR | os.O_NOCTTY)
    tty.setraw(port, termios.TCSANOW)
    guest = Guest()
    os.write(port, b'{"up": true}\n')
    with os.fdopen(port, "rb", buffering=0, closefd=False) as lines:
        buffered = b""
        while True:
            buffered += lines.read(4096) or b""
            while b"\n" in buffered:
                line, _, buffered = buffered.partition(b"\n")
                os.write(port, answer(guest, line) + b"\n")


def answer(guest: Guest, line: bytes) -> bytes:
    try:
        name, arguments = json.loads(line)
        return json.dumps({"value": getattr(guest, name)(*arguments)}).encode()
    except WatchdogFailed as error:
        return json.dumps({"failed": str(error)}).encode()
    except Exception as error:  # noqa: BLE001 - the test is told whatever it is
        return json.dumps({"error": repr(error)}).encode()


if __name__ == "__main__":
    main()
