"""How a domain is configured and whose it is: read, marked, made persistent and transient.

A job that runs on a domain keeps libvirt from changing any of this for 30 s and longer. So a domain with a job is
refused beforehand, and what comes in between ends at the deadline of `Changes`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import libvirt

from orchestrator.errors import DomainNotFound, HypervisorError, OutcomeUnknown
from workers.hypervisor.domain_xml import MARKER_NAMESPACE, MARKER_PREFIX, identity_of, marker_xml, startable
from workers.hypervisor.libvirt_changes import Changes
from workers.hypervisor.libvirt_connection import is_lost, message_of
from workers.hypervisor.port import Definition, Domain, DomainState, Marker

_KEEP_ALL: Final = libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM
"""And no MANAGED_SAVE: libvirt then refuses to undefine a domain that has such an image."""


def read_definition(connection: Any, uuid: str, *, secrets: bool) -> Definition | None:
    """Read how a domain is configured; None when the host does not have it.

    The live XML is the plain one, not VIR_DOMAIN_XML_MIGRATABLE. That one has the CPU as it was asked for and leaves
    out controllers that libvirt adds by itself; this one has the CPU as the guest sees it, feature by feature and with
    `check='full'`, and each device's address, so that a host gives the guest the same or refuses. What is of this run
    only (aliases, taps, labels) libvirt passes over at the next start; `startable` sees to what it doesn't.
    """
    flags = libvirt.VIR_DOMAIN_XML_SECURE if secrets else 0
    try:
        handle = connection.lookupByUUIDString(uuid)
        live, inactive = "", ""
        if handle.isActive():
            live = startable(handle.XMLDesc(flags))
        if handle.isPersistent():
            inactive = handle.XMLDesc(flags | libvirt.VIR_DOMAIN_XML_INACTIVE)
        return Definition(
            live_xml=live,
            inactive_xml=inactive,
            autostart=bool(handle.autostart()),
            snapshots=_count_snapshots(handle),
            secrets=secrets,
        )
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def _count_snapshots(handle: Any) -> int:
    return int(handle.snapshotNum()) + len(handle.listAllCheckpoints())


class Definitions:
    """Changes what a domain is for its host.

    Args:
        changes: To make the calls with.
        read: Reads one domain.
    """

    def __init__(self, changes: Changes, read: Callable[[str], Domain | None]) -> None:
        self._changes = changes
        self._read = read

    def mark(self, uuid: str, marker: Marker) -> None:
        """Write `marker` into a running domain's live metadata, replacing one that is there."""
        self._check_changeable(uuid, "marked")
        self._set_marker(uuid, "marking", marker_xml(marker))

    def unmark(self, uuid: str) -> None:
        """Remove the marker from a running domain's live metadata; nothing where there is none."""
        self._check_changeable(uuid, "unmarked")
        self._set_marker(uuid, "unmarking", None)

    def _set_marker(self, uuid: str, what: str, element: str | None) -> None:
        def call(handle: Any) -> None:
            kind, live = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE
            key = None if element is None else MARKER_PREFIX
            handle.setMetadata(kind, element, key, MARKER_NAMESPACE, live)

        self._changes.make_or_refuse(uuid, what, call)

    def _check_changeable(self, uuid: str, participle: str) -> None:
        domain = self._read(uuid)
        if domain is None or domain.state is DomainState.SHUTOFF:
            raise DomainNotFound(f"domain {uuid} does not run on {self._changes.uri}")
        if domain.has_job:
            raise HypervisorError(f"domain {uuid} is not {participle} while a job is active on it ({domain.state})")

    def define(self, domain_xml: str, *, autostart: bool) -> None:
        """Make a domain persistent (it may run or not) with this configuration."""
        uuid = identity_of(domain_xml)
        connection = self._changes.connect()
        try:
            connection.defineXML(domain_xml)
        except libvirt.libvirtError as error:
            words = message_of(error)
            if is_lost(connection, error):
                raise OutcomeUnknown(f"the connection to {self._changes.uri} broke while {uuid} was defined") from error
            raise HypervisorError(f"domain {uuid} was not defined: {words}") from error
        try:
            self._changes.make(uuid, "setting the autostart", lambda handle: handle.setAutostart(int(autostart)))
        except (libvirt.libvirtError, HypervisorError) as error:
            raise OutcomeUnknown(f"domain {uuid} was defined, but not its autostart: {error}") from error

    def undefine(self, uuid: str) -> None:
        """Make a running persistent domain transient. One that is transient already, or not there, is no error."""
        domain = self._read(uuid)
        if domain is None or not domain.persistent:
            return
        if domain.state is DomainState.SHUTOFF:
            raise HypervisorError(f"domain {uuid} is not undefined, as it does not run: nothing would be left of it")
        if domain.has_job:
            raise HypervisorError(f"domain {uuid} is not undefined while a job is active on it ({domain.state})")
        before = read_definition(self._changes.connect(), uuid, secrets=True)
        if before is None:
            return
        if before.snapshots:
            # libvirt itself would refuse only if it did not run, and forget them when it stops.
            raise HypervisorError(f"domain {uuid} is not undefined: its {before.snapshots} snapshot(s) would be lost")
        try:
            self._changes.make_or_refuse(uuid, "undefine", partial(_undefine, autostart=before.autostart))
        except DomainNotFound:
            return
        self._check_it_runs_on(uuid, before)

    def _check_it_runs_on(self, uuid: str, before: Definition) -> None:
        """Define a domain again that stopped at the very time at which it was undefined: nothing would be left."""
        try:
            if self._read(uuid) is not None:
                return
        except HypervisorError as error:
            raise OutcomeUnknown(f"domain {uuid} was undefined, and then could not be read: {error}") from error
        self.define(before.inactive_xml, autostart=before.autostart)
        raise HypervisorError(f"domain {uuid} stopped while it was undefined; it is defined again, as it was")


def _undefine(handle: Any, *, autostart: bool) -> None:
    # Autostart goes first: whatever happens in between, the host's next boot does not start it a second time.
    handle.setAutostart(0)
    try:
        handle.undefineFlags(_KEEP_ALL)
    except libvirt.libvirtError:
        handle.setAutostart(int(autostart))
        raise
