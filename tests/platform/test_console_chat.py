"""What a model says, on a terminal and in a pipe."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from rempart_platform.console.chat import ChatSettings, chat
from rempart_protos.v1 import inference_pb2, inference_pb2_grpc

HOSTILE = "\x1b]52;c;cm0=\x07a\x9b2J\r\nb\tc\x7f ÿ 👩‍💻"


class Model(inference_pb2_grpc.InferenceServicer):
    """Thinks and says HOSTILE, a character at a time."""

    def Chat(  # noqa: N802 - as the proto has it
        self, request: inference_pb2.ChatRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerationEvent]:
        for delta in [*({"reasoning": each} for each in HOSTILE), *({"text": each} for each in HOSTILE)]:
            yield inference_pb2.GenerationEvent(delta=inference_pb2.Delta(**delta))  # type: ignore[arg-type] # by name


@pytest.fixture
def address() -> Iterator[str]:
    server: Any = grpc.server(ThreadPoolExecutor(1))
    inference_pb2_grpc.add_InferenceServicer_to_server(Model(), server)  # type: ignore[abstract] # no other call is made
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_obeys_nothing_that_a_model_says(address: str) -> None:
    answers, errors = Terminal(), Terminal()
    assert chat(ChatSettings(address, "key", "m"), io.StringIO("?\n"), answers, errors) == 0
    shown = "\\x1b]52;c;cm0=\\x07a\\x9b2J\\x0d\nb\tc\\x7f ÿ 👩‍💻\n"
    assert (answers.getvalue(), errors.getvalue()) == (shown, shown)


def test_a_pipe_gets_what_the_model_says(address: str) -> None:
    answers, errors = io.StringIO(newline=""), io.StringIO(newline="")
    assert chat(ChatSettings(address, "key", "m"), io.StringIO("?\n"), answers, errors) == 0
    assert (answers.getvalue(), errors.getvalue()) == (f"{HOSTILE}\n", f"{HOSTILE}\n")
