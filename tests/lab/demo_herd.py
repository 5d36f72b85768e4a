"""The demo's herd: all of it starts at once, and each step says how far it is.

The order is that of who waits for whom: guests are only written down at first, agents and control plane come before the
workers, Flower last. On two cores the imports of seventeen Python processes are what takes the time.
"""

import compileall
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orchestrator.resources import VmPhase
from orchestrator.settings import FIVE_GBIT_IN_MIB_S
from orchestrator.store import keys
from tests.lab.cleanup import owner_of
from tests.lab.demo_flower import Flower
from tests.lab.demo_screen import Step, Steps
from tests.lab.guest import Guest
from tests.lab.herd import CONTROL_PROCESSES, NODE_PROCESSES, LabHerd
from tests.lab.lab import Lab
from tests.lab.namespaces import REPOSITORY, LabError

BANDWIDTH_MIB_S = 32
"""In place of 596: a small guest would be over before one has read its name."""
INBOUND_PER_NODE = 2
"""In place of 1: else three hosts that empty themselves into each other may have to take turns."""

GUESTS = {"linux-vm": "h1", "web-1": "h1", "web-2": "h2", "db-1": "h2", "db-2": "h3", "batch-1": "h3"}
"""Names, and where each begins."""
BUSY = "batch-1"
"""The guest that can be told to rewrite much memory."""

_FIRST_ADDRESS = 101
_MEMORY_MIB = 128
_BUSY_MEMORY_MIB = 224
_BUSY_WORKING_SET_MIB = 128

_START_TIMEOUT_S = 180.0
_LOOK_EVERY_S = 0.2
_MOST_RESTARTS = 3


class DemoHerd:
    """Three hosts, six guests, every process, Flower.

    Args:
        name: The lab's name; two demos of one name can't run at a time.

    Attributes:
        lab: Of hosts h1, h2, h3.
        guests: By name.
        flower: Outside of the namespaces.
    """

    def __init__(self, name: str) -> None:
        self.lab = Lab(hosts=3, name=name)
        self.guests: dict[str, Guest] = {}
        self.flower = Flower()
        self._herd: LabHerd | None = None
        self._answering: set[str] = set()
        self._failure: Exception | None = None

    @property
    def herd(self) -> LabHerd:
        """The product's processes."""
        if self._herd is None:
            raise LabError("the herd is not up")
        return self._herd

    @property
    def redis_url(self) -> str:
        """Of the herd's Redis, for whoever is on this machine."""
        return self.herd.redis.url

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a person's own commands."""
        return {**os.environ, "PYTHONPATH": str(REPOSITORY), "VMHERD_REDIS_URL": self.redis_url}

    def up(self, steps: Steps) -> None:
        """Start everything; returns when all guests answer.

        Raises:
            LabError: Something does not start.
        """
        if not sys.dont_write_bytecode:
            step = steps.begin("byte code of the sources")
            for folder in ("orchestrator", "workers", "tests/lab"):
                compileall.compile_dir(REPOSITORY / folder, quiet=2)
            steps.end(step)
        step = steps.begin("3 hosts: a libvirtd each, and a switch")
        self.lab.up()
        steps.end(step, "h1 192.0.2.11, h2 192.0.2.12, h3 192.0.2.13, in namespaces of their own")
        step = steps.begin("Redis: append-only file, fsync always")
        settings = {
            "VMHERD_BANDWIDTH_MIB_S": str(BANDWIDTH_MIB_S),
            "VMHERD_INBOUND_PER_NODE": str(INBOUND_PER_NODE),
        }
        self._herd = LabHerd(self.lab, env=settings)
        steps.end(step)
        waits = [
            (steps.begin(f"{self._start_processes()} processes of vmherd"), self._look_at_processes),
            (steps.begin("Flower"), self._look_at_flower),
            (steps.begin("6 guests: Linux in QEMU, without KVM"), self._look_at_guests),
        ]
        self._start_guests()
        self.flower.start(self.environment, self.lab.logs / "flower.log")
        self._wait(steps, waits)

    def _start_processes(self) -> int:
        for name in CONTROL_PROCESSES:
            self.herd.start_control(name)
        for process in NODE_PROCESSES:
            for host in self.lab.hosts:
                self.herd.start_node(host.name, process)
        return len(self.herd.processes)

    def _start_guests(self) -> None:
        """Write the guests down; each starts as soon as its node has joined."""
        for number, name in enumerate(GUESTS):
            self.guests[name] = self.lab.guest(
                name,
                address=f"192.0.2.{_FIRST_ADDRESS + number}",
                memory_mib=_BUSY_MEMORY_MIB if name == BUSY else _MEMORY_MIB,
                working_set_mib=_BUSY_WORKING_SET_MIB if name == BUSY else 1,
            )
        threading.Thread(target=self._await_running, daemon=True).start()
        for guest in self.guests.values():
            threading.Thread(target=self._await_answer, args=(guest,), daemon=True).start()

    def _await_running(self) -> None:
        placed = [(self.guests[name], node) for name, node in GUESTS.items()]
        try:
            self.herd.start_guests(*placed, up=False, timeout=_START_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - the main thread raises it, or is on its way down itself
            self._failure = error

    def _await_answer(self, guest: Guest) -> None:
        with suppress(LabError, OSError):  # the main thread tells of a guest that does not come
            guest.wait_up(_START_TIMEOUT_S)
            self._answering.add(guest.name)

    def _wait(self, steps: Steps, waits: list[tuple[Step, Callable[[], tuple[bool, str]]]]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while waits:
            for step, look in list(waits):
                is_done, step.detail = look()
                if is_done:
                    waits.remove((step, look))
                    steps.end(step, step.detail)
            if time.monotonic() > deadline:
                missing = "; ".join(f"{step.title}: {step.detail}" for step, _ in waits)
                raise LabError(f"not up in {_START_TIMEOUT_S:g} s: {missing}")
            self._check()
            time.sleep(_LOOK_EVERY_S)

    def _check(self) -> None:
        if self._failure is not None:
            raise LabError(f"a guest does not start: {self._failure}") from self._failure
        for name, process in self.herd.processes.items():
            if process.restarts >= _MOST_RESTARTS:
                raise LabError(f"process {name} ends again and again; see {name.replace('/', '-')}.log")
        if self.flower.has_ended:
            raise LabError("Flower has ended; see flower.log")

    def _look_at_processes(self) -> tuple[bool, str]:
        cluster = self.herd.cluster
        ready = [node.name for node in cluster.nodes() if node.is_ready]
        state = cluster.store.redis.hget(keys.IDENTITY, "state") or "new"
        consumed = [
            "control",
            "liveness",
            *(f"node.{h.name}.{r}" for h in self.lab.hosts for r in ("migrate", "lifecycle")),
        ]
        listening = int(cluster.store.redis.exists(*(f"_kombu.binding.{queue}" for queue in consumed)))
        is_done = len(ready) == len(self.lab.hosts) and state == "normal" and listening == len(consumed)
        return is_done, f"nodes Ready: {' '.join(ready) or 'none'}; workers: {listening} of {len(consumed)}"

    def _look_at_flower(self) -> tuple[bool, str]:
        is_done = self.flower.answers()
        return is_done, f"{self.flower.url}" if is_done else ""

    def _look_at_guests(self) -> tuple[bool, str]:
        running = [vm for vm in self.herd.cluster.vms() if vm.status.phase is VmPhase.RUNNING]
        is_done = len(running) == len(self._answering) == len(self.guests)
        return is_done, f"{len(running)} running, {len(self._answering)} answer"

    def down(self) -> None:
        """Remove everything; safe on a herd that came up by half."""
        self.flower.stop()
        if self._herd is not None:
            self._herd.down()
        if self._is_ours:
            self.lab.down()

    @property
    def _is_ours(self) -> bool:
        """Whether the lab of our name is not another process's, which we were refused."""
        return owner_of(self.lab.name) in (None, os.getpid())

    def keep_logs(self) -> Path | None:
        """Copy the logs to where they outlive the lab; None if there are none."""
        if not self._is_ours or not self.lab.logs.exists():
            return None
        folder = Path(tempfile.mkdtemp(prefix="vmherd-demo-"))
        for name in ("logs", "console"):
            with suppress(OSError, shutil.Error):  # files come and go; what can be had is had
                shutil.copytree(self.lab.directory / name, folder / name)
        return folder


def usual_bandwidth() -> int:
    """The product's own default, MiB/s."""
    return FIVE_GBIT_IN_MIB_S
