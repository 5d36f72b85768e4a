"""Headless Chromium, as Debian has it, driven by Playwright; nothing is downloaded, and it reaches loopback only."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
SCREENSHOTS = Path(__file__).parents[2] / ".lab" / "screenshots"
"""Where the tests leave what they saw; not part of the repository."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser, and end it."""
    program = need_program("chromium", "chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(_QUIET))
        try:
            yield browser
        finally:
            browser.close()


def screenshot(name: str) -> Path:
    """Give the file of a screenshot."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return SCREENSHOTS / f"{name}.png"
