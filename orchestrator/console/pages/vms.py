"""A project's virtual machines: the list, its filters, and each one's "..." menu."""

from dataclasses import dataclass, replace
from typing import Any, Final

from nicegui import events, ui
from starlette.requests import Request
from starlette.responses import Response

from orchestrator.console.actions import may_operate
from orchestrator.console.pages.frame import (
    AGE_CELL,
    PHASE_CELL,
    Column,
    Console,
    fill,
    frame,
    keep_drawn,
    refused,
    session_of,
    table,
)
from orchestrator.console.pages.projects import below_project
from orchestrator.console.pages.windows import ask_operation
from orchestrator.console.rows import Shown, Wanted, list_vms, under_way
from orchestrator.resources import OperationType, VirtualMachine, VirtualMachineOperation

ANY: Final = "Any"
_NAME: Final = (
    "<a :href=\"'/console/projects/' + props.row.namespace + '/virtualization/virtual-machines/' + props.row.name\">"
    '{{ props.row.name }}</a><span v-if="props.row.restart" class="faint">&nbsp;(waits for a restart)</span>'
)
_PHASE: Final = (
    PHASE_CELL + '<span v-if="props.row.progress !== null" class="faint">&nbsp;{{ props.row.progress }} %</span>'
)
_MENU: Final = (
    '<q-btn v-if="props.row.actions.length" flat dense no-caps label="..." aria-haspopup="menu" '
    ':aria-label="\'Actions for \' + props.row.name"><q-menu auto-close><q-list role="menu">'
    '<q-item v-for="one in props.row.actions" :key="one.name" role="menuitem" clickable :disable="!one.enabled" '
    "@click=\"$parent.$emit('act', {key: props.row.key, name: one.name})\">"
    "<q-item-section>{{ one.name }}</q-item-section></q-item></q-list></q-menu></q-btn>"
)
_COLUMNS: Final = (
    Column("Name", "name", _NAME),
    Column("Phase", "phase", _PHASE),
    Column("Node", "node"),
    Column("IP address", "ip"),
    Column("Age", "created", AGE_CELL),
    Column("CPU", "cpu"),
    Column("Memory", "memory"),
)


@dataclass(slots=True)
class Chosen:
    """What of the list this page shows."""

    wanted: Wanted


class Pager:
    """Which page of a list is shown, and the way to the others.

    Args:
        turn: Told of the page to go to.
    """

    def __init__(self, turn: Any) -> None:
        self.page = 0
        with ui.element("div").classes("pager"):
            self._range = ui.label().props('aria-live="polite"')
            self._back = ui.button("Previous", on_click=lambda: turn(self.page - 1)).props("outline dense no-caps")
            self._next = ui.button("Next", on_click=lambda: turn(self.page + 1)).props("outline dense no-caps")

    def show(self, shown: Shown) -> None:
        """Show where one is."""
        self.page = shown.page
        self._range.text = shown.range
        self._back.set_enabled(shown.page > 0)
        self._next.set_enabled(shown.page + 1 < shown.pages)


def add_pages(console: Console) -> None:
    """Add this page."""

    @ui.page("/projects/{namespace}/virtualization/virtual-machines")
    def virtual_machines(request: Request, namespace: str) -> Response | None:
        identity = session_of(request).identity
        if answer := refused(identity, "list", "virtualmachines", namespace):
            return answer
        with frame(
            console, request, "Projects", "Virtual Machines", below=below_project(namespace), at="Virtual Machines"
        ):
            _list(console, request, namespace, may=may_operate(identity, namespace))
        return None


def _list(console: Console, request: Request, namespace: str, *, may: bool) -> None:
    query = request.query_params
    chosen = Chosen(Wanted(query.get("search", "")[:100], query.get("phase", "")[:40], query.get("node", "")[:100]))

    def choose(**changes: Any) -> None:
        chosen.wanted = replace(chosen.wanted, **{"page": 0, **changes})
        draw()

    with ui.element("div").classes("filters"):
        ui.input(
            "Search by name or IP address",
            value=chosen.wanted.search,
            on_change=lambda change: choose(search=change.value or ""),
        ).props('outlined dense clearable debounce="200" type="search"')
        phase = ui.select([ANY], value=ANY, label="Phase", on_change=lambda change: choose(phase=_value(change.value)))
        node = ui.select(
            [ANY],
            value=ANY,
            label="Node",
            with_input=True,
            on_change=lambda change: choose(node=_value(change.value)),
        )
    with ui.element("div").classes("box"):
        columns = (*_COLUMNS, Column("", "actions", _MENU)) if may else _COLUMNS
        shown = table(columns, "Virtual machines", "No virtual machine is like that")
        pager = Pager(lambda page: choose(page=page))
    for one in (phase, node):
        one.props("outlined dense options-dense")

    def draw() -> None:
        progress = under_way(console.live.operations.values())
        found = list_vms(console.live.vms(namespace), chosen.wanted, progress, may=may)
        _offer(phase, {name: f"{name} ({count})" for name, count in found.phases.items()}, chosen.wanted.phase)
        _offer(node, {name: name for name in found.nodes}, chosen.wanted.node)
        fill(shown, found.rows)
        pager.show(found)

    redraw = keep_drawn(console, request, [VirtualMachine, VirtualMachineOperation], draw)

    def act(event: events.GenericEventArguments) -> None:
        vm = str(event.args["key"]).partition("/")[2]
        ask_operation(console, request, namespace, vm, OperationType(event.args["name"]), redraw)

    if may:
        shown.on("act", act)


def _value(chosen: str | None) -> str:
    return "" if chosen in {None, ANY} else str(chosen)


def _offer(select: ui.select, options: dict[str, str], present: str) -> None:
    """Offer what there is to choose from; what is chosen stays, though nothing is like that any more."""
    wanted = {ANY: ANY, **({present: present} if present else {}), **options}
    if select.options != wanted:
        select.set_options(wanted, value=present or ANY)
