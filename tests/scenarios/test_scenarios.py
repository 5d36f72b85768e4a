"""Every folder here but the engine's is a scenario; README.md beside this file says how to write one."""

import os
from pathlib import Path

import pytest

from tests.scenarios.conftest import Play
from tests.scenarios.engine.run import ScenarioFailed

HERE = Path(__file__).parent
SCENARIOS = sorted(path for path in HERE.iterdir() if path.is_dir() and path.name not in {"engine", "__pycache__"})
SEEDS = range(1 + int(os.environ.get("SCENARIO_SEEDS", "0")))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("folder", SCENARIOS, ids=lambda folder: folder.name)
def test_scenario(folder: Path, seed: int, play_scenario: Play) -> None:
    try:
        play_scenario(folder, seed)
    except ScenarioFailed as error:
        if error.__cause__ is not None:
            raise  # a thread of the herd ended with an error: its traceback tells where
        message = str(error)
    else:
        return
    pytest.fail(message, pytrace=False)
