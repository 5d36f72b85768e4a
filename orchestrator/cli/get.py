"""`vmherd get`: resources as a table or as documents, once or followed."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_client
from orchestrator.cli.arguments import KindName, Names, Namespace, parse_targets
from orchestrator.cli.output import Output, render
from orchestrator.cli.tables import DELETED, TABLES, Around, Column, Layout, Table, cells_of, columns_of, count_vms
from orchestrator.cli.terminal import Failures, tell
from orchestrator.client import Client, Scope
from orchestrator.client.following import follow
from orchestrator.errors import NotFound
from orchestrator.resources import DEFAULT_NAMESPACE, Key, Resource, VirtualMachine, make_key
from orchestrator.store import Change, ChangeType
from orchestrator.store.store import Loaded

EXAMPLES = """Examples:

$ vmherd get vm -w

$ vmherd get vmop -A -o wide

$ vmherd get vm linux-vm -o yaml

"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for.

    Attributes:
        names: None but these; empty: all.
        namespace: None for all of them, and for kinds that have none.
    """

    table: Table[Any]
    names: tuple[str, ...]
    namespace: str | None
    output: Output | None
    all_namespaces: bool

    @property
    def columns(self) -> tuple[Column[Any], ...]:
        """The columns of its table."""
        return columns_of(self.table, wide=self.output is Output.WIDE, namespaces=self.all_namespaces)

    @property
    def documents(self) -> Output | None:
        """How documents are printed; None for a table."""
        return None if self.output is Output.WIDE else self.output

    @property
    def kinds(self) -> tuple[type[Resource], ...]:
        """What has to be read for it."""
        counted = self.table.counts_vms and self.output is Output.WIDE
        return (self.table.kind, VirtualMachine) if counted else (self.table.kind,)

    def key(self, name: str) -> Key:
        """Give the store's key of a name."""
        return make_key(name, self.namespace or "")

    def matches(self, resource: Resource) -> bool:
        """Whether it was asked for."""
        if self.namespace is not None and resource.metadata.namespace != self.namespace:
            return False
        return not self.names or resource.name in self.names


def get(
    kind: KindName,
    names: Names = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    all_namespaces: Annotated[bool, typer.Option("-A", "--all-namespaces", help="Of all namespaces.")] = False,
    output: Annotated[Output | None, typer.Option("-o", "--output", help="Not as the plain table.")] = None,
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Then print each change, until Ctrl-C.")] = False,
) -> None:
    """Show virtual machines, operations, nodes or events."""
    what, chosen = parse_targets(kind, names)
    if chosen and all_namespaces and what.namespaced:
        raise typer.BadParameter("a name is looked for in one namespace: -n instead of -A")
    inside = namespace if what.namespaced and not all_namespaces else None
    wanted = Wanted(TABLES[what], tuple(chosen), inside, output, all_namespaces)
    failures = Failures()
    with open_client() as client:
        if watch:
            _watch(client, wanted)
        else:
            _once(client, wanted, failures)
    failures.end()


def _once(client: Client, wanted: Wanted, failures: Failures) -> None:
    resources = _read(client, wanted, failures)
    vms = client.all(VirtualMachine) if len(wanted.kinds) > 1 else []
    if wanted.documents is not None:
        if resources or not wanted.names:
            terminal.write(render(resources, wanted.documents, is_list=len(wanted.names) != 1))
        return
    if not resources:
        if not wanted.names:
            typer.echo(_nothing(wanted), err=True)
        return
    around = Around(datetime.now(UTC), count_vms(vms))
    columns = wanted.columns
    layout = Layout(columns, colour=terminal.has_colour())
    rows = [cells_of(columns, resource, around) for resource in resources]
    layout.fit(rows)
    terminal.write("\n".join([layout.header(), *(layout.row(row) for row in rows)]))


def _nothing(wanted: Wanted) -> str:
    return "No resources found" + (f" in {wanted.namespace} namespace." if wanted.namespace is not None else ".")


def _read(client: Client, wanted: Wanted, failures: Failures) -> Sequence[Resource]:
    """Read what is asked for, in the order of printing; names that don't exist are told."""
    kind = wanted.table.kind
    if not wanted.names:
        return sorted(client.all(kind, wanted.namespace), key=wanted.table.order)
    found = client.many(kind, [wanted.key(name) for name in wanted.names])
    for name in wanted.names:
        if wanted.key(name) not in found:
            failures.add(_not_found(wanted, name))
    return [found[wanted.key(name)] for name in wanted.names if wanted.key(name) in found]


def _not_found(wanted: Wanted, name: str) -> str:
    inside = f" in namespace {wanted.namespace!r}" if wanted.namespace is not None else ""
    return f"{wanted.table.kind.kind_name} {name!r} not found{inside}"


def _watch(client: Client, wanted: Wanted) -> None:
    shown = Watch(wanted)
    for found in follow(client, Scope(wanted.kinds, wanted.namespace), tell):
        if found is not None:
            for line in shown.take(found, datetime.now(UTC)):
                terminal.write(line)


class Watch:
    """What a watch has printed, and what it prints next.

    A line is printed for what is new, what was deleted, and where a printed cell changed; time passing is no change.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.columns = wanted.columns
        self.layout = Layout(self.columns, colour=terminal.has_colour(), watching=True)
        self.documents: dict[str, dict[Key, Resource]] = {}
        self._printed: dict[Key, tuple[Resource, tuple[str, ...]]] = {}
        self._has_header = False
        self._is_first = True

    def take(self, found: Loaded | Change, now: datetime) -> list[str]:
        """Take in a list or a change; gives the lines to print.

        Raises:
            NotFound: The first list does not have what was asked for by name.
        """
        kind = self.wanted.table.kind.kind_name
        if isinstance(found, Loaded):
            self.documents = found.resources
        else:
            documents = self.documents[found.resource.kind_name]
            if found.type is ChangeType.DELETED:
                documents.pop(found.resource.key, None)
            else:
                documents[found.resource.key] = found.resource
        own = self.documents[kind]
        if isinstance(found, Change) and found.resource.kind_name == kind:
            present = {found.resource.key: found.resource} if found.resource.key in own else {}
            candidates = {found.resource.key}
        else:
            present, candidates = own, own.keys() | self._printed.keys()
        if self._is_first:
            self._is_first = False
            self._check_names(own)
        return self._lines(present, candidates, now)

    def _check_names(self, own: dict[Key, Resource]) -> None:
        for name in self.wanted.names:
            if self.wanted.key(name) not in own:
                raise NotFound(_not_found(self.wanted, name))

    def _lines(self, present: dict[Key, Resource], candidates: set[Key], now: datetime) -> list[str]:
        counted = self.documents[VirtualMachine.kind_name].values() if len(self.wanted.kinds) > 1 else ()
        around = Around(now, count_vms(counted))
        resources = [r for key in candidates if (r := present.get(key)) is not None and self.wanted.matches(r)]
        lines: list[tuple[Resource, tuple[str, ...]]] = []
        for key in sorted(key for key in candidates if key not in present and key in self._printed):
            lines += self._forget(key, around)
        for resource in sorted(resources, key=self.wanted.table.order):
            cells = cells_of(self.columns, resource, around)
            identity = self._identity(resource, cells)
            if self._printed.get(resource.key, (None, ()))[1] != identity:
                self._printed[resource.key] = (resource, identity)
                lines.append((resource, cells))
        return self._render(lines)

    def _forget(self, key: Key, around: Around) -> list[tuple[Resource, tuple[str, ...]]]:
        resource, _ = self._printed.pop(key)
        if not self.wanted.table.tells_deletion or self.wanted.documents is not None:
            return []
        cells = cells_of(self.columns, resource, around)
        return [(resource, tuple(DELETED if c.is_phase else cell for c, cell in zip(self.columns, cells, strict=True)))]

    def _identity(self, resource: Resource, cells: tuple[str, ...]) -> tuple[str, ...]:
        if self.wanted.documents is not None:
            return (resource.metadata.resource_version,)
        steady = (cell for column, cell in zip(self.columns, cells, strict=True) if not column.is_clock)
        return (resource.metadata.uid, self.wanted.table.stamp(resource), *steady)

    def _render(self, lines: list[tuple[Resource, tuple[str, ...]]]) -> list[str]:
        documents = self.wanted.documents
        if documents is not None:
            end = "\n---" if documents is Output.YAML else ""
            return [render([resource], documents, is_list=False) + end for resource, _ in lines]
        rows = [cells for _, cells in lines]
        self.layout.fit(rows)
        header = [] if self._has_header or not rows else [self.layout.header()]
        self._has_header = self._has_header or bool(rows)
        return header + [self.layout.row(row) for row in rows]
