"""Orders: a question, or a repair of a settlement. Each ends with a reading taken after it arrived."""

from collections.abc import Callable
from typing import Any

from orchestrator.errors import HypervisorError, HypervisorUnavailable
from orchestrator.logs import logger
from orchestrator.resources import Action, Order, OrderKind
from workers import holder
from workers.hypervisor.port import Domain, DomainState, Hypervisor

log = logger(__name__)

ROLES = {Action.MIGRATE: "migrate", Action.START: "lifecycle", Action.STOP: "lifecycle"}
"""Which worker executes which action."""


def perform(
    hypervisor: Hypervisor, order: Order, claimed_by: str = "", kill: Callable[[str, str], None] = holder.kill
) -> dict[str, Any]:
    """Carry out an order.

    Args:
        hypervisor: This node's.
        order: Read just now from the node's orders.
        claimed_by: Of a grant whose holder is to be killed: who claimed it, if that is known.
        kill: Kills the holder: its role, who claimed the grant.

    Returns:
        The reading, as the control plane's `Reading` takes it.

    Raises:
        HypervisorUnavailable: No answer can be given now; the order stays.
    """
    if order.kind is OrderKind.KILL_AND_READ:
        kill(ROLES[order.action], claimed_by)
    elif order.kind.changes_domain:
        _repair(hypervisor, order)
    reading = read(hypervisor, order.uuid)
    if order.action is Action.START and reading["present"]:
        definition = hypervisor.definition(order.uuid)
        reading["liveXml"] = definition.live_xml if definition else ""
    return reading


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
        "incarnation": incarnation_of(domain),
        "downtimeMs": completed.get("downtime_ms"),
        "elapsedMs": completed.get("elapsed_ms"),
        "transferredMib": completed["processed_bytes"] // 2**20 if "processed_bytes" in completed else None,
        "iterations": completed.get("iterations"),
        "throttlePercent": completed.get("throttle_percent"),
    }


_RUNS = frozenset({DomainState.RUNNING, DomainState.PAUSED, DomainState.POSTCOPY})


def guests_of(domains: list[Domain]) -> list[dict[str, Any]]:
    """Name the guests of ours that run on a host, as the control plane's `Look` takes them."""
    return [
        {"vm": f"{d.marker.project}/{d.marker.name}", "incarnation": d.marker.incarnation}
        for d in domains
        if d.marker is not None and d.state in _RUNS
    ]


def incarnation_of(domain: Domain) -> int:
    """Give the incarnation of a domain; 0 for one that we don't manage."""
    return domain.marker.incarnation if domain.marker else 0


def _is_outgoing(domain: Domain) -> bool:
    """Whether a migration away from here is under way; the receiving side's job says nothing about the source."""
    return domain.has_job and (domain.job is None or domain.job.outgoing)


def _repair(hypervisor: Hypervisor, order: Order) -> None:
    """Destroy or resume, only what the order names in a state that it names; anything else is left alone."""
    domain = hypervisor.domain(order.uuid)
    if domain is None or domain.state.value not in order.expect:
        log.info("repair not needed", order=order.id, state=domain.state.value if domain else "absent")
        return
    found = incarnation_of(domain)
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
