"""Runs fence agents, and believes no more than what they read back.

An agent that exits with 0 after `off` has said that it tried. Evidence is a later `status` which exits with 2 *and*
prints OFF, both as ClusterLabs' library does it: usage errors exit with 2 as well, and a broken agent prints anything.
Whatever else comes is a problem with a message, never evidence. The state is read from standard output, all of it, and
from nothing else: on standard error there are warnings, which may have the words in them too. People are shown both.

Options go to the agent's standard input, so no password shows in the list of processes; it is also taken out of what
an agent prints before anyone sees that. An agent runs in a process group of its own, which is killed as a whole when it
takes too long: `ipmitool` hangs below `fence_ipmilan`, not in it.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Final, Protocol

from orchestrator.resources.fencing import Bmc

_PATH = "/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/sbin:/bin"
_READ_AT_MOST = 4096
_SHOWN_AT_MOST = 300
_STATUS_ON, _STATUS_OFF = 0, 2
"""Exit codes of `action=status` (fence-agents, fencing.py)."""


class Power(StrEnum):
    """What a BMC says of its host's power."""

    ON = "on"
    OFF = "off"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one call.

    Attributes:
        power: As it was read; UNKNOWN for anything that is not plainly on or off.
        problem: Why it is not known, or why a command failed; empty when all is well.
    """

    power: Power
    problem: str = ""


class PowerSwitch(Protocol):
    """Reads and switches a host's power."""

    def status(self, bmc: Bmc) -> Answer:
        """Read the power."""
        ...

    def switch(self, bmc: Bmc, *, on: bool) -> str:
        """Have the power switched; give the problem, or an empty string, which does not mean that it is done."""
        ...


_OUR_OPTIONS: Final = {"power_wait": "0"}
"""All agents know it. Some wait for 2 s after each `off`; the power is read back here anyway, until it is off."""


class FenceAgents:
    """The agents of this machine.

    Args:
        environment: Where passwords are looked for; by default this process's own.
        path: Where agents are looked for.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, path: str = _PATH) -> None:
        self._environment = os.environ if environment is None else environment
        self._path = path

    def status(self, bmc: Bmc) -> Answer:
        """Read the power."""
        done = self._run(bmc, "status")
        if isinstance(done, str):
            return Answer(Power.UNKNOWN, done)
        words = set(re.findall(r"[A-Z]+", done.text.upper())) if done.is_whole else set()
        if done.code == _STATUS_ON and "ON" in words and "OFF" not in words:
            return Answer(Power.ON)
        if done.code == _STATUS_OFF and "OFF" in words and "ON" not in words:
            return Answer(Power.OFF)
        return Answer(Power.UNKNOWN, f"{bmc.agent} says neither on nor off: {done}")

    def switch(self, bmc: Bmc, *, on: bool) -> str:
        """Have the power switched. What came of it is to be read."""
        action = "on" if on else "off"
        done = self._run(bmc, action)
        if isinstance(done, str):
            return done
        return "" if done.code == 0 else f"{bmc.agent} action={action}: {done}"

    def _run(self, bmc: Bmc, action: str) -> "_Done | str":
        """Run an agent; a string is the problem that kept it from ending."""
        program = shutil.which(bmc.agent, path=self._path)
        if program is None:
            return f"no fence agent {bmc.agent} on this machine: install it (fence-agents), or correct its name"
        try:
            password = self._password(bmc)
        except OSError as error:
            return f"password of {bmc.agent}: {error.filename}: {error.strerror}"
        except (KeyError, UnicodeDecodeError) as error:
            return f"password of {bmc.agent}: {error}"
        lines = [f"{name}={value}" for name, value in sorted((_OUR_OPTIONS | bmc.options).items())]
        lines += [f"password={password}"] if password else []
        given = "\n".join([*lines, f"action={action}", ""])
        # Files, not pipes: what an agent left behind may hold a pipe open for ever.
        with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as warned:
            try:
                process = subprocess.Popen(
                    [program],
                    stdin=subprocess.PIPE,
                    stdout=told,
                    stderr=warned,
                    start_new_session=True,
                    env={"PATH": self._path, "LC_ALL": "C.UTF-8", "HOME": "/nonexistent"},
                )
            except OSError as error:
                return f"{bmc.agent}: {error.strerror}"
            try:
                process.communicate(given.encode(), timeout=bmc.timeout_s)
            except subprocess.TimeoutExpired:
                return f"{bmc.agent} action={action} did not end within {bmc.timeout_s:g} s, and was killed"
            except BrokenPipeError:
                process.wait()
            finally:
                _end_group(process)
            text, warnings = _read(told, password), _read(warned, password)
            is_whole = told.seek(0, os.SEEK_END) <= _READ_AT_MOST
        return _Done(process.returncode, text, warnings, is_whole)

    def _password(self, bmc: Bmc) -> str:
        if bmc.password_file:
            text = Path(bmc.password_file).read_text().strip()
        elif bmc.password_env:
            if bmc.password_env not in self._environment:
                raise KeyError(f"variable {bmc.password_env} is not set")
            text = self._environment[bmc.password_env]
        else:
            return ""
        if not text or "\n" in text:
            raise KeyError(f"{bmc.password_file or bmc.password_env} is empty, or has several lines")
        return text


@dataclass(frozen=True, slots=True)
class _Done:
    """How an agent ended.

    Attributes:
        text: The begin of what it printed on standard output.
        warnings: Likewise on standard error.
        is_whole: `text` is all of it: nothing that contradicts it comes later.
    """

    code: int
    text: str
    warnings: str
    is_whole: bool

    def __str__(self) -> str:
        parts = [part for part in (_printable(self.text), _printable(self.warnings)) if part]
        at_most = _SHOWN_AT_MOST // max(1, len(parts))
        shown = [part if len(part) <= at_most else f"{part[: at_most - 1]}…" for part in parts]
        said = " / ".join(shown) or "(nothing printed)"
        how = f"exit code {self.code}" if self.code >= 0 else f"killed by signal {-self.code}"
        return f"{how}: {said}"


def _read(file: IO[bytes], password: str) -> str:
    file.seek(0)
    text = file.read(_READ_AT_MOST).decode(errors="replace")
    return text.replace(password, "***") if password else text


def _printable(text: str) -> str:
    """Give a text on one line, without what a terminal would take for commands."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill an agent and what it started; wait for the agent itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
