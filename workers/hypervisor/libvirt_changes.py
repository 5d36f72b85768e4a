"""Calls that change something: each on a connection of its own, and with a deadline if it waits for QEMU.

What libvirt does not answer in time it may still do. So the caller is told `OutcomeUnknown`, and the call is left
behind on its thread until libvirt answers it or the connection breaks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import libvirt

from orchestrator.errors import DomainNotFound, HypervisorError, OutcomeUnknown
from workers.hypervisor.libvirt_connection import is_lost, message_of, open_connection, run_apart

CHANGE_DEADLINE_S: Final = 5.0
"""Of calls that wait for QEMU. Later they may still take effect."""


class Changes:
    """Makes calls that change a host or a domain.

    Args:
        uri: The daemon's URI.
        on_open: Called each time a connection was opened.
    """

    def __init__(self, uri: str, on_open: Callable[[], None]) -> None:
        self.uri = uri
        self._on_open = on_open
        self._closed = False

    def connect(self) -> Any:
        """Open a connection (`libvirt.virConnect`) for one call.

        Raises:
            HypervisorUnavailable: The daemon does not answer.
        """
        if self._closed:
            raise HypervisorError(f"the driver of {self.uri} was closed")
        connection = open_connection(self.uri)
        self._on_open()
        return connection

    def close(self) -> None:
        """Open no connection any more."""
        self._closed = True

    def make(self, uuid: str, what: str, call: Callable[[Any], object]) -> None:
        """Make a call that changes a domain and waits for its QEMU.

        Args:
            uuid: Of the domain.
            what: The change, for messages: `resume`.
            call: What to call with the domain's handle (`libvirt.virDomain`).

        Raises:
            libvirt.libvirtError: It was refused.
            DomainNotFound: The host does not have the domain.
            OutcomeUnknown: libvirt did not answer in time, or the connection broke.
        """
        connection = self.connect()
        try:
            handle = connection.lookupByUUIDString(uuid)
            run_apart(partial(call, handle)).result(CHANGE_DEADLINE_S)
        except TimeoutError as error:
            raise OutcomeUnknown(
                f"{what} of domain {uuid}: no answer for {CHANGE_DEADLINE_S:g} s, its QEMU may hang"
            ) from error
        except libvirt.libvirtError as error:
            if is_lost(connection, error):
                raise OutcomeUnknown(f"{what} of domain {uuid}: the connection to {self.uri} broke") from error
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                raise DomainNotFound(f"{self.uri} has no domain {uuid}") from error
            raise

    def make_or_refuse(self, uuid: str, what: str, call: Callable[[Any], object]) -> None:
        """Make a call as `make` does, with libvirt's refusal as a `HypervisorError`."""
        try:
            self.make(uuid, what, call)
        except libvirt.libvirtError as error:
            raise HypervisorError(f"{what} of domain {uuid} was refused: {message_of(error)}") from error
