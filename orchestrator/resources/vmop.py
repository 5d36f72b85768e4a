"""`VirtualMachineOperation`: one thing to be done to one VM, with phases, progress and an end."""

from enum import IntEnum, StrEnum
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from orchestrator.errors import InvariantBroken
from orchestrator.resources.grant import Grant, GrantState, NodeGrant
from orchestrator.resources.meta import GROUP_VERSION, Condition, Model, Resource, Timestamp, find_condition
from orchestrator.resources.names import Labels, Name, check_name
from orchestrator.resources.needs import Questions
from orchestrator.resources.node import Count

CLEANUP_FINALIZER = "virtualization.deckhouse.io/vmop-cleanup"
PRIORITY_ANNOTATION = "vmherd.dev/priority"
CELERY_TASK_ANNOTATION = "vmherd.dev/celery-task"
POST_COPY_ANNOTATION = "vmherd.dev/allow-post-copy"
"""Of a VM: `true` lets its migrations end by post-copy, `false` forbids it, whatever the setting."""


class OperationType(StrEnum):
    """What an operation does."""

    START = "Start"
    STOP = "Stop"
    RESTART = "Restart"
    EVICT = "Evict"
    MIGRATE = "Migrate"

    @property
    def is_migration(self) -> bool:
        """Whether it moves a running VM to another node."""
        return self in {OperationType.EVICT, OperationType.MIGRATE}


class OperationPhase(StrEnum):
    """How far an operation is."""

    PENDING = "Pending"
    IN_PROGRESS = "InProgress"
    COMPLETED = "Completed"
    FAILED = "Failed"
    TERMINATING = "Terminating"
    SUPERSEDED = "Superseded"

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens."""
        return self in {OperationPhase.COMPLETED, OperationPhase.FAILED, OperationPhase.SUPERSEDED}


class Reason(StrEnum):
    """Reasons of the condition `Completed` (the platform's names)."""

    VIRTUAL_MACHINE_NOT_FOUND = "VirtualMachineNotFound"
    NOT_APPLICABLE_FOR_PHASE = "NotApplicableForVirtualMachinePhase"
    NOT_APPLICABLE_FOR_RUN_POLICY = "NotApplicableForVirtualMachineRunPolicy"
    NOT_APPLICABLE_FOR_LIVE_MIGRATION_POLICY = "NotApplicableForLiveMigrationPolicy"
    NOT_READY = "NotReadyToBeExecuted"
    SUPERSEDED = "Superseded"
    START_IN_PROGRESS = "StartInProgress"
    STOP_IN_PROGRESS = "StopInProgress"
    RESTART_IN_PROGRESS = "RestartInProgress"
    MIGRATION_PENDING = "MigrationPending"
    TARGET_UNSCHEDULABLE = "TargetUnschedulable"
    TARGET_PREPARING = "TargetPreparing"
    TARGET_DISK_ERROR = "TargetDiskError"
    SYNCING = "Syncing"
    NOT_CONVERGING = "NotConverging"
    SOURCE_SUSPENDED = "SourceSuspended"
    TARGET_RESUMED = "TargetResumed"
    OTHER_MIGRATION_IN_PROGRESS = "OtherMigrationInProgress"
    OUTCOME_UNKNOWN = "OutcomeUnknown"
    WAITING_FOR_VM_TO_BE_READY_TO_MIGRATE = "WaitingForVirtualMachineToBeReadyToMigrate"
    ABORTED = "Aborted"
    OPERATION_FAILED = "OperationFailed"
    OPERATION_COMPLETED = "OperationCompleted"


class Priority(IntEnum):
    """Who goes first; within one priority, first come."""

    PERSON = 0
    MAINTENANCE = 1
    PLACEMENT = 2
    BALANCE = 3


PRIORITIES = {str(priority.value): priority for priority in Priority}
"""By their values in `PRIORITY_ANNOTATION`."""


class MigrateTo(Model):
    """Where a `Migrate` may land: nodes with these labels, or one node by name.

    Attributes:
        node_selector: Labels that the target must have, besides what the VM itself asks for.
        node_name: The target.
    """

    node_selector: Labels = Field(default_factory=dict)
    node_name: Annotated[str, AfterValidator(lambda value: check_name(value) if value else value)] = ""


class OperationSpec(Model):
    """What is asked; immutable once created.

    Attributes:
        virtual_machine_name: Of the VM, in the same namespace.
        force: None is not False: unset leaves it to the VM's liveMigrationPolicy. True lets the guest be throttled by a
            migration, and pulls the plug in a stop or restart.
    """

    type: OperationType
    virtual_machine_name: Name
    force: bool | None = None
    migrate: MigrateTo | None = None

    @model_validator(mode="after")
    def _check_migrate(self) -> Self:
        if self.migrate is not None and self.type is not OperationType.MIGRATE:
            raise ValueError(f"migrate is only for type Migrate, not {self.type}")
        return self


class Prediction(Model):
    """What was foreseen of a migration before it began (`planner.convergence`).

    Attributes:
        dirty_rate_mib_s: As measured; None where it was not.
        duration_s: Until the switch-over; None when it does not converge by itself.
        converges: Whether the link carries memory away faster than the guest dirties it; None when that is not known.
    """

    dirty_rate_mib_s: Annotated[float, Field(ge=0, le=2**40)] | None = None
    duration_s: float | None = None
    converges: bool | None = None


class MigrationOutcome(Model):
    """How a migration went, beside what was foreseen.

    Attributes:
        duration_s: Of the job, so far or in all.
        downtime_ms: As the hypervisor measured it.
        transferred_mib: Sent in all.
        iterations: Passes over memory.
        throttle_percent: Auto-converge's highest.
        post_copy: Whether it ended in post-copy.
    """

    duration_s: float = Field(0, ge=0, le=2**40)
    downtime_ms: Count | None = None
    transferred_mib: Count = 0
    iterations: Count = 0
    throttle_percent: Count = 0
    post_copy: bool = False


class OperationStatus(Model):
    """What became of it.

    Attributes:
        progress: Percent; never falls.
        conditions: `Completed` says with its reason and message how far it is, or how it ended.
        started_at: When a node began with it.
        finished_at: When it ended.
        source_node: Where the VM ran when it was granted.
        target_node: Where the VM is to run.
        attempts: Grants so far, this one included.
        not_before: No new grant before this instant (back-off after a failed attempt).
        planned: Where it goes with others that are placed together, if that still fits when its turn comes.
        avoid: Targets on which an attempt failed; used again only when nothing else is left.
        unschedulable_since: Since when no node fits.
        questions: What nodes are being asked before it is granted.
        downtime_ms: Of the guest, as the hypervisor measured it.
        prediction: Foreseen before the migration began.
        outcome: What the hypervisor measured of it, so far or at its end.
        superseded_by: Name of the operation that took its place. Its grant, if one is open, is still brought to an end.
    """

    phase: OperationPhase = OperationPhase.PENDING
    progress: int = 0
    conditions: tuple[Condition, ...] = ()
    started_at: Timestamp | None = None
    finished_at: Timestamp | None = None
    source_node: str = ""
    target_node: str = ""
    attempts: int = 0
    not_before: Timestamp | None = None
    planned: str = ""
    avoid: tuple[str, ...] = ()
    unschedulable_since: Timestamp | None = None
    questions: Questions | None = None
    downtime_ms: int | None = None
    prediction: Prediction | None = None
    outcome: MigrationOutcome | None = None
    superseded_by: str = ""
    grant: Grant | None = None


class VirtualMachineOperation(Resource):
    """One operation on one VM of the same namespace."""

    kind_name: ClassVar[str] = "VirtualMachineOperation"
    group_version: ClassVar[str] = GROUP_VERSION
    plural: ClassVar[str] = "virtualmachineoperations"
    short: ClassVar[str] = "vmop"

    api_version: Literal["virtualization.deckhouse.io/v1alpha2"] = GROUP_VERSION
    kind: Literal["VirtualMachineOperation"] = "VirtualMachineOperation"
    spec: OperationSpec
    status: OperationStatus = OperationStatus()

    @property
    def vm_key(self) -> str:
        """Store key of its VM."""
        return f"{self.metadata.namespace}/{self.spec.virtual_machine_name}"

    @property
    def priority(self) -> Priority:
        """Its priority; a person's unless it names another. Never an error: one operation would stop all grants."""
        return PRIORITIES.get(self.metadata.annotations.get(PRIORITY_ANNOTATION, ""), Priority.PERSON)

    @property
    def is_active(self) -> bool:
        """Whether it may still do something, or is doing it."""
        return not self.status.phase.is_final

    @property
    def is_open(self) -> bool:
        """Whether anything is still to be done about it: a superseded one may have a grant that has to end first."""
        return self.is_active or self.status.grant is not None

    @property
    def awaits_answers(self) -> bool:
        """Whether nodes are being asked on its behalf: before it is granted, and not after it has ended."""
        questions = self.status.questions
        return questions is not None and bool(questions.open) and self.status.grant is None and self.is_active

    @property
    def message(self) -> str:
        """The message of its condition Completed."""
        condition = find_condition(self.status.conditions, "Completed")
        return condition.message if condition else ""

    @property
    def node_grant(self) -> NodeGrant | None:
        """The copy of its grant for the node that executes it; withdrawn while it is being settled.

        So a worker that is started in the middle of a settlement, and gets the message again, finds nothing to do.
        """
        grant = self.status.grant
        if grant is None or grant.state is GrantState.SETTLING:
            return None
        return grant.for_node(self.key, self.vm_key)

    def with_grant(self, **changes: object) -> "VirtualMachineOperation":
        """Give a copy with some of its open grant changed."""
        if self.status.grant is None:
            raise InvariantBroken(f"{self.key} has no open grant")
        return self.with_status(grant=self.status.grant.with_(**changes))

    def with_status(self, **changes: object) -> "VirtualMachineOperation":
        """Give a copy with some of its status changed."""
        return self.with_(status=self.status.with_(**changes))
