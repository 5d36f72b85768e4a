"""Two liveness workers side by side: nothing is said or done twice, and neither interrupts the other."""

import json
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.celery_app import CeleryMessenger, make_app
from orchestrator.lease import PROFILES, Membership
from orchestrator.planner.liveness import LONGEST_GAP_S
from orchestrator.queues import LIVENESS, Message, Task
from orchestrator.resources import Event, Node, NodeFencing
from orchestrator.resources.fencing import FencePhase
from orchestrator.services.fencing import arm, disarm, set_fencing
from orchestrator.services.liveness import Liveness
from orchestrator.store import keys
from orchestrator.store.connection import connect
from orchestrator.store.node_store import NodeStore
from tests.builders import a_lease
from tests.fakes import Stage
from tests.fencing import FencingStage, until_fenced
from tests.processes import Processes
from tests.waiting import wait_until


@pytest.fixture
def stage(redis_url: str) -> Iterator[Stage]:
    stage = Stage(redis_url)
    stage.add_nodes("n1", "n2", "n3", "n4")
    yield stage
    stage.close()


@pytest.fixture
def armed(stage: Stage) -> FencingStage:
    return FencingStage(stage, armed=True)


class Both:
    """Looks of two workers, one right after the other: what the second has in memory is older than what it meets."""

    def __init__(self, herd: FencingStage) -> None:
        self._herd = herd
        self.workers = [herd.liveness, Liveness(herd.ctx, herd.stage.herd)]

    def scan(self) -> None:
        """Have both look; by turns each is the first."""
        self.workers.reverse()
        for worker in self.workers:
            worker.scan()

    def restart(self) -> None:
        """One of them begins anew."""
        self.workers[0] = Liveness(self._herd.ctx, self._herd.stage.herd)


@pytest.fixture
def both(armed: FencingStage) -> Both:
    both = Both(armed)
    armed.liveness = both  # type: ignore[assignment]
    armed.scan(3)
    return both


def said(stage: Stage, name: str) -> Counter[str]:
    return Counter(event.reason for event in stage.store.all(Event) if event.involved_object.name == name)


def test_a_loss_is_said_once_each(stage: Stage, armed: FencingStage, both: Both) -> None:
    stage.add_vm("a", "n1")
    armed.scan(20)
    armed.lose("n1")
    until_fenced(armed, "n1")
    found = said(stage, "n1")
    assert {reason: found[reason] for reason in ("NodeNotReady", "NodeFencing", "NodeFenced")} == {
        "NodeNotReady": 1,
        "NodeFencing": 1,
        "NodeFenced": 1,
    }
    assert found["NodeSuspect"] == 0


def test_so_is_a_return(stage: Stage, armed: FencingStage, both: Both) -> None:
    armed.scan(20)
    armed.beating.discard("n1")
    armed.scan(12)
    armed.beating.add("n1")
    armed.scan(4)
    assert stage.store.get(Node, "n1").is_ready
    found = said(stage, "n1")
    assert (found["NodeNotReady"], found["NodeFencing"], found["NodeFencingEnded"]) == (1, 1, 1)
    assert found["NodeReady"] == 2  # it joined, and it is back
    assert not stage.store.redis.hexists(keys.SUSPICIONS, "n1")


def test_one_that_begins_anew_interrupts_nothing(stage: Stage, armed: FencingStage, both: Both) -> None:
    """Neither a fencing nor a vote: the other has watched all the time."""
    armed.scan(20)
    armed.lose("n1")
    while not stage.store.redis.hexists(keys.SUSPICIONS, "n1"):
        armed.scan()
    suspicion = stage.store.redis.hget(keys.SUSPICIONS, "n1")
    both.restart()
    armed.scan(4)
    assert stage.store.redis.hget(keys.SUSPICIONS, "n1") == suspicion
    assert armed.fencing("n1").status.phase.is_open
    timing = armed.renew("n2").timing
    assert until_fenced(armed, "n1") < timing.ack_wait
    assert said(stage, "n1")["NodeSuspect"] == 0


def test_nor_do_both_say_their_reasons_by_turns(stage: Stage, armed: FencingStage, both: Both) -> None:
    armed.scan(20)
    disarm(armed.ctx, "", "maintenance of the switch")
    armed.lose("n1")
    armed.scan(12)
    both.restart()
    armed.scan(12)
    assert armed.fencing("n1").status.reason == "FailoverDisarmed"
    assert said(stage, "n1")["NodeSuspect"] == 1
    arm(armed.ctx, "")
    until_fenced(armed, "n1")


def test_one_that_hung_in_its_look_ends_nobody_s_fencing(stage: Stage) -> None:
    """It saw the node renew, hung, and goes on when the node is lost for good."""
    herd = FencingStage(stage)
    both = Both(herd)
    herd.liveness = both  # type: ignore[assignment]
    herd.scan(20)
    herd.beating.discard("n1")
    herd.scan(12)
    assert herd.fencing("n1").status.phase.is_open
    hung, other = both.workers
    herd.renew("n1")
    look = hung._look  # what it does between its reading and its acts is done by the other

    def late(names: list[str]) -> Any:
        seen = look(names)
        hung._look = look  # type: ignore[method-assign]
        herd.renew("n1")  # once more, and then no more
        for _ in range(int(LONGEST_GAP_S) * 6):
            herd.pass_time(1)
            stage.herd.follower.sync()
            other.scan()
        stage.herd.follower.sync()
        return seen

    hung._look = late  # type: ignore[method-assign]
    hung.scan()
    assert herd.fencing("n1").status.phase.is_open
    assert said(stage, "n1")["NodeFencingEnded"] == 1


def test_nor_does_it_begin_one_of_a_node_that_is_back(stage: Stage, armed: FencingStage, both: Both) -> None:
    """It read a lease that had run out, and hung while that was renewed."""
    armed.scan(20)
    armed.beating.discard("n1")
    armed.scan(10)
    hung, other = both.workers
    look = hung._look

    def late(names: list[str]) -> Any:
        seen = look(names)
        armed.beating.add("n1")
        for _ in range(int(LONGEST_GAP_S) + 2):
            armed.pass_time(1)
            stage.herd.follower.sync()
            other.scan()
        return seen

    hung._look = late  # type: ignore[method-assign]
    armed.pass_time(1)
    hung.scan()
    assert stage.store.get(Node, "n1").is_ready
    found = said(stage, "n1")
    assert (found["NodeNotReady"], found["NodeSuspect"], found["NodeFencing"]) == (0, 0, 0)


def is_looking(processes: Processes, name: str) -> int:
    """How often a process began to look, as its log says it."""
    lines = (line for line in processes.log_file(name).read_text().splitlines() if line.startswith("{"))
    return sum(json.loads(line).get("event") == "liveness begins anew" for line in lines)


@pytest.mark.timeout(110)
def test_of_two_processes_one_is_killed_when_a_node_is_lost(stage: Stage, redis_url: str, tmp_path: Path) -> None:
    """The ticks come to whom they like: in the middle to nobody, and yet both have watched without a break."""
    timing = PROFILES["critical"]
    beating, stop = set(stage.nodes), threading.Event()

    def beat() -> None:
        stores = {name: NodeStore(connect(redis_url), name) for name in stage.nodes}
        number = 0
        while not stop.wait(timing.heartbeat / 2):
            number += 1
            for name in sorted(beating):
                fields = {"generation": f"g-{name}", "boot_id": f"b-{name}", "timing": timing, "membership": 1}
                stores[name].renew_lease(a_lease(number, armed=True, failsafe=False, **fields))

    stage.store.redis.set(keys.MEMBERSHIP, Membership(1, {name: f"{name}:1" for name in stage.nodes}).text())
    for name in stage.nodes:
        set_fencing(stage.ctx, name, lambda spec: spec.with_(enabled=True))
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    messenger = CeleryMessenger(make_app("test", url=redis_url))
    names = ("liveness0", "liveness1")
    with Processes(redis_url, tmp_path, VMHERD_PROFILE="critical") as processes:
        for name in names:
            processes.run(name, "liveness")

        def are_looking() -> bool:
            messenger.send(Message(Task.LIVENESS, LIVENESS))
            return all(is_looking(processes, name) for name in names)

        wait_until(are_looking, 40, processes.logs, interval=0.5)
        since = stage.store.now()
        quiet_s = max(timing.lease_ttl + timing.margin, LONGEST_GAP_S) + 1
        wait_until(lambda: (stage.store.now() - since).total_seconds() > quiet_s, 30)
        beating.discard("n1")
        processes.all["liveness0"].hold()
        processes.all["liveness0"].kill(signal.SIGKILL)

        def is_fenced() -> bool:
            found = stage.store.find(NodeFencing, "n1")
            return found is not None and found.status.phase is FencePhase.FENCED

        wait_until(is_fenced, 40, processes.logs)
        # A machine that is busy elsewhere may hold a process up for those 5 s, once.
        assert max(is_looking(processes, name) for name in names) <= 2, processes.logs()
    stop.set()
    thread.join()
    found = said(stage, "n1")
    assert (found["NodeNotReady"], found["NodeFencing"], found["NodeFenced"]) == (1, 1, 1)
    assert found["NodeSuspect"] == 0
