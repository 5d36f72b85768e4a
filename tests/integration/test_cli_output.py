"""`-o json|yaml|name` of the commands that make operations."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.resources import Maintenance, Node, NodeFencing, OperationPhase, Reason
from orchestrator.resources.fencing import Bmc, FencePhase
from orchestrator.resources.maintenance import MaintenancePhase
from tests.builders import a_node
from tests.integration.command import Running, Vmherd
from tests.waiting import wait_until


@pytest.fixture
def vmherd(redis_url: str) -> Iterator[Vmherd]:
    vmherd = Vmherd(redis_url)
    yield vmherd
    vmherd.store.close()


@pytest.mark.parametrize("command", [("evict",), ("stop",), ("restart", "--force")])
def test_without_waiting_the_operation_is_printed_as_it_was_stored(vmherd: Vmherd, command: tuple[str, ...]) -> None:
    vmherd.running_vm()
    printed = json.loads(vmherd.ok(*command, "linux-vm", "--no-wait", "-o", "json"))
    (stored,) = vmherd.operations()
    assert (printed["kind"], printed["metadata"]["name"]) == ("VirtualMachineOperation", stored.name)
    assert printed["spec"]["type"].lower() == command[0]
    assert printed["status"]["phase"] == "Pending"


def test_several_are_a_list_and_names_are_names(vmherd: Vmherd) -> None:
    vmherd.running_vm("a")
    vmherd.running_vm("b")
    printed = yaml.safe_load(vmherd.ok("evict", "a", "b", "--no-wait", "-o", "yaml"))
    assert [item["spec"]["virtualMachineName"] for item in printed["items"]] == ["a", "b"]
    vmherd.running_vm("c")
    name = vmherd.ok("evict", "c", "--no-wait", "-o", "name")
    assert name.startswith("virtualmachineoperation.virtualization.deckhouse.io/evict-c-")


def test_waiting_prints_nothing_but_the_operation_at_its_end_and_its_code_says_how_it_was(vmherd: Vmherd) -> None:
    vmherd.running_vm()
    with Running(vmherd, "evict", "linux-vm", "-o", "json") as evict:
        while not vmherd.operations():
            assert evict.process.poll() is None, evict.errors
        (operation,) = vmherd.operations()
        vmherd.step(operation.name, Reason.OPERATION_FAILED, "no luck", phase=OperationPhase.FAILED, progress=100)
        assert evict.ended() == 1
    printed = json.loads("\n".join(evict.lines))
    assert printed["status"]["phase"] == "Failed"
    assert any("no luck" in line for line in evict.errors)


def join(vmherd: Vmherd, *names: str) -> None:
    batch = vmherd.store.batch()
    for name in names:
        batch.create(a_node(name))
    vmherd.store.must_commit(batch)


def read(vmherd: Vmherd, *arguments: str) -> Any:
    """What a command that succeeds prints; it may say something besides, on standard error."""
    done = vmherd.run(*arguments, "-o", "json")
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def test_what_was_done_to_nodes_is_a_document_too_and_the_code_still_tells_of_what_failed(vmherd: Vmherd) -> None:
    join(vmherd, "n1", "n2")
    done = read(vmherd, "cordon", "n1", "n2")
    assert done == [{"node": name, "unschedulable": True, "changed": True} for name in ("n1", "n2")]
    half = vmherd.run("uncordon", "n1", "n9", "-o", "json")
    assert half.returncode == 1
    assert json.loads(half.stdout) == [{"node": "n1", "unschedulable": False, "changed": True}]
    assert "n9" in half.stderr
    assert json.loads(vmherd.run("cordon", "n9", "-o", "json").stdout) == []
    assert read(vmherd, "node", "label", "n1", "zone=a") == {"node": "n1", "changed": True}
    assert read(vmherd, "node", "label", "n1", "zone=a") == {"node": "n1", "changed": False}
    assert read(vmherd, "node", "taint", "n1", "only=db:NoSchedule") == {"node": "n1", "changed": True}


def test_what_a_host_is_given_is_a_document_or_in_a_file(vmherd: Vmherd, tmp_path: Path) -> None:
    enroll = ("node", "enroll", "n3", "--address", "192.0.2.1:6379")
    made = read(vmherd, *enroll)
    assert (made["node"], made["witness"], made["renewed"]) == ("n3", False, False)
    again = vmherd.run(*enroll, "-o", "yaml")
    assert "was enrolled before" in again.stderr
    renewed = yaml.safe_load(again.stdout)
    assert renewed["renewed"] is True
    assert renewed["environment"] != made["environment"]
    address = vmherd.url.partition("//")[2].partition("/")[0]
    for environment, works in ((renewed["environment"], True), (made["environment"], False)):
        url = environment["VMHERD_REDIS_URL"].replace("192.0.2.1:6379", address)
        assert environment == {"VMHERD_NODE": "n3", "VMHERD_REDIS_URL": environment["VMHERD_REDIS_URL"]}
        told = vmherd.run("get", "vm", VMHERD_REDIS_URL=url).stderr
        assert ("does not permit this user" in told) is works, told
    file = tmp_path / "n3.env"
    assert read(vmherd, *enroll, "--to-file", str(file)) == {
        "node": "n3",
        "witness": False,
        "renewed": True,
        "file": str(file),
    }
    assert "VMHERD_REDIS_URL=redis://node-n3:" in file.read_text()
    assert read(vmherd, "node", "expel", "n3") == {"node": "n3", "expelled": True}


def test_how_nodes_are_fenced_is_a_document(vmherd: Vmherd) -> None:
    join(vmherd, "n1")
    assert read(vmherd, "fence", "set", "n1", "--enable") == {"node": "n1", "set": True}
    assert read(vmherd, "failover", "disarm", "--reason", "works")["armed"] is False
    status = read(vmherd, "fence", "status")
    assert status["disarmed"] == "works"
    (node,) = status["nodes"]
    assert (node["node"], node["enabled"], node["inHerd"], node["disarmed"]) == ("n1", True, True, None)
    assert node["spec"]["enabled"] is True
    assert read(vmherd, "failover", "arm") == {"armed": True, "node": None, "changed": True}
    assert read(vmherd, "failover", "arm") == {"armed": True, "node": None, "changed": False}


def test_what_is_given_changes_the_bmc_that_is_on_record(vmherd: Vmherd) -> None:
    join(vmherd, "n1")

    def bmc() -> Bmc:
        found = vmherd.store.get(NodeFencing, "n1").spec.bmc
        assert found is not None
        return found

    assert "--agent is missing" in vmherd.refused("fence", "set", "n1", "--timeout", "60")
    options = ("--option", "ip=192.0.2.1", "--option", "lanplus=1", "--password-file", "/etc/vmherd/bmc")
    vmherd.ok("fence", "set", "n1", "--agent", "fence_ipmilan", *options)
    first = bmc()
    assert (first.timeout_s, first.attempts) == (20, 2)
    old = vmherd.store.get(NodeFencing, "n1")
    distrusted = old.with_status(bmc_distrust="another host's", cut_epoch=7)
    vmherd.store.must_commit(vmherd.store.batch().put(old, distrusted))
    vmherd.ok("fence", "set", "n1", "--timeout", "60", "--attempts", "5")
    assert bmc() == first.with_(timeout_s=60, attempts=5)
    status = vmherd.store.get(NodeFencing, "n1").status
    assert (status.bmc_distrust, status.cut_epoch) == ("another host's", 7), "it is the same BMC"
    vmherd.ok("fence", "set", "n1", "--option", "lanplus=0", "--password-env", "BMC")
    assert bmc().options == {"ip": "192.0.2.1", "lanplus": "0"}
    assert (bmc().password_file, bmc().password_env) == ("", "BMC")
    vmherd.ok("fence", "set", "n1", "--agent", "fence_redfish", "--option", "ip=192.0.2.2")
    assert bmc() == Bmc(agent="fence_redfish", options={"ip": "192.0.2.2"}, timeout_s=60, attempts=5)
    assert "--no-bmc" in vmherd.refused("fence", "set", "n1", "--no-bmc", "--timeout", "5")
    assert vmherd.run("fence", "set", "n1", "--attempts", "11").returncode != 0


def test_why_a_deadline_does_not_count_is_said(vmherd: Vmherd) -> None:
    join(vmherd, "n1")
    vmherd.ok("fence", "set", "n1", "--enable")
    old = vmherd.store.get(NodeFencing, "n1")
    why = "Redis waits for no replica"
    lost = old.with_status(phase=FencePhase.UNCONFIRMED, reason="NoBmc", message="it has no BMC", deadline=why)
    vmherd.store.must_commit(vmherd.store.batch().put(old, lost))
    said = "NoBmc it has no BMC; its watchdog's deadline does not count: Redis waits for no replica"
    assert said in vmherd.ok("fence", "status")


def test_tokens_are_a_document_without_their_digests(vmherd: Vmherd, tmp_path: Path) -> None:
    assert read(vmherd, "token", "list") == []
    made = read(vmherd, "token", "create", "ci", "--role", "operator", "--namespace", "team-a", "--expires", "30d")
    text = made.pop("token")
    assert text.startswith("vmherd_ci_")
    (shown,) = read(vmherd, "token", "list")
    assert made == shown
    assert (shown["name"], shown["role"], shown["namespaces"], shown["expired"]) == (
        "ci",
        "operator",
        ["team-a"],
        False,
    )
    assert set(shown) == {"name", "role", "namespaces", "createdAt", "expiresAt", "expired"}
    assert text not in json.dumps(shown)
    file = tmp_path / "bob.token"
    filed = read(vmherd, "token", "create", "bob", "--role", "viewer", "--to-file", str(file))
    assert filed["file"] == str(file)
    assert file.read_text().strip() not in json.dumps(filed), "it is in the file alone"
    assert read(vmherd, "token", "revoke", "ci") == [{"token": "ci", "revoked": True}]
    assert read(vmherd, "version").keys() == {"version"}


def test_plans_are_documents(vmherd: Vmherd) -> None:
    node = "h1"  # where its VM runs
    join(vmherd, node, "h2")
    vmherd.running_vm("a")
    plan = read(vmherd, "drain", node, "--dry-run")
    assert [move["vm"] for move in plan["moves"]] == ["default/a"]
    assert (plan["nodes"], plan["withoutPlace"], plan["moves"][0]["source"]) == ([node], {}, node)
    refused = vmherd.run("drain", node, "-o", "json")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--no-wait" in refused.stderr
    assert not vmherd.store.get(Node, node).spec.unschedulable
    loss = read(vmherd, "plan", "failure", node)
    assert [(one["name"], one["stranded"]) for one in loss] == [(node, {})]
    policy = read(vmherd, "rebalance", "--set", "maxMoves=3", "--policy")
    assert (policy["kind"], policy["spec"]["maxMoves"]) == ("RebalancePolicy", 3)
    begun = read(vmherd, "drain", node, "--no-wait")
    assert (begun["kind"], begun["metadata"]["name"]) == ("NodeDrain", node)
    both = read(vmherd, "drain", node, "h2", "--no-wait", "--partial")
    assert (both["kind"], [drain["metadata"]["name"] for drain in both["items"]]) == ("List", [node, "h2"])


def test_what_is_described_is_a_document_with_its_events(vmherd: Vmherd) -> None:
    join(vmherd, "h1", "h2")
    vmherd.running_vm("a")
    made = read(vmherd, "evict", "a", "--no-wait")["metadata"]["name"]
    vm = read(vmherd, "describe", "vm", "a")
    assert (vm["resource"]["kind"], vm["resource"]["metadata"]["name"]) == ("VirtualMachine", "a")
    assert [operation["metadata"]["name"] for operation in vm["operations"]] == [made]
    assert vm["events"] == []
    vmherd.ok("cordon", "h1")
    both = read(vmherd, "describe", "node", "h1", "h2")
    assert [one["resource"]["metadata"]["name"] for one in both] == ["h1", "h2"]
    assert [one["virtualMachines"] for one in both] == [["default/a"], []]
    assert "NodeCordoned" in {event["reason"] for event in both[0]["events"]}
    gone = vmherd.run("describe", "vm", "gone", "-o", "json")
    assert (gone.returncode, gone.stdout) == (1, "")


def test_a_maintenance_is_a_document_at_its_end(vmherd: Vmherd) -> None:
    join(vmherd, "h1")
    with Running(vmherd, "maintain", "h1", "--hook", "true", "--name", "m", "-o", "json") as maintain:
        wait_until(lambda: vmherd.store.find(Maintenance, "m"), 30, "it is begun")
        vmherd.ok("maintenance", "stop", "m")
        old = vmherd.store.get(Maintenance, "m")
        stopped = old.with_status(phase=MaintenancePhase.STOPPED, message="enough")  # as the control plane does
        vmherd.store.must_commit(vmherd.store.batch().put(old, stopped))
        assert maintain.ended() == 1
    printed = json.loads("\n".join(maintain.lines))
    assert (printed["kind"], printed["status"]["phase"]) == ("Maintenance", "Stopped")


def test_what_is_applied_and_explained_is_a_document(vmherd: Vmherd, tmp_path: Path) -> None:
    vmherd.running_vm("a")
    stored = read(vmherd, "get", "vm", "a")
    file = tmp_path / "vm.json"
    del stored["metadata"]["resourceVersion"]
    file.write_text(json.dumps({**stored, "metadata": {**stored["metadata"], "labels": {"app": "web"}}}))
    applied = read(vmherd, "apply", "-f", str(file))
    assert applied["metadata"]["labels"] == {"app": "web"}
    assert vmherd.ok("apply", "-f", str(file), "-o", "name").strip().endswith("/a")
    made = read(vmherd, "evict", "a", "--no-wait")["metadata"]["name"]
    told = read(vmherd, "explain", f"vmop/{made}")
    assert (told["operation"], told["virtualMachine"], told["move"], told["phase"]) == (made, "a", None, "Pending")
    assert told["why"] == "a person, or another program, asked for it"


def test_what_was_deleted_is_a_document(vmherd: Vmherd) -> None:
    vmherd.running_vm("a")
    made = read(vmherd, "evict", "a", "--no-wait")["metadata"]["name"]
    done = vmherd.run("delete", "vmop", made, "gone", "-o", "json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == [{"kind": "VirtualMachineOperation", "key": f"default/{made}", "deleted": True}]
    assert "'gone' not found" in done.stderr
    (vm,) = read(vmherd, "delete", "vm", "a", "--no-wait")
    assert vm == {"kind": "VirtualMachine", "key": "default/a", "deleted": True}
