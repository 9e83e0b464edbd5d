"""What a caller asks of the engine: values that never change once accepted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import NewType

RequestId = NewType("RequestId", str)

_EMPTY_BIAS: Mapping[int, float] = MappingProxyType({})


class FinishReason(Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class InvalidRequestError(ValueError):
    """The request can never succeed on this engine; the message names the limit it breaks."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How next tokens are chosen; the fields and their ranges are those of `rempart.v1.SamplingParams`.

    `logprobs` and `prompt_logprobs` are None for none at all, else the number of alternatives to report beside the
    token itself. `seed` None means that no caller will ask for the same draw again: the engine takes 0.

    Raises:
        InvalidRequestError: a field is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _EMPTY_BIAS)
    allowed_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require_range("temperature", self.temperature, 0.0, 100.0)
        _require_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p must be greater than 0")
        _require_range("min_p", self.min_p, 0.0, 1.0)
        _require_range("repetition_penalty", self.repetition_penalty, 0.0, 10.0)
        if self.repetition_penalty == 0.0:
            raise InvalidRequestError("repetition_penalty must be greater than 0")
        _require_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token_id, bias in self.logit_bias.items():
            _require_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        for name, number, least in (
            ("top_k", self.top_k, 0),
            ("min_tokens", self.min_tokens, 0),
            ("n", self.n, 1),
            ("max_tokens", self.max_tokens, 1),
            ("logprobs", self.logprobs, 0),
            ("prompt_logprobs", self.prompt_logprobs, 0),
        ):
            if number is not None and number < least:
                raise InvalidRequestError(f"{name} must be at least {least}, got {number}")

    @property
    def is_greedy(self) -> bool:
        """The most likely token is taken, without a draw."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """What was said before changes the likelihood of saying it again."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted request.

    The last `num_emitted_tokens` of `prompt_token_ids` are output that the client already has (replay after the loss
    of another engine): they count as output everywhere, and token indices go on from there.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    deadline: float | None = None
    """On the clock of whoever drives the scheduler, seconds; None for no limit."""
    cache_salt: bytes = b""
    num_emitted_tokens: int = 0


def _require_range(name: str, number: float, least: float, most: float) -> None:
    if not least <= number <= most:  # also refuses NaN
        raise InvalidRequestError(f"{name} must be between {least:g} and {most:g}, got {number:g}")
