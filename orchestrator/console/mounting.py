"""Puts the console onto the API's application, before what answers all other paths."""

import logging

import nicegui
from fastapi import FastAPI
from nicegui import ui
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from orchestrator.api.access import Access
from orchestrator.api.mirror import Mirror
from orchestrator.console.actions import Actions
from orchestrator.console.guard import PREFIX, Guard
from orchestrator.console.herd_view import HerdWatch
from orchestrator.console.live import Live
from orchestrator.console.pages import nodes, overview, projects, vm, vms
from orchestrator.console.pages.frame import Console
from orchestrator.console.sessions import Session, Sessions
from orchestrator.resources import AccessToken
from orchestrator.services.context import Context


async def _to_the_first_page(request: Request) -> Response:
    del request
    return RedirectResponse(f"{PREFIX}/", 303)


def mount_console(app: FastAPI, ctx: Context) -> Console:
    """Serve the console at `PREFIX`. Once a process: NiceGUI has one application.

    Args:
        app: As `create_app` made it, not yet started.
        ctx: As it was given.
    """
    mirror: Mirror = app.state.mirror
    access: Access = app.state.access
    sessions = Sessions(ctx.store, access)
    live = Live(mirror)
    actions = Actions(ctx, access, mirror, sessions)
    console = Console(live, HerdWatch(live), actions, sessions, access, ctx.config)
    mirror.listen(AccessToken, lambda: console.leave(lambda one: not sessions.is_valid(one)))
    for module in (overview, projects, vms, vm, nodes):
        module.add_pages(console)
    logging.getLogger("nicegui").setLevel(logging.WARNING)

    def ended(session: Session) -> None:
        console.leave(lambda one: one.key == session.key)

    ui.run_with(
        app,
        mount_path=PREFIX,
        title="vmherd",
        dark=None,
        tailwind=False,
        binding_refresh_interval=None,
        reconnect_timeout=10,
        show_welcome_message=False,
    )
    app.add_route(PREFIX, _to_the_first_page)
    nicegui.app.config.socket_io_js_transports = ["websocket"]
    nicegui.app.add_middleware(
        Guard, sessions=sessions, act=actions.answer, on_end=ended
    )  # the last one added is first
    return console
