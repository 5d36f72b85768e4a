"""The console as a person has it: a browser on a server of the test's own, signed in with a token."""

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from orchestrator.cli.simulated_herd import HerdDirectory
from tests.browser.browsing import chromium, screenshot
from tests.integration.test_simulated_herd import Herd
from tests.processes import REPOSITORY, Processes
from tests.redis_server import free_port
from tests.waiting import wait_until

VMS = ("Projects", "default", "Virtualization", "Virtual Machines")
NODES = ("System", "Nodes", "Nodes of all groups")
WIDE, NARROW = (1440, 900), (390, 844)
SHOWN_MS = 60_000
"""A loaded machine takes its time."""
expect.set_options(timeout=SHOWN_MS)
_CLICKS = 5
_OPENS_MS = 10_000

_OVERFLOWING = """() => {
  const width = document.documentElement.clientWidth, found = [];
  for (const one of document.body.querySelectorAll('*')) {
    const box = one.getBoundingClientRect(), style = getComputedStyle(one);
    if (!box.width || !box.height || style.visibility === 'hidden' || box.right <= 0) continue;
    const scrolls = one.closest('.scroll, .sideways');
    if (scrolls && scrolls !== one) continue;
    if (box.right > width + 1 || box.left < -1) found.push(one.tagName + '.' + one.className + ' ' + box.right);
  }
  return found;
}"""

_TEXTS = """root => {
  const found = [], walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || parent.closest('[aria-hidden=true], script, style, .skip, .q-notifications')) continue;
    if (!parent.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const boxes = [...range.getClientRects()].filter(box => box.width > 1 && box.height > 1);
    if (boxes.length) found.push({parent, text: node.data.trim().slice(0, 60), boxes});
  }
  return found;
}"""
_ROOT = "document.querySelector('[role=dialog], .q-menu') || document.body"
_CUT_OFF = f"""() => {{
  const root = {_ROOT}, found = [];
  for (const {{parent, text, boxes}} of ({_TEXTS})(root)) {{
    if (parent.closest('[title]')) continue; // what is cut there is told in whole
    if (parent.closest('button') && boxes.length > 1) found.push(`${{text}} in ${{boxes.length}} lines`);
    let sideways = true, down = true;
    for (let one = parent; one && one !== document.body && (sideways || down); one = one.parentElement) {{
      const style = getComputedStyle(one), frame = one.getBoundingClientRect();
      if (style.display === 'contents' || style.display === 'inline') continue;
      if (['auto', 'scroll'].includes(style.overflowX)) {{
        const isRtl = style.direction === 'rtl', begin = isRtl ? frame.right : frame.left + one.scrollWidth;
        const end = begin - one.scrollLeft;
        const reached = box => box.right <= end + 1 && box.left >= end - one.scrollWidth - 1;
        if (sideways && !boxes.every(reached)) found.push(`${{text}} beyond where one can scroll`);
        sideways = false;
      }}
      if (['auto', 'scroll'].includes(style.overflowY)) down = false;
      const hides = way => ['hidden', 'clip'].includes(way);
      for (const box of boxes) {{
        const wide = box.right > frame.right + 1 || box.left < frame.left - 1;
        const high = box.bottom > frame.bottom + 2 || box.top < frame.top - 2;
        if ((sideways && hides(style.overflowX) && wide) || (down && hides(style.overflowY) && high)) {{
          found.push(`${{text}} in ${{one.tagName}}.${{one.className}}`);
        }}
      }}
    }}
  }}
  return [...new Set(found)];
}}"""
_OVERLAPPING = f"""() => {{
  const found = [], texts = ({_TEXTS})({_ROOT});
  const seen = (parent, box) => {{ // as much of it as no scrolling hides
    let {{left, right, top, bottom}} = box;
    for (let one = parent; one && one !== document.body; one = one.parentElement) {{
      if (getComputedStyle(one).overflowY === 'visible') continue;
      const frame = one.getBoundingClientRect();
      left = Math.max(left, frame.left), right = Math.min(right, frame.right);
      top = Math.max(top, frame.top), bottom = Math.min(bottom, frame.bottom);
    }}
    return {{left, right, top, bottom}};
  }};
  for (const one of texts) one.boxes = one.boxes.map(box => seen(one.parent, box));
  for (let i = 0; i < texts.length; i++) for (let k = i + 1; k < texts.length; k++) {{
    for (const a of texts[i].boxes) for (const b of texts[k].boxes) {{
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 2 && down > 4) found.push(`${{texts[i].text}} / ${{texts[k].text}}`);
    }}
  }}
  return [...new Set(found)];
}}"""
_RECORD = """key => {
  window.recorded = [];
  const note = () => {
    const row = document.querySelector(`tr[data-row="${key}"]`);
    if (row && window.recorded.at(-1) !== row.innerText) window.recorded.push(row.innerText);
  };
  new MutationObserver(note).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


class Console:
    """One server with the console, on a Redis that others use too.

    Args:
        processes: That stop it at the end.
        url: Of Redis.
        settings: Of its own.
    """

    def __init__(self, processes: Processes, url: str, name: str = "console", **settings: str) -> None:
        self.url = url
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._environment = {"VMHERD_REDIS_URL": url, **settings}
        self.log = processes.log_file(name)
        words = ("-m", "orchestrator.cli", "api", "--plain-http", "--port", str(self.port))
        self.process = processes.start(name, *words, **settings)

    def wait_ready(self) -> "Console":
        """Wait until it answers."""
        wait_until(self._is_ready, 120, lambda: f"the console answers: {self.log.read_text()[-2000:]}", interval=0.2)
        return self

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.address}/readyz", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    def vmherd(self, *words: str) -> str:
        """Run a command on its Redis."""
        done = subprocess.run(
            [str(REPOSITORY / ".venv/bin/vmherd"), *words],
            env={**os.environ, **self._environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    def token(self, name: str, role: str, *more: str) -> str:
        """Make a token, and wait until the server knows it."""
        text = self.vmherd("token", "create", name, "--role", role, *more).split()[-1]
        headers = {"authorization": f"Bearer {text}"}
        wait_until(lambda: httpx.get(f"{self.address}/api", headers=headers, timeout=10).status_code == 200, 30)
        return text


class Visitor:
    """Somebody with a token in a browser.

    Attributes:
        page: What they look at.
        trouble: What the browser complained of.
        asked: Addresses that the browser asked for something.
    """

    def __init__(self, browser: Browser, console: Console, token: str, size: tuple[int, int] = WIDE) -> None:
        self.console = console
        viewport: Mapping[str, int] = {"width": size[0], "height": size[1]}
        self.context: BrowserContext = browser.new_context(
            base_url=console.address,
            viewport=viewport,  # type: ignore[arg-type] # a TypedDict of Playwright's own
            timezone_id="Asia/Tokyo",
        )
        self.context.set_default_timeout(SHOWN_MS)
        self.page: Page = self.context.new_page()
        self.trouble: list[str] = []
        self.asked: set[str] = set()
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(request.url.split("/")[2]))
        self.page.goto("/console/")
        self.page.get_by_label("API token").fill(token)
        self.page.get_by_role("button", name="Sign in").click()
        expect(self.page.get_by_role("button", name="Sign out")).to_be_visible()

    def close(self) -> None:
        """Leave."""
        self.context.close()

    def go(self, *labels: str) -> Page:
        """Click one's way by the labels of links."""
        for label in labels:
            self._follow(self.page.get_by_role("link", name=label, exact=True))
            expect(self.page.get_by_role("heading", level=1)).to_be_visible()
        return self.page

    def _follow(self, link: Locator) -> None:
        """Click a link until another page is there: a click while its row is being drawn leads nowhere."""
        for _ in range(_CLICKS):
            self.page.evaluate("window.stays = true")
            link.click()
            with suppress(PlaywrightTimeout):
                self.page.wait_for_function("!window.stays", timeout=_OPENS_MS)
                return
        raise AssertionError(f"{link} led nowhere at {_CLICKS} clicks")

    def row(self, key: str) -> Locator:
        """Give a row of the list that is shown."""
        return self.page.locator(f'tr[data-row="{key}"]')

    def open_menu(self, key: str) -> None:
        """Open a row's "..." menu, as a person does: a click while the row is being drawn opens nothing."""
        for _ in range(_CLICKS):
            self.row(key).locator("button", has_text="...").click()
            with suppress(PlaywrightTimeout):
                self.page.get_by_role("menuitem").first.wait_for(timeout=_OPENS_MS)
                return
        raise AssertionError(f"the menu of {key} did not open at {_CLICKS} clicks")

    def cell(self, key: str, title: str) -> Locator:
        """Give a cell by its column's title."""
        return self.row(key).locator("td").filter(has=self.page.locator(f'.title:text-is("{title}")'))

    def record(self, key: str) -> None:
        """Write down from now on what a row says, in the browser itself: a slow test misses nothing."""
        self.page.evaluate(_RECORD, key)

    def percents(self) -> list[int]:
        """Give the different percentages that the row said since, in order."""
        said: list[str] = self.page.evaluate("window.recorded")
        found = [int(match[1]) for text in said if (match := re.search(r"(\d+) %", text))]
        return list(dict.fromkeys(found))

    def window(self) -> Locator:
        """Give the window that asks."""
        return self.page.get_by_role("dialog")

    def look(self, name: str, *, whole: bool = True) -> None:
        """Keep a screenshot (of the whole page, or what the screen shows), and see that all of it can be read.

        Nothing is wider than the screen, no text is cut off, and no text stands on another.
        """
        width = self.page.viewport_size["width"] if self.page.viewport_size else 0
        self.page.screenshot(path=screenshot(f"console-{name}-{width}"), full_page=whole, animations="disabled")
        for problem in (_OVERFLOWING, _CUT_OFF, _OVERLAPPING):
            found = self.page.evaluate(problem)
            assert found == [], f"{name} at {width} pixels: {found}"


@contextmanager
def visiting(browser: Browser, console: Console, token: str, size: tuple[int, int] = WIDE) -> Iterator[Visitor]:
    """Visit the console; nobody else was asked for anything, and the browser found nothing wrong."""
    visitor = Visitor(browser, console, token, size)
    try:
        yield visitor
        assert visitor.asked == {f"127.0.0.1:{console.port}"}, "all comes from the server itself"
        assert visitor.trouble == []
    except BaseException:
        failed = Path(screenshot("console-failed"))
        visitor.page.screenshot(path=failed, full_page=True)
        raise
    finally:
        visitor.close()


@dataclass(frozen=True, slots=True)
class Served:
    """What the tests of a file share."""

    herd: Herd
    console: Console
    browser: Browser
    tokens: dict[str, str]


@contextmanager
def serving(factory: pytest.TempPathFactory, *herd_of: str) -> Iterator[Served]:
    """Bring up a simulated herd, a server with a token for each role, and a browser.

    Args:
        factory: For their folders.
        herd_of: Arguments of `vmherd up`.
    """
    herd = Herd(factory.mktemp("herd"))
    try:
        herd.ok("up", *herd_of, "--detach")
        url = HerdDirectory(herd.path).redis_url
        folder = factory.mktemp("console")
        audit = {"VMHERD_AUDIT_LOG": str(folder / "audit.jsonl"), "VMHERD_FLOWER_URL": "http://127.0.0.1:5555/"}
        with Processes(url, folder) as processes, chromium() as browser:
            console = Console(processes, url, **audit).wait_ready()
            tokens = {role: console.token(role, role) for role in ("viewer", "operator", "admin")}
            yield Served(herd, console, browser, tokens)
    finally:
        herd.down()
