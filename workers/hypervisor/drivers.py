"""Which driver a node's processes use: the scheme of `VMHERD_LIBVIRT_URI` says it.

`simulated+unix:///run/world.sock?host=h1` is a simulated host; anything else is libvirt's, which is imported only then.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

from orchestrator.errors import HypervisorUnavailable, Invalid
from orchestrator.resources.looking import LIBVIRT_PORTS
from orchestrator.settings import Settings
from workers.hypervisor.port import Domain, Hypervisor
from workers.hypervisor.simulated import SimulatedHypervisor
from workers.hypervisor.simulated_socket import SocketLink

_SIMULATED: Final = "simulated+unix"
_CONNECT_S: Final = 2.0


def open_hypervisor(config: Settings) -> Hypervisor:
    """Make this node's driver. It is connected when it is first used.

    Raises:
        Invalid: The URI can't be used.
    """
    if _is_simulated(config):
        return _simulated(config)
    from workers.hypervisor.libvirt_driver import LibvirtHypervisor  # noqa: PLC0415 - a simulated node needs no libvirt

    domain_type = "" if config.domain_type == "auto" else config.domain_type
    return LibvirtHypervisor(config.libvirt_uri, allow_unsafe=config.assume_shared_storage, domain_type=domain_type)


def looker(config: Settings) -> Callable[[str], list[Domain]]:
    """Make what lists the domains of another host, by the URI at which that is reached for migrations."""
    if not _is_simulated(config):
        return look_by_libvirt
    world = Path(urlsplit(config.libvirt_uri).path)

    def look(uri: str) -> list[Domain]:
        host = urlsplit(uri).netloc
        return SimulatedHypervisor(SocketLink(world, host), host).domains()

    return look


def look_by_libvirt(uri: str) -> list[Domain]:
    """List the domains of another host by its libvirt daemon.

    A host that is gone is noticed by its port first: libvirt would wait for longer.

    Raises:
        HypervisorError: It does not answer within seconds.
    """
    from workers.hypervisor.libvirt_driver import LibvirtHypervisor  # noqa: PLC0415 - a simulated node needs no libvirt

    parts = urlsplit(uri)
    port = parts.port or LIBVIRT_PORTS.get(parts.scheme.partition("+")[2])
    if not parts.hostname or port is None:
        raise HypervisorUnavailable(f"{uri}: not a daemon that listens on TCP")
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_S).close()
    except OSError as error:
        raise HypervisorUnavailable(f"libvirt at {uri} does not answer: {error}") from error
    there = LibvirtHypervisor(uri)
    try:
        return there.domains()
    finally:
        there.close()


def migration_uri(config: Settings) -> str:
    """Say where other hosts reach this one's daemon: as set, or the driver's default."""
    if config.migration_uri:
        return config.migration_uri
    if _is_simulated(config):
        return f"simulated://{_simulated(config).name}"
    return f"qemu+tls://{socket.getfqdn()}/system"


def boot_id(config: Settings) -> str:
    """Name this boot of a simulated host; empty for a real one, whose kernel says it.

    Raises:
        HypervisorUnavailable: The world does not answer, or the host has no power.
    """
    return _simulated(config).boot_id() if _is_simulated(config) else ""


def _is_simulated(config: Settings) -> bool:
    return urlsplit(config.libvirt_uri).scheme == _SIMULATED


def _simulated(config: Settings) -> SimulatedHypervisor:
    parts = urlsplit(config.libvirt_uri)
    hosts = parse_qs(parts.query).get("host", [])
    if parts.netloc or not parts.path.strip("/") or len(hosts) != 1:
        raise Invalid(f"VMHERD_LIBVIRT_URI: {config.libvirt_uri!r} is not {_SIMULATED}:///path/to.sock?host=NAME")
    return SimulatedHypervisor(SocketLink(Path(parts.path), hosts[0]), hosts[0])
