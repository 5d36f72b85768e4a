"""A reading of a domain is of one moment, though libvirt tells its parts one by one; addresses come from who knows."""

from collections.abc import Sequence
from typing import Any

import libvirt
import pytest

from workers.hypervisor.libvirt_domains import DomainReader, read_addresses
from workers.hypervisor.libvirt_readings import INCOMING_JOB, JobKind, JobReading
from workers.hypervisor.port import DomainState, Job

UUID = "5e21a3d0-9a53-4d5c-8a39-6b8f7b8a4c11"
RUNNING_BOOTED, RUNNING_MIGRATED, PAUSED_MIGRATION, SHUTOFF_MIGRATED = (1, 1), (1, 2), (3, 2), (5, 4)
NO_JOB = JobReading(JobKind.NONE)
OUTGOING = JobReading(JobKind.OUTGOING, Job())
Moment = tuple[tuple[int, int] | None, JobReading]


class World:
    """A host with one domain that goes from moment to moment, one further at each question about its job.

    It stands for the connection, the domain's handle on it, and the source of jobs.
    """

    def __init__(self, *moments: Moment, is_persistent: bool = False) -> None:
        self.moments = list(moments)
        self.is_persistent = is_persistent

    def job(self) -> JobReading:
        _, job = self.moments[0]
        if len(self.moments) > 1:
            self.moments.pop(0)
        return job

    def state(self) -> list[int]:
        state, _ = self.moments[0]
        if state is None:
            raise NoDomain
        return list(state)

    def lookupByUUIDString(self, uuid: str) -> "World":  # noqa: N802  libvirt's names, here and below
        self.state()
        return self

    def getAllDomainStats(self, stats: int, flags: int) -> list[tuple["World", dict[str, int]]]:  # noqa: N802
        state, _ = self.moments[0]
        return [] if state is None else [(self, {"state.state": state[0], "state.reason": state[1]})]

    def listAllDomains(self, flags: int) -> list["World"]:  # noqa: N802
        return [self] if self.is_persistent else []

    def UUIDString(self) -> str:  # noqa: N802
        return UUID

    def XMLDesc(self) -> str:  # noqa: N802
        self.state()
        return f"<domain><name>x</name><uuid>{UUID}</uuid><memory>16384</memory><vcpu>1</vcpu></domain>"

    def isPersistent(self) -> int:  # noqa: N802
        return int(self.is_persistent)


class NoDomain(libvirt.libvirtError):  # type: ignore[misc]  # libvirt has no types
    def __init__(self) -> None:
        Exception.__init__(self, "no domain")

    def get_error_code(self) -> int:
        return int(libvirt.VIR_ERR_NO_DOMAIN)


class Reader(DomainReader):
    def __init__(self, world: World) -> None:
        super().__init__("test:///default")
        self._world = world

    def read_jobs(self, uuids: Sequence[str], deadline_s: float = 0) -> dict[str, JobReading]:
        return {uuid: self._world.job() for uuid in uuids}


Seen = tuple[DomainState, bool] | None


def one(world: World) -> Seen:
    domain = Reader(world).read(world, UUID)
    return None if domain is None else (domain.state, domain.has_job)


def all_of_them(world: World) -> Seen:
    domains = Reader(world).read_all(world)
    return (domains[0].state, domains[0].has_job) if domains else None


@pytest.mark.parametrize("read", [one, all_of_them])
@pytest.mark.parametrize(
    ("moments", "seen"),
    [
        pytest.param([(RUNNING_BOOTED, OUTGOING)], (DomainState.RUNNING, True), id="steady"),
        pytest.param(
            [(PAUSED_MIGRATION, NO_JOB), (RUNNING_MIGRATED, NO_JOB)],
            (DomainState.RUNNING, False),
            id="a target that begins to run is never a source's copy",
        ),
        pytest.param(
            [(RUNNING_BOOTED, NO_JOB), (PAUSED_MIGRATION, NO_JOB)],
            (DomainState.PAUSED_MIGRATED, False),
            id="a source that lost the reply no longer runs",
        ),
        pytest.param([(RUNNING_BOOTED, OUTGOING), (None, NO_JOB)], None, id="a source that is gone"),
        pytest.param([(RUNNING_BOOTED, OUTGOING), (SHUTOFF_MIGRATED, NO_JOB)], None, id="a source on its way out"),
        pytest.param([(PAUSED_MIGRATION, INCOMING_JOB)], (DomainState.INCOMING, True), id="a target"),
        pytest.param(
            [(PAUSED_MIGRATION, INCOMING_JOB), (RUNNING_MIGRATED, NO_JOB)],
            (DomainState.RUNNING, False),
            id="a target that has arrived",
        ),
        pytest.param(
            [(RUNNING_BOOTED, NO_JOB), (PAUSED_MIGRATION, OUTGOING)],
            (DomainState.PAUSED_MIGRATED, True),
            id="a source that began and switches over",
        ),
        pytest.param(
            [(RUNNING_BOOTED, OUTGOING), (PAUSED_MIGRATION, NO_JOB)],
            (DomainState.PAUSED_MIGRATED, False),
            id="a source whose job ended at switch-over",
        ),
    ],
)
def test_state_and_job_belong_together(read: Any, moments: list[Moment], seen: Seen) -> None:
    assert read(World(*moments)) == seen


@pytest.mark.parametrize("read", [one, all_of_them])
def test_what_never_stands_still_may_have_a_job(read: Any) -> None:
    _, has_job = read(World(*[(RUNNING_BOOTED, NO_JOB), (PAUSED_MIGRATION, NO_JOB)] * 9))
    assert has_job


def test_a_persistent_domain_is_there_when_shut_off() -> None:
    for read in (one, all_of_them):
        world = World((SHUTOFF_MIGRATED, NO_JOB), is_persistent=True)
        assert read(world) == (DomainState.SHUTOFF, False)


LEASE, AGENT, ARP = 0, 1, 2


class Guest:
    """A domain whose addresses are known from some sources; the others fail, or know none."""

    def __init__(self, known: dict[int, list[str]], *, has_agent: bool = True) -> None:
        self.known = known
        self.has_agent = has_agent
        self.timeouts: list[int] = []

    def lookupByUUIDString(self, uuid: str) -> "Guest":  # noqa: N802  libvirt's names, here and below
        return self

    def isAlive(self) -> int:  # noqa: N802
        return 1

    def XMLDesc(self) -> str:  # noqa: N802
        state = "connected" if self.has_agent else "disconnected"
        target = f"<target type='virtio' name='org.qemu.guest_agent.0' state='{state}'/>"
        return f"<domain><devices><channel type='unix'>{target}</channel></devices></domain>"

    def agentSetResponseTimeout(self, seconds: int) -> None:  # noqa: N802
        self.timeouts.append(seconds)

    def interfaceAddresses(self, source: int) -> dict[str, Any]:  # noqa: N802
        assert source != AGENT or self.timeouts, "an agent without a time limit may hang for ever"
        if source not in self.known:
            libvirt.virResetLastError()  # an error is made of the thread's last one, of whatever test that was
            raise libvirt.libvirtError("no such source")
        addresses = [{"addr": address, "prefix": 24, "type": 0} for address in self.known[source]]
        return {"lo": {"addrs": None}, "eth0": {"addrs": addresses}}


@pytest.mark.parametrize(
    ("known", "has_agent", "found"),
    [
        ({}, True, []),
        ({AGENT: ["192.0.2.7"], LEASE: ["192.0.2.8"], ARP: ["192.0.2.9"]}, True, ["192.0.2.7"]),
        ({AGENT: ["192.0.2.7"], LEASE: ["192.0.2.8"], ARP: ["192.0.2.9"]}, False, ["192.0.2.8"]),
        ({AGENT: ["127.0.0.1", "fe80::1"], ARP: ["192.0.2.9"]}, True, ["192.0.2.9"]),
        ({LEASE: [], ARP: ["192.0.2.9"]}, False, ["192.0.2.9"]),
        ({AGENT: ["::1", "2001:db8::7", "192.0.2.7"]}, True, ["2001:db8::7", "192.0.2.7"]),
    ],
)
def test_addresses_come_from_the_first_source_that_knows(
    known: dict[int, list[str]], has_agent: bool, found: list[str]
) -> None:
    assert read_addresses(Guest(known, has_agent=has_agent), UUID) == found
