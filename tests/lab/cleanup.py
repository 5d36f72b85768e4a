"""Removing a lab: its processes, namespaces, mounts and folder, whoever made them and however that one ended.

What belongs to a lab is found from the world, not from records of a process that may have been killed: a process is
the lab's if its network namespace is one of the lab's, or if its `/run` is a lab host's. Process ids are never
remembered, so none is ever reused under our feet. Containers have network namespaces of their own: they end with their
Docker engine, and their cgroups, once empty, say that they have.

    python -m tests.lab.cleanup NAME...    remove these labs
    python -m tests.lab.cleanup --all      remove all labs, those in use too
    python -m tests.lab.cleanup --dead     remove labs whose owner is gone
"""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

LABS = Path("/run/vmherd-lab")
NETNS = Path("/run/netns")
CGROUPS = Path("/sys/fs/cgroup")

OWNER_FILE = "owner.json"


def tear_down(name: str, *, timeout: float = 30.0) -> None:
    """Remove everything of the lab `name`; nothing happens if there is nothing.

    Safe to run twice and at the same time in several processes: they take turns.

    Raises:
        TimeoutError: A process survived SIGKILL for `timeout` seconds (it hangs in the kernel).
    """
    with lab_lock():
        _tear_down(name, time.monotonic() + timeout)


def _tear_down(name: str, deadline: float) -> None:
    spaces = namespaces_of(name)
    # Open files keep the namespaces, and with them their inode numbers, ours while we look for what runs in them.
    held = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in spaces]
    try:
        inodes = {os.fstat(descriptor).st_ino for descriptor in held}
        _kill_all(name, inodes, deadline)
        for path in spaces:
            subprocess.run(["ip", "netns", "delete", path.name], check=True, capture_output=True)
        # Once more: something may have entered between the last look and the removal of the name.
        _kill_all(name, inodes, deadline)
    finally:
        for descriptor in held:
            os.close(descriptor)
    directory = LABS / name
    _remove_cgroups(name, deadline)
    for mount in mounts_under(directory):
        subprocess.run(["umount", "-l", mount], check=True, capture_output=True)
    while directory.exists():
        try:
            shutil.rmtree(directory)
        except OSError as error:  # a process outside the namespaces still writes its log there
            if error.errno != errno.ENOTEMPTY or time.monotonic() >= deadline:
                raise
            time.sleep(0.05)


def _kill_all(name: str, inodes: Collection[int], deadline: float) -> None:
    while found := processes_of(name, inodes):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"lab {name}: these processes survive SIGKILL: {found}")
        time.sleep(0.01)


def _remove_cgroups(name: str, deadline: float) -> None:
    """Remove the cgroups of a lab's containers, which end with their Docker engine: it was init to them."""
    while found := cgroups_of(name):
        for folder in found:
            with contextlib.suppress(OSError):  # something in it is still ending
                folder.rmdir()
        if time.monotonic() > deadline and (left := cgroups_of(name)):
            raise TimeoutError(f"lab {name}: these cgroups can't be removed: {[str(folder) for folder in left]}")
        time.sleep(0.01)


def cgroup_name(name: str) -> str:
    """Return the name of the cgroup under which a lab's containers have theirs."""
    return f"vmherd-{name}"


def cgroups_of(name: str) -> list[Path]:
    """Return the cgroups of a lab's containers, in all hierarchies, innermost first."""
    parents = [path for pattern in ("", "*/") for path in CGROUPS.glob(f"{pattern}{cgroup_name(name)}")]
    return sorted((folder for parent in parents for folder in (parent, *_folders(parent))), reverse=True)


def _folders(parent: Path) -> list[Path]:
    return [Path(folder) for folder, _, _ in os.walk(parent) if folder != str(parent)]


def processes_of(name: str, inodes: Collection[int] | None = None) -> dict[int, str]:
    """Return the living processes of a lab: process id to command line. The calling process is left out.

    Args:
        name: The lab.
        inodes: Inode numbers of its network namespaces; by default those that have a name now.
    """
    if inodes is None:
        inodes = {path.stat().st_ino for path in namespaces_of(name)}
    runs = {_identity(path) for path in (LABS / name).glob("*/run")}
    found = {}
    for process in processes():
        # Processes come and go while we look; a zombie has no namespaces any more and counts as gone.
        with contextlib.suppress(OSError):
            if (process / "ns/net").stat().st_ino in inodes or (runs and _identity(process / "root/run") in runs):
                found[int(process.name)] = command_line(int(process.name))
    found.pop(os.getpid(), None)
    return found


def processes() -> list[Path]:
    """Return the folders in /proc of all processes there are just now."""
    return [path for path in Path("/proc").iterdir() if path.name.isdigit()]


def namespaces_of(name: str) -> list[Path]:
    """Return the files under `/run/netns` of a lab's network namespaces, sorted."""
    return sorted(NETNS.glob(f"vmherd.{name}.*"))


def mounts_under(directory: Path) -> list[str]:
    """Return this mount namespace's mount points at or under `directory`, innermost first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((p for p in points if Path(p).is_relative_to(directory)), reverse=True)


def leftovers(name: str) -> list[str]:
    """Return what exists of a lab, each as a line for a person; empty after a complete teardown."""
    found = [f"process {pid}: {line}" for pid, line in processes_of(name).items()]
    found += [f"namespace {path.name}" for path in namespaces_of(name)]
    found += [f"cgroup {folder}" for folder in cgroups_of(name)]
    found += [f"mount {point}" for point in mounts_under(LABS / name)]
    found += [f"directory {LABS / name}"] if (LABS / name).exists() else []
    return found


def lab_names() -> list[str]:
    """Return the names of all labs of which something exists, sorted."""
    folders = {path.name for path in LABS.iterdir() if path.is_dir()} if LABS.exists() else set()
    return sorted(folders | {path.name.split(".")[1] for path in NETNS.glob("vmherd.*.*")})


def owner_of(name: str) -> int | None:
    """Return the process id of a lab's living owner, or None if the lab has none (any more)."""
    try:
        owner = json.loads((LABS / name / OWNER_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    pid = int(owner["pid"])
    return pid if started_at(pid) == owner["started_at"] else None


def write_owner(name: str) -> None:
    """Record this process as the owner of a lab."""
    record = {"pid": os.getpid(), "started_at": started_at(os.getpid())}
    (LABS / name / OWNER_FILE).write_text(json.dumps(record))


def started_at(pid: int) -> int | None:
    """Return when a process was started, in clock ticks since boot; with its id this names it for ever. None: gone."""
    fields = _status_fields(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else None


def process_state(pid: int) -> str:
    """Return a process's state as in proc(5): "R", "S", "D", "T" (stopped), "Z" ...; "" if there is none."""
    return next(iter(_status_fields(pid)), "")


def freeze(pid: int, timeout: float = 10.0) -> None:
    """Stop a process (SIGSTOP), and return once it has stopped, which is some time after the signal was sent.

    Raises:
        ProcessLookupError: There is no such process, or it ended.
        TimeoutError: It did not stop.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + timeout
    while (state := process_state(pid)) != "T":
        if state in ("", "Z"):
            raise ProcessLookupError(f"process {pid} ended")
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} does not stop")
        time.sleep(0.001)


def _status_fields(pid: int) -> list[str]:
    try:
        # The command, in parentheses, may hold spaces and parentheses itself.
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def command_line(pid: int) -> str:
    """Return a process's command line, its arguments joined by spaces; empty if it is gone."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


@contextlib.contextmanager
def lab_lock() -> Iterator[None]:
    """Hold the one lock of all labs: teardowns take turns, and `ip netns add` races with itself on a fresh machine."""
    LABS.mkdir(parents=True, exist_ok=True)
    with (LABS / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def main() -> int:
    """Remove the labs that the command line names; the exit code says whether all of it went."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.cleanup", description="Remove labs.")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="all labs, those in use too")
    parser.add_argument("--dead", action="store_true", help="labs whose owner is gone")
    chosen = parser.parse_args()
    names = set(chosen.names)
    if chosen.all or chosen.dead:
        names |= {name for name in lab_names() if chosen.all or owner_of(name) is None}
    if not names and not (chosen.all or chosen.dead):
        parser.error("name a lab, or say --all or --dead; there are: " + (" ".join(lab_names()) or "none"))
    remaining = []
    for name in sorted(names):
        tear_down(name)
        print(f"removed {name}")
        remaining += leftovers(name)
    print("\n".join(remaining), end="")
    return 1 if remaining else 0


if __name__ == "__main__":
    sys.exit(main())
