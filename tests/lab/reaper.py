"""Reaps the lab's dead QEMUs at once, as a host's init does.

libvirtd leaves its QEMUs to init, and waits for their end: on a machine whose PID 1 reaps slowly (measured here: 1.2 to
2.0 s) each destroy and each migration takes that much longer than it does on a real host. So the process that owns the
lab becomes their reaper ("child subreaper"). It reaps only what it did not start itself.
"""

import ctypes
import os
import threading
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_EVERY_S = 0.02
_OURS = "qemu"
_libc = ctypes.CDLL(None, use_errno=True)
_started = threading.Lock()


def reap_qemus() -> None:
    """Begin to reap, for the rest of this process's life; the second call does nothing."""
    if not _started.acquire(blocking=False):
        return
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    threading.Thread(target=_reap, name="reaper", daemon=True).start()


def _reap() -> None:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    wait = threading.Event()
    while True:
        for pid in map(int, children.read_text().split()):
            if _is_dead_qemu(pid):
                os.waitpid(pid, os.WNOHANG)
        wait.wait(_LOOK_EVERY_S)


def _is_dead_qemu(pid: int) -> bool:
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return False  # somebody was faster
    return rest.split()[0] == "Z" and name.startswith(_OURS)
