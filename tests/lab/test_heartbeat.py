"""Heartbeats on lab hosts, whose watchdogs are stand-ins: which faults reset a host, and which do not."""

import time
from collections.abc import Iterator
from typing import cast

import pytest

from orchestrator.errors import Conflict
from orchestrator.lease import Lease, read_lease, read_membership
from orchestrator.resources import Node
from orchestrator.store import keys
from tests.lab.herd import LabHerd
from tests.lab.lab import Lab, require_lab
from tests.waiting import wait_until

pytestmark = pytest.mark.lab

HOSTS = ("h1", "h2", "h3")
TIMES = {"VMHERD_LEASE_TTL": "6", "VMHERD_WATCHDOG_TIMEOUT": "3", "VMHERD_HEARTBEAT": "1"}
"""Shorter than the default profile's. With the shortest a busy machine would be what is tested."""


@pytest.fixture(scope="module")
def shared() -> Iterator[LabHerd]:
    require_lab()
    with Lab(hosts=3, name="heartbeat") as lab, LabHerd(lab, env=TIMES, watchdogs=True) as herd:
        yield herd


@pytest.fixture
def herd(shared: LabHerd) -> Iterator[LabHerd]:
    """The herd, with all watchdogs armed; put right again afterwards."""
    settle(shared)
    yield shared
    if shared.redis.pid is None:
        shared.redis.start()
    shared.cluster.store.redis.config_set("maxmemory", "0")
    for host in shared.lab.hosts:
        shared.processes[f"{host.name}/heartbeat"].release()
        if not host.is_on:
            host.power_on()
        host.heal_link()
        if not host.libvirtd_answers():
            host.start_libvirtd()


def lease(herd: LabHerd, host: str) -> Lease:
    stored = read_lease(cast("str | None", herd.cluster.store.redis.get(keys.lease(host))))
    assert stored is not None, host
    return stored.lease


def settle(herd: LabHerd) -> None:
    def settled() -> bool:
        membership = read_membership(cast("str | None", herd.cluster.store.redis.get(keys.MEMBERSHIP)))
        leases = [lease(herd, host) for host in HOSTS]
        return set(membership.members) == set(HOSTS) and all(
            found.armed and found.membership == membership.version for found in leases
        )

    herd.wait_ready(list(HOSTS))
    wait_until(settled, 60, "all are members, and armed")


def resets(herd: LabHerd) -> dict[str, int]:
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
    assert {host for host, count in resets(herd).items() if count > before[host]} == set(hosts)
    assert [host.name for host in herd.lab.hosts if not host.is_on] == sorted(hosts)


def test_a_host_whose_network_is_cut_is_reset_before_it_could_be_taken_over(herd: LabHerd) -> None:
    before = resets(herd)
    herd.lab.host("h1").cut_link(silent=True)
    takeover_is_due(herd, "h1")
    only_reset(herd, before, "h1")


def test_so_is_one_that_is_cut_off_redis_alone(herd: LabHerd) -> None:
    """Its peers say that they have Redis."""
    before = resets(herd)
    herd.lab.host("h1").space.run(["iptables", "-I", "OUTPUT", "-d", herd.lab.control.address, "-j", "DROP"])
    takeover_is_due(herd, "h1")
    only_reset(herd, before, "h1")


def test_so_is_one_whose_heartbeat_is_frozen(herd: LabHerd) -> None:
    before = resets(herd)
    herd.processes["h2/heartbeat"].pause()
    takeover_is_due(herd, "h2")
    only_reset(herd, before, "h2")


def test_a_heartbeat_that_is_started_again_at_once_is_in_time(herd: LabHerd) -> None:
    before = resets(herd)
    generations = {lease(herd, "h2").generation}
    for _ in range(3):
        herd.processes["h2/heartbeat"].kill()
        wait_until(lambda: lease(herd, "h2").armed and lease(herd, "h2").generation not in generations, 20)
        generations.add(lease(herd, "h2").generation)
    renewals(herd, ("h2",), 6)
    only_reset(herd, before)


def test_a_planned_stop_is_not_a_reset(herd: LabHerd) -> None:
    before = resets(herd)
    heartbeat = herd.processes["h3/heartbeat"]
    heartbeat.hold()
    heartbeat.kill(15)
    wait_until(lambda: heartbeat.pid is None, 20, "it ends")
    assert not lease(herd, "h3").armed
    assert not herd.watchdogs["h3"].is_counting
    takeover_is_due(herd, "h3")
    only_reset(herd, before)


def annotate(herd: LabHerd, name: str, annotations: dict[str, str]) -> None:
    store = herd.cluster.store

    def change() -> bool:
        old = store.get(Node, name)
        try:
            store.must_commit(store.batch().put(old, old.with_(metadata=old.metadata.with_(annotations=annotations))))
        except Conflict:
            return False
        return True

    wait_until(change, 10, "it is annotated")


def test_a_host_is_disarmed_while_the_platform_disrupts_it(herd: LabHerd) -> None:
    annotate(herd, "h1", {"update.node.deckhouse.io/disruption-approved": ""})
    try:
        wait_until(lambda: not herd.watchdogs["h1"].is_counting, 30, "it is disarmed")
        assert not lease(herd, "h1").armed
    finally:
        annotate(herd, "h1", {})
    wait_until(lambda: lease(herd, "h1").armed, 20, "it is armed again")
    assert herd.watchdogs["h1"].is_counting


def test_a_dead_libvirtd_is_no_reset(herd: LabHerd) -> None:
    before = resets(herd)
    herd.lab.host("h1").kill_libvirtd()
    wait_until(lambda: not herd.cluster.node("h1").is_ready, 30, "it is not Ready")
    renewals(herd, HOSTS, 6)
    only_reset(herd, before)


def test_a_dead_agent_is_none_either(herd: LabHerd) -> None:
    before, generation = resets(herd), lease(herd, "h1").generation
    for _ in range(3):
        restarts = herd.processes["h1/agent"].restarts
        herd.processes["h1/agent"].kill()
        herd.processes["h1/agent"].wait_restarts(restarts + 1)
    renewals(herd, HOSTS, 6)
    assert lease(herd, "h1").generation == generation, "the heartbeat was not touched"
    only_reset(herd, before)


def test_redis_away_for_longer_than_every_deadline_resets_nobody(herd: LabHerd) -> None:
    before = resets(herd)
    timing = lease(herd, "h1").timing
    longest = timing.lease_ttl + timing.margin + timing.ack_wait
    began = herd.cluster.store.now()
    herd.redis.kill()
    assert wait_for_silence(herd, longest) == set()
    herd.redis.start()
    settle(herd)
    assert (herd.cluster.store.now() - began).total_seconds() > longest
    only_reset(herd, before)


def wait_for_silence(herd: LabHerd, seconds: float) -> set[str]:
    """Let so much time pass; gives the hosts that were reset meanwhile."""
    before, end = resets(herd), time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > end or resets(herd) != before, seconds + 60, interval=0.2)
    return {host for host, count in resets(herd).items() if count > before[host]}


def test_redis_frozen_resets_nobody(herd: LabHerd) -> None:
    """Connections stay open, and nothing is answered."""
    before = resets(herd)
    timing = lease(herd, "h1").timing
    herd.redis.pause()
    try:
        assert wait_for_silence(herd, timing.lease_ttl + timing.watchdog_timeout) == set()
    finally:
        herd.redis.resume()
    settle(herd)
    only_reset(herd, before)


def test_redis_full_resets_nobody(herd: LabHerd) -> None:
    before = resets(herd)
    herd.cluster.store.redis.config_set("maxmemory", "1")
    renewals(herd, HOSTS, 8)
    herd.cluster.store.redis.config_set("maxmemory", "0")
    settle(herd)
    only_reset(herd, before)


def test_redis_cut_off_from_all_and_back_for_some_first_resets_nobody(herd: LabHerd) -> None:
    before = resets(herd)
    timing = lease(herd, "h1").timing
    space = herd.lab.control
    rules = {host.name: ["INPUT", "-s", host.address, "-j", "DROP"] for host in herd.lab.hosts}
    for rule in rules.values():
        space.run(["iptables", "-I", *rule])
    try:
        assert wait_for_silence(herd, timing.lease_ttl + timing.watchdog_timeout) == set()
    finally:
        space.run(["iptables", "-D", *rules["h2"]])
        sequence = lease(herd, "h2").sequence
        wait_until(lambda: lease(herd, "h2").sequence > sequence, 30, "h2 renews", interval=0.05)
        for host in ("h1", "h3"):
            space.run(["iptables", "-D", *rules[host]])
    settle(herd)
    only_reset(herd, before)
