"""`VirtualMachineOperation`: one thing to be done to one VM, with phases, progress and an end.

The control plane's record of the grant is part of the status. A node gets a copy of it (`store.keys.grants`) that it
can read and not write, so nothing about ownership is ever read back from a node.
"""

from enum import IntEnum, StrEnum
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.errors import InvariantBroken
from orchestrator.resources.meta import GROUP_VERSION, Condition, Model, Name, Resource, Timestamp, find_condition
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
    TARGET_SCHEDULING = "TargetScheduling"
    TARGET_UNSCHEDULABLE = "TargetUnschedulable"
    TARGET_PREPARING = "TargetPreparing"
    TARGET_DISK_ERROR = "TargetDiskError"
    WAITING_FOR_SYNC_SLOT = "WaitingForSyncSlot"
    SYNCING = "Syncing"
    NOT_CONVERGING = "NotConverging"
    SOURCE_SUSPENDED = "SourceSuspended"
    TARGET_RESUMED = "TargetResumed"
    OTHER_MIGRATION_IN_PROGRESS = "OtherMigrationInProgress"
    OUTCOME_UNKNOWN = "OutcomeUnknown"
    WAITING_FOR_VM_TO_BE_READY_TO_MIGRATE = "WaitingForVirtualMachineToBeReadyToMigrate"
    ABORTED = "Aborted"
    FAILED = "Failed"
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


class Action(StrEnum):
    """What a grant lets a node do."""

    MIGRATE = "migrate"
    START = "start"
    STOP = "stop"


class MigrateTo(Model):
    """Where a `Migrate` may land: nodes with these labels, or one node by name."""

    node_selector: dict[str, str] = Field(default_factory=dict)
    node_name: str = ""


class OperationSpec(Model):
    """What is asked; immutable once created.

    Attributes:
        force: None is not False: unset leaves it to the VM's liveMigrationPolicy.
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


class GrantState(StrEnum):
    """What became of a grant. The order is the way it takes, but each may turn `Settling`."""

    GRANTED = "Granted"
    """Written and sent; no report yet."""
    RUNNING = "Running"
    """Its node reported that it began."""
    ASKED = "Asked"
    """A graceful stop: the guest was asked to power off, and no worker waits for it. The control plane's own timer
    enforces the grace period."""
    SETTLING = "Settling"
    """Ended or suspect: the hosts are being asked what is."""


class Reading(Model):
    """What one host's hypervisor said of the domain, to a question asked after the operation's end.

    Attributes:
        present: False: the host answered that it does not have the domain.
        state: A `workers.hypervisor.port.DomainState`, empty when absent.
        job: Whether a migration job is active on it there.
        downtime_ms, elapsed_ms, transferred_mib, iterations, throttle_percent: Of the migration that brought it there,
            as far as its hypervisor tells.
        live_xml: After a start: the running domain's XML, from which its machine is recorded.
        counter: The number of the node's report.
    """

    present: bool
    state: str = ""
    reason: str = ""
    job: bool = False
    incarnation: int = 0
    downtime_ms: Count | None = None
    elapsed_ms: Count | None = None
    transferred_mib: Count | None = None
    iterations: Count | None = None
    throttle_percent: Count | None = None
    live_xml: str = ""
    counter: int = 0


class OrderKind(StrEnum):
    """What a node is asked to do while an operation is being settled. Each ends with a fresh reading of the domain."""

    READ = "read"
    KILL_AND_READ = "kill-and-read"
    """Kill the worker that held the grant first: between its check and its call it can't be stopped otherwise."""
    DESTROY = "destroy"
    RESUME = "resume"
    DESCRIBE = "describe"
    """Not of a settlement: tell what the machine needs of a host (`Questions`)."""
    CHECK = "check"
    """Not of a settlement: tell whether a machine can arrive here (`Questions`)."""

    @property
    def changes_domain(self) -> bool:
        """Whether it goes to the node's lifecycle queue; the others go to its agent."""
        return self in {OrderKind.DESTROY, OrderKind.RESUME}


class Order(Model):
    """One numbered question or repair for one node.

    Attributes:
        id: Answered once; an answer to another id counts for nothing.
        uuid: The domain.
        epoch: Of the grant that is being settled.
        incarnation: A domain with a higher one is left alone.
        expect: States in which the repair may be done; in any other the node only answers with what it reads.
        action: What the grant allowed: tells whose holder is killed.
        machine: What is asked about (`MachineNeeds.machine`).
        copied_disks: Target names of disks that would be copied with it.
    """

    id: str
    kind: OrderKind
    uuid: str
    epoch: int
    incarnation: int
    action: Action
    expect: tuple[str, ...] = ()
    machine: str = ""
    copied_disks: tuple[str, ...] = ()


class Settlement(Model):
    """The questions under way and what was answered.

    Attributes:
        orders: By node, those that it has not answered yet; empty while the round has not begun.
        readings: By node, its answers of this round.
        cause: What made it settle, for people.
        rounds: How often both sides were asked.
        confirming: What the round before concluded, where a conclusion needs a second look.
    """

    orders: dict[str, Order] = Field(default_factory=dict)
    readings: dict[str, Reading] = Field(default_factory=dict)
    cause: str = ""
    rounds: int = 1
    confirming: str = ""


class Grant(Model):
    """The control plane's leave to one node to do this operation once.

    Attributes:
        epoch: Grows with every grant in the herd; a worker refuses an older one.
        node: Who executes it: a migration's source, a start's host.
        target: Where the VM is to run afterwards.
        uuid: The domain.
        incarnation: The VM's incarnation under this grant.
        memory_mib: Reserved on the target, QEMU's overhead included.
        cpu_millicores: Reserved on the target.
        target_uri: Where the source's daemon connects to.
        bandwidth_mib_s: Cap of the migration.
        auto_converge: Whether the guest may be throttled.
        post_copy: Whether it may switch to post-copy when it does not converge.
        channels: Parallel connections of the migration.
        copy_disks: Target names of disks that are copied with the guest.
        completion_timeout_s: The migration is aborted (or switched to post-copy) after this long; 0: never.
        progress_timeout_s: Likewise when the data left has not shrunk for so long; 0: never.
        sample_s: The dirty rate is measured for so long before it begins; 0: it is not.
        force: A stop pulls the plug.
        grace_s: How long a guest that was asked to power off is given.
        domain_xml: What a start starts.
        adopt: Watch the job that an earlier holder began; don't begin one.
        cancel: Whether an abort was asked for.
        end: How the node said that its call ended (a `MigrationEnd`), empty before that.
        message: The hypervisor's words about it.
        timed_out: Whether its node ended it at a deadline. It is not tried again: it would only time out again.
    """

    epoch: int
    action: Action
    node: str
    target: str
    uuid: str
    incarnation: int
    memory_mib: int
    cpu_millicores: int
    granted_at: Timestamp
    target_uri: str = ""
    bandwidth_mib_s: int = 0
    auto_converge: bool = False
    post_copy: bool = False
    channels: int = 1
    copy_disks: tuple[str, ...] = ()
    completion_timeout_s: int = 0
    progress_timeout_s: int = 0
    sample_s: float = 0
    force: bool = False
    grace_s: int = 0
    domain_xml: str = ""
    state: GrantState = GrantState.GRANTED
    adopt: bool = False
    cancel: bool = False
    end: str = ""
    message: str = ""
    timed_out: bool = False
    settlement: Settlement | None = None


class NodeGrant(Model):
    """The copy of a grant that its node reads. It holds all that the node needs, and nothing that the node decides."""

    operation: str
    vm: str
    action: Action
    epoch: int
    uuid: str
    incarnation: int
    target: str
    target_uri: str = ""
    bandwidth_mib_s: int = 0
    auto_converge: bool = False
    post_copy: bool = False
    channels: int = 1
    copy_disks: tuple[str, ...] = ()
    completion_timeout_s: int = 0
    progress_timeout_s: int = 0
    sample_s: float = 0
    force: bool = False
    grace_s: int = 0
    domain_xml: str = ""
    adopt: bool = False
    cancel: bool = False


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
        return NodeGrant(
            operation=self.key,
            vm=self.vm_key,
            action=grant.action,
            epoch=grant.epoch,
            uuid=grant.uuid,
            incarnation=grant.incarnation,
            target=grant.target,
            target_uri=grant.target_uri,
            bandwidth_mib_s=grant.bandwidth_mib_s,
            auto_converge=grant.auto_converge,
            post_copy=grant.post_copy,
            channels=grant.channels,
            copy_disks=grant.copy_disks,
            completion_timeout_s=grant.completion_timeout_s,
            progress_timeout_s=grant.progress_timeout_s,
            sample_s=grant.sample_s,
            force=grant.force,
            grace_s=grant.grace_s,
            domain_xml=grant.domain_xml,
            adopt=grant.adopt,
            cancel=grant.cancel,
        )

    def with_grant(self, **changes: object) -> "VirtualMachineOperation":
        """Give a copy with some of its open grant changed."""
        if self.status.grant is None:
            raise InvariantBroken(f"{self.key} has no open grant")
        return self.with_status(grant=self.status.grant.with_(**changes))

    def with_status(self, **changes: object) -> "VirtualMachineOperation":
        """Give a copy with some of its status changed."""
        return self.with_(status=self.status.with_(**changes))
