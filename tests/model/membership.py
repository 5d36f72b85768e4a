"""Rule 10: whoever may feed the lost node, and whoever may let it be taken over, share a member.

The victim `v` counts its failsafe majority in the membership that it has cached, control counts acknowledgements in the
present one. Where the two majorities may be disjoint, peers that never heard of the suspicion keep v alive while others
let it be taken over. Every history of a few changes is looked at, with every pair of such majorities.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations, pairwise
from typing import Literal

Members = frozenset[str]
Rule = Literal["live-acknowledged", "every-registered-acknowledged", "majority-in-each"]

VICTIM = "v"
_NAMES = "abcdef"


@dataclass(frozen=True, slots=True)
class Disjoint:
    """A way to a double: v, which caches `cached`, is fed by `feeders` while `voters` of `present` let it be taken."""

    cached: Members
    present: Members
    changes: int
    feeders: Members
    voters: Members


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search came to: pairs of majorities looked at, and the first that is disjoint."""

    pairs: int
    disjoint: Disjoint | None


def search(rule: Rule, *, sizes: range, changes: int) -> Searched:
    """Look at every pair of majorities that a rule for changes of the membership allows.

    Args:
        rule: When a change counts. `live-acknowledged`: once the agents that live have acknowledged it, so v, which is
            lost, may have missed any number. `every-registered-acknowledged`: v misses one at most, since a second is
            not made before each registered member, v too, has acknowledged the first. `majority-in-each`: any number
            of changes, and the votes are a majority in each membership that v may hold.
        sizes: Members at first, v included.
        changes: At most so many, one member each.
    """
    pairs = 0
    for size in sizes:
        for history in _histories(frozenset((VICTIM, *_NAMES[: size - 1])), changes):
            missed_most = 1 if rule == "every-registered-acknowledged" else len(history) - 1
            for missed in range(min(missed_most, len(history) - 1) + 1):
                held = history[len(history) - 1 - missed :]  # what v may hold, from what it does hold on
                for voters in _majorities(history[-1], but=VICTIM):
                    if rule == "majority-in-each" and not all(2 * len(voters & m) > len(m) for m in held):
                        continue
                    for feeders in _majorities(held[0], with_=VICTIM):
                        pairs += 1
                        if not feeders & voters:
                            return Searched(pairs, Disjoint(held[0], history[-1], len(history) - 1, feeders, voters))
    return Searched(pairs, None)


def _histories(first: Members, changes: int) -> Iterator[tuple[Members, ...]]:
    """Give all histories of up to so many changes; v stays a member throughout."""
    yield (first,)
    if changes:
        for name in _NAMES:
            for rest in _histories(first ^ {name}, changes - 1):
                history = (first, *rest)
                assert all(len(a ^ b) == 1 for a, b in pairwise(history))
                yield history


def _majorities(members: Members, *, with_: str = "", but: str = "") -> Iterator[Members]:
    """Give all sets of more than half of the members; each has `with_` (v counts itself), none has `but`."""
    others = sorted(members - {with_, but})
    for chosen in chain.from_iterable(combinations(others, n) for n in range(len(others) + 1)):
        majority = frozenset(chosen) | ({with_} if with_ else frozenset())
        if 2 * len(majority) > len(members):
            yield majority


def search_failover(*, prepared: bool, sizes: range, changed: int) -> Searched:
    """Look at a failover of Redis that loses a membership which v has read already.

    v goes by the new one. Its renewal that said so may be lost as well, so its lease says the one before.

    Args:
        prepared: A replica has the new one before anybody reads it, and no deadline counts until it is published again.
        sizes: Members at first, v included.
        changed: By so many members at most the new one differs: several may join at once.
    """
    pairs = 0
    for size in sizes:
        before = frozenset((VICTIM, *_NAMES[: size - 1]))
        for count in range(1, changed + 1):
            for names in combinations(_NAMES, count):
                after = before ^ frozenset(names)
                present = after if prepared else before
                # Published again, it counts for v if that holds it too, or the one before and they differ by one.
                caches = [after] + ([before] if prepared and count == 1 else [])
                for cached in caches:
                    for voters in _majorities(present, but=VICTIM):
                        for feeders in _majorities(cached, with_=VICTIM):
                            pairs += 1
                            if not feeders & voters:
                                return Searched(pairs, Disjoint(cached, present, count, feeders, voters))
    return Searched(pairs, None)
