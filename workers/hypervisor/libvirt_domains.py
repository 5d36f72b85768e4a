"""Read domains and their jobs from libvirt, so that the parts of one reading belong together.

libvirt has no call that tells a domain's state and its job at once, and a migration changes both within milliseconds. A
state read before and a job read after the switch-over would together show what never was: a target that is paused and
has no job, which is how a source's copy looks. So the state is read on both sides of the job, until it is the same.

State, reason and XML are read without a domain's job lock and without QEMU, on the caller's connection. Jobs need both,
so they are asked with a deadline on connections of their own.
"""

import ipaddress
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Final

import libvirt

from workers.hypervisor.domain_xml import ParsedDomain, parse_domain
from workers.hypervisor.libvirt_connection import Asks, is_lost
from workers.hypervisor.libvirt_readings import (
    INCOMING_JOB,
    JobKind,
    JobReading,
    domain_state,
    is_shutoff,
    job_reading,
    needs_cpu_time,
    reason_word,
)
from workers.hypervisor.port import Domain

JOB_DEADLINE_S: Final = 0.5
"""For the jobs in a reading, of one domain as of all. One takes 0.3 ms; 0.4 s while QEMU starts, no end if it hangs."""
_CPU_TIME_DEADLINE_S: Final = 0.2
_AGENT_DEADLINE_S: Final = 2
_MOST_TRIES: Final = 5
_LANES: Final = 4

_NO_JOB: Final = JobReading(JobKind.NONE)
_SILENT: Final = JobReading(JobKind.SILENT)

_State = tuple[int, int]  # virDomainState and its reason


class DomainReader:
    """Reads domains over a connection that the caller gives, and jobs over its own.

    Raises (every method):
        libvirt.libvirtError: The caller's connection broke.
        HypervisorUnavailable: One of its own did, or could not be opened.

    Args:
        uri: The daemon's URI.
    """

    def __init__(self, uri: str) -> None:
        self._jobs = Asks(uri, _LANES)

    def close(self) -> None:
        """Close what is its own. Idempotent."""
        self._jobs.close()

    def read_all(self, connection: Any) -> list[Domain]:
        """Read all domains, active and inactive, in no order."""
        before = _read_states(connection)
        persistent = {
            handle.UUIDString() for handle in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_PERSISTENT)
        }
        all_parsed = {uuid: _read_parsed(handle) for uuid, (handle, _) in before.items()}
        jobs = self.read_jobs([uuid for uuid, (_, state) in before.items() if not is_shutoff(state[0])])
        found = []
        for uuid, (_, state) in _read_states(connection).items():
            parsed = all_parsed.get(uuid)
            domain: Domain | None
            if parsed is None or before[uuid][1] != state:
                domain = self.read(connection, uuid)
            else:
                job = jobs.get(uuid, _NO_JOB)
                domain = self._assemble(parsed, state, job, persistent=uuid in persistent)
            if domain is not None:
                found.append(domain)
        return found

    def read(self, connection: Any, uuid: str) -> Domain | None:
        """Read one domain; None if the host does not have it."""
        try:
            handle = connection.lookupByUUIDString(uuid)
            state, job = self._read_state_and_job(handle)
            parsed = parse_domain(handle.XMLDesc())
            return self._assemble(parsed, state, job, persistent=bool(handle.isPersistent()))
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise

    def read_jobs(self, uuids: Sequence[str], deadline_s: float = JOB_DEADLINE_S) -> dict[str, JobReading]:
        """Read the jobs of domains; a domain that is gone has none."""
        if not uuids:
            return {}
        answers = self._jobs.ask_all({uuid: partial(_read_job, uuid=uuid) for uuid in uuids}, deadline_s)
        return {uuid: _job_of(answers.get(uuid)) for uuid in uuids}

    def _read_state_and_job(self, handle: Any) -> tuple[_State, JobReading]:
        uuid = handle.UUIDString()
        state = _read_state(handle)
        for _ in range(_MOST_TRIES):
            job = _NO_JOB if is_shutoff(state[0]) else self.read_jobs([uuid])[uuid]
            before, state = state, _read_state(handle)
            if state == before or job.kind is JobKind.SILENT:
                return state, job
        return state, _SILENT

    def _assemble(self, parsed: ParsedDomain, state: _State, job: JobReading, *, persistent: bool) -> Domain | None:
        if is_shutoff(state[0]) and not persistent:
            return None  # its process is gone, and libvirt is about to forget it
        has_run = self._has_run(parsed.uuid) if needs_cpu_time(*state, job.kind) else True
        return Domain(
            uuid=parsed.uuid,
            name=parsed.name,
            state=domain_state(*state, job.kind, has_run=has_run),
            reason=reason_word(*state),
            marker=parsed.marker,
            memory_mib=parsed.memory_mib,
            vcpus=parsed.vcpus,
            persistent=persistent,
            job=job.job,
            has_job=job.kind is not JobKind.NONE,
            agent=parsed.agent,
        )

    def _has_run(self, uuid: str) -> bool:
        # libvirt reads it from /proc, without QEMU; asked with a deadline all the same, and "yes" without an answer.
        answer = self._jobs.ask(f"cpu-time {uuid}", partial(_has_cpu_time, uuid=uuid), _CPU_TIME_DEADLINE_S)
        return answer is None or answer.exception() is not None or answer.result()


def _has_cpu_time(connection: Any, uuid: str) -> bool:
    return any(cpu_time for _, _, cpu_time, _ in connection.lookupByUUIDString(uuid).vcpus()[0])


def _read_state(handle: Any) -> _State:
    state, reason = handle.state()
    return state, reason


def _read_states(connection: Any) -> dict[str, tuple[Any, _State]]:
    # NOWAIT, as a domain whose job lock is taken would otherwise hold up the answer for 30 s.
    flags = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
    found = connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE, flags)
    return {
        handle.UUIDString(): (handle, (figures["state.state"], figures["state.reason"])) for handle, figures in found
    }


def _read_parsed(handle: Any) -> ParsedDomain | None:
    try:
        return parse_domain(handle.XMLDesc())
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def _job_of(answer: "Future[JobReading] | None") -> JobReading:
    if answer is None:
        return _SILENT
    try:
        return answer.result()
    except libvirt.libvirtError:
        return _SILENT  # 68: it did not get the domain's lock in 30 s


def _read_job(connection: Any, uuid: str) -> JobReading:
    try:
        return job_reading(connection.lookupByUUIDString(uuid).jobStats())
    except libvirt.libvirtError as error:
        match error.get_error_code():
            case libvirt.VIR_ERR_OPERATION_UNSUPPORTED:
                return INCOMING_JOB
            case libvirt.VIR_ERR_NO_DOMAIN | libvirt.VIR_ERR_OPERATION_INVALID:  # it is gone, or stopped
                return _NO_JOB
            case _:
                raise


def read_addresses(connection: Any, uuid: str) -> list[str]:
    """Read a guest's addresses from the first source that knows one: agent, DHCP lease, ARP. May take seconds."""
    handle = connection.lookupByUUIDString(uuid)
    sources = [libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE, libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_ARP]
    if parse_domain(handle.XMLDesc()).agent:
        # By default libvirt waits for ever for an agent that hangs.
        handle.agentSetResponseTimeout(_AGENT_DEADLINE_S)
        sources.insert(0, libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT)
    for source in sources:
        try:
            interfaces = handle.interfaceAddresses(source)
        except libvirt.libvirtError as error:
            if is_lost(connection, error):
                raise
            continue  # no network driver, no agent after all; ARP fails always with libvirt 9.0 on Linux 6.18
        found = [address["addr"] for interface in interfaces.values() for address in interface["addrs"] or ()]
        if outside := [address for address in found if _is_reachable(address)]:
            return outside
    return []


def _is_reachable(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return not (parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified)
