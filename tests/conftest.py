"""Fixtures that all tests share, and marks by folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.settings import Settings
from orchestrator.store import Store
from orchestrator.store.connection import connect
from tests.ci_rules import pytest_configure
from tests.redis_server import RedisServer

__all__ = ["pytest_configure"]  # a hook

MARKED_FOLDERS = ("integration", "lab", "browser")
"""Folders of tests/ whose tests bear the folder's name as their mark."""


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for the whole run, for tests that neither kill nor freeze it."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of a Redis that is empty: the run's one, cleared."""
    redis_server.clear()
    return redis_server.url


@pytest.fixture
def store(redis_url: str) -> Iterator[Store]:
    """The control plane's store on an empty Redis, with the default settings."""
    store = Store(connect(redis_url), Settings())
    yield store
    store.close()


@pytest.fixture
def durable_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own that it may kill, freeze and start again; it writes each change through to disk."""
    server = RedisServer(tmp_path / "redis", is_durable=True)
    server.start()
    yield server
    server.kill()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--part`, by which several pytests share some folders' tests."""
    parser.addoption("--part", metavar="K/N", help="run each N-th of the chosen tests only, from the K-th on")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Mark tests by their folder, let -m and -k choose, and take the part of those that is asked for."""
    _mark(items)
    yield
    part = config.getoption("--part")
    if part:
        first, _, count = part.partition("/")
        chosen = items[int(first) - 1 :: int(count)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen


def _mark(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        if not item.path.is_relative_to(tests):
            continue
        folder = item.path.relative_to(tests).parts[0]
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)
