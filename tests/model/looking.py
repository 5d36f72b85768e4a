"""Looking: whether a silent host without a watchdog lives is asked of other nodes' agents (services/looking.py).

Its heartbeat is dead; its daemon may show its guests, hang, or show none (it has booted). Two agents are asked, each of
which may be cut off from the host, or late by more than an attempt. An attempt that finds it alive rests, and comes
again; any other cuts its power, which is the evidence: looking itself is none. What is asked: is a host cut while an
agent that reaches it answered in time and saw its guests? And is one taken for alive that was dead, hung or had booted
when the attempt began, though an agent could say so? What counts as life is the product's own `shows`.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import NamedTuple

from orchestrator.resources.looking import Look, SeenGuest
from orchestrator.services.looking import shows

GUESTS = frozenset({"default/a"})
AGENTS = range(2)


class Host(StrEnum):
    """What becomes of it; each may turn into any that follows."""

    LIVES = "lives"
    HANGS = "hangs"
    """Its guests may run; its daemon takes connections, and answers nothing."""
    DEAD = "is dead"
    BOOTED = "has booted"


_HAS_PORT = {Host.LIVES, Host.HANGS, Host.BOOTED}
_LOOKS = {
    Host.LIVES: Look(guests=(SeenGuest(vm="default/a"),)),
    Host.HANGS: Look(problem="it did not answer"),
    Host.DEAD: Look(problem="it is not reached"),
    Host.BOOTED: Look(),
}


class State(NamedTuple):
    """All there is."""

    host: Host = Host.LIVES
    attempt: int = 0
    """Its number while one is under way; 0: none is."""
    attempts: int = 0
    began: Host = Host.LIVES
    """The host when the attempt began."""
    is_open: bool = False
    """The port took connections, as the control plane tried."""
    asked: tuple[int, ...] = (0, 0)
    """By agent, the attempt whose question it has read and not answered."""
    seen: tuple[Host | None, ...] = (None, None)
    """By agent, what it saw for that."""
    found: tuple[Host | None, ...] = (None, None)
    """By agent, the answer that counts."""
    is_fenced: bool = False


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search came to: the states, what goes wrong and the way there."""

    states: frozenset[State]
    wrong: str
    way: tuple[str, ...]


def search(*, reach: tuple[bool, ...], attempts: int = 2, without: str = "") -> Searched:
    """Search all states.

    Args:
        reach: By agent, whether it reaches the host.
        attempts: So many.
        without: A rule that is left out.
    """
    first = State()
    came: dict[State, tuple[State, str] | None] = {first: None}
    waiting = deque([first])
    while waiting:
        state = waiting.popleft()
        for step, new, wrong in _steps(state, reach, attempts, without):
            if wrong:
                return Searched(frozenset(came), wrong, (*_way(came, state), step))
            if new not in came:
                came[new] = (state, step)
                waiting.append(new)
    return Searched(frozenset(came), "", ())


def _way(came: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    before = came[state]
    return [] if before is None else [*_way(came, before[0]), before[1]]


Step = tuple[str, State, str]


def _steps(s: State, reach: tuple[bool, ...], attempts: int, without: str) -> Iterator[Step]:
    if s.is_fenced:
        return
    later = list(Host)[list(Host).index(s.host) + 1 :]
    for host in later:
        yield f"the host {host}", s._replace(host=host), ""
    if not s.attempt and s.attempts < attempts:
        number = s.attempts + 1
        is_open = s.host in _HAS_PORT
        # Who still has an older question answers that first: its answer is late.
        asked = tuple(old or number for old in s.asked)
        found = s.found if without == "a question counts once" else (None, None)
        new = s._replace(attempt=number, attempts=number, began=s.host, is_open=is_open, asked=asked, found=found)
        yield "an attempt begins", new, ""
    for i in AGENTS:
        if s.asked[i] and s.seen[i] is None:
            saw = s.host if reach[i] else Host.DEAD
            yield f"agent {i} looks: {saw}", s._replace(seen=_with(s.seen, i, saw)), ""
        elif s.asked[i]:
            counts = s.asked[i] == s.attempt or without == "an answer is to this attempt's question"
            found = _with(s.found, i, s.seen[i]) if counts and s.attempt else s.found
            left = tuple(0 if j == i else number for j, number in enumerate(s.asked))
            yield f"agent {i} answers", s._replace(asked=left, seen=_with(s.seen, i, None), found=found), ""
    if s.attempt:
        yield _decided(s, without)


def _with(values: tuple[Host | None, ...], i: int, value: Host | None) -> tuple[Host | None, ...]:
    return (*values[:i], value, *values[i + 1 :])


def _decided(s: State, without: str) -> Step:
    """End the attempt: all have answered, or its time is over."""
    seen = [_LOOKS[host] for host in s.found if host is not None]
    live = [shows(look, GUESTS) for look in seen]
    if without == "one that sees it is enough":
        lives = bool(live) and all(live)
    elif without == "a host that shows no guest is not alive":
        lives = any(not look.problem for look in seen)
    else:
        lives = any(live)
    if without == "the port decides where no agent can say":
        lives = lives or s.is_open
    else:
        lives = lives or (s.is_open and not seen)
    ended = s._replace(attempt=0, is_open=False, began=Host.LIVES)
    if lives:
        # It may have changed since; but what was so when the attempt began is not what it was before.
        wrong = "" if s.began is Host.LIVES or not seen else f"one that {s.began} is taken for alive"
        return "it is alive: it is not cut", ended, wrong
    is_seen = any(host is Host.LIVES for host in s.found) and s.host is Host.LIVES
    wrong = "it is cut, though an agent saw its guests" if is_seen else ""
    return "its power is cut, and read as off", ended._replace(is_fenced=True, host=Host.DEAD), wrong


def reaches() -> Iterator[tuple[bool, ...]]:
    """Give every way in which the agents may reach the host, or not."""
    yield from product((True, False), repeat=len(AGENTS))
