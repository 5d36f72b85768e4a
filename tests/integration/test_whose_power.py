"""Addresses of BMCs are wrong, and another host is lost as well: what `tests/model/power.py` found."""

from collections.abc import Iterator

import pytest

from orchestrator.errors import Refused
from orchestrator.fencing.agents import Answer, Power
from orchestrator.lease import Lease
from orchestrator.resources import NodeFencing
from orchestrator.resources.fencing import Bmc, FenceLevel, FencePhase
from orchestrator.services import fencing as services
from orchestrator.services.fencing import confirm, read_power, run_fencing
from orchestrator.services.fencing.state import lease_of
from orchestrator.services.nodes import set_unschedulable
from tests.fakes import Stage
from tests.fencing import FencingStage, a_bmc, until_fenced


@pytest.fixture
def stage(redis_url: str) -> Iterator[Stage]:
    stage = Stage(redis_url)
    stage.add_nodes("n1", "n2", "n3", "n4", "n5", "n6", "n7")
    yield stage
    stage.close()


@pytest.fixture
def herd(stage: Stage) -> FencingStage:
    """Its watchdogs are armed, and nobody acknowledges a suspicion: there is no other evidence than by BMCs."""
    herd = FencingStage(stage, armed=True)
    herd.holding = False
    return herd


def lease(herd: FencingStage, name: str) -> Lease:
    stored = lease_of(herd.ctx, name)
    assert stored is not None
    return stored.lease


def attempt(herd: FencingStage, name: str) -> NodeFencing:
    """Seek evidence about a node that is silent."""
    services.begin(herd.ctx, name, "it is lost", lease(herd, name))
    run_fencing(herd.ctx, herd.tools, name)
    return herd.fencing(name)


def lose_by_deadline(herd: FencingStage, name: str) -> None:
    """Lose a node, with its watchdog's deadline for evidence; after that nobody acknowledges a suspicion again."""
    herd.holding = True
    herd.lose(name)
    until_fenced(herd, name)
    evidence = herd.fencing(name).status.evidence
    assert evidence is not None
    assert evidence.level is FenceLevel.DEADLINE
    herd.holding = False


class Died(Exception):
    """A fencing worker's end."""


def test_a_bmc_counts_for_others_once_the_others_have_renewed(herd: FencingStage) -> None:
    """Addresses are one line off. n1 is cut off and lives, n2 is off. n2's worker cuts n3, unseen."""
    for name, cable in (("n1", "n2"), ("n2", "n3"), ("n3", "n4")):
        herd.configure(name, bmc=a_bmc(cable))
    read_power(herd.ctx, herd.tools, "n1")
    herd.beating.discard("n1")
    herd.lose("n2")
    herd.switches.power["n2"] = Power.OFF
    scan = herd.scan
    told: list[str] = []

    def sleeps(*_: float) -> None:
        scan()
        if told == ["n2"]:  # n1's worker has read its BMC, and seen that n3 is there
            told.append("n2's worker")
            herd.switches.on_cut = herd.lose
            with pytest.raises(Died):
                attempt(herd, "n2")
        elif "n3" in herd.switches.cut and "died" not in told:
            scan()
            told.append("died")
            raise Died

    def status(bmc: Bmc) -> Answer:
        told.append(bmc.options["ip"])
        return switches_status(bmc)

    switches_status, herd.switches.status = herd.switches.status, status  # type: ignore[method-assign]
    herd.scan = sleeps  # type: ignore[assignment, method-assign]
    assert not attempt(herd, "n1").status.phase.has_evidence
    assert herd.switches.cut == ["n3"]
    assert herd.fencing("n1").status.reason == "OthersLost"


def test_one_whose_agent_is_stopped_may_be_the_one_that_was_cut(herd: FencingStage) -> None:
    """n3 is cordoned and empty: somebody works on it. It has power, and what is on record for n1 is its BMC."""
    herd.configure("n1", bmc=a_bmc("n3"))
    set_unschedulable(herd.ctx, "n3", unschedulable=True)
    herd.beating.discard("n3")
    herd.scan(15)
    read_power(herd.ctx, herd.tools, "n1")
    herd.beating.discard("n1")
    assert attempt(herd, "n1").status.reason == "OthersLost"
    herd.beating.add("n3")
    herd.switches.power["n3"] = Power.OFF
    assert attempt(herd, "n1").status.phase.has_evidence  # n3 is there, so that power is not its own


def test_one_that_was_fenced_and_boots_may_be_the_one_that_was_cut(herd: FencingStage) -> None:
    herd.configure("n1", bmc=a_bmc("n3"))
    lose_by_deadline(herd, "n3")
    read_power(herd.ctx, herd.tools, "n1")
    herd.beating.discard("n1")
    assert attempt(herd, "n1").status.reason == "OthersLost"


def test_a_renewal_by_a_later_boot_says_nothing(herd: FencingStage) -> None:
    """n3 was cut for n1, and boots so fast that it is heard at once."""
    herd.configure("n1", bmc=a_bmc("n3"))
    herd.beating.discard("n1")
    renew = herd.renew

    def by_its_boot(name: str) -> Lease:
        return renew(name, boot_id="b-next", generation="g-next") if name in herd.switches.cut else renew(name)

    herd.renew = by_its_boot  # type: ignore[assignment, method-assign]
    assert not attempt(herd, "n1").status.phase.has_evidence


def test_two_with_one_address_are_not_counted_for_each_other(herd: FencingStage) -> None:
    for name, cable in (("n1", "n2"), ("n2", "n3"), ("n3", "n3")):
        herd.configure(name, bmc=a_bmc(cable))
        read_power(herd.ctx, herd.tools, name)
    herd.beating.discard("n1")
    for name in ("n2", "n3"):
        herd.lose(name)
        herd.switches.power[name] = Power.OFF
    for _ in range(3):
        for name in ("n2", "n3", "n1"):
            assert not attempt(herd, name).status.phase.has_evidence


@pytest.mark.parametrize("by", ["its BMC", "a person"])
def test_one_that_is_known_to_be_off_holds_nobody_up(herd: FencingStage, by: str) -> None:
    herd.configure("n1", bmc=a_bmc("n1"))
    herd.lose("n3")
    herd.scan(15)
    if by == "a person":
        confirm(herd.ctx, "n3", "alice")
    else:
        herd.configure("n3", bmc=a_bmc("n3"))
        assert attempt(herd, "n3").status.phase.has_evidence
    herd.settle()
    assert herd.fencing("n3").status.phase is FencePhase.RECOVERED
    read_power(herd.ctx, herd.tools, "n1")
    herd.lose("n1")
    assert attempt(herd, "n1").status.phase.has_evidence


@pytest.mark.parametrize("is_confirmed", [True, False])
def test_one_that_was_fenced_and_is_not_back_holds_others_up_until_a_person_says_it_is_off(
    herd: FencingStage, is_confirmed: bool
) -> None:
    herd.configure("n1", bmc=a_bmc("n1"))
    lose_by_deadline(herd, "n3")
    if is_confirmed:
        confirm(herd.ctx, "n3", "alice")
        assert "has passed" in herd.fencing("n3").status.message
        assert "alice confirmed" in herd.fencing("n3").status.message
        with pytest.raises(Refused, match="fenced already"):
            confirm(herd.ctx, "n3", "bob")
    read_power(herd.ctx, herd.tools, "n1")
    herd.lose("n1")
    status = attempt(herd, "n1").status
    assert status.phase.has_evidence == is_confirmed
    assert (status.reason == "OthersLost") != is_confirmed


def test_one_that_booted_since_it_was_fenced_is_not_confirmed(herd: FencingStage) -> None:
    lose_by_deadline(herd, "n3")
    herd.renew("n3", boot_id="b-next", generation="g-next")
    with pytest.raises(Refused, match="it has booted since it was fenced"):
        confirm(herd.ctx, "n3", "alice")


@pytest.mark.parametrize("cables", [("n1", "n2", "n3"), ("n2", "n3", "n1")])
def test_all_that_lost_their_power_are_known_to_be_off(herd: FencingStage, cables: tuple[str, ...]) -> None:
    names = ("n1", "n2", "n3")
    for name, cable in zip(names, cables, strict=True):
        herd.configure(name, bmc=a_bmc(cable))
        read_power(herd.ctx, herd.tools, name)
    for name in names:
        herd.lose(name)
        herd.switches.power[name] = Power.OFF
    for name in (*names, *names):
        if not herd.fencing(name).status.phase.has_evidence:
            attempt(herd, name)
    assert all(herd.fencing(name).status.phase.has_evidence for name in names)
