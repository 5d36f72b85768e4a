"""The store at 1,000 nodes and 10,000 VMs: commits a second, and passes of the grant task.

Without a lab: a plain Redis on this machine, which writes each change through to its disk as in production. The
yardstick is a raw SET of as many bytes on the same Redis, from as many threads.
"""

import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.planner.migration import plan_grants
from orchestrator.queues import Message
from orchestrator.resources import Node, ObjectMeta, OperationType, Resource, VirtualMachine, VmPhase, new_metadata
from orchestrator.resources.meta import Condition
from orchestrator.resources.node import Capacity, HypervisorInfo
from orchestrator.services.context import Context
from orchestrator.services.granting import grant_pending
from orchestrator.services.herd import Herd
from orchestrator.services.operations import create_operation, new_operation
from orchestrator.services.recovery import recover
from orchestrator.store import Store
from orchestrator.store.batch import encode
from tests.benchmarks.figures import Figure, Result, typical
from tests.benchmarks.running import Bench
from tests.redis_server import RedisServer

NODES = 1_000
VMS = 10_000
PENDING = 1_000
"""Evicts that wait: of the VMs of the first hundred nodes, ten each."""
_VMS_A_NODE = VMS // NODES
_BATCH = 200
_SECONDS = 3.0
_THREADS = 8
_PASSES = 5

T = TypeVar("T")


class Nobody:
    """Takes messages and results, and sends nothing."""

    def send(self, message: Message) -> None:
        """Drop it."""

    def finish(self, task_id: str, result: dict[str, Any]) -> None:
        """Drop it."""


def run(bench: Bench) -> Result:
    """Measure it."""
    with tempfile.TemporaryDirectory(prefix="vmherd-bench-") as folder:
        server = RedisServer(Path(folder) / "redis", is_durable=True)
        server.start()
        try:
            ctx = Context(Store.open(server.url), Nobody())
            try:
                return _measure(bench, ctx)
            finally:
                ctx.store.close()
        finally:
            server.kill()


def _measure(bench: Bench, ctx: Context) -> Result:
    result = Result("store", f"{NODES:,} nodes, {VMS:,} VMs on Redis with appendfsync always")
    began = time.perf_counter()
    vms = _populate(bench, ctx)
    populated_s = time.perf_counter() - began
    result.tables["commits (one VM's status each)"] = _rates(bench, ctx, vms)
    began = time.perf_counter()
    herd = Herd(ctx.store).start()
    loaded_s = time.perf_counter() - began
    try:
        result.tables["grant"] = _passes(bench, ctx, herd, vms)
    finally:
        herd.stop()
    result.tables["besides"] = [
        Figure("writing all documents, in commits of 200", populated_s, "s"),
        Figure("loading the copy in memory (a control worker's start)", loaded_s, "s"),
    ]
    return result


# --- documents ----------------------------------------------------------------------------------------------------


def _populate(bench: Bench, ctx: Context) -> list[VirtualMachine]:
    at = datetime.now(UTC)
    _commit_all(bench, ctx, (_node(number, at) for number in range(NODES)), NODES, "nodes are written")
    stored = _commit_all(bench, ctx, (_vm(number, at) for number in range(VMS)), VMS, "VMs are written")
    while not recover(ctx):  # a new Redis is recorded as the one that grants rest on
        pass
    return [vm for vm in stored if isinstance(vm, VirtualMachine)]


def _commit_all(bench: Bench, ctx: Context, resources: Iterable[Resource], total: int, what: str) -> list[Resource]:
    stored: list[Resource] = []
    for chunk in bench.track(_chunks(resources, _BATCH), -(-total // _BATCH), what):
        batch = ctx.store.batch()
        for resource in chunk:
            batch.create(resource)
        stored += ctx.store.must_commit(batch)
    return stored


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _node(number: int, at: datetime) -> Node:
    name = f"n{number:04}"
    meta = ObjectMeta(name=name, labels={"kubernetes.io/hostname": name})
    ready = Condition(type="Ready", status="True", reason="NodeReady", last_transition_time=at)
    return Node(metadata=new_metadata(meta, namespaced=False, now=at)).with_status(
        capacity=Capacity(cpu=64, memory_mib=262_144),
        hypervisor=HypervisorInfo(migration_uri=f"qemu+tcp://{name}/system"),
        conditions=(ready,),
    )


def _vm(number: int, at: datetime) -> VirtualMachine:
    manifest = {
        "metadata": {"name": f"vm-{number:05}"},
        "spec": {"cpu": {"cores": 2}, "memory": {"size": "4Gi"}, "domainTemplate": "<domain/>" + " " * 1_500},
    }
    wanted = VirtualMachine.model_validate(manifest)
    vm = wanted.with_(metadata=new_metadata(wanted.metadata, namespaced=True, now=at))
    return vm.with_status(phase=VmPhase.RUNNING, node_name=f"n{number // _VMS_A_NODE:04}", incarnation=1)


# --- commits ------------------------------------------------------------------------------------------------------


def _rates(bench: Bench, ctx: Context, vms: list[VirtualMachine]) -> list[Figure]:
    body = encode(vms[0])
    lanes = [vms[number::_THREADS] for number in range(_THREADS)]

    def raw(lane: int, number: int) -> None:
        ctx.store.redis.set(f"raw:{lane}:{number % 100}", body)

    def commit(lane: int, number: int) -> None:
        own = lanes[lane]
        place = number % len(own)
        old = own[place]
        batch = ctx.store.batch().put(old, old.with_status(counter=old.status.counter + 1))
        own[place] = ctx.store.must_commit(batch)[0]  # type: ignore[call-overload]

    figures = []
    for threads in (1, _THREADS):
        bench.say(f"store: raw SETs and commits from {threads} thread(s), {_SECONDS:g} s each")
        sets, commits = _rate(raw, threads), _rate(commit, threads)
        who = "1 client" if threads == 1 else f"{threads} threads of one process"
        figures += [
            Figure(f"raw SET of {len(body)} bytes, {who}", sets, "/s"),
            Figure(f"commits, {who}", commits, "/s", f"{commits / sets:.2f} of a raw SET's rate"),
        ]
    for lane, own in enumerate(lanes):
        vms[lane::_THREADS] = own
    return figures


def _rate(work: Callable[[int, int], None], threads: int) -> float:
    """Give how often a second `work(thread, number)` is done by some threads together."""
    stop = threading.Event()

    def lane(which: int) -> int:
        done = 0
        while not stop.is_set():
            work(which, done)
            done += 1
        return done

    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        running = [pool.submit(lane, which) for which in range(threads)]
        stop.wait(_SECONDS)
        stop.set()
        return sum(one.result() for one in running) / (time.perf_counter() - began)


# --- grants -------------------------------------------------------------------------------------------------------


def _passes(bench: Bench, ctx: Context, herd: Herd, vms: list[VirtualMachine]) -> list[Figure]:
    quiet = [_timed_ms(lambda: grant_pending(ctx, herd)) for _ in range(_PASSES)]
    evicted = vms[:PENDING]
    created_ms = [
        _timed_ms(lambda name=vm.name: create_operation(ctx, new_operation(name, OperationType.EVICT)))  # type: ignore[misc]
        for vm in bench.track(evicted, len(evicted), f"{PENDING:,} evicts are admitted")
    ]
    bench.say(f"store: passes of the grant task over {PENDING:,} evicts")
    snapshots = [_timed_ms(herd.snapshot) for _ in range(_PASSES)]
    snapshot = herd.snapshot()
    plans = [_timed_ms(lambda: list(plan_grants(snapshot))) for _ in range(_PASSES)]
    granted: list[int] = []
    first_ms = _timed_ms(lambda: granted.append(grant_pending(ctx, herd)))
    waiting = [_timed_ms(lambda: grant_pending(ctx, herd)) for _ in range(_PASSES)]
    return [
        typical("a pass with nothing pending", quiet, "ms"),
        typical("admission of an evict: create_operation()", created_ms, "ms"),
        typical(f"a snapshot, {PENDING:,} pending", snapshots, "ms"),
        typical("its plan", plans, "ms"),
        Figure(
            f"the pass that grants {granted[0]} and says of {PENDING - granted[0]} why they wait",
            first_ms,
            "ms",
            f"{first_ms / PENDING:.2f} ms a commit",
        ),
        typical("a pass in which nothing changes", waiting, "ms"),
    ]


def _timed_ms(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000
