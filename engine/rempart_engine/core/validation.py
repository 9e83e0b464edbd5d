"""Whether a request can ever succeed here."""

from collections.abc import Collection
from math import isnan

from rempart_engine.core.request import InvalidRequestError, Request
from rempart_engine.core.scheduler_config import SchedulerConfig


def check_request(request: Request, config: SchedulerConfig) -> None:
    """Look at everything that a runner relies on.

    Raises:
        InvalidRequestError: the message names the limit.
    """
    sampling = request.sampling
    _check_lengths(request, config)
    if request.deadline is not None and isnan(request.deadline):
        raise InvalidRequestError("deadline must be a number of seconds, got nan")
    if sampling.n > config.max_num_waiting:
        raise InvalidRequestError(f"n is {sampling.n}, the limit is max_num_waiting = {config.max_num_waiting}")
    for name, token_ids in (
        ("prompt_token_ids", request.prompt_token_ids),
        ("logit_bias", sampling.logit_bias),
        ("allowed_token_ids", sampling.allowed_token_ids),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        _check_token_ids(name, token_ids, config.vocab_size)
    for name, count in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if count is not None and count > config.vocab_size:
            raise InvalidRequestError(f"{name} is {count}, the limit is vocab_size = {config.vocab_size}")


def _check_lengths(request: Request, config: SchedulerConfig) -> None:
    sampling = request.sampling
    num_prompt_tokens = len(request.prompt_token_ids) - request.num_emitted_tokens
    max_tokens = 1 if sampling.max_tokens is None else sampling.max_tokens
    num_tokens = num_prompt_tokens + max_tokens
    if request.num_emitted_tokens < 0:
        raise InvalidRequestError(f"num_emitted_tokens must be at least 0, got {request.num_emitted_tokens}")
    if num_prompt_tokens < 1:
        raise InvalidRequestError("prompt_token_ids must hold at least one token beside the emitted ones")
    if request.num_emitted_tokens and sampling.n > 1:
        raise InvalidRequestError(f"num_emitted_tokens needs n = 1, got n = {sampling.n}")
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequestError(f"min_tokens is {sampling.min_tokens}, more than max_tokens = {sampling.max_tokens}")
    tokens = f"{num_prompt_tokens} prompt tokens and {max_tokens} output tokens"
    if num_tokens > config.max_model_len:
        raise InvalidRequestError(f"{tokens} exceed max_model_len = {config.max_model_len}")
    if num_tokens > config.num_pool_tokens:
        pool = f"{config.num_blocks} blocks of {config.block_size} tokens"
        raise InvalidRequestError(f"{tokens} exceed the KV pool: {pool}")


def _check_token_ids(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise InvalidRequestError(f"{name} must be at least 0 and less than vocab_size = {vocab_size}")
