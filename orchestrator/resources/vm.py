"""`VirtualMachine`: what a person wants to run, and what is known of it."""

from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import Field

from orchestrator.resources.adoption import Adoption
from orchestrator.resources.fencing import FenceLevel
from orchestrator.resources.machine import Machine
from orchestrator.resources.meta import GROUP_VERSION, Condition, Model, Resource, Timestamp
from orchestrator.resources.needs import Arrival, MachineNeeds
from orchestrator.resources.vm_spec import (
    Cpu,
    LiveMigrationPolicy,
    Memory,
    RunPolicy,
    VirtualMachineSpec,
)

__all__ = [
    "Change",
    "Cpu",
    "LiveMigrationPolicy",
    "Memory",
    "MigrationEndpoint",
    "MigrationState",
    "Recovery",
    "RunPolicy",
    "VirtualMachine",
    "VirtualMachineSpec",
    "VirtualMachineStatus",
    "VmPhase",
]


class VmPhase(StrEnum):
    """What a VM does now."""

    PENDING = "Pending"
    STARTING = "Starting"
    RUNNING = "Running"
    DEGRADED = "Degraded"
    MIGRATING = "Migrating"
    PAUSE = "Pause"
    STOPPING = "Stopping"
    STOPPED = "Stopped"
    TERMINATING = "Terminating"

    @property
    def occupies_node(self) -> bool:
        """Whether a VM in this phase takes memory and CPU of its node."""
        return self not in {VmPhase.PENDING, VmPhase.STOPPED}


class MigrationEndpoint(Model):
    """One side of a migration."""

    node: str


class Recovery(Model):
    """The evidence on which a VM starts that ran on a lost node; until it runs.

    Attributes:
        node: The lost one.
        level: What gave the evidence.
        epoch: Of the evidence.
        locked_since: Since when its storage was found locked.
        held: Why nothing but a person starts it any more: a reason in CamelCase; empty: it is started.
    """

    node: str
    level: FenceLevel
    epoch: int
    locked_since: Timestamp | None = None
    held: str = ""


class MigrationState(Model):
    """The latest migration of a VM."""

    start_timestamp: Timestamp | None = None
    end_timestamp: Timestamp | None = None
    source: MigrationEndpoint
    target: MigrationEndpoint
    result: Literal["", "Succeeded", "Failed"] = ""


class Change(Model):
    """One field of the spec that waits for a restart.

    Attributes:
        path: `spec.memory.size`, `spec.disks[root].file.path`.
        current_value: Of the machine that runs; None: not there.
        desired_value: Likewise of the spec.
    """

    path: str
    operation: Literal["add", "remove", "replace"]
    current_value: Any = None
    desired_value: Any = None


class VirtualMachineStatus(Model):
    """What is known.

    Attributes:
        node_name: Where it runs, or ran last.
        ip_address: The guest's, as far as it is known.
        conditions: Running, Migratable and others, each with its reason.
        incarnation: Its start counter; the one that may run. 0 before the first start.
        counter: The number of the node's report that this status rests on (one counter per node).
        elsewhere: Another node that shows it running too: the target of a migration begun behind our back, before its
            source has told that it left; or the sign that it runs twice.
        outdated: Nodes that show a copy of a lower incarnation, which must not run. It never becomes the VM again.
        started_at: When its present, or last, incarnation began to run.
        failures: Stops in a row that nobody asked for.
        not_before: It is not started again before this instant (back-off).
        needs: What it needs of a host to which it migrates, as its node told last.
        arrivals: By node, whether it can arrive there, as that node answered last.
        machine: What it was given at its last start: it is given the same at the next.
        applied: The spec that it was started with, kept from the first change on that needs a restart; None: `spec`.
        restart_awaiting_changes: What a restart would change.
        firmware: Version of the QEMU that it runs on; empty where that is not known.
        firmware_update: The version for which it was last asked to move to a newer one.
        recovery: After evidence about its node, until it runs again: on which.
        adoption: Its adoption or release, while that is under way: nothing else is done to it then.
    """

    phase: VmPhase = VmPhase.PENDING
    node_name: str = ""
    ip_address: str = ""
    incarnation: int = 0
    counter: int = 0
    elsewhere: str = ""
    outdated: tuple[str, ...] = ()
    started_at: Timestamp | None = None
    failures: int = 0
    not_before: Timestamp | None = None
    needs: MachineNeeds | None = None
    arrivals: dict[str, Arrival] = Field(default_factory=dict)
    firmware: str = ""
    firmware_update: str = ""
    recovery: Recovery | None = None
    adoption: Adoption | None = None
    conditions: tuple[Condition, ...] = ()
    migration_state: MigrationState | None = None
    machine: Machine | None = None
    applied: VirtualMachineSpec | None = None
    restart_awaiting_changes: tuple[Change, ...] = ()


class VirtualMachine(Resource):
    """A virtual machine; its `metadata.uid` is its libvirt domain's UUID."""

    kind_name: ClassVar[str] = "VirtualMachine"
    group_version: ClassVar[str] = GROUP_VERSION
    plural: ClassVar[str] = "virtualmachines"
    short: ClassVar[str] = "vm"

    api_version: Literal["virtualization.deckhouse.io/v1alpha2"] = GROUP_VERSION
    kind: Literal["VirtualMachine"] = "VirtualMachine"
    spec: VirtualMachineSpec
    status: VirtualMachineStatus = VirtualMachineStatus()

    @property
    def domain_name(self) -> str:
        """The libvirt domain's name on every host."""
        return f"{self.metadata.namespace}.{self.name}"

    @property
    def running_spec(self) -> VirtualMachineSpec:
        """The spec of the machine that runs: what it takes of its node goes by this one."""
        applied = self.status.applied
        return applied if applied is not None and self.status.phase.occupies_node else self.spec

    def with_status(self, **changes: object) -> "VirtualMachine":
        """Give a copy with some of its status changed."""
        return self.with_(status=self.status.with_(**changes))
