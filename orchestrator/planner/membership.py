"""Who votes: the next membership, one change at a time (TAKEOVER.md, rule 10).

A node that is cut off goes by the membership that it held then. Its failsafe needs more than half of that one, and its
takeover more than half of the one published now; both must share a member. They do when the two are the same, or
differ by one member. So a change waits until every member has acknowledged the one before, and `Membership.changed`
says by how many members it differs: `Membership.counts_for` tells takeover whether its votes count against what a node
holds.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from orchestrator.lease import Membership


@dataclass(frozen=True, slots=True)
class MembershipPlan:
    """What becomes of the membership.

    Attributes:
        next: To be published; None: it stays.
        waits_for: Members that have not acknowledged it, while it should change.
    """

    next: Membership | None = None
    waits_for: tuple[str, ...] = ()


def plan_membership(
    current: Membership, wanted: Mapping[str, str], held: Mapping[str, int], fenced: Collection[str]
) -> MembershipPlan:
    """Plan the next membership.

    Args:
        current: As it is published.
        wanted: Those that are registered, name to address.
        held: What each member acknowledged last: the version in its lease.
        fenced: Members of which there is evidence that they run nothing.

    Returns:
        At most one version on; nothing while a member that may be alive has not acknowledged the current one. Also the
        one that is lost blocks it: it is the one that matters (trace 9).
    """
    if dict(current.members) == dict(wanted):
        return MembershipPlan()
    waits_for = sorted(name for name in current.members if name not in fenced and held.get(name, 0) < current.version)
    if waits_for:
        return MembershipPlan(waits_for=tuple(waits_for))
    changed = len(current.members.keys() ^ wanted.keys())
    return MembershipPlan(Membership(current.version + 1, dict(sorted(wanted.items())), changed))
