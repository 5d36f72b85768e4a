"""What all pages have: the head with its tabs, tables, and being drawn anew when data has changed."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, Final

from nicegui import Client, background_tasks, ui
from starlette.requests import Request
from starlette.responses import HTMLResponse

from orchestrator.api.access import Access
from orchestrator.api.rights import Identity, is_allowed
from orchestrator.console.actions import Actions
from orchestrator.console.guard import PREFIX, SESSION
from orchestrator.console.herd_view import HerdWatch
from orchestrator.console.live import Changes, Live
from orchestrator.console.sessions import Session, Sessions
from orchestrator.console.style import CSS, SCRIPT
from orchestrator.errors import StoreUnavailable, Unauthorized, VmherdError
from orchestrator.logs import logger
from orchestrator.resources import Resource
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logger(__name__)

DRAW_EVERY_S: Final = 0.5
"""A page is drawn anew at most so often, however much changes."""
_LOOK_S: Final = 30.0
"""So often an open page looks whether its session still stands: it may have been ended at another server."""
DARK_COOKIE: Final = "vmherd_dark"
_DARK: Final[Mapping[str, bool | None]] = {"dark": True, "light": False}
_NEXT_SHADE: Final = {"auto": "dark", "dark": "light", "light": "auto"}
_TABS: Final = (("Overview", "/"), ("Projects", "/projects"), ("System", "/system"))


@dataclass(slots=True)
class Console:
    """What pages work with.

    Attributes:
        pages: Those that are open, with whose they are.
    """

    live: Live
    herd: HerdWatch
    actions: Actions
    sessions: Sessions
    access: Access
    config: Settings
    pages: dict[Client, Session] = field(default_factory=dict)

    def leave(self, is_over: Callable[[Session], bool]) -> None:
        """Send the pages of sessions that are over to where one signs in."""
        for client, session in list(self.pages.items()):
            if is_over(session):
                self.pages.pop(client, None)
                client.run_javascript(f"window.location.href = '{PREFIX}/login'")


def session_of(request: Request) -> Session:
    """Give whose request it is: the guard has found out."""
    session: Session = request.scope[SESSION]
    return session


def refused(identity: Identity, verb: str, resource: str, namespace: str | None) -> HTMLResponse | None:
    """Answer who may not see a page; None: they may."""
    if is_allowed(identity, verb, resource, namespace):
        return None
    what = f"{escape(identity.name)} ({identity.role}) may not {verb} {resource}"
    where = f" in {escape(namespace)}" if namespace else ""
    return HTMLResponse(f"<!doctype html><title>403</title><h1>403</h1><p>{what}{where}.</p>", 403)


@contextmanager
def frame(
    console: Console, request: Request, tab: str, title: str, *, below: Sequence[tuple[str, str]] = (), at: str = ""
) -> "Iterator[None]":
    """Draw what stands around a page.

    Args:
        console: What pages work with.
        request: Whose.
        tab: Which tab is the present one.
        title: The page's own.
        below: Sections of the tab: pairs of a label and a path.
        at: Which of them is the present one.
    """
    session = session_of(request)
    ui.add_css(CSS)
    ui.colors(primary="#1b5fa8", positive="#1d7a3e", negative="#b3261e")
    ui.add_head_html(SCRIPT)
    ui.page_title(f"{title} - vmherd")
    shade = request.cookies.get(DARK_COOKIE, "auto")
    shade = shade if shade in _NEXT_SHADE else "auto"
    dark = ui.dark_mode(_DARK.get(shade))
    _anchor("Skip to content", "#content").classes("skip")
    with ui.element("header").classes("top"):
        ui.label("vmherd").classes("brand")
        with ui.element("nav").props('aria-label="Main"'):
            for label, path in _TABS:
                _nav_link(label, path, is_present=label == tab)
            if console.config.flower_url:
                _anchor("Flower", console.config.flower_url).props('target="_blank" rel="noopener noreferrer"')
        with ui.element("div").classes("who"):
            ui.label(f"{session.identity.name} ({session.identity.role})").classes("faint")
            _shade_button(dark, shade)
            ui.html(
                f'<form method="post" action="{PREFIX}/logout"><input type="hidden" name="csrf" '
                f'value="{escape(session.csrf)}"><button class="plain" type="submit">Sign out</button></form>',
                sanitize=False,
            )
    if below:
        with ui.element("div").classes("sub"), ui.element("nav").props('aria-label="Sections"'):
            for label, path in below:
                _nav_link(label, path, is_present=label == at)
    with ui.element("main").classes("page").props('id="content"'):
        heading(title, 1)
        yield


def heading(text: str, level: int = 2) -> ui.html:
    """Draw a heading."""
    return ui.html(escape(text), sanitize=False, tag=f"h{level}")


def _nav_link(label: str, path: str, *, is_present: bool) -> None:
    link = ui.link(label, path)
    if is_present:
        link.props('aria-current="page"')


def _anchor(text: str, href: str) -> ui.html:
    found = ui.html(escape(text), sanitize=False, tag="a")
    found.props["href"] = href
    return found


def _shade_button(dark: ui.dark_mode, shade: str) -> None:
    present = {"shade": shade}
    button = ui.element("button").classes("plain").props('type="button"')
    with button:
        label = ui.html(f"Theme: {shade}", sanitize=False, tag="span")

    def turn() -> None:
        present["shade"] = chosen = _NEXT_SHADE[present["shade"]]
        dark.value = _DARK.get(chosen)
        label.content = f"Theme: {chosen}"
        ui.run_javascript(
            f"document.cookie = '{DARK_COOKIE}={chosen}; path={PREFIX}; max-age=31536000; samesite=strict'"
        )

    button.on("click", turn)


# --- data that changes ------------------------------------------------------------------------------------------------


def keep_drawn(
    console: Console,
    request: Request,
    kinds: Iterable[type[Resource]],
    draw: Callable[[], None],
    every_s: float = DRAW_EVERY_S,
) -> Callable[[], None]:
    """Draw a part of this page now, and whenever something of some kinds has changed, until the page is closed.

    Returns:
        A function that has it drawn soon, for what the person themselves changed.
    """
    client, session, changes = ui.context.client, session_of(request), Changes(kinds)
    console.live.open_page(changes)
    console.pages[client] = session

    async def follow() -> None:
        looked = time.monotonic()
        while True:
            await _woken(changes.event, _LOOK_S)
            if time.monotonic() - looked >= _LOOK_S:
                looked = time.monotonic()
                if not await _stands(console, session):
                    console.leave(lambda one: one.key == session.key)
                    return
            if changes.event.is_set():
                changes.event.clear()
                try:
                    with client:
                        draw()
                except Exception:  # a page's entry point: what failed once may be drawn at the next change
                    log.exception("a page could not be drawn")
            await asyncio.sleep(every_s)

    draw()
    task = background_tasks.create(follow(), name="console page")

    def close() -> None:
        task.cancel()
        console.live.close_page(changes)
        console.pages.pop(client, None)

    client.on_delete(close)
    return changes.event.set


async def _woken(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return


async def _stands(console: Console, session: Session) -> bool:
    try:
        await console.sessions.renewed(session)
    except Unauthorized:
        return False
    except StoreUnavailable:
        return True  # nobody knows: what is shown is as old as the copy, and nothing can be done
    return True


async def attempt(work: Any, done: str) -> bool:
    """Do what was clicked, and say what came of it; tells whether it was done."""
    try:
        await work
    except VmherdError as error:
        ui.notify(str(error), type="negative", multi_line=True, timeout=15_000, close_button="Close")
        return False
    ui.notify(done, type="positive")
    return True


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        field: Of the row; the cell shows its text, unless `cell` says otherwise.
        cell: Vue's template of the cell's content, for which `props.row` is the row.
    """

    label: str
    field: str
    cell: str = ""


PHASE_CELL: Final = '<span class="phase" :class="props.row.shade">{{ props.row.phase }}</span>'
AGE_CELL: Final = '<time :datetime="props.row.created" data-as="age"></time>'
AT_CELL: Final = '<time :datetime="props.row.at"></time>'
PROGRESS_CELL: Final = (
    '<template v-if="props.row.progress !== null"><div class="bar" role="progressbar" aria-label="Progress" '
    ':aria-valuenow="props.row.progress"><i :style="{width: props.row.progress + \'%\'}"></i></div>'
    "<span>{{ props.row.progress }} %</span></template>"
)
OPERATION_COLUMNS: Final = (
    Column("Operation", "type"),
    Column("Phase", "phase", PHASE_CELL),
    Column("Progress", "progress", PROGRESS_CELL),
    Column("Nodes", "way"),
    Column("Age", "created", AGE_CELL),
    Column("Message", "message"),
)
"""Of the rows that `rows.operation_row` makes."""


def table(columns: Sequence[Column], label: str, empty: str) -> ui.table:
    """Make a table without rows.

    Args:
        columns: In order.
        label: What it is a table of.
        empty: What it says without rows.
    """
    made = ui.table(
        columns=[{"name": one.field, "label": one.label, "field": one.field, "align": "left"} for one in columns],
        rows=[],
        row_key="key",
        pagination=0,
    ).classes("rows")
    made.props("flat dense wrap-cells hide-pagination")
    made.props["role"] = "region"
    made.props["aria-label"] = label
    cells = "".join(
        f'<q-td key="{one.field}"><span class="title">{escape(one.label)}</span>'
        f"{one.cell or '<span>{{ props.row.' + one.field + ' }}</span>'}</q-td>"
        for one in columns
    )
    made.add_slot("no-data", f'<span class="faint">{escape(empty)}</span>')
    made.add_slot("body", f'<q-tr :props="props" :data-row="props.row.key">{cells}</q-tr>')
    return made


def fill(made: ui.table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Show rows; nothing is sent when they are those that are shown."""
    wanted = [dict(row) for row in rows]
    if made.rows != wanted:
        made.rows = wanted


def facts_list(pairs: Sequence[tuple[str, str]]) -> str:
    """Write pairs as a list of facts; HTML."""
    items = "".join(f"<dt>{escape(title)}</dt><dd>{escape(text)}</dd>" for title, text in pairs)
    return f'<dl class="facts">{items}</dl>'


def show_html(place: ui.html, content: str) -> None:
    """Show HTML that was made by us; nothing is sent when it is what is shown."""
    if place.content != content:
        place.content = content
