"""`vmherd doctor`: whether this node could be fenced, by what, and what is missing.

It reads and changes nothing; the watchdog is not opened, as that would start it. What was read is apart (`Facts`) from
what it means (`examine`).
"""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, cast

import yaml

from orchestrator.errors import HypervisorError, StoreUnavailable, VmherdError
from orchestrator.lease import StoredLease, read_lease, read_membership
from orchestrator.resources.fencing import DISARMED_BY_ANNOTATION, DISARMED_FAILOVER, DRAINED, NOT_ENABLED
from orchestrator.settings import Settings, settings
from orchestrator.store import keys
from orchestrator.store.connection import connect, redis_errors
from workers.hypervisor.drivers import open_hypervisor
from workers.watchdog import WatchdogFailed, find_watchdog

_GUESTS: Final = "libvirt-guests.service"
_SLEEP_TARGETS: Final = ("sleep.target", "suspend.target", "hibernate.target", "hybrid-sleep.target")
_CLOCKS_APART_S: Final = 2.0
_SYSTEMCTL_S: Final = 10.0


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        todo: What a person does about it; empty: nothing.
    """

    level: Level
    what: str
    says: str
    todo: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was read on this host.

    Attributes:
        device: The watchdog's; None: there is none.
        device_error: Why the one that is set can't be used.
        identity: What its driver calls itself.
        is_nowayout: It can't be disarmed.
        redis_error: Empty: it answers.
        clock_apart_s: How far this host's clock is from Redis's.
        lease: As it stands in Redis.
        lease_age_s: Since its renewal, by Redis's clock.
        members: Of the membership.
        has_replicas: Redis has some.
        waits_for_replicas: It takes no writes without them.
        libvirt_error: Empty: it answers.
        disarm: Why the control plane wants its watchdog disarmed; empty: it may be armed.
        unit_states: `systemctl is-enabled` of units; absent: not known.
        active_units: Of these, those that are active, whether they are enabled or not.
        has_ipmi: The kernel speaks to a BMC.
    """

    device: Path | None = None
    device_error: str = ""
    identity: str = ""
    is_nowayout: bool = False
    redis_error: str = ""
    clock_apart_s: float = 0.0
    lease: StoredLease | None = None
    lease_age_s: float = 0.0
    members: frozenset[str] = frozenset()
    has_replicas: bool = False
    waits_for_replicas: bool = False
    libvirt_error: str = ""
    disarm: str = ""
    unit_states: tuple[tuple[str, str], ...] = ()
    active_units: frozenset[str] = frozenset()
    has_ipmi: bool = False


def examine(facts: Facts, config: Settings) -> list[Finding]:
    """Say what the facts mean; the last finding is the verdict."""
    findings = [
        _redis(facts),
        _heartbeat(facts, config),
        _watchdog(facts, config),
        _disarmed(facts, config),
        _members(facts, config),
        _bmc(facts, config),
        _clock(facts),
        _libvirt(facts, config),
        *_units(facts),
    ]
    return [*findings, _verdict(facts, config)]


def _verdict(facts: Facts, config: Settings) -> Finding:
    """Say by what it could be fenced as things stand: what the control plane asks for a deadline, and its own word."""
    lease = facts.lease.lease if facts.lease is not None else None
    who, todo = "by its BMC or a person only", "see above; or set up its BMC on the control plane"
    if facts.disarm == NOT_ENABLED or facts.disarm.startswith(DISARMED_FAILOVER):
        who, why, todo = "by a person only", facts.disarm, "see above"  # its BMC is not used, either
    elif lease is None or not lease.armed or not _is_fresh(facts):
        why = "no watchdog is armed"
    elif facts.disarm:
        why = f"its watchdog is about to be disarmed ({facts.disarm})"
    elif _may_lose_writes(facts):  # rule 9
        why = "no deadline counts while Redis does not wait for its replicas"
    elif lease.failsafe and config.node not in facts.members:  # rule 10
        why = "it is not a member, so nobody's acknowledgement counts against it"
    elif lease.failsafe and len(facts.members) <= 2:  # noqa: PLR2004 - rule 11
        why = "two members have no majority without it"
        todo = "add a witness on the control plane's machine: vmherd node enroll NAME --witness"
    else:
        return Finding(Level.OK, "could be fenced", "by its watchdog's deadline")
    return Finding(Level.WARNING, "could be fenced", f"{who}: {why}", todo)


def _may_lose_writes(facts: Facts) -> bool:
    return facts.has_replicas and not facts.waits_for_replicas


def _is_fresh(facts: Facts) -> bool:
    return facts.lease is not None and facts.lease_age_s <= facts.lease.lease.timing.lease_ttl


def _redis(facts: Facts) -> Finding:
    if facts.redis_error:
        todo = "check VMHERD_REDIS_URL in /etc/vmherd/node.env, and the way to it"
        return Finding(Level.PROBLEM, "Redis", facts.redis_error, todo)
    if _may_lose_writes(facts):
        says = "has replicas, and min-replicas-to-write is 0: nothing is taken over by a watchdog's deadline"
        todo = "set min-replicas-to-write 1 in each Redis of the herd (TAKEOVER.md, rule 9; docs/failover.md)"
        return Finding(Level.WARNING, "Redis", says, todo)
    return Finding(Level.OK, "Redis", "answers")


def _heartbeat(facts: Facts, config: Settings) -> Finding:
    if facts.lease is None or not _is_fresh(facts):
        age = f"{facts.lease_age_s:.0f} s ago" if facts.lease is not None else "never"
        says = f"its lease was renewed {age}" if not facts.redis_error else "not known without Redis"
        return Finding(Level.PROBLEM, "heartbeat", says, "systemctl enable --now vmherd-heartbeat")
    timing = facts.lease.lease.timing
    says = f"renewed {max(0.0, facts.lease_age_s):.1f} s ago; T {timing.lease_ttl:g}, W {timing.watchdog_timeout:g}"
    if timing.lease_ttl != config.lease_ttl or timing.heartbeat != config.heartbeat:
        todo = "it was started with other settings: systemctl restart vmherd-heartbeat"
        return Finding(Level.WARNING, "heartbeat", says, todo)
    return Finding(Level.OK, "heartbeat", says)


def _watchdog(facts: Facts, config: Settings) -> Finding:
    if facts.device_error:
        return Finding(Level.PROBLEM, "watchdog", facts.device_error, "load the driver, or set VMHERD_WATCHDOG")
    if config.watchdog == "off" or config.watchdog_mode == "Notify":
        why = "VMHERD_WATCHDOG=off" if config.watchdog == "off" else "mode Notify"
        return Finding(Level.WARNING, "watchdog", f"never armed ({why})")
    if facts.device is None:
        todo = (
            "modprobe the board's driver (iTCO_wdt, ipmi_watchdog, i6300esb) or softdog, and name it in modules-load.d"
        )
        return Finding(Level.WARNING, "watchdog", "there is no /dev/watchdog", todo)
    name = f"{facts.device}" + (f" ({facts.identity})" if facts.identity else "")
    if facts.is_nowayout:
        todo = "load its driver with nowayout=0: a planned stop would reset this host"
        return Finding(Level.PROBLEM, "watchdog", f"{name} can't be disarmed (nowayout)", todo)
    if facts.lease is None or not facts.lease.lease.armed or not _is_fresh(facts):
        todo = "journalctl -u vmherd-heartbeat says why" if not facts.disarm else "see why in the next line"
        return Finding(Level.WARNING, "watchdog", f"{name} is not armed", todo)
    level, soft = (
        (Level.OK, "") if facts.identity != "Software Watchdog" else (Level.NOTE, "; a hung kernel may hang it")
    )
    return Finding(level, "watchdog", f"{name} is armed, {facts.lease.lease.timing.watchdog_timeout:g} s{soft}")


def _disarmed(facts: Facts, config: Settings) -> Finding:
    """Say what the control plane wants of its watchdog, and who takes that back."""
    why, node = facts.disarm, config.node
    if facts.redis_error:
        return Finding(Level.NOTE, "fencing", "not known without Redis")
    if not why:
        return Finding(Level.OK, "fencing", "is enabled, and nothing disarms it")
    if why == NOT_ENABLED:
        todo = f"on the control plane: vmherd fence set {node} --enable"
        return Finding(Level.WARNING, "fencing", f"{why}: nothing of it starts elsewhere by itself", todo)
    if why.startswith(DISARMED_FAILOVER):
        todo = f"on the control plane: vmherd failover arm (or: vmherd failover arm --node {node})"
        return Finding(Level.WARNING, "fencing", why, todo)
    says = f"its watchdog is disarmed: {why}"
    if why.startswith(DISARMED_BY_ANNOTATION):
        name = why.removeprefix(DISARMED_BY_ANNOTATION)
        return Finding(Level.WARNING, "fencing", says, f"once its work is done: kubectl annotate node {node} {name}-")
    todo = f"as it is meant; it is armed again after: vmherd uncordon {node}" if why == DRAINED else ""
    return Finding(Level.NOTE, "fencing", says, todo)


def _members(facts: Facts, config: Settings) -> Finding:
    if config.node in facts.members:
        return Finding(Level.OK, "membership", f"one of {len(facts.members)} members")
    todo = "wait some seconds; then see whether every member beats (vmherd get nodes): a silent one holds up changes"
    return Finding(Level.WARNING, "membership", "not a member yet: its peers don't speak for it", todo)


def _bmc(facts: Facts, config: Settings) -> Finding:
    todo = f"on the control plane: vmherd fence test {config.node}"
    if facts.has_ipmi:
        return Finding(
            Level.NOTE, "BMC", "this host has one (/dev/ipmi0); whether it is set up is not known here", todo
        )
    return Finding(Level.NOTE, "BMC", "none is seen from here; whether one is set up is not known here", todo)


def _clock(facts: Facts) -> Finding:
    if not facts.redis_error and abs(facts.clock_apart_s) > _CLOCKS_APART_S:
        says = f"{facts.clock_apart_s:+.1f} s from Redis's; leases don't depend on it, but logs and people do"
        return Finding(Level.WARNING, "clock", says, "set up NTP (chrony)")
    return Finding(Level.OK, "clock", "as Redis's" if not facts.redis_error else "not compared")


def _libvirt(facts: Facts, config: Settings) -> Finding:
    if facts.libvirt_error:
        return Finding(
            Level.PROBLEM, "libvirt", facts.libvirt_error, f"check VMHERD_LIBVIRT_URI ({config.libvirt_uri})"
        )
    return Finding(Level.OK, "libvirt", "answers")


def _units(facts: Facts) -> list[Finding]:
    states = dict(facts.unit_states)
    if not states:
        return [Finding(Level.NOTE, "systemd", "does not answer here: units were not looked at")]
    findings = []
    if _GUESTS in facts.active_units:  # also where it is disabled: what counts at a shutdown is that it is active
        says = f"{_GUESTS} is active: when it ends, it stops or saves VMs behind vmherd's back"
        todo = f"its own end does so, too: once no VM runs here, systemctl disable --now {_GUESTS}"
        findings.append(Finding(Level.PROBLEM, "libvirt-guests", says, todo))
    elif states.get(_GUESTS) in {"enabled", "enabled-runtime", "static", "linked"}:
        says = f"{_GUESTS} is enabled: it would stop or save VMs behind vmherd's back"
        todo = f"systemctl disable {_GUESTS}"
        findings.append(Finding(Level.PROBLEM, "libvirt-guests", says, todo))
    else:
        findings.append(Finding(Level.OK, "libvirt-guests", "is neither enabled nor active"))
    awake = [unit for unit in _SLEEP_TARGETS if states.get(unit) not in {"masked", "masked-runtime"}]
    if awake:
        says = f"this host may be suspended ({', '.join(awake)})"
        findings.append(Finding(Level.WARNING, "suspend", says, f"systemctl mask {' '.join(awake)}"))
    else:
        findings.append(Finding(Level.OK, "suspend", "is masked"))
    return findings


# --- reading ----------------------------------------------------------------------------------------------------------


def read_facts(config: Settings) -> Facts:
    """Read all that is looked at."""
    device, device_error = None, ""
    try:
        device = find_watchdog(config.watchdog)
    except WatchdogFailed as error:
        device_error = str(error)
    name = "watchdog0" if device is not None and device.name == "watchdog" else device.name if device else ""
    sysfs = Path("/sys/class/watchdog") / name
    lease, age, members, apart, disarm, redis_error = _read_redis(config)
    has_replicas, waits = _read_replication(config)
    return Facts(
        device=device,
        device_error=device_error,
        identity=_read(sysfs / "identity") if name else "",
        is_nowayout=bool(name) and _read(sysfs / "nowayout") == "1",
        redis_error=redis_error,
        clock_apart_s=apart,
        lease=lease,
        lease_age_s=age,
        members=members,
        has_replicas=has_replicas,
        waits_for_replicas=waits,
        libvirt_error=_try_hypervisor(config),
        disarm=disarm,
        unit_states=_unit_states(),
        active_units=frozenset(unit for unit in (_GUESTS,) if _systemctl("is-active", unit) == "active"),
        has_ipmi=Path("/dev/ipmi0").exists(),
    )


def _read_replication(config: Settings) -> tuple[bool, bool]:
    """Read whether Redis has replicas, and whether it takes no writes without them; no where that can't be read."""
    try:
        client = connect(config.redis_url.get_secret_value(), timeout_s=3.0, retries=0)
        with contextlib.closing(client), redis_errors(client):
            found = cast("dict[str, object]", client.info("replication"))
    except StoreUnavailable:  # it is away; or this is a witness, which may not ask
        return False, False
    return bool(found.get("connected_slaves")), "min_slaves_good_slaves" in found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _read_redis(config: Settings) -> tuple[StoredLease | None, float, frozenset[str], float, str, str]:
    """Read the lease, its age, the members, how far the clocks are apart, and why it is disarmed; or why not."""
    import time  # noqa: PLC0415 - for this comparison alone

    try:
        client = connect(config.redis_url.get_secret_value(), timeout_s=3.0, retries=0)
        with contextlib.closing(client), redis_errors(client):
            seconds, micros = client.time()
            now = time.time()
            lease = read_lease(cast("str | None", client.get(keys.lease(config.node))))
            members = read_membership(cast("str | None", client.get(keys.MEMBERSHIP))).members
            disarm = cast("str | None", client.get(keys.disarm(config.node))) or ""
    except StoreUnavailable as error:
        return None, 0.0, frozenset(), 0.0, "", str(error)
    redis_now = seconds + micros / 1e6
    age = redis_now - lease.renewed_ms / 1000 if lease is not None else 0.0
    return lease, age, frozenset(members), now - redis_now, disarm, ""


def _try_hypervisor(config: Settings) -> str:
    try:
        hypervisor = open_hypervisor(config)
    except VmherdError as error:
        return str(error)
    try:
        hypervisor.domains()
    except HypervisorError as error:
        return str(error)
    finally:
        hypervisor.close()
    return ""


def _unit_states() -> tuple[tuple[str, str], ...]:
    states = []
    for unit in (_GUESTS, *_SLEEP_TARGETS):
        state = _systemctl("is-enabled", unit)
        if state is None:
            return ()
        if state:
            states.append((unit, state))
    return tuple(states)


def _systemctl(verb: str, unit: str) -> str | None:
    """Ask systemd about a unit; None where it does not answer."""
    try:
        done = subprocess.run(
            ["systemctl", verb, unit], capture_output=True, text=True, timeout=_SYSTEMCTL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()


def _lines(findings: list[Finding]) -> str:
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:8} {finding.what:{width}}  {finding.says}")
        if finding.todo:
            lines.append(f"{'':8} {'':{width}}  -> {finding.todo}")
    return "\n".join(lines)


def _document(findings: list[Finding], form: str) -> str:
    data = [{**asdict(finding), "level": finding.level.value} for finding in findings]
    return json.dumps(data, indent=4) if form == "json" else yaml.safe_dump(data, sort_keys=False).rstrip()


def main() -> None:
    """Print the findings; exits with 1 if one is a problem, or the node could not be fenced without a person.

    With an argument, `json` or `yaml`, they are a document.
    """
    try:
        config = settings()
    except VmherdError as error:
        raise SystemExit(f"vmherd: {error}") from None
    findings = examine(read_facts(config), config)
    text = _document(findings, sys.argv[1]) if sys.argv[1:] else _lines(findings)
    os.write(1, f"{text}\n".encode())
    if any(finding.level is Level.PROBLEM for finding in findings) or findings[-1].level is not Level.OK:
        sys.exit(1)


if __name__ == "__main__":
    main()
