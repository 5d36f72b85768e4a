"""A scenario's folder: README.md tells the story, herd.yaml and script.yaml play it, expected.txt is what must come."""

from pathlib import Path
from typing import Any

from tests.redis_server import RedisServer
from tests.scenarios.engine.expected import read_expectations
from tests.scenarios.engine.invariants import Broken
from tests.scenarios.engine.redis_time import TimeOfDay
from tests.scenarios.engine.run import Run, ScenarioFailed, finish, read_yaml, story
from tests.scenarios.engine.schedule import Stuck
from tests.scenarios.engine.script import Script, armed
from tests.scenarios.engine.timeline import Entry


def play(folder: Path, server: RedisServer, time_of_day: TimeOfDay, seed: int = 0) -> list[Entry]:
    """Play a scenario.

    Args:
        folder: Its own.
        server: A Redis that lives by `time_of_day`; it is emptied first.
        time_of_day: Likewise.
        seed: 0 is the plain order of things; others interrupt threads, and let those that can go on do so in any order.

    Returns:
        What happened.

    Raises:
        ScenarioFailed: An invariant broke, or something else happened than was expected; has the whole story.
        AssertionError: A file is missing.
    """
    if not (folder / "README.md").is_file():
        raise AssertionError(f"{folder / 'README.md'} is missing: what is the story?")
    expectations = read_expectations(folder / "expected.txt")
    herd: dict[str, Any] = read_yaml(folder / "herd.yaml")
    script = Script(read_yaml(folder / "script.yaml"))
    time_of_day.set(0.0)
    server.start()
    server.clear()
    with Run(herd, server, time_of_day, seed) as run:
        cause: Exception | None = None
        try:
            run.begin()
            script.put_on(run)
            run.play(script.end)
            problems = finish(run, expectations, armed(run))
        except (Broken, Stuck) as error:
            problems = [f"{run.schedule.now - run.zero:.3f}: {error}"]
        except Exception as error:  # noqa: BLE001 - a thread of the herd ended with it
            cause, problems = error, [f"{run.schedule.now - run.zero:.3f}: {type(error).__name__}: {error}"]
        if problems:
            raise ScenarioFailed(f"{folder.name}, seed {seed}:" + story(run.timeline, problems)) from cause
        return run.timeline.entries
