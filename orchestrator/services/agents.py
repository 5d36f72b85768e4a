"""Whether each node's agent is there: apart from its lease, which a process of its own renews.

A node whose agent is silent may well run its VMs, and is not lost; but nothing starts or lands there, as nobody would
report it. As with leases, what counts is that a worker of the control plane saw no sign of life for so long by its own
monotonic clock, with the same Redis there all the time.
"""

from dataclasses import dataclass
from typing import cast

from orchestrator.resources import Condition, Node, find_condition
from orchestrator.services.context import Context, deciding, wake_grant
from orchestrator.services.herd import Herd
from orchestrator.services.inventory import AGENT_ALIVE, put_node
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors

_MARGIN_S = 1.0


@dataclass(slots=True)
class _Read:
    """A sign of life as this worker read it: since when (monotonic) it shows this one."""

    sign: str
    since: float


class AgentWatch:
    """Watches agents; keep one object a process."""

    def __init__(self, ctx: Context, herd: Herd) -> None:
        self.ctx = ctx
        self.herd = herd
        self._read: dict[str, _Read] = {}
        self._run_id = ""

    def scan(self) -> None:
        """Read all signs of life and write the condition AgentAlive where it changed."""
        run_id = self.ctx.store.run_id()
        if run_id != self._run_id:
            self._run_id = run_id  # an outage of Redis silences all of them
            self._read.clear()
        nodes = sorted((n for n in self.herd.follower.all(Node) if not n.spec.witness), key=lambda node: node.name)
        if not nodes:
            return
        with redis_errors(self.ctx.store.redis):
            found = cast("list[str | None]", self.ctx.store.redis.mget([keys.agent(node.name) for node in nodes]))
        now = self.ctx.clock.monotonic()
        for node, sign in zip(nodes, found, strict=True):
            alive = self._judge(node.name, sign or "", now)
            shown = find_condition(node.status.conditions, AGENT_ALIVE)
            if alive is not None and (shown.status == "True" if shown else True) != alive:
                self._write(node.name, alive=alive)
        for gone in self._read.keys() - {node.name for node in nodes}:
            del self._read[gone]

    def _judge(self, name: str, sign: str, now: float) -> bool | None:
        """Say whether an agent is there; None while that is not known."""
        read = self._read.get(name)
        if read is None or read.sign != sign:
            self._read[name] = _Read(sign, now)
            return None if read is None else True
        return False if now - read.since > self.ctx.config.lease_ttl + _MARGIN_S else None

    def _write(self, name: str, *, alive: bool) -> None:
        def decide() -> bool:
            old = self.ctx.store.find(Node, name)
            shown = find_condition(old.status.conditions, AGENT_ALIVE) if old is not None else None
            if old is None or (shown.status == "True" if shown else True) == alive:
                return False  # another worker was first
            condition = Condition(
                type=AGENT_ALIVE,
                status="True" if alive else "False",
                reason="AgentAlive" if alive else "AgentSilent",
                message="" if alive else "its agent gives no sign of life",
            )
            batch = self.ctx.store.batch()
            put_node(batch, old, old, (condition,), self.ctx.now())
            self.ctx.store.must_commit(batch)
            return True

        if deciding(decide):
            wake_grant(self.ctx)
