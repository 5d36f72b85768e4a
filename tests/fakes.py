"""A herd in one process: the real services on a real Redis, and hosts that are a few lines each.

Hosts speak to Redis through `NodeStore`, as real ones do. Nothing happens by itself: a test says which message comes,
which report is read, and when a call ends. Each is one method, so any order and any loss can be played.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from orchestrator.intake import Intake
from orchestrator.queues import Message, Task
from orchestrator.resources import (
    NodeGrant,
    NodeInventory,
    OperationType,
    Order,
    OrderKind,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
)
from orchestrator.resources.adoption import AdoptionOrder
from orchestrator.resources.looking import LookOrder
from orchestrator.resources.needs import MachineNeeds
from orchestrator.services import operations
from orchestrator.services.context import Context
from orchestrator.services.granting import grant_pending
from orchestrator.services.herd import Herd
from orchestrator.services.reconcile import reconcile
from orchestrator.services.reports import take_report
from orchestrator.settings import Settings
from orchestrator.store import Store, keys
from orchestrator.store.connection import connect
from orchestrator.store.node_store import NodeStore, Report
from tests.builders import a_vm, some_needs
from tests.fake_definitions import FakeDefinitions
from workers.adoption import answer as answer_about_definitions
from workers.adoption import run_adoption
from workers.hypervisor.port import Hypervisor
from workers.preflight import SharedStorage


class Outbox:
    """Keeps what is sent; the messenger of a test."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.results: dict[str, dict[str, Any]] = {}

    def send(self, message: Message) -> None:
        """Keep a message."""
        self.sent.append(message)

    def finish(self, task_id: str, result: dict[str, Any]) -> None:
        """Keep a result."""
        self.results[task_id] = result

    def take(self, *tasks: Task) -> list[Message]:
        """Give the messages for some tasks (default: all), and forget them."""
        found = [message for message in self.sent if not tasks or message.task in tasks]
        self.sent = [message for message in self.sent if message not in found]
        return found


@dataclass
class Copy:
    """One domain on one host.

    Attributes:
        name: The host's name for it, where that is not the VM's.
        definition: Its persistent definition; empty: it is transient.
        live_xml: As it runs.
    """

    vm: str
    state: str = "running"
    incarnation: int = 1
    epoch: int = 1
    job: bool = False
    memory_mib: int = 1024
    needs: MachineNeeds = field(default_factory=partial(some_needs, plain=True))
    agent: bool | None = None
    name: str = ""
    definition: str = ""
    live_xml: str = ""
    autostart: bool = False
    snapshots: int = 0

    @property
    def domain(self) -> str:
        """The host's name for it."""
        return self.name or self.vm.replace("/", ".")


@dataclass
class World:
    """What is true on the hosts, by host and UUID; and what was done there."""

    hosts: dict[str, dict[str, Copy]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def running(self, uuid: str) -> list[str]:
        """Name the hosts on which it runs."""
        return [host for host, domains in self.hosts.items() if uuid in domains and domains[uuid].state == "running"]


class FakeNode:
    """One host: its agent and its workers.

    Attributes:
        generation: Of its agent.
        problems: What it answers when it is asked whether a machine can arrive.
        told: What it has told of machines' needs.
    """

    def __init__(self, store: NodeStore, world: World) -> None:
        self.store = store
        self.sees: dict[str, Any] = {"problem": "it does not answer"}
        self.world = world
        self.name = store.node
        self.domains = world.hosts.setdefault(self.name, {})
        self.holder = f"worker-of-{self.name}"
        self.generation = "g1"
        self.problems: list[str] = []
        self.told: dict[str, MachineNeeds] = {}
        self.definitions = FakeDefinitions(world, self.name)
        self.hypervisor = cast("Hypervisor", self.definitions)

    def list_all(self, order: str = "", began: int | None = None) -> int:
        """Report everything that is here; to an order, also what was told before."""
        if order:
            self.told.clear()
        host = {"hostname": self.name, "uuid": f"host-{self.name}", "cpus": 8, "memory_mib": 16_384}
        host |= {"cpu_model": "qemu64", "hypervisor_version": "fake", "libvirt_version": "fake"}
        body = {
            "host": {**host, "migration_uri": f"qemu+tcp://{self.name}/system"},
            "generation": self.generation,
            "boot_id": "b1",
            "began": self.store.counter() if began is None else began,
            "domains": [self.describe(uuid) for uuid in self.domains],
            "order": order,
        }
        return self.store.report("Listing", body)

    def tell(self, uuid: str, detail: str = "", reason: str = "", began: int | None = None) -> int:
        """Report one domain, or how it went."""
        if uuid in self.domains:
            began = self.store.counter() if began is None else began
            return self.store.report("Domain", {"uuid": uuid, "domain": self.describe(uuid), "began": began})
        self.told.pop(uuid, None)
        return self.store.report("Domain", {"uuid": uuid, "domain": None, "detail": detail, "reason": reason})

    def describe(self, uuid: str) -> dict[str, Any]:
        """Give a domain as the agent reports it."""
        copy = self.domains[uuid]
        fields = {"uuid": uuid, "name": copy.domain, "vm": copy.vm, "state": copy.state, "vcpus": 1}
        fields |= {"persistent": bool(copy.definition), "agent": copy.agent}
        fields |= {"incarnation": copy.incarnation, "epoch": copy.epoch, "memoryMib": copy.memory_mib}
        return {**fields, "reason": "", "job": copy.job, "addresses": [], "needs": self.news(uuid)}

    def news(self, uuid: str) -> dict[str, Any] | None:
        """Give what a machine needs, once."""
        copy = self.domains[uuid]
        needs = copy.needs.with_(incarnation=copy.incarnation)
        if not copy.vm or copy.state != "running" or self.told.get(uuid) == needs:
            return None
        self.told[uuid] = needs
        return needs.model_dump(mode="json", by_alias=True)

    def begin(self, message: Message) -> NodeGrant | None:
        """Take a grant as a worker does, and make its call; None when there is nothing to do."""
        _, operation, epoch = message.args
        grant = self.store.claim(str(operation), int(epoch), self.holder)
        if grant is None:
            return None
        self.world.calls.append(f"{grant.action} {grant.vm} on {self.name} to {grant.target} epoch {grant.epoch}")
        if message.task is Task.NODE_START:
            self.domains[grant.uuid] = Copy(grant.vm, "running", grant.incarnation, grant.epoch)
        elif message.task is Task.NODE_STOP:
            if grant.force:
                self.domains.pop(grant.uuid, None)
        elif not grant.adopt:
            mine = self.domains[grant.uuid]
            mine.job = True
            self.world.hosts[grant.target][grant.uuid] = Copy(
                mine.vm, "incoming", mine.incarnation, mine.epoch, needs=mine.needs
            )
        return grant

    def switch_over(self, grant: NodeGrant) -> None:
        """The migration succeeds in the hypervisor; nobody was told."""
        mine = self.domains.pop(grant.uuid)
        self.world.hosts[grant.target][grant.uuid] = Copy(
            mine.vm, "running", mine.incarnation, mine.epoch, needs=mine.needs
        )

    def fall_back(self, grant: NodeGrant) -> None:
        """The migration fails in the hypervisor; nobody was told."""
        self.world.hosts[grant.target].pop(grant.uuid, None)
        self.domains[grant.uuid].job = False

    def end(self, grant: NodeGrant, end: str = "succeeded", message: str = "") -> int:
        """Report how the call ended."""
        body = {"operation": grant.operation, "epoch": grant.epoch, "end": end, "message": message}
        return self.store.report("Ended", body)

    def progress(self, grant: NodeGrant, processed: int = 50, **more: int) -> int:
        """Report how far it is."""
        job = {"elapsed_ms": 900, "total": 100, "processed": processed, "remaining": 100 - processed, "iteration": 1}
        body = {"operation": grant.operation, "epoch": grant.epoch, "job": {**job, "throttle": 0, **more}}
        return self.store.report("Progress", body)

    def run(self, message: Message) -> bool:
        """Do all of what a message asks for; whether there was anything."""
        if message.task is Task.NODE_SETTLE:
            order = self.store.order(str(message.args[1]))
            return order is not None and bool(self.perform(order))
        if message.task is Task.NODE_ADOPT:
            return "answered already" not in run_adoption(self.store, self.hypervisor, str(message.args[1]))
        grant = self.begin(message)
        if grant is None:
            return False
        if message.task is Task.NODE_MIGRATE:
            self.switch_over(grant)
        if message.task is Task.NODE_STOP and not grant.force:
            self.ask(grant)
        else:
            self.end(grant)
        return True

    def ask(self, grant: NodeGrant) -> int:
        """Report that the guest was asked to power off."""
        return self.store.report("Asked", {"operation": grant.operation, "epoch": grant.epoch, "message": ""})

    def power_off(self, uuid: str) -> int:
        """The guest powers itself off, and that is reported."""
        del self.domains[uuid]
        return self.tell(uuid, "shutdown", "guest")

    def answer(self) -> int:
        """Answer all questions, as the agent does; how many there were."""
        found = self.store.orders()
        for order_id, order in found.items():
            if order is None:
                self.list_all(order_id)
            elif isinstance(order, AdoptionOrder):
                if not order.kind.changes_domain:
                    answer_about_definitions(self.store, self.hypervisor, order, SharedStorage(), threading.Event())
            elif isinstance(order, LookOrder):
                self.store.report("Looked", {"order": order.id, **self.sees})
            elif order.kind in {OrderKind.CHECK, OrderKind.DESCRIBE}:
                self.reply(order)
            elif not order.kind.changes_domain:
                self.perform(order)
        return len(found)

    def reply(self, order: Order) -> int:
        """Answer what is asked before a migration is granted."""
        self.world.calls.append(f"{order.kind} on {self.name}")
        if order.kind is OrderKind.CHECK:
            body = {"order": order.id, "generation": self.generation, "problems": list(self.problems)}
            return self.store.report("Checked", body)
        copy = self.domains.get(order.uuid)
        needs = copy and copy.needs.with_(incarnation=copy.incarnation).model_dump(mode="json", by_alias=True)
        return self.store.report("Described", {"order": order.id, "needs": needs})

    def perform(self, order: Order) -> int:
        """Carry out one order and answer with what is there then."""
        copy = self.domains.get(order.uuid)
        if order.kind is OrderKind.KILL_AND_READ:
            self.world.calls.append(f"kill the holder on {self.name}")
        elif order.kind.changes_domain and copy is not None and copy.state in order.expect:
            self.world.calls.append(f"{order.kind} on {self.name}")
            if order.kind is OrderKind.DESTROY:
                del self.domains[order.uuid]
            else:
                copy.state = "running"
        reading: dict[str, Any] = {"present": False}
        if (copy := self.domains.get(order.uuid)) is not None:
            reading = {"present": True, "state": copy.state, "job": copy.job, "incarnation": copy.incarnation}
        return self.store.report("Answer", {"order": order.id, "reading": reading})


class Stage:
    """Services on a Redis, and hosts that play with them.

    Args:
        url: Of an empty Redis.
        settings: Differing from the defaults.
    """

    def __init__(self, url: str, **settings: Any) -> None:
        self.url = url
        self.store = Store(connect(url), Settings(**settings))
        self.outbox = Outbox()
        self.ctx = Context(self.store, self.outbox)
        self.herd = Herd(self.store).start()
        self.intake = Intake(self.ctx)
        self.world = World()
        self.nodes: dict[str, FakeNode] = {}

    def close(self) -> None:
        """Let go of Redis."""
        self.herd.stop()
        self.store.close()

    def add_nodes(self, *names: str) -> None:
        """Register hosts as they register themselves, and leave recovery mode."""
        for name in names:
            self.nodes[name] = FakeNode(NodeStore(self.store.redis, name), self.world)
            self.store.redis.execute_command("ACL", "SETUSER", f"node-{name}")  # type: ignore[no-untyped-call]
            self.nodes[name].list_all()
        self.intake._nodes_read_at = float("-inf")
        self.read()
        self.recover()
        self.forget()

    def forget(self) -> None:
        """Let all messages be done with, the wake-up that may be on its way included."""
        self.outbox.take()
        self.store.redis.delete(keys.wanted("grant"))

    def recover(self) -> None:
        """Let the herd come out of recovery mode."""
        self.reconcile()
        for node in self.nodes.values():
            node.answer()
        self.read()
        self.reconcile()

    def add_vm(self, name: str, node: str, **more: Any) -> VirtualMachine:
        """Put a VM that runs on a node on record and on the host."""
        vm = a_vm(name, node=node, **more)
        self.store.must_commit(self.store.batch().create(vm))
        copy = Copy(vm.key, incarnation=vm.status.incarnation, needs=vm.status.needs or some_needs(plain=True))
        self.world.hosts[node][vm.metadata.uid] = copy
        self.nodes[node].tell(vm.metadata.uid)
        self.read()
        self.forget()
        return self.vm(name)

    def read(self, intake: Intake | None = None) -> int:
        """Have intake read all reports that are there."""
        count = 0
        while self.unread():
            taken = (intake or self.intake).round()
            assert taken, "a report is not taken"
            count += taken
        return count

    def read_one(self, node: str) -> bool:
        """Take the next report of one node only; whether there was one."""
        cursor = str(self.store.redis.hget(keys.CURSORS, node) or "")
        found = cast(
            "list[tuple[str, dict[str, str]]]",
            self.store.redis.xrange(keys.reports(node), min=f"({cursor or '0-0'}", count=1),
        )
        for entry_id, fields in found:
            report = Report(int(entry_id.partition("-")[0]), fields["kind"], json.loads(fields["body"]))
            assert take_report(self.ctx, node, report, cursor, self.ctx.store.now())
        return bool(found)

    def unread(self) -> bool:
        """Whether there is a report that nobody has read."""
        cursors = self.store.redis.hgetall(keys.CURSORS)
        return any(str(node.store.counter()) != cursors.get(n, "0-0")[:-2] for n, node in self.nodes.items())

    def grant(self) -> list[Message]:
        """Run the grant task once; give the messages to nodes."""
        self.outbox.take(Task.GRANT)
        grant_pending(self.ctx, self.herd)
        return self.outbox.take(Task.NODE_MIGRATE, Task.NODE_START, Task.NODE_STOP)

    def reconcile(self) -> None:
        """Run reconcile once."""
        reconcile(self.ctx, self.herd)

    def expire(self, index: str, key: str) -> None:
        """Let a timer of an operation be over."""
        assert self.store.redis.zscore(index, key) is not None, f"{key} has no timer in {index}"
        self.store.redis.zadd(index, {key: 0})

    def evict(self, vm: str) -> VirtualMachineOperation:
        """Create an Evict."""
        return operations.create_operation(self.ctx, operations.new_operation(vm, OperationType.EVICT))

    def deliver(self, message: Message) -> bool:
        """Bring a message to its node; whether there was anything to do."""
        return self.nodes[message.queue.split(".")[1]].run(message)

    def play(self, until: Callable[[], bool], rounds: int = 60) -> None:
        """Let everything take its course, message by message, until something holds.

        Raises:
            AssertionError: It does not come.
        """
        for _ in range(rounds):
            if until():
                return
            self.grant_and_deliver()
            for node in self.nodes.values():
                node.answer()
            self.read()
        states = [(o.key, o.status.phase.value, o.message) for o in self.operations()]
        raise AssertionError(f"it does not come: {states}, {self.outbox.sent}")

    def grant_and_deliver(self) -> None:
        """Run the grant task when it is wanted, and bring all messages."""
        if self.outbox.take(Task.GRANT):
            grant_pending(self.ctx, self.herd)
        for message in self.outbox.take(
            Task.NODE_MIGRATE, Task.NODE_START, Task.NODE_STOP, Task.NODE_SETTLE, Task.NODE_ADOPT
        ):
            self.deliver(message)

    def vm(self, name: str) -> VirtualMachine:
        """Read a VM."""
        return self.store.get(VirtualMachine, f"default/{name}")

    def operation(self, operation: VirtualMachineOperation) -> VirtualMachineOperation:
        """Read an operation anew."""
        return self.store.get(VirtualMachineOperation, operation.key)

    def operations(self) -> list[VirtualMachineOperation]:
        """Read all operations."""
        return self.store.all(VirtualMachineOperation)

    def inventory(self, node: str) -> NodeInventory:
        """Read what a node has on record."""
        return self.store.get(NodeInventory, node)

    def is_at_rest(self, *names: str) -> bool:
        """Whether these VMs run, each on one host, and no slot is held."""
        vms = [self.vm(name) for name in names]
        assert all(len(self.world.running(vm.metadata.uid)) <= 1 for vm in vms), "a VM runs twice"
        running = all(vm.status.phase is VmPhase.RUNNING for vm in vms)
        return running and self.store.redis.scard(keys.SLOTS_CLUSTER) == 0
