"""Do something at the very moment at which a host's libvirt tells of an event.

The listener is a process of its own: libvirt's event loop is one per process. It writes a line when the event comes,
and a thread of the test acts on it, within some milliseconds.

    python -m tests.lab.trigger URI EVENT/DETAIL     (prints `ready`, then the domain's name at the first such event)
"""

import subprocess
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import libvirt

from tests.lab.host import LabHost
from tests.lab.namespaces import REPOSITORY, LabError
from tests.lab.watch import event_name


class Trigger:
    """Calls `action` once, at the first `what` (`SUSPENDED/MIGRATED`) on a host; a context manager.

    Attributes:
        fired: Set when the action is done.
    """

    def __init__(self, host: LabHost, what: str, action: Callable[[], object]) -> None:
        self.fired = threading.Event()
        self._error: BaseException | None = None
        self._action = action
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.trigger", host.libvirt_uri, what],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        if self._read() != "ready":
            raise LabError(f"the trigger on {host.name} did not start")
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(timeout=30)
        if self._error is not None and kind is None:
            raise self._error

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _wait(self) -> None:
        if not self._read():
            return  # stopped before the event came
        try:
            self._action()
        except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
            self._error = error
        self.fired.set()


def _listen(uri: str, wanted: str) -> None:
    libvirt.virEventRegisterDefaultImpl()
    connection = libvirt.open(uri)

    def told(_connection: Any, domain: Any, event: int, detail: int, _opaque: object) -> None:
        if event_name(event, detail) == wanted:
            print(domain.name(), flush=True)

    connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, told, None)
    print("ready", flush=True)
    while True:
        libvirt.virEventRunDefaultImpl()


if __name__ == "__main__":
    _listen(*sys.argv[1:])
