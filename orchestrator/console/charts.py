"""Plots as SVG, made on the server out of numbers alone: a migration's figures, and the timeline of a day."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from html import escape
from itertools import pairwise
from typing import Final

from orchestrator.resources import VirtualMachineOperation

_FIGURES: Final = re.compile(
    r"TimeElapsed=(?P<elapsed>[0-9.]+)s DataProcessed=(?P<processed>[0-9.]+)MiB "
    r"DataRemaining=(?P<remaining>[0-9.]+)MiB "
    r"DataTotal=(?P<total>[0-9.]+)MiB Iteration=(?P<iteration>\d+) AutoConvergeThrottle=(?P<throttle>\d+)%"
)
"""As `services.migrations.figures_text` writes them, in the platform's words."""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 480, 150, 62, 22, 8


@dataclass(frozen=True, slots=True)
class Sample:
    """A migration's figures at one moment.

    Attributes:
        elapsed_s: Since its job began.
        processed_mib: Sent so far.
        remaining_mib: Left to send.
        throttle_percent: By how much the guest is slowed down.
    """

    elapsed_s: float
    processed_mib: float
    remaining_mib: float
    throttle_percent: float


def sample_of(operation: VirtualMachineOperation) -> Sample | None:
    """Read the figures out of an operation; None where it has none now."""
    found = _FIGURES.search(operation.message) if operation.spec.type.is_migration else None
    if found is None:
        return None
    return Sample(
        float(found["elapsed"]), float(found["processed"]), float(found["remaining"]), float(found["throttle"])
    )


def dirty_rates(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Work out at which rate the guest dirtied memory between two samples, MiB/s.

    What is left is what was left, less what was sent, and what was dirtied meanwhile.
    """
    rates = []
    for before, after in pairwise(samples):
        seconds = after.elapsed_s - before.elapsed_s
        if seconds > 0:
            sent = after.processed_mib - before.processed_mib
            rate = (after.remaining_mib - before.remaining_mib + sent) / seconds
            rates.append((after.elapsed_s, max(0.0, round(rate, 1))))
    return rates


def migration_charts(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    """Plot a migration: pairs of a title and an SVG, in order."""
    left = [(sample.elapsed_s, sample.remaining_mib) for sample in samples]
    throttle = [(sample.elapsed_s, sample.throttle_percent) for sample in samples]
    return [
        ("Data left, MiB", line_chart("Data left, MiB", left, "MiB")),
        ("Dirty rate, MiB/s", line_chart("Dirty rate, MiB/s", dirty_rates(samples), "MiB/s", at_least=1)),
        ("Throttle, %", line_chart("Throttle, %", throttle, "%", at_least=100)),
    ]


def line_chart(title: str, points: Sequence[tuple[float, float]], unit: str, at_least: float = 0) -> str:
    """Plot values over seconds.

    Args:
        title: For who can't see it.
        points: Pairs of seconds and value, in order; 0..n.
        unit: Of the values.
        at_least: What the axis reaches in any case.
    """
    end = max((x for x, _ in points), default=0) or 1
    top = max(at_least, max((y for _, y in points), default=0)) or 1
    width, height = _WIDTH - _LEFT - 12, _HEIGHT - _BOTTOM - _TOP

    def place(x: float, y: float) -> str:
        return f"{_LEFT + width * x / end:.1f},{_TOP + height * (1 - y / top):.1f}"

    last = f"{points[-1][1]:g} {unit} after {points[-1][0]:g} s" if points else "no figures yet"
    line = " ".join(place(x, y) for x, y in points)
    dots = "".join(_dot(place(x, y)) for x, y in points[-1:])
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}: {escape(last)}">'
        f'<line class="axis" x1="{_LEFT}" y1="{_TOP}" x2="{_LEFT}" y2="{_TOP + height}"/>'
        f'<line class="axis" x1="{_LEFT}" y1="{_TOP + height}" x2="{_WIDTH - 12}" y2="{_TOP + height}"/>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 10}" text-anchor="end">{_short(top)}</text>'
        f'<text x="{_LEFT - 6}" y="{_TOP + height}" text-anchor="end">0</text>'
        f'<text x="{_WIDTH - 12}" y="{_HEIGHT - 5}" text-anchor="end">{_short(end)} s</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 5}">0</text>'
        f'<polyline class="series" points="{line}"/>{dots}</svg>'
    )


def _dot(place: str) -> str:
    x, _, y = place.partition(",")
    return f'<circle class="dot" cx="{x}" cy="{y}" r="3.5"/>'


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004 - three figures


@dataclass(frozen=True, slots=True)
class Mark:
    """One thing on the timeline.

    Attributes:
        at: When it began.
        until: When it ended; None: it has no length.
        lane: In which line it stands.
        text: What it was.
        bad: Whether a person should look.
    """

    at: datetime
    until: datetime | None
    lane: str
    text: str
    bad: bool = False


LANES: Final = ("Migrations", "Fencings", "Moves")
_DAY: Final = timedelta(hours=24)
_LANE_HEIGHT: Final = 34
_DAY_LEFT, _DAY_WIDTH = 82, 900


def timeline(marks: Sequence[Mark], now: datetime) -> str:
    """Draw the last day: a lane for migrations, fencings and moves, the newest on the right."""
    width = _DAY_WIDTH - _DAY_LEFT - 10
    height = _LANE_HEIGHT * len(LANES)

    def place(at: datetime) -> float:
        share = 1 - (now - at) / _DAY
        return _DAY_LEFT + width * min(1.0, max(0.0, share))

    parts = []
    for number, lane in enumerate(LANES):
        middle = _LANE_HEIGHT * number + _LANE_HEIGHT / 2
        parts.append(f'<text x="{_DAY_LEFT - 8}" y="{middle + 4:.0f}" text-anchor="end">{lane}</text>')
        # On a phone the right end is seen at first.
        parts.append(
            f'<text class="at-end" x="{_DAY_WIDTH - 10}" y="{middle - 13:.0f}" text-anchor="end">{lane}</text>'
        )
        parts.append(f'<line class="axis" x1="{_DAY_LEFT}" y1="{middle}" x2="{_DAY_WIDTH - 10}" y2="{middle}"/>')
        for mark in (mark for mark in marks if mark.lane == lane):
            begin = place(mark.at)
            length = max(4.0, place(mark.until) - begin) if mark.until is not None else 4.0
            style = "mark bad" if mark.bad else "mark"
            parts.append(
                f'<rect class="{style}" x="{min(begin, _DAY_WIDTH - 10 - length):.1f}" y="{middle - 9:.0f}" '
                f'width="{length:.1f}" height="18"><title>{escape(mark.text)}</title></rect>'
            )
    hours = [(24, "24 h ago"), (18, "18 h"), (12, "12 h"), (6, "6 h"), (0, "now")]
    for ago, text in hours:
        anchor = {24: "start", 0: "end"}.get(ago, "middle")
        at = place(now - timedelta(hours=ago))
        parts.append(f'<text x="{at:.0f}" y="{height + 16}" text-anchor="{anchor}">{text}</text>')
    said = ", ".join(f"{sum(mark.lane == lane for mark in marks)} {lane.lower()}" for lane in LANES)
    return (
        f'<svg class="chart timeline" viewBox="0 -10 {_DAY_WIDTH} {height + 32}" role="img" '
        f'aria-label="The last 24 hours: {said}">{"".join(parts)}</svg>'
    )
