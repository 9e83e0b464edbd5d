"""The values that travel between the front ends and the dispatcher.

    bytes ─► inference_pb2 message ─► validation ─► GenerationRequest ─► Dispatcher ─► events ─► bytes

Both front ends speak through `rempart.v1` messages, so there is one validator and one dispatcher for all of them.
"""

from dataclasses import dataclass, field
from enum import Enum, IntEnum

import msgspec

from rempart_platform.chat.message import Conversation
from rempart_protos.v1 import sampling_pb2


class FinishReason(Enum):
    """Why a choice ended; the values are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    """The model ended its output, as with STOP, and had called tools in it."""


class ServiceTier(IntEnum):
    """Classes of requests, in the order in which they are served; the names are OpenAI's."""

    PRIORITY = 1
    DEFAULT = 2
    FLEX = 3
    BATCH = 4


@dataclass(frozen=True, slots=True)
class Standing:
    """How a tenant stands beside the others."""

    weight: float = 1.0
    """Its share of the engines, in relation to others that wait."""
    max_tier: ServiceTier = ServiceTier.DEFAULT
    """The highest class that it may use; what asks for a higher one is served in this one."""
    cache_group: str = ""
    """Tenants of one group share their prefix cache; "" for none."""
    is_suspended: bool = False
    """Its requests are refused."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the tenant of a valid API key, and how it stood a moment ago."""

    tenant: str
    key_id: str
    standing: Standing = Standing()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A valid request. Behind this type nothing checks input again.

    `sampling` is complete in `max_tokens` (never unset, and prompt + max_tokens fits the model) and `seed`.
    """

    request_id: str
    """Minted here, 128 random bits; never the client's."""
    caller: Caller
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: sampling_pb2.SamplingParams
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    prompt_cache_key: str = ""
    user: str = ""
    client_request_id: str = ""
    """What the client calls the request: a label for logs, which nothing goes by."""
    created_s: int = 0
    timeout_s: float | None = None
    conversation: Conversation | None = field(default=None, repr=False)
    """What the prompt was rendered from, which tells how to read the output; None for a prompt that was no chat."""
    service_tier: ServiceTier = ServiceTier.DEFAULT
    """The class that it is served in, which the caller may use."""
    max_tool_calls: int | None = None
    """A choice ends before it makes more calls than these."""
    is_whole: bool = False
    """Its answer is handed out when it is complete, so that nobody reads a token sooner."""
    comes_again: bool = False
    """It is a line of a batch, which is asked again when it may be, so it is not held for a first engine."""

    @property
    def num_choices(self) -> int:
        return self.sampling.n if self.sampling.HasField("n") else 1

    @property
    def worst_case_tokens(self) -> int:
        """What is reserved: the prompt once, and every choice to its end."""
        return len(self.prompt_token_ids) + self.num_choices * self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class TextLogprob:
    """A token's text, exact bytes and natural log-probability; `top` are the likeliest alternatives in order."""

    token: str
    token_bytes: bytes
    logprob: float
    top: tuple["TextLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The next piece of a tool call. The first has id and name and no arguments, all others have arguments alone."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class Delta(msgspec.Struct, frozen=True):
    """The next piece of one choice: of its text, of its reasoning, or of its tool calls, never of two of them.

    A struct and no dataclass because one is made for every token, and that takes a tenth of the time.

    Texts hold no half characters and no part of a stop string. The tokens are those that this piece completes; over
    all deltas of a choice each token comes once.
    """

    choice: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TextLogprob, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    @property
    def is_text_alone(self) -> bool:
        """Whether it brings text and nothing else."""
        return bool(self.text) and not (self.logprobs or self.tool_calls)


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice ended."""

    choice: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used and is charged. Completion tokens are those delivered to the client.

    Of these, `reasoning_tokens` came in deltas of reasoning.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


GenerationEvent = Delta | Finished | Usage
