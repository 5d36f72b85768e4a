"""Projects, and the way down to what one has: "Projects", a project, "Virtualization", "Virtual Machines"."""

from nicegui import ui
from starlette.requests import Request
from starlette.responses import Response

from orchestrator.api.rights import is_allowed
from orchestrator.console.pages.frame import Column, Console, fill, frame, keep_drawn, refused, session_of, table
from orchestrator.resources import VirtualMachine

_LINK = "<a :href=\"'/console/projects/' + props.row.name\">{{ props.row.name }}</a>"


def below_project(namespace: str) -> list[tuple[str, str]]:
    """Give a project's sections."""
    base = f"/projects/{namespace}"
    return [
        ("Virtualization", f"{base}/virtualization"),
        ("Virtual Machines", f"{base}/virtualization/virtual-machines"),
    ]


def add_pages(console: Console) -> None:
    """Add these pages."""

    @ui.page("/projects")
    def projects(request: Request) -> None:
        identity = session_of(request).identity
        with frame(console, request, "Projects", "Projects"):
            shown = table(
                [Column("Project", "name", _LINK), Column("Virtual machines", "vms")], "Projects", "No projects yet"
            )

            def draw() -> None:
                names = [
                    name for name in console.live.projects() if is_allowed(identity, "list", "virtualmachines", name)
                ]
                fill(shown, [{"key": name, "name": name, "vms": console.live.count(name)} for name in names])

            keep_drawn(console, request, [VirtualMachine], draw)

    @ui.page("/projects/{namespace}")
    def project(request: Request, namespace: str) -> Response | None:
        return _landing(console, request, namespace, "")

    @ui.page("/projects/{namespace}/virtualization")
    def virtualization(request: Request, namespace: str) -> Response | None:
        return _landing(console, request, namespace, "Virtualization")


def _landing(console: Console, request: Request, namespace: str, at: str) -> Response | None:
    if answer := refused(session_of(request).identity, "list", "virtualmachines", namespace):
        return answer
    with (
        frame(console, request, "Projects", f"Project {namespace}", below=below_project(namespace), at=at),
        ui.element("div").classes("box"),
    ):
        text = ui.label()

        def draw() -> None:
            count = console.live.count(namespace)
            text.text = f"{count:,} virtual machine{'' if count == 1 else 's'} in this project"

        keep_drawn(console, request, [VirtualMachine], draw)
    return None
