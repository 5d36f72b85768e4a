"""The herd's metrics, from its copy in memory: a scrape costs Redis one round trip, however large the herd is.

A document's lines are kept until it changes (10,000 VMs have 120,000), and go with it, so the series are bounded by the
herd. What only Redis knows (leases, lengths of queues) is asked for in that one round trip; without an answer
nothing of the herd is shown but `vmherd_redis_up 0`: figures of before would look like those of now.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

from orchestrator.errors import StoreUnavailable
from orchestrator.logs import logger
from orchestrator.metrics import Family
from orchestrator.planner.drain import eta_s
from orchestrator.queues import CONTROL, FENCING, LIVENESS, lifecycle_queue, migrate_queue
from orchestrator.resources import (
    GrantState,
    Node,
    NodeDrain,
    NodeFencing,
    OperationPhase,
    Reason,
    Resource,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
    find_condition,
)
from orchestrator.resources.meta import Key, make_key, split_key
from orchestrator.services import measures
from orchestrator.services.context import Clock
from orchestrator.services.herd import Herd, node_capacity
from orchestrator.services.measures import Sample
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors

log = logger(__name__)

REDIS_UP = Family("vmherd_redis_up", "Whether Redis answered this scrape; without it there is nothing of the herd")
COPY_LAG = Family("vmherd_copy_lag_versions", "Changes that the copy in memory, from which this is, has yet to take in")
RECOVERY = Family("vmherd_recovery_mode", "Whether grants are held back until each live node's domains were read anew")
SLOTS_CAP = Family("vmherd_slots_cap", "Migrations that may run at a time: the schedulable nodes")
SLOTS_USED = Family("vmherd_slots_in_use", "Migrations that hold a slot")
OUTBOUND = Family("vmherd_node_migrations_outbound", "Migrations that leave it", ("node",))
INBOUND = Family("vmherd_node_migrations_inbound", "Migrations that reach it", ("node",))
CPU_CAPACITY = Family("vmherd_node_cpu_capacity_millicores", "CPU that VMs may reserve", ("node",))
CPU_RESERVED = Family("vmherd_node_cpu_reserved_millicores", "CPU that is reserved, arriving VMs included", ("node",))
MEMORY_CAPACITY = Family("vmherd_node_memory_capacity_bytes", "Memory that VMs may take", ("node",))
MEMORY_RESERVED = Family("vmherd_node_memory_reserved_bytes", "Memory that is taken, arriving VMs included", ("node",))
NODE_VMS = Family("vmherd_node_virtualmachines", "VMs that occupy it", ("node",))
LEASE_AGE = Family("vmherd_node_lease_age_seconds", "Since its lease was renewed, by Redis's clock", ("node",))
QUEUE_LENGTH = Family("vmherd_queue_length", "Messages that nobody has taken", ("queue",))
QUEUE_AGE = Family(
    "vmherd_queue_age_seconds",
    "For how long the next message has been the next, as seen from here (a lower bound)",
    ("queue",),
)
PENDING = Family(
    "vmherd_operations_pending", "Operations that wait to be granted, by the reason that they show", ("reason",)
)
PENDING_AGE = Family(
    "vmherd_operations_pending_oldest_seconds", "Age of the one that has waited longest; 0 if none does"
)
DRAIN_ETA = Family(
    "vmherd_node_drain_eta_seconds",
    "Until its drain ends, by the rate measured in it; absent while that can't be said",
    ("node",),
)
GRANTS = Family("vmherd_grants", "Open grants by what became of them", ("state",))
SETTLING_AGE = Family(
    "vmherd_grants_settling_oldest_seconds", "Since the grant that is longest among those being settled; 0 if none is"
)

OWN_FAMILIES: Final = tuple(value for value in dict(globals()).values() if isinstance(value, Family))
FAMILIES: Final = (*OWN_FAMILIES, *measures.FAMILIES)
_KINDS: Final = (Node, NodeDrain, NodeFencing, VirtualMachine, VirtualMachineClass, VirtualMachineOperation)
_REASONS: Final = frozenset(reason.value for reason in Reason)


@dataclass(frozen=True, slots=True)
class _Copy:
    """What is taken of the copy in memory, at one instant."""

    version: int
    documents: list[Resource]
    claims: dict[str, tuple[int, int]]
    outbound: Counter[str]
    inbound: Counter[str]
    slots: int
    cap: int

    def of(self, kind: type[Resource]) -> list[Any]:
        return [document for document in self.documents if isinstance(document, kind)]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What Redis answered: its time, its version, its state, leases' instants, queues' lengths and next messages."""

    now_s: float
    version: int
    state: str
    renewed_s: dict[str, float]
    queues: dict[str, tuple[int, str | None]]


class HerdMetrics:
    """Gives the herd's metrics; keep one object a process.

    Args:
        herd: Gives the process's copy; it may be made by the first scrape.
    """

    def __init__(self, herd: Callable[[], Herd], clock: Clock | None = None) -> None:
        self._herd = herd
        self._clock = clock or Clock()
        self._lines: dict[tuple[str, str], tuple[Resource, tuple[Sample, ...]]] = {}
        self._heads: dict[str, tuple[str, float]] = {}

    def render(self) -> str:
        """Give all of them in Prometheus's text format."""
        try:
            herd = self._herd()
            copy = _take(herd)
            asked = _ask(herd, [node.name for node in copy.of(Node)])
        except StoreUnavailable as error:
            log.warning("metrics: no Redis", error=str(error))
            return REDIS_UP.block([REDIS_UP.line(0)])
        lines: dict[str, list[str]] = defaultdict(list)
        for family, line in (*self._of_documents(copy), *_of_nodes(herd, copy), *self._of_redis(copy, asked)):
            lines[family.name].append(line)
        for family, line in (*_of_operations(copy, asked.now_s), *_of_drains(copy)):
            lines[family.name].append(line)
        return "".join(family.block(lines[family.name]) for family in FAMILIES)

    def _of_documents(self, copy: _Copy) -> Iterable[Sample]:
        kept: dict[tuple[str, str], tuple[Resource, tuple[Sample, ...]]] = {}
        for document in copy.documents:
            place = (document.kind_name, document.key)
            known = self._lines.get(place)
            if known is None or known[0] is not document:
                known = (document, measures.samples(document))
            kept[place] = known
            yield from known[1]
        self._lines = kept

    def _of_redis(self, copy: _Copy, asked: _Asked) -> Iterable[Sample]:
        yield REDIS_UP, REDIS_UP.line(1)
        yield COPY_LAG, COPY_LAG.line(max(0, asked.version - copy.version))
        yield RECOVERY, RECOVERY.line(asked.state != "normal")
        for node, renewed_s in asked.renewed_s.items():
            yield LEASE_AGE, LEASE_AGE.line(round(max(0.0, asked.now_s - renewed_s), 3), node)
        now = self._clock.monotonic()
        heads: dict[str, tuple[str, float]] = {}
        for queue, (length, head) in asked.queues.items():
            since = now
            if head is not None:
                known = self._heads.get(queue)
                since = known[1] if known is not None and known[0] == head else now
                heads[queue] = (head, since)
            yield QUEUE_LENGTH, QUEUE_LENGTH.line(length, queue)
            yield QUEUE_AGE, QUEUE_AGE.line(round(now - since, 3), queue)
        self._heads = heads


def _take(herd: Herd) -> _Copy:
    follower = herd.follower
    with follower.lock:
        nodes = [node.name for node in follower.all(Node)]
        claims = {}
        for name in nodes:
            pairs = [(value or "0 0").split() for value in follower.index.get(keys.claims(name), {}).values()]
            claims[name] = (sum(int(pair[0]) for pair in pairs), sum(int(pair[1]) for pair in pairs))
        return _Copy(
            version=follower.version,
            documents=[document for kind in _KINDS for document in follower.all(kind)],
            claims=claims,
            outbound=Counter({n: len(follower.index.get(keys.slots_outbound(n), {})) for n in nodes}),
            inbound=Counter({n: len(follower.index.get(keys.slots_inbound(n), {})) for n in nodes}),
            slots=len(follower.index.get(keys.SLOTS_CLUSTER, {})),
            cap=len(follower.index.get(keys.SCHEDULABLE, {})),
        )


def _ask(herd: Herd, nodes: list[str]) -> _Asked:
    """Ask Redis what only Redis knows.

    Raises:
        StoreUnavailable: It does not answer.
    """
    queues = [CONTROL, LIVENESS, FENCING]
    queues += [queue for node in nodes for queue in (migrate_queue(node), lifecycle_queue(node))]
    redis = herd.store.redis
    with redis_errors(redis):
        pipe = redis.pipeline(transaction=False)
        pipe.time()
        pipe.get(keys.VERSION)
        pipe.hget(keys.IDENTITY, "state")
        for queue in queues:
            pipe.llen(queue)
            pipe.lindex(queue, -1)  # Celery puts at the left and takes from the right
        if nodes:
            pipe.mget([keys.lease(node) for node in nodes])
        answer: list[Any] = pipe.execute()
    seconds, micros = answer[0]
    of_queues = answer[3 : 3 + 2 * len(queues)]
    leases = cast("list[str | None]", answer[-1]) if nodes else []
    renewed = {node: at for node, text in zip(nodes, leases, strict=True) if (at := _renewed_s(text)) is not None}
    lengths = zip(queues, of_queues[::2], of_queues[1::2], strict=True)
    return _Asked(
        now_s=seconds + micros / 1e6,
        version=int(answer[1] or 0),
        state=str(answer[2] or ""),
        renewed_s=renewed,
        queues={queue: (int(length), head) for queue, length, head in lengths},
    )


def _renewed_s(lease: str | None) -> float | None:
    """Read when a lease was renewed; None where there is none, or it can't be read: a node writes it."""
    try:
        return None if lease is None else float(json.loads(lease)["renewed_ms"]) / 1000
    except (ValueError, TypeError, KeyError):
        return None


def _of_nodes(herd: Herd, copy: _Copy) -> Iterable[Sample]:
    yield SLOTS_CAP, SLOTS_CAP.line(copy.cap)
    yield SLOTS_USED, SLOTS_USED.line(copy.slots)
    vms = Counter(vm.status.node_name for vm in copy.of(VirtualMachine) if vm.status.phase.occupies_node)
    for node in copy.of(Node):
        name = node.name
        memory_mib, millicores = node_capacity(herd.store, node)
        taken_mib, taken = copy.claims[name]
        yield CPU_CAPACITY, CPU_CAPACITY.line(millicores, name)
        yield CPU_RESERVED, CPU_RESERVED.line(taken, name)
        yield MEMORY_CAPACITY, MEMORY_CAPACITY.line(memory_mib * 2**20, name)
        yield MEMORY_RESERVED, MEMORY_RESERVED.line(taken_mib * 2**20, name)
        yield NODE_VMS, NODE_VMS.line(vms[name], name)
        yield OUTBOUND, OUTBOUND.line(copy.outbound[name], name)
        yield INBOUND, INBOUND.line(copy.inbound[name], name)


def _of_operations(copy: _Copy, now_s: float) -> Iterable[Sample]:
    reasons: Counter[str] = Counter()
    states: Counter[str] = Counter({state.value: 0 for state in GrantState})
    waiting_since = settling_since = now_s
    for operation in cast("list[VirtualMachineOperation]", copy.of(VirtualMachineOperation)):
        grant, created_at = operation.status.grant, operation.metadata.creation_timestamp
        if grant is not None:
            states[grant.state.value] += 1
            if grant.state is GrantState.SETTLING:
                settling_since = min(settling_since, grant.granted_at.timestamp())
        elif operation.status.phase is OperationPhase.PENDING:
            condition = find_condition(operation.status.conditions, "Completed")
            reason = condition.reason if condition is not None else ""
            reasons[reason if reason in _REASONS else "None"] += 1
            if created_at is not None:
                waiting_since = min(waiting_since, created_at.timestamp())
    for reason, count in sorted(reasons.items()):
        yield PENDING, PENDING.line(count, reason)
    for state, count in states.items():
        yield GRANTS, GRANTS.line(count, state)
    yield PENDING_AGE, PENDING_AGE.line(round(now_s - waiting_since, 3))
    yield SETTLING_AGE, SETTLING_AGE.line(round(now_s - settling_since, 3))


def _of_drains(copy: _Copy) -> Iterable[Sample]:
    open_ones = [drain for drain in cast("list[NodeDrain]", copy.of(NodeDrain)) if drain.is_open]
    if open_ones:
        operations = {operation.key: operation for operation in copy.of(VirtualMachineOperation)}
        for drain in open_ones:
            places = [make_key(vm.operation, split_key(Key(key))[0]) for key, vm in drain.vms.items() if vm.operation]
            left = eta_s(drain, {operations[one].name: operations[one] for one in places if one in operations})
            if left is not None:
                yield DRAIN_ETA, DRAIN_ETA.line(round(left, 1), drain.name)
