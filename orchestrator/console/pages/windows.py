"""The window that asks before something is done: it says what, and has "Confirm" and "Cancel".

Enter confirms, since that button has the focus; Escape cancels, and so does a click beside the window.
"""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from nicegui import ui
from starlette.requests import Request

from orchestrator.api.rights import is_allowed
from orchestrator.console.pages.frame import Console, attempt, heading, session_of
from orchestrator.errors import VmherdError
from orchestrator.resources import Node, OperationType

_WHAT = {
    OperationType.START: "It is started where there is room for it.",
    OperationType.STOP: "Its guest is asked to power off.",
    OperationType.RESTART: "Its guest is asked to power off, and is started again: it is away meanwhile.",
    OperationType.MIGRATE: "It moves to another node while it runs.",
}
ANYWHERE = "Any node that fits"


def open_window(title: str) -> ui.dialog:
    """Open a window without content; `with` it, content is added."""
    window = ui.dialog().props('transition-duration="100"')
    window.props["aria-label"] = title
    window.on("hide", window.delete)
    return window


def buttons(window: ui.dialog, confirm: str = "Confirm") -> ui.button:
    """Add "Cancel" and the button that confirms; gives the latter."""
    with ui.row().classes("wide end"):
        ui.button("Cancel", on_click=window.close).props("flat no-caps")
        return ui.button(confirm).props("no-caps autofocus")


def do_on(
    confirm: ui.button,
    window: ui.dialog,
    work: Callable[[], Coroutine[Any, Any, object]],
    done: str,
    then: Callable[[], None],
) -> None:
    """Have something done when it is confirmed, once: the button does nothing while it is under way.

    Args:
        confirm: The button.
        window: Closed when it is done; when it failed, it is there to try again.
        work: What is done.
        done: What is said then.
        then: What is called then.
    """

    async def do() -> None:
        confirm.disable()
        if await attempt(work(), done):
            window.close()
            then()
        else:
            confirm.enable()

    confirm.on_click(do)


def ask_operation(
    console: Console, request: Request, namespace: str, vm: str, kind: OperationType, then: Callable[[], None]
) -> None:
    """Ask whether an operation is to be done to a VM, and do it."""
    session, title = session_of(request), f"{kind.value} {vm}?"
    source = request.client.host if request.client is not None else ""
    with open_window(title) as window, ui.card().classes("window"):
        heading(title)
        ui.label(_WHAT[kind])
        target = None
        if kind is OperationType.MIGRATE and is_allowed(session.identity, "list", "nodes", None):
            target = ui.select([ANYWHERE, *_targets(console, namespace, vm)], value=ANYWHERE, label="Target node")
            target.props("outlined dense options-dense").classes("wide")

        def work() -> Coroutine[Any, Any, object]:
            chosen = target.value if target is not None and target.value != ANYWHERE else ""
            return console.actions.operate(session, namespace, vm, kind, chosen, source)

        do_on(buttons(window), window, work, f"{kind.value} of {vm} is asked for", then)
    window.open()


def _targets(console: Console, namespace: str, vm: str) -> Sequence[str]:
    found = next((one for one in console.live.vms(namespace) if one.name == vm), None)
    here = found.status.node_name if found is not None else ""
    nodes = (node for node in console.live.all(Node) if isinstance(node, Node))
    return sorted(node.name for node in nodes if node.is_schedulable and node.name != here)


def tell(error: VmherdError) -> None:
    """Say why something can't be done."""
    ui.notify(str(error), type="negative", multi_line=True, timeout=15_000, close_button="Close")
