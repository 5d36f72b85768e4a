"""Who votes: whatever changes, and whoever has not heard of it, two majorities that could disagree share a member."""

from collections.abc import Iterator
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.lease import Membership, read_membership
from orchestrator.planner.membership import plan_membership

NAMES = "vabcdef"


def majorities(members: set[str], *, must: str = "", without: str = "") -> Iterator[set[str]]:
    others = sorted(members - {must, without})
    for count in range(len(others) + 1):
        for chosen in combinations(others, count):
            found = set(chosen) | ({must} if must else set())
            if 2 * len(found) > len(members):
                yield found


def as_addresses(names: set[str]) -> dict[str, str]:
    return {name: f"{name}:1" for name in names}


SETS = st.sets(st.sampled_from(NAMES[1:]), min_size=1, max_size=4).map(lambda names: names | {"v"})


@given(
    wanted=st.lists(SETS, min_size=1, max_size=5),
    hears=st.lists(st.sets(st.sampled_from(NAMES)), min_size=5, max_size=5),
    v_hears=st.lists(st.sampled_from(["nothing", "reply lost", "all"]), min_size=5, max_size=5),
)
def test_a_takeovers_votes_and_a_failsafes_votes_share_a_member(
    wanted: list[set[str]], hears: list[set[str]], v_hears: list[str]
) -> None:
    current = Membership()
    acknowledged: dict[str, int] = {}
    history = {0: Membership()}
    holds = 0
    for names, heard, v_heard in zip(wanted, hears, v_hears, strict=False):
        plan = plan_membership(current, as_addresses(names), acknowledged, set())
        if plan.next is not None:
            current = plan.next
            history[current.version] = current
        acknowledged |= dict.fromkeys(heard & current.members.keys() - {"v"}, current.version)
        if v_heard != "nothing":
            acknowledged["v"] = holds  # its renewal says what it held when it was created
            holds = current.version if v_heard == "all" else holds
        if "v" not in history[holds].members or "v" not in current.members:
            continue
        if current.counts_for(acknowledged.get("v", 0)):
            for votes in majorities(set(current.members), without="v"):
                for failsafe in majorities(set(history[holds].members), must="v"):
                    assert votes & failsafe, f"{sorted(failsafe)} keep it up while {sorted(votes)} give it up"


@given(members=st.sets(st.sampled_from(NAMES)), version=st.integers(1, 99), changed=st.integers(0, 5))
def test_it_is_read_as_it_was_written(members: set[str], version: int, changed: int) -> None:
    membership = Membership(version, as_addresses(members), changed)
    assert read_membership(membership.text()) == membership


def test_who_is_waited_for_is_said() -> None:
    current = Membership(3, as_addresses({"v", "a", "b"}), 1)
    plan = plan_membership(current, as_addresses({"v", "a"}), {"v": 3, "a": 2}, set())
    assert (plan.next, plan.waits_for) == (None, ("a", "b"))
    assert plan_membership(current, as_addresses({"v", "a"}), {"v": 3, "a": 2}, {"a", "b"}).next is not None
