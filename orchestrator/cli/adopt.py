"""`vmherd adopt` and `vmherd release`: running domains of plain libvirt hosts become VMs, and are given back.

Whoever leaves early leaves what was begun to go on: the control plane brings it to its end.
"""

import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_context
from orchestrator.cli.ages import span
from orchestrator.cli.arguments import Namespace, Timeout, Wait
from orchestrator.cli.output import AsDocument, Results, document
from orchestrator.cli.progress import Counts, counting, working
from orchestrator.cli.tables import Column, Layout, clean
from orchestrator.cli.terminal import Failures, tell
from orchestrator.cli.waiting import INTERRUPTED
from orchestrator.client import Client, Scope
from orchestrator.client.following import follow
from orchestrator.client.local import LocalClient
from orchestrator.errors import AlreadyExists, Conflict, NotFound, Refused, WaitTimeout
from orchestrator.planner.adoption import Planned
from orchestrator.resources import DEFAULT_NAMESPACE, Key, RunPolicy, VirtualMachine, find_condition, make_key
from orchestrator.services import adoption
from orchestrator.services.adoption_orders import ADOPTING, RELEASING
from orchestrator.services.context import Context
from orchestrator.store import Change, ChangeType
from orchestrator.store.store import Loaded

ADOPT_EXAMPLES = """Examples:

$ vmherd adopt --dry-run node-1

$ vmherd adopt node-1 web-1 db-1 -n shop

$ vmherd adopt node-1 --run-policy Manual
"""
RELEASE_EXAMPLES = """Examples:

$ vmherd release web-1

$ vmherd release web-1 db-1 -n shop
"""

_NAMED = tuple[str, VirtualMachine]
"""A VM, and what it is called here: its domain's name, or its own."""

_COLUMNS: tuple[Column[VirtualMachine], ...] = tuple(
    Column(title, lambda _vm, _around: "")
    for title in ("DOMAIN", "VM", "CORES", "COREFRACTION", "MEMORY", "DISKS", "ACTION", "FINDINGS")
)


def adopt(
    node: Annotated[str, typer.Argument(metavar="NODE", help="The node that they run on.")],
    domains: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DOMAIN]...", help="Names or UUIDs. Without any: all that can be.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    run_policy: Annotated[
        RunPolicy, typer.Option("--run-policy", help="Of the virtual machines.")
    ] = RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY,
    namespace: Namespace = DEFAULT_NAMESPACE,
    wait: Wait = True,
    timeout: Timeout = None,
    output: AsDocument = None,
) -> None:
    """Take over running persistent domains of a host, without stopping them.

    Ends with code 0 when all have been taken over, or, with --dry-run, could be.
    """
    if output is not None and not dry_run:
        raise typer.BadParameter("-o is for --dry-run: what is done is told in lines, and by `vmherd get vm -o json`")
    failures = Failures()
    with open_context() as ctx:
        with working(f"asks the agent of node {node} for its domains"):
            plans, unknown = adoption.plan(ctx, node, tuple(domains or ()), namespace=namespace, run_policy=run_policy)
        if output is not None:
            terminal.write(document([_as_data(planned) for planned in plans], output))
        elif dry_run:
            _show(plans)
        refused = [planned for planned in plans if planned.is_refused]
        if not dry_run:
            begun = _begin(ctx, node, plans, namespace, failures)
            if wait and begun:
                _wait(LocalClient(ctx), begun, ADOPTING, failures, timeout)
        for name in unknown:
            failures.add(f"{name}: node {node!r} has no such domain")
        for planned in refused:
            failures.add(f"{planned.domain.name}: not adopted: {'; '.join(planned.refusals)}")
        if not plans and not unknown:
            tell(f"node {node!r} has no domain that is not a virtual machine of the herd already")
    failures.end()


def release(
    vms: Annotated[list[str], typer.Argument(metavar="VM", help="Names of adopted virtual machines.")],
    namespace: Namespace = DEFAULT_NAMESPACE,
    wait: Wait = True,
    timeout: Timeout = None,
    output: AsDocument = None,
) -> None:
    """Give adopted virtual machines back: each is defined on its node as it was, and runs on.

    Ends with code 0 when all have been given back.
    """
    failures, results = Failures(), Results(output, is_list=True)
    with open_context() as ctx:
        begun: list[_NAMED] = []
        for name in dict.fromkeys(vms):
            try:
                begun.append((name, adoption.release(ctx, make_key(name, namespace))))
            except (Conflict, NotFound, Refused) as error:
                failures.add(str(error))
        if wait and begun:
            given_back = _wait(LocalClient(ctx), begun, RELEASING, failures, timeout, quiet=output is not None)
            for key, message in given_back.items() if output is not None else ():
                results.add("", vm=key, released=True, message=message)
        else:
            for name, vm in begun:
                results.add(f"{name}: is being released", vm=vm.key, released=False, message="is being released")
    results.end()
    failures.end()


def _begin(ctx: Context, node: str, plans: Sequence[Planned], namespace: str, failures: Failures) -> list[_NAMED]:
    begun: list[_NAMED] = []
    for planned in plans:
        if planned.is_refused:
            continue
        domain = clean(planned.domain.name)
        try:
            vm = adoption.adopt(ctx, node, planned, namespace)
        except (AlreadyExists, Conflict, Refused) as error:
            failures.add(f"{domain}: not adopted: {error}")
            continue
        begun.append((domain, vm))
        notes = "".join(f"; {finding}" for finding in planned.findings)
        terminal.write(f"{domain}: is being adopted as {vm.key} ({_size(planned)}){clean(notes)}")
    return begun


def _size(planned: Planned) -> str:
    fraction = "" if planned.core_fraction == "100%" else f", coreFraction {planned.core_fraction}"
    return f"{planned.cores} cores{fraction}, {planned.memory}"


def _show(plans: Sequence[Planned]) -> None:
    if not plans:
        return
    layout = Layout(_COLUMNS, colour=False)
    rows = [tuple(clean(cell) or "<none>" for cell in _cells(planned)) for planned in plans]
    layout.fit(rows)
    terminal.write("\n".join([layout.header(), *(layout.row(row) for row in rows)]))


def _as_data(planned: Planned) -> dict[str, Any]:
    return {
        "domain": planned.domain.name,
        "name": planned.name,
        "cores": planned.cores,
        "coreFraction": planned.core_fraction,
        "memory": planned.memory,
        "disks": list(planned.disks),
        "isRefused": planned.is_refused,
        "refusals": list(planned.refusals),
        "findings": list(planned.findings),
    }


def _cells(planned: Planned) -> tuple[str, ...]:
    action = "refuse" if planned.is_refused else "adopt"
    findings = "; ".join((*planned.refusals, *planned.findings))
    size = (str(planned.cores), planned.core_fraction, planned.memory)
    return (planned.domain.name, planned.name, *size, ",".join(planned.disks), action, findings)


def _wait(
    client: Client,
    begun: Sequence[_NAMED],
    kind: str,
    failures: Failures,
    timeout: float | None,
    *,
    quiet: bool = False,
) -> dict[Key, str]:
    """Wait until each has been adopted or released, telling each step; Ctrl-C leaves it to the control plane.

    Returns:
        Those that have been, with what was said of it.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        with counting(quiet=quiet) as show:
            waiting = Waiting(client, begun, kind, failures, show)
            for news in follow(client, Scope((VirtualMachine,)), tell, is_patient=True):
                waiting.take(news)
                show.update("adopted" if kind == ADOPTING else "released", len(begun) - len(waiting.open), len(begun))
                if not waiting.open:
                    break
                if deadline is not None and time.monotonic() >= deadline:
                    names = ", ".join(name for name, _ in waiting.open.values())
                    raise WaitTimeout(f"{names}: not done after {span(timeout or 0)}; goes on all the same")
    except KeyboardInterrupt:
        tell("no longer waiting; what was begun goes on")
        raise typer.Exit(INTERRUPTED) from None
    return waiting.done


class Waiting:
    """Those that have not come to their end, and what was told of them."""

    def __init__(self, client: Client, begun: Sequence[_NAMED], kind: str, failures: Failures, show: Counts) -> None:
        self.open: dict[Key, _NAMED] = {vm.key: (name, vm) for name, vm in begun}
        self.done: dict[Key, str] = {}
        self._client = client
        self._kind = kind
        self._failures = failures
        self._show = show
        self._told: dict[Key, str] = {}

    def take(self, news: Loaded | Change | None) -> None:
        """Take in a list or a change."""
        if isinstance(news, Loaded):
            documents = news.resources[VirtualMachine.kind_name]
            for key, (_, known) in list(self.open.items()):
                current = documents.get(key)
                is_same = isinstance(current, VirtualMachine) and current.metadata.uid == known.metadata.uid
                self._look(key, current if isinstance(current, VirtualMachine) and is_same else None)
        elif isinstance(news, Change) and news.resource.key in self.open:
            changed = news.resource
            if isinstance(changed, VirtualMachine) and changed.metadata.uid == self._known(changed.key):
                self._look(changed.key, changed, is_gone=news.type is ChangeType.DELETED)

    def _known(self, key: Key) -> str:
        return self.open[key][1].metadata.uid

    def _look(self, key: Key, vm: VirtualMachine | None, *, is_gone: bool = False) -> None:
        name, known = self.open[key]
        if vm is None:  # it came to its end before we looked
            vm, is_gone = self._client.last_of(known), True
        condition = find_condition(vm.status.conditions, self._kind) if vm is not None else None
        if vm is not None and vm.status.adoption is not None and not is_gone:
            if condition is not None and self._told.get(key) != condition.message:
                self._told[key] = condition.message
                self._show.write(f"{name}: {clean(condition.message)}")
            return
        del self.open[key]
        message = clean(condition.message) if condition is not None else ""
        if self._kind == ADOPTING and not is_gone and vm is not None:
            self.done[key] = f"adopted as {vm.key}, {vm.status.phase} on node {vm.status.node_name}"
            self._show.write(f"{name}: {self.done[key]}")
        elif self._kind == RELEASING and is_gone:
            self.done[key] = message or "what came of it was not seen"
            self._show.write(f"{name}: released: {self.done[key]}")
        else:
            self._failures.add(f"{name}: {message or 'is gone; what came of it was not seen'}")
