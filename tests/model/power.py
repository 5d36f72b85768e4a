"""Evidence by BMCs whose addresses may be wrong, several members lost at once (docs/adr/0019-fencing.md).

Every member has a fencing worker of its own; they run side by side and may die at any moment, or be late. Hosts lose
power, boot anew, are cut off while they live, and come back. A BMC's cable leads to any host, or to a spare one that is
no member's and off. What is asked: is a boot that evidence speaks of ever alive? Whether a host is known to be off is
said by the product's own `planner.power`.

That a BMC which silenced a healthy host is distrusted is left out: it takes attempts away, and adds none.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product
from typing import NamedTuple

from orchestrator.planner.power import OffReading, not_known_off

IDLE, OPEN, BY_BMC, DEADLINE, PERSON = range(5)
"""Phases of a fencing. A deadline's evidence is true when it is given; what a person says is off stays off."""
REST, CUTS, WAITS, COMMITS = range(4)
"""Where a worker is: about to cut, or the power was read as off and it waits for the others, or they have spoken."""


class Doc(NamedTuple):
    """A fencing on record."""

    phase: int = IDLE
    may_be_of: tuple[int, ...] | None = None
    """By member: 0: its BMC, read as off, is not that one's; 1 + the boot of whom it may be."""


class Worker(NamedTuple):
    """An attempt under way."""

    at: int = REST
    boots: tuple[int, ...] = ()
    """Of all leases when it began; empty: its own member has renewed since."""
    renewed: int = 0
    """A mask of those that have, since the power was read as off."""


class Member(NamedTuple):
    """A host, and what is on record of it."""

    has_power: bool = True
    boot: int = 0
    is_joined: bool = True
    lease: int = 0
    """The boot that renewed last."""
    is_renewed: bool = False
    """The lease is another than that of its open fencing."""
    doc: Doc = Doc()
    worker: Worker = Worker()
    away: int = 0
    """A mask of those that were off, as a person had said, when its BMC was last read as on while it was well."""


class State(NamedTuple):
    """All of it, and how many faults are left."""

    members: tuple[Member, ...]
    faults: int


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search came to.

    Attributes:
        states: Reached.
        way: To evidence about a boot that is alive, one step a line; empty: there is none.
        fenced: The most members about whom there was evidence by BMCs at a time.
    """

    states: int
    way: tuple[str, ...]
    fenced: int


def cables(members: int) -> Iterator[tuple[int, ...]]:
    """Give every way in which BMCs' cables may lead to hosts, but for those that differ in the members' names only."""
    seen = set()
    for cable in product(range(members + 1), repeat=members):
        named = []
        for order in permutations(range(members)):
            other = [0] * members
            for member, host in enumerate(cable):
                other[order[member]] = order[host] if host < members else host
            named.append(tuple(other))
        if min(named) not in seen:
            seen.add(min(named))
            yield cable


def search(cable: tuple[int, ...], *, faults: int, without: str = "") -> Searched:
    """Search all states for evidence about a boot that is alive.

    Args:
        cable: By member, the host to which its BMC's cable leads; the number of members is the spare host's.
        faults: So many losses of power, cuts of the network and their ends, boots, deadlines, people's words.
        without: A rule that is left out; `MUTANTS` in the test names them.
    """
    rules = _Rules(cable, without)
    first = State((Member(),) * len(cable), faults)
    came: dict[State, tuple[State, str] | None] = {first: None}
    waiting, fenced = deque([first]), 0
    while waiting:
        state = waiting.popleft()
        fenced = max(fenced, sum(member.doc.phase == BY_BMC for member in state.members))
        for step, new in rules.steps(state):
            if new is None:
                return Searched(len(came), (*_way(came, state), step), fenced)
            if new not in came:
                came[new] = (state, step)
                waiting.append(new)
    return Searched(len(came), (), fenced)


def _way(came: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    steps = []
    while (before := came[state]) is not None:
        state, step = before
        steps.append(step)
    return steps[::-1]


Step = tuple[str, State | None]
"""What is done, and the state after it; None: evidence about a boot that is alive."""


class _Rules:
    def __init__(self, cable: tuple[int, ...], without: str) -> None:
        self.cable = cable
        self.without = without
        self.all = range(len(cable))

    def steps(self, state: State) -> Iterator[Step]:
        for number in self.all:
            if state.faults:
                yield from self._faults(state, number)
            yield from self._of_member(state, number)
            yield from self._of_worker(state, number)

    def _faults(self, state: State, i: int) -> Iterator[Step]:
        m = state.members[i]
        changed = {f"{i}'s network is {'cut' if m.is_joined else 'whole'}": m._replace(is_joined=not m.is_joined)}
        if m.has_power:
            changed[f"{i} loses its power"] = m._replace(has_power=False)
        elif not m.boot and m.doc.phase != PERSON:
            changed[f"{i} boots"] = m._replace(has_power=True, boot=1)
        if m.doc.phase == OPEN and not m.is_renewed and not _lives(m):
            changed[f"the deadline of {i} passes"] = m._replace(doc=m.doc._replace(phase=DEADLINE))
            if not m.has_power:
                changed[f"a person says that {i} is off"] = m._replace(doc=m.doc._replace(phase=PERSON))
        for step, new in changed.items():
            yield step, _put(state, i, new)._replace(faults=state.faults - 1)

    def _of_member(self, state: State, i: int) -> Iterator[Step]:
        m = state.members[i]
        if m.has_power and m.is_joined:
            yield f"{i} renews", self._renewed(state, i)
            if m.doc.phase == IDLE and self._reads_on(state, i):
                away = sum(1 << j for j, other in enumerate(state.members) if other.doc.phase == PERSON)
                yield f"{i}'s BMC is read: on", _put(state, i, m._replace(away=away))
        if m.is_renewed:
            yield f"{i}'s fencing ends", _put(state, i, m._replace(is_renewed=False, doc=Doc()))
        elif m.doc.phase == IDLE and not (m.has_power and m.is_joined):
            yield f"{i} is lost", _put(state, i, m._replace(doc=Doc(OPEN)))

    def _reads_on(self, state: State, i: int) -> bool:
        return self.cable[i] < len(self.all) and state.members[self.cable[i]].has_power

    def _renewed(self, state: State, i: int) -> State:
        """Renew: workers that wait for it see that, if the boot is the one they knew."""
        m = state.members[i]
        if m.doc.phase >= BY_BMC:
            if m.lease == m.boot:
                return state  # it is refused
            m = m._replace(doc=Doc())  # it has returned
        w = m.worker
        if self.without != "the lease is read by the commit":
            w = w._replace(boots=()) if w.at == CUTS else Worker()  # it may be about to cut, and no more than that
        is_renewed = m.is_renewed or m.doc.phase == OPEN
        members = list(state.members)
        members[i] = m._replace(lease=m.boot, is_renewed=is_renewed, worker=w)
        for j, other in enumerate(members):
            w = other.worker
            if j != i and w.at == WAITS and (w.boots[i] == m.boot or self.without == "renewals are of the same boot"):
                members[j] = other._replace(worker=w._replace(renewed=w.renewed | 1 << i))
        return state._replace(members=tuple(members))

    def _of_worker(self, state: State, i: int) -> Iterator[Step]:
        m, host = state.members[i], self.cable[i]
        w = m.worker
        if w.at != REST:
            yield f"worker {i} dies", _at(state, i, Worker())
        if w.at == REST and m.doc.phase == OPEN and not m.is_renewed:
            boots = tuple(member.lease for member in state.members)
            if self._reads_on(state, i):
                yield f"worker {i} reads: on", _at(state, i, Worker(CUTS, boots))
            elif host < len(self.all) or self.without == "it was read as on before":
                yield f"worker {i} reads: off", self._off(state, i, boots)
        elif w.at == CUTS:
            cut = _put(state, host, state.members[host]._replace(has_power=False))
            done = self._off(cut, i, w.boots) if w.boots else _at(cut, i, Worker())
            yield f"worker {i} cuts {host}, and reads: off", done
        elif w.at == WAITS:
            yield from self._wait(state, i)
        elif w.at == COMMITS and (m.doc.phase == OPEN or self.without == "the lease is read by the commit"):
            ended = m._replace(doc=m.doc._replace(phase=BY_BMC), worker=Worker())
            yield f"evidence about {i}", None if _lives(m) else _put(state, i, ended)

    def _off(self, state: State, i: int, boots: tuple[int, ...]) -> State:
        """Begin to wait for the others, now that the power was read as off."""
        m = state.members[i]
        doc = m.doc
        if self.without == "others have renewed before it counts for others":
            silent = {j for j, o in enumerate(state.members) if not (o.has_power and o.is_joined)} - {self.cable[i]}
            doc = doc._replace(may_be_of=tuple(1 + boot if j in silent else 0 for j, boot in enumerate(boots)))
        return _put(state, i, m._replace(doc=doc, worker=Worker(WAITS, boots)))

    def _wait(self, state: State, i: int) -> Iterator[Step]:
        """Say whose power it may be, of those that have not renewed; and ask whether all of these are off."""
        m = state.members[i]
        w, silent = m.worker, {j for j in self.all if j != i and not (m.worker.renewed | m.away) >> j & 1}
        if self.without == "members with evidence count":
            silent -= {j for j in silent if state.members[j].doc.phase >= BY_BMC}
        if self.without == "a word counts if its BMC was read as on since":
            silent -= {j for j in silent if state.members[j].doc.phase == PERSON}
        may_be_of = tuple(1 + w.boots[j] if j in silent else 0 for j in self.all)
        state = _put(state, i, m._replace(doc=m.doc._replace(may_be_of=may_be_of)))
        if not silent or self.without == "silence speaks" or not self._unknown(state, i):
            yield f"worker {i}: its host is off", _at(state, i, w._replace(at=COMMITS))
        elif state.members[i] != m:
            yield f"worker {i}: it may be that of {sorted(silent)}", state

    def _unknown(self, state: State, i: int) -> frozenset[str]:
        readings, own = {}, state.members[i].doc.may_be_of or ()
        boots = {str(j): str(member.lease) for j, member in enumerate(state.members)}
        for j, member in enumerate(state.members):
            may_be_of = {str(k): str(of - 1) for k, of in enumerate(member.doc.may_be_of or ()) if of}
            if self.without == "of those, too, all are off" and j != i:
                may_be_of = {k: of for k, of in may_be_of.items() if k == str(i) or own[int(k)]}
            if self.without == "readings are of the same boot":
                may_be_of = {k: boots[k] for k in may_be_of}
            if member.doc.may_be_of is not None:
                place = str(j if self.without == "an address counts once" else self.cable[j])
                readings[str(j)] = OffReading(place, may_be_of)
        return not_known_off(str(i), readings, boots)


def _lives(member: Member) -> bool:
    """Whether the boot that its lease is about is alive."""
    return member.has_power and member.boot == member.lease


def _put(state: State, i: int, member: Member) -> State:
    return state._replace(members=(*state.members[:i], member, *state.members[i + 1 :]))


def _at(state: State, i: int, worker: Worker) -> State:
    return _put(state, i, state.members[i]._replace(worker=worker))
