"""What the router's bench asks, and whether what came back is right: every token, in order, charged once. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rempart_platform.chat.message import Conversation as ChatConversation
from rempart_platform.chat.message import Message
from rempart_platform.endpoints.testing import hash_token
from rempart_platform.models import ServedModel
from rempart_protos.v1 import engine_pb2, inference_pb2, sampling_pb2

_TEXT = "Tell me in a few words how the walls of an old town were built, who paid for them, and what is left today."


class WrongOutputError(Exception):
    """The router lost, changed or reordered something, so its speed means nothing."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One chat with its only right answer: a fake engine's tokens are a function of prompt and seed."""

    prompt_token_ids: tuple[int, ...]
    seed: int
    token_ids: tuple[int, ...]
    text: str

    def engine_request(self, request_id: str) -> engine_pb2.GenerateRequest:
        """For the engine's own Generate."""
        return engine_pb2.GenerateRequest(
            request_id=request_id, prompt_token_ids=self.prompt_token_ids, sampling=self._sampling()
        )

    def chat_request(self, model: str) -> bytes:
        """A serialized ChatRequest."""
        options = inference_pb2.GenerationOptions(sampling=self._sampling())
        messages = [inference_pb2.ChatMessage(role="user", content=_TEXT)]
        return inference_pb2.ChatRequest(model=model, messages=messages, options=options).SerializeToString()

    def http_request(self, model: str, key: str, *, stream: bool) -> bytes:
        """A whole HTTP/1.1 request."""
        content = {
            "model": model,
            "messages": [{"role": "user", "content": _TEXT}],
            "seed": self.seed,
            "max_tokens": len(self.token_ids),
            **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
        }
        body = json.dumps(content).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def _sampling(self) -> sampling_pb2.SamplingParams:
        return sampling_pb2.SamplingParams(seed=self.seed, max_tokens=len(self.token_ids))


def conversations(model: ServedModel, num_output_tokens: int, number: int) -> list[Conversation]:
    """Chats that differ in all tokens of their answers, and whose first token alone is already some text."""
    if model.chat_format is None:
        raise WrongOutputError(f"{model.name} has no chat format that is known")
    prompt = model.chat_format.render(ChatConversation((Message("user", _TEXT),)))
    found: list[Conversation] = []
    seed = 0
    while len(found) < number:
        seed += 1
        request = engine_pb2.GenerateRequest(prompt_token_ids=prompt, sampling=sampling_pb2.SamplingParams(seed=seed))
        token_ids = tuple(hash_token(request, 0, index, model.vocab_size) for index in range(num_output_tokens))
        if _is_text(model, token_ids[0]):
            found.append(Conversation(tuple(prompt), seed, token_ids, model.tokenizer.decode(token_ids)))
    return found


def plain_conversations(model: ServedModel, num_output_tokens: int, number: int) -> list[Conversation]:
    """Chats whose answers are made of words, so that every token is a text of its own."""
    if model.chat_format is None:
        raise WrongOutputError(f"{model.name} has no chat format that is known")
    prompt = tuple(model.chat_format.render(ChatConversation((Message("user", _TEXT),))))
    words = [token_id for token_id in range(model.vocab_size) if _is_word(model.tokenizer.decode([token_id]))]
    found = []
    for seed in range(1, number + 1):
        token_ids = tuple(words[(seed * 7919 + index * 104729) % len(words)] for index in range(num_output_tokens))
        found.append(Conversation(prompt, seed, token_ids, model.tokenizer.decode(token_ids)))
    return found


def _is_word(text: str) -> bool:
    return len(text) > 1 and text.isascii() and text.strip().isalpha()


def _is_text(model: ServedModel, token_id: int) -> bool:
    text = model.tokenizer.decode([token_id])
    return bool(text) and "\ufffd" not in text


def check_engine_events(events: Sequence[bytes], asked: Conversation) -> int:
    """The engine's own stream; returns the number of events that brought tokens."""
    parsed = [engine_pb2.TokenEvent.FromString(event) for event in events]
    _require([token_id for event in parsed for token_id in event.token_ids] == list(asked.token_ids), "token ids")
    return sum(bool(event.token_ids) for event in parsed)


def check_grpc_events(events: Sequence[bytes], asked: Conversation) -> int:
    """A Chat stream; returns the number of deltas."""
    parsed = [inference_pb2.GenerationEvent.FromString(event) for event in events]
    deltas = [event.delta for event in parsed if event.WhichOneof("event") == "delta"]
    _require([token_id for delta in deltas for token_id in delta.token_ids] == list(asked.token_ids), "token ids")
    _require("".join(delta.text for delta in deltas) == asked.text, "text")
    _require(parsed[-1].usage.completion_tokens == len(asked.token_ids), "usage")
    return len(deltas)


def check_http_stream(body: bytes, asked: Conversation) -> int:
    """Server-sent events; returns the number of those that brought text."""
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n")]
    _require(events[-2:] == [b"[DONE]", b""], "end of the stream")
    texts = texts_of_events(b"".join(b"data: " + event + b"\n\n" for event in events[:-2]))
    _require("".join(texts) == asked.text, "text")
    _require(json.loads(events[-3])["usage"]["completion_tokens"] == len(asked.token_ids), "usage")
    return len(texts)


def texts_of_events(body: bytes) -> list[str]:
    """The texts of whole events that bring some. Comments and the end of the stream bring none."""
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event.startswith(b"data: {")]
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    return [delta["content"] for delta in deltas if delta.get("content")]


def check_http_body(body: bytes, asked: Conversation) -> int:
    """A whole answer, which counts as one piece."""
    content = json.loads(body)
    _require(content["choices"][0]["message"]["content"] == asked.text, "text")
    _require(content["usage"]["completion_tokens"] == len(asked.token_ids), "usage")
    return 1


def _require(is_right: bool, what: str) -> None:
    if not is_right:
        raise WrongOutputError(f"an answer came back with a wrong {what}")
