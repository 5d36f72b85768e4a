"""A guest's downtime as its users see it: pings from the control plane, and the longest time without an answer.

The pings are sent by a small process of its own, so that neither the test's threads nor Python's lock delay them. What
it measures includes the network's part (the switch has to learn where the guest is now), which the hypervisor's own
figure for downtime leaves out.

    python tests/lab/sampler.py ADDRESS INTERVAL_S     (in the namespace; stops when its standard input ends)
"""

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from tests.lab.namespaces import REPOSITORY, LabError, Namespace


@dataclass(frozen=True)
class Samples:
    """What the sampler saw.

    Attributes:
        sent: Number of pings sent.
        answered_at: Times (CLOCK_REALTIME) of the answers, in order.
        longest_gap_s: The longest time between two answers, less the interval at which pings are sent.
        gap_began_at: When that gap began (0 if there was none).
    """

    sent: int
    answered_at: list[float]
    longest_gap_s: float
    gap_began_at: float


class Sampler:
    """Pings an address until it is stopped; a context manager.

    Args:
        control: The namespace to ping from.
        address: The guest's address.
        interval_s: Seconds between pings.
    """

    def __init__(self, control: Namespace, address: str, *, interval_s: float = 0.01) -> None:
        self._interval_s = interval_s
        self._result: Samples | None = None
        sampler = [sys.executable, "-m", "tests.lab.sampler", address, str(interval_s)]
        self._process = subprocess.Popen(
            ["nsenter", f"--net={control.path}", "--", *sampler],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "sampling\n":
            raise LabError("the sampler does not start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> Samples:
        """Stop, and return what was seen; the same again if called twice."""
        if self._result is None:
            output, _ = self._process.communicate(timeout=10)
            if self._process.returncode != 0:
                raise LabError(f"the sampler failed: exit {self._process.returncode}")
            told = json.loads(output)
            self._result = _samples(told["sent"], told["answered_at"], self._interval_s)
        return self._result


def _samples(sent: int, answered_at: list[float], interval_s: float) -> Samples:
    gaps = [(later - earlier, earlier) for earlier, later in pairwise(answered_at)]
    longest, began_at = max(gaps, default=(0.0, 0.0))
    return Samples(sent, answered_at, max(0.0, longest - interval_s), began_at)


def _sample(address: str, interval_s: float) -> tuple[int, list[float]]:
    """Ping until standard input ends; return the number of pings and the times of the answers."""
    answers: list[float] = []
    sequence = 0
    identity = os.getpid() & 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.setblocking(False)
        print("sampling", flush=True)
        due = time.monotonic()
        while True:
            readable, _, _ = select.select([raw, sys.stdin], [], [], max(0.0, due - time.monotonic()))
            if sys.stdin in readable:
                return sequence, answers
            if raw in readable:
                packet, sender = raw.recvfrom(2048)
                # The IPv4 header comes along; an echo reply with our identity is an answer.
                header = (packet[0] & 15) * 4
                kind, _, _, identified, _ = struct.unpack_from("!BBHHH", packet, header)
                if kind == 0 and identified == identity and sender[0] == address:
                    answers.append(time.time())
            if time.monotonic() >= due:
                sequence += 1
                due += interval_s
                # No route or no neighbour just now: a ping that gets no answer.
                with contextlib.suppress(OSError):
                    raw.sendto(_echo_request(identity, sequence & 0xFFFF), (address, 0))


def _echo_request(identity: int, sequence: int) -> bytes:
    bare = struct.pack("!BBHHH", 8, 0, 0, identity, sequence)
    total = sum(struct.unpack("!4H", bare))
    total = (total >> 16) + (total & 0xFFFF)
    return struct.pack("!BBHHH", 8, 0, ~(total + (total >> 16)) & 0xFFFF, identity, sequence)


if __name__ == "__main__":
    count, times = _sample(sys.argv[1], float(sys.argv[2]))
    json.dump({"sent": count, "answered_at": times}, sys.stdout)
