"""Fence agents as programs: small ones that misbehave in each known way, and fence_ipmilan on a simulated BMC."""

import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from orchestrator.errors import Invalid
from orchestrator.fencing.agents import FenceAgents, Power
from orchestrator.resources import parse
from orchestrator.resources.fencing import Bmc
from tests.ipmi import SimulatedBmc
from tests.requirements import need_program
from tests.waiting import wait_until

Agent = Callable[[str], FenceAgents]


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    """Install a shell script as fence_fake; it finds what it was given in $given."""

    def install(body: str) -> FenceAgents:
        path = tmp_path / "bin" / "fence_fake"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ngiven=$(cat)\nset -- $given\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return FenceAgents({"BMC_PASSWORD": "se cret"}, f"{path.parent}:/usr/bin:/bin")

    return install


BMC = Bmc(agent="fence_fake", options={"ip": "192.0.2.1"}, timeout_s=5)


@pytest.mark.parametrize(
    ("body", "power"),
    [
        ("echo Status: ON; exit 0", Power.ON),
        ("echo Status: OFF; exit 2", Power.OFF),
        ("echo 'Chassis power = Off'; exit 2", Power.OFF),
        ("echo 'WARNING: certificates are not checked on this host' >&2; echo Status: OFF; exit 2", Power.OFF),
        ("echo 'turn it off and on again' >&2; echo Status: ON; exit 0", Power.ON),
        ("yes 'it is on' | head -c 100000 >&2; echo Status: OFF; exit 2", Power.OFF),
    ],
)
def test_plain_answers(agent: Agent, body: str, power: Power) -> None:
    assert agent(body).status(BMC).power is power


@pytest.mark.parametrize(
    "body",
    [
        "echo usage: fence_fake; exit 2",  # wrong arguments end like this with every argument parser
        "exit 2",
        "exit 0",
        "echo Status: OFF; exit 0",
        "echo Status: ON; exit 2",
        "echo Status: ON or OFF; exit 2",
        "echo Status: OFF; exit 1",
        "echo Unable to connect; exit 1",
        "printf '\\377\\376OFF\\000\\033[2J'; exit 1",
        "printf '\\303\\050 \\377'; exit 2",
        "kill -9 $$",
        "yes OFFON | head -c 1000000; exit 2",
        "echo Status: OFF >&2; exit 2",  # no answer, though a warning names one
        "echo 'usage: fence_fake [-o off]' >&2; echo Status:; exit 2",
        "echo Status: OFF; yes . | head -c 10000; echo Status: ON; exit 2",  # what comes late counts too
    ],
)
def test_anything_else_is_not_known_and_says_what_came(agent: Agent, body: str) -> None:
    answer = agent(body).status(BMC)
    assert answer.power is Power.UNKNOWN
    assert "fence_fake" in answer.problem
    assert answer.problem.isprintable()
    assert len(answer.problem) < 500


def test_people_are_shown_both_of_its_outputs(agent: Agent) -> None:
    problem = agent("echo Status: UNKNOWN; echo 'no route to host' >&2; exit 1").status(BMC).problem
    assert "exit code 1: Status: UNKNOWN / no route to host" in problem
    problem = agent("yes chatter | head -c 9000; echo 'no route to host' >&2; exit 1").switch(BMC, on=False)
    assert "no route to host" in problem


def test_options_and_action_come_on_standard_input(agent: Agent, tmp_path: Path) -> None:
    told = tmp_path / "told"
    assert agent(f'printf "%s" "$given" > {told}; exit 0').switch(BMC, on=False) == ""
    assert told.read_text().split() == ["ip=192.0.2.1", "power_wait=0", "action=off"]


def test_no_password_shows(agent: Agent, tmp_path: Path) -> None:
    """Neither in its arguments or environment, nor in what is told of it."""
    seen = tmp_path / "seen"
    body = f'tr "\\0" " " < /proc/$$/cmdline > {seen}; env >> {seen}; echo "failed with $given"; exit 1'
    answer = agent(body).status(BMC.with_(password_env="BMC_PASSWORD"))
    assert "se cret" not in seen.read_text()
    assert "se cret" not in answer.problem
    assert "***" in answer.problem


def test_a_password_of_a_file(agent: Agent, tmp_path: Path) -> None:
    secret, told = tmp_path / "secret", tmp_path / "told"
    secret.write_text("from a file\n")
    agent(f'printf "%s" "$given" > {told}').status(BMC.with_(password_file=str(secret)))
    assert "password=from a file" in told.read_text()


@pytest.mark.parametrize("missing", [{"password_file": "/nonexistent/x"}, {"password_env": "NO_SUCH"}])
def test_a_password_that_is_missing_is_said(agent: Agent, missing: dict[str, str]) -> None:
    answer = agent("echo Status: OFF; exit 2").status(BMC.with_(**missing))
    assert answer.power is Power.UNKNOWN
    assert "password" in answer.problem


def test_an_unknown_agent_is_said(agent: Agent) -> None:
    answer = agent("exit 0").status(BMC.with_(agent="fence_no_such"))
    assert answer.power is Power.UNKNOWN
    assert "no fence agent fence_no_such" in answer.problem


def test_one_that_hangs_is_killed_with_all_that_it_started(agent: Agent, tmp_path: Path) -> None:
    child = tmp_path / "child"
    agents = agent(f"sleep 1000 & echo $! > {child}; wait")
    began = time.monotonic()
    answer = agents.status(BMC.with_(timeout_s=1))
    assert answer.power is Power.UNKNOWN
    assert "did not end within 1 s" in answer.problem
    assert time.monotonic() - began < 60  # not for ever
    pid = int(child.read_text())
    wait_until(lambda: not _runs(pid), 10, "its child is gone")


def test_what_it_left_behind_is_not_waited_for(agent: Agent, tmp_path: Path) -> None:
    child = tmp_path / "child"
    answer = agent(f"sleep 1000 & echo $! > {child}; echo Status: ON").status(BMC)
    assert answer.power is Power.ON
    pid = int(child.read_text())
    wait_until(lambda: not _runs(pid), 10, "its child is gone")


def test_exit_0_after_off_proves_nothing(agent: Agent) -> None:
    agents = agent('case "$given" in *action=off*) exit 0;; esac; echo Status: ON; exit 0')
    assert agents.switch(BMC, on=False) == ""
    assert agents.status(BMC).power is Power.ON


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    "given",
    [
        {"agent": "rm"},
        {"agent": "fence_x/../../rm"},
        {"agent": "fence_x", "options": {"passwd": "x"}},
        {"agent": "fence_x", "options": {"action": "off"}},
        {"agent": "fence_x", "options": {"ip": "a\nb=c"}},
        {"agent": "fence_x", "passwordFile": "/x", "passwordEnv": "X"},
    ],
)
def test_what_is_no_bmc_is_refused(given: dict[str, object]) -> None:
    with pytest.raises((Invalid, ValidationError)):
        parse(Bmc, given)


class TestIpmi:
    """The real agent against a simulated BMC."""

    @pytest.fixture
    def bmc(self, tmp_path: Path) -> Iterator[SimulatedBmc]:
        need_program("fence_ipmilan", "fence-agents")
        need_program("ipmitool", "ipmitool")
        with SimulatedBmc(tmp_path, need_program("ipmi_sim", "openipmi")) as bmc:
            yield bmc

    def test_power_is_read_cut_and_switched_on(self, bmc: SimulatedBmc) -> None:
        agents = FenceAgents({"BMC_PASSWORD": bmc.password})
        config = bmc.config(password_env="BMC_PASSWORD")
        assert agents.status(config).power is Power.ON
        assert agents.switch(config, on=False) == ""
        assert agents.status(config).power is Power.OFF
        assert bmc.power == "0"
        assert agents.switch(config, on=True) == ""
        assert agents.status(config).power is Power.ON

    def test_a_wrong_password_is_no_answer(self, bmc: SimulatedBmc) -> None:
        answer = FenceAgents({"BMC_PASSWORD": "wrong"}).status(bmc.config(password_env="BMC_PASSWORD"))
        assert answer.power is Power.UNKNOWN
        assert answer.problem
        assert "wrong" not in answer.problem.replace("Unable to connect/login", "")

    def test_a_bmc_that_is_not_there_is_no_answer(self, bmc: SimulatedBmc) -> None:
        bmc.stop()
        answer = FenceAgents({"BMC_PASSWORD": bmc.password}).status(
            bmc.config(password_env="BMC_PASSWORD", timeout_s=3)
        )
        assert answer.power is Power.UNKNOWN
