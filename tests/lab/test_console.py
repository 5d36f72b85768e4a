"""The platform's web instructions, followed click by click in a browser, on real hosts and guests."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.browsing import chromium
from tests.browser.console import SHOWN_MS, Console, Visitor, visiting
from tests.lab import outside
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.observer import DoubleRunObserver
from tests.processes import Processes
from tests.waiting import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.timeout(400)]
SETTINGS = {"VMHERD_BANDWIDTH_MIB_S": "40"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def console(module_herd: LabHerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """A server that reaches the lab's Redis from outside."""
    folder = tmp_path_factory.mktemp("console")
    with Processes(module_herd.redis.url, folder) as processes:
        yield Console(processes, module_herd.redis.url).wait_ready()


@pytest.fixture
def person(browser: Browser, console: Console, request: pytest.FixtureRequest) -> Iterator[Visitor]:
    token = console.token(request.node.name.replace("_", "-")[:40].strip("-"), "operator")
    with visiting(browser, console, token) as visitor:
        yield visitor


def placed(herd: LabHerd, guest: Guest) -> str:
    return herd.cluster.vm(guest.name).status.node_name


def test_the_migration_guide(herd: LabHerd, person: Visitor) -> None:
    guest = herd.lab.guest("linux-vm", address="192.0.2.101", dirty_mib_s=2, working_set_mib=16)
    doubles = DoubleRunObserver(herd.lab)
    herd.start_guests((guest, "h1"))
    before = guest.wait_ticks(1)

    # Go to "Projects", select the project, then "Virtualization" -> "Virtual Machines".
    page = person.go("Projects", "default", "Virtualization", "Virtual Machines")
    expect(person.cell("default/linux-vm", "Node")).to_contain_text("h1")
    expect(person.cell("default/linux-vm", "IP address")).to_contain_text(guest.address)

    def choose_migrate() -> None:
        """Select the VM in the list, click its "...", and choose "Migrate"."""
        person.open_menu("default/linux-vm")
        page.get_by_role("menuitem", name="Migrate", exact=True).click()
        expect(person.window()).to_be_visible()

    # Confirm or cancel in the window.
    choose_migrate()
    person.window().get_by_role("button", name="Cancel").click()
    expect(person.window()).to_be_hidden()
    assert not [o for o in herd.cluster.operations() if o.spec.type.is_migration]
    person.record("default/linux-vm")
    choose_migrate()
    person.window().get_by_role("button", name="Confirm").click()
    expect(person.cell("default/linux-vm", "Node")).not_to_contain_text("h1", timeout=2 * SHOWN_MS)
    expect(person.cell("default/linux-vm", "Phase")).to_have_text(re.compile("Running$"))
    assert len(person.percents()) > 2, f"it moves while one looks: {person.percents()}"
    node = placed(herd, guest)
    assert node in {"h2", "h3"}
    expect(person.cell("default/linux-vm", "Node")).to_contain_text(node)
    page.get_by_role("link", name="linux-vm", exact=True).click()
    expect(page.get_by_role("progressbar").first).to_have_attribute("aria-valuenow", "100")
    person.look("lab-vm")
    after = guest.wait_ticks(1)
    assert (after.boot_id, guest.trouble()) == (before.boot_id, "")
    doubles.check()
    outside.assert_runs_once(herd, guest, node)


def test_maintenance_mode(herd: LabHerd, person: Visitor) -> None:
    guests = [herd.lab.guest(name, address=f"192.0.2.{101 + number}") for number, name in enumerate(("a", "b"))]
    herd.start_guests(*((guest, "h1") for guest in guests))

    # "System" -> "Nodes" -> "Nodes of all groups"; select the node, click "Cordon + Drain".
    person.go("System", "Nodes", "Nodes of all groups")
    drain = person.row("h1").locator("button", has_text="Cordon + Drain")
    drain.click()
    for guest in guests:
        expect(person.window()).to_contain_text(f"default/{guest.name}")
    person.window().get_by_role("button", name="Cancel").click()
    expect(person.window()).to_be_hidden()
    assert [placed(herd, guest) for guest in guests] == ["h1", "h1"]
    drain.click()
    person.window().get_by_role("button", name="Confirm").click()
    expect(person.cell("h1", "Status")).to_contain_text("SchedulingDisabled")
    expect(person.cell("h1", "Status")).to_contain_text("Drained", timeout=3 * SHOWN_MS)
    person.look("lab-nodes")
    for guest in guests:
        node = placed(herd, guest)
        assert node in {"h2", "h3"}
        outside.assert_runs_once(herd, guest, node)
        assert guest.trouble() == ""

    # Click "Uncordon": the node takes VMs again.
    person.row("h1").locator("button", has_text="Uncordon").click()
    person.window().get_by_role("button", name="Confirm").click()
    expect(person.cell("h1", "Status")).not_to_contain_text("SchedulingDisabled")
    wait_until(lambda: herd.cluster.node("h1").is_schedulable, 30)
