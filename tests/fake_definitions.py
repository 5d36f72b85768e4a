"""A host's definitions of its domains, for tests: the part of the hypervisor port that adoption uses."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.errors import DomainNotFound, HypervisorError
from workers.hypervisor.port import Definition, Domain, DomainState, Marker

if TYPE_CHECKING:
    from tests.fakes import Copy, World


class FakeDefinitions:
    """One host of a `World`, as its hypervisor's driver shows it.

    Attributes:
        hook: Called with the name of each call that changes something, before it is made and, with `done `, after.
    """

    def __init__(self, world: "World", host: str) -> None:
        self._world = world
        self._host = host
        self.hook: Callable[[str], None] = lambda _: None

    @property
    def _copies(self) -> "dict[str, Copy]":
        return self._world.hosts[self._host]

    def domains(self) -> list[Domain]:
        """Read all."""
        found = [self.domain(uuid) for uuid in self._copies]
        return sorted((domain for domain in found if domain is not None), key=lambda domain: domain.name)

    def domain(self, uuid: str) -> Domain | None:
        """Read one."""
        copy = self._copies.get(uuid)
        if copy is None:
            return None
        project, _, name = copy.vm.partition("/")
        return Domain(
            uuid=uuid,
            name=copy.domain,
            state=DomainState(copy.state),
            reason="",
            marker=Marker(project, name, copy.incarnation, copy.epoch) if copy.vm else None,
            memory_mib=copy.memory_mib,
            vcpus=1,
            persistent=bool(copy.definition),
            has_job=copy.job,
        )

    def definition(self, uuid: str, *, secrets: bool = False) -> Definition | None:
        """Read one domain's definition; what runs is what was defined when it was started."""
        copy = self._copies.get(uuid)
        if copy is None:
            return None

        def shown(xml: str) -> str:
            return xml if secrets else re.sub(r" passwd='[^']*'", "", xml)

        live = "" if copy.state == "shutoff" else shown(copy.live_xml)
        return Definition(live, shown(copy.definition), copy.autostart, copy.snapshots, secrets)

    def mark(self, uuid: str, marker: Marker) -> None:
        """Mark it."""
        copy = self._running(uuid)
        with _Hooked(self, "mark"):
            copy.vm = f"{marker.project}/{marker.name}"
            copy.incarnation, copy.epoch = marker.incarnation, marker.epoch

    def unmark(self, uuid: str) -> None:
        """Remove its mark."""
        copy = self._running(uuid)
        with _Hooked(self, "unmark"):
            copy.vm, copy.incarnation, copy.epoch = "", 0, 0

    def define(self, domain_xml: str, *, autostart: bool) -> None:
        """Define it."""
        uuid, name = (_text(domain_xml, tag) for tag in ("uuid", "name"))
        copy = self._copies.get(uuid)
        if any(other.domain == name for known, other in self._copies.items() if known != uuid):
            raise HypervisorError(f"domain {name!r} already exists")
        if copy is not None and copy.domain != name:
            raise HypervisorError(f"domain {copy.domain!r} is already defined with uuid {uuid}")
        with _Hooked(self, "define"):
            if copy is None:
                from tests.fakes import Copy

                copy = self._copies[uuid] = Copy("", "shutoff", 0, 0, name=name)
            copy.definition, copy.autostart = domain_xml, autostart

    def undefine(self, uuid: str) -> None:
        """Make it transient."""
        copy = self._copies.get(uuid)
        if copy is None or not copy.definition:
            return
        if copy.state == "shutoff" or copy.snapshots or copy.job:
            raise HypervisorError(f"domain {uuid} is not undefined: it is {copy.state}, {copy.snapshots} snapshot(s)")
        with _Hooked(self, "undefine"):
            copy.definition, copy.autostart = "", False

    def _running(self, uuid: str) -> "Copy":
        copy = self._copies.get(uuid)
        if copy is None or copy.state == "shutoff":
            raise DomainNotFound(f"domain {uuid} does not run")
        if copy.job:
            raise HypervisorError(f"a job is active on domain {uuid}")
        return copy


class _Hooked:
    def __init__(self, host: FakeDefinitions, call: str) -> None:
        self._host = host
        self._call = call

    def __enter__(self) -> None:
        self._host.hook(self._call)

    def __exit__(self, *_: object) -> None:
        self._host.hook(f"done {self._call}")


def _text(xml: str, tag: str) -> str:
    found = re.search(f"<{tag}>([^<]*)</{tag}>", xml)
    assert found is not None, xml
    return found[1]
