"""Adoption and release, with whoever acts killed at any point: no definition is lost, the domain runs on."""

from collections.abc import Callable

import pytest

from orchestrator.intake import Intake
from orchestrator.resources.adoption import RecordedDefinition
from orchestrator.services import adoption
from orchestrator.store import keys
from tests.fakes import Stage
from tests.integration.adopting import (
    UUID,
    add_domain,
    adopted,
    check_at_rest,
    definition,
    deliver,
    plan,
    record,
    web,
)
from tests.integration.test_crashes import Killed, Killer, killer, let_time_pass
from tests.redis_server import RedisServer

__all__ = ["killer"]  # a fixture


class TestKilledAtAnyPoint:
    """After each single command to Redis, and before and after each call to libvirt, whoever made it is dead."""

    def run(self, redis_server: RedisServer, killer: Killer, story: Callable[[Stage], bool]) -> int:
        """Tell a story again and again, each time with a death one step later; returns the number of steps."""
        step = 0
        while True:
            step += 1
            redis_server.clear()
            stage = Stage(redis_server.url)
            stage.add_nodes("n1", "n2", "n3")
            add_domain(stage)
            if story is release_story:
                adopted(stage)
            planned = plan(stage) if story is adoption_story else ()
            stage.plans = planned  # type: ignore[attr-defined]
            for node in stage.nodes.values():
                node.definitions.hook = lambda _: killer_step(killer)
            killer.count, killer.at = 0, step
            rounds = 0
            while True:
                assert rounds < 30, step
                rounds += 1
                try:
                    killer.is_armed = True
                    is_over = story(stage)
                except Killed:
                    killer.at, is_over = 0, False
                finally:
                    killer.is_armed = False
                assert_not_lost(stage)
                if is_over:
                    break
                if killer.at == 0:
                    let_time_pass(stage)
            was_killed = killer.at == 0
            killer.at = 0
            let_time_pass(stage)
            record(stage)
            deliver(stage)
            assert len(stage.world.running(UUID)) == 1, step
            check_at_rest(stage)
            stage.close()
            if not was_killed:
                return step

    @pytest.mark.timeout(100)
    def test_adoption(self, redis_server: RedisServer, killer: Killer) -> None:
        assert self.run(redis_server, killer, adoption_story) > 20

    @pytest.mark.timeout(100)
    def test_release(self, redis_server: RedisServer, killer: Killer) -> None:
        assert self.run(redis_server, killer, release_story) > 10


def killer_step(killer: Killer) -> None:
    if killer.is_armed:
        killer.count += 1
        if killer.count == killer.at:
            raise Killed


def adoption_story(stage: Stage) -> bool:
    if web(stage) is None:
        (planned,) = stage.plans  # type: ignore[attr-defined]
        adoption.adopt(stage.ctx, "n1", planned, "default")
    stage.intake = Intake(stage.ctx)
    record(stage)
    deliver(stage)
    vm = web(stage)
    return vm is not None and vm.status.adoption is None and not stage.nodes["n1"].domains[UUID].definition


def release_story(stage: Stage) -> bool:
    vm = web(stage)
    if vm is not None and vm.status.adoption is None:
        adoption.release(stage.ctx, "default/web-1")
    stage.intake = Intake(stage.ctx)
    deliver(stage)
    copy = stage.nodes["n1"].domains[UUID]
    return web(stage) is None and (copy.vm, copy.definition, copy.autostart) == ("", definition(), True)


def assert_not_lost(stage: Stage) -> None:
    """Its definition is its host's, or on record with a VM that it belongs to; and it runs all the while."""
    copy = stage.nodes["n1"].domains[UUID]
    assert copy.state == "running"
    if copy.definition != definition():
        text = str(stage.store.redis.hget(keys.ADOPTED, UUID))
        assert RecordedDefinition.model_validate_json(text).inactive_xml == definition()
        assert web(stage) is not None
