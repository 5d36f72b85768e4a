"""Whose power is off, where addresses of BMCs may be swapped: pure (docs/adr/0019-fencing.md).

A BMC that was read as off is the power of *some* host. Whoever renewed its lease after that, by the boot that it had
before, has power: it is another's. So what is off is the node, or one of those that did not renew. Silence alone tells
these apart by nothing. But where the power of each of them was read as off as well, at another address, and may be of
nobody else, then all of their hosts were off, whichever belongs to whom. `tests/model/power.py` searches this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from orchestrator.resources.fencing import Bmc

_PLACE: Final = ("ip", "ipaddr", "ipport", "port", "plug", "uuid")
"""Options of fence agents that say which power is meant."""


@dataclass(frozen=True, slots=True)
class OffReading:
    """A lost member's BMC that was read as off, when its lease had run out.

    Attributes:
        place: Where that power is switched; None: nowhere that could be compared.
        may_be_of: Boots, by name, of the members that had not renewed since: it may be the power of one of these.
    """

    place: object | None
    may_be_of: Mapping[str, str]


def place_of(bmc: Bmc) -> object | None:
    """Say which power a BMC switches, as far as its options tell."""
    return tuple((key, bmc.options[key]) for key in _PLACE if key in bmc.options) or None


def not_known_off(name: str, readings: Mapping[str, OffReading], boots: Mapping[str, str]) -> frozenset[str]:
    """Name the members whose power may be on, and may be what the node's own is taken for; empty: its host was off.

    Args:
        name: The node's.
        readings: Of BMCs that were read as off, the node's too; of members whose BMC is not trusted, none.
        boots: Of the members' leases as they are now. A reading says nothing of a later boot.
    """
    unknown: set[str] = set()
    places: dict[str, object | None] = {}
    waiting = [name]
    while waiting:
        member = waiting.pop()
        if member in places or member in unknown:
            continue
        reading = readings.get(member)
        if reading is None or any(boots.get(other) != boot for other, boot in reading.may_be_of.items()):
            unknown.add(member)
            continue
        places[member] = reading.place
        waiting += sorted(reading.may_be_of)
    if len(places) > 1:
        found = list(places.values())
        unknown |= {member for member, place in places.items() if place is None or found.count(place) > 1}
    return frozenset(unknown)


__all__ = ["OffReading", "not_known_off", "place_of"]
