"""Stand-ins for the rooms behind the front ends, and a small model to serve."""

import asyncio
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import tokenizers
from prometheus_client import CollectorRegistry
from tokenizers import models, pre_tokenizers

from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.apis.http_server import HttpServer
from rempart_platform.apis.openai import build_app
from rempart_platform.apis.services import ApiServices
from rempart_platform.chat.chatml import ChatML
from rempart_platform.chat.testing import TagChat
from rempart_platform.dispatcher import DispatchConfig, Dispatcher, RequestAudit
from rempart_platform.endpoints.pool import EnginePool
from rempart_platform.endpoints.session import SessionConfig
from rempart_platform.endpoints.static import StaticSource
from rempart_platform.endpoints.testing import FakeEngine, Faults, fake_model_info
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import (
    Caller,
    Delta,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    TextLogprob,
    Usage,
)
from rempart_platform.metrics import RouterMetrics
from rempart_platform.models import ModelCatalog, ServedModel
from rempart_platform.request_limits import RequestLimits
from rempart_platform.testing import RecordingLedger
from rempart_platform.text.byte_level import BYTE_OF
from rempart_platform.text.tokenizer import Tokenizer
from rempart_protos.v1 import engine_pb2

KEY = "rk_test"
CALLER = Caller(tenant="tenant-a", key_id="key-1")
OTHER_KEY = "rk_other"
OTHER_CALLER = Caller(tenant="tenant-b", key_id="key-2")
MODEL = "tiny"
RATE_HEADERS = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "59"}
EOS_ID = 257
_SPECIAL = {"<|im_start|>": 256, "<|im_end|>": EOS_ID}


def byte_tokenizer() -> Tokenizer:
    """One token per byte, id = byte; after them ChatML's two special tokens."""
    vocab = {character: byte for character, byte in BYTE_OF.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    token_bytes = [bytes([byte]) for byte in range(256)] + [name.encode() for name in _SPECIAL]
    return Tokenizer(backend, token_bytes, _SPECIAL, eos_token_ids=(EOS_ID,))


def tiny_model(name: str = MODEL, *, max_model_len: int = 512, has_chat: bool = True) -> ServedModel:
    """A model of 258 token ids, without a default system message."""
    tokenizer = byte_tokenizer()
    return ServedModel(
        name=name,
        tokenizer=tokenizer,
        chat_format=ChatML(tokenizer, None) if has_chat else None,
        max_model_len=max_model_len,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=(EOS_ID,),
        created_s=1_700_000_000,
    )


def tag_model(*, is_thinking: bool = False) -> ServedModel:
    """The same model with a chat format that knows reasoning and tools."""
    model = tiny_model(max_model_len=4096)
    return replace(model, chat_format=TagChat(model.tokenizer, is_thinking=is_thinking))


class FakeAuthenticator:
    """Knows two keys, of two tenants."""

    async def authenticate(self, bearer: str) -> Caller:
        callers = {KEY: CALLER, OTHER_KEY: OTHER_CALLER}
        if bearer not in callers:
            raise RempartError(ErrorKind.INVALID_API_KEY, "The API key is not valid.")
        return callers[bearer]


@dataclass(slots=True)
class FakeGeneration:
    headers: Mapping[str, str]
    _events: AsyncGenerator[GenerationEvent, None]

    def events(self) -> AsyncIterator[GenerationEvent]:
        return self._events


@dataclass(slots=True)
class FakeDispatcher:
    """Says `texts[choice]` (or the last of `texts`) `delta_chars` characters per delta, as told.

    `refusal` is raised on admission, `failure` before delta number `fail_at`; before delta `pause_at` it waits for
    `resume`. `started` and `ended` tell tests where it is; `requests` keeps what was asked.
    """

    texts: Sequence[str] = ("Hello",)
    reason: FinishReason = FinishReason.STOP
    refusal: RempartError | None = None
    failure: RempartError | None = None
    fail_at: int = 0
    pause_at: int | None = None
    num_repeats: int = 1
    delta_chars: int = 1
    requests: list[GenerationRequest] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    resume: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    num_delivered: int = 0

    @asynccontextmanager
    async def admit(self, request: GenerationRequest) -> AsyncIterator[FakeGeneration]:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        events = self._events(request)
        self.started.set()
        try:
            yield FakeGeneration(RATE_HEADERS, events)
        finally:
            await events.aclose()
            self.ended.set()

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        position = 0
        for choice in range(request.num_choices):
            text = self.texts[min(choice, len(self.texts) - 1)] * self.num_repeats
            for start in range(0, len(text), self.delta_chars):
                await self._obey(position)
                yield _delta(choice, text[start : start + self.delta_chars], request)
                self.num_delivered += 1
                position += 1
            await self._obey(position)
            yield Finished(choice, self.reason)
        yield Usage(len(request.prompt_token_ids), self.num_delivered, cached_tokens=2)

    async def _obey(self, position: int) -> None:
        await asyncio.sleep(0)  # as a real one, it lets others run between its events
        if self.failure is not None and position == self.fail_at:
            raise self.failure
        if position == self.pause_at:
            await self.resume.wait()


def _delta(choice: int, text: str, request: GenerationRequest) -> Delta:
    data = text.encode()
    if not request.sampling.HasField("logprobs"):
        return Delta(choice, text, (data[0],))
    top = tuple(TextLogprob(chr(97 + i), bytes([97 + i]), -1.0 - i) for i in range(request.sampling.logprobs))
    return Delta(choice, text, (data[0],), (TextLogprob(text, data, -0.5, top),))


def fake_services(
    dispatcher: FakeDispatcher,
    *served: ServedModel,
    limits: RequestLimits | None = None,
    http: HttpLimits | None = None,
    is_ready: bool = True,
) -> ApiServices:
    """Services with fakes; serves `tiny_model()` when no model is given."""
    return ApiServices(
        authenticator=FakeAuthenticator(),
        catalog=ModelCatalog(served or (tiny_model(),)),
        dispatcher=dispatcher,
        limits=limits or RequestLimits(),
        http=http or HttpLimits(),
        clock=lambda: 1_700_000_000.0,
        is_ready=lambda: is_ready,
    )


@dataclass(frozen=True, slots=True)
class EngineRig:
    """A real dispatcher over a fake engine, and what it charged."""

    services: ApiServices
    engine: FakeEngine
    ledger: RecordingLedger


@asynccontextmanager
async def engine_rig(
    write: Callable[[str, int], str],
    model: ServedModel | None = None,
    *,
    faults: Faults | None = None,
    audit: RequestAudit | None = None,
) -> AsyncIterator[EngineRig]:
    """Services whose model answers what `write(prompt, choice)` says, a byte a token, and then ends."""
    model = model or tag_model()
    written: dict[tuple[str, int], list[int]] = {}

    def token(request: engine_pb2.GenerateRequest, choice: int, index: int) -> int:
        key = (request.request_id, choice)
        if key not in written:
            prompt = model.tokenizer.decode(request.prompt_token_ids)
            written[key] = [*write(prompt, choice).encode(), EOS_ID]
        return written[key][index]

    info = fake_model_info(
        model.name, vocab_size=model.vocab_size, max_model_len=model.max_model_len, eos_token_ids=model.eos_token_ids
    )
    async with FakeEngine(info, token=token, faults=faults or Faults()) as engine:
        ready = asyncio.Event()
        pool = EnginePool(StaticSource([engine.address]), SessionConfig(), random.Random(1), lambda _: ready.set())
        running = asyncio.create_task(pool.run())
        try:
            await ready.wait()
            ledger, catalog = RecordingLedger(), ModelCatalog([model])
            dispatcher = Dispatcher(
                ledger=ledger,
                pool=pool,
                catalog=catalog,
                config=DispatchConfig(cache_secret=b"secret"),
                metrics=RouterMetrics(CollectorRegistry()),
                audit=audit,
            )
            services = ApiServices(authenticator=FakeAuthenticator(), catalog=catalog, dispatcher=dispatcher)
            yield EngineRig(services, engine, ledger)
        finally:
            running.cancel()
            await asyncio.wait([running])


@asynccontextmanager
async def serve_http(services: ApiServices) -> AsyncIterator[str]:
    """The OpenAI API of these services on a free port of 127.0.0.1; its URL."""
    server = HttpServer(build_app(services), services.http, drain_timeout_s=1)
    listener = socket.create_server(("127.0.0.1", 0))
    # Not in a task group: a failing test is to stop the server, not to cancel it.
    serving = asyncio.create_task(server.serve([listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
