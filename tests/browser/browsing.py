"""Headless Chromium, as Debian has it, driven by Playwright; nothing is downloaded, and it reaches loopback only."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import Browser, sync_playwright

from tests.requirements import need_program

_QUIET = (
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SCREENSHOTS = Path(__file__).parents[2] / ".lab" / "screenshots"
"""Where the tests leave what they saw; not part of the repository."""


@contextmanager
def chromium(*, namespace: Path | None = None, address: str = "127.0.0.1") -> Iterator[Browser]:
    """Start a browser, and end it.

    Args:
        namespace: Of the network in which it is; by default this process's.
        address: The only one that it reaches.
    """
    program = need_program("chromium", "chromium")
    quiet = [*_QUIET, f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {address}"]
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        if namespace is not None:
            inside = Path(folder) / "chromium"
            inside.write_text(f'#!/bin/sh\nexec nsenter --net={namespace} -- {program} "$@"\n')
            inside.chmod(0o755)
            program = inside
        browser = playwright.chromium.launch(executable_path=program, args=quiet)
        try:
            yield browser
        finally:
            browser.close()


def screenshot(name: str) -> Path:
    """Give the file of a screenshot."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return SCREENSHOTS / f"{name}.png"
