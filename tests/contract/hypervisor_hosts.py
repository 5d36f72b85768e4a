"""What the hypervisor contract is tested on: a pair of hosts, and the faults that a test may cause there.

Each driver brings a pair of its own (`libvirt_hosts`), so that this module needs none of them.
"""

from typing import Final, Literal, Protocol

from workers.hypervisor.port import Hypervisor, Marker

Side = Literal["source", "target"]

BUSY_MIB: Final = 80
"""What a `busy` machine has to send. At `BUSY_CAP_MIB_S` that takes four seconds."""
BUSY_CAP_MIB_S: Final = 20
"""A bandwidth at which a `busy` machine takes several seconds to migrate, and a `restless` one never ends."""
UNCAPPED_MIB_S: Final = 596


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
        """A machine that dirties memory faster than `BUSY_CAP_MIB_S`: its migration does not end."""
        ...

    def poweroff_xml(self, name: str, uuid: str) -> str:
        """A machine that powers itself off a second after its start."""
        ...

    def refused_xml(self, name: str, uuid: str) -> str:
        """A machine that the hypervisor can't start."""
        ...

    def start_persistent(self, side: Side, domain_xml: str, marker: Marker) -> None:
        """Define and start a machine that the host would know after a reboot, with autostart, as a person may have."""
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
