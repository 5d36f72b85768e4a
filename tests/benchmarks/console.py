"""The console before 1,000 nodes and 10,000 VMs: what a person waits for, in the browser.

Without a lab: a plain Redis, one `vmherd api` process with the console, and headless Chromium on the same machine.
First paint is from the click to the first row that can be read; a filter's reaction is from the last letter (the field
waits for 200 ms, in case more are typed) to the list that is right; a change's is from its commit to the cell that
shows it.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from playwright.sync_api import expect

from orchestrator.resources import Role, VirtualMachine, VmPhase
from orchestrator.services.context import Context
from orchestrator.services.tokens import create_token
from orchestrator.store import Store
from tests.benchmarks.figures import Figure, Result, typical
from tests.benchmarks.running import Bench
from tests.benchmarks.store_rate import Nobody
from tests.browser.browsing import chromium, screenshot
from tests.browser.console import NARROW, WIDE, Console, Visitor
from tests.builders import a_node, a_vm
from tests.processes import Processes
from tests.redis_server import RedisServer

NODES = 1_000
VMS = 10_000
_AT_A_TIME = 500
_TIMES = 5
_LIST = "/console/projects/default/virtualization/virtual-machines"
_PHASES = (VmPhase.RUNNING,) * 9 + (VmPhase.STOPPED,)


def run(bench: Bench) -> Result:
    """Measure it."""
    result = Result("console", f"the console in headless Chromium, {NODES:,} nodes and {VMS:,} VMs")
    with tempfile.TemporaryDirectory(prefix="vmherd-bench-") as name:
        folder = Path(name)
        server = RedisServer(folder / "redis")
        server.start()
        store = Store.open(server.url)
        try:
            bench.say(f"console: {NODES:,} nodes and {VMS:,} VMs are stored")
            _populate(store)
            _, token = create_token(Context(store, Nobody()), "bench", Role.OPERATOR)
            with Processes(server.url, folder) as processes, chromium() as browser:
                console = Console(processes, server.url, VMHERD_LOG_LEVEL="ERROR").wait_ready()
                visitor = Visitor(browser, console, token, WIDE)
                result.tables["lists"] = [*_paint(visitor), *_filter(visitor), _change(visitor, store)]
                narrow = Visitor(browser, console, token, NARROW)
                narrow.page.goto(_LIST)
                expect(narrow.page.locator("tr[data-row]")).to_have_count(50)
                narrow.page.screenshot(path=screenshot("console-bench-vms-390"))
                narrow.close()
                visitor.close()
        finally:
            store.close()
            server.kill()
    return result


def _populate(store: Store) -> None:
    for first in range(0, NODES, _AT_A_TIME):
        batch = store.batch()
        for number in range(first, first + _AT_A_TIME):
            batch.create(a_node(f"node-{number:04}", cpu=16, memory_mib=65_536))
        store.must_commit(batch)
    for first in range(0, VMS, _AT_A_TIME):
        batch = store.batch()
        for number in range(first, first + _AT_A_TIME):
            address = f"10.0.{number // 250}.{number % 250}"
            phase = _PHASES[number % len(_PHASES)]
            batch.create(a_vm(f"vm-{number:05}", node=f"node-{number % NODES:04}", phase=phase, ip_address=address))
        store.must_commit(batch)


def _timed(do: Callable[[], Any], shown: Callable[[], Any]) -> float:
    began = time.perf_counter()
    do()
    shown()
    return time.perf_counter() - began


def _paint(visitor: Visitor) -> list[Figure]:
    page, figures = visitor.page, []
    pages: tuple[tuple[str, str, str], ...] = (
        ("virtual machines", _LIST, "tr[data-row]"),
        ("nodes", "/console/system/nodes/all", "tr[data-row]"),
        ("overview", "/console/", ".node-map i"),
    )
    for title, path, wanted in pages:
        times = [_timed(partial(page.goto, path), page.locator(wanted).first.wait_for) for _ in range(_TIMES + 1)]
        page.screenshot(path=screenshot(f"console-bench-{title.replace(' ', '-')}-1440"))
        figures += [
            Figure(f"first paint: {title}, the first time", times[0], "s"),
            typical(f"first paint: {title}, later", times[1:], "s"),
        ]
    return figures


def _filter(visitor: Visitor) -> list[Figure]:
    page = visitor.page
    page.goto(_LIST)
    rows, field = page.locator("tr[data-row]"), page.get_by_label("Search by name or IP address")
    expect(rows).to_have_count(50)
    narrowing, widening = [], []
    for number in range(_TIMES):
        name = f"vm-{VMS - 1 - number:05}"
        one = visitor.row(f"default/{name}")
        narrowing.append(_timed(partial(field.fill, name), one.wait_for))
        whole = visitor.row("default/vm-00000")
        widening.append(_timed(partial(field.fill, ""), whole.wait_for))
    pages = [
        _timed(
            page.get_by_role("button", name="Next").click, visitor.row(f"default/vm-{50 * (number + 1):05}").wait_for
        )
        for number in range(_TIMES)
    ]
    return [
        typical("search to one of 10,000", narrowing, "s"),
        typical("search taken back", widening, "s"),
        typical("next page", pages, "s"),
    ]


def _change(visitor: Visitor, store: Store) -> Figure:
    visitor.page.goto(_LIST)
    cell, times = visitor.cell("default/vm-00001", "Phase"), []
    expect(cell).to_contain_text("Running")
    for phase in (VmPhase.MIGRATING, VmPhase.RUNNING) * 3:
        vm = store.get(VirtualMachine, "default/vm-00001")
        batch = store.batch().put(vm, vm.with_status(phase=phase))
        shown = cell.filter(has_text=phase.value)
        times.append(_timed(partial(store.must_commit, batch), shown.wait_for))
    return typical("a change, from its commit to the page", times, "s")
