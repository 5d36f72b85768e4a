"""Orders: a question, or a repair of a settlement. Each ends with a reading taken after it arrived."""

from typing import Any

from orchestrator.errors import HypervisorError, HypervisorUnavailable
from orchestrator.logs import logger
from orchestrator.resources import Action, Order, OrderKind
from workers import holder
from workers.hypervisor.port import Domain, Hypervisor

log = logger(__name__)

ROLES = {Action.MIGRATE: "migrate", Action.START: "lifecycle"}
"""Which worker executes which action."""


def perform(hypervisor: Hypervisor, order: Order, claimed_by: str = "") -> dict[str, Any]:
    """Carry out an order.

    Args:
        hypervisor: This node's.
        order: Read just now from the node's orders.
        claimed_by: Of a grant whose holder is to be killed: who claimed it, if that is known.

    Returns:
        The reading, as the control plane's `Reading` takes it.

    Raises:
        HypervisorUnavailable: No answer can be given now; the order stays.
    """
    if order.kind is OrderKind.KILL_AND_READ:
        holder.kill(ROLES[order.action], claimed_by)
    elif order.kind.changes_domain:
        _repair(hypervisor, order)
    return read(hypervisor, order.uuid)


def read(hypervisor: Hypervisor, uuid: str) -> dict[str, Any]:
    """Read one domain for a settlement."""
    domain = hypervisor.domain(uuid)
    if domain is None:
        return {"present": False}
    completed = hypervisor.completed_job(uuid)
    return {
        "present": True,
        "state": domain.state.value,
        "reason": domain.reason,
        "job": _is_outgoing(domain),
        "incarnation": domain.marker.incarnation if domain.marker else 0,
        "downtimeMs": completed.get("downtime_ms"),
    }


def _is_outgoing(domain: Domain) -> bool:
    """Whether a migration away from here is under way; the receiving side's job says nothing about the source."""
    return domain.has_job and (domain.job is None or domain.job.outgoing)


def _repair(hypervisor: Hypervisor, order: Order) -> None:
    """Destroy or resume, only what the order names in a state that it names; anything else is left alone."""
    domain = hypervisor.domain(order.uuid)
    if domain is None or domain.state.value not in order.expect:
        log.info("repair not needed", order=order.id, state=domain.state.value if domain else "absent")
        return
    found = domain.marker.incarnation if domain.marker else 0
    if found > order.incarnation:
        log.warning("repair refused: a higher incarnation", order=order.id, found=found)
        return
    log.warning("repair", order=order.id, kind=order.kind.value, uuid=order.uuid, state=domain.state.value)
    try:
        if order.kind is OrderKind.DESTROY:
            hypervisor.destroy(order.uuid)
        else:
            hypervisor.resume(order.uuid)
    except HypervisorUnavailable:
        raise
    except HypervisorError as error:  # the reading that follows says what came of it
        log.warning("repair failed", order=order.id, error=str(error))
