"""`vmherd top`, and the shell's completion, against a real Redis."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml

from tests.builders import a_node
from tests.fakes import Stage
from tests.integration.command import OnScreen, Vmherd
from tests.redis_server import RedisServer


@pytest.fixture
def herd(stage: Stage) -> Iterator[Vmherd]:
    """Three nodes, two VMs, one of which moves."""
    stage.add_vm("web-1", "n1")
    stage.add_vm("web-2", "n2")
    stage.evict("web-1")
    stage.grant()
    herd = Vmherd(stage.url)
    yield herd
    herd.store.close()


def complete(herd: Vmherd, line: str, what: str = "complete_bash") -> list[str]:
    """What Tab would offer at the end of a line."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line}
    asked |= {"_VMHERD_COMPLETE": what, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'vmherd'; from orchestrator.cli import main; main()"],
        env=herd.environment(**asked),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vmherd evi", ["evict"]),
        ("vmherd evict ", ["web-1", "web-2"]),
        ("vmherd evict web-1 ", ["web-2"]),
        ("vmherd evict -n other ", []),
        ("vmherd migrate web-1 --node n", ["n1", "n2", "n3"]),
        ("vmherd cordon n1 n", ["n2", "n3"]),
        ("vmherd get v", ["vm", "vmclass", "vmop"]),
        ("vmherd get node n", ["n1", "n2", "n3"]),
        ("vmherd describe vm web-2", ["web-2"]),
        ("vmherd get nonsense x", []),
    ],
)
def test_names_are_completed(herd: Vmherd, line: str, offered: list[str]) -> None:
    assert complete(herd, line) == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_given_names_too(herd: Vmherd, shell: str) -> None:
    assert "web-2" in " ".join(complete(herd, "vmherd evict web-", f"complete_{shell}"))


def test_completion_without_a_herd_says_nothing() -> None:
    assert complete(Vmherd("redis://127.0.0.1:1/0"), "vmherd evict ") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_can_be_had_for_each_shell(herd: Vmherd, shell: str) -> None:
    script = complete(herd, "", f"source_{shell}")
    assert f"_VMHERD_COMPLETE=complete_{shell}" in script


def test_top_into_a_pipe_is_printed_once_as_tables(herd: Vmherd) -> None:
    shown = herd.ok("top")
    first = shown.splitlines()[0]
    assert first.startswith("3/3 nodes Ready · 2 VMs (")
    assert "1/3 migrations" in first
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("web-1 ")]
    assert (row[1], row[2]) == ("Evict", "Pending")
    assert "\x1b" not in shown


def test_top_as_a_document(herd: Vmherd) -> None:
    found = json.loads(herd.ok("top", "-o", "json"))
    assert yaml.safe_load(herd.ok("top", "-o", "yaml")) == found
    by_name = {node["name"]: node for node in found["nodes"]}
    assert by_name["n1"]["outbound"] == 1
    target = found["operations"][0]["target"]
    assert by_name[target]["inbound"] == 1
    assert by_name[target]["memory_reserved_mib"] > 0
    assert (found["slots_used"], found["slots_cap"]) == (1, 3)


def test_top_without_a_herd_fails_in_one_line() -> None:
    assert Vmherd("redis://127.0.0.1:1/0").refused("top").startswith("no Redis at")


def test_top_on_a_terminal_shows_what_changes_and_ends_by_ctrl_c(stage: Stage, herd: Vmherd) -> None:
    with OnScreen(herd, "top", LINES="24") as screen:
        shown = screen.read_until("web-1")
        assert "MEMORY" in shown
        assert "│" in shown
        stage.add_vm("late", "n3")
        stage.evict("late")
        screen.read_until("late")
        screen.interrupt()
        screen.read_until("\x1b[?1049l")  # back from the alternate screen
        assert screen.ended() == 0


def test_top_on_a_terminal_says_that_redis_is_away_and_goes_on(durable_redis: RedisServer) -> None:
    herd = Vmherd(durable_redis.url)
    herd.store.must_commit(herd.store.batch().create(a_node("n1")))
    with OnScreen(herd, "top", LINES="24", COLUMNS="120") as screen:
        screen.read_until("1/1 nodes Ready")
        durable_redis.kill()
        assert "1/1 nodes Ready" in screen.read_until("this is how it was").rpartition("vmherd ")[2], (
            "in the same drawing"
        )
        durable_redis.start()
        herd.store.must_commit(herd.store.batch().create(a_node("n2")))
        screen.read_until("2/2 nodes Ready")
        screen.interrupt()
        screen.read_until("\x1b[?1049l")
        assert screen.ended() == 0
    herd.store.close()
