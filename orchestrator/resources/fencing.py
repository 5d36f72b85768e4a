"""`NodeFencing`: how one node may be fenced, and what came of it. Its name is the node's.

The spec is a person's: whether, by which BMC, what happens afterwards. The status is one fencing, from the lease that
ran out to the evidence, and what of the node is kept until it comes back. Nothing of a lost node starts elsewhere
before `status.evidence` is there; `FenceUnconfirmed` never counts as fenced (docs/adr/0019-fencing.md).
"""

from enum import StrEnum
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from orchestrator.resources.grant import Order
from orchestrator.resources.meta import Model, Resource, Timestamp, is_stored, misplaced
from orchestrator.resources.scheduling import Taint

ENABLED_LABEL = "node-manager.deckhouse.io/fencing-enabled"
"""The platform's label of nodes that may be fenced."""

NOT_ENABLED: Final = "fencing is not enabled for this node"
DRAINED: Final = "drained: it is cordoned and empty"
DISARMED_BY_MAINTENANCE: Final = "maintenance "
DISARMED_BY_ANNOTATION: Final = "annotation "
DISARMED_FAILOVER: Final = "failover is disarmed: "
"""Why a node's watchdog is to be disarmed, as it is told to the node, or how that begins (`services.arming`)."""

_SECRET_WORDS = ("passw", "secret", "token", "passphrase")


class FencePhase(StrEnum):
    """How far it is."""

    IDLE = "Idle"
    SUSPECT = "Suspect"
    """Its lease ran out; something speaks against fencing it, which `reason` names."""
    FENCING = "Fencing"
    UNCONFIRMED = "FenceUnconfirmed"
    """All that may be tried gave no evidence yet. It is tried again; a person may confirm."""
    FENCED = "Fenced"
    """There is evidence. Its VMs are being settled."""
    RECOVERED = "Recovered"
    """Its VMs start elsewhere, or wait for a place; it is awaited back."""

    @property
    def is_open(self) -> bool:
        """Whether evidence is sought."""
        return self in {FencePhase.FENCING, FencePhase.UNCONFIRMED}

    @property
    def has_evidence(self) -> bool:
        """Whether the node runs nothing any more."""
        return self in {FencePhase.FENCED, FencePhase.RECOVERED}


class FenceLevel(StrEnum):
    """Kinds of evidence."""

    BMC = "BMC"
    DEADLINE = "Deadline"
    PERSON = "Person"


class Bmc(Model):
    """A BMC, as one of ClusterLabs' fence agents reaches it.

    Attributes:
        agent: Name of the agent, as it is installed: `fence_ipmilan`, `fence_redfish`, ...
        options: The agent's own, by the names that it takes on standard input (`ip`, `ipport`, `username`, `lanplus`).
            No password.
        password_file: File on the machines that run `vmherd run fencing`, which holds the password.
        password_env: Variable of those processes that holds it.
        attempts: Tries of one fencing before it waits.
        timeout_s: An agent that runs for longer is killed, with all that it started.
    """

    agent: str = Field(pattern=r"^fence_[a-z0-9_]{1,40}$")
    options: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")], str] = Field(default_factory=dict)
    password_file: str = ""
    password_env: Annotated[str, Field(pattern=r"^([A-Z][A-Z0-9_]*)?$")] = ""
    attempts: int = Field(2, ge=1, le=10)
    timeout_s: float = Field(20, ge=1, le=120)

    def is_as(self, other: "Bmc | None") -> bool:
        """Whether it is reached as another one is: what was learnt by that one is true of this one."""
        patience = {"attempts": self.attempts, "timeout_s": self.timeout_s}
        return other is not None and other.with_(**patience) == self

    @model_validator(mode="after")
    def _check_options(self, info: ValidationInfo) -> Self:
        if is_stored(info):
            return self
        for name, value in self.options.items():
            if any(word in name for word in _SECRET_WORDS):
                raise misplaced((f"options.{name}", "no secrets here: use passwordFile or passwordEnv"))
            if name == "action":
                raise misplaced(("options.action", "what is done is ours to say"))
            if "\n" in value or "\r" in value or "\0" in value:
                raise misplaced((f"options.{name}", "must be one line"))
        if self.password_file and self.password_env:
            raise misplaced(("passwordEnv", "the password has one place: a file or a variable"))
        return self


class NodeFencingSpec(Model):
    """What people say.

    Attributes:
        enabled: Whether the node may be fenced. Unset: if it has the label `ENABLED_LABEL`. Without it nothing of the
            node restarts elsewhere by itself.
        bmc: None: it has none.
        afterwards: What becomes of a node whose power was cut.
    """

    enabled: bool | None = None
    bmc: Bmc | None = None
    afterwards: Literal["PowerOn", "LeaveOff"] = "PowerOn"


class Evidence(Model):
    """The recorded proof that a node runs nothing any more.

    Attributes:
        level: What gave it.
        text: For people: what was read, or who said so.
        at: When.
        epoch: Of all grants that were given before, none is later.
        generation: Of the lease that ran out.
        sequence: Likewise.
        boot_id: The boot that it is about: this one renews no lease any more.
    """

    level: FenceLevel
    text: str
    at: Timestamp
    epoch: int
    generation: str = ""
    sequence: int = 0
    boot_id: str = ""


class KeptNode(Model):
    """What a node that was removed gets back when it returns: all that people say of it.

    Its annotations are people's as well (no process of ours writes any on a node); some keep its watchdog disarmed.
    """

    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    unschedulable: bool = False
    taints: tuple[Taint, ...] = ()


class NodeFencingStatus(Model):
    """One fencing.

    Attributes:
        since: When this phase began.
        reason: CamelCase, of what was last tried or is waited for.
        message: For people.
        generation: Of the lease that ran out: a renewal ends the fencing.
        sequence: Likewise.
        boot_id: Likewise.
        lost_at: When that was first noticed.
        evidence: What is known; never without it is anything of the node started elsewhere.
        contradicted: What speaks against the evidence: then nothing that rests on it starts any more.
        kept: Of a node that was removed.
        listing_order: Id of the order to list its domains that the node has to answer before it is back: what it
            reported before the evidence may still be unread.
        orders: By UUID, what the node has to destroy before it is back.
        powered_off: Whether we cut its power, so that `afterwards` applies. Written before it is done, and taken back
            when the power was read as on.
        power_on_tries: How often it was asked to switch it on again.
        power_on_after: Not once more before this instant.
        cut_epoch: When this BMC was first told to, likewise: an epoch, as `evidence` has it; 0: it was not.
        bmc_off: Whether this BMC was read as off since.
        lost_before: Members that were silent already when this BMC was first told to cut the power, or read as off.
        may_be_of: By name, the boots of members that had not renewed since it was read as off, when those that were
            not silent before had: it may be the power of one of these. None: that is not known.
        deadline: Why its watchdog's deadline will be no evidence, however long is waited; empty: it may be.
        bmc_distrust: Why this BMC is taken for another host's; empty: it is not. It stays until another BMC is set.
    """

    phase: FencePhase = FencePhase.IDLE
    since: Timestamp | None = None
    reason: str = ""
    message: str = ""
    generation: str = ""
    sequence: int = 0
    boot_id: str = ""
    lost_at: Timestamp | None = None
    evidence: Evidence | None = None
    contradicted: str = ""
    kept: KeptNode | None = None
    powered_off: bool = False
    power_on_tries: int = 0
    power_on_after: Timestamp | None = None
    cut_epoch: int = 0
    bmc_off: bool = False
    lost_before: tuple[str, ...] = ()
    may_be_of: dict[str, str] | None = None
    deadline: str = ""
    bmc_distrust: str = ""
    listing_order: str = ""
    orders: dict[str, Order] = Field(default_factory=dict)


class NodeFencing(Resource):
    """The fencing of one node."""

    kind_name: ClassVar[str] = "NodeFencing"
    group_version: ClassVar[str] = "vmherd.dev/v1"
    plural: ClassVar[str] = "nodefencings"
    short: ClassVar[str] = "fencing"
    namespaced: ClassVar[bool] = False

    api_version: Literal["vmherd.dev/v1"] = "vmherd.dev/v1"
    kind: Literal["NodeFencing"] = "NodeFencing"
    spec: NodeFencingSpec = NodeFencingSpec()
    status: NodeFencingStatus = NodeFencingStatus()

    def with_status(self, **changes: object) -> "NodeFencing":
        """Give a copy with some of its status changed."""
        return self.with_(status=self.status.with_(**changes))

    @property
    def awaits_power(self) -> bool:
        """Whether its power is to be switched on again: we cut it, by this BMC, and all that ran there is settled."""
        status = self.status
        is_wanted = status.powered_off and self.spec.afterwards == "PowerOn"
        return (
            is_wanted and status.phase is FencePhase.RECOVERED and self.spec.bmc is not None and not status.bmc_distrust
        )

    def is_enabled(self, labels: dict[str, str]) -> bool:
        """Whether the node may be fenced: said here, or by its label."""
        return is_enabled_by_label(labels) if self.spec.enabled is None else self.spec.enabled


def is_enabled_by_label(labels: dict[str, str]) -> bool:
    """Whether a node's label says that it may be fenced; its value does not matter, but for `false`."""
    return labels.get(ENABLED_LABEL, "false") != "false"
