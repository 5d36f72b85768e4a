"""Whether this host has what a machine needs, asked before anything is spent on its migration.

An answer of "no problem" is no promise: memory, free ports and what only QEMU knows show when it arrives. A problem is
one: the migration would fail, at the cost of a slot and of the time until QEMU on the target gives up.
"""

import stat
import xml.etree.ElementTree as ET  # what is parsed comes from libvirtd
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt

from workers.hypervisor.domain_needs import FileNeed, Needs, VolumeNeed
from workers.hypervisor.libvirt_connection import is_lost, message_of


def find_problems(connection: Any, needs: Needs) -> list[str]:
    """Say what this host lacks, one problem an entry; empty if it has all.

    Raises:
        libvirt.libvirtError: The connection broke.
    """
    problems = list(needs.problems)
    problems += _machine_problems(connection, needs)
    for file in needs.files:
        problems += _file_problems(connection, file)
    for volume in needs.volumes:
        problems += _volume_problems(connection, volume)
    problems += [f"bridge {name} is not there" for name in needs.bridges if not _has_device(connection, name)]
    problems += [f"network device {name} is not there" for name in needs.parents if not _has_device(connection, name)]
    problems += [text for name in needs.networks for text in _network_problems(connection, name)]
    problems += _name_problems(connection, needs)
    return problems


def _machine_problems(connection: Any, needs: Needs) -> Iterator[str]:
    """Compare emulator, machine type and CPU with what the host's QEMU offers."""
    asked = (needs.emulator or None, needs.arch or None, needs.machine or None, needs.virt_type or None)
    try:
        capabilities = ET.fromstring(connection.getDomainCapabilities(*asked))  # noqa: S314  libvirtd wrote it
    except libvirt.libvirtError as error:
        yield f"machine {needs.machine or needs.virt_type}: {_words(connection, error)}"
        return
    if needs.has_emulated_tpm and not _offers_emulated_tpm(capabilities):
        yield "TPM: this host emulates none (swtpm is missing)"
    if needs.cpu_mode == "custom":
        if needs.cpu_model:
            yield from _cpu_problems(connection, asked, needs)
    elif needs.cpu_mode:
        mode = capabilities.find(f"cpu/mode[@name='{needs.cpu_mode}']")
        if mode is None or mode.get("supported") != "yes":
            yield f"CPU {needs.cpu_mode}: this host does not offer it for {needs.virt_type} machines"


def _cpu_problems(connection: Any, asked: tuple[str | None, ...], needs: Needs) -> Iterator[str]:
    flags = libvirt.VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE
    try:
        connection.compareHypervisorCPU(*asked, needs.cpu_xml, flags)
    except libvirt.libvirtError as error:
        yield f"CPU model {needs.cpu_model}: {_lacking(_words(connection, error))}"


def _lacking(words: str) -> str:
    _, found, features = words.partition("does not provide required features: ")
    return f"this host lacks {features}" if found else words


def _offers_emulated_tpm(capabilities: ET.Element) -> bool:
    backends = capabilities.iterfind("devices/tpm[@supported='yes']/enum[@name='backendModel']/value")
    return any(backend.text == "emulator" for backend in backends)


def _file_problems(connection: Any, need: FileNeed) -> Iterator[str]:
    try:
        mode = Path(need.path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if need.is_copied and not need.is_block:
            yield from _pool_problems(connection, need)
            return
        yield f"{need.what}: no such {'block device' if need.is_block else 'file'} {need.path}"
        return
    except OSError as error:
        yield f"{need.what}: {need.path} can't be looked at: {error.strerror}"
        return
    if need.is_block and not stat.S_ISBLK(mode):
        yield f"{need.what}: {need.path} is no block device"


def _pool_problems(connection: Any, need: FileNeed) -> Iterator[str]:
    """Say what keeps libvirt from making an image to copy a disk to: it makes one in a storage pool only."""
    folder = str(Path(need.path).parent)
    try:
        pool = connection.storagePoolLookupByTargetPath(folder)
    except libvirt.libvirtError as error:
        _words(connection, error)
        yield f"{need.what}: nothing to copy it to: no {need.path}, and no storage pool in {folder} to make it"
        return
    if not pool.isActive():
        yield f"{need.what}: nothing to copy it to: no {need.path}, and storage pool {pool.name()} is not active"


def _volume_problems(connection: Any, need: VolumeNeed) -> Iterator[str]:
    try:
        pool = connection.storagePoolLookupByName(need.pool)
    except libvirt.libvirtError as error:
        yield f"{need.what}: storage pool {need.pool}: {_words(connection, error)}"
        return
    if not pool.isActive():
        yield f"{need.what}: storage pool {need.pool} is not active"
        return
    if need.is_copied:
        return
    try:
        pool.storageVolLookupByName(need.volume)
    except libvirt.libvirtError:
        # The pool's list may be older than the volume.
        try:
            pool.refresh()
            pool.storageVolLookupByName(need.volume)
        except libvirt.libvirtError as error:
            yield f"{need.what}: volume {need.volume} of storage pool {need.pool}: {_words(connection, error)}"


def _has_device(connection: Any, name: str) -> bool:
    try:
        connection.interfaceLookupByName(name)
    except libvirt.libvirtError as error:
        _words(connection, error)
        return False
    return True


def _network_problems(connection: Any, name: str) -> Iterator[str]:
    try:
        is_active = connection.networkLookupByName(name).isActive()
    except libvirt.libvirtError as error:
        _words(connection, error)
        yield f"network {name} is not there"
        return
    if not is_active:
        yield f"network {name} is not active"


def _name_problems(connection: Any, needs: Needs) -> Iterator[str]:
    try:
        other = connection.lookupByName(needs.name).UUIDString()
    except libvirt.libvirtError as error:
        _words(connection, error)
        return
    if other != needs.uuid:
        yield f"the name {needs.name} is taken here by domain {other}"


def _words(connection: Any, error: Any) -> str:
    """Return libvirt's words for a refusal; an error of the connection's is raised anew."""
    if is_lost(connection, error):
        raise error
    return message_of(error)
