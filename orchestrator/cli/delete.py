"""`vmherd delete`: a migration is aborted by it, a VM is stopped and removed."""

import time

import typer

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_client
from orchestrator.cli.ages import span
from orchestrator.cli.arguments import KindName, Names, Namespace, Timeout, Wait, parse_targets
from orchestrator.cli.output import AsDocument, Results
from orchestrator.cli.progress import counting
from orchestrator.cli.terminal import Failures, tell
from orchestrator.cli.waiting import INTERRUPTED, Watched, showing, wait_for
from orchestrator.client import Client, Scope
from orchestrator.client.following import follow
from orchestrator.errors import Conflict, NotFound, Refused, WaitTimeout
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    Node,
    Reason,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
    VmPhase,
    make_key,
)
from orchestrator.store import Change, ChangeType
from orchestrator.store.store import Loaded

EXAMPLES = """Examples:

$ vmherd delete vmop evict-linux-vm-4f1c9

$ vmherd delete vm old-vm

Deleting a migration aborts it; the VM runs on where it is. A stop or a start can't be taken back.

Deleting a virtual machine stops it first. With --no-wait it goes on without the command.
"""


def delete(
    kind: KindName,
    names: Names = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    wait: Wait = True,
    timeout: Timeout = None,
    output: AsDocument = None,
) -> None:
    """Delete operations, which aborts migrations, virtual machines, or classes that none of them names.

    A virtual machine that runs is stopped first: it is Terminating until its guest has powered off, and waited for.
    """
    what, chosen = parse_targets(kind, names, needs_name=True)
    if not issubclass(what, VirtualMachine | VirtualMachineClass | VirtualMachineOperation):
        hint = "; `vmherd node expel` takes a host's access away" if what is Node else ""
        raise typer.BadParameter(f"a {what.kind_name} can't be deleted{hint}")
    failures, results, quiet = Failures(), Results(output, is_list=True), output is not None
    with open_client() as client:
        aborted: list[VirtualMachineOperation] = []
        stopping: list[VirtualMachine] = []
        for name in chosen:
            try:
                key = make_key(name, namespace if what.namespaced else "")
                deleted = client.delete(what, key)
            except (Conflict, NotFound, Refused) as error:
                failures.add(str(error))
                continue
            results.add(f'{what.kind_name.lower()} "{name}" deleted', kind=what.kind_name, key=key, deleted=True)
            if isinstance(deleted, VirtualMachineOperation) and deleted.status.grant is not None:
                aborted.append(deleted)
            if isinstance(deleted, VirtualMachine) and deleted.status.phase is VmPhase.TERMINATING:
                stopping.append(deleted)
        try:
            if wait and aborted:
                _wait_for_aborts(client, aborted, timeout, quiet=quiet)
            if wait and stopping:
                _wait_for_stops(client, stopping, timeout, quiet=quiet)
        except KeyboardInterrupt:
            tell(f"no longer waiting; {'the abort' if aborted else 'the deletion'} goes on")
            raise typer.Exit(INTERRUPTED) from None
    results.end()
    failures.end()


def _wait_for_aborts(
    client: Client, aborted: list[VirtualMachineOperation], timeout: float | None, *, quiet: bool
) -> None:
    with showing(quiet=quiet or not terminal.is_watched()) as show:  # into a pipe, how it ended is enough
        ended = wait_for(client, aborted, show, timeout=timeout, until_gone=True)
    for watched in ended if not quiet else ():
        terminal.write(_outcome(watched))


def _outcome(watched: Watched) -> str:
    what = "Aborted" if watched.reason == Reason.ABORTED else watched.operation.status.phase.value
    return f'virtualmachineoperation "{watched.operation.name}": {what}: {watched.message}'


def _wait_for_stops(client: Client, stopping: list[VirtualMachine], timeout: float | None, *, quiet: bool) -> None:
    deadline = None if timeout is None else time.monotonic() + timeout
    left = {vm.key: vm for vm in stopping}
    scope = Scope((VirtualMachine,), stopping[0].metadata.namespace)
    with counting(quiet=quiet) as show:
        for news in follow(client, scope, tell, is_patient=True):
            for key in [key for key, vm in left.items() if _is_gone(vm, news)]:
                show.write(f'virtualmachine "{left.pop(key).name}" is gone')
            show.update("VMs gone", len(stopping) - len(left), len(stopping))
            if not left:
                return
            if deadline is not None and time.monotonic() >= deadline:
                names = ", ".join(repr(vm.name) for vm in left.values())
                raise WaitTimeout(
                    f"VirtualMachine {names} is {VmPhase.TERMINATING} after {span(timeout or 0)}; goes on all the same"
                )


def _is_gone(vm: VirtualMachine, news: Loaded | Change | None) -> bool:
    """Whether news say that a VM is there no more: one that was created anew under its name is another."""
    match news:
        case Loaded():
            found = news.resources[VirtualMachine.kind_name].get(vm.key)
            return found is None or found.metadata.uid != vm.metadata.uid
        case Change():
            found = news.resource
            if not isinstance(found, VirtualMachine) or found.key != vm.key:
                return False
            return news.type is ChangeType.DELETED or found.metadata.uid != vm.metadata.uid
        case None:
            return False
