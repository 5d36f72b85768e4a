"""What peers say to each other: only members are believed, and only of themselves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import Invalid
from tests.waiting import wait_until
from workers.heart import Question, Says
from workers.peers import Answered, PeerSocket, format_address, pack, parse_address, unpack

KEY = "secret"


def test_a_question_and_its_answer() -> None:
    assert unpack(KEY, "p", pack(KEY, "v", "p", "n-1", None)) == Question("v", "n-1")
    for says in Says:
        assert unpack(KEY, "v", pack(KEY, "p", "v", "n-1", says)) == Answered("p", "n-1", says)


@pytest.mark.parametrize("key", ["other", "", "secret "])
def test_without_the_key_it_is_nothing(key: str) -> None:
    assert unpack(KEY, "p", pack(key, "v", "p", "n-1", None)) is None


def test_one_that_has_no_key_yet_believes_nobody() -> None:
    assert unpack("", "p", pack("", "v", "p", "n-1", None)) is None


def test_what_was_said_to_another_is_nothing() -> None:
    """An answer sent back to its speaker, or to a third, is none."""
    answer = pack(KEY, "p", "v", "n-1", Says.NONE)
    assert unpack(KEY, "p", answer) is None
    assert unpack(KEY, "q", answer) is None


@given(st.binary(max_size=200))
def test_garbage_is_nothing(data: bytes) -> None:
    assert unpack(KEY, "p", data) is None


@given(place=st.integers(0, 60), bit=st.integers(0, 7))
def test_a_changed_bit_makes_it_nothing(place: int, bit: int) -> None:
    data = bytearray(pack(KEY, "p", "v", "n-1", Says.REFUSED))
    data[place % len(data)] ^= 1 << bit
    assert unpack(KEY, "v", bytes(data)) is None


@pytest.mark.parametrize("text", ["192.0.2.11:7949", "[2001:db8::1]:7949", "127.0.0.1:0"])
def test_addresses(text: str) -> None:
    assert format_address(*parse_address(text)) == text


@pytest.mark.parametrize("text", ["", "h1:7949", "192.0.2.11", "192.0.2.11:", "192.0.2.11:70000", ":7949", "1.2.3:1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(Invalid, match="VMHERD_PEER_ADDRESS"):
        parse_address(text)


def test_sockets() -> None:
    v, p = PeerSocket("v", "127.0.0.1", 0), PeerSocket("p", "127.0.0.1", 0)
    try:
        v.ask(KEY, "p", p.address, "n-1")
        (question,) = wait_until(lambda: p.received(KEY), 10, "a question")
        assert question == Question("v", "n-1")
        p.answer(KEY, Question("v", "n-1"), Says.NONE)
        assert wait_until(lambda: v.received(KEY), 10, "an answer") == [Answered("p", "n-1", Says.NONE)]
        p.answer(KEY, Question("stranger", "n-1"), Says.NONE)  # who never asked has no address: nothing happens
        v.ask(KEY, "p", "no address", "n-2")
    finally:
        v.close()
        p.close()
