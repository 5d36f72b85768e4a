"""What a guest with a hardware watchdog boots from: Debian's generic kernel, which has i6300esb's driver, and Python.

The heartbeat process runs in it as on a real host. Cached like the lab's other images (`image`); the first one is a
download of some 80 MB.
"""

import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.lab.image import copy_modules, fetch, locked_cache, missing_tools, static_busybox, unpacked
from tests.lab.namespaces import FILES, LabError, command

_MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"),
    *("failover", "net_failover", "virtio_net"),
    *("crc32c_generic", "crc16", "mbcache", "jbd2", "ext4"),
    *("watchdog", "i6300esb"),
)
# Kernels that have drivers of hardware: Debian's, then Ubuntu's.
_KERNELS = ("linux-image-amd64", "linux-image-generic")
_TOOLS = {"mkfs.ext4": "e2fsprogs", "qemu-system-x86_64": "qemu-system-x86"}
_DISK_MIB = 200
# Of all that python3 depends on: Python itself, and libraries.
_PYTHON = r"python3.*|lib(?!perl).*|zlib1g"
_VERSION = "1"
"""To be changed with how the image is made."""


@dataclass(frozen=True)
class WatchdogImage:
    """What the guest boots from. The disk is not to be written to: QEMU's snapshot mode."""

    kernel: Path
    initrd: Path
    disk: Path


def obstacles() -> list[str]:
    """Return what keeps the image from being built here, each as text for a person."""
    found = [f"{tool} (package {package})" for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    return [*found, *missing_tools()]


@functools.cache
def watchdog_image() -> WatchdogImage:
    """Return the image, built if it is not in the cache.

    Raises:
        LabError: A tool or a package is missing; the message says which.
    """
    if missing := obstacles():
        raise LabError(f"the watchdog guest's image needs: {', '.join(missing)}")
    with locked_cache("-watchdog") as cache:
        package = _kernel_package()
        inputs = [package, *_MODULES, (FILES / "watchdog-init.sh").read_text(), _PYTHON, _VERSION]
        digest = hashlib.sha256("\0".join(inputs).encode() + static_busybox().read_bytes()).hexdigest()[:16]
        folder = cache / f"watchdog-guest-{digest}"
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix=".build-") as scratch:
                _build(package, Path(scratch), cache)
                (Path(scratch) / "image").rename(folder)
    return WatchdogImage(folder / "vmlinuz", folder / "initrd", folder / "disk")


def _kernel_package() -> str:
    for meta in _KERNELS:
        found = re.search(r"Depends: (linux-image-\d\S*)", command(["apt-cache", "depends", meta]))
        if found:
            return found[1]
    raise LabError(f"apt knows none of {', '.join(_KERNELS)}; is `apt-get update` needed?")


def _build(package: str, scratch: Path, cache: Path) -> None:
    """Make `scratch/image` with `vmlinuz`, `initrd` and `disk`."""
    system = unpacked(package, scratch, cache)
    result = scratch / "image"
    result.mkdir()
    shutil.copy(min(system.glob("boot/vmlinuz-*")), result / "vmlinuz")
    (result / "vmlinuz").chmod(0o644)
    root = scratch / "initramfs"
    for folder in ("bin", "proc", "sys", "dev", "modules", "new"):
        (root / folder).mkdir(parents=True)
    shutil.copy(static_busybox(), root / "bin/busybox")
    shutil.copy(FILES / "watchdog-init.sh", root / "init")
    (root / "init").chmod(0o755)
    copy_modules(system, root / "modules", _MODULES)
    pack = f"cd {root} && find . | cpio -o -H newc --quiet | gzip -1 >{result / 'initrd'}"
    subprocess.run(["sh", "-c", pack], check=True)
    _build_disk(scratch / "disk", result / "disk", cache)


def _build_disk(folder: Path, disk: Path, cache: Path) -> None:
    """Make a root with Python of unpacked packages: nothing is installed, so nothing is run or mounted in it."""
    folder.mkdir()
    for name in ("bin", "sbin", "lib", "lib64"):  # as Debian has them now: packages may have files in either
        (folder / "usr" / name).mkdir(parents=True)
        (folder / name).symlink_to(f"usr/{name}")
    for name in ("dev", "proc", "sys", "tmp", "opt", "etc"):
        (folder / name).mkdir()
    options = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    found = command(["apt-cache", "depends", "--recurse", *(f"--no-{name}" for name in options), "python3"])
    names = sorted({line for line in found.splitlines() if re.fullmatch(_PYTHON, line)})
    downloads = cache / "packages"
    fetch(names, downloads)
    for name in names:
        command(["dpkg", "--extract", str(max(downloads.glob(f"{name}_*.deb"))), str(folder)])
    command(["mkfs.ext4", "-q", "-d", str(folder), str(disk), f"{_DISK_MIB}M"], timeout=100)
