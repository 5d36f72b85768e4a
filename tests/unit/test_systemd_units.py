"""The systemd units: systemd understands each line, and what they run is there.

No systemd runs here. What `vmherd-guests.service` runs is tried on the lab (`tests/lab/test_policies.py`); that it is
stopped first follows from its `After=`.
"""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli.main import app
from orchestrator.settings import Settings
from tests.requirements import need_program

UNITS = Path(__file__).parents[2] / "config/systemd"
NAMES = sorted(path.name for path in UNITS.glob("*.service"))
PROGRAM = "/opt/vmherd/bin/vmherd"
PYTHON = "/opt/vmherd/bin/python"
"""Runs the heartbeat, which imports as little as it can: no command line among it."""


def lines(name: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", (UNITS / name).read_text(), re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    return [(name, command) for name in NAMES for key in ("ExecStart", "ExecStop") for command in lines(name, key)]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A root file system with the units, and a program where they look for it."""
    need_program("systemd-analyze", "systemd")
    shutil.copytree(UNITS, tmp_path / "etc/systemd/system")
    shutil.copytree("/usr/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    for name in (PROGRAM, PYTHON):
        program = tmp_path / name.lstrip("/")
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch(0o755)
    return tmp_path


def verify(machine: Path, name: str) -> str:
    """What systemd has to say of a unit; it ends well all the same, in some versions."""
    argv = ["systemd-analyze", "verify", "--man=no", f"--root={machine}", name.replace("@", "@1")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    return "\n".join(line for line in (done.stdout + done.stderr).splitlines() if "vmherd" in line)


@pytest.mark.parametrize("name", NAMES)
def test_systemd_understands_each_unit(machine: Path, name: str) -> None:
    assert verify(machine, name) == ""


def test_what_it_does_not_understand_is_told(machine: Path) -> None:
    unit = machine / "etc/systemd/system/vmherd-guests.service"
    unit.write_text(unit.read_text().replace("Type=oneshot", "Type=oneshoot"))
    assert "oneshoot" in verify(machine, unit.name)


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda value: str(value).replace(f"{PROGRAM} ", ""))
def test_what_each_unit_runs_is_there(name: str, command: str) -> None:
    program, *arguments = command.split()
    if program == PYTHON:
        assert arguments[0] == "-m"
        assert find_spec(arguments[1]) is not None
        return
    assert program == PROGRAM
    found = CliRunner().invoke(app, [*arguments, "--help"])
    assert found.exit_code == 0, found.output
    named = [word for word in arguments if not word.startswith("-")]
    assert "Usage: root " + " ".join(named[:2]) in " ".join(found.output.split())


def test_guests_leave_before_anything_that_they_need_is_stopped() -> None:
    """Units are stopped in the reverse order of their start."""
    after = {unit for line in lines("vmherd-guests.service", "After") for unit in line.split()}
    needed = {"network-online.target", "libvirtd.service", "virtqemud.service", "virt-guest-shutdown.target"}
    ours = {name for name in NAMES if name.startswith(("vmherd-agent", "vmherd-worker"))}
    assert needed | ours <= after


def test_systemd_waits_for_them_longer_than_they_are_given() -> None:
    (stop_s,) = lines("vmherd-guests.service", "TimeoutStopSec")
    defaults = {name: Settings.model_fields[name].default for name in ("host_shutdown_timeout", "host_shutdown_grace")}
    assert int(stop_s) > sum(defaults.values())
