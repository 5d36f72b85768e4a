"""Operations through a hundred simulated nodes whose migrations take no time, beside Celery tasks that do nothing.

All of it is what `vmherd up --simulated 100` starts: three processes a node, the control plane, and a Redis of its own.
Evicts are asked for by some threads, each VM's next one as soon as its last has ended, so that there is always more to
do than slots for it. The yardstick, on the same Redis and beside the same idle herd: as many workers of one thread with
the same options, and a task that does nothing, whose results are waited for.

What is left in Redis of a VM, and of an operation that has ended, is counted key by key.
"""

import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.celery_app import CeleryMessenger, make_app
from orchestrator.cli.simulated_herd import HerdDirectory
from orchestrator.resources import OperationPhase, OperationType, VirtualMachine, VirtualMachineOperation
from orchestrator.services.context import Context
from orchestrator.services.operations import create_operation, new_operation
from orchestrator.store import Change, ChangeType, Store
from orchestrator.store.follower import Follower
from tests.benchmarks.figures import Figure, Result, typical
from tests.benchmarks.many_workers import ManyWorkers
from tests.benchmarks.running import Bench
from tests.lab.namespaces import REPOSITORY

NODES = 100
VMS = 200
WARM_UP = 200
OPERATIONS = 2_000
TASKS = 4_000
_THREADS = 4
_SPEED_UP = 1e6
_UP_S = 300
_STALLED_S = 60.0

_CLASSES = {
    "resources:VirtualMachineOperation": "the operation's document (24 h, at most 10 a VM)",
    "resources:Event": "its events (1 h)",
    "changes": "its entries in the change stream (the newest 100,000 of all)",
    "claim": "its nodes' marks of what was claimed (1 day)",
    "request": "marks of commits and reports, against doubles (10 min)",
    "reports": "its nodes' report streams (trimmed)",
}
"""What an operation leaves, and for how long, by a part of the key."""


def run(bench: Bench) -> Result:
    """Measure it."""
    with tempfile.TemporaryDirectory(prefix="vmherd-bench-") as folder:
        bench.say(f"throughput: {NODES} simulated nodes and {VMS} VMs start")
        began = time.perf_counter()
        with _herd(Path(folder)) as herd:
            up_s = time.perf_counter() - began
            store = Store.open(herd.redis_url)
            try:
                return _measure(bench, store, herd, Path(folder), up_s)
            finally:
                store.close()


def _measure(bench: Bench, store: Store, herd: HerdDirectory, folder: Path, up_s: float) -> Result:
    bench.say(f"throughput: {NODES} workers of the yardstick start")
    with ManyWorkers(herd.redis_url, NODES, folder) as workers:
        workers.rate(10 * NODES, _THREADS)  # their first task imports what they need
        rates = [workers.rate(TASKS, _THREADS)]
        memory = Counter(_memory(store))
        evicts = Evicts(store, herd.redis_url)
        evicts.run(bench, WARM_UP, "the first evicts")
        warm, cpu = _memory(store), _cpu_seconds(herd)
        seconds = evicts.run(bench, OPERATIONS, f"{OPERATIONS:,} evicts")
        spent = _cpu_seconds(herd)
        left = _memory(store)
        rates.append(workers.rate(TASKS, _THREADS))
    rate, yardstick = OPERATIONS / seconds, sum(rates) / len(rates)
    result = Result("throughput", f"{NODES} simulated nodes, migrations that take no time")
    result.tables["operations a second"] = [
        Figure("evicts, each until it is Completed", rate, "/s", f"{OPERATIONS:,} in {seconds:.1f} s"),
        typical("no-op tasks, as many workers, each until its result is read", rates, "/s"),
        Figure("ratio", rate / yardstick, "x", "aim: at least 0.333"),
    ]
    result.tables["CPU time of one evict, by process"] = [
        Figure(role, (spent[role] - cpu[role]) * 1000 / OPERATIONS, "ms") for role in sorted(spent)
    ]
    result.tables["what is left in Redis"] = [*_of_a_vm(memory), *_of_an_operation(warm, left)]
    result.tables["besides"] = [
        Figure("until all nodes are Ready and all VMs run", up_s, "s"),
        Figure("evicts that did not end Completed", evicts.failed, ""),
    ]
    result.raw = {"evicts_per_s": rate, "noop_per_s": rates, "memory": {"before": memory, "after": left}}
    return result


@contextmanager
def _herd(folder: Path) -> Iterator[HerdDirectory]:
    herd = HerdDirectory(folder / "herd")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    vmherd = [sys.executable, "-m", "orchestrator.cli"]
    size = ("--simulated", str(NODES), "--vms", str(VMS), "--speed-up", str(_SPEED_UP))
    up = [*vmherd, "up", *size, "--detach", "--dir", str(herd.path), "--timeout", f"{_UP_S}s"]
    try:
        subprocess.run(up, env=environment, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        yield herd
    finally:
        herd.stop()


class Evicts:
    """Evicts VMs, each again as soon as its last one has ended.

    Args:
        store: Of the herd.
        url: Of its Redis.

    Attributes:
        failed: How many did not end Completed.
    """

    def __init__(self, store: Store, url: str) -> None:
        self.failed = 0
        self._ctx = Context(store, CeleryMessenger(make_app("bench-evicts", url=url)))
        self._vms = [vm.name for vm in store.all(VirtualMachine)]
        self._ready: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[VirtualMachineOperation] = queue.SimpleQueue()
        self._noted: set[str] = set()

    def run(self, bench: Bench, count: int, what: str) -> float:
        """Have so many end; gives the seconds from the first one's creation to the last one's end."""
        follower = Follower(self._ctx.store, (VirtualMachineOperation,), self._note).start()
        asking = [threading.Thread(target=self._ask) for _ in range(_THREADS)]
        began = time.perf_counter()
        for thread in asking:
            thread.start()
        for vm in self._vms[:count]:
            self._ready.put(vm)
        given = min(count, len(self._vms))
        try:
            for _ in bench.track(range(count), count, what):
                ended = self._ended.get(timeout=_STALLED_S)
                self.failed += ended.status.phase is not OperationPhase.COMPLETED
                if given < count:
                    self._ready.put(ended.spec.virtual_machine_name)
                    given += 1
            return time.perf_counter() - began
        finally:
            for _ in asking:
                self._ready.put(None)
            for thread in asking:
                thread.join()
            follower.stop()

    def _ask(self) -> None:
        while (vm := self._ready.get()) is not None:
            create_operation(self._ctx, new_operation(vm, OperationType.EVICT))

    def _note(self, change: Change | None) -> None:
        operation = change.resource if change is not None and change.type is not ChangeType.DELETED else None
        if not isinstance(operation, VirtualMachineOperation) or operation.is_open:
            return
        if operation.metadata.uid not in self._noted:  # what has ended may still change
            self._noted.add(operation.metadata.uid)
            self._ended.put(operation)


def _cpu_seconds(herd: HerdDirectory) -> dict[str, float]:
    """Give the CPU time that the herd's processes have used, and this one, by their role."""
    found: defaultdict[str, float] = defaultdict(float)
    for member in herd.ask_supervisor(ask="status"):
        role = str(member["name"]).partition("@")[0].rstrip("-12")
        found[role] += _cpu_of(int(member["pid"]))
    return {**found, "(who asks)": sum(os.times()[:2])}


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory(store: Store) -> dict[str, int]:
    """Count the bytes of Redis's keys, by what they are for."""
    found: Counter[str] = Counter()
    redis = store.redis
    names = [str(key) for key in redis.scan_iter(count=10_000)]
    pipe = redis.pipeline(transaction=False)
    for name in names:
        pipe.memory_usage(name, samples=0)
    for name, size in zip(names, pipe.execute(), strict=True):
        found[_class_of(name)] += size or 0
    found["VMs"] = redis.hlen("resources:VirtualMachine")
    found["operations"] = redis.hlen("resources:VirtualMachineOperation")
    return found


def _class_of(key: str) -> str:
    if key.startswith("node:{"):
        return key.partition("}:")[2].partition(":")[0]
    return key if key.startswith("resources:") else key.partition(":")[0]


def _of_a_vm(memory: Counter[str]) -> list[Figure]:
    vms = memory["VMs"]
    document = memory["resources:VirtualMachine"] / vms
    beside = sum(memory[name] for name in ("resources:NodeInventory", "claims", "vm-uids")) / vms
    return [
        Figure("a VM that runs: its document", document / 1024, "KiB"),
        Figure("a VM that runs: its place in inventories and indexes", beside / 1024, "KiB"),
    ]


def _of_an_operation(before: dict[str, int], after: dict[str, int]) -> list[Figure]:
    count = OPERATIONS
    return [
        Figure(f"a finished evict: {text}", (after.get(name, 0) - before.get(name, 0)) / count / 1024, "KiB")
        for name, text in _CLASSES.items()
    ]
