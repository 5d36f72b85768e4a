"""What stands in for a registry of images and for PyPI: a small Debian, and the wheels of our lock file.

The Debian is what apt downloads for Python and Redis, unpacked and not configured: that takes seconds, where a
debootstrap takes minutes, and no package's script runs. Tagged with the names that our files use it is both base
images; its Python is this distribution's own, and may be older than the tag says. Both are cached under
/var/cache/vmherd, in names that are digests of all that goes in.
"""

import contextlib
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from tests.lab.image import locked_cache
from tests.lab.namespaces import REPOSITORY, LabError

BASE_IMAGES = ("python:3.12-slim-bookworm", "redis:7.2-bookworm")
_PACKAGES = (
    *("base-files", "base-passwd", "coreutils", "dash", "grep", "libc-bin", "passwd", "sed"),
    *("netbase", "python3", "python3-venv", "redis-server", "tar", "tzdata", "util-linux"),
)
_INSTALLED = ("fence-agents", "ipmitool")
"""By the Dockerfile."""
_ARCHIVE = "var/cache/apt/archives/installed.tar"
_APT_GET = f"""\
#!/bin/sh -eu
# Installs what this image's maker had apt download, or fails.
[ "$1" != update ] || exit 0
[ "$1" = install ] && shift
for word in "$@"; do
    case $word in -*|{"|".join(_INSTALLED)}) ;; *) echo "E: Unable to locate package $word" >&2 && exit 100 ;; esac
done
tar -C / --keep-directory-symlink -xf /{_ARCHIVE}
"""
_VERSION = "2"
"""Of what is done besides; raise it with a change, so that no cached one is taken."""
_UNWANTED = (
    *("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/perl", "usr/lib/systemd"),
    "usr/lib/python3/dist-packages/botocore/data",  # two thirds of the agents, and only Amazon's needs it
)
_MERGED = ("bin", "lib", "lib64", "sbin")
_REDIS_ID = 999
_BUILDERS = ("hatchling", "packaging", "pathspec", "pluggy", "tomlkit", "trove-classifiers")


def base_root() -> Path:
    """Return a tar of a Debian with Python and Redis; made (in some 30 seconds, 65 MB to download) if it is not cached.

    Raises:
        LabError: A package could not be had.
    """
    wanted = _digest(*_PACKAGES, _APT_GET, _VERSION, Path("/etc/os-release").read_text())
    with _made("container-root-", f"{wanted}.tar") as (tar, draft):
        if draft is not None:
            with tempfile.TemporaryDirectory(dir=draft.parent, prefix=".container-") as scratch:
                packages, root, more = (Path(scratch, name) for name in ("packages", "root", "more"))
                (packages / "partial").mkdir(parents=True)
                _download(packages, *_PACKAGES)
                _unpack(packages, root)
                _finish(root)
                present = {package.name for package in packages.glob("*.deb")}
                _download(packages, *_PACKAGES, *_INSTALLED)
                for name in present:
                    (packages / name).unlink()
                _unpack(packages, more)
                _add_installer(root, more)
                _checked(["tar", "-C", str(root), "-cf", str(draft), "."])
    return tar


def _download(folder: Path, *names: str) -> None:
    """Have apt fetch the packages and all that they need, as for a machine on which nothing is installed."""
    options = {
        "Dir::State::status": "/dev/null",
        "Dir::Cache::archives": str(folder),
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
    }
    chosen = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    argv = ["apt-get", "--quiet", "--yes", *chosen, "--download-only", "install", *names]
    try:
        _checked(argv)
    except LabError:  # a machine that had all packages may have no lists of them, or old ones
        _checked(["apt-get", "--quiet", "update"])
        _checked(argv)


def _unpack(packages: Path, root: Path) -> None:
    for name in _MERGED:
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for package in sorted(packages.glob("*.deb")):
        # By way of tar: dpkg would put a folder in the place of a link to one.
        data = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE)
        _checked(["tar", "-C", str(root), "--keep-directory-symlink", "-xf", "-"], data)
    for unwanted in _UNWANTED:
        shutil.rmtree(root / unwanted, ignore_errors=True)


def _finish(root: Path) -> None:
    """Do what the packages' own scripts would, as far as it is needed."""
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / "etc" / name)
    if not (root / "bin/sh").exists():
        (root / "bin/sh").symlink_to("dash")
    (root / "usr/bin/python").symlink_to("python3")
    (root / "tmp").chmod(0o1777)
    for name, line in (("passwd", "redis:x:{0}:{0}::/data:/usr/sbin/nologin\n"), ("group", "redis:x:{0}:\n")):
        with (root / "etc" / name).open("a") as file:
            file.write(line.format(_REDIS_ID))
    (root / "data").mkdir()  # as in Redis's own image: a volume gets its owner from what it is mounted over
    shutil.chown(root / "data", _REDIS_ID, _REDIS_ID)


def _add_installer(root: Path, more: Path) -> None:
    """Put an `apt-get` into a root, and what it installs."""
    archive, program = root / _ARCHIVE, root / "usr/bin/apt-get"
    archive.parent.mkdir(parents=True, exist_ok=True)
    _checked(["tar", "-C", str(more), "-cf", str(archive), "."])
    program.write_text(_APT_GET)
    program.chmod(0o755)


def wheels() -> Path:
    """Return a folder of the packages that our image is made of, as the lock file has them, for the root's Python.

    Raises:
        LabError: pip could not download them.
    """
    python = _python_of(base_root())
    lock = (REPOSITORY / "requirements-control.lock").read_text()
    builder = [line.split()[0] for line in (REPOSITORY / "requirements.lock").read_text().splitlines() if "==" in line]
    builder = [line for line in builder if line.partition("==")[0] in _BUILDERS]
    with _made("container-wheels-", _digest(lock, python, *builder)) as (folder, draft):
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            wanted = draft / "wanted.txt"
            wanted.write_text("".join(_wanted(lock, python)))
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(draft), "--only-binary=:all:"]
            pip += ["--python-version", python, "--implementation", "cp", "--no-deps"]
            _checked([*pip, "--require-hashes", "-r", str(wanted)])
            _checked([*pip, *builder])
    return folder


def _python_of(tar: Path) -> str:
    """Return the version of a root's Python, as 3.11."""
    listed = _checked(["tar", "-tvf", str(tar), "./usr/bin/python3"])
    return listed.strip().rpartition("python")[2]


def _wanted(lock: str, python: str) -> Iterator[str]:
    """Give what of a lock file counts for a Python: pip goes by the markers of the one that runs it."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    for block in re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE):
        if not re.match(r"[A-Za-z0-9]", block):
            continue  # the comment at its head
        first, _, hashes = block.partition("\\\n")
        requirement = Requirement(first.strip())
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield f"{first.partition(';')[0].strip()} \\\n{hashes}"


@contextlib.contextmanager
def _made(kind: str, name: str) -> Iterator[tuple[Path, Path | None]]:
    """Give a cached path, and a draft that takes its place once it is made; no draft when the path is there."""
    with locked_cache(f"-{kind.rstrip('-')}") as cache:
        path = cache / f"{kind}{name}"
        if path.exists():
            yield path, None
            return
        draft = cache / f".{kind}new"
        yield path, draft
        for old in cache.glob(f"{kind}*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        draft.rename(path)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _checked(argv: Sequence[str], source: "subprocess.Popen[bytes] | None" = None) -> str:
    """Run a command to its end, on the output of another one if given, and return what it printed."""
    stdin = subprocess.DEVNULL if source is None else source.stdout
    done = subprocess.run(argv, stdin=stdin, capture_output=True, text=True, check=False)
    if source is not None:
        assert source.stdout is not None
        source.stdout.close()
    if done.returncode != 0 or (source is not None and source.wait() != 0):
        raise LabError(f"{' '.join(argv)}: exit {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


if __name__ == "__main__":  # tools/setup.sh: before the tests, whose time is limited
    base_root()
    wheels()
