"""The way "System", "Nodes", "Nodes of all groups": the nodes, what is reserved of each, and emptying them.

"Cordon + Drain" shows its plan first: what goes where, how long that takes, and what does not fit.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, Final

from nicegui import events, ui
from starlette.requests import Request
from starlette.responses import Response

from orchestrator.console.actions import may_empty
from orchestrator.console.herd_view import Preview, list_nodes, lost_nodes, preview
from orchestrator.console.pages.frame import (
    Column,
    Console,
    facts_list,
    fill,
    frame,
    heading,
    keep_drawn,
    refused,
    session_of,
    show_html,
    table,
)
from orchestrator.console.pages.vms import ANY, Pager
from orchestrator.console.pages.windows import buttons, do_on, open_window, tell
from orchestrator.errors import StoreUnavailable, VmherdError
from orchestrator.resources import Node, NodeDrain, NodeFencing, VirtualMachine
from orchestrator.services.use import Use, read_uses

SECTIONS: Final = [("Nodes", "/system/nodes"), ("Nodes of all groups", "/system/nodes/all")]
_EVERY_S: Final = 1.0
_USE_EVERY_S: Final = 10.0
"""As often as agents tell."""


def _bar(field: str, what: str) -> str:
    one = f"props.row.{field}"
    return (
        f'<div style="flex: 1"><div class="bar" :class="{{over: {one}.over}}" role="meter" '
        f':aria-label="props.row.name + \', {what}\'" :aria-valuenow="Math.round({one}.share * 100)" aria-valuemin="0" '
        f':aria-valuetext="{one}.percent + \' of {what}\'" title="The line is at 80 %">'
        f"<i :style=\"{{width: Math.min(100, {one}.share * 100) + '%'}}\"></i>"
        f'<u v-if="{one}.used !== null" :style="{{width: Math.min(100, {one}.used * 100) + \'%\'}}"></u><b></b></div>'
        f'<span class="faint">{{{{ {one}.percent }}}} ({{{{ {one}.text }}}})</span>'
        f'<div v-if="{one}.inUse" class="faint">{{{{ {one}.inUse }}}}</div></div>'
    )


def _button(label: str, event: str, when: str) -> str:
    return (
        f'<q-btn v-if="props.row.{when}" outline dense no-caps label="{label}" '
        f":aria-label=\"'{label} ' + props.row.name\" @click=\"$parent.$emit('{event}', {{name: props.row.name}})\"/>"
    )


_COLUMNS: Final = (
    Column("Node", "name"),
    Column(
        "Status",
        "status",
        '<div><span class="phase" :class="props.row.shade">{{ props.row.status }}</span>'
        '<div v-if="props.row.drained !== null" class="bar" role="progressbar" '
        ':aria-label="props.row.name + \', drained\'" :aria-valuenow="props.row.drained">'
        "<i :style=\"{width: props.row.drained + '%'}\"></i></div>"
        '<div v-if="props.row.drain" class="faint">{{ props.row.drain }}</div></div>',
    ),
    Column("VMs", "vms"),
    Column("CPU reserved", "cpu", _bar("cpu", "CPU reserved")),
    Column("Memory reserved", "memory", _bar("memory", "memory reserved")),
    Column("Migrations", "moves"),
    Column(
        "Fencing",
        "fencing",
        "<div><span :class=\"'phase ' + props.row.fencingShade\">{{ props.row.fencing }}</span>"
        '<div v-if="props.row.failover" class="trouble">{{ props.row.failover }}</div></div>',
    ),
)
_ACTIONS: Final = Column(
    "",
    "actions",
    '<div class="do">'
    + _button("Cordon + Drain", "drain", "canDrain")
    + _button("Uncordon", "uncordon", "canUncordon")
    + "</div>",
)
_PLAN: Final = (
    Column("Order", "order"),
    Column("VM", "vm"),
    Column("Memory", "memory"),
    Column("To", "to"),
    Column("Begins", "begins"),
    Column("Takes", "takes"),
)


@dataclass(slots=True)
class _Wanted:
    search: str = ""
    only: str = ""
    page: int = 0


def add_pages(console: Console) -> None:
    """Add these pages."""

    @ui.page("/system")
    def system(request: Request) -> Response | None:
        return _summary(console, request, "System", "")

    @ui.page("/system/nodes")
    def nodes(request: Request) -> Response | None:
        return _summary(console, request, "Nodes", "Nodes")

    @ui.page("/system/nodes/all")
    def all_nodes(request: Request) -> Response | None:
        identity = session_of(request).identity
        if answer := refused(identity, "list", "nodes", None):
            return answer
        with frame(console, request, "System", "Nodes of all groups", below=SECTIONS, at="Nodes of all groups"):
            _list(console, request, may=may_empty(identity))
        return None


def _summary(console: Console, request: Request, title: str, at: str) -> Response | None:
    if answer := refused(session_of(request).identity, "list", "nodes", None):
        return answer
    with frame(console, request, "System", title, below=SECTIONS, at=at), ui.element("div").classes("box"):
        text = ui.label()

        def draw() -> None:
            shown = list_nodes(console.live, console.herd.now())
            counts = ", ".join(f"{count} {status}" for status, count in shown.phases.items())
            text.text = f"{shown.total:,} nodes: {counts or 'none'}"

        keep_drawn(console, request, [Node], draw, _EVERY_S)
    return None


def _list(console: Console, request: Request, *, may: bool) -> None:
    wanted = _Wanted()

    def choose(**changes: Any) -> None:
        for name, value in {"page": 0, **changes}.items():
            setattr(wanted, name, value)
        draw()

    with ui.element("div").classes("filters"):
        ui.input("Search by name", on_change=lambda change: choose(search=change.value or "")).props(
            'outlined dense clearable debounce="200" type="search"'
        )
        ui.select(
            [ANY, "Ready", "NotReady", "Cordoned"],
            value=ANY,
            label="Status",
            on_change=lambda change: choose(only="" if change.value == ANY else change.value),
        ).props("outlined dense options-dense")
    with ui.element("div").classes("box"):
        shown = table((*_COLUMNS, _ACTIONS) if may else _COLUMNS, "Nodes", "No node is like that")
        pager = Pager(lambda page: choose(page=page))
    with ui.element("div").classes("box") as lost_box:
        heading("Taken out of the herd")
        lost = ui.html(sanitize=False)

    uses: dict[str, Use] = {}
    on_page: list[str] = []

    def draw() -> None:
        found = list_nodes(
            console.live,
            console.herd.now(),
            search=wanted.search,
            only=wanted.only,
            page=wanted.page,
            may=may,
            uses=uses,
        )
        on_page[:] = [row["name"] for row in found.rows]
        fill(shown, found.rows)
        pager.show(found)
        gone = lost_nodes(console.live)
        lost_box.set_visibility(bool(gone))
        show_html(lost, facts_list(gone))

    async def look() -> None:
        """Read what is in use of the nodes on this page: no document says it, so no change tells of it."""
        try:
            told = await asyncio.to_thread(read_uses, console.live.mirror.store, list(on_page))
        except StoreUnavailable:
            told = {}  # the page says by itself that Redis is away
        uses.clear()
        uses.update(told)
        draw()

    redraw = keep_drawn(console, request, [Node, NodeDrain, NodeFencing, VirtualMachine], draw, _EVERY_S)
    ui.timer(_USE_EVERY_S, look, immediate=True)
    if not may:
        return
    windows = _Windows(console, request, redraw)
    shown.on("drain", windows.ask_drain)
    shown.on("uncordon", windows.ask_uncordon)


class _Windows:
    """The windows that ask before a node is emptied, or takes VMs again."""

    def __init__(self, console: Console, request: Request, then: Any) -> None:
        self._console = console
        self._session = session_of(request)
        self._source = request.client.host if request.client is not None else ""
        self._then = then

    async def ask_drain(self, event: events.GenericEventArguments) -> None:
        """Show the plan, and ask."""
        node = str(event.args["name"])
        try:
            plan = preview(node, await self._console.actions.plan(self._session, node))
        except VmherdError as error:
            tell(error)
            return
        title = f"Cordon + Drain {node}?"
        with open_window(title) as window, ui.card().classes("window"):
            heading(title)
            ui.label(plan.headline).props('role="status"')
            if plan.rows:
                with ui.element("div").classes("plan wide"):
                    fill(table(_PLAN, "Plan", ""), plan.rows)
            for note in plan.notes:
                ui.label(note)
            do_on(
                self._ask_partial(window, plan),
                window,
                lambda: self._console.actions.drain(
                    self._session, node, partial=bool(plan.problem), source=self._source
                ),
                f"{node} is cordoned, and is being emptied",
                self._then,
            )
        window.open()

    def _ask_partial(self, window: ui.dialog, plan: Preview) -> ui.button:
        """Add the buttons; where some VMs have no place, one has to say first that the others are to go."""
        if not plan.problem:
            return buttons(window)
        ui.label(plan.problem).classes("trouble").props('role="alert"')
        agreed = ui.checkbox("Move the others all the same, and wait for room for these")
        confirm = buttons(window)
        confirm.disable()
        agreed.on_value_change(lambda change: confirm.set_enabled(bool(change.value)))
        return confirm

    def ask_uncordon(self, event: events.GenericEventArguments) -> None:
        """Ask whether a node is to take VMs again."""
        node = str(event.args["name"])
        title = f"Uncordon {node}?"
        with open_window(title) as window, ui.card().classes("window"):
            heading(title)
            ui.label("It takes VMs again. What of its drain has not begun is dropped.")
            do_on(
                buttons(window),
                window,
                lambda: self._console.actions.uncordon(self._session, node, self._source),
                f"{node} takes VMs again",
                self._then,
            )
        window.open()
