"""Starts, and the repairs of settlements, on this node's lifecycle queue."""

from orchestrator.errors import HypervisorError, OutcomeUnknown
from orchestrator.logs import logger
from orchestrator.store.node_store import NodeStore
from workers.hypervisor.port import Hypervisor, Marker
from workers.orders import perform
from workers.reporting import report_surely
from workers.watching import Watch

log = logger(__name__)


def run_start(store: NodeStore, hypervisor: Hypervisor, holder: str, operation: str, epoch: int) -> str:
    """Start a domain, if the grant is current and nobody took it yet.

    Returns:
        What became of it, for Flower's list.
    """
    grant = store.claim(operation, epoch, holder)
    if grant is None:
        return f"{operation}: nothing to do (epoch {epoch} is not current, or was taken)"
    project, _, name = grant.vm.partition("/")
    marker = Marker(project, name, grant.incarnation, epoch)
    end, message = "succeeded", ""
    with Watch(store, hypervisor, grant, abortable=False):
        try:
            hypervisor.start(grant.domain_xml, marker)
        except OutcomeUnknown as error:
            end, message = "unknown", str(error)
        except HypervisorError as error:
            end, message = "failed", str(error)
    log.info("start ended", operation=operation, vm=grant.vm, end=end, message=message)
    report_surely(store, "Ended", {"operation": operation, "epoch": epoch, "end": end, "message": message})
    return f"{grant.vm}: {end} {message}".rstrip()


def run_repair(store: NodeStore, hypervisor: Hypervisor, order_id: str) -> str:
    """Carry out a repair that a settlement asks for, and answer with what is there then.

    Raises:
        HypervisorUnavailable: Not now; the order stays and is sent again.
    """
    order = store.order(order_id)
    if order is None:
        return f"{order_id}: answered already"
    reading = perform(hypervisor, order)
    report_surely(store, "Answer", {"order": order.id, "reading": reading})
    return f"{order_id}: {order.kind}, then {reading.get('state', 'absent')}"
