"""Starts and stops, and the repairs of settlements, on this node's lifecycle queue."""

from orchestrator.errors import HypervisorError, OutcomeUnknown
from orchestrator.logs import logger
from orchestrator.resources import NodeGrant
from orchestrator.store.node_store import NodeStore
from workers.hypervisor.port import DomainState, Hypervisor, Marker, StorageLocked
from workers.orders import incarnation_of, perform
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
    end, message, is_locked = "succeeded", "", False
    if grant.cancel:
        return _end(store, grant, "aborted", "aborted before it was started")
    with Watch(store, hypervisor, grant):
        try:
            hypervisor.start(grant.domain_xml, marker)
        except OutcomeUnknown as error:
            end, message = "unknown", str(error)
        except HypervisorError as error:
            end, message, is_locked = "failed", str(error), isinstance(error, StorageLocked)
    return _end(store, grant, end, message, is_locked=is_locked)


def run_stop(store: NodeStore, hypervisor: Hypervisor, holder: str, operation: str, epoch: int) -> str:
    """Stop a domain, if the grant is current and nobody took it yet.

    A graceful stop asks the guest to power off and returns: how long it may take is the control plane's to count, so a
    slow guest holds up nothing behind it.

    Returns:
        What became of it, for Flower's list.
    """
    grant = store.claim(operation, epoch, holder)
    if grant is None:
        return f"{operation}: nothing to do (epoch {epoch} is not current, or was taken)"
    if grant.cancel:
        return _end(store, grant, "aborted", "superseded before it began")
    end, message = "succeeded", ""
    with Watch(store, hypervisor, grant):
        try:
            domain = hypervisor.domain(grant.uuid)
            if domain is None or domain.state is DomainState.SHUTOFF:
                return _end(store, grant, end, "it did not run any more")
            if incarnation_of(domain) > grant.incarnation:
                return _end(store, grant, "failed", f"the host has incarnation {incarnation_of(domain)} of it")
            if not grant.force:
                return _ask(store, hypervisor, grant)
            hypervisor.destroy(grant.uuid)
        except OutcomeUnknown as error:
            end, message = "unknown", str(error)
        except HypervisorError as error:
            end, message = "failed", str(error)
    return _end(store, grant, end, message)


def _ask(store: NodeStore, hypervisor: Hypervisor, grant: NodeGrant) -> str:
    message = ""
    try:
        hypervisor.shutdown(grant.uuid)
    except (HypervisorError, OutcomeUnknown) as error:  # a guest that can't be asked has its grace period all the same
        message = f"it could not be asked: {error}"
    log.info("guest asked to power off", operation=grant.operation, vm=grant.vm, message=message)
    body = {"operation": grant.operation, "epoch": grant.epoch, "message": message}
    report_surely(store, "Asked", body)
    return f"{grant.vm}: asked to power off {message}".rstrip()


def _end(store: NodeStore, grant: NodeGrant, end: str, message: str, *, is_locked: bool = False) -> str:
    log.info("call ended", action=grant.action.value, operation=grant.operation, vm=grant.vm, end=end, message=message)
    body = {"operation": grant.operation, "epoch": grant.epoch, "end": end, "message": message, "locked": is_locked}
    report_surely(store, "Ended", body)
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
