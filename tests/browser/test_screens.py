"""Each page of the console at 1440 and at 390 pixels: all of it can be read. A person looks at the screenshots too."""

import json
import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.browser.console import NARROW, NODES, SHOWN_MS, VMS, WIDE, Served, Visitor, serving, visiting

LONG = "a-name-that-somebody-chose-on-a-monday-morning-and-regrets-now"
VAST = ("vast-1", "vast-2")
pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two nodes with a VM each that fits nowhere else, a third that is lost, and a VM with a long name."""
    with serving(tmp_path_factory, "--simulated", "3", "--vms", "6", "--memory", "2Gi") as served:
        herd, console = served.herd, served.console
        template = json.loads(console.vmherd("get", "vm", "vm-1", "-o", "json"))["spec"]["domainTemplate"]
        herd.ok("sim", "power-off", "node-3")
        herd.wait(lambda: herd.run("fence", "confirm", "node-3", "--yes")[0] == 0, "its lease runs out")
        herd.wait(lambda: "node-3" not in herd.get("node") and herd.all_run(), "its VMs run elsewhere")
        for name, size, policy in [(one, "44Gi", "AlwaysOn") for one in VAST] + [(LONG, "1Gi", "AlwaysOff")]:
            spec = {"memory": {"size": size}, "cpu": {"cores": 1}, "runPolicy": policy, "domainTemplate": template}
            path = herd.state / f"{name}.json"
            kind = {"apiVersion": "virtualization.deckhouse.io/v1alpha2", "kind": "VirtualMachine"}
            path.write_text(json.dumps({**kind, "metadata": {"name": name}, "spec": spec}))
            herd.ok("create", "-f", str(path))
        herd.wait(lambda: {herd.node_of(one) for one in VAST} == {"node-1", "node-2"}, "the vast ones run")
        yield served


@pytest.fixture
def both(served: Served) -> Iterator[tuple[Visitor, Visitor]]:
    """Two people with screens of the two sizes, who do the same."""
    token = served.tokens["operator"]
    with (
        visiting(served.browser, served.console, token, WIDE) as wide,
        visiting(served.browser, served.console, token, NARROW) as narrow,
    ):
        yield wide, narrow


Both = tuple[Visitor, Visitor]


def each(both: Both, name: str, do: Callable[[Visitor, Page], object], *, whole: bool = True) -> None:
    """Have both do something, and look at what they see then."""
    for visitor in both:
        do(visitor, visitor.page)
        visitor.look(name, whole=whole)


def close_window(visitor: Visitor, page: Page) -> None:
    page.keyboard.press("Escape")
    expect(visitor.window()).to_be_hidden()


def test_the_page_to_sign_in(served: Served) -> None:
    for size in (WIDE, NARROW):
        with visiting(served.browser, served.console, served.tokens["viewer"], size) as visitor:
            visitor.page.get_by_role("button", name="Sign out").click()
            expect(visitor.page.get_by_label("API token")).to_be_visible()
            visitor.look("login")
            visitor.page.get_by_label("API token").fill("none")
            visitor.page.get_by_role("button", name="Sign in").click()
            expect(visitor.page.get_by_role("alert")).not_to_be_empty()
            visitor.look("login-refused")


def test_pages_at_rest_in_light_and_dark(both: Both) -> None:
    def overview(visitor: Visitor, page: Page) -> None:
        expect(page.get_by_role("img", name=re.compile("2 nodes"))).to_be_visible()
        expect(page.get_by_role("link", name="Flower")).to_have_attribute("href", "http://127.0.0.1:5555/")
        expect(page.get_by_role("region", name="The latest of it")).to_contain_text("node-3: fenced by")

    def dark(visitor: Visitor, page: Page) -> None:
        page.emulate_media(color_scheme="dark")
        expect(page.locator("body.body--dark")).to_be_visible()

    def vms(visitor: Visitor, page: Page) -> None:
        page.get_by_role("link", name="Virtual Machines", exact=True).click()
        expect(page.locator("tr[data-row]")).to_have_count(9)
        expect(page.locator("time[title]").first).not_to_be_empty()

    def nodes(visitor: Visitor, page: Page) -> None:
        page.get_by_role("link", name="Nodes of all groups", exact=True).click()
        expect(page.locator("tr[data-row]")).to_have_count(2)
        expect(page.get_by_role("heading", name="Taken out of the herd")).to_be_visible()
        for title in ("CPU reserved", "Memory reserved"):
            expect(visitor.cell("node-1", title)).to_contain_text("in use", timeout=2 * SHOWN_MS)

    each(both, "overview", overview)
    each(both, "overview-dark", dark)
    for visitor in both:
        visitor.page.get_by_role("button", name="Theme: auto").click()
        visitor.page.get_by_role("button", name="Theme: dark").click()
        expect(visitor.page.locator("body.body--light")).to_be_visible()
    each(both, "projects", lambda visitor, _: visitor.go("Projects"))
    for visitor in both:
        expect(visitor.page.locator("body.body--light")).to_be_visible()
    each(both, "project", lambda visitor, _: visitor.go("default"))
    each(both, "virtualization", lambda visitor, _: visitor.go("Virtualization"))
    each(both, "vms", vms)
    each(both, "system", lambda visitor, _: visitor.go("System"))
    each(both, "system-nodes", lambda visitor, _: visitor.go("Nodes"))
    each(both, "nodes-at-rest", nodes)


def test_the_page_of_a_vm_with_its_plot_and_its_windows(served: Served, both: Both) -> None:
    def menu(visitor: Visitor, page: Page) -> None:
        visitor.go(*VMS)
        visitor.open_menu("default/vm-1")

    def window(visitor: Visitor, page: Page) -> None:
        page.keyboard.press("Escape")  # a row that is drawn anew meanwhile may have closed it already
        expect(page.get_by_role("menuitem")).to_have_count(0)
        visitor.open_menu("default/vm-1")
        page.get_by_role("menuitem", name="Migrate").click()
        expect(visitor.window().get_by_label("Target node")).to_be_visible()

    def under_way(visitor: Visitor, page: Page) -> None:
        page.get_by_role("link", name="vm-1", exact=True).click()
        expect(page.get_by_role("heading", name="Conditions")).to_be_visible()
        expect(page.locator("table time").first).not_to_be_empty()

    def plot(visitor: Visitor, page: Page) -> None:
        expect(page.get_by_role("progressbar").first).to_have_attribute("aria-valuenow", "100")
        expect(page.get_by_role("img", name=re.compile("Data left"))).to_be_visible()
        expect(page.locator("tr[data-row=AgentReady]")).to_contain_text("True")

    each(both, "menu", menu, whole=False)
    each(both, "window", window, whole=False)
    for visitor in both:
        close_window(visitor, visitor.page)
    served.console.vmherd("evict", "vm-1", "--no-wait")
    each(both, "vm-migrating", under_way)
    each(both, "vm", plot)

    def long(visitor: Visitor, page: Page) -> None:
        visitor.go("Virtual Machines", LONG)
        expect(page.get_by_role("heading", name="Conditions")).to_be_visible()

    each(both, "vm-at-rest", long)


def test_a_drain_with_its_plan_what_does_not_fit_and_its_progress(served: Served, both: Both) -> None:
    def plan(visitor: Visitor, page: Page) -> None:
        visitor.go(*NODES)
        visitor.row("node-1").get_by_role("button", name="Cordon + Drain").click()
        expect(visitor.window().get_by_role("alert")).to_contain_text("vast")
        expect(visitor.window().get_by_role("button", name="Confirm")).to_be_disabled()

    def draining(visitor: Visitor, page: Page) -> None:
        bar = visitor.cell("node-1", "Status").get_by_role("progressbar", name="node-1, drained")
        expect(bar).not_to_have_attribute("aria-valuenow", "0", timeout=2 * SHOWN_MS)
        expect(visitor.cell("node-1", "VMs")).to_contain_text(re.compile("1$"), timeout=2 * SHOWN_MS)

    def uncordon(visitor: Visitor, page: Page) -> None:
        visitor.row("node-1").get_by_role("button", name="Uncordon").click()
        expect(visitor.window()).to_contain_text("Uncordon node-1?")
        expect(visitor.window().get_by_role("button", name="Cancel")).to_be_visible()

    wide, narrow = both
    each(both, "drain-plan-does-not-fit", plan, whole=False)
    close_window(narrow, narrow.page)
    wide.window().get_by_role("checkbox").click()
    wide.window().get_by_role("button", name="Confirm").click()
    expect(wide.window()).to_be_hidden()
    each(both, "nodes-draining", draining)
    each(both, "uncordon", uncordon, whole=False)
    for visitor in both:
        close_window(visitor, visitor.page)
    each(both, "overview-draining", lambda visitor, _: visitor.go("Overview"))
