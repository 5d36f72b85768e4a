"""`Maintenance`: nodes emptied, worked on by a command, and filled again, one after another or several at a time.

The document is all there is to it, as with a drain. The command ("hook") is run by whoever has claimed it for a while
(`vmherd maintain`); its run is on record before it begins and after it ends. A claim that ran out is taken by another,
so a hook runs **at least once**, and may run twice: it has to bear that.
"""

from enum import StrEnum
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from orchestrator.resources.drain import LONGEST_S
from orchestrator.resources.meta import Model, Resource, Timestamp
from orchestrator.resources.names import Name

Limit = Annotated[float, Field(ge=0, le=LONGEST_S)]
"""Seconds."""
LONGEST_OUTPUT = 2_000
"""So many characters of a hook's output are kept: the last ones."""


class MaintenancePhase(StrEnum):
    """How far a maintenance is."""

    RUNNING = "Running"
    PAUSED = "Paused"
    """No node and no hook is begun; what has begun comes to its end."""
    STOPPING = "Stopping"
    """Likewise, and nothing will be begun any more."""
    STOPPED = "Stopped"
    COMPLETED = "Completed"

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens."""
        return self in {MaintenancePhase.STOPPED, MaintenancePhase.COMPLETED}


class NodeStage(StrEnum):
    """How far one node is."""

    WAITING = "Waiting"
    DRAINING = "Draining"
    DRAINED = "Drained"
    """The hook may be run."""
    HOOK = "HookRunning"
    RETURNING = "WaitingForNode"
    """The hook has ended; the node is waited for."""
    UNCORDONING = "Uncordoning"
    DONE = "Done"
    FAILED = "Failed"
    SKIPPED = "Skipped"

    @property
    def is_away(self) -> bool:
        """Whether the herd has to do without the node."""
        return self not in {NodeStage.WAITING, NodeStage.DONE, NodeStage.SKIPPED}

    @property
    def is_over(self) -> bool:
        """Whether nothing more is done about it."""
        return self in {NodeStage.DONE, NodeStage.SKIPPED}


class NodeMaintenance(Model):
    """One node of a maintenance.

    Attributes:
        since: When it came to its stage.
        failed_at: The stage at which it failed, and from which it goes on when the maintenance is resumed.
        was_cordoned: Before the maintenance: then it stays so.
        attempts: Runs of the hook that were begun.
        holder: Who runs the hook.
        lease_until: Until when whoever runs it has to say that it goes on.
        boot_id: Of its host before the hook ran.
        away_at: When it was last seen not Ready since.
        output: The end of what the hook wrote.
    """

    stage: NodeStage = NodeStage.WAITING
    since: Timestamp | None = None
    failed_at: NodeStage | None = None
    was_cordoned: bool = False
    attempts: int = 0
    holder: str = ""
    lease_until: Timestamp | None = None
    hook_began_at: Timestamp | None = None
    hook_ended_at: Timestamp | None = None
    exit_code: int | None = None
    output: str = ""
    boot_id: str = ""
    away_at: Timestamp | None = None
    message: str = ""


_NOT_BEGUN: Final = NodeMaintenance()


class MaintenanceSpec(Model):
    """What is asked.

    Attributes:
        nodes: In the order in which they are to be begun.
        hook: A command for `sh -c`; it finds the node's name in VMHERD_NODE.
        parallel: Nodes that may be away at a time; 0: as many as the rest of the herd has room and rules for.
        drain_timeout_s: Of each drain; 0: never.
        hook_timeout_s: Of each run of the hook; 0: never.
        ready_timeout_s: For so long a node is waited for after its hook; 0: for ever.
        reboots: Whether the host must have booted anew before it counts as back.
        bring_back: Whether what was moved off a node comes home when it is back.
    """

    nodes: Annotated[tuple[Name, ...], Field(min_length=1, max_length=10_000)]
    hook: Annotated[str, Field(min_length=1, max_length=10_000)]
    parallel: Annotated[int, Field(ge=0)] = 1
    drain_timeout_s: Limit = 0
    hook_timeout_s: Limit = 0
    ready_timeout_s: Limit = 0
    reboots: bool = False
    bring_back: bool = False
    requested_by: str = ""


class MaintenanceStatus(Model):
    """How far it is.

    Attributes:
        nodes: By name; those that have not been begun are left out.
        message: For people.
    """

    phase: MaintenancePhase = MaintenancePhase.RUNNING
    nodes: dict[str, NodeMaintenance] = Field(default_factory=dict)
    started_at: Timestamp | None = None
    finished_at: Timestamp | None = None
    message: str = ""


class Maintenance(Resource):
    """A rolling maintenance."""

    kind_name: ClassVar[str] = "Maintenance"
    group_version: ClassVar[str] = "vmherd.dev/v1"
    plural: ClassVar[str] = "maintenances"
    short: ClassVar[str] = "maint"
    namespaced: ClassVar[bool] = False

    api_version: Literal["vmherd.dev/v1"] = "vmherd.dev/v1"
    kind: Literal["Maintenance"] = "Maintenance"
    spec: MaintenanceSpec
    status: MaintenanceStatus = MaintenanceStatus()

    @property
    def is_open(self) -> bool:
        """Whether something is still to be done."""
        return not self.status.phase.is_final

    def node(self, name: str) -> NodeMaintenance:
        """Say how far a node is."""
        return self.status.nodes.get(name, _NOT_BEGUN)

    @property
    def away(self) -> tuple[str, ...]:
        """Name the nodes that the herd has to do without for its sake."""
        return tuple(name for name in self.spec.nodes if self.node(name).stage.is_away)

    def with_node(self, name: str, node: NodeMaintenance) -> "Maintenance":
        """Give a copy with one node changed."""
        return self.with_status(nodes={**self.status.nodes, name: node})

    def with_status(self, **changes: object) -> "Maintenance":
        """Give a copy with some of its status changed."""
        return self.with_(status=self.status.with_(**changes))
