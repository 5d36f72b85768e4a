"""What a test needs of the machine. A lack is an error in CI, and a skip with its reason on a person's machine."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

MUST_RUN_IN_CI = ("integration", "lab", "browser", "kubectl")
"""Marks of tests that lean on the machine; in CI none of them may be skipped, for whatever reason."""


def is_ci() -> bool:
    """Whether this run is CI's: `CI` is set to something other than false."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false", "no")


def lacking(reason: str) -> NoReturn:
    """End the test for want of something: failed in CI, skipped elsewhere."""
    if is_ci():
        pytest.fail(f"{reason} (a skip elsewhere, an error in CI)", pytrace=False)
    pytest.skip(reason)


def need_program(name: str, package: str) -> Path:
    """Find a program on PATH, or in the folders of root's PATH.

    Args:
        name: The program: `redis-server`.
        package: Debian's package that has it, for the message.
    """
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin")
    if path is None:
        lacking(f"no program {name}: install {package}, or run tools/setup.sh")
    return Path(path)


def need_root(what: str) -> None:
    """Go on only as root.

    Args:
        what: What root is needed for: `network namespaces`.
    """
    if os.geteuid() != 0:
        lacking(f"not root, which {what} need")


def need_kubectl() -> Path:
    """Find kubectl, 1.27 or newer."""
    path = shutil.which("kubectl")
    where = "get one of 1.27 or newer from https://kubernetes.io/docs/tasks/tools/ and put it on PATH"
    if path is None:
        lacking(f"no program kubectl: {where}")
    said = subprocess.run([path, "version", "--client", "-o", "json"], capture_output=True, text=True, check=False)
    found = re.search(r'"gitVersion": *"v(\d+)\.(\d+)', said.stdout)
    if found is None or (int(found[1]), int(found[2])) < (1, 27):
        lacking(f"{path} is {found[0] if found else 'of an unknown version'}: {where}")
    return Path(path)
