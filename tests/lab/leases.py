"""Leases and watchdogs of a lab's hosts, as tests of failure detection look at them and put them right."""

import time
from typing import cast

from orchestrator.lease import Lease, read_lease, read_membership
from orchestrator.store import keys
from tests.lab.herd import LabHerd
from tests.waiting import wait_until

TIMES = {"VMHERD_LEASE_TTL": "6", "VMHERD_WATCHDOG_TIMEOUT": "3", "VMHERD_HEARTBEAT": "1"}
"""Shorter than the default profile's. With the shortest a busy machine would be what is tested."""


def lease(herd: LabHerd, host: str) -> Lease:
    """Read a host's lease."""
    stored = read_lease(cast("str | None", herd.cluster.store.redis.get(keys.lease(host))))
    assert stored is not None, host
    return stored.lease


def settle(herd: LabHerd) -> None:
    """Wait until all hosts are Ready, members, and armed; so are what other members there are."""
    hosts = {host.name for host in herd.lab.hosts}

    def settled() -> bool:
        membership = read_membership(cast("str | None", herd.cluster.store.redis.get(keys.MEMBERSHIP)))
        leases = {name: lease(herd, name) for name in membership.members}
        return (
            hosts <= leases.keys()
            and all(found.membership == membership.version for found in leases.values())
            and all(leases[host].armed for host in hosts)
        )

    herd.wait_ready(sorted(hosts), 90)
    wait_until(settled, 60, "all are members, and armed")


def resets(herd: LabHerd) -> dict[str, int]:
    """How often each host was reset by its watchdog."""
    return {name: watchdog.fired for name, watchdog in herd.watchdogs.items()}


def renewals(herd: LabHerd, hosts: tuple[str, ...], count: int) -> None:
    """Wait until each of these hosts has renewed its lease so many times more."""
    before = {host: lease(herd, host) for host in hosts}

    def done() -> bool:
        now = {host: lease(herd, host) for host in hosts}
        return all(
            now[host].generation != before[host].generation or now[host].sequence >= before[host].sequence + count
            for host in hosts
        )

    wait_until(done, 60, f"{count} renewals of {hosts}")


def takeover_is_due(herd: LabHerd, host: str) -> None:
    """Wait until this host's lease has been unchanged for T + M, when it could be taken over at the earliest."""
    redis = herd.cluster.store.redis

    def due() -> bool:
        stored = read_lease(cast("str | None", redis.get(keys.lease(host))))
        assert stored is not None
        age = herd.cluster.store.now().timestamp() - stored.renewed_ms / 1000
        return age > stored.lease.timing.lease_ttl + stored.lease.timing.margin

    wait_until(due, 60, f"the lease of {host} is out")


def only_reset(herd: LabHerd, before: dict[str, int], *hosts: str) -> None:
    """Check that just these were reset since, and that all others have power."""
    assert {host for host, count in resets(herd).items() if count > before[host]} == set(hosts)
    assert [host.name for host in herd.lab.hosts if not host.is_on] == sorted(hosts)


def wait_for_silence(herd: LabHerd, seconds: float) -> set[str]:
    """Let so much time pass; gives the hosts that were reset meanwhile."""
    before, end = resets(herd), time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > end or resets(herd) != before, seconds + 60, interval=0.2)
    return {host for host, count in resets(herd).items() if count > before[host]}


def put_right(herd: LabHerd) -> None:
    """Undo what a test did to Redis, hosts and processes."""
    if herd.redis.pid is None:
        herd.redis.start()
    herd.cluster.store.redis.config_set("maxmemory", "0")
    for host in herd.lab.hosts:
        herd.processes[f"{host.name}/heartbeat"].release()
        if not host.is_on:
            host.power_on()
        host.heal_link()
        if not host.libvirtd_answers():
            host.start_libvirtd()
