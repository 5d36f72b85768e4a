"""`vmherd create -f`: the platform's own manifests, all checked before any is stored."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_client
from orchestrator.cli.arguments import Timeout
from orchestrator.cli.output import Written, qualified_name, render
from orchestrator.cli.terminal import Failures
from orchestrator.cli.waiting import failure, wait_or_leave
from orchestrator.client import Client
from orchestrator.errors import AlreadyExists, Conflict, Invalid, NotFound, Refused
from orchestrator.resources import VirtualMachine, VirtualMachineOperation, split_key
from orchestrator.services.manifests import Creatable, read_manifest

EXAMPLES = """Examples:

$ vmherd create -f vm.yaml

$ vmherd evict linux-vm --no-wait

$ vmherd create --wait -f - < evict.yaml
"""


@dataclass(frozen=True, slots=True)
class Document:
    """One manifest as it was read.

    Attributes:
        place: Where it stands, for messages: `vms.yaml: document 2`.
    """

    place: str
    data: Any


Files = Annotated[
    list[str], typer.Option("-f", "--filename", metavar="FILE", help="YAML or JSON; - is standard input.")
]
OfManifests = Annotated[
    str, typer.Option("-n", "--namespace", metavar="NAME", help="Of manifests that name none.", show_default=False)
]


def create(
    files: Files,
    namespace: OfManifests = "",
    output: Annotated[Written | None, typer.Option("-o", "--output", help="Print what was created.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the operations, and for the starts of VMs.")] = False,
    timeout: Timeout = None,
) -> None:
    """Create virtual machines, classes of them, and operations from manifests.

    When one document is invalid, none is stored.
    """
    wanted = read_files(files, namespace)
    failures = Failures()
    with open_client() as client:
        created: list[Creatable] = []
        for place, resource in wanted:
            try:
                created.append(client.create(resource))
            except (AlreadyExists, Conflict, Invalid, NotFound, Refused) as error:
                failures.add(f"{place}: {error}" if len(wanted) > 1 else str(error))
            else:
                if output is None:
                    terminal.write(f"{qualified_name(created[-1])} created")
        if output is not None and created:
            terminal.write(render(created, output, is_list=len(wanted) > 1))
        if wait and created:
            _wait(client, created, failures, timeout=timeout, quiet=output is not None)
    failures.end()


def _wait(client: Client, created: list[Creatable], failures: Failures, *, timeout: float | None, quiet: bool) -> None:
    begun = [resource for resource in created if isinstance(resource, VirtualMachineOperation)]
    vms = {resource.key for resource in created if isinstance(resource, VirtualMachine)}
    for namespace in sorted({split_key(key)[0] for key in vms}):  # their starts were stored with them
        begun += [o for o in client.all(VirtualMachineOperation, namespace) if o.vm_key in vms and o.is_active]
    if not begun:
        return
    for watched in wait_or_leave(client, begun, timeout=timeout, quiet=quiet):
        reason = failure(watched)
        if reason is not None:
            failures.add(reason)


def read_files(files: list[str], namespace: str) -> list[tuple[str, Creatable]]:
    """Read manifests and check every one by itself; gives each with its place, for messages.

    Raises:
        Invalid: Some are wrong: says which, and each of their fields that is.
        OSError: A file can't be read.
    """
    documents = [document for file in files for document in read_documents(file)]
    found: list[tuple[str, Creatable]] = []
    wrong: list[str] = []
    for document in documents:
        try:
            found.append((document.place, read_manifest(document.data, namespace)))
        except Invalid as error:
            wrong.append(f"{document.place}: {error}")
    if wrong:
        nothing = "; nothing was stored" if len(documents) > 1 else ""
        raise Invalid("; ".join(wrong) + nothing)
    return found


def read_documents(file: str) -> Iterator[Document]:
    """Read the manifests of a file; those of a `List` each for itself.

    Raises:
        Invalid: Not YAML or JSON, or nothing is in it.
        OSError: It can't be read.
    """
    name, raw = ("standard input", sys.stdin.buffer.read()) if file == "-" else (file, Path(file).read_bytes())
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Invalid(f"{name}: is not UTF-8 text (byte {error.start})") from error
    loaded = [data for data in _load(name, text) if data is not None]
    if not loaded:
        raise Invalid(f"{name}: has no manifest in it")
    for number, data in enumerate(loaded, start=1):
        place = name if len(loaded) == 1 else f"{name}: document {number}"
        if isinstance(data, dict) and data.get("kind") == "List" and isinstance(data.get("items"), list):
            for position, item in enumerate(data["items"]):
                yield Document(f"{place}: items[{position}]", item)
        else:
            yield Document(place, data)


def _load(name: str, text: str) -> list[Any]:
    if text.lstrip().startswith("{"):
        try:
            return [json.loads(text)]
        except json.JSONDecodeError:
            pass  # YAML may begin so too; its message is the better one
    try:
        return list(yaml.load_all(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise Invalid(f"{name}: {where}{error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise Invalid(f"{name}: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)
