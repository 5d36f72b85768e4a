"""Changes that go wrong half-way: what is told, and what is put back."""

from collections.abc import Callable
from typing import Any

import libvirt
import pytest

from orchestrator.errors import DomainNotFound, HypervisorError, OutcomeUnknown
from workers.hypervisor.libvirt_changes import Changes
from workers.hypervisor.libvirt_definitions import Definitions
from workers.hypervisor.libvirt_migration import Migrations
from workers.hypervisor.port import Domain, DomainState, MigrationEnd, MigrationRequest

UUID = "5e21a3d0-9a53-4d5c-8a39-6b8f7b8a4c11"
XML = f"<domain><name>x</name><uuid>{UUID}</uuid></domain>"
NO_DOMAIN, REFUSED, LOST = int(libvirt.VIR_ERR_NO_DOMAIN), int(libvirt.VIR_ERR_OPERATION_INVALID), 38
FROM_QEMU, FROM_RPC = 10, 7


class LibvirtError(libvirt.libvirtError):  # type: ignore[misc]  # libvirt has no types
    def __init__(self, code: int, domain: int = FROM_QEMU) -> None:
        Exception.__init__(self, f"code {code}")
        self.code, self.domain = code, domain

    def get_error_code(self) -> int:
        return self.code

    def get_error_domain(self) -> int:
        return self.domain

    def get_error_message(self) -> str:
        return str(self)


class Host:
    """A host with one persistent domain: the connection, the domain's handle, and the driver's reading of it."""

    def __init__(self, *, snapshots: int = 0, fail: dict[str, LibvirtError] | None = None) -> None:
        self.runs, self.is_defined, self.is_autostarted = True, True, True
        self.snapshots = snapshots
        self.fail = fail or {}
        self.on_undefine: Callable[[], None] = lambda: None
        self.calls: list[str] = []
        self.migration: tuple[dict[str, Any], int] = ({}, 0)

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]

    def read(self, uuid: str) -> Domain | None:
        if not self.runs and not self.is_defined:
            return None
        state = DomainState.RUNNING if self.runs else DomainState.SHUTOFF
        return Domain(uuid, "x", state, "", None, 16, 1, persistent=self.is_defined)

    def lookupByUUIDString(self, uuid: str) -> "Host":  # noqa: N802  libvirt's names, here and below
        self._called("lookup")
        return self

    def isAlive(self) -> int:  # noqa: N802
        return 1

    def isActive(self) -> int:  # noqa: N802
        return int(self.runs)

    def isPersistent(self) -> int:  # noqa: N802
        return int(self.is_defined)

    def XMLDesc(self, flags: int) -> str:  # noqa: N802
        return XML

    def autostart(self) -> int:
        return int(self.is_autostarted)

    def snapshotNum(self) -> int:  # noqa: N802
        return self.snapshots

    def listAllCheckpoints(self) -> list[object]:  # noqa: N802
        return []

    def setAutostart(self, value: int) -> None:  # noqa: N802
        self._called(f"autostart={value}")
        self.is_autostarted = bool(value)

    def undefineFlags(self, flags: int) -> None:  # noqa: N802
        self._called("undefine")
        assert flags & libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
        assert flags & libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM
        assert not flags & libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        self.is_defined = self.is_autostarted = False
        self.on_undefine()

    def defineXML(self, xml: str) -> "Host":  # noqa: N802
        self._called("define")
        self.is_defined = True
        return self

    def migrateToURI3(self, uri: str, parameters: dict[str, Any], flags: int) -> None:  # noqa: N802
        self.migration = parameters, flags


class SameConnection(Changes):
    def __init__(self, host: Host) -> None:
        super().__init__("test:///default", lambda: None)
        self._host = host

    def connect(self) -> Any:
        return self._host


def definitions(host: Host) -> Definitions:
    return Definitions(SameConnection(host), host.read)


def test_autostart_goes_before_the_definition() -> None:
    host = Host()
    definitions(host).undefine(UUID)
    assert [call for call in host.calls if call != "lookup"] == ["autostart=0", "undefine"]
    assert (host.runs, host.is_defined) == (True, False)


def test_a_refused_undefine_leaves_the_autostart_as_it_was() -> None:
    host = Host(fail={"undefine": LibvirtError(REFUSED)})
    with pytest.raises(HypervisorError, match="undefine"):
        definitions(host).undefine(UUID)
    assert (host.is_defined, host.is_autostarted) == (True, True)


def test_a_domain_that_stops_while_it_is_undefined_is_defined_again() -> None:
    host = Host()

    def stop() -> None:
        host.runs = False

    host.on_undefine = stop
    with pytest.raises(HypervisorError, match="defined again"):
        definitions(host).undefine(UUID)
    assert (host.is_defined, host.is_autostarted) == (True, True)


def test_a_domain_with_snapshots_is_not_touched() -> None:
    host = Host(snapshots=2)
    with pytest.raises(HypervisorError, match="2 snapshot"):
        definitions(host).undefine(UUID)
    assert [call for call in host.calls if call != "lookup"] == []


def test_a_domain_that_is_gone_meanwhile_is_no_error() -> None:
    host = Host(fail={"undefine": LibvirtError(NO_DOMAIN)})
    definitions(host).undefine(UUID)


@pytest.mark.parametrize("step", ["undefine", "autostart=0"])
def test_a_connection_that_breaks_leaves_it_unknown(step: str) -> None:
    with pytest.raises(OutcomeUnknown):
        definitions(Host(fail={step: LibvirtError(LOST, FROM_RPC)})).undefine(UUID)


def test_a_definition_without_its_autostart_is_no_plain_failure() -> None:
    host = Host(fail={"autostart=1": LibvirtError(REFUSED)})
    with pytest.raises(OutcomeUnknown, match="autostart"):
        definitions(host).define(XML, autostart=True)
    with pytest.raises(OutcomeUnknown):
        definitions(Host(fail={"define": LibvirtError(LOST, FROM_RPC)})).define(XML, autostart=True)
    with pytest.raises(HypervisorError):
        definitions(Host(fail={"define": LibvirtError(REFUSED)})).define(XML, autostart=True)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LibvirtError(NO_DOMAIN), DomainNotFound),
        (LibvirtError(LOST, FROM_RPC), OutcomeUnknown),
        (LibvirtError(REFUSED), HypervisorError),
    ],
)
def test_what_is_told_of_a_change(error: LibvirtError, told: type[Exception]) -> None:
    def fail(_handle: Any) -> None:
        raise error

    with pytest.raises(told):
        SameConnection(Host()).make_or_refuse(UUID, "test", fail)


class NoReader:
    pass


@pytest.mark.parametrize(
    ("request_", "has_flags", "lacks_flags", "parameters"),
    [
        (
            MigrationRequest(UUID, "x", 20),
            libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE,
            libvirt.VIR_MIGRATE_POSTCOPY | libvirt.VIR_MIGRATE_PARALLEL | libvirt.VIR_MIGRATE_NON_SHARED_DISK,
            {"bandwidth": 20},
        ),
        (
            MigrationRequest(UUID, "x", 20, channels=4, auto_converge=True),
            libvirt.VIR_MIGRATE_PARALLEL | libvirt.VIR_MIGRATE_AUTO_CONVERGE,
            libvirt.VIR_MIGRATE_POSTCOPY | libvirt.VIR_MIGRATE_UNSAFE,
            {"bandwidth": 20, "parallel.connections": 4},
        ),
        (
            MigrationRequest(UUID, "x", 20, channels=4, post_copy=True),
            libvirt.VIR_MIGRATE_POSTCOPY,
            libvirt.VIR_MIGRATE_PARALLEL,
            {"bandwidth": 20, "bandwidth.postcopy": 20},
        ),
        (
            MigrationRequest(UUID, "x", 20, copy_disks=("vda", "vdc")),
            libvirt.VIR_MIGRATE_NON_SHARED_DISK,
            libvirt.VIR_MIGRATE_NON_SHARED_INC | libvirt.VIR_MIGRATE_UNSAFE,
            {"bandwidth": 20, "migrate_disks": ["vda", "vdc"]},
        ),
    ],
    ids=["plain", "parallel", "post-copy", "disks"],
)
def test_what_is_asked_of_a_migration(
    request_: MigrationRequest, has_flags: int, lacks_flags: int, parameters: dict[str, Any]
) -> None:
    host = Host()
    migrations = Migrations(SameConnection(host), NoReader(), allow_unsafe=False)  # type: ignore[arg-type]  # unused
    assert migrations.migrate(request_).end is MigrationEnd.SUCCEEDED
    asked, flags = host.migration
    assert asked == parameters
    assert flags & has_flags == has_flags
    assert flags & lacks_flags == 0
