"""The hypervisor port over simulated hosts (`simulated_world`), through whichever link leads to their world."""

from collections.abc import Callable
from typing import Any, Protocol

from orchestrator.errors import HypervisorError
from workers.hypervisor.port import (
    Definition,
    Domain,
    DomainEvent,
    Host,
    HostUse,
    Job,
    Marker,
    MigrationRequest,
    MigrationResult,
)


class Link(Protocol):
    """Leads to one simulated host's daemon."""

    def ask(self, method: str, *arguments: Any) -> Any:
        """Ask something of it, and wait for the answer: see `World.call`; raises what the port's method raises."""
        ...

    def watch(self, callback: Callable[[DomainEvent], None]) -> None:
        """Tell `callback` of every event, from a thread of its own, over outages.

        Raises:
            HypervisorUnavailable: The daemon does not answer now; nothing is watched.
        """
        ...

    def close(self) -> None:
        """Tell nothing any more. Idempotent."""
        ...


class SimulatedHypervisor:
    """One simulated host. Nothing is opened before it is used.

    Args:
        link: Leads there.
        name: The host's, for messages.
    """

    def __init__(self, link: Link, name: str) -> None:
        self.name = name
        self._link = link
        self._is_watched = False
        self._closed = False

    def __repr__(self) -> str:
        return f"SimulatedHypervisor({self.name!r})"

    def _ask(self, method: str, *arguments: Any) -> Any:
        if self._closed:
            raise HypervisorError(f"the driver of simulated host {self.name} was closed")
        return self._link.ask(method, *arguments)

    def host(self) -> Host:
        """Read what the host is."""
        answer: Host = self._ask("host")
        return answer

    def use(self) -> HostUse:
        """Read what is in use of the host."""
        answer: HostUse = self._ask("use")
        return answer

    def domains(self) -> list[Domain]:
        """Read all domains, active and inactive, ordered by name."""
        answer: list[Domain] = self._ask("domains")
        return answer

    def domain(self, uuid: str) -> Domain | None:
        """Read one domain; None when the host does not have it."""
        answer: Domain | None = self._ask("domain", uuid)
        return answer

    def start(self, domain_xml: str, marker: Marker) -> Domain:
        """Start a transient domain from `domain_xml` with `marker` written into its metadata."""
        answer: Domain = self._ask("start", domain_xml, marker)
        return answer

    def destroy(self, uuid: str) -> None:
        """Stop a domain at once; a domain that is not there is no error. Returns once the process is gone."""
        self._ask("destroy", uuid)

    def shutdown(self, uuid: str) -> None:
        """Ask the guest to power off, and return at once."""
        self._ask("shutdown", uuid)

    def resume(self, uuid: str) -> None:
        """Let a paused domain run; one that runs is left alone."""
        self._ask("resume", uuid)

    def migrate(self, request: MigrationRequest) -> MigrationResult:
        """Live-migrate a domain; blocks until the call ends, and the migration goes on if this process does not."""
        answer: MigrationResult = self._ask("migrate", request)
        return answer

    def job(self, uuid: str) -> Job | None:
        """Read the job active on a domain of this host, or None."""
        answer: Job | None = self._ask("job", uuid)
        return answer

    def abort(self, uuid: str) -> bool:
        """Ask that the active migration be aborted; whether that was accepted."""
        return bool(self._ask("abort", uuid))

    def start_post_copy(self, uuid: str) -> bool:
        """Switch the active migration, which allowed it, to post-copy; whether that was accepted."""
        return bool(self._ask("start_post_copy", uuid))

    def dirty_rate(self, uuid: str, seconds: float) -> float | None:
        """Measure how fast a running guest dirties memory, MiB/s; None where that can't be told."""
        answer: float | None = self._ask("dirty_rate", uuid, seconds)
        return answer

    def completed_job(self, uuid: str) -> dict[str, int]:
        """Read, on the target, the figures of the last completed migration; empty when there are none."""
        answer: dict[str, int] = self._ask("completed_job", uuid)
        return answer

    def addresses(self, uuid: str) -> list[str]:
        """IP addresses of a running guest; empty if not known."""
        answer: list[str] = self._ask("addresses", uuid)
        return answer

    def preflight(self, domain_xml: str, copied_disks: tuple[str, ...] = ()) -> list[str]:
        """Say why a machine could not arrive here by live migration."""
        answer: list[str] = self._ask("preflight", domain_xml, copied_disks)
        return answer

    def definition(self, uuid: str, *, secrets: bool = False) -> Definition | None:
        """Read how a domain is configured; None when the host does not have it."""
        answer: Definition | None = self._ask("definition", uuid, secrets)
        return answer

    def mark(self, uuid: str, marker: Marker) -> None:
        """Write `marker` into a running domain's live metadata, replacing one that is there."""
        self._ask("mark", uuid, marker)

    def unmark(self, uuid: str) -> None:
        """Remove the marker from a running domain's live metadata; nothing where there is none."""
        self._ask("unmark", uuid)

    def define(self, domain_xml: str, *, autostart: bool) -> None:
        """Make a domain persistent with this configuration."""
        self._ask("define", domain_xml, autostart)

    def undefine(self, uuid: str) -> None:
        """Make a running persistent domain transient; one that is transient already, or not there, is no error."""
        self._ask("undefine", uuid)

    def boot_id(self) -> str:
        """Read the id of this boot of the host: another one after each loss of power. Not of the port."""
        answer: str = self._ask("boot_id")
        return answer

    def watch(self, callback: Callable[[DomainEvent], None]) -> None:
        """Call `callback` for every event from now on, from a thread of the driver's; one watcher a driver."""
        if self._closed:
            raise HypervisorError(f"the driver of simulated host {self.name} was closed")
        if self._is_watched:
            raise HypervisorError(f"simulated host {self.name} has a watcher already")
        self._link.watch(callback)
        self._is_watched = True

    def close(self) -> None:
        """Close it. Idempotent. A migration that runs goes on, and its call returns at its end."""
        self._closed = True
        self._link.close()
