"""libvirt and QEMU asked from outside of the product: on connections of the test's own, in their own words.

Besides, `laden` machines: they have nothing to boot and much to send, so a migration of one lasts as long as a test
wants it to, by the bandwidth alone (`release`), and costs no processor time.
"""

import json
import os
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.host import LabHost
from tests.lab.lab import Lab
from tests.waiting import wait_until

MIB = 2**20

# libvirt prints each error on the terminal; in tests they are part of the game.
libvirt.registerErrorHandler(lambda *_: None, None)

_QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
_BALLAST_AT_MIB = 16
_FULL_SPEED_MIB_S = 4096
_STATES = {libvirt.VIR_DOMAIN_RUNNING: "running", libvirt.VIR_DOMAIN_PAUSED: "paused"}
_NO_JOB = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_OPERATION_UNSUPPORTED)


def laden(lab: Lab, name: str, *, ballast_mib: int) -> Guest:
    """Describe a machine that boots nothing, with `ballast_mib` of random bytes in its memory (pages of zeros travel
    for nothing): its migration takes `ballast_mib` / bandwidth.
    """
    file = lab.directory / "disks" / f"ballast-{ballast_mib}"
    if not file.exists():
        _write_random(file, ballast_mib)
    guest = lab.blank(name, memory_mib=_BALLAST_AT_MIB + ballast_mib)
    loader = f"loader,file={file},addr={_BALLAST_AT_MIB * MIB:#x},force-raw=on"
    arguments = f"<qemu:commandline><qemu:arg value='-device'/><qemu:arg value='{loader}'/></qemu:commandline>"
    xml = guest.xml.replace("<domain ", f"<domain xmlns:qemu='{_QEMU_NAMESPACE}' ", 1)
    guest.xml = xml.replace("</domain>", f"{arguments}</domain>")
    return guest


def _write_random(file: Path, size_mib: int) -> None:
    with file.open("wb") as output:
        for _ in range(size_mib):
            output.write(os.urandom(MIB))


def states(lab: Lab, guest: Guest) -> dict[str, str]:
    """Return a domain's state by host, for each host that has it: "running", "paused" or another of libvirt's states.

    A QEMU process without a domain counts as "stray".
    """
    found = {}
    for host in lab.hosts:
        state = _state(host, guest)
        if not state and host.qemu_pid(guest.uuid) is not None:
            state = "stray"
        if state:
            found[host.name] = state
    return found


def _state(host: LabHost, guest: Guest) -> str:
    try:
        state = host.connect().lookupByUUIDString(guest.uuid).state()[0]
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return ""
        raise
    return _STATES.get(state, f"state {state}")


def assert_runs_once(herd: LabHerd, guest: Guest, node: str) -> None:
    """By the hosts' word a guest runs there and nothing of it is anywhere else; and the herd says so too."""
    assert states(herd.lab, guest) == {node: "running"}
    status = herd.cluster.vm(guest.name).status
    assert (status.phase, status.node_name) == ("Running", node)


def job(host: LabHost, guest: Guest) -> dict[str, Any]:
    """Return libvirt's figures of the domain's outgoing migration job on this host; empty if it has none."""
    try:
        stats: dict[str, Any] = host.connect().lookupByUUIDString(guest.uuid).jobStats()
    except libvirt.libvirtError as error:
        if error.get_error_code() in _NO_JOB:
            return {}
        raise
    is_outgoing = stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT
    return stats if is_outgoing and stats["type"] != libvirt.VIR_DOMAIN_JOB_NONE else {}


def release(host: LabHost, guest: Guest, timeout: float = 30.0) -> None:
    """Let a migration that is under way run at full speed, whatever bandwidth it was begun with.

    Not before it sends: libvirt sets the bandwidth that it was asked for some time after the job's begin.
    """
    wait_until(lambda: job(host, guest).get("data_processed", 0) > 0, timeout, f"{guest.domain} leaves {host.name}")
    host.connect().lookupByUUIDString(guest.uuid).migrateSetMaxSpeed(_FULL_SPEED_MIB_S)


def max_bandwidth(host: LabHost, guest: Guest) -> int | None:
    """Return what QEMU itself keeps a migration to, bytes per second; None if the host does not have the domain."""
    try:
        domain = host.connect().lookupByUUIDString(guest.uuid)
        answer = libvirt_qemu.qemuMonitorCommand(domain, '{"execute": "query-migrate-parameters"}', 0)
    except libvirt.libvirtError as error:
        if error.get_error_code() in _NO_JOB:
            return None
        raise
    return int(json.loads(answer)["return"]["max-bandwidth"])


def sent_bytes(host: LabHost) -> int:
    """Return how many bytes have left the host through its cable since it was booted."""
    return int(host.run(["cat", "/sys/class/net/eth0/statistics/tx_bytes"]).stdout)
