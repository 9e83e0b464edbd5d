"""text/stop_strings.py and text/assembler.py"""

import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rempart_platform.apis.testing import EOS_ID, byte_tokenizer
from rempart_platform.generation import TextLogprob
from rempart_platform.text.assembler import TextAssembler, TextIncrement
from rempart_platform.text.stop_strings import StopMatcher, StopStrings

TOKENIZER = byte_tokenizer()
STOPS = st.lists(st.text("abé😀", min_size=1, max_size=4), max_size=4)


def cut(text: str, stops: Sequence[str], *, include_stop: bool = False) -> str:
    """By definition: the stop string that is complete first, the longest of several, ends the text."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[:end] if include_stop else text[: end - max(map(len, complete))]
    return text


def parts_of(draw: st.DataObject, length: int) -> list[slice]:
    cuts = sorted(draw.draw(st.lists(st.integers(0, length), max_size=8)))
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


@given(st.text("abé😀", max_size=30), STOPS, st.booleans(), st.data())
def test_any_split_of_any_output_is_cut_exactly_at_the_stop_string(
    text: str, stops: list[str], include_stop: bool, draw: st.DataObject
) -> None:
    data = text.encode()
    assembler = TextAssembler(TOKENIZER, stops, include_stop)

    increments = [assembler.push(list(data[part])) for part in parts_of(draw, len(data))] + [assembler.finish()]

    assert "".join(increment.text for increment in increments) == cut(text, stops, include_stop=include_stop)
    assert assembler.num_delivered_tokens == sum(len(increment.token_ids) for increment in increments)
    delivered = [token_id for increment in increments for token_id in increment.token_ids]
    assert delivered == list(data[: len(delivered)])
    if not increments[-1].is_stopped:
        assert delivered == list(data)


@given(st.text("ab", max_size=20), STOPS)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    out = ""
    for position, character in enumerate(text):
        scan = matcher.push(character)
        out += scan.text
        if scan.stop is not None:
            return
        held = text[len(out) : position + 1]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@given(st.binary(max_size=20), st.data())
def test_tokens_are_delivered_with_the_last_character_of_their_text(data: bytes, draw: st.DataObject) -> None:
    assembler = TextAssembler(TOKENIZER, ["ab"])
    text, num_tokens = "", 0
    for part in parts_of(draw, len(data)):
        increment = assembler.push(list(data[part]))
        text, num_tokens = text + increment.text, num_tokens + len(increment.token_ids)
        if increment.is_stopped:
            return
        assert len(data[:num_tokens].decode(errors="replace")) <= len(text)


def test_a_stop_string_across_tokens_is_held_back_and_never_shown() -> None:
    assembler = TextAssembler(TOKENIZER, ["STOP"])

    assert assembler.push(list(b"go ST")) == TextIncrement("go ", tuple(b"go "), ends=(1, 2, 3))
    assert assembler.push(list(b"OP and more")) == TextIncrement("", tuple(b"STOP"), ends=(0,) * 4, is_stopped=True)
    assert assembler.push(list(b"x")) == TextIncrement(is_stopped=True)
    assert assembler.finish() == TextIncrement(is_stopped=True)
    assert assembler.num_delivered_tokens == len("go STOP")


def test_what_did_not_become_a_stop_string_is_given_out_at_the_end() -> None:
    assembler = TextAssembler(TOKENIZER, ["STOP"])

    assert not assembler.push(list(b"ST"))
    assert assembler.finish() == TextIncrement("ST", tuple(b"ST"), ends=(1, 2))


def test_end_tokens_have_no_text_and_count_as_delivered() -> None:
    assembler = TextAssembler(TOKENIZER, eos_token_ids=[EOS_ID])

    assert assembler.push([*b"hi", EOS_ID]) == TextIncrement("hi", (*b"hi", EOS_ID), ends=(1, 2, 2))


def test_logprobs_go_out_with_their_tokens() -> None:
    assembler = TextAssembler(TOKENIZER)
    logprobs = [TextLogprob("�", bytes([byte]), -1.0) for byte in "é".encode()]

    assert not assembler.push(list("é".encode()[:1]), logprobs[:1])
    assert assembler.push(list("é".encode()[1:]), logprobs[1:]).logprobs == tuple(logprobs)


def test_stop_strings_within_min_tokens_end_nothing() -> None:
    assembler = TextAssembler(TOKENIZER, ["a"], min_tokens=3)

    increment = assembler.push(list(b"aaaba"))
    assert increment == TextIncrement("aaab", tuple(b"aaaba"), ends=(1, 2, 3, 4, 4), is_stopped=True)


@given(st.text("abé😀", max_size=20), STOPS, st.booleans(), st.data())
def test_every_increment_says_which_text_each_of_its_tokens_brings(
    text: str, stops: list[str], include_stop: bool, draw: st.DataObject
) -> None:
    data = text.encode()
    assembler = TextAssembler(TOKENIZER, stops, include_stop)
    whole = TextIncrement()
    for part in parts_of(draw, len(data)):
        whole = whole.then(assembler.push(list(data[part])))
    whole = whole.then(assembler.finish())

    for position, end in enumerate(whole.ends, start=1):
        assert whole.text[:end] == data[:position].decode(errors="ignore")[: len(whole.text)]


@pytest.mark.parametrize("length", [20_000])
def test_the_worst_stop_strings_cost_linear_time(length: int) -> None:
    stops = ["a" * (256 - i) + "b" for i in range(16)]
    matcher = StopMatcher(StopStrings(stops))

    started = time.thread_time()  # of work, which a busy machine does not add to
    for _ in range(length // 4):
        matcher.push("aaaa")

    assert time.thread_time() - started < 2.0
