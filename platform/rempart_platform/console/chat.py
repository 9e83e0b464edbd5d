"""`rempart chat`: a conversation in the terminal, streamed over gRPC.

On a terminal, Ctrl-C ends the answer that is coming and Ctrl-D the conversation; from a pipe, every line is a question.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO, TypeAlias

import grpc

from rempart_platform.console.rpc_failure import describe, failed_call
from rempart_protos.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

_Write: TypeAlias = Callable[[str], None]
_TIMEOUT_S = 10.0
_HELP = "Ctrl-C ends an answer; /clear starts anew; /exit or Ctrl-D leaves."
_PROMPT = "> "
_HARMLESS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""What is written of control characters, which would move a cursor, or fill a clipboard."""


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """What to talk to, and how."""

    address: str
    key: str = field(repr=False)
    model: str | None = None
    """None takes the first that the router names."""
    temperature: float | None = None
    max_tokens: int | None = None


class Conversation:
    """Messages so far, and the call that continues them."""

    def __init__(self, stub: inference_pb2_grpc.InferenceStub, settings: ChatSettings, model: str) -> None:
        self._stub = stub
        self._metadata = _metadata(settings)
        self._model = model
        self._messages: list[inference_pb2.ChatMessage] = []
        sampling = sampling_pb2.SamplingParams(temperature=settings.temperature, max_tokens=settings.max_tokens)
        self._options = inference_pb2.GenerationOptions(sampling=sampling)

    def clear(self) -> None:
        self._messages.clear()

    def ask(self, question: str, show: _Write, show_reasoning: _Write) -> None:
        """Streams the answer. KeyboardInterrupt ends it early; what was said of it stays in the conversation.

        Raises:
            grpc.RpcError: there is no answer; the conversation is as it was.
        """
        turn = inference_pb2.ChatMessage(role="user", content=question)
        request = inference_pb2.ChatRequest(model=self._model, messages=[*self._messages, turn], options=self._options)
        call = self._stub.Chat(request, metadata=self._metadata)
        said: list[str] = []
        thought: list[str] = []
        try:
            for event in call:
                if event.delta.reasoning:
                    thought.append(event.delta.reasoning)
                    show_reasoning(event.delta.reasoning)
                if event.delta.text:
                    if thought and not said:
                        show_reasoning("\n")
                    said.append(event.delta.text)
                    show(event.delta.text)
        except KeyboardInterrupt:
            pass
        finally:
            call.cancel()
        answer = inference_pb2.ChatMessage(role="assistant", content="".join(said), reasoning="".join(thought))
        self._messages += [turn, answer]


def chat(settings: ChatSettings, questions: TextIO, answers: TextIO, errors: TextIO) -> int:
    """Talks until there are no more questions; the exit code, 1 when one was not answered.

    Args:
        questions: one a line.
        answers: gets what the model says.
        errors: gets everything else, what the model thinks before it answers too.
    """
    show, tell = _writer(answers), _writer(errors)
    with grpc.insecure_channel(settings.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        try:
            model = settings.model or _first_model(stub, settings)
        except grpc.RpcError as error:
            tell(describe(failed_call(error), settings.address) + "\n")
            return 1
        if model is None:
            tell(f"the router at {settings.address} serves no model\n")
            return 1
        return _talk(Conversation(stub, settings, model), settings.address, questions, show, tell)


def _talk(conversation: Conversation, address: str, questions: TextIO, show: _Write, tell: _Write) -> int:
    exit_code = 0
    is_terminal = questions.isatty()
    if is_terminal:
        tell(_HELP + "\n")
    while (question := _next_question(questions, is_terminal)) not in (None, "/exit"):
        if question == "/clear":
            conversation.clear()
        elif question:
            try:
                conversation.ask(question, show, tell)
                show("\n")
            except grpc.RpcError as error:
                tell(describe(failed_call(error), address) + "\n")
                exit_code = 1
    return exit_code


def _next_question(questions: TextIO, is_terminal: bool) -> str | None:
    """None at the end; an empty one when Ctrl-C took it back."""
    try:
        if is_terminal:
            return input(_PROMPT).strip()
        line = questions.readline()
        return line.strip() if line else None
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not is_terminal:
            return None
        sys.stdout.write("\n")
        return ""


def _first_model(stub: inference_pb2_grpc.InferenceStub, settings: ChatSettings) -> str | None:
    request = inference_pb2.ListModelsRequest()
    models = stub.ListModels(request, metadata=_metadata(settings), timeout=_TIMEOUT_S).models
    return models[0].name if models else None


def _metadata(settings: ChatSettings) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {settings.key.strip()}"),)


def _writer(stream: TextIO) -> _Write:
    """Writes to it at once. A pipe gets what was said; a terminal would obey some of it."""
    is_terminal = stream.isatty()

    def write(text: str) -> None:
        stream.write(text.translate(_HARMLESS) if is_terminal else text)
        stream.flush()

    return write
