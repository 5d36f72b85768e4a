"""Locks on storage: when the start of a VM elsewhere contradicts the evidence (docs/adr/0019-fencing.md).

The storage of VM a locks, and keeps a dead host's lock for a while; that of b locks nothing, so only the rules keep b
from running twice. Both were on a lost host. The power of a host is read truly; the deadline of a watchdog may be a
wrong conclusion, as the watchdog is broken. What is asked: after a start of a has met the lock of the living host, does
a node still get leave to start b? Before that nobody could know.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Evidence = Literal["", "BMC", "Deadline"]
Stage = Literal["", "waits", "granted", "claimed", "runs", "held"]


class Start(NamedTuple):
    """A VM on its way to another node."""

    stage: Stage = ""
    rests_on: Evidence = ""
    tries: int = 0


class State(NamedTuple):
    """All there is."""

    lives: bool = True
    """The lost host, and its guests."""
    is_kept: bool = False
    """The storage keeps its lock, though it is dead."""
    evidence: Evidence = ""
    contradicted: bool = False
    met: bool = False
    """A start of a has met the lock of the living host."""
    a: Start = Start()
    b: Start = Start()
    others: int = 1
    """So many hosts more may die, on which a start is under way."""


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search came to: the states, and the way to the first bad one."""

    states: frozenset[State]
    way: tuple[str, ...]


TRIES = 2


def search(without: str = "") -> Searched:
    """Search all states; `without`: a rule that is left out."""
    first = State()
    came: dict[State, tuple[State, str] | None] = {first: None}
    waiting = deque([first])
    while waiting:
        state = waiting.popleft()
        for step, new, is_bad in _steps(state, without):
            if is_bad:
                return Searched(frozenset(came), (*_way(came, state), step))
            if new not in came:
                came[new] = (state, step)
                waiting.append(new)
    return Searched(frozenset(came), ())


def _way(came: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    before = came[state]
    return [] if before is None else [*_way(came, before[0]), before[1]]


Step = tuple[str, State, bool]
Changes = dict[str, Any]


def _steps(s: State, without: str) -> Iterator[Step]:
    if s.lives:
        yield "the lost host dies", s._replace(lives=False, is_kept=True), False
    if s.is_kept:
        yield "the storage lets its lock go", s._replace(is_kept=False), False
    if not s.evidence:
        yield "its deadline passes", s._replace(evidence="Deadline"), False
        if not s.lives:
            yield "its power is read as off", s._replace(evidence="BMC"), False
    else:
        for name in ("a", "b"):
            start: Start = getattr(s, name)
            for step, new, changes, is_bad in _of_vm(s, name, start, without):
                yield f"{name}: {step}", s._replace(**{**changes, name: new}), is_bad


def _of_vm(s: State, name: str, start: Start, without: str) -> Iterator[tuple[str, Start, Changes, bool]]:
    unclaimed = {"waits"} if without == "what nobody has claimed is called back" else {"waits", "granted"}
    if s.contradicted and start.stage in unclaimed:
        yield "is held back", start._replace(stage="held"), {}, False
    match start.stage:
        case "":
            stage: Stage = "held" if s.contradicted else "waits"
            yield "is to start", start._replace(stage=stage, rests_on=s.evidence), {}, False
        case "waits" if not s.contradicted or without == "a grant rests on the evidence":
            yield "is granted", start._replace(stage="granted"), {}, name == "b" and s.met
        case "granted":
            yield "is claimed", start._replace(stage="claimed"), {}, False
            yield from _host_dies(s, start, without)
        case "claimed":
            yield from _host_dies(s, start, without)
            if name == "a" and (s.lives or s.is_kept):
                yield from _meets_lock(s, start, without)
            else:
                yield "runs", start._replace(stage="runs"), {}, False
        case _:
            pass


def _host_dies(s: State, start: Start, without: str) -> Iterator[tuple[str, Start, Changes, bool]]:
    """Lose the host on which it is started, by its power: there is evidence about two then."""
    if s.others:
        rests_on = "BMC" if without == "of two, the deadline counts" else start.rests_on
        yield "its new host dies", start._replace(stage="waits", rests_on=rests_on), {"others": s.others - 1}, False


def _meets_lock(s: State, start: Start, without: str) -> Iterator[tuple[str, Start, Changes, bool]]:
    is_contradiction = start.rests_on == "Deadline" or without == "after a BMC's evidence a lock is stale"
    if without == "after a deadline a lock contradicts":
        is_contradiction = False
    if is_contradiction:
        changes: Changes = {"contradicted": True, "met": s.met or s.lives}
        yield "meets a lock: contradicted", start._replace(stage="held"), changes, s.evidence == "BMC"
    else:
        stage: Stage = "waits" if start.tries < TRIES else "held"
        new = start._replace(stage=stage, tries=min(TRIES, start.tries + 1))
        yield "meets a lock: tried again", new, {"met": s.met or s.lives}, False


def goes_on(without: str = "") -> bool:
    """Whether a grant that nobody has claimed may stay though its evidence is contradicted."""
    return any(
        s.contradicted
        and s.b.stage == "granted"
        and "b: is held back" not in {step for step, _, _ in _steps(s, without)}
        for s in search(without).states
    )
