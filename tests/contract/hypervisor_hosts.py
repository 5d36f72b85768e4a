"""What the hypervisor contract is tested on: a pair of hosts, and the faults that a test may cause there.

Each driver brings a pair of its own (`libvirt_hosts`), so that this module needs none of them.
"""

from typing import Final, Literal, Protocol

import pytest

from workers.hypervisor.port import Hypervisor, Marker

DRIVERS: Final = [
    "simulated",
    "simulated_here",
    pytest.param("libvirt", marks=[pytest.mark.lab, pytest.mark.timeout(240)]),
]
"""The drivers that the contract's suites run on: the fixture `pair` takes its hosts from `<driver>_pair`."""

Side = Literal["source", "target"]
Lack = Literal["cpu", "machine", "disk", "cdrom", "bridge", "network", "hostdev", "tpm"]
"""What keeps a machine from running on a host: a CPU model or machine type that it has not, a file, bridge or network
that is not there, a device of another host, and the state of a TPM that is not kept."""

BUSY_MIB: Final = 80
"""What a `busy` machine has to send. At `BUSY_CAP_MIB_S` that takes four seconds."""
BUSY_CAP_MIB_S: Final = 20
"""A bandwidth at which a `busy` machine takes several seconds to migrate, and a `restless` one never ends."""
RESTLESS_MIB_S: Final = 3 * BUSY_CAP_MIB_S
"""What a `restless` machine dirties each second, out of `BUSY_MIB`."""
UNCAPPED_MIB_S: Final = 596
LOCAL_DISK_MIB: Final = 48
"""Size of the disk of a machine with a `local_disk`: several times the 16 MiB that QEMU copies at once."""
CONSOLE_PASSWORD: Final = "hushhush"
"""Of a `secret` machine; VNC takes no longer one."""


class HostPair(Protocol):
    """Two hosts between which machines migrate, and the faults that a test may cause.

    Attributes:
        target_uri: Where the source sends migrations to.
        away_uri: The same for a host that is not there, which shows within seconds.
    """

    target_uri: str
    away_uri: str

    @property
    def source(self) -> Hypervisor:
        """The source's driver: new for each test, and closed after it."""
        ...

    @property
    def target(self) -> Hypervisor:
        """The target's driver."""
        ...

    def blank_xml(self, name: str, uuid: str) -> str:
        """A machine that does nothing, of 16 MiB and one CPU."""
        ...

    def busy_xml(self, name: str, uuid: str) -> str:
        """A machine with `BUSY_MIB` to send and little to send again: its migration lasts, and ends."""
        ...

    def restless_xml(self, name: str, uuid: str) -> str:
        """A machine that dirties `RESTLESS_MIB_S`, faster than `BUSY_CAP_MIB_S`: its migration does not end."""
        ...

    def poweroff_xml(self, name: str, uuid: str) -> str:
        """A machine that powers itself off a second after its start."""
        ...

    def panic_xml(self, name: str, uuid: str) -> str:
        """A machine that panics a second after its start, and whose domain is kept then (on_crash=preserve)."""
        ...

    def obedient_xml(self, name: str, uuid: str) -> str:
        """A machine that powers itself off when it is asked to (from a second after its start); others ignore that."""
        ...

    def rebooting_xml(self, name: str, uuid: str) -> str:
        """A machine that reboots itself each second."""
        ...

    def agent_xml(self, name: str, uuid: str) -> str:
        """A machine with a channel for a guest agent, and no agent in it."""
        ...

    def secret_xml(self, name: str, uuid: str) -> str:
        """A machine with a console whose password is `CONSOLE_PASSWORD`."""
        ...

    def equipped_xml(self, name: str, uuid: str) -> str:
        """A machine of which the hosts might lack something and don't.

        It has a CPU model, a disk `vda`, a CD-ROM, and interfaces to a bridge and to a network.
        """
        ...

    def unfit_xml(self, name: str, uuid: str, lack: Lack) -> str:
        """An `equipped` machine with one thing that neither host has, whose name holds `nowhere`."""
        ...

    def local_disk_xml(self, name: str, uuid: str) -> str:
        """A machine with a disk `vda` of `LOCAL_DISK_MIB`, which the source has and the target has not.

        The disk is made, for the test's time, by this call.
        """
        ...

    def has_local_disk(self, side: Side, uuid: str) -> bool:
        """Whether a side has the disk of a `local_disk` machine, with what the source's held at first."""
        ...

    def refused_xml(self, name: str, uuid: str) -> str:
        """A machine that the hypervisor can't start."""
        ...

    def start_persistent(self, side: Side, domain_xml: str, marker: Marker | None) -> None:
        """Define and start a machine that the host would know after a reboot, with autostart, as a person may have.

        With a marker it is one that vmherd manages.
        """
        ...

    def add_snapshot(self, side: Side, uuid: str) -> None:
        """Give a machine a snapshot, as a person may."""
        ...

    def pause(self, side: Side, uuid: str) -> None:
        """Pause a machine, as a person may."""
        ...

    def kill_daemon(self, side: Side) -> None:
        """End the management daemon at once; machines run on."""
        ...

    def start_daemon(self, side: Side) -> None:
        """Start the daemon again, and return when it answers."""
        ...

    def kill_machine(self, side: Side, uuid: str) -> None:
        """End a machine's process at once."""
        ...

    def terminate_machine(self, side: Side, uuid: str) -> None:
        """Ask a machine's process to end, as the host's shutdown does."""
        ...

    def freeze_machine(self, side: Side, uuid: str) -> None:
        """Stop a machine's process, so that the daemon gets no answer from it."""
        ...

    def thaw_machine(self, side: Side, uuid: str) -> None:
        """Undo `freeze_machine`."""
        ...
