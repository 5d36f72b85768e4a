"""`vmherd start|stop|restart|evict|migrate`: make operations, and wait for what comes of them."""

from typing import Annotated

import typer

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_client
from orchestrator.cli.arguments import Namespace, Timeout, Wait, parse_labels
from orchestrator.cli.completion import complete_nodes, complete_vms
from orchestrator.cli.output import Written, render
from orchestrator.cli.terminal import Failures
from orchestrator.cli.waiting import failure, wait_or_leave
from orchestrator.errors import Conflict, Invalid, NotFound, OutcomeUnknown, Refused, StoreUnavailable
from orchestrator.resources import DEFAULT_NAMESPACE, OperationType, VirtualMachineOperation
from orchestrator.resources.vmop import MigrateTo
from orchestrator.services import operations

START_EXAMPLE = """Example:

$ vmherd start web-1 web-2
"""

STOP_EXAMPLES = """Examples:

$ vmherd stop linux-vm

$ vmherd stop linux-vm --force
"""

RESTART_EXAMPLES = """Examples:

$ vmherd restart linux-vm

$ vmherd restart linux-vm --force --no-wait
"""

EVICT_EXAMPLES = """Examples:

$ vmherd evict linux-vm

$ vmherd evict web-1 web-2 --timeout 10m

$ vmherd delete vmop $(vmherd evict linux-vm --no-wait)
"""

MIGRATE_EXAMPLES = """Examples:

$ vmherd migrate linux-vm --node node-3

$ vmherd migrate web-1 web-2 -l rack=b,disk=ssd
"""

Vms = Annotated[list[str], typer.Argument(metavar="VM", help="Names of virtual machines.", autocompletion=complete_vms)]
Pull = Annotated[
    bool, typer.Option("--force", help="Pull the plug at once, in place of asking the guest to power off.")
]
Printed = Annotated[
    Written | None,
    typer.Option("-o", "--output", help="Print the operations, at their end unless with --no-wait, and no progress."),
]
Throttle = Annotated[
    bool | None,
    typer.Option(
        "--force/--no-force",
        help="Throttle the guest if it dirties memory too fast, or never; by default its liveMigrationPolicy says.",
        show_default=False,
    ),
]


def start(
    vms: Vms,
    namespace: Namespace = DEFAULT_NAMESPACE,
    wait: Wait = True,
    timeout: Timeout = None,
    output: Printed = None,
) -> None:
    """Start virtual machines.

    Ends with code 0 when all run.
    """
    _make(OperationType.START, vms, namespace, wait=wait, timeout=timeout, output=output)


def stop(
    vms: Vms,
    force: Pull = False,
    namespace: Namespace = DEFAULT_NAMESPACE,
    wait: Wait = True,
    timeout: Timeout = None,
    output: Printed = None,
) -> None:
    """Stop virtual machines: their guests are asked to power off, and are given their grace period.

    Takes the place of a start or a migration that is under way. Ends with code 0 when all are off.
    """
    _make(OperationType.STOP, vms, namespace, force=force or None, wait=wait, timeout=timeout, output=output)


def restart(
    vms: Vms,
    force: Pull = False,
    namespace: Namespace = DEFAULT_NAMESPACE,
    wait: Wait = True,
    timeout: Timeout = None,
    output: Printed = None,
) -> None:
    """Stop virtual machines and start them anew, which brings changes into effect that wait for it.

    Ends with code 0 when all run again.
    """
    _make(OperationType.RESTART, vms, namespace, force=force or None, wait=wait, timeout=timeout, output=output)


def evict(
    vms: Vms,
    force: Throttle = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    wait: Wait = True,
    timeout: Timeout = None,
    output: Printed = None,
) -> None:
    """Move virtual machines off their nodes; where to is chosen when there is room.

    Ends with code 0 when all have moved.
    """
    _make(OperationType.EVICT, vms, namespace, force=force, wait=wait, timeout=timeout, output=output)


def migrate(
    vms: Vms,
    node: Annotated[
        str,
        typer.Option("--node", metavar="NODE", help="To this node.", show_default=False, autocompletion=complete_nodes),
    ] = "",
    labels: Annotated[
        list[str] | None, typer.Option("-l", "--selector", metavar="KEY=VALUE,...", help="To a node with these labels.")
    ] = None,
    force: Throttle = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    wait: Wait = True,
    timeout: Timeout = None,
    output: Printed = None,
) -> None:
    """Move virtual machines to a node, or to one with given labels.

    Ends with code 0 when all have moved.
    """
    to = MigrateTo(node_name=node, node_selector=parse_labels(labels or []))
    _make(OperationType.MIGRATE, vms, namespace, to, force=force, wait=wait, timeout=timeout, output=output)


def _make(
    kind: OperationType,
    vms: list[str],
    namespace: str,
    to: MigrateTo | None = None,
    *,
    force: bool | None = None,
    wait: bool,
    timeout: float | None,
    output: Written | None,
) -> None:
    failures = Failures()
    with open_client() as client:
        begun: list[VirtualMachineOperation] = []
        for vm in dict.fromkeys(vms):
            try:
                wanted = operations.new_operation(vm, kind, namespace, to, force=force)
                begun.append(client.create(wanted))
            except (Conflict, Invalid, NotFound, Refused) as error:
                failures.add(f"{vm}: {error}" if len(vms) > 1 else str(error))
                continue
            except (OutcomeUnknown, StoreUnavailable) as error:
                names = ", ".join(operation.name for operation in begun)
                raise type(error)(f"{error}; begun before that: {names or 'nothing'}") from error
            if not wait and output is None:
                terminal.write(begun[-1].name)
        shown = begun
        if wait and begun:
            ended = wait_or_leave(client, begun, timeout=timeout, quiet=output is not None)
            shown = [watched.operation for watched in ended]
            for watched in ended:
                reason = failure(watched)
                if reason is not None:
                    failures.add(reason)
        if output is not None and shown:
            terminal.write(render(shown, output, is_list=len(vms) > 1))
    failures.end()
