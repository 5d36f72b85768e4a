"""What is built once for all labs: the guests' kernel and initramfs, and the emulator wrapper.

The kernel is Debian's cloud kernel (or Ubuntu's) as downloaded, the rest is busybox; nothing is installed. All is
cached under `/var/cache/vmherd` (or `$VMHERD_CACHE`) in folders whose names are hashes of all that goes in: a changed
input makes a new image, and an unchanged one is free.
"""

import contextlib
import fcntl
import functools
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.namespaces import FILES, LabError, command

# In the order in which they must be loaded. A kernel that has one built in has no such file, which is fine.
_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
    "button",
    "evdev",
)
# Packages whose dependency is a small kernel: Debian, then Ubuntu.
_KERNELS = ("linux-image-cloud-amd64", "linux-image-kvm", "linux-image-virtual", "linux-image-generic")
_UNPACK = {".xz": ["xz", "-dc"], ".zst": ["zstd", "-dc"], ".gz": ["gzip", "-dc"], ".ko": ["cat"]}
_CGI = {
    "poweroff": "poweroff -f",
    "reboot": "reboot -f",
    "panic": "echo c >/proc/sysrq-trigger",
    "dirty": 'echo "$QUERY_STRING" >/dirty_rate',
}


@dataclass(frozen=True)
class Image:
    """What a guest boots from."""

    kernel: Path
    initrd: Path


@functools.cache
def image() -> Image:
    """Return the guest image, built (in some seconds, with a download of 27 MB) if it is not in the cache.

    Raises:
        LabError: A tool or a package is missing; the message says which.
    """
    if missing := missing_tools():
        raise LabError(f"the guest image needs: {', '.join(missing)}")
    with locked_cache() as cache:
        package = _kernel_package(cache)
        inputs = [package, *_MODULES, *_CGI.values(), (FILES / "guest-init.sh").read_text(), Path(__file__).read_text()]
        digest = hashlib.sha256("\0".join(inputs).encode() + static_busybox().read_bytes()).hexdigest()[:16]
        folder = cache / f"guest-{digest}"
        if not folder.exists():
            # Built aside and renamed, so that a killed build leaves no half image under the final name.
            with tempfile.TemporaryDirectory(dir=cache, prefix=".build-") as scratch:
                _build(package, Path(scratch), cache)
                (Path(scratch) / "image").rename(folder)
    return Image(kernel=folder / "vmlinuz", initrd=folder / "initrd")


@functools.cache
def emulator() -> Path:
    """Return the `<emulator>` of lab domains, `files/qemu-wrapper.sh` around the installed QEMU.

    Its path and time stamp stay the same from lab to lab, and change with QEMU: libvirt keeps by them what it found out
    about an emulator.
    """
    qemu = Path(shutil.which("qemu-system-x86_64") or "/usr/bin/qemu-system-x86_64").resolve()
    text = (FILES / "qemu-wrapper.sh").read_text().replace("@QEMU@", str(qemu))
    digest = hashlib.sha256(f"{text}{qemu.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    with locked_cache() as cache:
        wrapper = cache / f"emulator-{digest}" / "qemu"
        if not wrapper.exists():
            wrapper.parent.mkdir(exist_ok=True)
            half = wrapper.with_suffix(".half")
            half.write_text(text)
            half.chmod(0o755)
            half.rename(wrapper)
    return wrapper


@functools.cache
def daemon(name: str) -> Path:
    """Return a copy of one of libvirt's daemons, made when it is not in the cache.

    Debian's and Ubuntu's AppArmor profiles are bound to the daemons' own paths, and would keep them from the lab's
    files. A copy is under no profile; nothing of the machine's own libvirt is touched.
    """
    original = Path(shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin") or f"/usr/sbin/{name}").resolve()
    facts = original.stat()
    with locked_cache() as cache:
        copy = cache / f"daemon-{facts.st_mtime_ns}-{facts.st_size}" / name
        if not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            half = copy.with_suffix(".half")
            shutil.copy2(original, half)
            half.rename(copy)
    return copy


def libvirt_cache() -> Path:
    """Return the folder that all lab hosts share as /var/cache/libvirt."""
    with locked_cache() as cache:
        (cache / "libvirt").mkdir(exist_ok=True)
        return cache / "libvirt"


def missing_tools() -> list[str]:
    """Return what is not installed of what the image is built with, as text for a person."""
    needed = {"apt-get": "apt", "dpkg": "dpkg", "cpio": "cpio", "gzip": "gzip"}
    missing = [f"{tool} (package {package})" for tool, package in needed.items() if shutil.which(tool) is None]
    if not static_busybox().exists():
        missing.append("busybox (package busybox-static)")
    elif "dynamically linked" in _linkage(static_busybox()):
        missing.append("a static busybox (package busybox-static)")
    return missing


def static_busybox() -> Path:
    """Return where busybox is."""
    return Path(shutil.which("busybox") or "/bin/busybox").resolve()


def _linkage(program: Path) -> str:
    # A dynamic program names its interpreter; reading that needs neither file(1) nor readelf(1).
    return "dynamically linked" if b"/ld-linux" in program.read_bytes()[:4096] else "static"


def _kernel_package(cache: Path) -> str:
    """Return the name of the kernel package: the cached choice, or what the archive's newest depends on.

    The choice is kept, so that an image goes on being used until someone empties the cache, even with no network.
    """
    chosen = cache / "kernel-package"
    if chosen.exists():
        return chosen.read_text().strip()
    for meta in _KERNELS:
        with contextlib.suppress(LabError):
            found = re.search(r"Depends: (linux-image-\d\S*)", command(["apt-cache", "depends", meta]))
            if found:
                chosen.write_text(found[1] + "\n")
                return found[1]
    raise LabError(f"apt knows none of {', '.join(_KERNELS)}; is `apt-get update` needed?")


def _build(package: str, scratch: Path, cache: Path) -> None:
    """Make `scratch/image` with `vmlinuz` and `initrd`."""
    system = unpacked(package, scratch, cache)
    result = scratch / "image"
    result.mkdir()
    kernels = sorted(system.glob("boot/vmlinuz-*"))
    if not kernels:
        raise LabError(f"{package} holds no boot/vmlinuz-*")
    shutil.copy(kernels[0], result / "vmlinuz")
    # Some kernels are readable by root only; libvirt's QEMU may be another user some day.
    (result / "vmlinuz").chmod(0o644)

    root = scratch / "root"
    for folder in ("bin", "proc", "sys", "dev", "www", "ws", "modules", "cgi", "etc/acpi/PWRF", "var/log", "var/run"):
        (root / folder).mkdir(parents=True)
    shutil.copy(static_busybox(), root / "bin/busybox")
    for applet in command([str(static_busybox()), "--list"]).split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    shutil.copy(FILES / "guest-init.sh", root / "init")
    (root / "init").chmod(0o755)
    scripts = {f"cgi/{name}": body for name, body in _CGI.items()}
    scripts["etc/acpi/PWRF/00000080"] = "poweroff -f"
    for name, body in scripts.items():
        text = f"#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\nok\\n'\n{body}\n"
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    copy_modules(system, root / "modules", _MODULES)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = subprocess.run(
        ["cpio", "--create", "--format=newc", "--quiet", "--owner=0:0"],
        cwd=root,
        input=names.encode(),
        capture_output=True,
        check=True,
    ).stdout
    # Barely compressed: the guest unpacks it under emulation.
    (result / "initrd").write_bytes(gzip.compress(archive, compresslevel=1))


def unpacked(package: str, scratch: Path, cache: Path) -> Path:
    """Return a folder with the files of a kernel package, and of the one with its modules where those are apart."""
    system = scratch / "system"
    packages = [package]
    # Ubuntu: linux-image-VERSION holds the kernel only.
    modules = package.replace("linux-image-", "linux-modules-")
    if f"Depends: {modules}" in command(["apt-cache", "depends", package]):
        packages.append(modules)
    downloads = cache / "packages"
    downloads.mkdir(exist_ok=True)
    fetch(packages, downloads)
    for name in packages:
        command(["dpkg", "--extract", str(max(downloads.glob(f"{name}_*.deb"))), str(system)], timeout=120)
    return system


def fetch(packages: Sequence[str], downloads: Path) -> None:
    """Download packages that are not there yet.

    Raises:
        LabError: One can't be.
    """
    missing = [name for name in packages if not list(downloads.glob(f"{name}_*.deb"))]
    if not missing:
        return
    # In a folder of its own, as apt-get writes into the current one; root, as its sandbox user can't.
    argv = ["apt-get", "-o", "APT::Sandbox::User=root", "download", "--quiet", *missing]
    done = subprocess.run(argv, cwd=downloads, capture_output=True, text=True, timeout=300, check=False)
    left = [name for name in missing if not list(downloads.glob(f"{name}_*.deb"))]
    if done.returncode != 0 or left:
        raise LabError(f"can't download {', '.join(left)}: {done.stderr.strip()} (is `apt-get update` needed?)")


def copy_modules(system: Path, target: Path, names: Sequence[str]) -> None:
    """Copy kernel modules out of an unpacked package, and write their order; those that are built in are left out."""
    order = []
    for name in names:
        # File names have "_" or "-", as the author liked.
        pattern = name.replace("_", "[_-]")
        found = sorted(path for path in system.glob("**/modules/*/kernel") for path in path.rglob(f"{pattern}.ko*"))
        if not found:
            continue
        with (target / f"{name}.ko").open("wb") as file:
            subprocess.run([*_UNPACK[found[0].suffix], str(found[0])], stdout=file, check=True)
        order.append(f"{name}.ko\n")
    (target / "order").write_text("".join(order))


@contextlib.contextmanager
def locked_cache(what: str = "") -> Iterator[Path]:
    """Give the cache, to one process at a time; `what` is for those that build something else than all others."""
    cache = Path(os.environ.get("VMHERD_CACHE", "/var/cache/vmherd"))
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".lock{what}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield cache
