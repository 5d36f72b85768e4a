"""`vmherd apply -f`: what is not there is created, what differs is changed; all is checked before any is stored."""

from typing import Annotated

import typer

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_client
from orchestrator.cli.create import Files, OfManifests, read_files
from orchestrator.cli.output import Written, qualified_name, render
from orchestrator.cli.terminal import Failures
from orchestrator.errors import AlreadyExists, Conflict, Invalid, NotFound, Refused
from orchestrator.resources import VirtualMachine
from orchestrator.services.manifests import Applied

EXAMPLES = """Examples:

$ vmherd apply -f vm.yaml

$ vmherd get vm linux-vm -o yaml | sed s/1Gi/2Gi/ | vmherd apply -f -

What a running machine can't be given waits for a restart, and is listed by `vmherd describe vm`.
"""


def apply(
    files: Files,
    namespace: OfManifests = "",
    output: Annotated[
        Written | None, typer.Option("-o", "--output", help="As they are stored now.", show_default=False)
    ] = None,
) -> None:
    """Create or change virtual machines and classes of them, as manifests say.

    When one document is invalid, nothing is stored. Labels and annotations that a manifest does not name stay.
    """
    wanted = read_files(files, namespace)
    failures, stored = Failures(), []
    with open_client() as client:
        for place, resource in wanted:
            try:
                applied, how = client.apply(resource)
            except (AlreadyExists, Conflict, Invalid, NotFound, Refused) as error:
                failures.add(f"{place}: {error}" if len(wanted) > 1 else str(error))
                continue
            stored.append(applied)
            if output is not None:
                continue
            told = ""
            if isinstance(applied, VirtualMachine) and how is not Applied.CREATED:
                told = _waits(applied)
            terminal.write(f"{qualified_name(applied)} {how}{told}")
    if output is not None and (stored or len(wanted) > 1):
        terminal.write(render(stored, output, is_list=len(wanted) > 1))
    failures.end()


def _waits(vm: VirtualMachine) -> str:
    paths = [change.path for change in vm.status.restart_awaiting_changes]
    return f" (waits for a restart: {', '.join(paths)})" if paths else ""
