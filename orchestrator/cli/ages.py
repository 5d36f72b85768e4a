"""Durations and sizes for people, as kubectl writes them."""

import math
from datetime import datetime, timedelta

UNKNOWN = "<none>"


def age(since: datetime | None, now: datetime) -> str:
    """Give the time that has passed: `5s`, `3m`, `2h`, `4d`; `<none>` where it has no beginning."""
    return duration(now - since) if since is not None else UNKNOWN


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "y": 365 * 86_400}
_SCALES = (
    (2 * 60, "s", ""),
    (10 * 60, "m", "s"),
    (3 * 3600, "m", ""),
    (8 * 3600, "h", "m"),
    (48 * 3600, "h", ""),
    (8 * 86_400, "d", "h"),
    (2 * _UNITS["y"], "d", ""),
    (8 * _UNITS["y"], "y", "d"),
    (math.inf, "y", ""),
)
"""Below so many seconds: the unit, and the smaller one that follows it. From Kubernetes' `duration.HumanDuration`."""


def duration(span: timedelta) -> str:
    """Write a duration with about two digits, exactly as kubectl does.

    A machine's clock that runs behind by a second is forgiven, more gives `<invalid>`.
    """
    seconds = int(span.total_seconds())
    if seconds < -1:
        return "<invalid>"
    seconds = max(0, seconds)
    unit, smaller = next((unit, smaller) for below, unit, smaller in _SCALES if seconds < below)
    amount, rest = divmod(seconds, _UNITS[unit])
    return f"{amount}{unit}" + (_rest(rest // _UNITS[smaller], smaller) if smaller else "")


def _rest(amount: int, unit: str) -> str:
    return f"{amount}{unit}" if amount else ""


_MIB_IN_GIB = 1024


def memory(mib: int) -> str:
    """Write an amount of memory: `512Mi`, `15.6Gi`."""
    return f"{mib / _MIB_IN_GIB:.1f}Gi".replace(".0Gi", "Gi") if mib >= _MIB_IN_GIB else f"{mib}Mi"


def span(seconds: float) -> str:
    """Write a limit as it is written on the command line: `10m`, `1h30m`, `2.5s`."""
    whole = int(seconds)
    if whole != seconds:
        return f"{seconds:g}s"
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return _rest(hours, "h") + _rest(minutes, "m") + _rest(rest, "s") or "0s"
