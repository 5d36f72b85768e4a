"""The herd at a glance: slots, what waits and why, the node map, what the herd could not lose, and the last day."""

from datetime import UTC, datetime
from html import escape
from typing import Final

from nicegui import ui
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from orchestrator.api.rights import is_allowed
from orchestrator.console.charts import timeline
from orchestrator.console.guard import PREFIX
from orchestrator.console.herd_view import failover_risks, known_risk, mark_rows, node_map
from orchestrator.console.pages.frame import (
    AT_CELL,
    OPERATION_COLUMNS,
    Column,
    Console,
    facts_list,
    fill,
    frame,
    heading,
    keep_drawn,
    session_of,
    show_html,
    table,
)
from orchestrator.console.rows import in_order, operation_row
from orchestrator.resources import Event, Node, NodeDrain, NodeFencing, VirtualMachine, VirtualMachineOperation

_EVERY_S: Final = 1.0
_DAY_EVERY_S: Final = 5.0
_MOST: Final = 50
_MOST_RISKS: Final = 20
_OPERATIONS: Final = (
    Column(
        "VM",
        "vm",
        "<a :href=\"'/console/projects/' + props.row.namespace + '/virtualization/virtual-machines/' + props.row.vm\">"
        "{{ props.row.vm }}</a>",
    ),
    *OPERATION_COLUMNS,
)
_MARKS: Final = (
    Column("Time", "at", AT_CELL),
    Column("What", "lane"),
    Column("Which", "text", '<span :class="{trouble: props.row.bad}">{{ props.row.text }}</span>'),
)


def add_pages(console: Console) -> None:
    """Add this page."""

    @ui.page("/")
    def overview(request: Request) -> Response | None:
        identity = session_of(request).identity
        if not is_allowed(identity, "list", "nodes", None):
            return RedirectResponse(f"{PREFIX}/projects", 303)  # a token for some projects sees those
        with frame(console, request, "Overview", "Overview"):
            figures = ui.html(sanitize=False)
            with ui.element("div").classes("box"):
                heading("Operations under way, and waiting")
                more = ui.label().classes("faint")
                operations = table(_OPERATIONS, "Operations", "Nothing is under way, and nothing waits")
            with ui.element("div").classes("grid"):
                with ui.element("div").classes("box"):
                    heading("Nodes")
                    squares = ui.html(sanitize=False)
                    ui.label("Darker: more of its CPU is reserved. Red: above 80 %. Framed: cordoned. Striped: lost.")
                with ui.element("div").classes("box"):
                    heading("If a node died now")
                    risks = ui.html(sanitize=False)
            with ui.element("div").classes("box"):
                heading("The last day")
                with ui.element("div").classes("sideways").props('tabindex="0" role="region" aria-label="Timeline"'):
                    day = ui.html(sanitize=False)
                latest = table(_MARKS, "The latest of it", "Nothing was moved, fenced or emptied")

        def draw() -> None:
            show_html(figures, _figures(console))
            found = in_order(console.live.operations.values())
            more.text = f"The first {_MOST} of {len(found):,}" if len(found) > _MOST else ""
            fill(operations, [operation_row(one, may=False) for one in found[:_MOST]])
            show_html(squares, node_map(console.herd.now()))
            show_html(risks, _risks(console))

        def draw_day() -> None:
            now = datetime.now(UTC)
            found = console.herd.day(now)
            show_html(day, timeline(found, now))
            fill(latest, mark_rows(found))

        keep_drawn(console, request, [VirtualMachine, VirtualMachineOperation, Node, NodeDrain], draw, _EVERY_S)
        keep_drawn(console, request, [VirtualMachineOperation, NodeFencing, NodeDrain, Event], draw_day, _DAY_EVERY_S)
        return None


def _figures(console: Console) -> str:
    herd = console.herd.now()
    ready = sum(load.status.startswith("Ready") for load in herd.loads.values())
    waiting = sum(one.status.grant is None for one in console.live.operations.values())
    phases = ", ".join(f"{count:,} {phase}" for phase, count in herd.phases.items())
    found = [
        (f"{ready}/{len(herd.loads)}", "nodes Ready"),
        (f"{sum(herd.phases.values()):,}", f"VMs: {phases or 'none'}"),
        (f"{herd.slots_used}/{herd.slots_cap}", "migration slots in use"),
        (f"{waiting:,}", "operations waiting"),
    ]
    boxes = "".join(f'<div class="box figure"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in found)
    return f'<div class="figures">{boxes}</div>'


def _risks(console: Console) -> str:
    found = failover_risks(console.live)
    if found:
        more = f"<p>and {len(found) - _MOST_RISKS} more</p>" if len(found) > _MOST_RISKS else ""
        return facts_list(found[:_MOST_RISKS]) + more
    if not known_risk(console.live):
        return "<p>The capacity watch has not looked at every node yet.</p>"
    return "<p>All VMs that would have to be restarted fit elsewhere, whichever node it is.</p>"
