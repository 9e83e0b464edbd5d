"""The engine as a Python object, for experiments and benchmarks: no server, no second process.

llm = LLM("model.gguf", dtype="float32", max_step_tokens=256)
results = llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=16))
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rempart_engine.config import EngineConfig
from rempart_engine.core.load import Load
from rempart_engine.core.pipeline import Pipeline
from rempart_engine.core.request import FinishReason, InvalidRequestError, Request, RequestId, SamplingParams
from rempart_engine.core.scheduler import Scheduler
from rempart_engine.core.step import TokenEvent, TokenLogprob
from rempart_engine.core_process import scheduler_config
from rempart_engine.runner import load_runner

__all__ = ["LLM", "Completion", "Generation", "SamplingParams"]

Logprobs = dict[int, float]
"""Token id to natural log-probability: the token itself and the most likely alternatives."""


@dataclass(slots=True)
class Completion:
    """One choice: its output tokens, their log-probabilities when asked for, and why it ended ("stop", "length")."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True)
class Generation:
    """All choices for one prompt. The short names speak of the first choice."""

    prompt_token_ids: tuple[int, ...]
    choices: list[Completion]
    num_cached_tokens: int = 0
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    """When asked for: of the prompt tokens from the second."""

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> list[Logprobs]:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason


class LLM:
    """One loaded model with its scheduler. Prefixes stay cached from one `generate` to the next."""

    def __init__(self, model: str | Path, **options: Any) -> None:
        """
        Args:
            options: fields of `EngineConfig`: dtype, num_blocks, max_step_tokens, max_num_rows, ...

        Raises:
            ModelError: the model cannot be served.
            ValueError: an option is out of its range.
        """
        config = EngineConfig(model=Path(model), **{"max_num_waiting": 1 << 30, **options})
        self.model = load_runner(config, lambda _: None)
        self._scheduler = Scheduler(scheduler_config(config, self.model))
        self._pipeline = Pipeline(self._scheduler, self.model.runner)
        self._num_requests = 0

    def load(self) -> Load:
        """State of scheduler and cache, with their counters."""
        return self._scheduler.load()

    def generate(
        self,
        prompts_token_ids: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        emitted_token_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[Generation]:
        """Generate for all prompts together. Results in their order.

        Args:
            sampling: one for all prompts or one for each.
            emitted_token_ids: for each prompt the output to go on after, as if it had been generated here.

        Raises:
            InvalidRequestError: a prompt or its parameters cannot be served; nothing was generated.
        """
        each = [sampling] * len(prompts_token_ids) if isinstance(sampling, SamplingParams) else list(sampling)
        results: dict[RequestId, Generation] = {}
        emitted_of_each = emitted_token_ids or [()] * len(prompts_token_ids)
        for prompt, params, emitted in zip(prompts_token_ids, each, emitted_of_each, strict=True):
            self._num_requests += 1
            request_id = RequestId(str(self._num_requests))
            request = Request(request_id, (*prompt, *emitted), params, num_emitted_tokens=len(emitted))
            refusals = self._scheduler.add(request)
            if refusals:
                self._abort(results)
                assert refusals[0].error is not None, "a refusal says why"
                raise InvalidRequestError(f"prompt {len(results)}: {refusals[0].error.message}")
            results[request_id] = Generation(tuple(prompt), [Completion() for _ in range(params.n)])
        while self._scheduler.has_work:
            _, events = self._pipeline.advance()
            for event in events:
                _add(results[event.request_id], event)
        return list(results.values())

    def _abort(self, requests: dict[RequestId, Generation]) -> None:
        for request_id in requests:
            self._scheduler.abort(request_id)


def _add(generation: Generation, event: TokenEvent) -> None:
    choice = generation.choices[event.choice]
    choice.token_ids += event.token_ids
    choice.logprobs += [_as_dict(*pair) for pair in zip(event.token_ids, event.logprobs, strict=False)]
    if event.prompt_logprobs:
        following = generation.prompt_token_ids[1:]
        generation.prompt_logprobs = [_as_dict(*pair) for pair in zip(following, event.prompt_logprobs, strict=True)]
    if event.choice == 0:
        generation.num_cached_tokens = max(generation.num_cached_tokens, event.num_cached_tokens)
    if event.finish_reason is FinishReason.ERROR:
        raise RuntimeError(f"the engine could not go on with a prompt: {event.error}")
    if event.finish_reason is not None:
        choice.finish_reason = event.finish_reason.value


def _as_dict(token_id: int, logprob: TokenLogprob) -> Logprobs:
    return {**dict(zip(logprob.top_token_ids, logprob.top_logprobs, strict=True)), token_id: logprob.logprob}
