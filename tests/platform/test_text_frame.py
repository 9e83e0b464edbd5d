"""Chunks that are made once say what chunks made anew would."""

import json

import pytest

from rempart_platform.apis.openai_chat_render import ChatRenderer
from rempart_platform.apis.openai_completion_render import CompletionRenderer
from rempart_platform.apis.openai_objects import RenderContext
from rempart_platform.generation import Delta, TextLogprob

CONTEXT = RenderContext("r", 1, 'a "model"', "fp", "default", frozenset(), include_usage=True)
TEXTS = ["plain", 'a "quote" and a \\', "\0the text\0", "two\nlines\r\n\n", "é 漢字 😀", "data: [DONE]"]


def _chunks(data: bytes) -> list[dict[str, object]]:
    events = data.decode().split("\n\n")
    assert events[-1] == ""
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("renderer", [ChatRenderer, CompletionRenderer])
def test_a_text_alone_comes_in_the_chunk_that_it_has_beside_other_things(
    renderer: type[ChatRenderer] | type[CompletionRenderer], text: str
) -> None:
    framed, anew = renderer(CONTEXT), renderer(CONTEXT)
    alone = _chunks(framed.chunk(Delta(1, "first ")) + framed.chunk(Delta(1, text)))[-1]
    beside = Delta(1, text, (7,), (TextLogprob("t", b"t", -1.0),))
    whole = _chunks(anew.chunk(Delta(1, "first ")) + anew.chunk(beside))[-1]
    for chunk in (alone, whole):
        chunk["choices"][0].pop("logprobs")  # type: ignore[index]
    assert alone == whole


def test_choices_have_frames_of_their_own_and_offsets_go_on_behind_them() -> None:
    renderer = CompletionRenderer(CONTEXT)
    chunks = _chunks(renderer.chunk(Delta(0, "ab")) + renderer.chunk(Delta(1, "cde")))
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1]  # type: ignore[index]
    (chunk,) = _chunks(renderer.chunk(Delta(1, "t", (7,), (TextLogprob("t", b"t", -1.0),))))
    assert chunk["choices"][0]["logprobs"]["text_offset"] == [3]  # type: ignore[index]
