"""The demo's tour: what a person would try, tried for real, with what came of it."""

import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Self

from orchestrator.resources import VirtualMachineOperation, VmPhase
from tests.lab.demo_herd import BANDWIDTH_MIB_S, BUSY, INBOUND_PER_NODE, DemoHerd, usual_bandwidth
from tests.lab.demo_screen import Screen
from tests.lab.guest import Guest, GuestStatus
from tests.lab.namespaces import REPOSITORY, LabError
from tests.lab.observer import downtimes, max_concurrent, max_concurrent_per_source, stream_migrations
from tests.waiting import wait_until

FIRST = "linux-vm"
MANIFEST = f"""\
apiVersion: virtualization.deckhouse.io/v1alpha2
kind: VirtualMachineOperation
metadata:
  generateName: evict-{FIRST}-
spec:
  virtualMachineName: {FIRST}
  type: Evict
"""
PROGRAM = """\
from orchestrator import Cluster
from orchestrator.tasks import evict

with Cluster() as cluster:
    operation = cluster.evict("web-1")
    for progress in operation.progress():
        print(f"{progress.phase:<10} {progress.percent:>3} %  {progress.message[:60]}")
    print("web-1 is on", cluster.vm("web-1").status.node_name)

# The same as a Celery task, from any Celery client of this Redis:
result = evict.delay("web-2").get(timeout=60)
print("web-2 is on", result["node"], "and was stopped for", result["downtime_ms"], "ms")
"""

_COMMAND_TIMEOUT_S = 120.0
_DIRTY_MIB_S = 400
"""More than the bandwidth, by far: such a guest never converges."""
_PERCENT = 30
"""At which it is aborted: in the first pass, which ends late even if the guest gets little CPU to write with."""


class Watch:
    """A `vmherd ... -w` that runs beside: what it prints appears as it comes. A context manager that ends it."""

    def __init__(self, tour: "Tour", arguments: Sequence[str]) -> None:
        tour.screen.command(["vmherd", *arguments])
        self.lines: list[str] = []
        self._screen = tour.screen
        self._process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", *arguments],
            cwd=REPOSITORY,
            env=tour.demo.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a Ctrl-C in the terminal is the demo's to handle
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()

    def wait_for(
        self, predicate: Callable[[list[str]], object], what: str, timeout: float = _COMMAND_TIMEOUT_S
    ) -> None:
        """Wait until the lines up to now are as wanted."""
        wait_until(lambda: predicate(self.lines) or self._has_ended(), timeout, what)
        if not predicate(self.lines):
            raise LabError(f"the watch has ended: {' / '.join(self.lines)}")

    def _has_ended(self) -> bool:
        return self._process.poll() is not None and not self._thread.is_alive()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self.lines.append(line.rstrip("\n"))
                self._screen.lines(line, begin="│ ")


class Tour:
    """The tour.

    Args:
        demo: Up.
        screen: Where it is shown.
    """

    def __init__(self, demo: DemoHerd, screen: Screen) -> None:
        self.demo = demo
        self.screen = screen

    def show_herd(self) -> None:
        """Nodes and guests as the CLI shows them."""
        self.screen.say(
            "Each host has an agent, which reports what libvirt says, and two Celery workers: one for its "
            "migrations, one at a time, and one for starts and repairs."
        )
        self.vmherd("get", "nodes")
        self.vmherd("get", "vm", "-o", "wide")

    def evict_one(self) -> None:
        """One evict by manifest, with the watch beside it, and what the guest noticed of it."""
        say, guest = self.screen.say, self.demo.guests[FIRST]
        say(
            f"{FIRST} is asked to leave its node. The watch stands for a second terminal; its lines begin with "
            "[magenta]│[/]."
        )
        before, source = guest.wait_ticks(1), self._node(FIRST)
        with Watch(self, ["get", "vm", "-w"]) as watch, self.demo.lab.sampler(guest) as sampler:
            rows = len(self.demo.guests) + 1
            watch.wait_for(lambda lines: len(lines) >= rows, "the watch lists the guests")
            self.vmherd("create", "-f", "-", stdin=MANIFEST)
            is_over = re.compile(rf"{FIRST} +Running +(?!{source}\b)")
            watch.wait_for(lambda lines: any(is_over.match(line) for line in lines[rows:]), f"{FIRST} has moved")
            guest.wait_up()
            samples = sampler.stop()
        self._compare(guest, before, source)
        stopped_ms = downtimes(self.demo.lab)[guest.domain][-1] * 1000
        say(
            "The guest went on where it was: the same boot, more ticks. It stood still for "
            f"[bold]{stopped_ms:.0f} ms[/] (by the two QEMUs' own events). Pinged every 10 ms, it was silent for "
            f"{samples.longest_gap_s * 1000:.0f} ms at the longest: that has the network's part in it."
        )

    def evict_several(self) -> None:
        """An evict from each host and a second one from the fullest, all at once."""
        say = self.screen.say
        names = self._one_of_each_host()
        say(
            f"Now one guest of each host at once, and a second one of {self._node(names[-1])}. A host sends one at a "
            f"time, so that one waits its turn. (Here a node may receive {INBOUND_PER_NODE} at a time, by default 1; "
            f"and a migration gets {BANDWIDTH_MIB_S} MiB/s, by default {usual_bandwidth()}: else it were over at once.)"
        )
        since = max((m.ended_at for m in stream_migrations(self.demo.lab)), default=0.0)
        self.attached("evict", *names)
        moves = [m for m in stream_migrations(self.demo.lab) if m.began_at > since]
        begin = min(m.began_at for m in moves)
        self.screen.table(
            ("GUEST", "FROM", "TO", "BEGAN", "ENDED"),
            [
                (
                    m.domain.partition(".")[2],
                    m.source,
                    m.target,
                    f"{m.began_at - begin:.1f} s",
                    f"{m.ended_at - begin:.1f} s",
                )
                for m in moves
            ],
        )
        say(
            f"So the QEMUs' own record has it: {max_concurrent(moves)} at once in the herd, and never more than "
            f"{max(max_concurrent_per_source(moves).values())} out of one host."
        )

    def abort_one(self) -> None:
        """An evict of a guest that writes faster than the migration sends, and its abort."""
        say, name = self.screen.say, BUSY
        guest = self.demo.guests[name]
        say(
            f"{name} now rewrites its memory faster than {BANDWIDTH_MIB_S} MiB/s can carry it away: its migration "
            "would never end. Deleting the operation aborts it, and the guest runs on where it is."
        )
        guest.set_dirty_rate(_DIRTY_MIB_S)
        before, source = guest.wait_ticks(20), self._node(name)
        operation = self.vmherd("evict", name, "--no-wait").strip()
        with Watch(self, ["get", "vmop", operation, "-w"]) as watch:
            self._await_half(operation)
            self.vmherd("delete", "vmop", operation)
            watch.wait_for(lambda lines: any("Deleted" in line for line in lines), "the abort")
            was_too_late = any("Completed" in line for line in watch.lines)
        guest.set_dirty_rate(0)
        self._compare(guest, before, source)
        say("This time the abort came too late: the guest has moved." if was_too_late else "It never left its node.")

    def run_program(self) -> None:
        """The Python API, and Celery's own."""
        self.screen.say("The same from Python:")
        self.screen.program(PROGRAM, "python")
        self.screen.command(["python", "evict_two.py"])
        self._run([sys.executable, "-c", PROGRAM])

    # --- commands -------------------------------------------------------------------------------------------------

    def vmherd(self, *arguments: str, stdin: str | None = None) -> str:
        """Run a command of ours, show it and what it prints; returns that."""
        self.screen.command(["vmherd", *arguments], stdin=stdin)
        return self._run([sys.executable, "-m", "orchestrator.cli", *arguments], stdin)

    def attached(self, *arguments: str) -> None:
        """Run a command of ours on our own terminal, so that it can draw there."""
        self.screen.command(["vmherd", *arguments])
        self.screen.console.file.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", *arguments],
            cwd=REPOSITORY,
            env=self.demo.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            if code := process.wait(_COMMAND_TIMEOUT_S):
                raise LabError(f"vmherd {shlex.join(arguments)}: exit {code}")
        finally:
            process.kill()
            process.wait()
            self.screen.console.show_cursor()  # a killed one may have left it hidden

    def _run(self, argv: list[str], stdin: str | None = None) -> str:
        done = subprocess.run(
            argv,
            cwd=REPOSITORY,
            env=self.demo.environment,
            input=stdin or "",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=_COMMAND_TIMEOUT_S,
            start_new_session=True,
        )
        self.screen.lines(done.stdout)
        if done.returncode != 0:
            raise LabError(f"{shlex.join(argv[1:4])} ...: exit {done.returncode}: {done.stdout.strip()}")
        return done.stdout

    # --- the herd -------------------------------------------------------------------------------------------------

    def _node(self, name: str) -> str:
        return self.demo.herd.cluster.vm(name).status.node_name

    def _one_of_each_host(self) -> list[str]:
        """Choose a guest of each host, and a second one of the host with the most."""
        by_host: dict[str, list[str]] = {host.name: [] for host in self.demo.lab.hosts}
        for vm in self.demo.herd.cluster.vms():
            if vm.status.phase is VmPhase.RUNNING and vm.status.node_name in by_host:
                by_host[vm.status.node_name].append(vm.name)
        fullest = max(by_host.values(), key=len)
        return [names[0] for names in by_host.values() if names] + fullest[1:2]

    def _await_half(self, operation: str) -> None:
        """Wait until a good part of the guest's memory is at its target."""
        cluster = self.demo.herd.cluster

        def is_under_way() -> bool:
            now: VirtualMachineOperation = cluster.operation(operation).resource
            if not now.is_active:
                raise LabError(f"{operation} has ended before it was aborted: {now.message}")
            return now.status.progress >= _PERCENT

        wait_until(is_under_way, _COMMAND_TIMEOUT_S, f"{operation} at {_PERCENT} %", interval=0.2)

    def _compare(self, guest: Guest, before: GuestStatus, source: str) -> None:
        after = guest.wait_ticks(1)
        self.screen.table(
            ("", "BEFORE", "AFTER"),
            [
                ("node", source, self._node(guest.name)),
                ("ticks", f"{before.ticks}", f"{after.ticks}"),
                ("uptime", f"{before.uptime_s:.1f} s", f"{after.uptime_s:.1f} s"),
                ("boot id", before.boot_id[:8], after.boot_id[:8]),
            ],
        )
        if before.boot_id != after.boot_id or after.ticks <= before.ticks:
            raise LabError(f"{guest.name} is not the machine that it was: {before}, then {after}")
