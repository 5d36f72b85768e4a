"""Any process killed at any point: after each single command to Redis, in turn, whoever sent it is dead."""

import threading
from typing import Any

import pytest
import redis

from orchestrator.intake import Intake
from orchestrator.resources import OperationPhase
from orchestrator.services import operations
from orchestrator.store import keys
from tests.declared_keys import check_keys
from tests.fakes import Stage
from tests.redis_server import RedisServer


class Killed(BaseException):
    """The process that sent the command is dead; the command was done."""


class Killer:
    """Kills whoever sends a certain command; stands between client and Redis."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.at = 0
        self.is_armed = False
        send = redis.Redis._execute_command

        def counting(client: Any, *args: Any, **options: Any) -> Any:
            answer = send(client, *args, **options)  # type: ignore[no-untyped-call]
            if self.is_armed and threading.current_thread() is threading.main_thread():  # not the copy in memory
                self.count += 1
                if self.count == self.at:
                    raise Killed
            return answer

        monkeypatch.setattr(redis.Redis, "_execute_command", counting)


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    return Killer(monkeypatch)


def story(stage: Stage, *, abort: bool) -> None:
    """An evict from its creation to its end, with an abort in its middle or without."""
    if not stage.operations():
        stage.evict("a")
    if not abort:
        stage.grant_and_deliver()
    else:
        for message in stage.grant():
            node = stage.nodes["n1"]
            grant = node.begin(message)
            if grant is not None:
                stage.read()
                operations.delete_operation(stage.ctx, grant.operation)
                node.fall_back(grant)
                node.end(grant, "aborted")
        for operation in stage.operations():  # the person asks again where the first request did not come through
            operations.delete_operation(stage.ctx, operation.key)
    for node in stage.nodes.values():
        node.answer()
    stage.read()


def let_time_pass(stage: Stage) -> None:
    """All timers run out, and the beat's ticks come."""
    for index in (keys.DEADLINES, keys.AWAITING):
        for key in stage.store.redis.zrange(index, 0, -1):
            stage.store.redis.zadd(index, {str(key): 0})
    stage.store.redis.delete(keys.wanted("grant"))
    stage.intake = Intake(stage.ctx)
    stage.reconcile()


def is_over(stage: Stage, *, abort: bool) -> bool:
    found = stage.operations()
    over = not found if abort else bool(found) and all(o.status.phase is OperationPhase.COMPLETED for o in found)
    return over and stage.is_at_rest("a")


@pytest.mark.timeout(100)
@pytest.mark.parametrize("abort", [False, True], ids=["evict", "abort"])
def test_it_ends_as_it_should_and_leaves_nothing_behind(redis_server: RedisServer, killer: Killer, abort: bool) -> None:
    step = 0
    while True:
        step += 1
        redis_server.clear()
        stage = Stage(redis_server.url)
        stage.add_nodes("n1", "n2", "n3")
        stage.add_vm("a", "n1")
        killer.count, killer.at = 0, step
        rounds = 0
        while not rounds or not is_over(stage, abort=abort):
            assert rounds < 40, (step, [(o.status.phase, o.message) for o in stage.operations()])
            rounds += 1
            try:
                killer.is_armed = True
                story(stage, abort=abort)
            except Killed:
                killer.at = 0
            finally:
                killer.is_armed = False
            if killer.at == 0 and rounds % 4 == 0:
                let_time_pass(stage)
        was_killed = killer.at == 0
        killer.at = 0
        uuid = stage.vm("a").metadata.uid
        if was_killed:
            let_time_pass(stage)
        assert len(stage.world.running(uuid)) == 1, step
        assert stage.vm("a").status.node_name == stage.world.running(uuid)[0], step
        seen = check_keys(stage.store.redis)
        left = {"slots:cluster", "slots:outbound:<node>", "grants:<node>", "orders:<node>", "deadlines", "awaiting"}
        assert not seen & left, step
        stage.close()
        if not was_killed:
            break
    assert step > 30
