"""`-o json|yaml|name` of the commands that make operations."""

import json
from collections.abc import Iterator

import pytest
import yaml

from orchestrator.resources import OperationPhase, Reason
from tests.integration.command import Running, Vmherd


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
        vmherd.step(operation.name, Reason.FAILED, "no luck", phase=OperationPhase.FAILED, progress=100)
        assert evict.ended() == 1
    printed = json.loads("\n".join(evict.lines))
    assert printed["status"]["phase"] == "Failed"
    assert any("no luck" in line for line in evict.errors)
