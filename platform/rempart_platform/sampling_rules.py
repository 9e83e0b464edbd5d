"""Which sampling parameters make sense. Whatever passes here, the engine can carry out."""

import math
from dataclasses import dataclass
from typing import Final

from rempart_platform.errors import invalid_request
from rempart_platform.request_limits import RequestLimits, require_at_most
from rempart_protos.v1 import sampling_pb2

_MOST: Final = 2**31 - 1
"""What engines count with. Limits with names come long before it."""


@dataclass(frozen=True, slots=True)
class _Range:
    low: float
    high: float
    is_low_open: bool = False

    def __contains__(self, value: float) -> bool:
        """False for NaN, which no comparison holds for."""
        return (self.low < value if self.is_low_open else self.low <= value) and value <= self.high

    def asked_of(self, value: float) -> str:
        """What a value that is not in it must be."""
        if self.high == _MOST:
            return f"at least {self.low:g}" if value < self.low else f"at most {_MOST}"
        return f"in {'(' if self.is_low_open else '['}{self.low:g}, {self.high:g}]"


_RANGES: Final = {
    "temperature": _Range(0, 100),
    "top_k": _Range(0, _MOST),
    "top_p": _Range(0, 1, is_low_open=True),
    "min_p": _Range(0, 1),
    "repetition_penalty": _Range(0, 10, is_low_open=True),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "n": _Range(1, _MOST),
    "max_tokens": _Range(1, _MOST),
    "min_tokens": _Range(0, _MOST),
}
_LOGIT_BIAS: Final = _Range(-100, 100)


def check_sampling(sampling: sampling_pb2.SamplingParams, vocab_size: int, limits: RequestLimits) -> None:
    """Raises RempartError INVALID_REQUEST that names the parameter at fault."""
    for name, allowed in _RANGES.items():
        if sampling.HasField(name):
            _require_in_range(getattr(sampling, name), allowed, name)
    _check_counts(sampling, limits)
    _check_token_ids(sampling, vocab_size)
    if sampling.HasField("prompt_logprobs"):
        raise invalid_request("'prompt_logprobs' is not supported here.", "prompt_logprobs")


def _check_counts(sampling: sampling_pb2.SamplingParams, limits: RequestLimits) -> None:
    require_at_most(sampling.n, limits, "max_n", "n", unit="choices")
    require_at_most(sampling.logprobs, limits, "max_logprobs", "logprobs", unit="alternatives")
    require_at_most(len(sampling.logit_bias), limits, "max_logit_bias", "logit_bias", unit="entries")
    require_at_most(len(sampling.stop_token_ids), limits, "max_stop_token_ids", "stop_token_ids", unit="ids")
    allowed = len(sampling.allowed_token_ids)
    require_at_most(allowed, limits, "max_allowed_token_ids", "allowed_token_ids", unit="ids")


def _check_token_ids(sampling: sampling_pb2.SamplingParams, vocab_size: int) -> None:
    for token_id, bias in sampling.logit_bias.items():
        require_in_vocabulary(token_id, vocab_size, "logit_bias")
        _require_in_range(bias, _LOGIT_BIAS, "logit_bias")
    for name in ("stop_token_ids", "allowed_token_ids"):
        for token_id in getattr(sampling, name):
            require_in_vocabulary(token_id, vocab_size, name)


def require_in_vocabulary(token_id: int, vocab_size: int, param: str) -> None:
    """Raises INVALID_REQUEST when the model has no such token id."""
    if token_id >= vocab_size:
        message = f"'{param}' names token id {token_id}; this model's token ids are below {vocab_size}."
        raise invalid_request(message, param)


def _require_in_range(value: float, allowed: _Range, param: str) -> None:
    if value not in allowed:
        shown = "not a number" if math.isnan(value) else value if isinstance(value, int) else f"{value:g}"
        message = f"'{param}' is {shown}; it must be {allowed.asked_of(value)}."
        raise invalid_request(message, param)
