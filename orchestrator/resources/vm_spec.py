"""The spec of a `VirtualMachine`: what a person wants to run, in the platform's vocabulary.

A machine is described by its parts (disks, interfaces, bootloader), or by a whole libvirt domain XML
(`domainTemplate`); never by both. The platform has its own disks and networks as resources; here they are named where
they are: an image's path, a bridge.

Some fields say what the machine is: a change of one waits for a restart (`resources.pending`). All others apply at
once. What the platform has no word for is said by annotations and not by fields, so that a manifest works on both:
`vmherd.dev/allow-post-copy` (`resources.vmop`) and `vmherd.dev/allow-storage-copy` (`resources.needs`).
"""

import ipaddress
import math
import re
from enum import StrEnum
from typing import Annotated, Final, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from orchestrator.resources.cpu import CpuWord
from orchestrator.resources.devices import Disk, Interface, duplicates
from orchestrator.resources.meta import Model, is_stored, misplaced, quantity_bytes, unquoted
from orchestrator.resources.names import Labels, Subdomain, shown
from orchestrator.resources.scheduling import Affinity, Toleration, TopologySpreadConstraint
from orchestrator.resources.xml_input import read_domain

MOST_MEMORY: Final = 2**46
"""64 TiB: far beyond any host, and far below where Lua's numbers lose exactness."""


class RunPolicy(StrEnum):
    """When a VM is to run."""

    ALWAYS_ON = "AlwaysOn"
    ALWAYS_ON_UNLESS_STOPPED_MANUALLY = "AlwaysOnUnlessStoppedManually"
    MANUAL = "Manual"
    ALWAYS_OFF = "AlwaysOff"


class LiveMigrationPolicy(StrEnum):
    """How hard a migration may press the guest."""

    ALWAYS_SAFE = "AlwaysSafe"
    PREFER_SAFE = "PreferSafe"
    ALWAYS_FORCED = "AlwaysForced"
    PREFER_FORCED = "PreferForced"


class RestartApprovalMode(StrEnum):
    """Who restarts a VM whose changes wait for it."""

    MANUAL = "Manual"
    AUTOMATIC = "Automatic"


class OsType(StrEnum):
    """What the machine is fitted out for."""

    GENERIC = "Generic"
    WINDOWS = "Windows"
    """With Hyper-V's enlightenments, and a hardware clock that shows local time."""
    LEGACY = "Legacy"
    """On the older chipset (`pc`), for systems that don't know PCI Express."""


class Bootloader(StrEnum):
    """The firmware."""

    BIOS = "BIOS"
    EFI = "EFI"
    EFI_WITH_SECURE_BOOT = "EFIWithSecureBoot"


_CORE_FRACTION = re.compile(r"(100|[1-9][0-9]?)%")


def _check_core_fraction(value: str) -> str:
    if not _CORE_FRACTION.fullmatch(value):
        raise ValueError("must be 1% to 100%")
    return value


def _check_memory(value: str) -> str:
    size = quantity_bytes(value)
    if size < 2**20:
        raise ValueError(f"{shown(value)} is less than 1Mi")
    if size > MOST_MEMORY:
        raise ValueError(f"{shown(value)} is more than 64Ti")
    return value


def _check_address(value: str) -> str:
    if not value:
        return value
    try:
        parsed = ipaddress.ip_address(value)
    except ValueError as error:
        raise ValueError(f"{shown(value)} is not an IP address") from error
    if parsed.is_loopback or parsed.is_multicast or parsed.is_unspecified:
        raise ValueError(f"{shown(value)} is not an address that a guest can have")
    return value


class Cpu(Model):
    """Virtual CPUs.

    Attributes:
        cores: How many the guest sees.
        core_fraction: How much of each is reserved; the guest may use more while the host is idle.
        sockets: Over how many sockets the cores are spread, evenly.
        model: libvirt's name of a CPU model, for a VM without a class.
    """

    cores: int = Field(1, ge=1, le=1024)
    core_fraction: Annotated[str, AfterValidator(_check_core_fraction)] = "100%"
    sockets: int = Field(1, ge=1, le=64)
    model: CpuWord | None = None

    @model_validator(mode="after")
    def _check_sockets(self, info: ValidationInfo) -> Self:
        if self.cores % self.sockets and not is_stored(info):
            raise misplaced(("sockets", f"{self.cores} cores can't be spread evenly over {self.sockets} sockets"))
        return self


class Memory(Model):
    """Guest memory.

    Attributes:
        size: A quantity such as `2Gi`.
    """

    size: Annotated[str, AfterValidator(_check_memory)]


class Disruptions(Model):
    """What may be done to the guest's operation."""

    restart_approval_mode: RestartApprovalMode = RestartApprovalMode.MANUAL


class VirtualMachineSpec(Model):
    """What is wanted.

    Attributes:
        virtual_machine_class_name: What kind of machine: the CPU that it sees, and where it may run.
        disks: In the order in which they are attached.
        interfaces: In the order in which they are attached.
        enable_paravirtualization: Virtio devices; off, ones that any guest knows.
        domain_template: A libvirt domain XML in place of a description. Its name, uuid, memory, vcpu and what happens
            on poweroff, reboot and crash are replaced by this resource's; with a class, its CPU too.
        node_selector: Labels that a node must have; those of the class win.
        topology_spread_constraints: How evenly its like are spread over nodes.
        tolerations: Taints of nodes that it puts up with.
        priority_class_name: Named beside `priority`; kept, and not looked at.
        termination_grace_period_seconds: So long a guest that is asked to power off is given.
        priority: Who goes first after a failure; higher goes first.
        ip_address: The guest's own fixed address, where it has one.
    """

    run_policy: RunPolicy = RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY
    virtual_machine_class_name: Subdomain | None = None
    cpu: Cpu = Cpu(cores=1, core_fraction="100%")
    memory: Memory
    disks: tuple[Disk, ...] = Field((), max_length=64)
    interfaces: tuple[Interface, ...] = Field((), max_length=16)
    os_type: OsType = OsType.GENERIC
    bootloader: Bootloader = Bootloader.BIOS
    enable_paravirtualization: bool = True
    domain_template: str | None = None
    node_selector: Labels = Field(default_factory=dict)
    affinity: Affinity | None = None
    topology_spread_constraints: tuple[TopologySpreadConstraint, ...] = Field((), max_length=16)
    tolerations: tuple[Toleration, ...] = Field((), max_length=64)
    priority_class_name: Subdomain | None = None
    priority: int | None = Field(None, ge=-(2**31), le=10**9)
    live_migration_policy: LiveMigrationPolicy = LiveMigrationPolicy.PREFER_SAFE
    disruptions: Disruptions = Disruptions()
    termination_grace_period_seconds: int = Field(60, ge=0, le=31_536_000)
    ip_address: Annotated[str, AfterValidator(_check_address)] = ""

    @field_validator("domain_template")
    @classmethod
    def _check_template(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not is_stored(info):
            try:
                read_domain(value)
            except ValueError as error:
                raise unquoted(str(error)) from None
        return value

    @model_validator(mode="after")
    def _check_kind(self, info: ValidationInfo) -> Self:
        if is_stored(info):
            return self
        causes = self._template_causes() if self.domain_template is not None else self._structured_causes()
        spread: set[tuple[str, str]] = set()
        for number, constraint in enumerate(self.topology_spread_constraints):
            pair = (constraint.topology_key, constraint.when_unsatisfiable)
            if pair in spread:
                why = f"{pair[0]} with {pair[1]} is there already"
                causes.append((f"topologySpreadConstraints[{number}].topologyKey", why))
            spread.add(pair)
        if causes:
            raise misplaced(*causes)
        return self

    def _template_causes(self) -> list[tuple[str, str]]:
        """What can't stand beside a template."""
        given = {
            "disks": bool(self.disks),
            "interfaces": bool(self.interfaces),
            "osType": self.os_type is not OsType.GENERIC,
            "bootloader": self.bootloader is not Bootloader.BIOS,
            "enableParavirtualization": not self.enable_paravirtualization,
            "cpu.sockets": self.cpu.sockets != 1,
            "cpu.model": self.cpu.model is not None,
        }
        why = "conflicts with domainTemplate: a machine is described by one of both"
        return [(path, why) for path, is_given in given.items() if is_given]

    def _structured_causes(self) -> list[tuple[str, str]]:
        causes: list[tuple[str, str]] = []
        if "cpu" not in self.model_fields_set:
            causes.append(("cpu", "is required (without a domainTemplate)"))
        if not self.disks and not self.interfaces:
            causes.append(("disks", "is required (or interfaces to boot from, or a domainTemplate)"))
        if self.cpu.model is not None and self.virtual_machine_class_name is not None:
            causes.append(("cpu.model", "conflicts with virtualMachineClassName: the class says the CPU"))
        if not self.enable_paravirtualization:
            virtual = [f"disks[{n}].bus" for n, d in enumerate(self.disks) if d.bus == "virtio"]
            virtual += [f"interfaces[{n}].model" for n, i in enumerate(self.interfaces) if i.model == "virtio"]
            causes += [(path, "virtio conflicts with enableParavirtualization: false") for path in virtual]
        if self.os_type is not OsType.LEGACY:
            causes += [
                (f"disks[{n}].bus", "ide is for osType Legacy") for n, d in enumerate(self.disks) if d.bus == "ide"
            ]
        if self.os_type is OsType.LEGACY and self.bootloader is Bootloader.EFI_WITH_SECURE_BOOT:
            causes.append(("bootloader", "osType Legacy has no secure boot"))
        return causes + duplicates(self.disks, self.interfaces)

    @property
    def memory_mib(self) -> int:
        """Guest memory, MiB, rounded up."""
        return -(-quantity_bytes(self.memory.size) // 2**20)

    @property
    def cpu_millicores(self) -> int:
        """CPU reservation: ceil(cores * 1000 * coreFraction / 100)."""
        return math.ceil(self.cpu.cores * 1000 * int(self.cpu.core_fraction[:-1]) / 100)
