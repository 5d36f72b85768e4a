"""The heartbeat process: renews the node's lease, answers peers, feeds the watchdog. `vmherd run heartbeat`.

A process of its own, so that nothing else of the node delays it or goes down with it: no libvirt, no Celery, no
pydantic, memory locked, and what it logs is written by a thread that may wait for a full disk. The agent may be
restarted as one likes. What may be done is decided by `heart`; this is its shell.

Two threads: one waits for Redis, and this one for everything else. Feeding never waits for either.
"""

import contextlib
import ctypes
import json
import os
import queue
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Final, Protocol
from uuid import uuid4

from orchestrator.errors import Invalid, StoreUnavailable, VmherdError
from orchestrator.lease import Lease, Reply, Timing, timing_of
from workers.heart import Answer, Ask, Disarm, Effect, Feed, Heart, Identity, Open, Renew, Tell
from workers.peers import PORT, Answered, PeerSocket, parse_address
from workers.renewal import LeaseStore, RedisLink
from workers.watchdog import LinuxWatchdog, WatchdogDevice, WatchdogFailed, find_watchdog

_MCL_CURRENT_AND_FUTURE: Final = 3
_STACK_BYTES: Final = 512 * 1024
_LATE_S: Final = 0.05
"""What an attempt at Redis may take beyond its timeout before it is given up from here."""


def boottime() -> float:
    """Read CLOCK_BOOTTIME: it goes on while the host sleeps, and nobody sets it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Journal(Protocol):
    """Takes a line for people; must not wait."""

    def __call__(self, event: str, *, warning: bool = False, **fields: str) -> None: ...  # noqa: D102


class Heartbeat:
    """A heart's shell.

    Args:
        heart: What decides.
        store: Where the lease is renewed.
        peers: Where peers ask and answer; None: nobody can.
        device: The watchdog; None: there is none.
        journal: For people.
        clock: CLOCK_BOOTTIME.
    """

    def __init__(
        self,
        heart: Heart,
        store: LeaseStore,
        peers: PeerSocket | None,
        device: WatchdogDevice | None,
        journal: Journal,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self.heart = heart
        self._store = store
        self._peers = peers
        self._device = device
        self._journal = journal
        self._clock = clock
        self._renewals: queue.SimpleQueue[tuple[Lease, str] | None] = queue.SimpleQueue()
        self._outcomes: deque[tuple[Lease, Reply | Exception]] = deque()
        self._under_way: tuple[Lease, float] | None = None
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)

    def run(self) -> None:
        """Beat until a planned stop has ended it; see `stop`."""
        _begin("renewal", self._renew)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._woken, selectors.EVENT_READ)
                if self._peers is not None:
                    selector.register(self._peers, selectors.EVENT_READ)
                while not self.heart.has_stopped:
                    selector.select(max(0.0, self._step() - self._clock()))
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(4096)
            for effect in self.heart.due(self._clock()):
                if isinstance(effect, Tell):  # what the last turn did is still said; nothing else is begun
                    self._do(effect)
        finally:
            self._renewals.put(None)

    def stop(self) -> None:
        """Begin a planned stop. May be called from a signal's handler."""
        self.heart.stop()
        self.wake()

    def wake(self) -> None:
        """Have the loop look again."""
        with contextlib.suppress(BlockingIOError):
            self._wake.send(b"x")

    # --- one turn ---------------------------------------------------------------------------------------------------

    def _step(self) -> float:
        """Take what came, do what is due; gives when to look again."""
        self._take_outcomes()
        self._take_messages()
        for effect in self.heart.due(self._clock()):
            self._do(effect)
        now = self._clock()
        next_at = self.heart.next_at(now)
        return min(next_at, self._under_way[1]) if self._under_way else next_at

    def _do(self, effect: Effect) -> None:
        match effect:
            case Renew():
                given_up_at = self._clock() + self.heart.timing.redis_timeout + _LATE_S
                self._under_way = effect.lease, given_up_at
                self._renewals.put((effect.lease, self.heart.peer_key))
            case Ask():
                if self._peers is not None:
                    for peer, address in effect.peers.items():
                        self._peers.ask(self.heart.peer_key, peer, address, effect.nonce)
            case Answer():
                if self._peers is not None:
                    self._peers.answer(self.heart.peer_key, effect.question, effect.says)
            case Open():
                self._open(effect.timeout_s)
            case Feed():
                self._feed()
            case Disarm():
                self._disarm()
            case Tell():
                more = {"why": effect.why} if effect.why else {}
                self._journal(effect.event, warning=effect.is_warning, **more)

    def _open(self, timeout_s: int) -> None:
        # Rule 3: the clock is read, compared, and the device opened; opening feeds.
        if self._device is None or not self.heart.may_feed(self._clock()):
            self.heart.not_opened("there is no permission any more", self._clock())
            return
        try:
            armed = self._device.open(timeout_s)
        except WatchdogFailed as error:
            self.heart.not_opened(str(error), self._clock())
        else:
            self.heart.opened(armed.timeout_s, armed.identity, self._clock())

    def _feed(self) -> None:
        """Feed the watchdog: read the clock, compare, write. One check a feed (rule 3, trace 2)."""
        now = self._clock()
        if self._device is None or not self.heart.may_feed(now):
            return
        try:
            self._device.feed()
        except WatchdogFailed as error:
            self._journal("watchdog was not fed", warning=True, why=str(error))
        self.heart.fed(now)

    def _disarm(self) -> None:
        if self._device is None:
            return
        try:
            self._device.disarm()
        except WatchdogFailed as error:
            self._journal("watchdog could not be disarmed: it may reset this host", warning=True, why=str(error))
        self.heart.disarmed()

    # --- Redis and peers --------------------------------------------------------------------------------------------

    def _renew(self) -> None:
        while (item := self._renewals.get()) is not None:
            lease, peer_key = item
            if self._under_way is None or self._under_way[0] is not lease:
                continue  # given up already, while this thread waited for something
            try:
                outcome: Reply | Exception = self._store.renew_lease(lease, peer_key)
            except Exception as error:  # noqa: BLE001 - whatever it is, there was no OK
                outcome = error
            self._outcomes.append((lease, outcome))
            self.wake()

    def _take_outcomes(self) -> None:
        while self._outcomes:
            lease, outcome = self._outcomes.popleft()
            if self._under_way is not None and self._under_way[0] is lease:
                self._under_way = None
            if isinstance(outcome, Reply):
                self.heart.renewed(lease, outcome, self._clock())
            else:
                self.heart.not_renewed(lease, str(outcome))
        if self._under_way is not None and self._clock() >= self._under_way[1]:
            lease, _ = self._under_way
            self._under_way = None
            self.heart.not_renewed(lease, "Redis does not answer in time")

    def _take_messages(self) -> None:
        for message in self._peers.received(self.heart.peer_key) if self._peers is not None else ():
            if isinstance(message, Answered):
                self.heart.answered(message.peer, message.nonce, message.says, self._clock())
            else:
                self.heart.asked(message, self._clock())


class LineJournal:
    """Writes lines of JSON to standard error, from a thread; what a stuck pipe does not take is dropped."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._lines: queue.Queue[bytes] = queue.Queue(maxsize=256)
        _begin("journal", self._write)

    def __call__(self, event: str, *, warning: bool = False, **fields: str) -> None:
        """Write a line, some time."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        level = "warning" if warning else "info"
        line = {**fields, "event": event, "process": "heartbeat", "node": self._node, "level": level, "timestamp": at}
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(json.dumps(line).encode() + b"\n")

    def _write(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), self._lines.get())

    def drain(self) -> None:
        """Give the thread a moment for what is left."""
        end = time.monotonic() + 0.5
        while not self._lines.empty() and time.monotonic() < end:
            time.sleep(0.01)


def _begin(name: str, run: Callable[[], None]) -> None:
    """Start a thread, with a small stack: locked memory is all there from the beginning."""
    before = threading.stack_size(_STACK_BYTES)
    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    finally:
        threading.stack_size(before)


def lock_memory() -> str:
    """Keep this process's memory from being swapped out: a host that swaps would otherwise lose its heartbeat first.

    Returns:
        Why it is not; empty when it is.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT_AND_FUTURE) == 0:
        return ""
    return os.strerror(ctypes.get_errno())


def make_heartbeat(
    environment: Mapping[str, str], journal: Journal, device: WatchdogDevice | None, *, is_witness: bool = False
) -> Heartbeat:
    """Make the heartbeat that an environment describes.

    Raises:
        VmherdError: Some setting can't be used.
    """
    node = environment.get("VMHERD_NODE", "")
    if not node:
        raise Invalid("VMHERD_NODE is not set: the name under which this host joins the herd")
    timing = timing_of(environment)
    link = RedisLink(environment.get("VMHERD_REDIS_URL", "redis://127.0.0.1:6379/0"), node, timing.redis_timeout)
    peers = _open_peers(node, environment.get("VMHERD_PEER_ADDRESS", ""), link, timing)
    boot_id = environment.get("VMHERD_BOOT_ID") or Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    identity = Identity(node, uuid4().hex, boot_id, peers.address, is_witness)
    failsafe = environment.get("VMHERD_FAILSAFE", "true").lower() in {"true", "1", "yes", "on"}
    heart = Heart(identity, timing, has_watchdog=device is not None, failsafe=failsafe)
    return Heartbeat(heart, link, peers, device, journal)


def _open_peers(node: str, setting: str, link: RedisLink, timing: Timing) -> PeerSocket:
    """Open the socket for peers, waiting for a way to Redis where that is to tell this host's address."""
    if setting:
        return PeerSocket(node, *parse_address(setting))
    while True:
        with contextlib.suppress(StoreUnavailable):
            return PeerSocket(node, link.own_address(), PORT)
        time.sleep(timing.heartbeat)


def choose_watchdog(environment: Mapping[str, str], journal: Journal) -> WatchdogDevice | None:
    """Choose the watchdog that an environment means.

    Raises:
        VmherdError: A device is named that is not there.
    """
    mode = environment.get("VMHERD_WATCHDOG_MODE") or "Watchdog"
    if mode not in {"Watchdog", "Notify"}:
        raise Invalid(f"VMHERD_WATCHDOG_MODE: {mode!r} is not Watchdog or Notify")
    path = find_watchdog(environment.get("VMHERD_WATCHDOG") or "auto")
    if mode == "Notify":
        journal("mode Notify: this host is never reset by its watchdog")
        return None
    if path is None:
        journal("no watchdog: this host can be fenced by its BMC or by a person only", warning=True)
        return None
    return LinuxWatchdog(path)


def run(heartbeat: Heartbeat) -> None:
    """Beat until SIGTERM or SIGINT, and until the watchdog is disarmed then."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        heartbeat.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    heartbeat.run()


def main(*, is_witness: bool = False) -> None:
    """Run this node's heartbeat."""
    environment = os.environ
    journal = LineJournal(environment.get("VMHERD_NODE", ""))
    try:
        device = None if is_witness else choose_watchdog(environment, journal)
        heartbeat = make_heartbeat(environment, journal, device, is_witness=is_witness)
    except (VmherdError, OSError) as error:
        raise SystemExit(f"vmherd: {error}") from None
    # Simulated nodes share their memory with each other (simulation_zygote); locked, each would have its own.
    is_simulated = environment.get("VMHERD_LIBVIRT_URI", "").startswith("simulated")
    if not is_simulated and (why := lock_memory()):
        journal("memory is not locked", warning=True, why=f"{why} (LimitMEMLOCK=infinity in the unit)")
    journal("heartbeat starts", address=heartbeat.heart.identity.address)
    run(heartbeat)
    journal("heartbeat has ended")
    journal.drain()


if __name__ == "__main__":
    main(is_witness=sys.argv[1:] == ["witness"])
