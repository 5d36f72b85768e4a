import pytest

from tests.model.power import cables, search

FENCED: dict[tuple[int, ...], int] = {(0, 1, 2): 2, (0, 2, 1): 3, (1, 2, 0): 3}
"""Where cables lead to the members' own hosts, swapped or not: about so many at once evidence has to be reachable."""


@pytest.mark.parametrize("cable", [*cables(2)])
def test_no_boot_that_is_alive_is_taken_for_dead(cable: tuple[int, ...]) -> None:
    searched = search(cable, faults=3)
    assert not searched.way, "\n".join(searched.way)


def test_nor_of_three_whatever_their_cables() -> None:
    states = 0
    for cable in cables(3):
        searched = search(cable, faults=2)
        assert not searched.way, (cable, *searched.way)
        assert searched.fenced >= FENCED.get(cable, 0), cable
        states += searched.states
    assert states == 203_773  # a model that lost some of its behaviour would be safe as well


@pytest.mark.parametrize("cable", [(0, 1), (1, 0)])
def test_two_that_lost_their_power_are_both_known_to_be_off(cable: tuple[int, ...]) -> None:
    assert search(cable, faults=2).fenced == 2


MUTANTS = {
    "silence speaks": ((0, 0), 2),
    "members with evidence count": ((0, 0), 2),
    "renewals are of the same boot": ((0, 0), 2),
    "readings are of the same boot": ((1, 0), 3),
    "of those, too, all are off": ((1, 2, 0), 2),
    "an address counts once": ((0, 0), 2),
    "others have renewed before it counts for others": ((1, 2, 0), 2),
    "it was read as on before": ((2, 1), 1),
    "a word counts if its BMC was read as on since": ((1, 2), 3),
    "the lease is read by the commit": ((0, 1), 2),
}
"""What is left out; with which cables, and after how many faults, a boot that is alive is taken for dead."""


@pytest.mark.parametrize("rule", MUTANTS)
def test_each_rule_is_needed(rule: str) -> None:
    cable, faults = MUTANTS[rule]
    assert search(cable, faults=faults, without=rule).way
