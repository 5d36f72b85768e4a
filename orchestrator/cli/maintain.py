"""`vmherd maintain`: a rolling maintenance, and whoever runs its hooks; `vmherd maintenance`: pause, resume, stop.

The control plane empties nodes, waits for them and lets them take VMs again, whether this command runs or not. Only the
hooks are run by it, here. When it dies, it is given the same name and goes on; what it ran at that moment is run again
when its claim has run out.
"""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Annotated
from uuid import uuid4

import typer

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_client
from orchestrator.cli.arguments import parse_duration
from orchestrator.cli.drain import who
from orchestrator.cli.output import AsDocument, Documents, document
from orchestrator.cli.progress import Counts, counting
from orchestrator.cli.tables import clean
from orchestrator.cli.terminal import Failures, tell
from orchestrator.cli.waiting import INTERRUPTED
from orchestrator.client import Client, Scope
from orchestrator.client.following import follow
from orchestrator.errors import OutcomeUnknown, StoreUnavailable
from orchestrator.resources import Maintenance
from orchestrator.resources.maintenance import LONGEST_OUTPUT, MaintenancePhase, MaintenanceSpec, NodeStage
from orchestrator.resources.meta import parse
from orchestrator.services.maintenances import LEASE
from orchestrator.store import Change, ChangeType
from orchestrator.store.store import Loaded

EXAMPLES = """Examples:

$ vmherd maintain node-1 node-2 node-3 --hook 'ssh $VMHERD_NODE "apt-get -y upgrade && reboot"' --wait-reboot

$ vmherd maintain node-1 node-2 node-3 --hook ./upgrade.sh --parallel auto --name october

A hook is run here by `sh -c`, at least once for each node: it has to bear being run again. Ctrl-C pauses the
maintenance; `vmherd maintain --name NAME` with the same nodes and hook goes on with it.
"""
PAUSE_EXAMPLE = """Example:

$ vmherd maintenance pause october
"""
RESUME_EXAMPLE = """Example:

$ vmherd maintenance resume october
"""
STOP_EXAMPLE = """Example:

$ vmherd maintenance stop october
"""
_TIMED_OUT = 124
"""As timeout(1) says it."""
_KILL_AFTER_S = 10.0

maintenance = typer.Typer(name="maintenance", help="Pause, resume and stop rolling maintenances.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The maintenance's name.")]


def _parallel(text: str) -> int:
    if text == "auto":
        return 0
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a number from 1 nor auto")
    return int(text)


def _seconds(text: str) -> float:
    return 0.0 if text in {"0", "0s"} else parse_duration(text)


def maintain(  # noqa: PLR0913, PLR0917 - a command's options
    nodes: Annotated[list[str], typer.Argument(metavar="NODE", help="Names of nodes, in the order of their turns.")],
    hook: Annotated[str, typer.Option("--hook", metavar="COMMAND", help="Run for each node when it is empty.")],
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="Of the maintenance; one that is there goes on.")
    ] = "",
    parallel: Annotated[
        int,
        typer.Option(
            "--parallel",
            parser=_parallel,
            metavar="N|auto",
            help="Nodes away at a time; auto: as many as can be spared.",
        ),
    ] = "1",  # type: ignore[assignment] # typer parses the default too
    timeout: Annotated[
        float, typer.Option("--timeout", parser=_seconds, metavar="DURATION", help="Of each node's drain. 0: never.")
    ] = "0",  # type: ignore[assignment]
    hook_timeout: Annotated[
        float, typer.Option("--hook-timeout", parser=_seconds, metavar="DURATION", help="Of each run. 0: never.")
    ] = "0",  # type: ignore[assignment]
    ready_timeout: Annotated[
        float,
        typer.Option("--ready-timeout", parser=_seconds, metavar="DURATION", help="For a node's return. 0: for ever."),
    ] = "0",  # type: ignore[assignment]
    wait_reboot: Annotated[
        bool, typer.Option("--wait-reboot", help="A node is back only when its host has booted anew.")
    ] = False,
    bring_back: Annotated[bool, typer.Option("--bring-back", help="Move home what was moved off a node.")] = False,
    output: AsDocument = None,
) -> None:
    """Work on nodes one after another: each is emptied, the hook is run, and it takes virtual machines again.

    Nodes are begun while the rest of the herd has room for what runs on them. A hook that fails pauses it all. Ends
    with code 0 when all nodes are done. The document of -o is the maintenance at its end.
    """
    spec = parse(
        MaintenanceSpec,
        {
            "nodes": tuple(dict.fromkeys(nodes)),
            "hook": hook,
            "parallel": parallel,
            "drainTimeoutS": timeout,
            "hookTimeoutS": hook_timeout,
            "readyTimeoutS": ready_timeout,
            "reboots": wait_reboot,
            "bringBack": bring_back,
            "requestedBy": who(),
        },
    )
    with open_client() as client:
        found = client.begin_maintenance(name or f"maintenance-{uuid4().hex[:5]}", spec)
        if output is None:
            terminal.write(f"maintenance/{found.name}: {found.status.phase.value}, {len(found.spec.nodes)} nodes")
        with counting(quiet=output is not None) as show:
            executor = _Executor(client, found, show)
            executor.run()
        executor.end(output)


@maintenance.command("pause", epilog=PAUSE_EXAMPLE)
def pause(name: Name, output: AsDocument = None) -> None:
    """Begin with no node and no hook any more; what has begun comes to its end."""
    with open_client() as client:
        _tell(client.pause_maintenance(name, f"paused by {who()}"), output)


@maintenance.command("resume", epilog=RESUME_EXAMPLE)
def resume(name: Name, output: AsDocument = None) -> None:
    """Go on; a node that failed goes on from where it did. Its hooks are run by `vmherd maintain --name NAME`."""
    with open_client() as client:
        _tell(client.resume_maintenance(name), output)


@maintenance.command("stop", epilog=STOP_EXAMPLE)
def stop(name: Name, output: AsDocument = None) -> None:
    """End it: a hook that runs comes to its end, its node takes virtual machines again, and nothing else is begun."""
    with open_client() as client:
        _tell(client.stop_maintenance(name, f"stopped by {who()}"), output)


def _tell(found: Maintenance, output: Documents | None) -> None:
    line = f"maintenance/{found.name} {found.status.phase.value.lower()}"
    terminal.write(line if output is None else document(found.manifest(), output))


# --- running hooks ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Run:
    """A hook that runs.

    Attributes:
        renewed_at: When it was last said that it goes on (`time.monotonic`).
        killed_at: When it was told to end, as its time was over.
        is_told: Its end was told, and may be on record.
    """

    node: str
    process: "subprocess.Popen[bytes]"
    output: IO[bytes]
    began_at: float = field(default_factory=time.monotonic)
    renewed_at: float = field(default_factory=time.monotonic)
    killed_at: float | None = None
    is_told: bool = False


class _Executor:
    """Runs a maintenance's hooks until it is over, and tells how far it is."""

    def __init__(self, client: Client, found: Maintenance, show: Counts) -> None:
        self.client = client
        self._show = show
        self.maintenance = found
        self._hook = found.spec.hook  # as it was given here: no one else says what this machine runs
        self.holder = f"{socket.gethostname()}/{os.getpid()}/{uuid4().hex[:8]}"
        self.runs: dict[str, _Run] = {}
        self._begun: set[tuple[str, int]] = set()
        self._said: dict[str, str] = {}
        self._is_interrupted = False

    def run(self) -> None:
        """Follow it until it is over, or paused with nothing left to run here."""
        with _interrupts(self._interrupted):
            for found in follow(self.client, Scope((Maintenance,)), tell, is_patient=True):
                self._take(found)
                try:
                    self._tend()
                    is_over = self._is_over()
                except (StoreUnavailable, OutcomeUnknown) as error:
                    is_over = self._is_interrupted and not self.runs
                    more = f"it could not be paused: vmherd maintenance pause {self.maintenance.name}"
                    tell(f"{error}; {more if is_over else 'goes on when it is back'}")
                if is_over:
                    break

    def _take(self, found: Loaded | Change | None) -> None:
        if isinstance(found, Loaded):
            self._follow(found.resources[Maintenance.kind_name].get(self.maintenance.key))
        elif found is not None and found.resource.key == self.maintenance.key:
            self._follow(None if found.type is ChangeType.DELETED else found.resource)
        for name in self.maintenance.spec.nodes:
            node = self.maintenance.node(name)
            text = f"{name}: {node.stage.value}" + (f": {clean(node.message)}" if node.message else "")
            if self._said.get(name) != text and (name in self._said or node.stage is not NodeStage.WAITING):
                self._show.write(text)
            self._said[name] = text
        stages = [self.maintenance.node(name).stage for name in self.maintenance.spec.nodes]
        self._show.update("nodes done", stages.count(NodeStage.DONE), len(stages))

    def _follow(self, current: object) -> None:
        if isinstance(current, Maintenance) and current.metadata.uid == self.maintenance.metadata.uid:
            self.maintenance = current
        elif self.maintenance.is_open:  # gone, or another one bears its name
            self.maintenance = self.maintenance.with_status(phase=MaintenancePhase.STOPPED, message="it was deleted")

    def _tend(self) -> None:
        for run in list(self.runs.values()):
            self._look(run)
        self._begin_claimed()
        while self.maintenance.status.phase is MaintenancePhase.RUNNING and not self._is_interrupted:
            if not any(self.maintenance.node(n).stage is NodeStage.DRAINED for n in self.maintenance.spec.nodes):
                return
            if self.client.claim_hook(self.maintenance.name, self.holder) is None:
                return
            self._follow(self.client.find(Maintenance, self.maintenance.key))
            self._begin_claimed()

    def _begin_claimed(self) -> None:
        """Run what is on record as ours, also where no answer to the claim came."""
        for name in self.maintenance.spec.nodes if self.maintenance.is_open else ():
            node = self.maintenance.node(name)
            if node.stage is NodeStage.HOOK and node.holder == self.holder and (name, node.attempts) not in self._begun:
                self._begun.add((name, node.attempts))
                self._begin(name, node.attempts)

    def _begin(self, node: str, attempt: int) -> None:
        about = {"VMHERD_NODE": node, "VMHERD_MAINTENANCE": self.maintenance.name, "VMHERD_ATTEMPT": str(attempt)}
        output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with its run
        process = subprocess.Popen(
            ["/bin/sh", "-c", self._hook],
            env={**os.environ, **about},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is for us
        )
        self.runs[node] = _Run(node, process, output)
        self._show.write(f"{node}: hook begun")

    def _look(self, run: _Run) -> None:
        now = time.monotonic()
        limit = self.maintenance.spec.hook_timeout_s
        code = run.process.poll()
        if code is None:
            if limit and now - run.began_at >= limit:
                self._kill(run, now)
            if now - run.renewed_at >= LEASE.total_seconds() / 3:
                run.renewed_at = now
                if not self.client.renew_hook(self.maintenance.name, run.node, self.holder):
                    tell(f"{run.node}: the claim on its hook has run out: it may be run again beside this run")
            return
        run.output.seek(0, os.SEEK_END)
        run.output.seek(max(0, run.output.tell() - 4 * LONGEST_OUTPUT))
        text = run.output.read().decode(errors="replace").strip()
        code = _TIMED_OUT if run.killed_at is not None else code
        try:
            counts = self.client.end_hook(self.maintenance.name, run.node, self.holder, code, text)
        except OutcomeUnknown:
            run.is_told = True  # it is told once more, and counts if it did
            raise
        if not counts and not run.is_told:
            tell(f"{run.node}: its hook ended with code {code}, which counts no more: its claim had run out")
        run.output.close()
        del self.runs[run.node]
        self._show.write(f"{run.node}: hook ended with code {code}")

    @staticmethod
    def _kill(run: _Run, now: float) -> None:
        if run.killed_at is None:
            run.killed_at = now
            os.killpg(run.process.pid, signal.SIGTERM)
        elif now - run.killed_at >= _KILL_AFTER_S:
            os.killpg(run.process.pid, signal.SIGKILL)

    def _interrupted(self) -> None:
        if self._is_interrupted:
            raise KeyboardInterrupt
        self._is_interrupted = True

    def _is_over(self) -> bool:
        if self._is_interrupted:
            if self.maintenance.status.phase is MaintenancePhase.RUNNING:
                self.maintenance = self.client.pause_maintenance(self.maintenance.name, f"paused by {who()}, by Ctrl-C")
                if self.runs:
                    tell(f"paused; waits for the hook of {', '.join(sorted(self.runs))}. Ctrl-C once more: without it")
            return not self.runs
        if self.runs or not self.maintenance.is_open:
            return not self.runs
        is_paused = self.maintenance.status.phase is MaintenancePhase.PAUSED
        return is_paused and any(
            self.maintenance.node(name).stage is NodeStage.FAILED for name in self.maintenance.spec.nodes
        )

    def end(self, output: Documents | None = None) -> None:
        """Say what came of it; ends the command with a code of its own unless all nodes are done."""
        found, failures = self.maintenance, Failures()
        line = f"maintenance/{found.name}: {found.status.phase.value}: {clean(found.status.message)}"
        terminal.write(line if output is None else document(found.manifest(), output))
        for name in found.spec.nodes:
            node = found.node(name)
            if node.stage is NodeStage.FAILED:
                failures.add(f"{name}: {node.message}" + (f": {clean(node.output)}" if node.output else ""))
        if found.is_open:
            tell(
                f"it is {found.status.phase.value}: vmherd maintenance resume|stop {found.name}; its hooks are run by "
                f"`vmherd maintain ... --name {found.name}`"
            )
        if self._is_interrupted:
            raise typer.Exit(INTERRUPTED)
        if found.status.phase is not MaintenancePhase.COMPLETED:
            raise typer.Exit(1)
        failures.end()


@contextmanager
def _interrupts(call: Callable[[], None]) -> Iterator[None]:
    """Have a function called at each Ctrl-C, in place of an error in the middle of whatever is done then."""
    before = signal.signal(signal.SIGINT, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
