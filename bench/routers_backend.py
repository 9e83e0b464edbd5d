"""A fake backend for routers, which answers alike over our Session protocol and over OpenAI's HTTP API.

    python -m bench.routers_backend ANSWERS.json --step-ms 1

Both work in steps that bring each running request one token, and both choose the answer by the request's seed, so every
router is given the same tokens at the same pace. The HTTP side is as lean as it can be: what a token is sent as was
made before the first request came.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import uvloop

from rempart_platform.endpoints.testing import FakeEngine, fake_model_info
from rempart_protos.v1 import engine_pb2

MODEL = "model"
_END_OF_CHUNKS = b"0\r\n\r\n"
_MAX_UNSENT_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """What a seed is answered with: a text for each token."""

    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    num_prompt_tokens: int

    def usage(self, num_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": self.num_prompt_tokens + num_tokens,
        }


@dataclass(frozen=True, slots=True)
class _Response:
    """A whole HTTP response, in what is sent at once: nothing before the last step of an answer that is no stream."""

    parts: tuple[bytes, ...]


def _stream_response(answer: Answer, num_tokens: int) -> _Response:
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    parts = [_event(_choice({"content": piece})) for piece in answer.pieces[:num_tokens]]
    parts[0] = head + _event(_choice({"role": "assistant", "content": ""})) + parts[0]
    usage = _event({"choices": [], "usage": answer.usage(num_tokens)})
    parts[-1] += _event(_choice({}, "length")) + usage + _chunk(b"data: [DONE]\n\n") + _END_OF_CHUNKS
    return _Response(tuple(parts))


def _whole_response(answer: Answer, num_tokens: int) -> _Response:
    message = {"role": "assistant", "content": "".join(answer.pieces[:num_tokens])}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    body = _named("chat.completion", {"choices": [choice], "usage": answer.usage(num_tokens)})
    return _Response((b"",) * (num_tokens - 1) + (_json_response(body),))


def _choice(delta: Mapping[str, str], finish_reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]}


def _named(kind: str, content: Mapping[str, object]) -> bytes:
    named = {"id": "chatcmpl-bench", "object": kind, "created": 1, "model": MODEL, **content}
    return json.dumps(named, separators=(",", ":")).encode()


def _event(content: Mapping[str, object]) -> bytes:
    return _chunk(b"data: " + _named("chat.completion.chunk", content) + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _json_response(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


@dataclass(slots=True, eq=False)
class _Running:
    """A response on its way."""

    transport: asyncio.WriteTransport
    parts: Sequence[bytes]
    num_sent: int = 0

    def advance(self) -> bool:
        """Sends the next part, unless the client is slow. Returns whether there is more."""
        if self.transport.is_closing():
            return False
        if self.transport.get_write_buffer_size() < _MAX_UNSENT_BYTES:
            self.transport.write(self.parts[self.num_sent])
            self.num_sent += 1
        return self.num_sent < len(self.parts)


class HttpBackend:
    """Every answer's steps.

    Args:
        answers: by seed.
        step_s: pause between steps.
    """

    def __init__(self, answers: Mapping[int, Answer], step_s: float) -> None:
        self._answers = answers
        self._step_s = step_s
        self._responses: dict[tuple[int, int, bool], _Response] = {}
        self._running: list[_Running] = []
        self._has_running = asyncio.Event()

    def start(self, body: bytes, transport: asyncio.WriteTransport) -> None:
        """Begins the answer to a chat."""
        asked = json.loads(body)
        key = (int(asked["seed"]), int(asked["max_tokens"]), bool(asked.get("stream")))
        if key not in self._responses:
            seed, num_tokens, is_stream = key
            make = _stream_response if is_stream else _whole_response
            self._responses[key] = make(self._answers[seed], num_tokens)
        self._running.append(_Running(transport, self._responses[key].parts))
        self._has_running.set()

    async def run(self) -> None:
        """Steps until cancelled; a request that finds nothing running waits for no step."""
        while True:
            await self._has_running.wait()
            self._running = [running for running in self._running if running.advance()]
            if not self._running:
                self._has_running.clear()
            await asyncio.sleep(self._step_s)


class _HttpConnection(asyncio.Protocol):
    """One request after another; knows only what routers send: bodies with a length."""

    def __init__(self, backend: HttpBackend) -> None:
        self._backend = backend
        self._data = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's own class, under no class of asyncio

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, separator, rest = self._data.partition(b"\r\n\r\n")
        _, _, length_and_more = head.lower().partition(b"content-length:")
        length = int(length_and_more.partition(b"\r\n")[0] or 0)
        if not separator or len(rest) < length:
            return
        self._data = rest[length:]
        assert self._transport is not None, "connected"
        if head.startswith(b"POST /v1/chat/completions "):
            self._backend.start(rest[:length], self._transport)
        elif head.startswith(b"GET /v1/models "):
            models = {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "bench"}]}
            self._transport.write(_json_response(json.dumps(models).encode()))
        else:
            self._transport.write(_json_response(b'{"status":"ok"}'))


def write_answers(path: Path, answers: Mapping[int, Answer]) -> None:
    """For the process that answers."""
    path.write_text(
        json.dumps(
            {seed: [answer.token_ids, answer.pieces, answer.num_prompt_tokens] for seed, answer in answers.items()}
        )
    )


def _read_answers(path: Path) -> dict[int, Answer]:
    return {
        int(seed): Answer(tuple(token_ids), tuple(pieces), num_prompt_tokens)
        for seed, (token_ids, pieces, num_prompt_tokens) in json.loads(path.read_text()).items()
    }


async def _serve(args: argparse.Namespace) -> None:
    answers = _read_answers(args.answers)

    def token(request: engine_pb2.GenerateRequest, choice: int, index: int) -> int:
        return answers[request.sampling.seed].token_ids[index]

    engine = FakeEngine(
        fake_model_info(MODEL, vocab_size=args.vocab_size, num_blocks=4096), step_s=args.step_ms / 1000, token=token
    )
    backend = HttpBackend(answers, args.step_ms / 1000)
    address = await engine.start()
    server = await asyncio.get_running_loop().create_server(lambda: _HttpConnection(backend), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    sys.stdout.write(json.dumps({"ready": True, "address": address, "port": port}) + "\n")
    sys.stdout.flush()
    await backend.run()


def main() -> None:
    """Serves until killed."""
    parser = argparse.ArgumentParser(description="A fake backend, over two protocols.")
    parser.add_argument("answers", type=Path)
    parser.add_argument("--step-ms", type=float, default=1.0)
    parser.add_argument("--vocab-size", type=int, required=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
