"""One Redis in simulated time, for all scenarios of a test run."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import structlog

from tests.redis_server import RedisServer
from tests.scenarios.engine.redis_time import TimeOfDay, start_redis
from tests.scenarios.engine.scenario import play
from tests.scenarios.engine.timeline import Entry

Play = Callable[..., list[Entry]]


@pytest.fixture(scope="session")
def time_of_day(tmp_path_factory: pytest.TempPathFactory) -> TimeOfDay:
    """The time by which that Redis lives."""
    return TimeOfDay(tmp_path_factory.mktemp("time") / "time-of-day")


@pytest.fixture(scope="session")
def simulated_redis(tmp_path_factory: pytest.TempPathFactory, time_of_day: TimeOfDay) -> Iterator[RedisServer]:
    """The Redis; emptied by each scenario that is played."""
    server = start_redis(tmp_path_factory.mktemp("simulated-redis"), time_of_day)
    yield server
    server.kill()


@pytest.fixture
def play_scenario(simulated_redis: RedisServer, time_of_day: TimeOfDay) -> Iterator[Play]:
    """Play a scenario's folder: `play_scenario(folder, seed=3)`. What happened is told by its timeline, not by logs."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield partial(_play, simulated_redis, time_of_day)
    structlog.configure(**before)


def _play(server: RedisServer, time_of_day: TimeOfDay, folder: Path, seed: int = 0) -> list[Entry]:
    return play(folder, server, time_of_day, seed)
