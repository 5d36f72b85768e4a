"""`RebalancePolicy`: how the herd is kept balanced. One for the whole herd, called `cluster`.

A document and not settings: it is changed while the herd runs, by whoever may, and says when it was.
"""

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from orchestrator.resources.meta import Condition, Model, Resource, Timestamp

POLICY_NAME: Final = "cluster"
REBALANCE_ANNOTATION: Final = "vmherd.dev/rebalance"
"""Of a VM: `false` keeps the rebalancer's hands off it."""
REASON_ANNOTATION: Final = "vmherd.dev/reason"
"""Of an operation that nobody asked for: why it was made, in one line."""
EXPLANATION_ANNOTATION: Final = "vmherd.dev/explanation"
"""Likewise what it was decided from: JSON of a `planner.rebalance.Move`."""

Percent = Annotated[int, Field(ge=1, le=100)]
Weight = Annotated[float, Field(ge=0, le=100)]


class Shares(Model):
    """Per cent of what VMs may take of a node."""

    cpu: Percent = 80
    memory: Percent = 80


class Weights(Model):
    """What a share of each counts when the herd is evened out."""

    cpu: Weight = 1.0
    memory: Weight = 1.0


class RebalanceSpec(Model):
    """What is wanted.

    Attributes:
        enabled: Off: nothing is moved, whatever the state of the herd.
        interval_seconds: Between two scans.
        thresholds: A node with more reserved is relieved, onto nodes that stay at or below it.
        even_out: Evens the herd out beyond that: moves VMs as long as that makes the nodes' shares more alike.
        deadband_percent: When evening out, nodes so little above the mean are left as they are.
        weights: When evening out.
        max_moves: In one scan.
        max_gib: Moved in one scan, memory and copied disks; a single larger VM is moved alone.
        cooldown_seconds: A VM that has migrated is not moved for load again before, and one whose move failed not at
            all.
        hold: So many scans in a row a node has to be over a threshold before it is relieved; not by hand.
    """

    enabled: bool = True
    interval_seconds: int = Field(60, ge=10, le=86_400)
    thresholds: Shares = Shares()
    even_out: bool = False
    deadband_percent: int = Field(5, ge=0, le=50)
    weights: Weights = Weights()
    max_moves: int = Field(16, ge=1, le=10_000)
    max_gib: int = Field(256, ge=1, le=2**20)
    cooldown_seconds: int = Field(300, ge=0, le=86_400)
    hold: int = Field(1, ge=1, le=100)


class RebalanceStatus(Model):
    """What the last scan found.

    Attributes:
        over: Nodes over a threshold, with the number of scans in a row that found them so.
        unresolved: What could not be put right, with the reason; the first ones.
    """

    scanned_at: Timestamp | None = None
    over: dict[str, int] = Field(default_factory=dict)
    unresolved: dict[str, str] = Field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()


class RebalancePolicy(Resource):
    """How the herd is kept balanced."""

    kind_name: ClassVar[str] = "RebalancePolicy"
    group_version: ClassVar[str] = "vmherd.dev/v1"
    plural: ClassVar[str] = "rebalancepolicies"
    short: ClassVar[str] = "rebalance"
    namespaced: ClassVar[bool] = False

    api_version: Literal["vmherd.dev/v1"] = "vmherd.dev/v1"
    kind: Literal["RebalancePolicy"] = "RebalancePolicy"
    spec: RebalanceSpec = RebalanceSpec()
    status: RebalanceStatus = RebalanceStatus()

    def with_status(self, **changes: object) -> "RebalancePolicy":
        """Give a copy with some of its status changed."""
        return self.with_(status=self.status.with_(**changes))
