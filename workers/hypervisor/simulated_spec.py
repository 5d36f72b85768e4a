"""What a simulated host has, in which state it is, and what is in store for it."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from orchestrator.errors import HypervisorError, HypervisorUnavailable, OutcomeUnknown
from workers.hypervisor.port import DomainEvent, MigrationEnd, MigrationResult


class Daemon(StrEnum):
    """What a host's daemon does."""

    ANSWERS = "answers"
    HANGS = "hangs"
    DEAD = "dead"
    NO_POWER = "no power"


@dataclass(frozen=True, slots=True)
class HostSpec:
    """What a simulated host has.

    Attributes:
        name: Its name in the simulation.
        cpus: Logical CPUs.
        memory_mib: Physical memory.
        qemu: Version of its QEMU.
        cpu_model: One of `simulated_cpu.CPU_MODELS`.
        bridges: Its bridges; None: whichever is asked for.
        networks: Its active networks; None: whichever is asked for.
        shared_paths: Folders whose files every host has.
        files: Files of its own besides.
    """

    name: str
    cpus: int = 16
    memory_mib: int = 65_536
    cpu_model: str = "Skylake-Server"
    qemu: str = "7.2.22"
    bridges: tuple[str, ...] | None = None
    networks: tuple[str, ...] | None = None
    shared_paths: tuple[str, ...] = ("/",)
    files: tuple[str, ...] = ()


@dataclass
class Failure:
    """A failure that is to come.

    Attributes:
        message: The hypervisor's words for it.
        left: How often; 0: always.
    """

    message: str
    left: int = 0


def due_failure(failures: dict[str, Failure], keys: tuple[str, ...]) -> str:
    """Give the message of the first failure that is due under any of some keys, and count it; empty if none is."""
    for key in keys:
        failure = failures.get(key)
        if failure is not None:
            if failure.left == 1:
                del failures[key]
            failure.left = max(0, failure.left - 1)
            return failure.message
    return ""


_CHANGES: Final = frozenset(
    {"start", "destroy", "resume", "abort", "start_post_copy", "mark", "unmark", "define", "undefine"}
)
"""Calls of the port whose effect is not known when their answer is lost."""


def broken_off(method: str, words: str) -> MigrationResult | HypervisorError | OutcomeUnknown:
    """Give what a call of the port gives, or raises, when its connection breaks while it runs."""
    if method == "migrate":
        return MigrationResult(MigrationEnd.UNKNOWN, words)
    return OutcomeUnknown(words) if method in _CHANGES else HypervisorUnavailable(words)


def unanswered(method: str, words: str) -> MigrationResult | HypervisorError:
    """Give what a call of the port gives, or raises, when the daemon was not reached."""
    return MigrationResult(MigrationEnd.NOT_STARTED, words) if method == "migrate" else HypervisorUnavailable(words)


@dataclass(eq=False)
class Subscription:
    """Takes what happens on one host.

    Attributes:
        host: The host's name.
        wake: Called when there is something to take; must not call the world.
        events: What was not taken yet, in order.
        is_lost: Whether the daemon was last seen to be away.
    """

    host: str
    wake: Callable[[], None]
    events: deque[DomainEvent] = field(default_factory=deque)
    is_lost: bool = False

    def tell(self, event: DomainEvent) -> None:
        """Add an event."""
        self.events.append(event)
        self.wake()

    def take(self) -> list[DomainEvent]:
        """Give what was not taken yet, in order."""
        taken: list[DomainEvent] = []
        while self.events:
            taken.append(self.events.popleft())
        return taken
