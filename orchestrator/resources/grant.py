"""A grant: the control plane's leave to one node to do one operation once, and how its end is settled.

It is part of the operation's status. Its node gets a copy (`NodeGrant`) that it can read and not write, so nothing
about ownership is ever read back from a node.
"""

from enum import StrEnum

from pydantic import Field

from orchestrator.resources.meta import Model, Timestamp
from orchestrator.resources.node import Count


class Action(StrEnum):
    """What a grant lets a node do."""

    MIGRATE = "migrate"
    START = "start"
    STOP = "stop"


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


class Assignment(Model):
    """What a node is told to do: the part of a grant that its node gets.

    Attributes:
        epoch: Grows with every grant in the herd; a worker refuses an older one.
        target: Where the VM is to run afterwards.
        uuid: The domain.
        incarnation: The VM's incarnation under this grant.
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
    """

    action: Action
    epoch: int
    target: str
    uuid: str
    incarnation: int
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


class NodeGrant(Assignment):
    """The copy of a grant that its node reads: all that the node needs, and nothing that the control plane decides by.

    Attributes:
        operation: Key of the operation.
        vm: Key of its VM.
    """

    operation: str
    vm: str


class Grant(Assignment):
    """The control plane's leave to one node to do this operation once.

    Attributes:
        node: Who executes it: a migration's source, a start's host.
        memory_mib: Reserved on the target, QEMU's overhead included.
        cpu_millicores: Reserved on the target.
        revoked: Why the control plane took it back; its operation goes on to another node.
        end: How the node said that its call ended (a `MigrationEnd`), empty before that.
        message: The hypervisor's words about it.
        locked: Whether a start failed since somebody else holds the lock on its storage.
        timed_out: Whether its node ended it at a deadline. It is not tried again: it would only time out again.
    """

    node: str
    memory_mib: int
    cpu_millicores: int
    granted_at: Timestamp
    state: GrantState = GrantState.GRANTED
    revoked: str = ""
    end: str = ""
    message: str = ""
    locked: bool = False
    timed_out: bool = False
    settlement: Settlement | None = None

    def for_node(self, operation: str, vm: str) -> NodeGrant:
        """Give the copy that its node reads."""
        told = {name: getattr(self, name) for name in Assignment.model_fields}
        return NodeGrant(operation=operation, vm=vm, **told)
