"""A stage with three hosts, on a Redis that is empty."""

from collections.abc import Iterator

import pytest

from tests.fakes import Stage


@pytest.fixture
def stage(redis_url: str) -> Iterator[Stage]:
    stage = Stage(redis_url)
    stage.add_nodes("n1", "n2", "n3")
    yield stage
    stage.close()
