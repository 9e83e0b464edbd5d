"""answer.py and request_output.py: every token once, in the delta that its text is in, however the output is cut."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rempart_platform.apis.testing import CALLER, EOS_ID, MODEL, tag_model, tiny_model
from rempart_platform.chat.message import Conversation, Message
from rempart_platform.generation import Delta, Finished, FinishReason, GenerationEvent, GenerationRequest, ToolCallDelta
from rempart_platform.models import ServedModel
from rempart_platform.request_output import RequestOutput
from rempart_protos.v1 import engine_pb2, sampling_pb2

THINKING = Conversation((Message("user", "hi"),), thinking=True)
PLAIN = Conversation((Message("user", "hi"),))
CALL = "⟨call f⟩{}⟨/call⟩"
PIECES = st.lists(st.sampled_from(["a", "é", "⟨", "⟩", "⟨/think⟩", "⟨call f⟩", "{}", "⟨/call⟩", "⟨/"]), max_size=12)


def request(conversation: Conversation | None = THINKING, n: int = 1, **changes: object) -> GenerationRequest:
    sampling = sampling_pb2.SamplingParams(n=n, max_tokens=500, seed=1, logprobs=0)
    base = GenerationRequest("r", CALLER, MODEL, (1,), sampling, conversation=conversation)
    return replace(base, **changes)  # type: ignore[arg-type] # the tests name fields of the dataclass


def token_event(
    token_ids: Sequence[int],
    reason: sampling_pb2.FinishReason = sampling_pb2.FINISH_REASON_UNSPECIFIED,
    choice: int = 0,
) -> engine_pb2.TokenEvent:
    logprobs = [sampling_pb2.TokenLogprob(logprob=-float(token_id)) for token_id in token_ids]
    return engine_pb2.TokenEvent(token_ids=token_ids, logprobs=logprobs, finish_reason=reason, choice=choice)


@dataclass(frozen=True)
class Said:
    """All that a choice's events bring, each kind of delta together with its tokens."""

    text: str
    reasoning: str
    calls: tuple[tuple[str, str, str], ...]
    text_ids: tuple[int, ...]
    reasoning_ids: tuple[int, ...]
    call_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    reason: FinishReason


def said(events: Sequence[GenerationEvent], choice: int = 0) -> Said:
    deltas = [event for event in events if isinstance(event, Delta) and event.choice == choice]
    (reason,) = (event.reason for event in events if isinstance(event, Finished) and event.choice == choice)
    for delta in deltas:
        assert sum(map(bool, (delta.text, delta.reasoning, delta.tool_calls))) <= 1
        assert [entry.logprob for entry in delta.logprobs] == [-float(token_id) for token_id in delta.token_ids]
    calls = [piece for delta in deltas for piece in delta.tool_calls]
    return Said(
        text="".join(delta.text for delta in deltas),
        reasoning="".join(delta.reasoning for delta in deltas),
        calls=tuple((start.id, start.name, arguments_of(calls, start.index)) for start in calls if start.id),
        text_ids=tuple(token_id for delta in deltas if delta.text for token_id in delta.token_ids),
        reasoning_ids=tuple(token_id for delta in deltas if delta.reasoning for token_id in delta.token_ids),
        call_ids=tuple(token_id for delta in deltas if delta.tool_calls for token_id in delta.token_ids),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        reason=reason,
    )


def arguments_of(pieces: Sequence[ToolCallDelta], index: int) -> str:
    return "".join(piece.arguments for piece in pieces if piece.index == index)


def run(
    asked: GenerationRequest,
    token_ids: Sequence[int],
    cuts: Sequence[int],
    reason: sampling_pb2.FinishReason = sampling_pb2.FINISH_REASON_STOP,
    model: ServedModel | None = None,
) -> Said:
    output = RequestOutput(asked, model or tag_model())
    events: list[GenerationEvent] = []
    bounds = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    for position, (start, end) in enumerate(pairwise(bounds)):
        is_last = position == len(bounds) - 2
        if not output.is_finished:
            events += output.push([token_event(token_ids[start:end], *([reason] if is_last else []))])
    return said(events)


def ids_of(text: str) -> list[int]:
    return [*text.encode(), EOS_ID]


@given(PIECES, st.booleans(), st.lists(st.integers(0, 60), max_size=8))
def test_how_an_answer_is_cut_changes_nothing_and_every_token_comes_once(
    pieces: list[str], is_thinking: bool, cuts: list[int]
) -> None:
    asked = request(THINKING if is_thinking else PLAIN)
    token_ids = ids_of("".join(pieces))

    whole = run(asked, token_ids, [])

    assert whole == run(asked, token_ids, cuts) == run(asked, token_ids, range(60))
    assert whole.token_ids == tuple(token_ids)


@given(PIECES, st.sampled_from(["a", "⟨", "é{", "think⟩", "never"]), st.lists(st.integers(0, 60), max_size=8))
def test_stop_strings_are_looked_for_in_what_the_model_writes(pieces: list[str], stop: str, cuts: list[int]) -> None:
    text = "".join(pieces)
    stopped = run(request(stop=(stop,)), ids_of(text), cuts)
    before, found, _ = text.partition(stop)
    if not found:
        assert stopped == run(request(), ids_of(text), [])
        return
    alone = run(request(), ids_of(before), [])
    assert (stopped.text, stopped.reasoning, stopped.calls) == (alone.text, alone.reasoning, alone.calls)
    assert stopped.reason is FinishReason.STOP
    assert stopped.token_ids == tuple((before + stop).encode())


def test_tokens_of_marks_come_with_what_follows_them() -> None:
    answer = run(request(), ids_of(f"Hé⟨/think⟩So {CALL}"), [])

    assert bytes(answer.reasoning_ids) == "Hé".encode()
    assert bytes(answer.text_ids) == "⟨/think⟩So ".encode()
    assert bytes(answer.call_ids) == b"\xe2\x9f\xa8call f\xe2\x9f\xa9{}"
    assert answer.calls == (("call_0", "f", "{}"),)


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        (CALL, sampling_pb2.FINISH_REASON_STOP, FinishReason.TOOL_CALLS),
        (CALL, sampling_pb2.FINISH_REASON_LENGTH, FinishReason.LENGTH),
        ("none", sampling_pb2.FINISH_REASON_STOP, FinishReason.STOP),
        ("⟨call", sampling_pb2.FINISH_REASON_STOP, FinishReason.STOP),
    ],
)
def test_the_reason_is_tool_calls_when_the_model_ended_and_had_called(
    text: str, reason: sampling_pb2.FinishReason, expected: FinishReason
) -> None:
    assert run(request(PLAIN), ids_of(text), [], reason).reason is expected


@given(st.lists(st.integers(0, 60), max_size=8))
def test_an_answer_of_one_call_ends_before_the_second(cuts: list[int]) -> None:
    answer = run(request(PLAIN, max_tool_calls=1), ids_of(f"x{CALL}{CALL}y"), cuts)

    assert answer.calls == (("call_0", "f", "{}"),)
    assert (answer.text, answer.reason) == ("x", FinishReason.TOOL_CALLS)
    assert bytes(answer.token_ids).decode() == f"x{CALL}⟨call f⟩"


def test_half_a_character_at_the_end_is_said_where_the_answer_stands() -> None:
    answer = run(request(), [*b"a\xe2\x9f"], [2])
    assert (answer.reasoning, answer.text, answer.token_ids) == ("a\ufffd", "", tuple(b"a\xe2\x9f"))


def test_choices_and_attempts_have_parsers_of_their_own() -> None:
    model, asked = tag_model(), request(n=2)
    for _ in range(2):
        output = RequestOutput(asked, model)
        events = output.push([token_event(b"a", choice=0), token_event("⟨/think⟩".encode(), choice=1)])
        stop = sampling_pb2.FINISH_REASON_STOP
        events += output.push([token_event(b"b", stop, choice=0), token_event(CALL.encode(), stop, choice=1)])
        first, second = said(events, 0), said(events, 1)
        assert (first.reasoning, first.text, first.calls, first.reason) == ("ab", "", (), FinishReason.STOP)
        assert (second.reasoning, second.calls) == ("", (("call_0", "f", "{}"),))
        assert second.reason is FinishReason.TOOL_CALLS


def test_without_a_parser_the_text_is_content_as_it_is() -> None:
    for asked, model in ((request(None), tag_model()), (request(PLAIN), tiny_model())):
        answer = run(asked, ids_of(CALL), [], model=model)
        assert (answer.text, answer.calls, answer.reason) == (CALL, (), FinishReason.STOP)
