"""Which nodes are Ready: their leases, read in one round trip.

A lease is fresh while its sequence goes on. Two clocks must agree that it stopped: Redis's own, by which the lease was
stamped, and this worker's monotonic one, which counts from when this worker first read that sequence. So neither a step
of Redis's clock nor a pause of this worker makes a node look lost. A restarted worker begins anew.

Nothing is fenced or restarted from here.
"""

from dataclasses import dataclass
from typing import cast

from pydantic import BaseModel

from orchestrator.resources import Condition, Node
from orchestrator.services.context import Context, deciding, wake_grant
from orchestrator.services.herd import Herd
from orchestrator.services.inventory import put_node
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors

MARGIN_S = 1.0


class _Lease(BaseModel):
    """What is read of a lease; a node may write more into it."""

    generation: str
    sequence: int
    renewed_ms: int


def _read_lease(text: str | None) -> _Lease | None:
    """Read a lease; one that can't be read is that node's trouble alone, and as good as none."""
    try:
        return None if text is None else _Lease.model_validate_json(text)
    except ValueError:
        return None


@dataclass(slots=True)
class _Read:
    """A lease as this worker read it: since when (monotonic) it shows this sequence."""

    identity: tuple[str, int]
    since: float


class Liveness:
    """Watches leases; keep one object a process."""

    def __init__(self, ctx: Context, herd: Herd) -> None:
        self.ctx = ctx
        self.herd = herd
        self._read: dict[str, _Read] = {}
        self._run_id = ""

    def scan(self) -> None:
        """Read all leases and write the condition LeaseFresh where it changed."""
        run_id = self.ctx.store.run_id()
        if run_id != self._run_id:
            # An outage of Redis stops all renewals: every node gets its whole lease again.
            self._run_id = run_id
            self._read.clear()
        nodes = sorted(self.herd.follower.all(Node), key=lambda node: node.name)
        leases, redis_ms = self._load([node.name for node in nodes])
        clock = self.ctx.clock.monotonic()
        for node, lease in zip(nodes, leases, strict=True):
            fresh, message = self._judge(node.name, lease, redis_ms, clock)
            shown = next((c for c in node.status.conditions if c.type == "LeaseFresh"), None)
            if fresh is not None and (shown is None or (shown.status == "True") != fresh):
                self._write(node.name, fresh=fresh, message=message)
        for gone in self._read.keys() - {node.name for node in nodes}:
            del self._read[gone]

    def _load(self, names: list[str]) -> tuple[list[_Lease | None], int]:
        with redis_errors(self.ctx.store.redis):
            pipe = self.ctx.store.redis.pipeline(transaction=False)
            pipe.time()
            if names:
                pipe.mget([keys.lease(name) for name in names])
            answer = pipe.execute()
        seconds, micros = cast("tuple[int, int]", answer[0])
        values = cast("list[str | None]", answer[1]) if names else []
        return [_read_lease(value) for value in values], seconds * 1000 + micros // 1000

    def _judge(self, name: str, lease: _Lease | None, redis_ms: int, clock: float) -> tuple[bool | None, str]:
        """Say whether a lease is fresh; None while that is not known."""
        ttl = self.ctx.config.lease_ttl
        identity = (lease.generation, lease.sequence) if lease else ("", 0)
        read = self._read.get(name)
        if read is None or read.identity != identity:
            is_first = read is None
            self._read[name] = _Read(identity, clock)
            return (None if is_first or lease is None else True), ""
        unchanged = clock - read.since
        by_redis = (redis_ms - lease.renewed_ms) / 1000 if lease else unchanged
        if unchanged > ttl + MARGIN_S and by_redis > ttl:
            return False, f"its lease was not renewed for {unchanged:.0f} s"
        return None, ""

    def _write(self, name: str, *, fresh: bool, message: str) -> None:
        def decide() -> None:
            old = self.ctx.store.find(Node, name)
            if old is None:
                return
            condition = Condition(
                type="LeaseFresh",
                status="True" if fresh else "False",
                reason="Renewed" if fresh else "Expired",
                message=message,
            )
            batch = self.ctx.store.batch()
            put_node(batch, old, old, (condition,), self.ctx.now())
            self.ctx.store.must_commit(batch)

        deciding(decide)
        wake_grant(self.ctx)
