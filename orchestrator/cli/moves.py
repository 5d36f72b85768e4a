"""`vmherd evict` and `vmherd migrate`: make operations, and wait for what comes of them."""

from typing import Annotated

import typer

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_context
from orchestrator.cli.arguments import Namespace, Timeout, Wait, parse_labels
from orchestrator.cli.terminal import Failures
from orchestrator.cli.waiting import failure, wait_or_leave
from orchestrator.errors import Conflict, Invalid, NotFound, Refused, StoreUnavailable
from orchestrator.resources import DEFAULT_NAMESPACE, OperationType, VirtualMachineOperation
from orchestrator.resources.vmop import MigrateTo
from orchestrator.services import operations
from orchestrator.services.context import Context

EVICT_EXAMPLES = """Examples:

$ vmherd evict linux-vm

$ vmherd evict web-1 web-2 --timeout 10m

$ vmherd delete vmop $(vmherd evict linux-vm --no-wait)
"""

MIGRATE_EXAMPLES = """Examples:

$ vmherd migrate linux-vm --node node-3

$ vmherd migrate web-1 web-2 -l rack=b,disk=ssd
"""

Vms = Annotated[list[str], typer.Argument(metavar="VM", help="Names of running virtual machines.")]


def evict(vms: Vms, namespace: Namespace = DEFAULT_NAMESPACE, wait: Wait = True, timeout: Timeout = None) -> None:
    """Move virtual machines off their nodes; where to is chosen when there is room.

    Ends with code 0 when all have moved.
    """
    _move(OperationType.EVICT, vms, namespace, None, wait=wait, timeout=timeout)


def migrate(
    vms: Vms,
    node: Annotated[str, typer.Option("--node", metavar="NODE", help="To this node.", show_default=False)] = "",
    labels: Annotated[
        list[str] | None, typer.Option("-l", "--selector", metavar="KEY=VALUE,...", help="To a node with these labels.")
    ] = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    wait: Wait = True,
    timeout: Timeout = None,
) -> None:
    """Move virtual machines to a node, or to one with given labels.

    Ends with code 0 when all have moved.
    """
    to = MigrateTo(node_name=node, node_selector=parse_labels(labels or []))
    _move(OperationType.MIGRATE, vms, namespace, to, wait=wait, timeout=timeout)


def _move(
    kind: OperationType, vms: list[str], namespace: str, to: MigrateTo | None, *, wait: bool, timeout: float | None
) -> None:
    failures = Failures()
    with open_context() as ctx:
        begun: list[VirtualMachineOperation] = []
        for vm in dict.fromkeys(vms):
            try:
                begun.append(_begin(ctx, kind, vm, namespace, to))
            except (Conflict, Invalid, NotFound, Refused) as error:
                failures.add(f"{vm}: {error}" if len(vms) > 1 else str(error))
                continue
            except StoreUnavailable as error:
                names = ", ".join(operation.name for operation in begun)
                raise StoreUnavailable(f"{error}; begun before that: {names or 'nothing'}") from error
            if not wait:
                terminal.write(begun[-1].name)
        if wait and begun:
            for watched in wait_or_leave(ctx.store, begun, timeout=timeout):
                reason = failure(watched)
                if reason is not None:
                    failures.add(reason)
    failures.end()


def _begin(ctx: Context, kind: OperationType, vm: str, namespace: str, to: MigrateTo | None) -> VirtualMachineOperation:
    return operations.create_operation(ctx, operations.new_operation(vm, kind, namespace, to))
