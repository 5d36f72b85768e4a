"""`vmherd drain`: have nodes emptied, and watch it. The control plane does it, whatever becomes of the command."""

import getpass
import os
import socket
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_client
from orchestrator.cli.ages import duration, memory
from orchestrator.cli.arguments import parse_duration
from orchestrator.cli.output import AsDocument, Documents, Output, document, render
from orchestrator.cli.progress import working
from orchestrator.cli.tables import clean
from orchestrator.cli.terminal import Failures, tell
from orchestrator.cli.waiting import INTERRUPTED, Bars, Show, Watched, showing
from orchestrator.client import Client, Scope
from orchestrator.client.following import follow
from orchestrator.errors import NotFound, VmherdError
from orchestrator.planner.drain import DrainPlan, eta_s
from orchestrator.resources import Key, NodeDrain, VirtualMachineOperation
from orchestrator.resources.drain import DrainPhase, DrainSpec, VmState
from orchestrator.resources.meta import make_key, split_key
from orchestrator.store import Change, ChangeType
from orchestrator.store.store import Loaded

EXAMPLES = """Examples:

$ vmherd drain node-1 --ignore-daemonsets --delete-emptydir-data

$ vmherd drain node-1 --dry-run

$ vmherd drain node-1 --pod-selector vm.kubevirt.internal.virtualization.deckhouse.io/name --timeout 30m

Ctrl-C ends the drain: what has not begun is dropped, the node stays cordoned. Without the command it goes on.
"""
_SAY_EVERY_S = 10.0
"""In a pipe: how often what is left is said though nothing else is."""


def _parse_timeout(text: str) -> float:
    """Read a duration, as kubectl does: `0` and `0s` are none at all."""
    return 0.0 if text in {"0", "0s"} else parse_duration(text)


def drain(  # noqa: PLR0913, PLR0917 - a command's options
    nodes: Annotated[list[str], typer.Argument(metavar="NODE", help="Names of nodes.")],
    ignore_daemonsets: Annotated[
        bool, typer.Option("--ignore-daemonsets", help="Taken as kubectl takes it: there are none here.")
    ] = False,
    delete_emptydir_data: Annotated[
        bool, typer.Option("--delete-emptydir-data", help="Taken as kubectl takes it: VMs keep their disks.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Taken as kubectl takes it: no VM is deleted.")] = False,
    grace_period: Annotated[
        int, typer.Option("--grace-period", metavar="SECONDS", help="Taken as kubectl takes it.", show_default=False)
    ] = -1,
    pod_selector: Annotated[
        str,
        typer.Option("--pod-selector", metavar="SELECTOR", help="Only VMs with these labels.", show_default=False),
    ] = "",
    timeout: Annotated[
        float,
        typer.Option("--timeout", parser=_parse_timeout, metavar="DURATION", help="It has failed then. 0: never."),
    ] = "0",  # type: ignore[assignment] # typer parses the default too
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say where each VM would go, in which order, and how long it takes.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Though the rest of the herd has no place for some of the VMs.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Watch it until it has ended.")] = True,
    output: AsDocument = None,
) -> None:
    """Empty nodes: cordon them, and move their virtual machines away by live migration.

    Ends with code 0 when all nodes are empty. VMs that can't migrate are named, and waited for; the VM's annotation
    vmherd.dev/maintenance-strategy: ShutDown has such a one shut down.
    """
    del ignore_daemonsets, delete_emptydir_data, force, grace_period  # there is nothing here that they are about
    spec = DrainSpec(requested_by=who(), selector=pod_selector, timeout_s=timeout, partial=partial)
    names = list(dict.fromkeys(nodes))
    if output is not None and wait and not dry_run:
        raise typer.BadParameter("-o is for --dry-run and --no-wait: what is watched is told in lines")
    with open_client() as client:
        if dry_run:
            with working("plans where each VM would go"):
                plan = client.plan_drain(names, spec)
            _show_plan(names, plan, output)
            return
        begun: list[NodeDrain] | None = None
        before: dict[str, NodeDrain | None] = {}
        try:
            before = {name: client.find(NodeDrain, Key(name)) for name in names}
            with working("looks for a place for each VM"):
                begun = client.begin_drains(names, spec)
            if output is not None:
                terminal.write(render(begun, Output(output.value), is_list=len(begun) > 1))
                return
            for name in names:
                terminal.write(f"node/{name} cordoned")
            if wait:
                _watch(client, begun)
        except KeyboardInterrupt:
            _stop(client, names if begun is not None else _begun_since(client, before))
            raise typer.Exit(INTERRUPTED) from None


def who() -> str:
    """Name the person who gave the command."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


# --- the plan ---------------------------------------------------------------------------------------------------------


def _as_data(nodes: list[str], plan: DrainPlan) -> dict[str, Any]:
    return {
        "nodes": nodes,
        "moves": [
            {
                "vm": str(move.job.vm),
                "memoryMib": move.job.memory_mib,
                "source": move.job.source,
                "target": move.job.target,
                "beginsS": round(move.begins_s, 1),
                "takesS": round(move.job.seconds, 1),
            }
            for move in plan.moves
        ],
        "shutDown": {str(key): why for key, why in plan.shut_down.items()},
        "stay": {str(key): why for key, why in plan.stay.items()},
        "withoutPlace": {str(key): why for key, why in plan.without_place.items()},
        "seconds": round(plan.seconds, 1),
    }


def _show_plan(nodes: list[str], plan: DrainPlan, output: Documents | None) -> None:
    if output is None:
        _show_lines(nodes, plan)
    else:
        terminal.write(document(_as_data(nodes, plan), output))
    failures = Failures()
    if problem := plan.problem():
        failures.add(problem)
    failures.end()


def _show_lines(nodes: list[str], plan: DrainPlan) -> None:
    rows = [
        (
            str(number),
            move.job.vm,
            memory(move.job.memory_mib),
            move.job.source,
            move.job.target,
            duration(timedelta(seconds=move.begins_s)),
            duration(timedelta(seconds=move.job.seconds)),
        )
        for number, move in enumerate(plan.moves, 1)
    ]
    titles = ("ORDER", "VM", "MEMORY", "FROM", "TO", "BEGINS", "TAKES")
    if rows:
        widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
        for row in (titles, *rows):
            terminal.write("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for key, why in plan.shut_down.items():
        terminal.write(f"{key} is shut down, and started where it may run: {clean(why)}")
    for key, why in plan.stay.items():
        terminal.write(f"{key} can't migrate, and is waited for: {clean(why)}")
    total = sum(move.job.memory_mib for move in plan.moves)
    takes = duration(timedelta(seconds=plan.seconds))
    terminal.write(f"{', '.join(nodes)}: {len(plan.moves)} VMs, {memory(total)}, about {takes}")


# --- watching ---------------------------------------------------------------------------------------------------------


class _View:
    """What is watched, and what was said of it.

    Args:
        begun: The drains, as they were begun.
        show: Shows each VM's operation.
    """

    def __init__(self, begun: Iterable[NodeDrain], show: Show) -> None:
        self.drains = {drain.name: drain for drain in begun}
        self.show = show
        self.operations: dict[Key, VirtualMachineOperation] = {}
        self._said: dict[str, tuple[str, float]] = {}
        self._bars: dict[str, object] = {}
        self._uids = {drain.name: drain.metadata.uid for drain in begun}

    def take(self, found: Loaded | Change) -> None:
        """Take a list or a change in."""
        if isinstance(found, Loaded):
            for resource in found.resources[VirtualMachineOperation.kind_name].values():
                self._take(resource)
            for name in self.drains:
                self._follow(name, found.resources[NodeDrain.kind_name].get(Key(name)))
        elif isinstance(found.resource, NodeDrain) and found.resource.name in self.drains:
            self._follow(found.resource.name, None if found.type is ChangeType.DELETED else found.resource)
        elif found.type is not ChangeType.DELETED:
            self._take(found.resource)
        for name in self.drains:
            self._show(name)

    def _take(self, resource: object) -> None:
        if isinstance(resource, VirtualMachineOperation):
            self.operations[resource.key] = resource

    def _follow(self, name: str, current: object) -> None:
        drain = self.drains[name]
        if isinstance(current, NodeDrain) and current.metadata.uid == self._uids[name]:
            self.drains[name] = current
        elif drain.status.phase is DrainPhase.DRAINING:  # gone, or another one bears its name
            other = "" if current is None else ", and the node has another drain by now"
            self.drains[name] = drain.with_status(phase=DrainPhase.CANCELLED, message=f"it was deleted{other}")

    def by_name(self, drain: NodeDrain) -> dict[str, VirtualMachineOperation]:
        """Give the operations that a drain names."""
        found: dict[str, VirtualMachineOperation] = {}
        for key, vm in drain.vms.items():
            operation = self.operations.get(make_key(vm.operation, split_key(Key(key))[0])) if vm.operation else None
            if operation is not None:
                found[operation.name] = operation
        return found

    def _show(self, name: str) -> None:
        drain = self.drains[name]
        operations = self.by_name(drain)
        for operation in operations.values():
            self.show.update(Watched(operation))
        left = eta_s(drain, operations) if drain.is_open else None
        eta = f"; about {duration(timedelta(seconds=left))} left" if left is not None else ""
        text = f"{name}: {drain.status.phase.value}: {clean(drain.status.message)}"
        if isinstance(self.show, Bars):
            self._draw(drain, clean(drain.status.message) + eta)
            return
        said, at = self._said.get(name, ("", 0.0))
        if said != text or (eta and time.monotonic() - at >= _SAY_EVERY_S):
            self._said[name] = (text, time.monotonic())
            terminal.write(text + eta)

    def _draw(self, drain: NodeDrain, message: str) -> None:
        assert isinstance(self.show, Bars)  # noqa: S101 - the caller looked
        progress = self.show.progress
        total = sum(vm.memory_mib for vm in drain.vms.values()) or 1
        left = sum(vm.memory_mib for vm in drain.left().values())
        task = self._bars.get(drain.name)
        if task is None:
            task = self._bars[drain.name] = progress.add_task(f"node {drain.name}", phase="", message="", total=100)
        progress.update(
            task,  # type: ignore[arg-type] # rich's NewType of int, which is loaded late
            completed=100 * (total - left) / total,
            phase=drain.status.phase.value,
            message=message,
        )

    def is_over(self) -> bool:
        """Whether all drains have ended."""
        return not any(drain.status.phase is DrainPhase.DRAINING for drain in self.drains.values())


def _watch(client: Client, begun: list[NodeDrain]) -> None:
    with showing() as show:
        view = _View(begun, show)
        scope = Scope((NodeDrain, VirtualMachineOperation))
        for found in follow(client, scope, show.say, is_patient=True):
            if found is not None:
                view.take(found)
            if view.is_over():
                break
    failures = Failures()
    for name, drain in view.drains.items():
        if drain.status.phase is DrainPhase.DRAINED:
            terminal.write(f"node/{name} drained")
        else:
            failures.add(f"node/{name}: {drain.status.message}")
    failures.end()


def _begun_since(client: Client, before: Mapping[str, NodeDrain | None]) -> list[str]:
    """Name the nodes whose drain this command began before it was interrupted; say of the others what is known.

    A drain that somebody else began is not ours to end, and of a request whose answer never came nobody knows.

    Args:
        client: To look with.
        before: Each node's drain, as it was when the command began.
    """
    ours = []
    for name, was in before.items():
        look = f"vmherd describe drain {name}"
        try:
            drain = client.find(NodeDrain, Key(name))
        except VmherdError as error:
            tell(f"node {name}: whether its drain has begun is not known: {error}. {look}")
            continue
        is_draining = drain is not None and drain.status.phase is DrainPhase.DRAINING
        if drain is None or not is_draining:
            tell(f"node {name}: no drain of it has begun; if a request was still under way, {look} tells")
        elif _identity(drain) != _identity(was) and drain.spec.requested_by == who():
            ours.append(name)
        else:
            by = drain.spec.requested_by or drain.spec.cause.value
            tell(f"node {name}: it is being drained, as {by} asked, and that goes on. {look}")
    return ours


def _identity(drain: NodeDrain | None) -> tuple[str, datetime | None]:
    """Tell a drain from another of the same node: it may be begun anew under the same document."""
    return ("", None) if drain is None else (drain.metadata.uid, drain.status.started_at)


def _stop(client: Client, nodes: list[str]) -> None:
    """End drains for a person who pressed Ctrl-C, and say what goes on."""
    for name in nodes:
        try:
            drain = client.cancel_drain(name, f"stopped by {who()}")
        except NotFound:
            continue  # it had not begun
        except VmherdError as error:
            tell(f"node {name}: the drain could not be stopped, and goes on: {error}")
            continue
        moving = sorted(key.partition("/")[2] for key, vm in drain.vms.items() if vm.state is VmState.MOVING)
        if drain.status.phase is DrainPhase.DRAINED:
            tell(f"node {name} is drained")
            continue
        goes_on = f"; still moving: {', '.join(moving)}" if moving else "; nothing is under way"
        tell(f"node {name}: the drain is stopped{goes_on}. It stays cordoned: vmherd uncordon {name}")
