"""Flower in a browser, beside a simulated herd that moves VMs: who does what to which VM, and what waits where."""

import os
import signal
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from orchestrator.cli.simulated_herd import HerdDirectory
from orchestrator.queues import lifecycle_queue, migrate_queue
from orchestrator.store.connection import connect
from tests.browser.browsing import chromium, screenshot
from tests.browser.flower import Row, lengths, reading, rows, tasks
from tests.integration.test_simulated_herd import Herd
from tests.processes import Processes
from tests.redis_server import free_port
from tests.waiting import wait_until

NODES = ("node-1", "node-2", "node-3")
PASSWORD = "flower-of-the-test"
_LOOK_EVERY_S = 0.5
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    """Three nodes and six VMs, whose migrations take some seconds."""
    herd = Herd(tmp_path_factory.mktemp("herd"))
    try:
        herd.ok("up", "--simulated", "3", "--vms", "6", "--memory", "4Gi", "--detach")
        yield herd
    finally:
        herd.down()


@pytest.fixture(scope="module")
def flower(herd: Herd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Flower beside it, as `vmherd run flower` starts it; gives its address."""
    port = free_port()
    url = HerdDirectory(herd.path).redis_url
    settings = {"VMHERD_FLOWER_PASSWORD": PASSWORD, "VMHERD_FLOWER_PORT": str(port)}
    with Processes(url, tmp_path_factory.mktemp("flower"), **settings) as processes:
        processes.run("flower", "flower")
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, flower: str) -> Iterator[Page]:
    with reading(browser, flower, PASSWORD) as page:
        yield page


def test_nobody_sees_it_without_the_password(browser: Browser, page: Page, flower: str) -> None:
    page.goto("/")
    stranger = browser.new_context(base_url=flower)
    try:
        for path in ("/", "/tasks", "/broker", "/api/tasks"):
            assert stranger.request.get(path).status == 401, path
    finally:
        stranger.close()


def test_each_task_shows_its_vm_its_operation_and_its_node_while_vms_move(herd: Herd, page: Page) -> None:
    page.goto("/")

    def workers() -> set[str]:
        page.goto("/workers")
        page.wait_for_selector("#workers-table tbody tr td")
        return {row[0] for row in rows(page, "#workers-table")}

    expected = {f"{role}@{node}" for node in NODES for role in ("migrate", "lifecycle")}
    wait_until(
        lambda: all(any(name in shown for shown in workers()) for name in expected),
        60,
        lambda: f"workers by node: {workers()}",
        interval=_LOOK_EVERY_S,
    )
    before = {vm: herd.node_of(vm) for vm in herd.phases()}
    movers = {node: next(vm for vm in sorted(before) if before[vm] == node) for node in NODES}
    names = herd.ok("evict", *movers.values(), "--no-wait").split()
    assert len(names) == len(NODES)

    def moves(state: str = "") -> dict[str, Row]:
        """By VM, the migrations that Flower lists."""
        listed = [row for row in tasks(page, "node.migrate") if row.state.startswith(state)]
        return {vm: row for vm in movers.values() for row in listed if f"/{vm}'" in row.args}

    wait_until(lambda: moves("STARTED"), 60, lambda: f"one under way: {moves()}", interval=_LOOK_EVERY_S)
    page.screenshot(path=screenshot("flower-tasks-under-way"), full_page=True)
    wait_until(
        lambda: len(moves("SUCCESS")) == len(NODES), 120, lambda: f"all ended: {moves()}", interval=_LOOK_EVERY_S
    )
    page.screenshot(path=screenshot("flower-tasks"), full_page=True)
    shown = moves()
    for node, vm in movers.items():
        assert shown[vm].worker == f"migrate@{node}", "the source's own worker moved it"
        assert any(name in shown[vm].args for name in names), "the operation is named"
        assert herd.node_of(vm) != node
    listed = {row.name for row in tasks(page)}
    assert not listed & {"vmherd.reconcile", "vmherd.liveness", "vmherd.housekeeping"}, "ticks would leave no room"


def test_queue_lengths_are_those_of_redis_and_name_each_nodes(herd: Herd, page: Page) -> None:
    redis = connect(HerdDirectory(herd.path).redis_url)
    nodes_queues = {name for node in NODES for name in (migrate_queue(node), lifecycle_queue(node))}
    assert nodes_queues <= set(lengths(page))
    assert (HerdDirectory(herd.path).spec or pytest.fail("no herd")).password not in page.content()
    node = NODES[0]
    herd.wait(lambda: node in set(map(herd.node_of, herd.phases())), f"a VM on {node}")
    vm = next(vm for vm in sorted(herd.phases()) if herd.node_of(vm) == node)
    worker = herd.pid(f"migrate@{node}")
    os.kill(worker, signal.SIGSTOP)
    try:
        (name,) = herd.ok("evict", vm, "--no-wait").split()
        # The frozen worker has the first message on its connection; the one that reconcile sends again waits.
        queue = migrate_queue(node)
        wait_until(lambda: redis.llen(queue) == 1, 60, "a message waits", interval=_LOOK_EVERY_S)
        shown = lengths(page)
        assert shown[queue] == 1
        assert {other: shown[other] for other in nodes_queues - {queue}} == dict.fromkeys(nodes_queues - {queue}, 0)
        page.screenshot(path=screenshot("flower-broker"), full_page=True)
    finally:
        os.kill(worker, signal.SIGCONT)
    herd.wait(lambda: herd.get("vmop")[name]["phase"] == "Completed", "it goes on")
    wait_until(lambda: lengths(page)[queue] == 0, 30, interval=_LOOK_EVERY_S)
    redis.close()
