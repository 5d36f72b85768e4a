"""What `vmherd doctor` says of a host."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.lease import StoredLease
from orchestrator.resources.fencing import DISARMED_FAILOVER, DRAINED, NOT_ENABLED
from orchestrator.services.arming import DISARMING_ANNOTATIONS
from orchestrator.settings import Settings
from tests.builders import a_lease
from workers import doctor
from workers.doctor import Facts, Finding, Level, examine

CONFIG = Settings(node="n1")
ASLEEP = ("sleep.target", "suspend.target", "hibernate.target", "hybrid-sleep.target")
HEALTHY = Facts(
    device=Path("/dev/watchdog0"),
    identity="iTCO_wdt",
    lease=StoredLease(a_lease(armed=True, watchdog="iTCO_wdt"), 0),
    lease_age_s=1.0,
    members=frozenset({"n1", "n2", "n3"}),
    unit_states=(("libvirt-guests.service", "disabled"), *((unit, "masked") for unit in ASLEEP)),
)


def of(facts: Facts, what: str, config: Settings = CONFIG) -> Finding:
    (found,) = [finding for finding in examine(facts, config) if finding.what == what]
    return found


def test_a_host_that_could_be_fenced() -> None:
    findings = examine(HEALTHY, CONFIG)
    assert findings[-1] == Finding(Level.OK, "could be fenced", "by its watchdog's deadline")
    assert {finding.what for finding in findings if finding.level not in {Level.OK, Level.NOTE}} == set()


def test_a_replicated_redis_must_wait_for_its_replicas() -> None:
    replicated = replace(HEALTHY, has_replicas=True)
    assert of(replicated, "Redis").level is Level.WARNING
    assert "min-replicas-to-write" in of(replicated, "Redis").todo
    assert of(replicated, "could be fenced").level is Level.WARNING, "no deadline counts"
    assert "BMC or a person only" in of(replicated, "could be fenced").says
    waits = replace(replicated, waits_for_replicas=True)
    assert (of(waits, "Redis").level, of(waits, "could be fenced").level) == (Level.OK, Level.OK)


def test_one_that_is_no_member_is_not_fenced_by_a_deadline() -> None:
    verdict = of(replace(HEALTHY, members=frozenset({"n2", "n3", "n4"})), "could be fenced")
    assert verdict.level is Level.WARNING
    assert "not a member" in verdict.says


@pytest.mark.parametrize("members", [frozenset({"n2"}), frozenset({"n1", "n2"})])
def test_without_failsafe_no_vote_is_needed(members: frozenset[str]) -> None:
    alone = StoredLease(a_lease(armed=True, failsafe=False), 0)
    assert of(replace(HEALTHY, lease=alone, members=members), "could be fenced").level is Level.OK


@pytest.mark.parametrize(
    ("disarm", "level", "says", "todo", "by"),
    [
        (NOT_ENABLED, Level.WARNING, "fencing is not enabled", "vmherd fence set n1 --enable", "a person only"),
        (f"{DISARMED_FAILOVER}switches", Level.WARNING, "switches", "vmherd failover arm", "a person only"),
        (
            f"annotation {DISARMING_ANNOTATIONS[0]}",
            Level.WARNING,
            DISARMING_ANNOTATIONS[0],
            f"kubectl annotate node n1 {DISARMING_ANNOTATIONS[0]}-",
            "BMC or a person",
        ),
        ("maintenance october", Level.NOTE, "maintenance october", "", "BMC or a person"),
        (DRAINED, Level.NOTE, "cordoned and empty", "vmherd uncordon n1", "BMC or a person"),
    ],
)
@pytest.mark.parametrize("armed", [True, False])
def test_why_its_watchdog_is_disarmed_is_said(
    disarm: str, level: Level, says: str, todo: str, by: str, *, armed: bool
) -> None:
    facts = replace(HEALTHY, disarm=disarm, lease=StoredLease(a_lease(armed=armed), 0))
    found = of(facts, "fencing")
    assert found.level is level
    assert says in found.says
    assert todo in found.todo
    verdict = of(facts, "could be fenced")
    assert verdict.level is Level.WARNING
    assert by in verdict.says


def test_libvirt_guests_that_is_active_does_harm_though_it_is_disabled() -> None:
    found = of(replace(HEALTHY, active_units=frozenset({"libvirt-guests.service"})), "libvirt-guests")
    assert found.level is Level.PROBLEM
    assert "is active" in found.says
    assert "once no VM runs here" in found.todo


def unit(name: str, state: str) -> Facts:
    return replace(HEALTHY, unit_states=(*(u for u in HEALTHY.unit_states if u[0] != name), (name, state)))


@pytest.mark.parametrize(
    ("facts", "what", "level", "says", "todo"),
    [
        (unit("libvirt-guests.service", "enabled"), "libvirt-guests", Level.PROBLEM, "behind", "systemctl disable"),
        (unit("suspend.target", "static"), "suspend", Level.WARNING, "suspend.target", "systemctl mask suspend"),
        (replace(HEALTHY, device=None), "watchdog", Level.WARNING, "no /dev/watchdog", "modprobe"),
        (replace(HEALTHY, device_error="there is no /dev/x"), "watchdog", Level.PROBLEM, "no /dev/x", "driver"),
        (replace(HEALTHY, is_nowayout=True), "watchdog", Level.PROBLEM, "can't be disarmed", "nowayout=0"),
        (replace(HEALTHY, lease_age_s=11.0), "heartbeat", Level.PROBLEM, "11 s ago", "enable --now vmherd-heartbeat"),
        (replace(HEALTHY, lease=None), "heartbeat", Level.PROBLEM, "never", "enable --now vmherd-heartbeat"),
        (replace(HEALTHY, redis_error="no Redis at h"), "Redis", Level.PROBLEM, "no Redis at h", "VMHERD_REDIS_URL"),
        (replace(HEALTHY, libvirt_error="refused"), "libvirt", Level.PROBLEM, "refused", "VMHERD_LIBVIRT_URI"),
        (replace(HEALTHY, clock_apart_s=-5.0), "clock", Level.WARNING, "-5.0 s", "NTP"),
        (replace(HEALTHY, members=frozenset({"n2"})), "membership", Level.WARNING, "not a member", "get nodes"),
        (replace(HEALTHY, unit_states=()), "systemd", Level.NOTE, "does not answer", ""),
        (replace(HEALTHY, has_ipmi=True), "BMC", Level.NOTE, "/dev/ipmi0", "vmherd fence test n1"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(facts: Facts, what: str, level: Level, says: str, todo: str) -> None:
    found = of(facts, what)
    assert found.level is level
    assert says in found.says
    assert todo in found.todo


@pytest.mark.parametrize(
    "facts",
    [
        replace(HEALTHY, lease=StoredLease(a_lease(armed=False), 0)),
        replace(HEALTHY, lease_age_s=11.0),
        replace(HEALTHY, lease=None),
    ],
)
def test_without_an_armed_watchdog_only_a_bmc_or_a_person_could(facts: Facts) -> None:
    assert of(facts, "could be fenced").level is Level.WARNING
    assert "BMC or a person" in of(facts, "could be fenced").says


def test_two_members_have_no_majority() -> None:
    found = of(replace(HEALTHY, members=frozenset({"n1", "n2"})), "could be fenced")
    assert found.level is Level.WARNING
    assert "--witness" in found.todo


def test_other_settings_than_it_was_started_with() -> None:
    found = of(HEALTHY, "heartbeat", Settings(node="n1", profile="slow"))
    assert found.level is Level.WARNING
    assert "restart vmherd-heartbeat" in found.todo


@pytest.mark.parametrize("config", [Settings(node="n1", watchdog="off"), Settings(node="n1", watchdog_mode="Notify")])
def test_a_watchdog_that_is_not_to_be_armed(config: Settings) -> None:
    assert "never armed" in of(HEALTHY, "watchdog", config).says


@pytest.mark.parametrize(("form", "read"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_its_findings_are_a_document_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], form: str, read: Callable[[str], Any]
) -> None:
    monkeypatch.setattr(doctor, "settings", lambda: CONFIG)
    monkeypatch.setattr(doctor, "read_facts", lambda _: HEALTHY)
    monkeypatch.setattr("sys.argv", ["doctor", form])
    doctor.main()
    found = read(capfd.readouterr().out)
    assert found[-1] == {"level": "ok", "what": "could be fenced", "says": "by its watchdog's deadline", "todo": ""}
    assert len(found) == len(examine(HEALTHY, CONFIG))
