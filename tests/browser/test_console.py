"""The console in a browser, beside a simulated herd: what one sees, what one clicks, and who may."""

import re
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import expect

from tests.browser.console import NODES, SHOWN_MS, VMS, Served, Visitor, serving, visiting

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three nodes and six VMs, whose migrations take some seconds, a server, and a browser."""
    with serving(tmp_path_factory, "--simulated", "3", "--vms", "6", "--memory", "4Gi") as served:
        yield served


@pytest.fixture
def operator(served: Served) -> Iterator[Visitor]:
    with visiting(served.browser, served.console, served.tokens["operator"]) as visitor:
        yield visitor


@pytest.fixture
def viewer(served: Served) -> Iterator[Visitor]:
    with visiting(served.browser, served.console, served.tokens["viewer"]) as visitor:
        yield visitor


def test_a_vm_is_migrated_by_its_menu_and_its_progress_is_seen(served: Served, operator: Visitor) -> None:
    page = operator.go(*VMS)
    before = operator.cell("default/vm-1", "Node").inner_text().split()[-1]

    def choose(label: str) -> None:
        operator.open_menu("default/vm-1")
        page.get_by_role("menuitem", name=label).click()
        expect(operator.window()).to_contain_text(f"{label} vm-1?")

    choose("Migrate")
    operator.window().get_by_role("button", name="Cancel").click()
    expect(operator.window()).to_be_hidden()
    choose("Migrate")
    page.keyboard.press("Escape")
    expect(operator.window()).to_be_hidden()
    assert [name for name in served.herd.get("vmop") if name.startswith("migrate-")] == [], "cancelled is not done"

    operator.record("default/vm-1")
    choose("Migrate")
    expect(operator.window().get_by_role("button", name="Confirm")).to_be_focused()
    page.keyboard.press("Enter")
    expect(operator.window()).to_be_hidden()
    expect(operator.cell("default/vm-1", "Node")).not_to_contain_text(before, timeout=2 * SHOWN_MS)
    expect(operator.cell("default/vm-1", "Phase")).to_have_text(re.compile("Running$"))
    assert len(operator.percents()) > 2, "it moves by itself, without a reload"
    page.get_by_role("link", name="vm-1", exact=True).click()
    expect(page.get_by_role("progressbar").first).to_have_attribute("aria-valuenow", "100")
    expect(page.get_by_role("status").first).to_have_text("Running")
    expect(page.get_by_role("img", name=re.compile("Data left"))).to_be_visible()
    operator.look("vm")
    assert "operator" in served.console.vmherd("get", "events"), "the audit names who did it"
    lines = (served.console.log.parent / "audit.jsonl").read_text()
    assert re.search(r'"user": "operator".*"verb": "create".*"virtualmachineoperations".*"outcome": 201', lines)


def test_a_migration_goes_where_one_says(served: Served, operator: Visitor) -> None:
    page = operator.go(*VMS)
    here = served.herd.node_of("vm-2")
    target = next(name for name in ("node-1", "node-2", "node-3") if name != here)
    operator.open_menu("default/vm-2")
    page.get_by_role("menuitem", name="Migrate").click()
    operator.window().get_by_label("Target node").click()
    expect(page.get_by_role("option", name=here)).to_have_count(0)
    page.get_by_role("option", name=target).click()
    operator.window().get_by_role("button", name="Confirm").click()
    expect(operator.cell("default/vm-2", "Node")).to_contain_text(target, timeout=2 * SHOWN_MS)


def test_a_vm_is_stopped_and_started_and_the_list_is_searched_and_filtered(served: Served, operator: Visitor) -> None:
    page = operator.go(*VMS)
    page.get_by_label("Search by name or IP address").fill("vm-3")
    expect(page.locator("tr[data-row]")).to_have_count(1)
    operator.open_menu("default/vm-3")
    expect(page.get_by_role("menuitem", name="Start", exact=True)).to_have_attribute("aria-disabled", "true")
    page.get_by_role("menuitem", name="Stop", exact=True).click()
    operator.window().get_by_role("button", name="Confirm").click()
    expect(operator.cell("default/vm-3", "Phase")).to_contain_text("Stopped")
    page.get_by_label("Search by name or IP address").fill("")
    expect(page.locator("tr[data-row]")).to_have_count(6)
    page.get_by_label("Phase").click()
    page.get_by_role("option", name="Stopped").click()
    expect(page.locator("tr[data-row]")).to_have_count(1)
    operator.open_menu("default/vm-3")
    page.get_by_role("menuitem", name="Start", exact=True).click()
    operator.window().get_by_role("button", name="Confirm").click()
    expect(page.locator("tr[data-row]")).to_have_count(0)
    served.herd.wait(served.herd.all_run, "it runs again")


def test_a_node_is_emptied_after_its_plan_was_shown_and_takes_vms_again(served: Served, operator: Visitor) -> None:
    page = operator.go(*NODES)
    operator.look("nodes")
    node = next(name for name in ("node-1", "node-2", "node-3") if served.herd.node_of("vm-4") == name)
    operator.row(node).get_by_role("button", name="Cordon + Drain").click()
    expect(operator.window()).to_contain_text("default/vm-4")
    expect(operator.window().get_by_role("status")).to_contain_text("about")
    operator.look("drain-plan", whole=False)
    operator.window().get_by_role("button", name="Cancel").click()
    expect(operator.window()).to_be_hidden()
    assert served.console.vmherd("get", "node", node).count("SchedulingDisabled") == 0, "cancelled is not done"
    operator.row(node).get_by_role("button", name="Cordon + Drain").click()
    operator.window().get_by_role("button", name="Confirm").click()
    expect(operator.cell(node, "Status")).to_contain_text("SchedulingDisabled")
    expect(operator.cell(node, "Status")).to_contain_text("Drained", timeout=3 * SHOWN_MS)
    expect(operator.cell(node, "VMs")).to_contain_text("0")
    operator.row(node).get_by_role("button", name="Uncordon").click()
    operator.window().get_by_role("button", name="Confirm").click()
    expect(operator.cell(node, "Status")).not_to_contain_text("SchedulingDisabled")
    page.get_by_role("link", name="Overview").click()
    expect(page.get_by_role("img", name=re.compile("The last 24 hours"))).to_be_visible()
    expect(page.get_by_role("region", name="The latest of it")).to_contain_text(f"{node}: Uncordoned")


def test_a_viewer_sees_no_buttons_and_is_refused(served: Served, viewer: Visitor) -> None:
    page = viewer.go(*VMS)
    expect(page.locator("tr[data-row]")).to_have_count(6)
    expect(page.get_by_role("button", name=re.compile("Actions for"))).to_have_count(0)
    page.get_by_role("link", name="vm-1", exact=True).click()
    expect(page.get_by_role("heading", name="Configuration")).to_be_visible()
    expect(page.get_by_role("button", name=re.compile("Migrate|Start|Stop|Restart"))).to_have_count(0)
    csrf = page.locator("input[name=csrf]").get_attribute("value") or ""
    viewer.go(*NODES)
    expect(page.locator("tr[data-row]")).to_have_count(3)
    expect(page.get_by_role("button", name=re.compile("Drain|Uncordon"))).to_have_count(0)
    ask = "async ([body, csrf]) => (await fetch('/console/actions', {method: 'POST', body: JSON.stringify(body), "
    ask += "headers: {'x-csrf-token': csrf}})).status"
    for body in (
        {"action": "Migrate", "namespace": "default", "name": "vm-1"},
        {"action": "Stop", "namespace": "default", "name": "vm-1"},
        {"action": "Cordon + Drain", "name": "node-1"},
        {"action": "Uncordon", "name": "node-1"},
    ):
        assert page.evaluate(ask, [body, csrf]) == 403, body
    assert not [name for name in served.herd.get("vmop") if name.startswith("stop-vm-1")]
    assert "SchedulingDisabled" not in served.console.vmherd("get", "node", "node-1")


def test_requests_from_elsewhere_and_without_a_session_are_refused(served: Served, viewer: Visitor) -> None:
    cookies = {one["name"]: dict(one) for one in viewer.context.cookies()}
    cookie = cookies["vmherd_session"]
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    held = {"cookie": f"vmherd_session={cookie['value']}"}
    base, own = served.console.address, {"origin": served.console.address}
    socket = "/console/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    upgrade = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    with httpx.Client(base_url=base) as client:
        assert client.get("/console/").headers["location"] == "/console/login"
        assert client.post("/console/actions", headers=own, json={}).status_code == 401
        assert client.post("/console/actions", headers={**held, **own}, json={}).status_code == 403, "no CSRF token"
        elsewhere = {**held, "origin": "http://elsewhere.example"}
        assert client.post("/console/logout", headers=elsewhere, data={}).status_code == 403
        assert client.get(socket, headers={**upgrade, **own}).status_code == 403, "no session"
        assert client.get(socket, headers={**upgrade, **elsewhere}).status_code == 403
        assert client.get("/nowhere", headers=upgrade).status_code == 403, "the API has none"
        assert client.get("/console/", headers=held).status_code == 200
        policy = client.get("/console/", headers=held).headers["content-security-policy"]
        assert "default-src 'self'" in policy


def test_the_page_recovers_after_the_server_was_restarted(served: Served, viewer: Visitor) -> None:
    page = viewer.go(*VMS)
    expect(page.locator("tr[data-row]")).to_have_count(6)
    page.evaluate("window.wasHere = true")
    served.console.process.kill()
    served.console.wait_ready()
    page.wait_for_function("!window.wasHere")  # it loaded itself anew, in the same session
    expect(page.locator("tr[data-row]")).to_have_count(6)
    served.console.vmherd("stop", "vm-5")
    expect(viewer.cell("default/vm-5", "Phase")).to_contain_text("Stopped")
    served.console.vmherd("start", "vm-5")


def test_a_session_ends_with_its_token(served: Served) -> None:
    token = served.console.token("leaver", "operator", "--namespace", "default")
    with visiting(served.browser, served.console, token) as leaver:
        expect(leaver.page.get_by_role("heading", name="Projects")).to_be_visible()
        leaver.page.goto("/console/system/nodes/all")
        assert leaver.page.get_by_role("heading", name="403").is_visible(), "nodes are not for one project's people"
        leaver.page.goto("/console/projects/default/virtualization/virtual-machines")
        expect(leaver.page.get_by_role("button", name=re.compile("Actions for")).first).to_be_visible()
        served.console.vmherd("token", "revoke", "leaver")
        expect(leaver.page.get_by_label("API token")).to_be_visible()
