"""A slice of DeepSeek-V3.2 through the engine: true widths, all experts, few layers, random weights in fp8."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bench.dsa_check import WrongAnswerError
from bench.gpu_model_work import STEP_AIM, decode_works
from bench.gpu_points import NOT_TIMED, PROMPTS, Measured, Sizes, Slice, decode_name
from bench.gpu_weights import RandomFolder

from rempart_engine.config import BLOCK_SIZE, EngineConfig
from rempart_engine.core.pipeline import Pipeline
from rempart_engine.core.request import Request, RequestId, SamplingParams
from rempart_engine.core.runner import LoadedModel, PendingStep, Runner
from rempart_engine.core.scheduler import Scheduler
from rempart_engine.core.step import StepPlan, StepResult
from rempart_engine.core_process import scheduler_config
from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.runner import runner_of

_LEAST_AGREEING = 0.75
"""Of the last tokens that a prompt's computation gives again: sums differ in order, and near ties may turn."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step as the engine's loop sees it: from the end of the step before to its own end."""

    num_tokens: int
    num_rows: int
    seconds: float

    @property
    def decodes(self) -> bool:
        return self.num_tokens == self.num_rows


class TimedRunner:
    """Hands plans on, and notes when each is done. Implements `core.runner.Runner`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._last = time.perf_counter()
        self.steps: list[StepTime] = []

    def launch(self, plan: StepPlan) -> "TimedStep":
        return TimedStep(self._runner.launch(plan), plan, self._note)

    def release_rows(self, rows: Sequence[int]) -> None:
        self._runner.release_rows(rows)

    def _note(self, plan: StepPlan) -> None:
        now = time.perf_counter()
        self.steps.append(StepTime(sum(row.num_new_tokens for row in plan.rows), len(plan.rows), now - self._last))
        self._last = now


class TimedStep:
    """Implements `core.runner.PendingStep`."""

    def __init__(self, step: PendingStep, plan: StepPlan, note: Callable[[StepPlan], None]) -> None:
        self._step, self._plan, self._note = step, plan, note

    @property
    def is_done(self) -> bool:
        return self._step.is_done

    def result(self) -> StepResult:
        result = self._step.result()
        self._note(self._plan)
        return result


def model_points(sizes: Sizes, device: torch.device, *, is_timed: bool) -> Iterator[Measured]:
    """Steps that decode and steps of prompts, for each slice and batch."""
    for part in sizes.slices:
        model = part.config(sizes.model)
        loaded, config = _load(model, sizes, part, device)
        for batch in sizes.batches:
            yield from _measured(part, model, sizes, batch, loaded, config, is_timed=is_timed)
        del loaded
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _load(model: DeepseekConfig, sizes: Sizes, part: Slice, device: torch.device) -> tuple[LoadedModel, EngineConfig]:
    batch = sizes.batches[-1]
    length = sizes.decode_context + num_outputs(sizes, batch) + 1
    config = EngineConfig(
        model=Path("random"),
        device="cuda",
        dtype="fp8",
        kv_cache_dtype="fp8",
        max_num_rows=batch,
        max_step_tokens=sizes.num_queries,
        max_model_len=length,
        max_graph_tokens=batch if part.with_graphs else 0,
        num_speculative_tokens=0,
        enable_prefix_cache=False,
        num_blocks=(batch + 1) * -(-length // BLOCK_SIZE),
    )
    return runner_of(RandomFolder(model, device), config, lambda _: None), config


def _measured(
    part: Slice,
    model: DeepseekConfig,
    sizes: Sizes,
    batch: int,
    loaded: LoadedModel,
    config: EngineConfig,
    *,
    is_timed: bool,
) -> Iterator[Measured]:
    works = decode_works(model, batch, sizes.decode_context, "fp8")
    found = Measured("model", decode_name(part, batch), works, STEP_AIM if part.with_graphs else None)
    try:
        steps = _run(loaded, config, sizes, batch)
    except WrongAnswerError as error:
        yield replace(found, refusal=f"wrong: {error}")
        return
    if not is_timed:
        yield replace(found, refusal=NOT_TIMED)
        return
    yield replace(found, seconds=decode_seconds(steps, batch))
    if of_prompts := prompt_seconds(steps, sizes.num_queries):
        yield Measured(PROMPTS, f"{part.name}, with {batch} sequences", (), seconds=of_prompts)


def num_outputs(sizes: Sizes, batch: int) -> int:
    """Of every sequence: so many that the first still decodes when the last prompt is computed, and for a while."""
    return -(-batch * sizes.decode_context // (sizes.num_queries - batch)) + sizes.decode_steps


def decode_seconds(steps: Sequence[StepTime], batch: int) -> tuple[float, ...]:
    """Of the steps in which every sequence decodes, but the first, which still waits for the last of the prompts."""
    return tuple(step.seconds for step in steps if step.decodes and step.num_rows == batch)[1:]


def prompt_seconds(steps: Sequence[StepTime], num_tokens: int) -> tuple[float, ...]:
    """Of the steps that are full of prompts."""
    return tuple(step.seconds for step in steps if step.num_tokens == num_tokens and not step.decodes)


def _run(loaded: LoadedModel, config: EngineConfig, sizes: Sizes, batch: int) -> list[StepTime]:
    """Steps of so many random prompts that decode together; then the last of their tokens must come out again.

    Raises:
        WrongAnswerError: too many do not, or a sequence fails.
    """
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, sizes.decode_context)
    prompts: list[list[int]] = torch.randint(2, loaded.vocab_size, shape, generator=generator).tolist()
    steps, outputs = _generate(loaded, config, prompts, num_outputs(sizes, batch))
    some = range(min(batch, 4))
    # One token less than there is, so that the last comes again, from a prompt this time.
    _, again = _generate(loaded, config, [prompts[row] + outputs[row][:-1] for row in some], 1)
    agreeing = sum(again[row] == outputs[row][-1:] for row in some)
    if agreeing < _LEAST_AGREEING * len(some):
        raise WrongAnswerError(f"{agreeing} of {len(some)} last tokens come again when computed as prompts")
    return steps


def _generate(
    loaded: LoadedModel, config: EngineConfig, prompts: list[list[int]], num_tokens: int
) -> tuple[list[StepTime], list[list[int]]]:
    runner = TimedRunner(loaded.runner)
    scheduler = Scheduler(scheduler_config(config, loaded))
    pipeline = Pipeline(scheduler, runner)
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    for row, prompt in enumerate(prompts):
        if refusals := scheduler.add(Request(RequestId(str(row)), tuple(prompt), sampling)):
            raise WrongAnswerError(f"a request is refused: {refusals[0].error}")
    outputs: list[list[int]] = [[] for _ in prompts]
    while scheduler.has_work:
        for event in pipeline.advance()[1]:
            if event.error is not None:
                raise WrongAnswerError(f"a sequence fails: {event.error}")
            outputs[int(event.request_id)] += event.token_ids
    while not pipeline.is_empty:
        pipeline.advance()
    return runner.steps, outputs
