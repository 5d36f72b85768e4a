"""How long a live migration takes, and whether it ends: QEMU's pre-copy as arithmetic.

Memory is sent in passes: the first sends all that is in use, each further one what the guest has dirtied during the one
before. When the rest can be sent within the permitted downtime, the guest is stopped and switches over. A guest that
dirties memory faster than the link carries it away never gets there, unless auto-converge slows it down.

Pure: no clock, and no state but what is handed in.
"""

from dataclasses import dataclass
from typing import Final

DOWNTIME_LIMIT_S: Final = 0.3
"""QEMU's default: what it may take to send the rest while the guest stands still."""
SWITCH_OVER_S: Final = 0.03
"""What the guest stands still besides sending: measured 28 to 137 ms in all (libvirt.md, section 7; lab.md)."""
_THROTTLE_FIRST: Final = 20
_THROTTLE_STEP: Final = 10
_THROTTLE_MOST: Final = 99
_HIGH_PASSES: Final = 2
"""Auto-converge throttles at every second look at which the guest dirtied more than half of what was sent."""
_LOOK_EVERY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Load:
    """What a guest gives a migration to do.

    Attributes:
        used_mib: Memory that is not zero and has to be sent at least once.
        working_set_mib: Memory that it goes on writing to.
        dirty_mib_s: How much of that it rewrites a second while nothing slows it down.
    """

    used_mib: float
    working_set_mib: float
    dirty_mib_s: float

    def dirtied_mib(self, seconds: float, throttle_percent: int = 0) -> float:
        """What it dirties in some seconds, counted once: at most its working set."""
        rate = self.dirty_mib_s * (100 - throttle_percent) / 100
        return min(self.working_set_mib, self.used_mib, rate * seconds)


@dataclass(frozen=True, slots=True)
class Link:
    """What a migration is given.

    Attributes:
        mib_s: Its bandwidth, > 0.
        auto_converge: Whether the guest may be slowed down.
    """

    mib_s: float
    auto_converge: bool = False


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over memory.

    Attributes:
        number: From 1.
        mib: What it sends.
        sent_before_mib: By the passes before it.
        dirtied_before_mib_s: In the pass before, counted once; QEMU's "dirty rate".
        throttle_percent: How much the guest is slowed down during it.
        is_last: The guest stands still while this one is sent.
        high: Looks of auto-converge's in a row that found too much dirtied.
        unlooked_s: Since its last look.
    """

    number: int
    mib: float
    sent_before_mib: float = 0.0
    dirtied_before_mib_s: float = 0.0
    throttle_percent: int = 0
    is_last: bool = False
    high: int = 0
    unlooked_s: float = 0.0

    def seconds(self, link: Link) -> float:
        """How long it takes."""
        return self.mib / link.mib_s + (SWITCH_OVER_S if self.is_last else 0.0)

    def sent_mib(self, link: Link, elapsed_s: float) -> float:
        """What it has sent after some of its seconds."""
        return min(self.mib, max(0.0, elapsed_s) * link.mib_s)


def first_pass(load: Load) -> Pass:
    """Give the pass that begins a migration."""
    return Pass(number=1, mib=load.used_mib)


def next_pass(done: Pass, load: Load, link: Link) -> Pass:
    """Give the pass that follows one which is done; the last one is followed by none."""
    seconds = done.seconds(link)
    left_mib = load.dirtied_mib(seconds, done.throttle_percent)
    throttle, high, unlooked_s = done.throttle_percent, done.high, done.unlooked_s + seconds
    if unlooked_s >= _LOOK_EVERY_S:
        unlooked_s = 0.0
        high = high + 1 if left_mib > done.mib / 2 else 0
        if link.auto_converge and high >= _HIGH_PASSES:
            high = 0
            throttle = min(_THROTTLE_MOST, throttle + _THROTTLE_STEP if throttle else _THROTTLE_FIRST)
    return Pass(
        number=done.number + 1,
        mib=left_mib,
        sent_before_mib=done.sent_before_mib + done.mib,
        dirtied_before_mib_s=left_mib / seconds if seconds else 0.0,
        throttle_percent=throttle,
        is_last=left_mib / link.mib_s <= DOWNTIME_LIMIT_S,
        high=high,
        unlooked_s=unlooked_s,
    )
