"""`vmherd delete`: a migration is aborted by it, a VM is stopped and removed."""

import typer

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_client
from orchestrator.cli.arguments import KindName, Names, Namespace, Timeout, Wait, parse_targets
from orchestrator.cli.terminal import Failures, tell
from orchestrator.cli.waiting import INTERRUPTED, Silent, Watched, wait_for
from orchestrator.client import Client
from orchestrator.errors import Conflict, NotFound, Refused
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    Node,
    Reason,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
    make_key,
)

EXAMPLES = """Examples:

$ vmherd delete vmop evict-linux-vm-4f1c9

$ vmherd delete vm old-vm

Deleting a migration aborts it; the VM runs on where it is. A stop or a start can't be taken back.

Deleting a virtual machine stops it first.
"""


def delete(
    kind: KindName,
    names: Names = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    wait: Wait = True,
    timeout: Timeout = None,
) -> None:
    """Delete operations, which aborts migrations, virtual machines, or classes that none of them names.

    A virtual machine that runs is stopped first: it is Terminating until its guest has powered off.
    """
    what, chosen = parse_targets(kind, names, needs_name=True)
    if not issubclass(what, VirtualMachine | VirtualMachineClass | VirtualMachineOperation):
        hint = "; `vmherd node expel` takes a host's access away" if what is Node else ""
        raise typer.BadParameter(f"a {what.kind_name} can't be deleted{hint}")
    failures = Failures()
    with open_client() as client:
        aborted: list[VirtualMachineOperation] = []
        for name in chosen:
            try:
                deleted = client.delete(what, make_key(name, namespace if what.namespaced else ""))
            except (Conflict, NotFound, Refused) as error:
                failures.add(str(error))
                continue
            terminal.write(f'{what.kind_name.lower()} "{name}" deleted')
            if isinstance(deleted, VirtualMachineOperation) and deleted.status.grant is not None:
                aborted.append(deleted)
        if wait and aborted:
            _wait(client, aborted, timeout)
    failures.end()


def _wait(client: Client, aborted: list[VirtualMachineOperation], timeout: float | None) -> None:
    try:
        ended = wait_for(client, aborted, Silent(), timeout=timeout, until_gone=True)
    except KeyboardInterrupt:
        tell("no longer waiting; the abort goes on")
        raise typer.Exit(INTERRUPTED) from None
    for watched in ended:
        terminal.write(_outcome(watched))


def _outcome(watched: Watched) -> str:
    what = "Aborted" if watched.reason == Reason.ABORTED else watched.operation.status.phase.value
    return f'virtualmachineoperation "{watched.operation.name}": {what}: {watched.message}'
