"""Orders about outdated copies: domains of a VM that are of a lower incarnation than the record's, and must not run.

Such a copy is destroyed by its own node alone; one with a higher incarnation than the order's is left alone.
"""

from typing import Final

from orchestrator.resources.grant import Action, Order, OrderKind
from orchestrator.resources.vm import VirtualMachine

_EXPECTED: Final = ("running", "paused", "postcopy-failed", "shutdown", "crashed", "incoming", "paused-migrated")


def destroy_outdated(vm: VirtualMachine, order_id: str) -> Order:
    """Give the order to destroy a node's copy of a VM, if it is of a lower incarnation than the record's."""
    return Order(
        id=order_id,
        kind=OrderKind.DESTROY,
        uuid=vm.metadata.uid,
        epoch=0,
        incarnation=vm.status.incarnation - 1,
        action=Action.STOP,
        expect=_EXPECTED,
    )


def outdated_orders(vm: VirtualMachine) -> dict[str, Order]:
    """Give, by node, the orders to destroy the outdated copies of a VM that were seen."""
    status = vm.status
    return {
        node: destroy_outdated(vm, f"outdated/{vm.key}#{node}.{status.incarnation}")
        for node in status.outdated
        if status.incarnation > 0
    }
