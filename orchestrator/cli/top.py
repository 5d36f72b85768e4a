"""`vmherd top`: the herd at a glance, live on a terminal, once into a pipe.

On Redis it follows the change stream as the control plane does, so what is shown is redrawn when something changed, and
a large herd is read once. Through the API the server, which does that already, is asked once a second.
"""

import json
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_client
from orchestrator.cli.ages import memory
from orchestrator.cli.output import Documents, document
from orchestrator.cli.tables import Column, Layout, clean, phase_colour
from orchestrator.errors import StoreUnavailable
from orchestrator.services.overview import NodeLoad, OperationLine, Overview

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

EXAMPLES = """Examples:

$ vmherd top

$ vmherd top --once -o json

Ctrl-C ends it. The line in the bars is at 80 %, above which a node is relieved.
"""
LINE: Final = 0.8
"""Of a node's CPU: the rebalancer takes nodes that are above it to it."""
_BAR_WIDTH: Final = 20
_NARROW_BAR_WIDTH: Final = 8
_WIDE: Final = 116
"""On narrower terminals bars are shorter, and amounts are left out."""
_LONGEST_NAME: Final = 28
_MOST_OPERATIONS_SHARE: Final = 2
"""Operations get one line in so many, when there are more lines than the terminal has."""
_FIXED_LINES: Final = 7
_REDRAW_S: Final = 0.25
_CLOCK_S: Final = 1.0
_LEAST_LINES: Final = 3


def top(
    once: Annotated[bool, typer.Option("--once", help="Print it once, as into a pipe.")] = False,
    output: Annotated[Documents | None, typer.Option("-o", "--output", help="Once, as a document.")] = None,
) -> None:
    """Show nodes with what is reserved of them, migrations and their slots, and what waits."""
    changed = threading.Event()
    with open_client() as client, client.overviews(changed.set) as look:
        if output is not None:
            terminal.write(document(json.loads(json.dumps(look().manifest())), output))
        elif once or not terminal.is_watched():
            terminal.write("\n".join(plain(look())))
        else:
            _live(look, changed)


def _live(look: Callable[[], Overview], changed: threading.Event) -> None:
    from rich.console import Console  # noqa: PLC0415 - only where something is drawn
    from rich.live import Live  # noqa: PLC0415

    console = Console(highlight=False)
    seen = look()  # a herd that is away at the beginning ends the command

    def draw(trouble: str = "") -> "Group":
        is_wide = console.width >= _WIDE
        return drawn(seen, datetime.now(UTC), lines=console.height, is_wide=is_wide, trouble=trouble)

    with terminal.without_caret_c(), Live(draw(), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                changed.wait(_CLOCK_S)
                changed.clear()
                try:
                    seen, trouble = look(), ""
                except StoreUnavailable as error:
                    trouble = f"{error}; this is how it was, and goes on when it is back"
                live.update(draw(trouble), refresh=True)
                threading.Event().wait(_REDRAW_S)  # what changes meanwhile is drawn together
        except KeyboardInterrupt:
            return


def headline(seen: Overview) -> str:
    """Give the herd in one line."""
    ready = sum(node.status.startswith("Ready") for node in seen.nodes)
    phases = ", ".join(f"{count} {phase}" for phase, count in seen.phases.items())
    waiting = sum(operation.phase == "Pending" for operation in seen.operations)
    return (
        f"{ready}/{len(seen.nodes)} nodes Ready · {sum(seen.phases.values())} VMs ({phases or 'none'}) · "
        f"{seen.slots_used}/{seen.slots_cap} migrations · {waiting} waiting"
    )


def plain(seen: Overview) -> list[str]:
    """Give it as tables without colour or bars."""
    node_rows = [
        (
            node.name,
            node.status,
            str(node.vms),
            f"{node.cpu_share:.0%}",
            _cores(node),
            _used(node.cpu_used),
            f"{node.memory_share:.0%}",
            _memories(node),
            _used(node.memory_used),
            str(node.outbound),
            str(node.inbound),
        )
        for node in seen.nodes
    ]
    titles = ("NODE", "STATUS", "VMS", "CPU", "CORES", "CPU-USE", "MEMORY", "AMOUNT", "MEMORY-USE", "OUT", "IN")
    lines = [headline(seen), "", *_table(titles, node_rows)]
    rows = [
        (one.virtual_machine, one.type, one.phase, f"{one.progress}%", _way(one), clean(one.message) or "-")
        for one in seen.operations
    ]
    return [*lines, "", *_table(("VM", "OPERATION", "PHASE", "PROGRESS", "NODES", "MESSAGE"), rows)] if rows else lines


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    layout = Layout([Column(title, lambda *_: "") for title in titles], colour=False)
    layout.fit(rows)
    return [layout.header(), *(layout.row(row) for row in rows)]


def drawn(seen: Overview, now: datetime, *, lines: int, is_wide: bool = True, trouble: str = "") -> "Group":
    """Give it as it is drawn on a terminal of so many lines; what doesn't fit is counted.

    Args:
        seen: As it was last seen.
        now: The time that is shown.
        lines: The terminal's, 1..n.
        is_wide: Whether it has room for amounts beside the bars.
        trouble: Why it is not as it is now; empty where it is.
    """
    from rich.console import Group  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    head = Text(no_wrap=True, overflow="ellipsis")
    head.append(f"vmherd {now.astimezone():%H:%M:%S}  ", style="bold")
    head.append(headline(seen))
    room = max(2 * _LEAST_LINES, lines - _FIXED_LINES)
    for_operations = min(len(seen.operations), max(_LEAST_LINES, room // _MOST_OPERATIONS_SHARE))
    for_nodes = min(len(seen.nodes), max(_LEAST_LINES, room - for_operations))
    for_operations = min(len(seen.operations), max(_LEAST_LINES, room - for_nodes))
    said = Text(clean(trouble), style="red", no_wrap=True, overflow="ellipsis")
    parts: list[Text | Table] = [head, said, _nodes(seen.nodes[:for_nodes], is_wide=is_wide)]
    parts += _more(len(seen.nodes) - for_nodes, "nodes")
    parts.append(Text(""))
    if not seen.operations:
        parts.append(Text("nothing is under way, and nothing waits", style="dim"))
        return Group(*parts)
    parts.append(_operations(seen.operations[:for_operations], is_wide=is_wide))
    parts += _more(len(seen.operations) - for_operations, "operations")
    return Group(*parts)


def _more(count: int, what: str) -> "list[Text | Table]":
    from rich.text import Text  # noqa: PLC0415

    return [Text(f"… and {count} more {what}", style="dim")] if count > 0 else []


def _grid(*titles: str) -> "Table":
    """Make a table without lines; of its columns the last one gives way where it is narrow."""
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", expand=True)
    for title in titles[:-1]:
        table.add_column(title, no_wrap=True, overflow="ellipsis", max_width=_LONGEST_NAME)
    table.add_column(titles[-1], no_wrap=True, overflow="ellipsis", ratio=1)
    return table


def _nodes(nodes: Sequence[NodeLoad], *, is_wide: bool) -> "Table":
    from rich.text import Text  # noqa: PLC0415

    width = _BAR_WIDTH if is_wide else _NARROW_BAR_WIDTH
    cpu, mem = (("CORES", "IN USE"), ("AMOUNT", "IN USE")) if is_wide else ((), ())
    table = _grid("NODE", "STATUS", "VMS", "CPU", *cpu, "MEMORY", *mem, "OUT", "IN")
    for node in nodes:
        table.add_row(
            node.name,
            Text(
                node.status if is_wide else node.status.replace("SchedulingDisabled", "Off"), style=_style(node.status)
            ),
            str(node.vms),
            bar(node.cpu_share, width=width),
            *((_cores(node), _used(node.cpu_used)) if is_wide else ()),
            bar(node.memory_share, width=width),
            *((_memories(node), _used(node.memory_used)) if is_wide else ()),
            str(node.outbound),
            str(node.inbound),
        )
    return table


def _operations(operations: Sequence[OperationLine], *, is_wide: bool) -> "Table":
    from rich.text import Text  # noqa: PLC0415

    table = _grid("VM", "OPERATION", "PHASE", "PROGRESS", "NODES", "MESSAGE")
    for one in operations:
        table.add_row(
            one.virtual_machine,
            one.type,
            Text(one.phase, style=_style(one.phase)),
            bar(one.progress / 100, line=None, width=_BAR_WIDTH if is_wide else _NARROW_BAR_WIDTH),
            _way(one),
            Text(clean(one.message)),
        )
    return table


def _style(phase: str) -> str:
    """A phase's colour by rich's names."""
    return phase_colour(phase).replace("bright_black", "dim")


def bar(share: float, *, line: float | None = LINE, width: int = _BAR_WIDTH) -> "Text":
    """Give a bar with its percentage; with a line in it, and red above that."""
    from rich.text import Text  # noqa: PLC0415

    filled = min(width, round(share * width))
    at = None if line is None else round(line * width)
    colour = "green" if line is None or share <= line else "red"
    text = Text()
    for cell in range(width):
        if cell == at:
            text.append("│", style="bold")
        elif cell < filled:
            text.append("█", style=colour)
        else:
            text.append("·", style="dim")
    return text.append(f" {share:4.0%}", style=colour)


def _cores(node: NodeLoad) -> str:
    return f"{node.cpu_reserved_millicores / 1000:g}/{node.cpu_millicores / 1000:g}"


def _memories(node: NodeLoad) -> str:
    return f"{memory(node.memory_reserved_mib)}/{memory(node.memory_mib)}"


def _used(share: float | None) -> str:
    return f"{share:.0%}" if share is not None else "-"


def _way(one: OperationLine) -> str:
    return " → ".join(name for name in (one.source, one.target) if name) or "-"
