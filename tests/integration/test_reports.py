"""What nodes report: each once, whoever reads it; what can't be read, or is not theirs to say, counts for nothing."""

import json
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.intake import Intake
from orchestrator.resources import (
    Event,
    GrantState,
    Node,
    NodeInventory,
    OperationPhase,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
    find_condition,
)
from orchestrator.services.context import Context
from orchestrator.services.liveness import Liveness
from orchestrator.store import Batch, Store, keys
from orchestrator.store.connection import connect
from tests.builders import a_lease, a_vm, uuid_of
from tests.fakes import Copy, Stage
from tests.waiting import wait_until


def raw(stage: Stage, node: str, kind: str, body: str) -> None:
    """Write a report as a node may write it: anything."""
    number = stage.store.redis.incr(keys.counter(node))
    stage.store.redis.xadd(keys.reports(node), {"kind": kind, "body": body}, id=f"{number}-0")


def told_of(stage: Stage, vm: str) -> str:
    """Whether its guest's agent is known to be connected."""
    condition = find_condition(stage.vm(vm).status.conditions, "AgentReady")
    return condition.status if condition else ""


class TestOnce:
    def test_two_intakes_at_once_count_each_report_once(self, stage: Stage) -> None:
        vms = [stage.add_vm(name, node) for name, node in (("a", "n1"), ("b", "n2"), ("c", "n3"))]
        before = {name: stage.inventory(name).version for name in stage.nodes}
        written = dict.fromkeys(stage.nodes, 0)
        version = stage.store.version()
        intakes = [Intake(Context(Store(connect(stage.url), stage.store.config), stage.outbox)) for _ in range(3)]
        threads = [threading.Thread(target=intake.run) for intake in intakes]
        for thread in threads:
            thread.start()
        chance = random.Random(1)
        for count in range(150):
            vm = chance.choice(vms)
            node = stage.nodes[vm.status.node_name]
            node.domains[vm.metadata.uid].memory_mib = 2000 + count  # each differs from the one before
            node.tell(vm.metadata.uid)
            written[node.name] += 1
        wait_until(lambda: not stage.unread(), 30, "all is read")
        for intake in intakes:
            intake.stopped.set()
        for thread in threads:
            thread.join()
        taken = dict.fromkeys(stage.nodes, 0)
        for change in stage.store.changes(version, 1):
            if isinstance(change.resource, NodeInventory):
                taken[change.resource.name] += 1
        assert taken == written
        for name in stage.nodes:
            assert stage.inventory(name).counter == stage.nodes[name].store.counter()
            assert stage.inventory(name).version > before[name]

    def test_what_was_read_is_removed_from_the_stream(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        for _ in range(300):
            stage.nodes["n1"].tell(vm.metadata.uid)
        stage.read()
        assert stage.store.redis.xlen(keys.reports("n1")) <= 200  # trimmed by whole nodes of the stream

    def test_a_report_that_says_nothing_new_wakes_nobody(self, stage: Stage) -> None:
        """1,000 nodes that list their domains each minute must not wake all that follow the herd."""
        vm = stage.add_vm("a", "n1")
        version = stage.store.version()
        stage.nodes["n1"].tell(vm.metadata.uid)
        stage.nodes["n1"].list_all()
        stage.read()
        assert stage.store.version() == version
        assert stage.outbox.take() == []

    def test_a_guests_agent_is_told_of_when_it_comes_or_goes_and_never_else(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        node = stage.nodes["n1"]

        def told(agent: bool | None) -> tuple[str, bool]:
            """What is known of it after a report and a listing, and whether a VM was written."""
            before = stage.vm("a").version
            node.domains[vm.metadata.uid].agent = agent
            node.tell(vm.metadata.uid)
            node.list_all()
            stage.read()
            return told_of(stage, "a"), stage.vm("a").version != before

        assert told(None) == ("", False), "it has no channel for one, or its node tells nothing of it"
        assert told(False) == ("False", True)
        assert told(True) == ("True", True)
        assert told(True) == ("True", False)
        node.power_off(vm.metadata.uid)
        stage.read()
        assert told_of(stage, "a") == "False", "it does not run"

    def test_one_that_does_wakes_the_grant_task_once(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        stage.store.redis.delete(keys.wanted("grant"))
        stage.nodes["n1"].domains[vm.metadata.uid].memory_mib += 1
        stage.nodes["n1"].tell(vm.metadata.uid)
        stage.nodes["n1"].domains["other"] = Copy("")
        stage.nodes["n1"].list_all()
        stage.read()
        assert len(stage.outbox.take()) == 1

    def test_lost_reports_are_made_up_for_by_the_next_listing(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        stage.nodes["n1"].tell(vm.metadata.uid)
        stage.nodes["n1"].domains.pop(vm.metadata.uid)
        stage.nodes["n1"].tell(vm.metadata.uid, "crashed")
        stage.store.redis.xtrim(keys.reports("n1"), maxlen=0, approximate=False)
        stage.nodes["n1"].list_all()
        stage.read()
        assert stage.vm("a").status.phase is VmPhase.PENDING


# What a node may write into its own stream. Each is dropped, and what comes after it is read.
HALF = "\\ud800"
DOMAIN = {"uuid": "u", "name": "x", "vm": "default/a", "state": "running", "memoryMib": 1, "vcpus": 1}
GARBAGE = {
    "not JSON": ("Domain", "{"),
    "no object": ("Domain", "[]"),
    "null": ("Ended", "null"),
    "empty": ("Listing", "{}"),
    "unknown kind": ("Surprise", "{}"),
    "no uuid": ("Domain", json.dumps({"domain": {"name": "x", "state": "running"}})),
    "unknown field": ("Domain", json.dumps({"uuid": "u", "domain": {**DOMAIN, "colour": "red"}})),
    "wrong type": ("Domain", json.dumps({"uuid": "u", "domain": {**DOMAIN, "vcpus": "many"}})),
    "negative memory": ("Domain", json.dumps({"uuid": "u", "domain": {**DOMAIN, "vm": "", "memoryMib": -5}})),
    "negative CPUs": ("Domain", json.dumps({"uuid": "u", "domain": {**DOMAIN, "vm": "", "vcpus": -5}})),
    "huge memory": ("Domain", json.dumps({"uuid": "u", "domain": {**DOMAIN, "vm": "", "memoryMib": 10**30}})),
    "huge epoch": ("Domain", json.dumps({"uuid": "u", "domain": {**DOMAIN, "epoch": 2**63}})),
    "huge incarnation": ("Domain", json.dumps({"uuid": "u", "domain": {**DOMAIN, "incarnation": 2**63}})),
    "half a character in a key": ("Domain", json.dumps({"uuid": "u", "domain": DOMAIN}).replace('"u"', f'"{HALF}"')),
    "half a character in a text": ("HypervisorLost", f'{{"message": "{HALF}"}}'),
    "not a number": ("Progress", '{"operation": "default/op", "epoch": NaN, "job": null}'),
    "infinite": ("Listing", '{"host": {}, "domains": [], "began": Infinity}'),
    "deep": ("Domain", "[" * 100_000),
    "deep object": ("Domain", '{"a":' * 50_000 + "1" + "}" * 50_000),
    "answer to nothing": ("Answer", '{"order": "", "reading": {"present": false}}'),
    "order of nobody": ("Answer", '{"order": "x/y#1.1.n1", "reading": {}}'),
    "order that is none": ("Answer", '{"order": {"a": 1}, "reading": 5}'),
    "operation that is none": ("Began", '{"operation": ["x"], "epoch": 1}'),
}


@pytest.mark.parametrize(("kind", "body"), GARBAGE.values(), ids=GARBAGE)
def test_what_can_not_be_read_is_dropped_and_all_goes_on(stage: Stage, kind: str, body: str) -> None:
    vm = stage.add_vm("a", "n1")
    stage.add_vm("b", "n1")
    node, inventory = stage.store.get(Node, "n1"), stage.inventory("n1")
    raw(stage, "n1", kind, body)
    stage.nodes["n1"].domains[vm.metadata.uid].state = "paused"
    stage.nodes["n1"].tell(vm.metadata.uid)
    stage.read()
    assert stage.vm("a").status.phase is VmPhase.PAUSE
    left = stage.inventory("n1").domains
    assert {uuid: d.name for uuid, d in left.items()} == {uuid: d.name for uuid, d in inventory.domains.items()}
    if kind != "HypervisorLost":
        assert stage.store.get(Node, "n1") == node
    stage.store.load([Node, NodeInventory, VirtualMachine, VirtualMachineOperation, Event])  # all can be read
    stage.evict("b")
    assert stage.grant()  # and all work goes on


@pytest.mark.parametrize("fields", [{}, {"kind": "Domain"}, {"body": "{}"}], ids=["none", "no body", "no kind"])
def test_entries_without_their_fields_are_dropped(stage: Stage, fields: dict[Any, Any]) -> None:
    vm = stage.add_vm("a", "n1")
    number = stage.store.redis.incr(keys.counter("n1"))
    stage.store.redis.xadd(keys.reports("n1"), {"other": "1", **fields}, id=f"{number}-0")
    stage.nodes["n1"].domains[vm.metadata.uid].state = "paused"
    stage.nodes["n1"].tell(vm.metadata.uid)
    stage.read()
    assert stage.vm("a").status.phase is VmPhase.PAUSE


def test_words_of_a_hypervisor_never_make_a_document_that_can_not_be_read(stage: Stage) -> None:
    stage.add_vm("a", "n1")
    stage.evict("a")
    (message,) = stage.grant()
    grant = stage.nodes["n1"].begin(message)
    assert grant is not None
    body = json.dumps({"operation": grant.operation, "epoch": grant.epoch, "end": "failed", "message": "X"})
    raw(stage, "n1", "Ended", body.replace("X", HALF))
    stage.read()
    assert stage.operations()
    stage.herd.snapshot()


class TestForeign:
    """A node speaks for itself only."""

    def test_only_the_grants_own_node_and_epoch_count(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        operation = stage.evict("a")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.read()
        before = stage.operation(operation)
        for node in ("n2", "n3"):
            stage.nodes[node].progress(grant, 90)
            stage.nodes[node].end(grant, "failed")
            stage.nodes[node].store.report("Began", {"operation": grant.operation, "epoch": grant.epoch})
        late = grant.model_copy(update={"epoch": grant.epoch - 1})
        for wrong in (late, grant.model_copy(update={"operation": "default/none"})):
            stage.nodes["n1"].progress(wrong, 90)
            stage.nodes["n1"].end(wrong, "failed")
        stage.read()
        assert stage.operation(operation) == before

    def test_only_an_order_of_ones_own_is_answered_and_once(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        operation = stage.evict("a")
        (message,) = stage.grant()
        stage.nodes["n1"].run(message)
        stage.read()
        orders = stage.nodes["n1"].store.orders()
        (order_id,) = orders
        lie = {"order": order_id, "reading": {"present": True, "state": "running"}}
        stage.nodes["n3"].store.report("Answer", lie)
        stage.nodes["n2"].store.report("Answer", lie)
        stage.nodes["n1"].store.report("Answer", {**lie, "order": order_id.replace(".1.", ".7.")})
        stage.read()
        assert stage.nodes["n1"].store.orders() == orders
        stage.nodes["n1"].answer()
        stage.nodes["n1"].store.report("Answer", lie)  # what it says after its answer is no answer
        stage.read()
        stage.nodes["n2"].answer()
        stage.read()
        assert stage.operation(operation).status.phase is OperationPhase.COMPLETED

    def test_reports_of_a_holder_that_is_suspect_count_no_more(self, stage: Stage) -> None:
        stage.add_vm("a", "n1")
        operation = stage.evict("a")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.read()
        stage.expire(keys.DEADLINES, operation.key)
        stage.reconcile()
        before = stage.operation(operation)
        assert before.status.grant is not None
        assert before.status.grant.state is GrantState.SETTLING
        stage.nodes["n1"].progress(grant, 90)
        stage.nodes["n1"].end(grant, "failed")
        stage.read()
        assert stage.operation(operation) == before

    def test_a_vm_of_another_name_or_uuid_is_not_touched(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        stage.nodes["n2"].domains["00000000-0000-0000-0000-000000000000"] = Copy("default/a", incarnation=9)
        stage.nodes["n2"].domains[uuid_of("zzz")] = Copy("default/zzz")
        stage.nodes["n2"].list_all()
        stage.read()
        assert stage.vm("a") == vm

    def test_a_broken_lease_makes_no_other_node_look_lost(self, stage: Stage) -> None:
        """Leases are the nodes' own keys: one that holds anything else is that node's trouble."""
        liveness = Liveness(stage.ctx, stage.herd)
        for text in ("{", "[]", "5", "null", '{"generation": "g"}', '{"generation": "g", "sequence": Infinity}', HALF):
            stage.store.redis.set(keys.lease("n1"), text)
            stage.nodes["n2"].store.renew_lease(a_lease())
            liveness.scan()
        stage.store.redis.delete(keys.lease("n1"))
        stage.store.redis.lpush(keys.lease("n1"), "a list")
        liveness.scan()
        assert stage.store.get(Node, "n2").is_ready


def before_next_commit(stage: Stage, monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """Let something happen just before the next commit is sent."""
    commit = stage.store.commit
    done: list[bool] = []

    def late(batch: Batch) -> Any:
        if not done:
            done.append(True)
            do()
        return commit(batch)

    monkeypatch.setattr(stage.store, "commit", late)


class TestInventory:
    """What a listing means for VMs that are on record on its node."""

    def test_a_vm_that_was_never_reported_and_is_not_listed_is_gone(self, stage: Stage) -> None:
        """It crashed between the start's end and the first report on it; nothing else would ever tell."""
        stage.store.must_commit(stage.store.batch().create(a_vm("a", node="n1")))
        stage.nodes["n1"].list_all()
        stage.read()
        vm = stage.vm("a")
        assert vm.status.phase is VmPhase.PENDING

    def test_a_listing_from_before_what_is_known_does_not_say_so(self, stage: Stage) -> None:
        began = stage.nodes["n1"].store.counter()
        stage.store.must_commit(stage.store.batch().create(a_vm("a", node="n1", counter=began + 1)))
        stage.nodes["n1"].list_all(began=began)
        stage.read()
        assert stage.vm("a").status.phase is VmPhase.RUNNING

    def test_nor_does_one_while_a_grant_is_open(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        stage.evict("a")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        stage.nodes["n1"].switch_over(grant)
        for _ in range(3):
            stage.nodes["n1"].list_all()
            stage.read()
        assert stage.vm("a").status.phase is VmPhase.MIGRATING
        assert stage.world.running(vm.metadata.uid) == ["n2"]

    def test_nor_for_a_vm_that_left_by_migration(self, stage: Stage) -> None:
        vm = stage.add_vm("a", "n1")
        del stage.nodes["n1"].domains[vm.metadata.uid]
        stage.nodes["n1"].tell(vm.metadata.uid, "migrated")
        for _ in range(3):
            stage.nodes["n1"].list_all()
            stage.read()
        assert stage.vm("a").status.phase is VmPhase.RUNNING
        stage.nodes["n3"].domains[vm.metadata.uid] = Copy(vm.key)
        stage.nodes["n3"].tell(vm.metadata.uid)
        stage.read()
        assert stage.vm("a").status.node_name == "n3"

    def test_what_ended_while_the_grant_was_open_is_known_when_it_closes(self, stage: Stage) -> None:
        """The target's answer says running; before the source answers, the guest powers off, and listings come."""
        vm = stage.add_vm("a", "n1")
        operation = stage.evict("a")
        (message,) = stage.grant()
        stage.nodes["n1"].run(message)
        stage.read()
        stage.nodes["n2"].answer()
        stage.read()
        del stage.nodes["n2"].domains[vm.metadata.uid]
        stage.nodes["n2"].tell(vm.metadata.uid, "shutdown", "guest")
        for _ in range(3):
            stage.nodes["n2"].list_all()
        stage.read()
        stage.nodes["n1"].answer()
        stage.read()
        assert stage.operation(operation).status.phase is OperationPhase.COMPLETED
        assert stage.vm("a").status.phase is VmPhase.STOPPED

    def test_a_stop_that_is_told_while_its_settlement_is_decided_is_not_overlooked(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two intakes: one decides on the answers, the other records, just before that is committed, that it ended."""
        vm = stage.add_vm("a", "n1")
        operation = stage.evict("a")
        (message,) = stage.grant()
        stage.nodes["n1"].run(message)
        stage.nodes["n2"].tell(vm.metadata.uid)
        stage.read()
        stage.nodes["n2"].answer()
        stage.read()
        del stage.nodes["n2"].domains[vm.metadata.uid]
        stage.nodes["n2"].tell(vm.metadata.uid, "shutdown", "guest")
        stage.nodes["n1"].answer()
        before_next_commit(stage, monkeypatch, lambda: stage.read_one("n2"))
        assert stage.read_one("n1")
        assert stage.operation(operation).status.phase is OperationPhase.COMPLETED
        assert stage.vm("a").status.phase is VmPhase.STOPPED

    def test_nor_the_other_way_round(self, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        """The settlement is committed while a report on the VM, still held then, is about to be recorded only."""
        vm = stage.add_vm("a", "n1")
        operation = stage.evict("a")
        (message,) = stage.grant()
        stage.nodes["n1"].run(message)
        stage.nodes["n2"].tell(vm.metadata.uid)
        stage.read()
        stage.nodes["n2"].answer()
        stage.read()
        stage.nodes["n2"].domains[vm.metadata.uid].state = "paused"
        stage.nodes["n2"].tell(vm.metadata.uid)
        stage.nodes["n1"].answer()
        before_next_commit(stage, monkeypatch, lambda: stage.read_one("n1"))
        assert stage.read_one("n2")
        assert stage.operation(operation).status.phase is OperationPhase.COMPLETED
        assert stage.vm("a").status.phase is VmPhase.PAUSE

    def test_a_report_and_a_grant_at_once(self, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        """The VM is reported as paused while it is granted: one of both is decided again."""
        vm = stage.add_vm("a", "n1")
        operation = stage.evict("a")
        stage.nodes["n1"].domains[vm.metadata.uid].state = "paused"
        stage.nodes["n1"].tell(vm.metadata.uid)
        before_next_commit(stage, monkeypatch, lambda: stage.read_one("n1"))
        assert stage.grant() == []
        assert stage.operation(operation).status.grant is None
        assert stage.vm("a").status.phase is VmPhase.PAUSE

    def test_domains_that_are_not_ours_take_their_room(self, stage: Stage) -> None:
        stage.nodes["n2"].domains["foreign"] = Copy("", memory_mib=16_000)
        stage.nodes["n2"].list_all()
        stage.read()
        stage.add_vm("a", "n1")
        stage.evict("a")
        (message,) = stage.grant()
        grant = stage.nodes["n1"].begin(message)
        assert grant is not None
        assert grant.target == "n3"

    def test_a_lost_hypervisor_makes_its_node_not_ready_until_it_lists_again(self, stage: Stage) -> None:
        stage.nodes["n2"].store.report("HypervisorLost", {"message": "libvirtd is gone"})
        stage.read()
        assert not stage.store.get(Node, "n2").is_ready
        assert "n2" not in stage.store.redis.smembers(keys.SCHEDULABLE)
        stage.nodes["n2"].list_all()
        stage.read()
        assert stage.store.get(Node, "n2").is_ready
