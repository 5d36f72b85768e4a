"""A herd whose leases, clock and power a test has in its hands; `tests.fakes.Stage` has the rest."""

from dataclasses import dataclass, field
from typing import Any

from orchestrator.fencing.agents import Answer, Power
from orchestrator.lease import Lease, Membership
from orchestrator.queues import Task
from orchestrator.resources import Node, NodeFencing
from orchestrator.resources.fencing import Bmc, NodeFencingSpec
from orchestrator.services.context import Clock, Context
from orchestrator.services.failover import recover_node
from orchestrator.services.fencing import Tools, run_fencing, set_fencing
from orchestrator.services.liveness import Liveness
from orchestrator.store import keys
from tests.builders import a_lease
from tests.fakes import Stage


def a_bmc(host: str, **more: Any) -> Bmc:
    """The BMC whose cable leads to a host."""
    return Bmc(agent="fence_fake", options={"ip": host}, **more)


@dataclass
class Switches:
    """BMCs, by the host to which their cables lead.

    Attributes:
        power: What each says.
        stuck: Hosts whose power stays on, though `off` succeeds.
        problems: Hosts whose BMC can't be read, and why.
        cut: What was cut, in order.
        on_cut: Called with the host whose power goes.
    """

    power: dict[str, Power] = field(default_factory=dict)
    stuck: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)
    on_cut: Any = None

    def status(self, bmc: Bmc) -> Answer:
        """Read it."""
        host = bmc.options["ip"]
        if host in self.problems:
            return Answer(Power.UNKNOWN, self.problems[host])
        return Answer(self.power.get(host, Power.ON))

    def switch(self, bmc: Bmc, *, on: bool) -> str:
        """Switch it."""
        host = bmc.options["ip"]
        if host in self.stuck:
            return ""
        if not on:
            self.cut.append(host)
            if self.on_cut:
                self.on_cut(host)
        self.power[host] = Power.ON if on else Power.OFF
        return ""


class FencingStage:
    """Leases, clock, power and liveness around a stage.

    Args:
        stage: With its nodes.
        armed: Whether the nodes' leases record an armed watchdog.

    Attributes:
        beating: Nodes that renew their leases as time passes.
        holding: Whether those acknowledge suspicions.
    """

    def __init__(self, stage: Stage, *, armed: bool = False, enabled: bool = True) -> None:
        self.stage = stage
        self.now_s = 1000.0
        self.switches = Switches()
        self.hosts = dict(stage.nodes)
        self.beating = set(stage.nodes)
        self.holding = True
        self.listening: set[str] = set()
        self.armed = armed
        self._sequence = 0
        self._held: dict[str, tuple[str, ...]] = {}
        clock = Clock(stage.ctx.clock.now, lambda: self.now_s, lambda seconds: self.scan(1, seconds))
        self.ctx = Context(stage.store, stage.outbox, clock)
        self.tools = Tools(self.switches, lambda host, _port: host in self.listening)
        self.publish(Membership(1, {name: f"{name}:1" for name in stage.nodes}))
        if enabled:
            for name in stage.nodes:
                set_fencing(self.ctx, name, lambda spec: spec.with_(enabled=True))
        self.liveness = Liveness(self.ctx, stage.herd)
        self.scan(3)

    def publish(self, membership: Membership) -> None:
        """Publish who votes."""
        self.stage.store.redis.set(keys.MEMBERSHIP, membership.text())

    def configure(self, name: str, **spec: Any) -> None:
        """Say what a node's fencing is to be."""
        set_fencing(self.ctx, name, lambda old: NodeFencingSpec(**{**old.model_dump(), **spec}))

    def renew(self, name: str, **fields: Any) -> Lease:
        """Have a node renew its lease once."""
        self._sequence += 1
        values = {"generation": f"g-{name}", "boot_id": f"b-{name}", "created": float(self._sequence)}
        values |= {"address": f"{name}:1", "armed": self.armed, "membership": 1, "suspicions": self._held.get(name, ())}
        lease = a_lease(self._sequence, **{**values, **fields})
        reply = self.hosts[name].store.renew_lease(lease)
        self._held[name] = tuple(reply.suspicions.values()) if self.holding else ()
        return lease

    def pass_time(self, seconds: float) -> None:
        """Let time pass: those that beat do so, and the leases of the others grow old by Redis's clock too."""
        self.now_s += seconds
        for name in sorted(self.hosts):
            if name in self.beating:
                self.renew(name)
            else:
                self._age(name, seconds)

    def _age(self, name: str, seconds: float) -> None:
        redis = self.stage.store.redis
        text = str(redis.get(keys.lease(name)) or "")
        head, _, rest = text.partition(",")
        if head.startswith('{"renewed_ms":'):
            redis.set(keys.lease(name), f'{{"renewed_ms":{int(head[14:]) - int(seconds * 1000)},{rest}')

    def scan(self, times: int = 1, step_s: float = 1.0) -> None:
        """Let time pass and liveness look, so many times."""
        for _ in range(times):
            self.pass_time(step_s)
            self.stage.herd.follower.sync()
            self.liveness.scan()
            self.stage.herd.follower.sync()

    def lose(self, name: str) -> None:
        """A host dies: nothing runs there any more, and it answers nothing."""
        self.beating.discard(name)
        self.stage.nodes.pop(name, None)
        self.stage.world.hosts[name].clear()

    def boot(self, name: str) -> None:
        """It is booted: it renews its lease, reports, and answers."""
        self.stage.nodes[name] = self.hosts[name]
        self.renew(name, boot_id="b-next", generation="g-next")
        self.hosts[name].list_all()
        self.hosts[name].answer()
        self.stage.read()

    def settle(self) -> None:
        """Bring what waits for the fencing workers."""
        for message in self.stage.outbox.take(Task.FENCE):
            run_fencing(self.ctx, self.tools, str(message.args[0]))
        for message in self.stage.outbox.take(Task.FAILOVER):
            recover_node(self.ctx, self.stage.herd, str(message.args[0]))

    def fencing(self, name: str) -> NodeFencing:
        """Read a node's fencing."""
        return self.stage.store.get(NodeFencing, name)

    def until_tried(self, name: str, seconds: int = 60) -> NodeFencing:
        """Let time pass until a fencing attempt about a node was made."""
        for _ in range(seconds):
            self.scan()
            if any(message.args == (name,) for message in self.stage.outbox.sent if message.task is Task.FENCE):
                self.settle()
                return self.fencing(name)
        found = self.stage.store.find(NodeFencing, name)
        raise AssertionError(f"not tried: {found and found.status}, {self.stage.store.find(Node, name)}")

    def has_node(self, name: str) -> bool:
        """Whether a node is in the herd."""
        return self.stage.store.find(Node, name) is not None


def until_fenced(herd: FencingStage, name: str, seconds: int = 120) -> float:
    """Let time pass until there is evidence; give how long it took."""
    for second in range(seconds):
        herd.scan()
        herd.settle()
        found = herd.stage.store.find(NodeFencing, name)
        if found is not None and found.status.phase.has_evidence:
            return second
    raise AssertionError(f"no evidence: {herd.fencing(name).status}")
