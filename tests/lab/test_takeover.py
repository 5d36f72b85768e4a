"""Failover by watchdogs' deadlines: hosts whose watchdogs are armed stand-ins lose their network, processes or Redis.

What is lost starts elsewhere only after its host was reset; what is not lost is neither reset nor fenced, and all goes
on afterwards. No VM ever runs twice. One lab for all; each test puts right what it broke.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from orchestrator.errors import NotFound
from orchestrator.resources import Event, NodeFencing, RunPolicy
from orchestrator.resources.fencing import Bmc, FenceLevel, FencePhase
from tests.lab import fences, outside
from tests.lab.fences import starts_after
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.host import LabHost
from tests.lab.lab import Lab, require_lab
from tests.lab.leases import TIMES, lease, only_reset, put_right, renewals, resets, settle, wait_for_silence
from tests.lab.observer import DoubleRunObserver
from tests.waiting import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

HOSTS = ("h1", "h2", "h3", "h4")
REDIS_AWAY_S = 60.0
DEAD_BMC = Bmc(
    agent="fence_ipmilan",
    options={"ip": "192.0.2.1", "ipport": "9099", "username": "admin", "lanplus": "1", "cipher": "3"},
    password_env=fences.PASSWORD_ENV,
    timeout_s=5,
)
"""Nothing listens there."""


@pytest.fixture(scope="module")
def shared() -> Iterator[LabHerd]:
    require_lab()
    settings = {**TIMES, **fences.SETTINGS, "VMHERD_GRANT_TTL": "5", "VMHERD_SYSTEM_RESERVED_MEMORY_MIB": "512"}
    with Lab(hosts=len(HOSTS), name="takeover") as lab, LabHerd(lab, env=settings, watchdogs=True) as herd:
        yield herd


@pytest.fixture
def herd(shared: LabHerd) -> Iterator[LabHerd]:
    """The herd, with all watchdogs armed; put right, and empty, afterwards. No VM has run twice."""
    settle(shared)
    doubles = DoubleRunObserver(shared.lab)
    yield shared
    put_right(shared)
    shared.wait_ready(list(HOSTS), 90)
    doubles.check()
    shared.clear()


def start_blank(herd: LabHerd, node: str) -> Guest:
    """Start a protected machine without an operating system; a name of its own gives it an UUID of its own."""
    machine = herd.lab.blank(f"on-{node}-{time.time_ns()}")
    herd.start_guests((machine, node), up=False, runPolicy=RunPolicy.ALWAYS_ON.value)
    return machine


def fencings(herd: LabHerd) -> dict[str, tuple[FencePhase, str]]:
    """How the fencing of each host stands, where it does anything."""
    found: dict[str, tuple[FencePhase, str]] = {}
    for host in HOSTS:
        try:
            status = herd.cluster.store.get(NodeFencing, host).status
        except NotFound:
            continue
        if status.phase is not FencePhase.IDLE:
            found[host] = (status.phase, status.reason)
    return found


@contextmanager
def cut_off(herd: LabHerd, *hosts: str) -> Iterator[None]:
    """Let nothing that these hosts send reach the control plane and Redis."""
    rules = [["INPUT", "-s", herd.lab.host(host).address, "-j", "DROP"] for host in hosts]
    with ExitStack() as healing:
        for rule in rules:
            herd.lab.control.run(["iptables", "-I", *rule])
            healing.callback(herd.lab.control.run, ["iptables", "-D", *rule])
        yield


def times_fenced(herd: LabHerd) -> int:
    """How often there was evidence about any host."""
    return sum(event.count for event in herd.cluster.store.all(Event) if event.reason == "NodeFenced")


def goes_on(herd: LabHerd, machine: Guest) -> None:
    """Check that a VM still runs as it did, and that what is asked for is done: it moves."""
    vm = herd.cluster.vm(machine.name)
    assert vm.status.incarnation == 1
    outside.assert_runs_once(herd, machine, vm.status.node_name)
    herd.cluster.evict(machine.name).wait(60)
    outside.assert_runs_once(herd, machine, herd.cluster.vm(machine.name).status.node_name)


def test_a_host_that_is_cut_off_is_reset_before_its_guest_starts_elsewhere(herd: LabHerd) -> None:
    """Its BMC is dead too; the deadline of its watchdog is the evidence."""
    before, host = resets(herd), herd.lab.host("h1")
    guest = herd.lab.guest("linux-vm", address="192.0.2.101")
    herd.start_guests((guest, "h1"), runPolicy=RunPolicy.ALWAYS_ON.value)
    fences.set_bmc(herd, "h1", DEAD_BMC)
    try:
        host.cut_link(silent=True)
        evidence = fences.wait_evidence(herd, "h1")
        only_reset(herd, before, "h1")
        assert evidence.level is FenceLevel.DEADLINE
        moved = herd.wait_vm("linux-vm", starts_after(1))
        guest.wait_up(60)
        first, second = fences.lives(herd.lab, guest)
        assert (first.host, second.host) == ("h1", moved.status.node_name)
        assert first.ended_at < evidence.at.timestamp() < second.began_at
        assert "FenceUnconfirmed" in fences.events(herd, "h1"), "it is told that its BMC gave no evidence"
    finally:
        fences.set_bmc(herd, "h1", None)
    host.heal_link()
    host.power_on()
    herd.wait_ready(["h1"], 90)
    assert not host.connect().listAllDomains()
    outside.assert_runs_once(herd, guest, moved.status.node_name)


def test_so_is_one_whose_heartbeat_is_frozen(herd: LabHerd) -> None:
    before, machine = resets(herd), start_blank(herd, "h2")
    herd.processes["h2/heartbeat"].pause()
    evidence = fences.wait_evidence(herd, "h2")
    only_reset(herd, before, "h2")
    assert evidence.level is FenceLevel.DEADLINE
    herd.wait_vm(machine.name, starts_after(1))
    first, second = fences.lives(herd.lab, machine)
    assert first.ended_at < evidence.at.timestamp() < second.began_at


def test_a_dead_libvirtd_or_agent_is_no_lost_host(herd: LabHerd) -> None:
    before, fenced, machine = resets(herd), times_fenced(herd), start_blank(herd, "h1")
    generation = lease(herd, "h1").generation
    agent = herd.processes["h1/agent"]
    for _ in range(3):
        restarts = agent.restarts
        agent.kill()
        agent.wait_restarts(restarts + 1)
    herd.lab.host("h1").kill_libvirtd()
    wait_until(lambda: not herd.cluster.node("h1").is_ready, 30, "it is not Ready")
    renewals(herd, HOSTS, 8)
    assert lease(herd, "h1").generation == generation, "the heartbeat was not touched"
    only_reset(herd, before)
    assert fencings(herd) == {}
    herd.lab.host("h1").start_libvirtd()
    herd.wait_ready(["h1"])
    assert times_fenced(herd) == fenced
    goes_on(herd, machine)


def test_redis_full_or_away_for_a_minute_costs_nobody_a_host(herd: LabHerd) -> None:
    before, fenced, machine = resets(herd), times_fenced(herd), start_blank(herd, "h1")
    herd.cluster.store.redis.config_set("maxmemory", "1")
    renewals(herd, HOSTS, 8)
    herd.cluster.store.redis.config_set("maxmemory", "0")
    assert fencings(herd) == {}

    timing = lease(herd, "h1").timing
    assert timing.lease_ttl + timing.margin + timing.ack_wait < REDIS_AWAY_S
    herd.redis.kill()
    assert wait_for_silence(herd, REDIS_AWAY_S) == set()
    herd.redis.start()
    settle(herd)
    renewals(herd, HOSTS, 8)
    only_reset(herd, before)
    assert fencings(herd) == {}
    assert times_fenced(herd) == fenced
    goes_on(herd, machine)


def test_redis_and_control_cut_off_from_all_and_back_for_some_first_costs_nobody_a_host(herd: LabHerd) -> None:
    before, fenced, machine = resets(herd), times_fenced(herd), start_blank(herd, "h1")
    timing = lease(herd, "h1").timing
    with cut_off(herd, "h1", "h3", "h4"):
        with cut_off(herd, "h2"):
            # The control plane has its Redis all the time, and sees all leases run out.
            assert wait_for_silence(herd, timing.lease_ttl + timing.margin + timing.ack_wait) == set()
            # A worker that was held up begins anew, and says this only after its whole time.
            wait_until(lambda: {why for _, why in fencings(herd).values()} == {"TooManyLost"}, 60, "too many are lost")
        sequence = lease(herd, "h2").sequence
        wait_until(lambda: lease(herd, "h2").sequence > sequence, 30, "h2 renews", interval=0.05)
    settle(herd)
    wait_until(lambda: fencings(herd) == {}, 60, "nobody is suspect any more")
    only_reset(herd, before)
    assert times_fenced(herd) == fenced
    goes_on(herd, machine)


def test_half_of_the_hosts_gone_at_once_is_a_persons_matter(herd: LabHerd) -> None:
    fenced, gone = times_fenced(herd), [herd.lab.host(name) for name in ("h1", "h2")]
    machines = [start_blank(herd, host.name) for host in gone]
    with ThreadPoolExecutor() as pool:
        list(pool.map(LabHost.power_cut, gone))
    for host in gone:
        told = fences.wait_status(herd, host.name, "too many", lambda status: status.reason == "TooManyLost")
        assert "2 of 4 members look lost" in told.message
    timing = lease(herd, "h3").timing
    assert wait_for_silence(herd, timing.lease_ttl + timing.margin + timing.ack_wait) == set()
    assert {host: phase for host, (phase, _) in fencings(herd).items()} == dict.fromkeys(
        ("h1", "h2"), FencePhase.SUSPECT
    )
    for machine in machines:
        assert len(fences.lives(herd.lab, machine)) == 1, "it was started nowhere"
    with ThreadPoolExecutor() as pool:
        list(pool.map(LabHost.power_on, gone))
    herd.wait_ready(["h1", "h2"], 90)
    for machine in machines:
        herd.wait_vm(machine.name, starts_after(1))
    assert times_fenced(herd) == fenced
