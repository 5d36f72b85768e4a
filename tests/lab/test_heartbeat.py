"""Heartbeats on lab hosts, whose watchdogs are stand-ins: which faults reset a host, and which do not.

No deadline counts here; test_takeover has what follows where one does.
"""

from collections.abc import Iterator

import pytest

from orchestrator.errors import Conflict
from orchestrator.resources import Node
from tests.lab.herd import LabHerd
from tests.lab.lab import Lab, require_lab
from tests.lab.leases import (
    TIMES,
    lease,
    only_reset,
    put_right,
    renewals,
    resets,
    settle,
    takeover_is_due,
    wait_for_silence,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.lab

NO_DEADLINE = {**TIMES, "VMHERD_ACK_WAIT": "600"}
"""A reset host comes back long before."""


@pytest.fixture(scope="module")
def shared() -> Iterator[LabHerd]:
    require_lab()
    with Lab(hosts=3, name="heartbeat") as lab, LabHerd(lab, env=NO_DEADLINE, watchdogs=True) as herd:
        yield herd


@pytest.fixture
def herd(shared: LabHerd) -> Iterator[LabHerd]:
    """The herd, with all watchdogs armed; put right again afterwards."""
    settle(shared)
    yield shared
    put_right(shared)


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
