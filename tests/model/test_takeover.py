from pathlib import Path

import pytest

from tests.model.running import compile_model, search
from tests.requirements import need_program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_model(need_program("g++", "g++"), tmp_path_factory.mktemp("model"))


SAFE = {
    # What TAKEOVER.md's table has, state for state: another program, by another hand, of the same rules.
    "N=3 T=3 W=1 S=1 M=2 A=4": 6_831_828,
    "simple-peers N=2 T=3 W=1 S=1 M=2 A=4": 81_918,
    "simple-peers N=3 T=3 W=1 S=1 M=2 A=4": 486_093,
    "simple-peers N=4 T=3 W=1 S=1 M=2 A=4": 2_243_304,
    # Its bounds: M > W + L + D, A > S + 2W + L + D.
    "simple-peers N=3 T=3 W=1 S=1 M=3 A=5 D=1": 1_248_920,
    "simple-peers N=3 T=4 W=2 S=1 L=1 M=4 A=7": 1_304_973,
    # Redis fails over once; the old master may go on for as long as Q.
    "simple-peers T=2 failover": 1_386_543,
    "simple-peers T=2 split Q=1": 621_521,
    "simple-peers split Q=2": 1_328_113,
    # Without polls a vote is not needed (rule 11): T + M is enough.
    "no-polls simple-peers T=4 W=2 M=3 A=0": 2_844,
    "no-polls simple-peers T=4 W=2 L=1 M=4 A=0": 4_068,
    "no-polls simple-peers T=4 W=2 L=1 D=1 M=5 A=0": 9_732,
    # v turns failsafe on and off while it runs, and Redis refuses renewals that are older than what it has.
    "simple-peers switching": 577_094,
}


@pytest.mark.parametrize("words", SAFE)
def test_the_rules_are_safe(program: Path, words: str) -> None:
    result = search(program, words)
    assert result.safe, result.way
    assert result.states == SAFE[words]  # a model that lost some of its behaviour would be safe as well


MUTANTS = {
    # TAKEOVER.md, "What went wrong without them", by its numbers.
    "1: freshness is no witness": "evidence=fresh",
    "1: nor with a margin": "evidence=fresh M=6",
    "1: nor when renewed after v's lease expired": "evidence=after M=4",
    "1: nor when it has lasted": "T=2 evidence=lasting M=4 A=8",
    "2: a check before a feed costs W": "no-polls T=4 W=2 M=2 A=0",
    "2: with L": "no-polls T=4 W=2 L=1 M=3 A=0",
    "2: with drift": "no-polls T=4 W=2 L=1 D=1 M=4 A=0",
    "3: opening the device feeds": "open-feeds-at-start",
    "4: a restarted peer forgets": "peer-forgets",
    "5: an OK counted from its arrival": "ok-counted-from-answer",
    "5: an OK before its record": "T=2 ok-before-applied",
    "6: a poll counted from its end": "poll-counted-from-end",
    "7: a wall clock": "clock-steps",
    "8: no grace after a failover": "failover grace-forgotten",
    "8: acknowledgements survive it": "T=2 failover acks-survive",
    "8: suspicion ids are used again": "ids-reused",
    "8: an old master, without grace": "split Q=1 grace-forgotten",
    "8: an old master for ever": "T=2 split Q=1 old-master-for-ever",
    "10: half is enough, of two": "N=2 half-is-enough",
    "10: half is enough, of four": "N=4 half-is-enough",
    "10: the victim votes": "victim-votes",
    # The bounds of rule 8 are tight.
    "M = W + L": "M=1",
    "M = W + L + D": "M=2 A=5 D=1",
    "A = S + 2W + L": "A=3",
    "A = S + 2W + L, L > 0": "T=4 W=2 L=1 M=4 A=6",
    "A = S + 2W + L + D": "M=3 A=4 D=1",
    "a peer supports a suspect": "peer-supports-suspect",
    # Of what the rules say of switching failsafe, and of order.
    "failsafe is used before it is recorded": "switching on-before-ok",
    "a late renewal replaces a newer one": "T=2 switching renewals-unordered",
    "a former life's renewal replaces a newer one": "switching generations-unordered",
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_rule_is_needed(program: Path, mutant: str) -> None:
    result = search(program, f"simple-peers {MUTANTS[mutant]}")
    assert not result.safe, f"nothing goes wrong without it, in {result.states} states"
    assert result.way.strip().endswith("control takes v over, and v still runs")


def test_a_misspelt_switch_is_no_safe_model(program: Path) -> None:
    with pytest.raises(Exception, match="returned non-zero exit status 2"):
        search(program, "simple-peers peer-forgot")
