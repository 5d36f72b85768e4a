"""A QEMU guest with a hardware watchdog (i6300esb), in which the product's own code opens, feeds and loses it.

with WatchdogGuest(tmp_path) as guest:
    guest.call("open", 2)
    wait_until(lambda: guest.expired, 30, "the watchdog expires")
"""

import json
import select
import shutil
import socket
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any, Self

from tests.lab.namespaces import REPOSITORY, LabError
from tests.lab.watchdog_image import watchdog_image

_BOOTS_IN_S = 200.0
_CODE = ("orchestrator", "workers", "tests/lab/files")


class WatchdogGuest:
    """The guest. What its watchdog does is heard from QEMU, not from the guest.

    Args:
        folder: For sockets, logs and the code's disk.

    Attributes:
        expired: How often the watchdog has expired.
        resets: How often the machine was reset.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""
        self._events = b""
        self._expired = 0
        self._resets = 0

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._port.close()
            self._monitor.close()

    def _start(self) -> None:
        image = watchdog_image()
        code = self._folder / "code.tar"
        with tarfile.open(code, "w") as archive:
            for part in _CODE:
                archive.add(REPOSITORY / part, part, filter=_without_caches)
        ports = {name: self._folder / f"{name}.sock" for name in ("port", "monitor")}
        drive = "if=virtio,format=raw,snapshot=on"
        argv = [
            shutil.which("qemu-system-x86_64") or "qemu-system-x86_64",
            *("-machine", "pc,accel=tcg", "-cpu", "qemu64", "-m", "512", "-nographic", "-nodefaults"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
            *("-append", "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off nokaslr"),
            *("-drive", f"file={image.disk},{drive}", "-drive", f"file={code},{drive}"),
            *("-device", "i6300esb", "-action", "watchdog=none"),
            *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
            *("-serial", f"file:{self._folder / 'console.log'}"),
            *("-serial", f"unix:{ports['port']},server=on,wait=off"),
            *("-qmp", f"unix:{ports['monitor']},server=on,wait=off"),
        ]
        with (self._folder / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._monitor = self._connect(ports["monitor"])
        self._monitor.sendall(b'{"execute": "qmp_capabilities"}\n')
        self._port = self._connect(ports["port"])
        self.wait_up()

    def _connect(self, path: Path) -> socket.socket:
        deadline = time.monotonic() + 20
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(str(path))
                return connection
            except OSError as error:
                connection.close()
                if time.monotonic() > deadline or (self._process is not None and self._process.poll() is not None):
                    log = (self._folder / "qemu.log").read_text()
                    raise LabError(f"QEMU does not start: {error}; {log}") from error
                time.sleep(0.05)

    def wait_up(self) -> None:
        """Wait until the guest has booted, the first time or once more."""
        if "up" not in self._line(_BOOTS_IN_S):
            raise LabError("the guest says something else than that it is up")

    def call(self, name: str, *arguments: Any) -> Any:
        """Have something done in the guest; see `files/watchdog-guest.py`.

        Raises:
            LabError: It failed; `WatchdogFailed`'s text where it was that.
        """
        self._port.sendall(json.dumps([name, arguments]).encode() + b"\n")
        answer = self._line(30.0)
        if "value" not in answer:
            raise LabError(str(answer.get("failed") or answer))
        return answer["value"]

    def _line(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._port], [], [], left)[0]:
                console = (self._folder / "console.log").read_bytes()[-2000:].decode(errors="replace")
                raise LabError(f"the guest does not answer in {timeout_s} s; its console: {console}")
            received = self._port.recv(65536)
            if not received:
                raise LabError("QEMU has ended: " + (self._folder / "qemu.log").read_text())
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        found = json.loads(line)
        assert isinstance(found, dict)
        return found

    def reset_on_expiry(self, *, wanted: bool) -> None:
        """Say whether the watchdog resets the machine, as it would, or is only heard."""
        arguments = {"watchdog": "reset" if wanted else "none"}
        self._monitor.sendall(json.dumps({"execute": "set-action", "arguments": arguments}).encode() + b"\n")

    def _listen(self) -> None:
        while select.select([self._monitor], [], [], 0)[0]:
            received = self._monitor.recv(65536)
            if not received:
                return
            self._events += received
        *lines, self._events = self._events.split(b"\n")
        for line in lines:
            event = json.loads(line).get("event")
            self._expired += event == "WATCHDOG"
            self._resets += event == "RESET"

    @property
    def expired(self) -> int:
        """How often the watchdog has expired."""
        self._listen()
        return self._expired

    @property
    def resets(self) -> int:
        """How often the machine was reset."""
        self._listen()
        return self._resets


def _without_caches(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in entry.name else entry
