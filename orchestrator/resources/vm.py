"""`VirtualMachine`: what a person wants to run, and what is known of it."""

import math
import re
import xml.etree.ElementTree as ET
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from orchestrator.resources.meta import GROUP_VERSION, Condition, Model, Resource, Timestamp, quantity_bytes


class RunPolicy(StrEnum):
    """When a VM is to run."""

    ALWAYS_ON = "AlwaysOn"
    ALWAYS_ON_UNLESS_STOPPED_MANUALLY = "AlwaysOnUnlessStoppedManually"
    MANUAL = "Manual"
    ALWAYS_OFF = "AlwaysOff"


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


class LiveMigrationPolicy(StrEnum):
    """How hard a migration may press the guest."""

    ALWAYS_SAFE = "AlwaysSafe"
    PREFER_SAFE = "PreferSafe"
    ALWAYS_FORCED = "AlwaysForced"
    PREFER_FORCED = "PreferForced"


_CORE_FRACTION = re.compile(r"(100|[1-9][0-9]?)%")


def _check_core_fraction(value: str) -> str:
    if not _CORE_FRACTION.fullmatch(value):
        raise ValueError("must be 1% to 100%")
    return value


def _check_memory(value: str) -> str:
    if quantity_bytes(value) < 2**20:
        raise ValueError(f"{value!r} is less than 1Mi")
    return value


def _check_template(value: str) -> str:
    try:
        root = ET.fromstring(value)  # noqa: S314
    except ET.ParseError as error:
        raise ValueError(f"is not well-formed XML: {error}") from error
    if root.tag != "domain":
        raise ValueError(f"is not a libvirt domain: its root element is <{root.tag}>")
    return value


class Cpu(Model):
    """Virtual CPUs.

    Attributes:
        cores: How many the guest sees.
        core_fraction: How much of each is reserved; the guest may use more while the host is idle.
    """

    cores: int = Field(1, ge=1, le=1024)
    core_fraction: Annotated[str, AfterValidator(_check_core_fraction)] = "100%"


class Memory(Model):
    """Guest memory, as a quantity such as `2Gi`."""

    size: Annotated[str, AfterValidator(_check_memory)]


class VirtualMachineSpec(Model):
    """What is wanted.

    Attributes:
        domain_template: A libvirt domain XML. Its name, uuid, memory and vcpu are replaced by this resource's.
        node_selector: Labels that a node must have.
        ip_address: The guest's own fixed address, where it has one.
    """

    run_policy: RunPolicy = RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY
    cpu: Cpu = Cpu(cores=1, core_fraction="100%")
    memory: Memory
    node_selector: dict[str, str] = Field(default_factory=dict)
    live_migration_policy: LiveMigrationPolicy = LiveMigrationPolicy.PREFER_SAFE
    termination_grace_period_seconds: int = Field(60, ge=0)
    ip_address: str = ""
    domain_template: Annotated[str, AfterValidator(_check_template)]

    @property
    def memory_mib(self) -> int:
        """Guest memory, MiB, rounded up."""
        return -(-quantity_bytes(self.memory.size) // 2**20)

    @property
    def cpu_millicores(self) -> int:
        """CPU reservation: ceil(cores * 1000 * coreFraction / 100)."""
        return math.ceil(self.cpu.cores * 1000 * int(self.cpu.core_fraction[:-1]) / 100)


class MigrationEndpoint(Model):
    """One side of a migration."""

    node: str


class MigrationState(Model):
    """The latest migration of a VM."""

    start_timestamp: Timestamp | None = None
    end_timestamp: Timestamp | None = None
    source: MigrationEndpoint
    target: MigrationEndpoint
    result: Literal["", "Succeeded", "Failed"] = ""


class VirtualMachineStatus(Model):
    """What is known.

    Attributes:
        node_name: Where it runs, or ran last.
        incarnation: Its start counter; the one that may run. 0 before the first start.
        counter: The number of the node's report that this status rests on (one counter per node).
        elsewhere: Another node that shows it running too: the target of a migration begun behind our back, before its
            source has told that it left; or the sign that it runs twice.
        outdated: Nodes that show a copy of a lower incarnation, which must not run. It never becomes the VM again.
    """

    phase: VmPhase = VmPhase.PENDING
    node_name: str = ""
    ip_address: str = ""
    incarnation: int = 0
    counter: int = 0
    elsewhere: str = ""
    outdated: tuple[str, ...] = ()
    conditions: tuple[Condition, ...] = ()
    migration_state: MigrationState | None = None


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

    def with_status(self, **changes: object) -> "VirtualMachine":
        """Give a copy with some of its status changed."""
        return self.with_(status=self.status.with_(**changes))


def render_domain(vm: VirtualMachine) -> str:
    """Make the domain XML of a VM from its template: name, uuid, memory and vCPUs are the resource's."""
    root = ET.fromstring(vm.spec.domain_template)  # noqa: S314 - checked at admission
    values = {
        "name": vm.domain_name,
        "uuid": vm.metadata.uid,
        "memory": str(vm.spec.memory_mib * 1024),
        "currentMemory": str(vm.spec.memory_mib * 1024),
        "vcpu": str(vm.spec.cpu.cores),
    }
    for tag, value in values.items():
        element = root.find(tag)
        if element is None:
            element = ET.SubElement(root, tag)
        element.text = value
        if tag in {"memory", "currentMemory"}:
            element.attrib["unit"] = "KiB"
        if tag == "vcpu":
            element.attrib.pop("current", None)
    return ET.tostring(root, encoding="unicode")
