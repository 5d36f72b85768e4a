"""1,000 nodes that beat every 2 s: what Redis and the liveness task take, and how soon a loss is noticed and made good.

Without a lab: a Redis that writes each change through to its disk; heartbeats by a process of their own (`beating`);
liveness, recovery and grants in threads of this one, each with its own copy of the herd, as their processes have. Then
ten nodes with 100 VMs each fall silent, one after the other within two seconds, and their watchdogs' deadlines are the
evidence. A VM counts as placed when its start is asked for, with the node that was chosen for it; the starts themselves
are the nodes' work, four at a time.
"""

import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from orchestrator.lease import Membership, read_lease
from orchestrator.queues import Message, Task
from orchestrator.resources import (
    Condition,
    Node,
    NodeFencing,
    OperationType,
    RunPolicy,
    VirtualMachineOperation,
    find_condition,
)
from orchestrator.services.context import Context
from orchestrator.services.failover import recover_node
from orchestrator.services.fencing import set_fencing
from orchestrator.services.granting import grant_pending
from orchestrator.services.herd import Herd
from orchestrator.services.liveness import Liveness
from orchestrator.services.recovery import recover
from orchestrator.store import Store, keys
from tests.benchmarks.beating import TIMING, node_name
from tests.benchmarks.figures import Figure, Result, typical
from tests.benchmarks.running import Bench
from tests.builders import a_node, a_vm
from tests.redis_server import RedisServer

NODES = 1_000
PERIOD_S = 2.0
LOST = 10
VMS_EACH = 100
_STEADY_SCANS = 30
_SCAN_EVERY_S = 1.0
_BETWEEN_LOSSES_S = 0.2
_TIMEOUT_S = 300.0
_BATCH = 200


class Mail:
    """Hands messages to the threads that stand for the workers."""

    def __init__(self) -> None:
        self.failovers: queue.Queue[str] = queue.Queue()
        self.grants = threading.Event()

    def send(self, message: Message) -> None:
        """Take a message; those that nobody here looks at are dropped."""
        if message.task is Task.FAILOVER:
            self.failovers.put(str(message.args[0]))
        if message.task is Task.GRANT:
            self.grants.set()

    def finish(self, task_id: str, result: dict[str, Any]) -> None:
        """Drop it."""


def run(bench: Bench) -> Result:
    """Measure it."""
    with tempfile.TemporaryDirectory(prefix="vmherd-bench-") as folder:
        server = RedisServer(Path(folder) / "redis", is_durable=True)
        server.start()
        try:
            ctx = Context(Store.open(server.url), Mail())
            try:
                _populate(bench, ctx)
                with _beating(server.url) as silence:
                    return _measure(bench, ctx, silence)
            finally:
                ctx.store.close()
        finally:
            server.kill()


def _populate(bench: Bench, ctx: Context) -> None:
    bench.say(f"liveness: {NODES:,} nodes and {LOST * VMS_EACH:,} VMs are written")
    at = datetime.now(UTC)
    good = tuple(
        Condition(type=kind, status="True", reason="Good", last_transition_time=at)
        for kind in ("LeaseFresh", "HypervisorAvailable", "Ready")
    )
    nodes = [a_node(node_name(number), cpu=128, memory_mib=262_144) for number in range(NODES)]
    documents = [node.with_status(conditions=good) for node in nodes]
    vms = [
        a_vm(f"vm-{number}-{vm}", node=node_name(number), policy=RunPolicy.ALWAYS_ON)
        for number in range(LOST)
        for vm in range(VMS_EACH)
    ]
    for first in range(0, NODES, _BATCH):
        batch = ctx.store.batch()
        for document in documents[first : first + _BATCH]:
            batch.create(document)
        ctx.store.must_commit(batch)
    for first in range(0, len(vms), _BATCH):
        batch = ctx.store.batch()
        for vm in vms[first : first + _BATCH]:
            batch.create(vm)
        ctx.store.must_commit(batch)
    for number in range(LOST):
        set_fencing(ctx, node_name(number), lambda spec: spec.with_(enabled=True))
    members = Membership(1, {node_name(number): f"{node_name(number)}:1" for number in range(NODES)})
    ctx.store.redis.set(keys.MEMBERSHIP, members.text())
    while not recover(ctx):  # a new Redis is recorded as the one that grants rest on
        pass


@contextmanager
def _beating(url: str) -> Iterator["subprocess.Popen[str]"]:
    argv = [sys.executable, "-m", "tests.benchmarks.beating", url, str(NODES), str(PERIOD_S)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


class _Watching:
    """Liveness, a scan a second, in this thread; what is asked of the other tasks, in threads of their own."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.mail = cast("Mail", ctx.messenger)
        self.scan_ms: list[float] = []
        self.cpu_s = 0.0
        self.suspected_at: dict[str, float] = {}
        self.fenced_at: dict[str, float] = {}
        self._herds = [Herd(ctx.store).start() for _ in range(3)]
        self._liveness = Liveness(ctx, self._herds[0])
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._recover, self._grant)]
        self._next = time.monotonic()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for herd in self._herds:
            herd.stop()

    def scan(self, victims: list[str]) -> None:
        """Look once, at its time, and note what became of the victims."""
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = max(self._next + _SCAN_EVERY_S, time.monotonic())
        began, cpu = time.perf_counter(), time.thread_time()
        self._liveness.watch(_SCAN_EVERY_S)
        self.scan_ms.append((time.perf_counter() - began) * 1000)
        self.cpu_s += time.thread_time() - cpu
        for name in victims:
            node, fencing = self.ctx.store.find(Node, name), self.ctx.store.find(NodeFencing, name)
            fresh = find_condition(node.status.conditions, "LeaseFresh") if node is not None else None
            if fresh is not None and fresh.status == "False":
                self.suspected_at.setdefault(name, time.time())
            if fencing is not None and fencing.status.phase.has_evidence:
                self.fenced_at.setdefault(name, time.time())

    def _recover(self) -> None:
        while not self._stop.is_set():
            try:
                name = self.mail.failovers.get(timeout=0.1)
            except queue.Empty:
                continue
            recover_node(self.ctx, self._herds[1], name)

    def _grant(self) -> None:
        while not self._stop.is_set():
            if self.mail.grants.wait(0.1):
                self.mail.grants.clear()
                grant_pending(self.ctx, self._herds[2])


def _measure(bench: Bench, ctx: Context, silence: "subprocess.Popen[str]") -> Result:
    result = Result("liveness", f"{NODES:,} nodes beat every {PERIOD_S:g} s; {LOST} with {VMS_EACH} VMs each are lost")
    watching = _Watching(ctx)
    try:
        result.tables["at rest"] = _at_rest(bench, ctx, watching)
        result.tables["loss"] = _lose(bench, ctx, watching, silence)
    finally:
        watching.close()
    return result


def _at_rest(bench: Bench, ctx: Context, watching: _Watching) -> list[Figure]:
    for _ in range(8):  # leases are read for the first time
        watching.scan([])
    watching.scan_ms.clear()
    watching.cpu_s = 0.0
    redis_s, calls, began = _redis_cpu_s(ctx), _scripts(ctx), time.monotonic()
    for _ in bench.track(range(_STEADY_SCANS), _STEADY_SCANS, "at rest"):
        watching.scan([])
    wall_s = time.monotonic() - began
    return [
        Figure("renewals", (_scripts(ctx) - calls) / wall_s, "/s", f"{NODES / PERIOD_S:.0f} are due"),
        Figure("CPU of Redis, of one core", 100 * (_redis_cpu_s(ctx) - redis_s) / wall_s, "%"),
        Figure("CPU of the liveness task, of one core", 100 * watching.cpu_s / wall_s, "%"),
        typical("one scan", watching.scan_ms, "ms"),
    ]


def _lose(bench: Bench, ctx: Context, watching: _Watching, silence: "subprocess.Popen[str]") -> list[Figure]:
    bench.say(f"liveness: {LOST} nodes fall silent")
    victims = [node_name(number) for number in range(LOST)]
    assert silence.stdin is not None
    lost_at = time.time()
    threading.Thread(target=_fall_silent, args=(silence, victims)).start()
    until = time.monotonic() + _TIMEOUT_S
    renewed_at: dict[str, float] = {}
    placed_at = 0.0
    while not placed_at:
        assert time.monotonic() < until, f"{len(watching.suspected_at)} suspect, {len(watching.fenced_at)} fenced"
        watching.scan(victims)
        for name in victims:
            stored = read_lease(cast("str | None", ctx.store.redis.get(keys.lease(name))))
            assert stored is not None
            renewed_at[name] = stored.renewed_ms / 1000
        if len(watching.fenced_at) == LOST:
            placed_at = _all_placed(ctx, victims, until)
    first, last = min(renewed_at.values()), max(watching.fenced_at.values())
    delays = [watching.suspected_at[name] - renewed_at[name] - TIMING.lease_ttl for name in victims]
    evidence = [watching.fenced_at[name] - renewed_at[name] for name in victims]
    return [
        typical("from a lease's expiry to Suspect", delays, "s"),
        typical("from a node's last renewal to the evidence (deadline)", evidence, "s"),
        Figure(f"from the last evidence until all {LOST * VMS_EACH:,} VMs are placed", placed_at - last, "s"),
        Figure("from the first node's last renewal until then", placed_at - first, "s"),
        Figure("from the order to fall silent until then", placed_at - lost_at, "s"),
    ]


def _fall_silent(silence: "subprocess.Popen[str]", victims: list[str]) -> None:
    assert silence.stdin is not None
    for name in victims:
        silence.stdin.write(f"{name}\n")
        silence.stdin.flush()
        time.sleep(_BETWEEN_LOSSES_S)


def _all_placed(ctx: Context, victims: list[str], until: float) -> float:
    """Wait until each VM of the lost nodes has a start with a node that was chosen for it; give when that is."""
    while True:
        starts = [o for o in ctx.store.all(VirtualMachineOperation) if o.spec.type is OperationType.START]
        at = time.time()
        chosen = {o.vm_key for o in starts if o.status.planned and o.status.planned not in victims}
        if len(chosen) == LOST * VMS_EACH:
            return at
        assert time.monotonic() < until, f"{len(chosen)} of {LOST * VMS_EACH} are placed"
        time.sleep(0.1)


def _redis_cpu_s(ctx: Context) -> float:
    found = cast("dict[str, float]", ctx.store.redis.info("cpu"))
    return found["used_cpu_user"] + found["used_cpu_sys"]


def _scripts(ctx: Context) -> int:
    found = cast("dict[str, dict[str, int]]", ctx.store.redis.info("commandstats"))
    return found["cmdstat_evalsha"]["calls"]
