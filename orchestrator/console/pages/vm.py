"""One virtual machine: what it is, where it is, what is done to it now, and what happened to it."""

from typing import Final

from nicegui import events, ui
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from orchestrator.console.actions import may_operate
from orchestrator.console.charts import migration_charts
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
    refused,
    session_of,
    show_html,
    table,
)
from orchestrator.console.pages.projects import below_project
from orchestrator.console.pages.windows import ask_operation, buttons, do_on, open_window
from orchestrator.console.rows import (
    conditions,
    event_row,
    facts,
    offered,
    operation_row,
    placement,
    shade,
    waiting_changes,
)
from orchestrator.resources import Event, OperationType, Resource, VirtualMachine, VirtualMachineOperation, make_key

_ABORT: Final = (
    '<q-btn v-if="props.row.abort" outline dense no-caps label="Abort" :aria-label="\'Abort \' + props.row.name" '
    "@click=\"$parent.$emit('abort', {name: props.row.name})\"/>"
)
_EVENTS: Final = (
    Column("Time", "at", AT_CELL),
    Column("Reason", "reason", '<span :class="{trouble: props.row.bad}">{{ props.row.reason }}</span>'),
    Column("Message", "message"),
)
_CONDITIONS: Final = (Column("Condition", "type"), Column("Status", "status"), Column("Message", "message"))
_MOST_EVENTS: Final = 50


def add_pages(console: Console) -> None:
    """Add this page."""

    @ui.page("/projects/{namespace}/virtualization/virtual-machines/{name}")
    def virtual_machine(request: Request, namespace: str, name: str) -> Response | None:
        identity = session_of(request).identity
        if answer := refused(identity, "get", "virtualmachines", namespace):
            return answer
        if console.live.find(VirtualMachine, make_key(name, namespace)) is None:
            return HTMLResponse("<!doctype html><title>404</title><h1>404</h1><p>No such virtual machine.</p>", 404)
        with frame(console, request, "Projects", name, below=below_project(namespace)):
            _Page(console, request, namespace, name, may=may_operate(identity, namespace))
        return None


class _Page:
    def __init__(self, console: Console, request: Request, namespace: str, name: str, *, may: bool) -> None:
        self._console = console
        self._request = request
        self._namespace = namespace
        self._name = name
        self._may = may
        with ui.element("div").classes("do"):
            self._phase = ui.html(sanitize=False, tag="span")
            self._do = {kind: self._button(kind) for kind in _offered_to(may=may)}
        with ui.element("div").classes("grid"):
            self._facts = _box("Configuration")
            self._placement = _box("Placement")
        with ui.element("div").classes("box") as self._restart:
            heading("Waits for a restart")
            self._changes = ui.html(sanitize=False)
        with ui.element("div").classes("box"):
            heading("Operations")
            columns = (*OPERATION_COLUMNS, Column("", "abort", _ABORT)) if may else OPERATION_COLUMNS
            self._operations = table(columns, "Operations", "Nothing was done to it in the last day")
        with ui.element("div").classes("box") as self._migration:
            self._migration_title = heading("Migration")
            with ui.element("div").classes("grid"):
                self._charts = [_chart(title) for title, _ in migration_charts(())]
        with ui.element("div").classes("grid"):
            with ui.element("div").classes("box"):
                heading("Events")
                self._events = table(_EVENTS, "Events", "Nothing happened in the last hour")
            with ui.element("div").classes("box"):
                heading("Conditions")
                self._conditions = table(_CONDITIONS, "Conditions", "None")
        kinds: list[type[Resource]] = [VirtualMachine, VirtualMachineOperation, Event]
        self._redraw = keep_drawn(console, request, kinds, self._draw)
        if may:
            self._operations.on("abort", self._ask_abort)

    def _button(self, kind: OperationType) -> ui.button:
        def ask() -> None:
            ask_operation(self._console, self._request, self._namespace, self._name, kind, self._redraw)

        return ui.button(kind.value, on_click=ask).props("outline dense no-caps")

    def _draw(self) -> None:
        live, key = self._console.live, make_key(self._name, self._namespace)
        vm = live.find(VirtualMachine, key)
        if not isinstance(vm, VirtualMachine):
            show_html(self._phase, '<span class="phase">Deleted</span>')
            for button in self._do.values():
                button.disable()
            return
        phase = vm.status.phase.value
        show_html(self._phase, f'<span class="phase {shade(phase)}" role="status">{phase}</span>')
        for one in offered(vm):
            if (offers := self._do.get(OperationType(one["name"]))) is not None:
                offers.set_enabled(one["enabled"])
        show_html(self._facts, facts_list(facts(vm)))
        show_html(self._placement, facts_list(placement(vm)))
        changes = waiting_changes(vm)
        self._restart.set_visibility(bool(changes))
        show_html(self._changes, facts_list(changes))
        operations = live.operations_of(key)
        fill(self._operations, [operation_row(one, may=self._may) for one in operations])
        fill(self._events, [event_row(one) for one in live.events_about(VirtualMachine, key)[:_MOST_EVENTS]])
        fill(self._conditions, conditions(vm.status.conditions))
        self._plot(operations)

    def _plot(self, operations: list[VirtualMachineOperation]) -> None:
        """Plot the latest migration of which there are figures."""
        found = next((one for one in operations if self._console.live.samples.of(one.key)), None)
        self._migration.set_visibility(found is not None)
        if found is None:
            return
        self._migration_title.content = f"Migration {found.name}"
        charts = migration_charts(self._console.live.samples.of(found.key))
        for place, (_, drawn) in zip(self._charts, charts, strict=True):
            show_html(place, drawn)

    def _ask_abort(self, event: events.GenericEventArguments) -> None:
        name, title = str(event.args["name"]), f"Abort {event.args['name']}?"
        session = session_of(self._request)
        source = self._request.client.host if self._request.client is not None else ""
        with open_window(title) as window, ui.card().classes("window"):
            heading(title)
            ui.label("A migration is ended, and the VM goes on where it was.")
            do_on(
                buttons(window),
                window,
                lambda: self._console.actions.abort(session, self._namespace, name, source),
                f"{name} is being aborted",
                self._redraw,
            )
        window.open()


def _offered_to(*, may: bool) -> list[OperationType]:
    kinds = [OperationType.START, OperationType.STOP, OperationType.RESTART, OperationType.MIGRATE]
    return kinds if may else []


def _box(title: str) -> ui.html:
    with ui.element("div").classes("box"):
        heading(title)
        return ui.html(sanitize=False)


def _chart(title: str) -> ui.html:
    with ui.element("figure").style("margin: 0"):
        ui.html(title, sanitize=False, tag="figcaption").classes("faint")
        return ui.html(sanitize=False)
