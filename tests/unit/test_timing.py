"""Profiles, and what settings must keep to (TAKEOVER.md, rule 8 and the line on liveness)."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.errors import Invalid
from orchestrator.lease import PROFILES, Timing, timing_of
from orchestrator.settings import Settings


@pytest.mark.parametrize("name", PROFILES)
def test_each_profile_keeps_to_the_inequalities(name: str) -> None:
    PROFILES[name].check()
    assert Settings(profile=name).timing == PROFILES[name] == timing_of({"VMHERD_PROFILE": name})


def test_the_profiles_are_those_of_the_design() -> None:
    figures = {name: (t.lease_ttl, t.watchdog_timeout, t.heartbeat) for name, t in PROFILES.items()}
    assert figures == {
        "critical": (4, 2, 0.5),
        "medium": (10, 5, 2),
        "moderate": (30, 10, 5),
        "slow": (60, 20, 10),
    }
    assert Settings().timing == PROFILES["medium"]


def test_a_setting_goes_before_its_profile() -> None:
    expected = replace(PROFILES["slow"], lease_ttl=90)
    assert Settings(profile="slow", lease_ttl=90).timing == expected
    assert timing_of({"VMHERD_PROFILE": "slow", "VMHERD_LEASE_TTL": "90"}) == expected


@pytest.mark.parametrize(
    ("values", "inequality"),
    [
        ({"lease_ttl": 5.5}, "H + redis_timeout <= T - W"),
        ({"watchdog_timeout": 9}, "H + redis_timeout <= T - W"),
        ({"watchdog_timeout": 2.5}, "whole seconds"),
        ({"takeover_margin": 6.16}, "M > W + L + drift (T + W + L)"),
        ({"ack_wait": 13.13}, "A > S + 2W + L + drift (S + 2W + L)"),
        ({"heartbeat": 4.1, "lease_ttl": 9.9}, "2H + redis_timeout + poll_interval + poll_timeout < T - feed_interval"),
        ({"poll_validity": 1.5}, "S >= 2 poll_interval + poll_timeout"),
        ({"watchdog_latency": -1}, "all times > 0"),
    ],
)
def test_what_breaks_an_inequality_is_refused_with_its_name(values: dict[str, Any], inequality: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings(**values)
    (error,) = refused.value.errors()
    assert f"failure detection: {inequality}" in error["msg"].replace("the watchdog timeout W is in ", "")
    assert "VMHERD_LEASE_TTL" in error["msg"], "a person sees which variable a letter is"


def test_waits_just_above_their_bounds_are_taken() -> None:
    Settings(takeover_margin=6.17, ack_wait=13.14)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VMHERD_PROFILE": "fast"}, "VMHERD_PROFILE: 'fast' is none of critical, medium"),
        ({"VMHERD_LEASE_TTL": "ten"}, "VMHERD_LEASE_TTL: 'ten' is no number of seconds"),
        ({"VMHERD_LEASE_TTL": "nan"}, "does not hold"),
        ({"VMHERD_LEASE_TTL": "inf"}, "does not hold"),
        ({"VMHERD_LEASE_TTL": "4"}, "H \\+ redis_timeout <= T - W does not hold \\(2 \\+ 0.5 > 4 - 5\\)"),
    ],
)
def test_the_heartbeats_own_reading_refuses_the_same(environment: dict[str, str], message: str) -> None:
    with pytest.raises(Invalid, match=message):
        timing_of(environment)


SECONDS = st.floats(0.01, 1000)


@given(t=SECONDS, w=st.integers(1, 100), h=SECONDS, s=SECONDS, latency=st.floats(0, 10), drift=st.floats(0, 0.1))
def test_the_waits_that_are_computed_exceed_their_bounds(
    t: float, w: int, h: float, s: float, latency: float, drift: float
) -> None:
    timing = Timing(t, w, h, s, latency, drift)
    assert timing.margin > w + latency + drift * (t + w + latency)
    assert timing.ack_wait > (s + 2 * w + latency) * (1 + drift)
