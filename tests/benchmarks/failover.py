"""From a power cut to the guest's first answer from another host, by profile and kind of evidence, and its parts.

A lab of three hosts, each with an armed watchdog and a BMC. The host that has the guest loses its power (its BMC still
reads as on); for evidence by deadline no BMC is on record. The instants are those of the herd's own logs, and of the
lab's record of QEMU; all have one clock. The guest's own boot, from its QEMU's first instruction to its first answer,
is taken off: it is the guest's, and emulation makes it long here.
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orchestrator.resources import RunPolicy
from orchestrator.resources.fencing import FenceLevel
from tests.benchmarks.figures import Figure, Result, typical
from tests.benchmarks.running import Bench
from tests.ipmi import SimulatedBmc
from tests.lab import fences
from tests.lab.guest import Guest
from tests.lab.herd import LabHerd
from tests.lab.lab import Lab
from tests.lab.leases import settle
from tests.waiting import wait_until

AIMS_S = {
    ("critical", FenceLevel.BMC): 8,
    ("critical", FenceLevel.DEADLINE): 12,
    ("medium", FenceLevel.BMC): 15,
    ("medium", FenceLevel.DEADLINE): 30,
}
"""By profile and kind of evidence."""
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Failover:
    """One failover, in seconds from the power cut.

    Attributes:
        detected: Evidence is sought.
        evidence: It is there.
        placed: The start is granted to another host.
        started: Its QEMU runs.
        answers: The guest answered.
    """

    detected: float
    evidence: float
    placed: float
    started: float
    answers: float


def run(bench: Bench) -> Result:
    """Measure it."""
    result = Result(
        "failover", f"power cut to first answer elsewhere, less the guest's boot; {bench.rounds} rounds each"
    )
    overview = result.tables["power cut -> guest runs elsewhere"] = []
    for (profile, level), aim_s in AIMS_S.items():
        what = f"{profile}, {level}"
        bench.say(f"failover: a lab of 3 hosts, {what}")
        settings = {**fences.SETTINGS, "VMHERD_PROFILE": profile}
        if level is FenceLevel.BMC:  # the deadline would come first now and then, on a busy machine
            settings["VMHERD_ACK_WAIT"] = "600"
        with Lab(hosts=3) as lab, LabHerd(lab, env=settings, watchdogs=True) as herd:
            measured = _rounds(bench, herd, level, what)
        whole = typical(what, [one.started for one in measured], "s")
        overview.append(Figure(whole.name, whole.value, "s", f"{whole.note}; aim: at most {aim_s} s"))
        result.tables[f"{what}: parts"] = _parts(measured)
        result.raw[what] = [[getattr(one, name) for name in one.__slots__] for one in measured]
    return result


def _parts(measured: list[Failover]) -> list[Figure]:
    parts: dict[str, Callable[[Failover], float]] = {
        "power cut -> detected, evidence is sought": lambda one: one.detected,
        "-> evidence": lambda one: one.evidence - one.detected,
        "-> placed, and granted": lambda one: one.placed - one.evidence,
        "-> its QEMU runs": lambda one: one.started - one.placed,
        "-> its first answer (the guest's own boot)": lambda one: one.answers - one.started,
        "the whole, the boot included": lambda one: one.answers,
    }
    return [typical(name, [part(one) for one in measured], "s") for name, part in parts.items()]


def _rounds(bench: Bench, herd: LabHerd, level: FenceLevel, what: str) -> list[Failover]:
    settle(herd)
    guest = herd.lab.guest("linux-vm", address="192.0.2.101")
    herd.start_guests((guest, "h1"), runPolicy=RunPolicy.ALWAYS_ON.value)
    with ExitStack() as stack:
        bmcs = stack.enter_context(fences.bmcs(herd.lab, herd)) if level is FenceLevel.BMC else {}
        return [_once(herd, guest, level, bmcs) for _ in bench.track(range(bench.rounds), bench.rounds, what)]


def _once(herd: LabHerd, guest: Guest, level: FenceLevel, bmcs: dict[str, SimulatedBmc]) -> Failover:
    before = herd.cluster.vm(guest.name).status
    host = herd.lab.host(before.node_name)
    cut_at = time.time()
    host.power_cut()
    evidence = fences.wait_evidence(herd, host.name, _TIMEOUT_S)
    assert evidence.level is level, evidence
    herd.wait_vm(guest.name, fences.starts_after(before.incarnation), _TIMEOUT_S)
    guest.wait_up(_TIMEOUT_S)
    answered_at = time.time()
    started_at = fences.lives(herd.lab, guest)[-1].running[0].began_at
    told = _told(herd, cut_at)

    def instant(event: str, **fields: str) -> float:
        return next(
            at - cut_at
            for at, line in told
            if line["event"] == event and all(str(line[k]).endswith(v) for k, v in fields.items())
        )

    found = Failover(
        detected=instant("fencing", node=host.name, phase="=> Fencing"),
        evidence=instant("fencing", node=host.name, phase="=> Fenced"),
        placed=instant("granted", vm=f"/{guest.name}", action="start"),
        started=started_at - cut_at,
        answers=answered_at - cut_at,
    )
    if bmcs:
        wait_until(lambda: bmcs[host.name].power == "1", 60, "its power is switched on again")
    host.power_on()
    settle(herd)
    return found


def _told(herd: LabHerd, since: float) -> list[tuple[float, dict[str, Any]]]:
    """What the control plane's processes have logged since then, oldest first."""
    found = []
    for file in herd.lab.logs.glob("*.log"):
        for text in file.read_text(errors="replace").splitlines():
            if not text.startswith("{"):
                continue
            try:
                line = json.loads(text)
                at = datetime.fromisoformat(line["timestamp"]).timestamp()
            except (ValueError, KeyError):
                continue
            if at >= since:
                found.append((at, {"node": "", "phase": "", "vm": "", "action": "", **line}))
    return sorted(found, key=lambda pair: pair[0])
