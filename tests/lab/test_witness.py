"""A herd of two hosts and a master, fenced by watchdogs alone: the master's witness makes the majority.

worker-a dies, and linux-vm answers from worker-b, where it has run only after worker-a's deadline.
"""

from collections.abc import Iterator

import pytest

from orchestrator.resources import RunPolicy
from orchestrator.resources.fencing import FenceLevel
from tests.lab import fences
from tests.lab.fences import starts_after
from tests.lab.herd import LabHerd
from tests.lab.lab import Lab, require_lab
from tests.lab.leases import TIMES, settle
from tests.lab.observer import DoubleRunObserver

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def herd() -> Iterator[LabHerd]:
    require_lab()
    lab = Lab(names=["worker-a", "worker-b"], name="witness")
    with lab, LabHerd(lab, env=TIMES, watchdogs=True, witness="master") as herd:
        yield herd


def test_the_guest_of_a_dead_worker_answers_from_the_other(herd: LabHerd) -> None:
    herd.wait_ready(["master"])
    settle(herd)
    doubles = DoubleRunObserver(herd.lab)
    guest = herd.lab.guest("linux-vm", address="192.0.2.101")
    herd.start_guests((guest, "worker-a"), runPolicy=RunPolicy.ALWAYS_ON.value)
    assert "Ready,Witness" in herd.vmherd("get", "nodes")

    herd.lab.host("worker-a").power_cut()

    evidence = fences.wait_evidence(herd, "worker-a")
    assert evidence.level is FenceLevel.DEADLINE
    assert "2 of 3 members had agreed" in evidence.text
    herd.wait_vm("linux-vm", starts_after(1))
    guest.wait_up(60)
    first, second = fences.lives(herd.lab, guest)
    assert (first.host, second.host) == ("worker-a", "worker-b")
    assert first.ended_at < evidence.at.timestamp() < second.began_at
    assert "worker-a" not in herd.vmherd("get", "nodes")
    doubles.check()
