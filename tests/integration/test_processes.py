"""Real processes on real Redis: killed at any time, doubled, poisoned, and left alone."""

import base64
import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from orchestrator.celery_app import CeleryMessenger, make_app
from orchestrator.queues import Message, Task, lifecycle_queue, migrate_queue
from orchestrator.resources import OperationPhase
from orchestrator.store import Store, access, keys
from orchestrator.store.connection import connect
from orchestrator.store.node_store import NodeStore
from tests.builders import a_lease
from tests.declared_keys import check_keys
from tests.fakes import FakeNode, Stage
from tests.processes import Processes
from tests.redis_server import RedisServer
from tests.waiting import wait_until

BEAT = """
from orchestrator import queues
queues.TICK_PERIOD_S.update(reconcile=1, liveness=1, housekeeping=1)
from celery.bin.celery import celery
celery(["-A", "orchestrator.beat", "beat", "--scheduler", "orchestrator.beat:OnceScheduler", "--max-interval", "1",
        "--pidfile=", "--loglevel", "WARNING"])
"""
"""A beat whose ticks are a second long."""


@pytest.fixture
def processes(redis_url: str, tmp_path: Path) -> Iterator[Processes]:
    with Processes(redis_url, tmp_path) as processes:
        yield processes


class Monitor:
    """All commands that a Redis gets, but for what scripts do; a context manager."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url, decode_responses=True, socket_timeout=None)
        self.commands: list[list[str]] = []

    def __enter__(self) -> "Monitor":
        self._monitor = self._client.monitor().__enter__()  # type: ignore[no-untyped-call]
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._monitor.connection.disconnect()

    def _listen(self) -> None:
        with contextlib.suppress(redis.RedisError, ValueError, OSError, AttributeError):
            for command in self._monitor.listen():
                if command["client_type"] != "lua":
                    self.commands.append(command["command"].split(" "))


def test_two_beats_send_each_tick_once_and_one_is_enough(processes: Processes, store: Store, redis_url: str) -> None:
    """Ten ticks of one second; one beat is killed in the middle."""
    with Monitor(redis_url) as monitor:
        beats = [processes.start(f"beat{i}", "-c", BEAT) for i in range(2)]

        def tried() -> Counter[int]:
            marks = [c[1] for c in list(monitor.commands) if c[0] == "SET" and c[1].startswith("tick:reconcile:")]
            return Counter(int(mark.rpartition(":")[2]) for mark in marks)

        wait_until(lambda: max(tried().values(), default=0) == 2, 40, processes.logs)
        first = max(tried())
        wait_until(lambda: max(tried()) >= first + 5, 30)
        beats[0].hold()
        beats[0].kill()
        wait_until(lambda: max(tried()) >= first + 10, 30)
        for beat in beats:
            beat.hold()
            beat.kill()
        sent = [text for text in store.redis.lrange("control", 0, -1) if Task.RECONCILE in text]
        slots = tried()
    assert (
        len(slots) - 2 <= len(sent) <= len(slots)
    )  # once; the two that were killed may have taken one and not sent it
    assert sum(count == 2 for count in slots.values()) >= 3
    # One tick or another may be missed on a machine that is busy.
    assert len([n for n in slots if first < n <= first + 10]) >= 7
    headers = json.loads(sent[0])["headers"]
    assert headers["expires"]
    check_keys(store.redis)


class Hosts:
    """Three hosts that work by themselves, each in a thread: worker, agent and lease. A context manager.

    Attributes:
        worst: The most slots that were seen held at a time: in the herd, of one source, of one target.
    """

    def __init__(self, stage: Stage, call_s: float = 0.05) -> None:
        self.stage = stage
        self.call_s = call_s
        self.worst = Counter[str]()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock = threading.RLock()

    def __enter__(self) -> "Hosts":
        for node in self.stage.nodes.values():
            for run in (self._work, self._answer):
                own = FakeNode(NodeStore(connect(self.stage.url), node.name), self.stage.world)
                self._threads.append(threading.Thread(target=run, args=(own,), daemon=True))
        self._threads.append(threading.Thread(target=self._sample, daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, node: FakeNode) -> None:
        queues = [migrate_queue(node.name), lifecycle_queue(node.name)]
        while not self._stop.is_set():
            with contextlib.suppress(redis.RedisError):
                found = node.store.redis.brpop(queues, 1)
                if found:
                    self._run(node, decode(str(found[1])))

    def _run(self, node: FakeNode, message: Message) -> None:
        with self._lock:
            if message.task is Task.NODE_SETTLE:
                node.run(message)
                return
            grant = node.begin(message)
        if grant is None:
            return
        self._stop.wait(self.call_s)
        with self._lock:
            if message.task is Task.NODE_MIGRATE and grant.uuid in node.domains:
                node.switch_over(grant)
        node.end(grant)

    def _answer(self, node: FakeNode) -> None:
        last = "0-0"
        sequence = 0
        while not self._stop.is_set():
            sequence += 1
            with contextlib.suppress(Exception):
                node.store.renew_lease(a_lease(sequence))
                with self._lock:
                    node.answer()
                last = node.store.wait_for_wake(last, 0.5)

    def _sample(self) -> None:
        client = connect(self.stage.url)
        names = list(self.stage.nodes)
        while not self._stop.wait(0.005):
            with contextlib.suppress(redis.RedisError):
                pipe = client.pipeline(transaction=True)
                pipe.scard(keys.SLOTS_CLUSTER)
                for name in names:
                    pipe.scard(keys.slots_outbound(name))
                for name in names:
                    pipe.scard(keys.slots_inbound(name))
                counts = [int(count) for count in pipe.execute()]
                for what, most in (
                    ("herd", counts[0]),
                    ("source", max(counts[1 : len(names) + 1])),
                    ("target", max(counts[len(names) + 1 :])),
                ):
                    self.worst[what] = max(self.worst[what], most)


def decode(text: str) -> Message:
    """Read a Celery message."""
    message = json.loads(text)
    args = json.loads(base64.b64decode(message["body"]))[0]
    task = Task(message["headers"]["task"])
    return Message(task, message["properties"]["delivery_info"]["routing_key"], tuple(args))


@pytest.fixture
def hosts(redis_url: str) -> Iterator[Hosts]:
    stage = Stage(redis_url)
    stage.add_nodes("n1", "n2", "n3")
    for name, node in (("a", "n1"), ("b", "n1"), ("c", "n2"), ("d", "n2"), ("e", "n3"), ("f", "n3")):
        stage.add_vm(name, node)
    with Hosts(stage) as hosts:
        yield hosts
    stage.close()


def start_control(processes: Processes) -> None:
    processes.run("control0", "control")
    processes.run("liveness", "liveness")
    for i in range(2):
        processes.run(f"intake{i}", "intake")
        processes.run(f"beat{i}", "beat")


@pytest.mark.timeout(110)
def test_everything_is_killed_again_and_again_and_poisoned_and_all_ends_well(
    processes: Processes, hosts: Hosts, record_property: Any
) -> None:
    """Evicts of all VMs, while control worker, intakes and beats are killed at random and get garbage to read."""
    stage = hosts.stage
    start_control(processes)
    chance = random.Random(7)
    names = "abcdef"
    for name in names:
        stage.evict(name)
    kills = Counter[str]()
    deadline = time.monotonic() + 60

    def done() -> bool:
        found = stage.operations()
        return all(o.status.phase is OperationPhase.COMPLETED for o in found)

    poisoned = False
    while not done() and time.monotonic() < deadline:
        name = chance.choice(list(processes.all))
        if processes.all[name].pid is not None and sum(kills.values()) < 8:
            processes.all[name].kill()
            kills[name] += 1
        if not poisoned and kills["control0"]:
            stage.store.redis.rpush("control", "\x00garbage")  # it is read next
            poisoned = True
        time.sleep(chance.uniform(0.3, 1.5))  # between two kills; nothing is waited for
    wait_until(done, 30, lambda: f"{[(o.name, o.message) for o in stage.operations()]}\n{processes.logs()}")
    wait_until(lambda: stage.is_at_rest(*names), 10)
    record_property("kills", dict(kills))
    assert hosts.worst["herd"] <= 3
    assert hosts.worst["source"] <= 1
    assert hosts.worst["target"] <= 1
    for process in processes.all.values():
        process.hold()
        process.kill()
    check_keys(stage.store.redis)
    moves = Counter(call.split(" on ")[0] for call in stage.world.calls if call.startswith("migrate"))
    assert set(moves) == {f"migrate default/{name}" for name in names}


def test_a_poisoned_queue_costs_one_message_and_a_restart(processes: Processes, hosts: Hosts) -> None:
    """Bytes that are no message end Celery's worker; whoever restarts it finds the queue without them."""
    stage = hosts.stage
    control = processes.run("control0", "control")
    processes.run("intake0", "intake")
    stage.reconcile()
    operation = stage.evict("a")
    send(stage, Task.GRANT)
    wait_until(lambda: stage.operation(operation).status.phase.is_final, 40, processes.logs)
    stage.store.redis.lpush("control", "\x00\xff no message")
    wait_until(lambda: control.restarts >= 1, 20, processes.logs)
    second = stage.evict("c")
    send(stage, Task.GRANT)
    wait_until(lambda: stage.operation(second).status.phase.is_final, 40, processes.logs)
    assert control.restarts == 1  # it was taken from the queue before it was read
    assert stage.store.redis.llen("control") == 0


def send(stage: Stage, task: Task) -> None:
    """Put a message into the control queue, as the services do."""
    CeleryMessenger(make_app("test", url=stage.url)).send(Message(task, "control"))


@pytest.mark.timeout(110)
def test_an_idle_herd_asks_redis_for_next_to_nothing(
    processes: Processes, redis_url: str, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control worker, liveness, an intake and two beats, three registered hosts, nothing to do."""
    stage = Stage(redis_url)
    stage.add_nodes("n1", "n2", "n3")
    with Hosts(stage):
        start_control(processes)
        client = stage.store.redis
        wait_until(lambda: is_idle(stage, processes), 60, processes.logs)
    version = stage.store.version()
    before, began = commands(client), time.monotonic()
    with Monitor(redis_url) as monitor:
        threading.Event().wait(4)  # what is looked at is that nothing happens
        sent = Counter(command[0] for command in list(monitor.commands))
    seconds = time.monotonic() - began
    spent = commands(client) - before
    rates = {name: round(count / seconds, 2) for name, count in sorted(sent.items(), key=lambda item: -item[1])}
    record_property("commands per second", rates)
    total = (
        f"{sum(sent.values()) / seconds:.0f} commands/s of clients, {sum(spent.values()) / seconds:.0f}/s with scripts'"
    )
    with capsys.disabled():
        print(f"\nidle: {total}: {rates}")  # noqa: T201 - a figure, not an assertion
    assert stage.store.version() == version  # nothing was written
    assert not any(command[0] == "DEL" and "wanted" in command[1] for command in monitor.commands)  # nobody planned
    assert not {"KEYS", "SCAN"} & set(sent)
    stage.close()


def is_idle(stage: Stage, processes: Processes) -> bool:
    """Whether all processes are up, recovery mode is over, and the beats' ticks are worked off as they come."""
    ready = all(
        "ready" in processes.log_file(name).read_text() for name in ("control0", "liveness", "intake0", "intake1")
    )
    state = stage.store.redis.hget(keys.IDENTITY, "state")
    ticks = len(list(stage.store.redis.scan_iter("tick:liveness:*", count=1000)))
    return ready and state == "normal" and ticks > 3 and stage.store.redis.llen("control") == 0


def commands(client: "redis.Redis") -> Counter[str]:
    """How often each command was called since Redis was started."""
    info: dict[str, Any] = client.info("commandstats")
    return Counter({name.removeprefix("cmdstat_"): int(value["calls"]) for name, value in info.items()})


def test_a_nodes_worker_needs_no_more_than_its_rights(
    processes: Processes, stage: Stage, redis_server: RedisServer
) -> None:
    """The real worker under its node's ACL takes a message and sends its events, and nothing of it is denied."""
    pytest.importorskip("libvirt")
    client = stage.store.redis
    password = access.enroll(client, "n1")
    url = f"redis://{access.user_name('n1')}:{password}@127.0.0.1:{redis_server.port}/0"
    client.acl_log_reset()
    events = client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
    events.psubscribe("/0.celeryev/*")
    for role in ("migrate", "lifecycle"):
        processes.run(role, "worker", role, VMHERD_REDIS_URL=url, VMHERD_NODE="n1")
    stage.add_vm("a", "n1")
    operation = stage.evict("a")
    (message,) = stage.grant()
    stale = Message(message.task, message.queue, (message.args[0], message.args[1], 0))
    CeleryMessenger(make_app("test", url=stage.url)).send(stale)

    def told() -> bool:
        found = events.get_message(timeout=0.1)
        return found is not None and str(found["channel"]).endswith("/task.multi")  # the worker sends several at once

    wait_until(told, 40, lambda: f"{client.acl_log()}\n{processes.logs()}")
    assert client.llen(message.queue) == 0
    assert stage.operation(operation).status.attempts == 1
    assert client.acl_log() == [], client.acl_log()
    check_keys(client)
