"""The command `vmherd` in tests: run once, run beside, or run on a terminal; and what nodes would report, written."""

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import IO

import yaml

from orchestrator.planner.flow import say
from orchestrator.resources import Reason, RunPolicy, VirtualMachine, VirtualMachineOperation
from orchestrator.settings import Settings
from orchestrator.store import Store
from orchestrator.store.connection import connect
from tests.builders import DOMAIN_XML, a_vm
from tests.waiting import wait_until

EVICT = """
apiVersion: virtualization.deckhouse.io/v1alpha2
kind: VirtualMachineOperation
metadata:
  generateName: evict-linux-vm-
spec:
  virtualMachineName: linux-vm
  type: Evict
"""
VMOP = "virtualmachineoperation.virtualization.deckhouse.io"


def vm_manifest(name: str, **spec: object) -> str:
    whole = {"runPolicy": "Manual", "memory": {"size": "192Mi"}, "domainTemplate": DOMAIN_XML, **spec}
    kind = {"apiVersion": "virtualization.deckhouse.io/v1alpha2", "kind": "VirtualMachine"}
    return yaml.safe_dump({**kind, "metadata": {"name": name}, "spec": whole})


class Vmherd:
    """Runs the command against one Redis, and writes what nodes would have reported."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = Store(connect(url), Settings())

    def environment(self, **more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("VMHERD_")}
        return {**kept, "VMHERD_REDIS_URL": self.url, "COLUMNS": "120", **more}

    def run(self, *arguments: str, stdin: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli", *arguments],
            input=stdin,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done

    def ok(self, *arguments: str, stdin: str = "", **environment: str) -> str:
        """Standard output of a command that must succeed and complain of nothing."""
        done = self.run(*arguments, stdin=stdin, **environment)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def refused(self, *arguments: str, stdin: str = "", **environment: str) -> str:
        """Standard error of a command that must fail, in one line, and print nothing else."""
        done = self.run(*arguments, stdin=stdin, **environment)
        assert (done.returncode, done.stdout) == (1, ""), done
        assert done.stderr.startswith("vmherd: ")
        assert done.stderr.count("\n") == 1
        return done.stderr.removeprefix("vmherd: ").rstrip("\n")

    def running_vm(self, name: str = "linux-vm", node: str = "h1") -> None:
        """Store a VM that runs."""
        vm = a_vm(name, node=node, policy=RunPolicy.MANUAL, ip_address="192.0.2.101")
        self.store.must_commit(self.store.batch().create(vm))

    def set_vm(self, name: str, **status: object) -> None:
        old = self.store.get(VirtualMachine, f"default/{name}")
        self.store.must_commit(self.store.batch().put(old, old.with_status(**status)))

    def operations(self) -> list[VirtualMachineOperation]:
        return self.store.all(VirtualMachineOperation)

    def step(self, name: str, reason: Reason, message: str, **status: object) -> VirtualMachineOperation:
        """Move an operation on; at its end its grant is gone, as intake does it."""
        old = self.store.get(VirtualMachineOperation, f"default/{name}")
        new = say(old.with_status(**status), reason, message, datetime.now(UTC))
        written = self.store.must_commit(self.store.batch().put(old, new))[0]
        assert isinstance(written, VirtualMachineOperation)
        return written


class Running:
    """A command that runs beside the test, its output in a pipe. A context manager."""

    def __init__(self, herd: Vmherd, *arguments: str) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", *arguments],
            env=herd.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._threads = [
            threading.Thread(target=lambda: self.lines.extend(_stripped(self.process.stdout))),
            threading.Thread(target=lambda: self.errors.extend(_stripped(self.process.stderr))),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.ended()

    def ended(self) -> int:
        """Wait for its end; gives its exit code."""
        code = self.process.wait(30)
        for thread in self._threads:
            thread.join()
        return code

    def interrupt(self) -> int:
        """Press Ctrl-C; gives its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.ended()

    def wait(self, predicate: Callable[[list[str]], object]) -> None:
        """Wait until the lines up to now are as wanted."""
        wait_until(lambda: predicate(self.lines), 30, lambda: "\n".join([*self.lines, *self.errors]))


def _stripped(stream: IO[str] | None) -> Iterator[str]:
    assert stream is not None
    while line := stream.readline():
        yield line.rstrip("\n")


class OnScreen:
    """A command on a terminal that is drawn on while the test goes on. A context manager."""

    def __init__(self, herd: Vmherd, *arguments: str, **environment: str) -> None:
        self._unread = b""
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", *arguments],
            env=herd.environment(TERM="xterm-256color", **environment),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def __enter__(self) -> "OnScreen":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def read_until(self, wanted: str, timeout: float = 30) -> str:
        """What is drawn after what was read before, up to the end of a text."""
        shown, end, deadline = self._unread, wanted.encode(), time.monotonic() + timeout
        while end not in shown:
            left = deadline - time.monotonic()
            assert left > 0, f"{wanted!r} did not come: {shown[-2000:].decode(errors='replace')}"
            if select.select([self._ours], [], [], left)[0]:
                piece = _read(self._ours)
                assert piece, f"it ended before {wanted!r}: {shown[-2000:].decode(errors='replace')}"
                shown += piece
        before, found, self._unread = shown.partition(end)
        return (before + found).decode(errors="replace")

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def ended(self) -> int:
        """Wait for its end; gives its exit code."""
        return self._process.wait(20)


def on_a_terminal(herd: Vmherd, *arguments: str, **environment: str) -> str:
    """What a command shows on a terminal, control sequences and all."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        env=herd.environment(TERM="xterm-256color", **environment),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
        assert process.wait(30) == 0, shown
    os.close(ours)
    return shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux's way to say that nobody has the other end open
        return b""
