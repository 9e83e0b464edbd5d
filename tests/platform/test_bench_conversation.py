"""The router's bench must notice every way in which an answer can be wrong."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench/ is no installed package

from bench.conversation import (
    Conversation,
    WrongOutputError,
    check_engine_events,
    check_grpc_events,
    check_http_body,
    check_http_stream,
)

from rempart_protos.v1 import engine_pb2, inference_pb2

ASKED = Conversation(prompt_token_ids=(1, 2), seed=3, token_ids=(10, 11, 12), text="abc")


def grpc_events(token_ids: Sequence[int], text: str, num_charged: int) -> list[bytes]:
    deltas = [
        inference_pb2.Delta(token_ids=[token_id], text=part) for token_id, part in zip(token_ids, text, strict=True)
    ]
    events = [inference_pb2.GenerationEvent(admitted=inference_pb2.Admitted(request_id="1"))]
    events += [inference_pb2.GenerationEvent(delta=delta) for delta in deltas]
    events.append(inference_pb2.GenerationEvent(usage=inference_pb2.Usage(completion_tokens=num_charged)))
    return [event.SerializeToString() for event in events]


def http_stream(parts: Sequence[str], num_charged: int, end: bytes = b"data: [DONE]\n\n") -> bytes:
    chunks: list[dict[str, object]] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
    chunks += [{"choices": [{"delta": {"content": part}}]} for part in parts]
    chunks.append({"choices": [], "usage": {"completion_tokens": num_charged}})
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + end


def http_body(text: str, num_charged: int) -> bytes:
    content = {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": num_charged}}
    return json.dumps(content).encode()


def engine_events(token_ids: Sequence[int]) -> list[bytes]:
    return [engine_pb2.TokenEvent(token_ids=[token_id]).SerializeToString() for token_id in token_ids]


def test_right_answers_pass_and_their_pieces_are_counted() -> None:
    assert check_engine_events(engine_events([10, 11, 12]), ASKED) == 3
    assert check_grpc_events(grpc_events([10, 11, 12], "abc", 3), ASKED) == 3
    assert check_http_stream(http_stream(["ab", "c"], 3), ASKED) == 2
    assert check_http_body(http_body("abc", 3), ASKED) == 1


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(lambda: check_engine_events(engine_events([10, 12, 11]), ASKED), id="engine: order"),
        pytest.param(lambda: check_grpc_events(grpc_events([10, 11], "ab", 3), ASKED), id="gRPC: a token is lost"),
        pytest.param(lambda: check_grpc_events(grpc_events([10, 11, 12], "abd", 3), ASKED), id="gRPC: text"),
        pytest.param(lambda: check_grpc_events(grpc_events([10, 11, 12], "abc", 2), ASKED), id="gRPC: usage"),
        pytest.param(lambda: check_http_stream(http_stream(["b", "a", "c"], 3), ASKED), id="stream: order"),
        pytest.param(lambda: check_http_stream(http_stream(["abc"], 4), ASKED), id="stream: usage"),
        pytest.param(lambda: check_http_stream(http_stream(["abc"], 3, end=b""), ASKED), id="stream: no end"),
        pytest.param(lambda: check_http_body(http_body("ab", 3), ASKED), id="body: text"),
        pytest.param(lambda: check_http_body(http_body("abc", 2), ASKED), id="body: usage"),
    ],
)
def test_wrong_answers_are_refused(check: Callable[[], int]) -> None:
    with pytest.raises(WrongOutputError):
        check()
