"""Maintenances as the API shows them: with `spec.paused`, by which they are held and let go on.

Whether one is paused is its phase: it pauses by itself when a node fails. So what clients see of it is made from that,
and what they say of it is one of the two steps, pause or resume.
"""

from typing import Any

from orchestrator.resources.maintenance import Maintenance, MaintenancePhase, MaintenanceSpec


class ShownMaintenanceSpec(MaintenanceSpec):
    """As `MaintenanceSpec`, and whether it is paused."""

    paused: bool = False


ShownMaintenanceSpec.__doc__ = f"""{(MaintenanceSpec.__doc__ or "").rstrip()}
        paused: No node and no hook is begun; what has begun comes to its end. All else stays as it was made.
"""


class ShownMaintenance(Maintenance):
    """A rolling maintenance."""

    spec: ShownMaintenanceSpec


def show_maintenance(maintenance: Maintenance) -> dict[str, Any]:
    """Give a maintenance as the API shows it."""
    document = maintenance.manifest()
    is_paused = maintenance.status.phase is MaintenancePhase.PAUSED
    return {**document, "spec": {**document["spec"], "paused": is_paused}}


def asked_of(shown: ShownMaintenance) -> MaintenanceSpec:
    """Give the stored part of what a client says."""
    return MaintenanceSpec.model_validate(shown.spec.model_dump(exclude={"paused"}))
