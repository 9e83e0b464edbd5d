"""A token of a DeepSeek model gets the same bits however it comes to be computed (docs/adr/0003)."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from rempart_engine.kernels.packed_linear import PackedLinear
from rempart_engine.model.deepseek.kv_pools import CacheDtype
from rempart_engine.model.deepseek.stepping import Stepper
from rempart_engine.model.deepseek.testing import TINY, TINY_GLM, write_checkpoint
from rempart_engine.offline import LLM, Generation, SamplingParams

Operation = Callable[..., torch.Tensor]

LENGTH = 200
NUM_COMPANIONS = 16
CONFIGS = {
    "deepseek": replace(TINY, max_model_len=512),
    "glm": replace(TINY_GLM, max_model_len=512),
    "odd": replace(
        TINY,
        hidden_size=37,
        intermediate_size=51,
        q_lora_rank=23,
        num_heads=7,
        qk_nope_head_dim=9,
        v_head_dim=5,
        max_model_len=512,
        moe=replace(TINY.moe, num_experts=15, num_experts_per_token=5, intermediate_size=17),
    ),
}


@dataclass(frozen=True, slots=True)
class Numbers:
    """A model, and in what it is computed and cached."""

    config: str
    precision: str
    cache: CacheDtype | None = None

    def __str__(self) -> str:
        return f"{self.config}-{self.precision}{'' if self.cache is None else '-fp8-cache'}"


ALL = [
    Numbers("deepseek", "float32"),
    Numbers("deepseek", "bfloat16"),
    Numbers("deepseek", "fp8"),
    Numbers("deepseek", "bfloat16", "fp8"),
    Numbers("deepseek", "float32", "fp8"),
    Numbers("deepseek", "int8"),
    Numbers("glm", "bfloat16"),
    Numbers("odd", "float32"),
    Numbers("odd", "bfloat16"),
    Numbers("odd", "fp8", "fp8"),
]


@pytest.fixture(scope="module", params=ALL, ids=str)
def stepper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stepper:
    folder = tmp_path_factory.mktemp("deepseek")
    write_checkpoint(folder, CONFIGS[request.param.config], num_shards=1)
    return Stepper(
        folder,
        precision=request.param.precision,
        cache_dtype=request.param.cache,
        num_rows=NUM_COMPANIONS + 1,
        max_model_len=256,
    )


def tokens(seed: int, length: int = LENGTH) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(TINY.vocab_size) for _ in range(length)]


@pytest.fixture(scope="module")
def alone(stepper: Stepper) -> torch.Tensor:
    """Logits [T, V] of tokens(0), whole in one step."""
    return stepper.run(0, tokens(0), [LENGTH])


@pytest.mark.parametrize("pieces", [[1, 63, 65, 7, 64], [100] + [1] * 20 + [80], [2] * 100])
def test_chunks_change_no_bit(stepper: Stepper, alone: torch.Tensor, pieces: Sequence[int]) -> None:
    assert torch.equal(stepper.run(0, tokens(0), pieces), alone)


@pytest.mark.parametrize("num_companions", [1, NUM_COMPANIONS])
def test_companions_change_no_bit(stepper: Stepper, alone: torch.Tensor, num_companions: int) -> None:
    """They prefill and decode beside every piece of it, and come before and after it in the step."""
    companions = {row: tokens(row, 31 * row % 97 + 20) for row in range(1, num_companions + 1)}
    for row, token_ids in {0: tokens(0), **companions}.items():
        stepper.start(row, token_ids)
    odd, even = ([row for row in companions if row % 2 == rest] for rest in (1, 0))
    parts = []
    for count, of_odd, of_even in ((50, 5, 1), (1, 1, 7), (1, 3, 1), (148, 1, 2)):
        before, after = dict.fromkeys(odd, of_odd), dict.fromkeys(even, of_even)
        parts.append(stepper.step({**before, 0: count, **after})[0])
    assert torch.equal(torch.cat(parts), alone)


def test_shared_blocks_change_no_bit(stepper: Stepper, alone: torch.Tensor) -> None:
    stepper.run(0, tokens(0), [LENGTH])
    stepper.start(1, tokens(0), shared=2, of_row=0)
    assert torch.equal(stepper.step({1: LENGTH - 128})[1], alone[128:])


# Operations of the library, at sizes of DeepSeek-V3.2 and at odd ones.


def row_alone(operation: Operation, *inputs: torch.Tensor) -> None:
    """The operation gives rows the same bits in any company."""
    whole = operation(*inputs)
    for part in (slice(0, 1), slice(5, 6), slice(100, 102), slice(3, 20), slice(64, 129), slice(1, len(whole))):
        assert torch.equal(operation(*(x[part].contiguous() for x in inputs)), whole[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(576, 7168), (64, 7168), (37, 41), (13, 39), (1, 64), (129, 33)])
def test_packed_linear(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    layer = PackedLinear((torch.randn(outputs, inputs) * 0.05).to(dtype))
    row_alone(layer, torch.randn(257, inputs).to(dtype))


@pytest.mark.parametrize(("num_experts", "width"), [(8, 7168), (8, 37), (13, 40)])
def test_sums_over_experts(num_experts: int, width: int) -> None:
    torch.manual_seed(0)
    row_alone(lambda x: x.sum(1), torch.randn(257, num_experts, width))
    row_alone(lambda x: x.sum(-1, keepdim=True), torch.rand(257, num_experts))


@pytest.mark.parametrize("dim", [128, 19, 16])
def test_layer_norm_of_index_keys(dim: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(dim), torch.randn(dim)
    row_alone(lambda x: torch.nn.functional.layer_norm(x, (dim,), weight, bias, 1e-6), torch.randn(257, dim))


# Through the engine.


ENGINES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"dtype": "fp8"},
    "fp8 caches": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
}


def sampled(seed: int) -> SamplingParams:
    return SamplingParams(seed=seed, top_p=0.95, max_tokens=30, ignore_eos=True, logprobs=3)


def said(generations: Sequence[Generation]) -> list[tuple[list[int], list[dict[int, float]]]]:
    return [(generation.token_ids, generation.logprobs) for generation in generations]


# The engine schedules alike whatever the numbers are, and `stepper` has every kind of them without it.
@pytest.mark.parametrize(
    "numbers", [pytest.param(name, marks=[] if name.startswith("fp8") else pytest.mark.slow) for name in ENGINES]
)
def test_no_way_through_the_engine_changes_a_text_or_a_bit_of_its_logprobs(tmp_path: Path, numbers: str) -> None:
    write_checkpoint(tmp_path, CONFIGS["deepseek"])
    prompts = [tokens(seed, 17 * seed % 150 + 1) for seed in range(12)]
    params = [sampled(seed) for seed in range(12)]
    roomy = {"num_blocks": 60, "num_threads": 1, **ENGINES[numbers]}

    def answers(**options: object) -> LLM:
        return LLM(tmp_path, **{**roomy, "enable_prefix_cache": False, **options})

    llm = answers()
    alone = said([llm.generate([prompt], asked)[0] for prompt, asked in zip(prompts, params, strict=True)])
    assert said(llm.generate(prompts, params)) == alone
    assert said(answers(max_step_tokens=24).generate(prompts, params)) == alone
    crowded = answers(num_blocks=7, watermark=0.0)
    assert said(crowded.generate(prompts, params)) == alone
    assert crowded.load().counters.num_preemptions > 0
    cached = answers(enable_prefix_cache=True)
    for _ in range(2):
        assert said(cached.generate(prompts, params)) == alone
    assert cached.load().counters.num_prefix_cache_hit_tokens > 0
