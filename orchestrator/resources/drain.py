"""`NodeDrain`: one node being emptied, or filled again, by the control plane.

The document is all there is to a drain: no process waits for its end, so it outlives its client and every process of
the control plane. It is named after its node; a later drain of the same node takes its place.
"""

from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.resources.meta import Model, Resource, Timestamp

STRATEGY_ANNOTATION = "vmherd.dev/maintenance-strategy"
"""Of a VM: what is done about it where it can't leave its node by itself; a `Strategy`."""
BRING_BACK_ANNOTATION = "vmherd.dev/bring-back"
"""Of a node: `true` or `false`, in place of the setting, whether an uncordon moves home what its last drain moved."""
DRAIN_ANNOTATION = "vmherd.dev/drain"
"""Of an operation: the node for whose drain, or return, it was made."""


LONGEST_S = 10 * 365 * 86_400
"""No time limit is longer."""


class Strategy(StrEnum):
    """What is done about a VM that can't migrate, or for which no other node has room."""

    WAIT = "Wait"
    """It is left alone, and the drain waits for it (the default)."""
    SHUT_DOWN = "ShutDown"
    """Its guest is asked to power off, and it is started where it may run, which may be here once that is allowed."""


class DrainPhase(StrEnum):
    """How far a drain is."""

    DRAINING = "Draining"
    DRAINED = "Drained"
    FAILED = "DrainFailed"
    CANCELLED = "Cancelled"
    UNCORDONED = "Uncordoned"
    """It had ended before, and its node takes VMs again."""
    RETURNING = "Returning"
    RETURNED = "Returned"

    @property
    def is_open(self) -> bool:
        """Whether something is still being brought about."""
        return self in {DrainPhase.DRAINING, DrainPhase.RETURNING}


class DrainCause(StrEnum):
    """Who wants the node empty."""

    PERSON = "Person"
    EVICTION = "Eviction"
    """Evictions through the API (`kubectl drain`), VM by VM."""
    MAINTENANCE = "Maintenance"
    """A rolling maintenance."""
    HOST_SHUTDOWN = "HostShutdown"


class VmState(StrEnum):
    """What became of one VM."""

    WAITING = "Waiting"
    """Nothing is under way for it now; the message says what is waited for."""
    MOVING = "Moving"
    """Its operation is pending, or under way."""
    STAYS = "Stays"
    """It can't leave, or did not return; the message says why."""
    LEFT = "Left"
    RETURNING = "Returning"
    BACK = "Back"


class VmDrain(Model):
    """One VM of a drain.

    Attributes:
        memory_mib: Of the machine that runs.
        operation: Name of the operation that moves it, or moved it last.
        failures: Evacuations of it that failed, in a row.
        not_before: No new one before this instant.
        target: Where it went.
        moved: Whether the drain's own operation moved it: only such a VM is brought back.
        message: For people.
    """

    state: VmState = VmState.WAITING
    memory_mib: int = 0
    operation: str = ""
    failures: int = 0
    not_before: Timestamp | None = None
    target: str = ""
    moved: bool = False
    left_at: Timestamp | None = None
    message: str = ""


class DrainSpec(Model):
    """What is asked.

    Attributes:
        requested_by: Who, for people: a user, or a maintenance by its name.
        selector: Labels of the VMs that are to leave, as kubectl writes it; empty: all.
        every: Whether all VMs that the selector matches are to leave; else only `vms`.
        vms: Keys of VMs that are to leave besides.
        timeout_s: It has failed if VMs are left after so long; 0: never.
        partial: Whether it is begun though the rest of the herd has no place for some of them, which wait for room.
    """

    cause: DrainCause = DrainCause.PERSON
    requested_by: str = ""
    selector: str = ""
    every: bool = True
    vms: tuple[str, ...] = ()
    timeout_s: Annotated[float, Field(ge=0, le=LONGEST_S)] = 0
    partial: bool = False


class DrainStatus(Model):
    """How far it is.

    Attributes:
        deadline_at: When it has failed.
        vms: By their keys.
        stuck_told: Whether people were told that it takes unusually long.
        message: For people.
    """

    phase: DrainPhase = DrainPhase.DRAINING
    started_at: Timestamp | None = None
    finished_at: Timestamp | None = None
    deadline_at: Timestamp | None = None
    vms: dict[str, VmDrain] = Field(default_factory=dict)
    stuck_told: bool = False
    message: str = ""


class NodeDrain(Resource):
    """A node that is being emptied, or was; it bears the node's name."""

    kind_name: ClassVar[str] = "NodeDrain"
    group_version: ClassVar[str] = "vmherd.dev/v1"
    plural: ClassVar[str] = "nodedrains"
    short: ClassVar[str] = "drain"
    namespaced: ClassVar[bool] = False

    api_version: Literal["vmherd.dev/v1"] = "vmherd.dev/v1"
    kind: Literal["NodeDrain"] = "NodeDrain"
    spec: DrainSpec = DrainSpec()
    status: DrainStatus = DrainStatus()

    @property
    def is_open(self) -> bool:
        """Whether something is still being brought about."""
        return self.status.phase.is_open

    @property
    def is_winding_down(self) -> bool:
        """Whether it has ended, and what it had begun has not."""
        return not self.is_open and any(vm.state in {VmState.MOVING, VmState.RETURNING} for vm in self.vms.values())

    @property
    def vms(self) -> dict[str, VmDrain]:
        """What became of each VM."""
        return self.status.vms

    def left(self) -> dict[str, VmDrain]:
        """Give the VMs that are still there."""
        return {key: vm for key, vm in self.vms.items() if vm.state is not VmState.LEFT}

    def with_status(self, **changes: object) -> "NodeDrain":
        """Give a copy with some of its status changed."""
        return self.with_(status=self.status.with_(**changes))
