"""What a scenario expects: lines of time, subject and words, in order, each matched by something that happened.

    # time    who           what
    0         op/evict-a    Pending
    0-1       vm/a          Migrating
    never     vm/b          Starting
    12        vm/a          Running on n2
    end       vm/a          Running on n2, incarnation 1

A time is a second (`12` is from 12.0 to 12.999), a moment (`12.4`, to a tenth), a span (`10-15`), or `-` for whenever.
The words are the first ones of what is told; `...` in them stands for anything. What a line expects comes after what is
expected above it; but lines of the same time may have happened in any order. `never` is about all that
follows what is expected above it, and `end` about how it stands at the end. Every warning has to be expected.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tests.scenarios.engine.timeline import Entry

_LINE = re.compile(r"(?P<when>\S+)\s+(?P<who>\S+)\s+(?P<what>\S.*)")
_WHEN = re.compile(r"-|never|end|\d+(\.\d)?|\d+(\.\d+)?-\d+(\.\d+)?")


@dataclass(frozen=True)
class Expectation:
    """One line.

    Attributes:
        number: Of the line in its file, from 1.
    """

    number: int
    when: str
    who: str
    what: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.when}  {self.who}  {self.what}"

    def is_met_by(self, entry: Entry) -> bool:
        """Whether that is what happened."""
        return self.is_about(entry) and self._is_time(entry.at)

    def is_about(self, entry: Entry) -> bool:
        """Whether that is what happened, whenever it did."""
        pattern = ".*".join(re.escape(part.strip()) for part in self.what.split("..."))
        return self.who in entry.who and re.match(rf"{pattern}(\b|\W|$)", entry.what) is not None

    def _is_time(self, at: float) -> bool:
        if self.when == "-":
            return True
        first, _, last = self.when.partition("-")
        if last:
            return float(first) <= at <= float(last)
        if "." in first:
            return abs(at - float(first)) < 0.1
        return int(at) == int(first)


def read_expectations(path: Path) -> list[Expectation]:
    """Read a scenario's expectations.

    Raises:
        AssertionError: There are none, or a line is not one. The file is written by a person, never by a run.
    """
    if not path.is_file():
        raise AssertionError(f"{path} is missing: what the scenario is to show is written down by hand, before it runs")
    expectations = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None or not _WHEN.fullmatch(match["when"]):
            raise AssertionError(f"{path}, line {number}: not `time who what`: {text!r}")
        expectations.append(Expectation(number, match["when"], match["who"], match["what"]))
    if not expectations:
        raise AssertionError(f"{path} expects nothing")
    return expectations


def unmet(expectations: Sequence[Expectation], entries: Sequence[Entry], ends: Sequence[Entry]) -> list[str]:
    """Compare a story with what was expected of it.

    Args:
        expectations: In order.
        entries: What happened, in order.
        ends: How it stands at the end.

    Returns:
        What is wrong, for people; empty when all is as expected.
    """
    problems: list[str] = []
    met: set[tuple[int, str]] = set()
    begin = 0
    for _, group in groupby(expectations, key=_place):
        lines = list(group)
        match lines[0].when:
            case "end":
                problems += [f"not so at the end: {e}" for e in lines if not any(e.is_about(entry) for entry in ends)]
            case "never":
                found = [(e, entry) for e in lines for entry in entries[begin:] if e.is_about(entry)]
                problems += [f"happened: {expectation}\n      as {entry}" for expectation, entry in found]
            case _:
                places = [_find(line, entries, begin, met) for line in lines]
                problems += [_missing(e, entries) for e, place in zip(lines, places, strict=True) if place is None]
                begin = max([begin, *(place + 1 for place in places if place is not None)])
    told = {place for place, _ in met}
    warnings = [entry for place, entry in enumerate(entries) if entry.is_warning and place not in told]
    return [*problems, *(f"a warning that was not expected: {entry}" for entry in warnings)]


def _place(expectation: Expectation) -> tuple[str, int]:
    """Lines of one place in the order: those of the same time; each `-` has its own."""
    return expectation.when, expectation.number if expectation.when == "-" else 0


def _find(expectation: Expectation, entries: Sequence[Entry], begin: int, met: set[tuple[int, str]]) -> int | None:
    for place in range(begin, len(entries)):
        if (place, expectation.who) not in met and expectation.is_met_by(entries[place]):
            met.add((place, expectation.who))
            return place
    return None


def _missing(expectation: Expectation, entries: Sequence[Entry]) -> str:
    near = [str(entry) for entry in entries if expectation.is_about(entry)]
    told = ("\n      it happened " + "\n                  ".join(near)) if near else ""
    return f"not met in its place: {expectation}{told}"
