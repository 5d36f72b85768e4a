"""A node's heartbeat in simulated time: the real state machine, with peers and a watchdog that live there too.

Its shell is a few lines of its own, as the real one waits for sockets. What it does with each effect is the same.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

from orchestrator.errors import StoreUnavailable
from orchestrator.settings import settings
from orchestrator.store.node_store import NodeStore
from tests.scenarios.engine.processes import Processes
from tests.scenarios.engine.schedule import Process, Schedule
from workers.heart import Answer, Ask, Disarm, Feed, Heart, Identity, Open, Question, Renew, Says, Tell

_WAY_S: Final = 0.001
"""From one host to another."""

Message = Question | tuple[str, str, Says]
Tells = Callable[[str, str], None]


class PeerNetwork:
    """What heartbeats say to each other.

    Attributes:
        cut: Hosts that no peer reaches, and that reach none.
        mailboxes: What has arrived, by host; a process that is not there, or frozen, reads nothing.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.cut: set[str] = set()
        self.mailboxes: dict[str, deque[Message]] = {}
        self._schedule = schedule

    def send(self, source: str, target: str, message: Message) -> None:
        """Send a message; it may be lost."""
        if source in self.cut:
            return

        def arrive() -> None:
            if target not in self.cut and target in self.mailboxes:
                self.mailboxes[target].append(message)

        self._schedule.at(self._schedule.now + _WAY_S, arrive)


class Watchdog:
    """A host's watchdog: what it resets it when it is not fed in time.

    Args:
        schedule: That has the time.
        reset: Resets the host.
    """

    def __init__(self, schedule: Schedule, reset: Callable[[], None]) -> None:
        self._schedule = schedule
        self._reset = reset
        self._timeout_s: int | None = None
        self._fed = 0

    @property
    def is_counting(self) -> bool:
        """Whether it would reset the host."""
        return self._timeout_s is not None

    def open(self, timeout_s: int) -> None:
        """Start it."""
        self._timeout_s = timeout_s
        self.feed()

    def feed(self) -> None:
        """Let it begin to count anew."""
        assert self._timeout_s is not None
        self._fed += 1
        fed = self._fed

        def expire() -> None:
            if self._fed == fed and self.is_counting:
                self.disarm()
                self._reset()

        self._schedule.at(self._schedule.now + self._timeout_s, expire)

    def disarm(self) -> None:
        """Stop it; so does the loss of power."""
        self._timeout_s = None


class SimulatedHeartbeat:
    """The heartbeat process of one node.

    Args:
        process: It.
        store: The node's view of Redis.
        processes: All of the herd.
        network: To its peers.
        watchdog: Of its host; None: it has none.
        boot_id: Of its host's boot.
        tell: Told what it would log.
        is_witness: Its machine runs no VMs.
    """

    def __init__(
        self,
        process: Process,
        store: NodeStore,
        processes: Processes,
        network: PeerNetwork,
        watchdog: Watchdog | None,
        boot_id: str,
        tell: Tells,
        *,
        is_witness: bool = False,
    ) -> None:
        self._store = store
        self._schedule = processes.schedule
        self._network = network
        self._watchdog = watchdog
        self._tell = tell
        self._node = store.node
        self._mailbox = network.mailboxes[self._node] = deque()
        identity = Identity(self._node, f"g{process.number}", boot_id, f"{self._node}:1", is_witness)
        self.heart = Heart(identity, settings().timing, has_watchdog=watchdog is not None, failsafe=settings().failsafe)

    def run(self) -> None:
        """Beat for ever."""
        while not self.heart.has_stopped:
            self._take_messages()
            for effect in self.heart.due(self._schedule.now):
                self._do(effect)
            left = self.heart.next_at(self._schedule.now) - self._schedule.now
            self._schedule.wait(lambda: bool(self._mailbox), max(left, 1e-3))

    def _take_messages(self) -> None:
        while self._mailbox:
            match self._mailbox.popleft():
                case Question() as question:
                    self.heart.asked(question, self._schedule.now)
                case (peer, nonce, says):
                    self.heart.answered(peer, nonce, says, self._schedule.now)

    def _do(self, effect: object) -> None:
        now = self._schedule.now
        match effect:
            case Renew(lease):
                try:
                    reply = self._store.renew_lease(lease, self.heart.peer_key)
                except StoreUnavailable as error:
                    self.heart.not_renewed(lease, str(error))
                else:
                    self.heart.renewed(lease, reply, self._schedule.now)
            case Ask(nonce, peers):
                for peer in peers:
                    self._network.send(self._node, peer, Question(self._node, nonce))
            case Answer(question, says):
                self._network.send(self._node, question.asker, (self._node, question.nonce, says))
            case Open(timeout_s) if self._watchdog is not None and self.heart.may_feed(now):
                self._watchdog.open(timeout_s)
                self.heart.opened(timeout_s, "simulated", now)
            case Open():
                self.heart.not_opened("there is no permission any more", now)
            case Feed() if self._watchdog is not None and self.heart.may_feed(now):
                self._watchdog.feed()
                self.heart.fed(now)
            case Disarm() if self._watchdog is not None:
                self._watchdog.disarm()
                self.heart.disarmed()
            case Tell(event, is_warning, why) if is_warning:
                self._tell(f"heartbeat/{self._node}", event + (f": {why}" if why else ""))
            case _:
                pass
