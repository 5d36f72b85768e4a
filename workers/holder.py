"""Who holds a node's grants: one worker process a role, known by a pid file that it keeps locked for life.

The lock makes "one migration slot a node" true of processes too. The file lets the agent kill the holder of a suspect
grant: a paused process can't be stopped between its check and its call in any other way.
"""

import fcntl
import os
import select
import signal
import time
from pathlib import Path

from orchestrator.errors import Refused
from orchestrator.logs import logger
from orchestrator.settings import settings

log = logger(__name__)

_YOUNG_GRANTS = 3
"""In times that a grant lives unreported: a process younger than that can't be the reason of this one's silence."""

_held: list[int] = []


def pid_file(role: str) -> Path:
    """Where the worker of a role writes who it is."""
    return settings().state_dir / f"{role}.pid"


def hold(role: str) -> str:
    """Become the holder of a role on this node, until this process ends.

    Returns:
        The holder's name, unique for this process: `pid@start time`.

    Raises:
        Refused: Another process is.
    """
    path = pid_file(role)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 100, 0).decode()
        os.close(descriptor)
        raise Refused(f"another {role} worker of this node runs (process {owner}, {path})") from None
    name = f"{os.getpid()}@{_start_time(os.getpid())}"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, name.encode(), 0)
    _held.append(descriptor)  # kept open: closing it would release the lock
    return name


def kill(role: str, claimed_by: str) -> None:
    """Kill the process that holds, or may hold, a suspect grant; returns when it is gone.

    That is the one that claimed it. Where no claim is known (none was made, or a failover of Redis lost it), it is the
    role's worker, unless that has just been started: a worker that is killed whenever it is slow to start never gets to
    work. The grant was withdrawn before this is called, so nobody can claim it any more.

    Args:
        role: Whose worker executes such grants.
        claimed_by: Name of the process that claimed the grant, empty if none is known.
    """
    try:
        name = pid_file(role).read_text()
    except FileNotFoundError:
        return
    if claimed_by != name and (claimed_by or _age_s(name) < _YOUNG_GRANTS * settings().grant_ttl):
        return
    pid_text, _, started = name.partition("@")
    if not pid_text.isdigit():
        return
    pid = int(pid_text)
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _start_time(pid) != started:
            return  # the pid was given to another process
        log.warning("killing the holder of a suspect grant", role=role, pid=pid)
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        select.select([descriptor], [], [])  # readable when the process is gone; SIGKILL can't be refused
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def _age_s(name: str) -> float:
    """Seconds since a process started."""
    started = name.partition("@")[2]
    if not started.isdigit():
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK")


def _start_time(pid: int) -> str:
    """Field 22 of /proc/PID/stat: ticks since boot; with the pid it names one process for ever."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return ""
    return stat.rpartition(")")[2].split()[19]
