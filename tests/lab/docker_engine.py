"""A Docker engine of a test's own, in a namespace of the lab, and images without a registry.

`dockerd` runs in the control plane's network namespace (so a published port is one of 192.0.2.1, and its rules of
iptables go with the namespace), in a PID namespace and a mount namespace of its own: when it is killed, by whomever,
the kernel ends every container and takes every mount along. Its data lie in the lab's folder.

Where there is no registry of images, `docker import` of a debootstrap'd Debian with Python and Redis, tagged with the
names that our files use, stands in for one. The root and the wheels of the image are cached under /var/cache/vmherd.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from packaging.requirements import Requirement

from tests.lab.cleanup import mounts_under
from tests.lab.lab import Lab
from tests.lab.namespaces import REPOSITORY, LabError
from tests.requirements import need_program, need_root
from tests.waiting import wait_until

CACHE = Path(os.environ.get("VMHERD_CACHE", "/var/cache/vmherd"))
BASE_IMAGES = ("python:3.12-slim-bookworm", "redis:7.2-bookworm")
_PACKAGES = "ca-certificates,python3,python3-venv,redis-server"
_PYTHON = "3.11.2"
"""Debian 12's."""
_ROOT_VERSION = "2"
"""Of what is done to the root besides; raise it with a change, so that no cached one is taken."""
_MIRROR = "http://deb.debian.org/debian"
_CGROUPS = Path("/sys/fs/cgroup")
_WHEELS_PORT = 8099
_KEPT = ("docker-root-", "wheels-")


class DockerEngine:
    """An engine in the lab's control plane; a context manager.

    Args:
        lab: Up.
    """

    def __init__(self, lab: Lab) -> None:
        need_root("a Docker engine")
        self._dockerd = need_program("dockerd", "docker.io")
        self._docker = need_program("docker", "docker.io")
        self._compose = need_program("docker-compose", "docker-compose")
        self._lab = lab
        self.folder = lab.directory / "docker"
        self.socket = self.folder / "docker.sock"
        self._parent = f"vmherd-{lab.name}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir()
        argv = [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--propagation", "private"),
            str(self._dockerd),
            f"--data-root={self.folder}/data",
            f"--exec-root={self.folder}/exec",
            f"--pidfile={self.folder}/pid",
            f"--host=unix://{self.socket}",
            f"--cgroup-parent=/{self._parent}",
        ]
        self._process = self._lab.control.popen(argv, log="dockerd")
        try:
            wait_until(self._answers, 60, "dockerd answers (its log is in logs/dockerd.log)", interval=0.2)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def docker(self, *arguments: str, timeout: float = 100.0) -> str:
        """Run `docker` and return what it printed."""
        return self._run([str(self._docker), *arguments], timeout)

    def compose(self, project: Path, *arguments: str, timeout: float = 100.0) -> str:
        """Run `docker-compose` in a folder and return what it printed."""
        return self._run([str(self._compose), "--project-name", "vmherd", *arguments], timeout, project)

    def import_base_images(self) -> None:
        """Make the images from which ours are built, as a registry would give them."""
        first, *others = BASE_IMAGES
        self.docker("import", str(debian_root()), first)
        for name in others:
            self.docker("tag", first, name)

    def build(self, tag: str) -> None:
        """Build our image; its packages come from this machine's cache, by the namespace's own loopback."""
        serve = [sys.executable, "-m", "http.server", str(_WHEELS_PORT), "--bind", "127.0.0.1"]
        server = self._lab.control.popen([*serve, "--directory", str(wheels())], log="wheels")
        try:
            links = f"http://127.0.0.1:{_WHEELS_PORT}/"
            arguments = ("--build-arg", f"PIP_FIND_LINKS={links}", "--build-arg", "PIP_NO_INDEX=1", "--network", "host")
            wait_until(self._serves_wheels, 20, "the wheels are served")
            self.docker("build", *arguments, "--tag", tag, str(REPOSITORY), timeout=300)
        finally:
            server.terminate()
            server.wait(20)

    def _serves_wheels(self) -> bool:
        try:
            self._lab.control.connect(("127.0.0.1", _WHEELS_PORT)).close()
        except OSError:
            return False
        return True

    def _run(self, argv: Sequence[str], timeout: float, cwd: Path | None = None) -> str:
        env = {"DOCKER_HOST": f"unix://{self.socket}", "DOCKER_BUILDKIT": "0", "COMPOSE_HTTP_TIMEOUT": "100"}
        done = self._lab.control.run(argv, env=env, log="docker", cwd=cwd, timeout=timeout, check=False)
        if done.returncode != 0:  # a build tells on its standard output why it failed
            raise LabError(f"{' '.join(argv)}: exit {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise LabError("dockerd ended; its log is in logs/dockerd.log")
        try:
            self.docker("version", timeout=20)
        except (LabError, subprocess.TimeoutExpired):
            return False
        return True

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()  # `unshare`, which takes the PID namespace along, and that all containers
            self._process.wait(30)
            self._process = None
        wait_until(lambda: not mounts_under(self.folder), 20, "its mounts are gone")
        wait_until(self._remove_cgroups, 20, "its cgroups are gone")
        shutil.rmtree(self.folder)

    def _remove_cgroups(self) -> bool:
        """Remove its cgroups, the innermost first; False while some have processes that are ending."""
        for parent in (*_CGROUPS.glob(f"*/{self._parent}"), *_CGROUPS.glob(self._parent)):
            for folder in sorted((p for p in parent.rglob("*") if p.is_dir()), reverse=True):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            with contextlib.suppress(OSError):
                parent.rmdir()
        return not any((*_CGROUPS.glob(f"*/{self._parent}"), *_CGROUPS.glob(self._parent)))


def debian_root() -> Path:
    """Return a tar of a Debian with Python and Redis; made by debootstrap where it is not cached yet."""
    debootstrap = need_program("debootstrap", "debootstrap")
    tar = CACHE / f"{_KEPT[0]}{_digest(_PACKAGES, _ROOT_VERSION)}.tar"
    with _making(tar) as draft:
        if draft is not None:
            root = draft.with_suffix(".root")
            shutil.rmtree(root, ignore_errors=True)
            argv = [str(debootstrap), "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(root), _MIRROR]
            _checked(argv)
            (root / "usr/bin/python").symlink_to("python3")
            (root / "data").mkdir()  # of Redis's own image: a volume gets its owner from what it is mounted over
            _checked(["chroot", str(root), "chown", "redis:redis", "/data"])
            _checked(["tar", "-C", str(root), "-cf", str(draft), "."])
            shutil.rmtree(root)
    return tar


def wheels() -> Path:
    """Return a folder of the packages that our image is made of, as the lock file has them."""
    lock = REPOSITORY / "requirements-control.lock"
    builder = [line.split()[0] for line in (REPOSITORY / "requirements.lock").read_text().splitlines()]
    builder = [line for line in builder if line.partition("==")[0] in _BUILDERS]
    folder = CACHE / f"{_KEPT[1]}{_digest(lock.read_text(), _PYTHON, *builder)}"
    with _making(folder) as draft:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            wanted = draft / "wanted.txt"
            wanted.write_text("".join(_wanted(lock.read_text())))
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(draft), "--only-binary=:all:"]
            pip += ["--python-version", _PYTHON, "--implementation", "cp", "--no-deps"]
            _checked([*pip, "--require-hashes", "-r", str(wanted)])
            _checked([*pip, *builder])
    return folder


def _wanted(lock: str) -> Iterator[str]:
    """Give what of a lock file counts for the stand-in's Python: pip goes by the markers of the one that runs it."""
    environment = {"python_version": _PYTHON.rpartition(".")[0], "python_full_version": _PYTHON}
    for block in re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE):
        if not re.match(r"[A-Za-z0-9]", block):
            continue  # the comment at its head
        first, _, hashes = block.partition("\\\n")
        requirement = Requirement(first.strip())
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield f"{first.partition(';')[0].strip()} \\\n{hashes}"


_BUILDERS = ("hatchling", "packaging", "pathspec", "pluggy", "tomlkit", "trove-classifiers")


@contextlib.contextmanager
def _making(path: Path) -> Iterator[Path | None]:
    """Hold the lock on a cached path. Give a draft to be made, which takes its place; None when it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            yield None
            return
        draft = path.with_name(f"{path.name}.new")
        yield draft
        for old in (p for kind in _KEPT if path.name.startswith(kind) for p in path.parent.glob(f"{kind}*")):
            if old not in {draft, path} and old.suffix != ".lock":
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        draft.rename(path)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _checked(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(argv)}: exit {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")


if __name__ == "__main__":  # tools/setup.sh: before the tests, whose time is limited
    debian_root()
    wheels()
