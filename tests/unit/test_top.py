"""What `vmherd top` shows of a herd: plain, and drawn for a terminal of any size."""

from dataclasses import replace
from datetime import UTC, datetime
from io import StringIO

import pytest
from rich.console import Console

from orchestrator.cli import completion
from orchestrator.cli.top import bar, drawn, plain
from orchestrator.errors import StoreUnavailable
from orchestrator.services.overview import NodeLoad, OperationLine, Overview
from orchestrator.services.use import Use

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)


def a_load(name: str = "n1", *, reserved: int = 4000) -> NodeLoad:
    return NodeLoad(
        name=name,
        status="Ready",
        vms=3,
        cpu_millicores=8000,
        cpu_reserved_millicores=reserved,
        memory_mib=16_384,
        memory_reserved_mib=4096,
        outbound=1,
        inbound=0,
        use=Use(0.37, 24_576),
        host_memory_mib=32_768,
    )


def an_operation(vm: str = "web", message: str = "") -> OperationLine:
    return OperationLine(
        name=f"evict-{vm}",
        namespace="default",
        virtual_machine=vm,
        type="Evict",
        phase="InProgress",
        progress=45,
        source="n1",
        target="n2",
        message=message,
    )


def seen(nodes: int = 2, operations: int = 1) -> Overview:
    return Overview(
        nodes=tuple(a_load(f"n{number}") for number in range(nodes)),
        operations=tuple(an_operation(f"vm-{number}") for number in range(operations)),
        phases={"Migrating": 1, "Running": 5},
        slots_used=1,
        slots_cap=nodes,
    )


def on_screen(overview: Overview, *, lines: int = 30, width: int = 140) -> list[str]:
    console = Console(file=StringIO(), width=width, height=lines, force_terminal=True, color_system=None)
    with console.capture() as shown:
        console.print(drawn(overview, NOW, lines=lines, is_wide=width >= 116))
    return shown.get().rstrip("\n").splitlines()


def test_plain_is_columns_that_awk_reads() -> None:
    lines = plain(seen())
    assert lines[0] == "2/2 nodes Ready · 6 VMs (1 Migrating, 5 Running) · 1/2 migrations · 0 waiting"
    titles = "NODE STATUS VMS CPU CORES CPU-USE MEMORY AMOUNT MEMORY-USE OUT IN"
    assert lines[2].split() == titles.split()
    assert lines[3].split() == ["n0", "Ready", "3", "50%", "4/8", "37%", "25%", "4Gi/16Gi", "75%", "1", "0"]
    assert lines[-1].split() == ["vm-0", "Evict", "InProgress", "45%", "n1", "→", "n2", "-"]
    assert not any("\x1b" in line for line in lines)
    silent = replace(seen(), nodes=(replace(a_load(), use=None),))
    assert plain(silent)[3].split()[5::3] == ["-", "-"], "what a host did not tell is not nothing"


def test_what_hosts_wrote_can_not_draw_on_the_terminal() -> None:
    evil = replace(seen(), operations=(an_operation(message="\x1b[2J[red]x[/red]"),))
    assert "\x1b[2J" not in "\n".join(plain(evil))
    screen = "\n".join(on_screen(evil))
    assert "\x1b[2J" not in screen
    assert "[red]x[/red]" in screen, "it is no markup of ours"


def test_a_herd_that_is_away_is_told_above_what_was_seen_last() -> None:
    console = Console(file=StringIO(), width=140, force_terminal=True, color_system=None)
    with console.capture() as shown:
        console.print(drawn(seen(), NOW, lines=30, trouble="no API at \x1b[2Jhere"))
    lines = shown.get().splitlines()
    assert lines[1].startswith("no API at ")
    assert "\x1b[2J" not in lines[1]
    assert any(line.startswith("n0 ") for line in lines)


@pytest.mark.parametrize(
    ("share", "filled", "colour"),
    [(0.0, 0, "green"), (0.5, 10, "green"), (0.8, 16, "green"), (0.81, 16, "red"), (1.4, 19, "red")],
)
def test_a_bar_has_its_line_at_80_percent_and_is_red_above(share: float, filled: int, colour: str) -> None:
    text = bar(share)
    assert text.plain[16] == "│"
    assert text.plain.count("█") == min(filled, 19)
    assert text.plain.endswith(f"{share:.0%}")
    assert colour in {str(span.style) for span in text.spans}


@pytest.mark.parametrize(("nodes", "operations"), [(3, 0), (3, 2), (1000, 40), (3, 200), (1000, 0)])
@pytest.mark.parametrize("lines", [12, 24, 60])
def test_it_fits_the_terminal_and_counts_what_does_not(nodes: int, operations: int, lines: int) -> None:
    shown = on_screen(seen(nodes, operations), lines=lines)
    assert len(shown) <= max(lines, 14)
    listed = sum(line.startswith("n") and " Ready" in line for line in shown)
    left = [line for line in shown if line.startswith("… and")]
    assert listed >= min(nodes, 3)
    if listed < nodes:
        assert f"… and {nodes - listed} more nodes" in left
    if not operations:
        assert "nothing is under way, and nothing waits" in shown


@pytest.mark.parametrize("width", [80, 100, 130, 200])
def test_names_and_shares_stay_readable_however_narrow_it_is(width: int) -> None:
    told = replace(seen(), operations=(an_operation("a-vm-of-some-name", message="x" * 300),))
    shown = on_screen(told, width=width)
    assert all(len(line) <= width for line in shown)
    (node,) = [line for line in shown if line.startswith("n1 ")]
    assert node.split()[:3] == ["n1", "Ready", "3"]
    assert " 50%" in node
    (operation,) = [line for line in shown if line.startswith("a-vm-of-some-name ")]
    assert "InProgress" in operation
    assert "45%" in operation
    assert "n1 → n2" in operation


def test_completion_gives_up_on_a_herd_that_does_not_answer() -> None:
    def refuse() -> list[str]:
        raise StoreUnavailable("no Redis")

    assert completion.in_time(refuse) == []
    assert completion.in_time(lambda: ["a"]) == ["a"]
