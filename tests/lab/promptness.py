"""Real-time priority, as `vmherd-heartbeat.service` and hardware have it, on a machine that many tests share."""

import contextlib
import os
import shutil
import subprocess

PRIORITY = 50
"""CPUSchedulingPriority of the units."""


def be_prompt(priority: int = PRIORITY) -> None:
    """Have this thread run before all others, and none that it begins as a process of its own.

    Where a sandbox does not permit it, tests go on, and depend more on what else the machine does.
    """
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(priority))


def prompt_prefix() -> list[str]:
    """Give what is put before a command so that it is prompt; empty where that is not permitted."""
    prefix = [shutil.which("chrt") or "chrt", "--rr", str(PRIORITY)]
    return prefix if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0 else []
