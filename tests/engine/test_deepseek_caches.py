"""What DeepSeek models cache: its bytes, how near fp8 comes, and that all pools move together."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rempart_engine.config import EngineConfig
from rempart_engine.core.pipeline import Pipeline
from rempart_engine.core.request import Request, RequestId
from rempart_engine.core.scheduler import Scheduler
from rempart_engine.core.step import TokenLogprob
from rempart_engine.core_process import scheduler_config
from rempart_engine.kernels.index_cache import store_index_keys
from rempart_engine.kernels.latent_attention import latent_attention
from rempart_engine.kernels.latent_cache import store_latents
from rempart_engine.kernels.select_tokens import Selection, select_tokens
from rempart_engine.kernels.testing import make_step
from rempart_engine.kv_storage import KVStorage, block_bytes
from rempart_engine.model.deepseek.kv_pools import INDEX_KEYS, LATENTS, CacheDtype, kv_pools
from rempart_engine.model.deepseek.stepping import Stepper
from rempart_engine.model.deepseek.testing import TINY, write_checkpoint
from rempart_engine.offline import LLM, SamplingParams

V32 = replace(
    TINY,
    num_layers=61,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    indexer=replace(TINY.indexer, num_heads=64, head_dim=128, top_k=2048, is_full=(True,) * 61),
)
"""DeepSeek-V3.2, as far as its caches go."""
SMALL = replace(TINY, max_model_len=512)

FP8: CacheDtype = "fp8"
E4M3_STEP = 2.0**-4
"""Largest relative rounding error of a normal e4m3 number: half of a step of 2**-3 (3 bits of fraction)."""


def tokens(seed: int, length: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(TINY.vocab_size) for _ in range(length)]


# Bytes.


@pytest.mark.parametrize(
    ("dtype", "num_mtp_layers", "latent_bytes", "key_bytes", "per_token"),
    [
        ("fp8", 0, 656, 132, 48_068),
        ("fp8", 1, 656, 132, 48_856),
        (torch.bfloat16, 0, 1152, 256, 85_888),
        (torch.float32, 0, 2304, 512, 171_776),
    ],
)
def test_bytes_per_token_are_those_of_the_formats(
    dtype: CacheDtype, num_mtp_layers: int, latent_bytes: int, key_bytes: int, per_token: int
) -> None:
    pools = kv_pools(V32, num_mtp_layers, dtype)
    assert block_bytes(pools) == 64 * per_token
    storage = KVStorage(pools, 2)
    for name, expected in ((LATENTS, latent_bytes), (INDEX_KEYS, key_bytes)):
        layer = storage.layer(name, V32.num_layers + num_mtp_layers - 1)
        assert layer.untyped_storage().nbytes() == (V32.num_layers + num_mtp_layers) * 2 * 64 * expected
        assert layer[0].numel() * layer.element_size() == 64 * expected


def test_layers_that_share_a_choice_keep_no_index_keys() -> None:
    sharing = replace(V32, num_layers=4, indexer=replace(V32.indexer, is_full=(True, False, False, True)))
    assert block_bytes(kv_pools(sharing, 1, "fp8")) == 64 * (5 * 656 + 3 * 132)


# Nearness.


def test_attention_over_fp8_records_is_as_near_as_e4m3_is() -> None:
    """The tolerance that the record's format implies, for queries and weights in float32:

    A latent is off by at most 2**-4 of itself, or by half a step of the smallest numbers, 2**-10 times its group's
    scale; scales are exact, being powers of two. A rotary key is rounded to bfloat16: at most 2**-8 of itself. A score
    is then off by at most e = scale * (|q| . latent errors + |q_rope| . 2**-8 |rope key|), and a softmax weight by a
    factor between exp(-2e) and exp(2e), e the largest over the keys. So the result, a weighted mean of latents, is off
    by at most

        (exp(2e) - 1) * mean of |latents|  +  exp(2e) * mean of their errors        (means under the exact weights).
    """
    torch.manual_seed(0)
    scale, step = 192**-0.5, make_step([(500, 6)], 16)
    latents, rope_keys = torch.randn(16 * 64, 512), torch.randn(16 * 64, 64)
    queries, rope_queries = torch.randn(6, 5, 512) * 0.3, torch.randn(6, 5, 64) * 0.3
    plain, fp8 = torch.zeros(16, 64, 576), torch.zeros(16, 64, 656, dtype=torch.uint8)
    for pool in (plain, fp8):
        store_latents(latents, rope_keys, torch.arange(16 * 64), pool)
    selection = Selection.of_everything(step)
    exact, coarse = (latent_attention(queries, rope_queries, pool, step, selection, scale) for pool in (plain, fp8))
    group_scales = fp8.view(-1, 656)[:, 512:528].contiguous().view(torch.float32).repeat_interleave(128, 1)
    errors = (latents.abs() * E4M3_STEP).maximum(group_scales * 2.0**-10)
    largest = 0.0
    for token, position in enumerate(step.positions.tolist()):
        places = torch.arange(position + 1)
        slots = step.block_tables[0].long()[places // 64] * 64 + places % 64
        scores = scale * (queries[token] @ latents[slots].T + rope_queries[token] @ rope_keys[slots].T)
        off = queries[token].abs() @ errors[slots].T + rope_queries[token].abs() @ (rope_keys[slots].abs() * 2.0**-8).T
        growth = (2.0 * scale * off.amax(1)).exp()[:, None]
        weights = scores.softmax(-1)
        bound = (growth - 1.0) * (weights @ latents[slots].abs()) + growth * (weights @ errors[slots])
        difference = (coarse[token] - exact[token]).abs()
        assert (difference <= bound + 1e-5).all()
        largest = max(largest, float((difference / exact.abs().amax()).max()))
    assert 1e-4 < largest < E4M3_STEP, "errors of many keys cancel, and yet they are there"


def test_tokens_chosen_by_fp8_keys_are_as_near_the_best_as_e4m3_is() -> None:
    """A product of two e4m3 numbers is off by at most (1 + 2**-4)**2 - 1 of the product of their absolute values, and
    where one is among the smallest, by 2**-10 times its scale times the other. A score, the weighted sum over heads of
    what is positive, is off by the sum of these with absolute weights. So a chosen token's exact score is below the
    K-th largest exact score by at most twice the largest of those bounds.
    """
    torch.manual_seed(0)
    dim, heads, top_k, step = 16, 13, 33, make_step([(500, 6)], 16)
    keys, queries, weights = torch.randn(16 * 64, dim), torch.randn(6, heads, dim), torch.randn(6, heads)
    pool = torch.zeros(16, 64 * (dim + 4), dtype=torch.uint8)
    store_index_keys(keys, torch.arange(16 * 64), pool)
    selection = select_tokens(queries, weights, pool, step, top_k, 1 << 20)
    grid = 2.0**-10 * 2.0 * torch.cat((keys.flatten(), queries.flatten())).abs().max() / 448.0
    places = torch.arange(500)
    seen = keys[step.block_tables[0].long()[places // 64] * 64 + places % 64]
    num_others = 0
    for token, position in enumerate(step.positions.tolist()):
        visible = seen[: position + 1]
        exact = weights[token] @ (queries[token] @ visible.T).relu()
        off = ((1.0 + E4M3_STEP) ** 2 - 1.0) * (queries[token].abs() @ visible.abs().T)
        off += grid * (queries[token].abs().sum(1, keepdim=True) + visible.abs().sum(1) + dim * grid)
        bound = (weights[token].abs() @ off).max()
        best = exact.topk(top_k)
        chosen = selection.positions[token].long()
        assert (exact[chosen] >= best.values[-1] - 2.0 * bound).all()
        num_others += top_k - len(set(chosen.tolist()) & set(best.indices.tolist()))
    assert 0 < num_others < 6 * top_k // 5, "rounding swaps a few of those near the border"


SMOOTH = replace(SMALL, num_dense_layers=3, indexer=replace(SMALL.indexer, top_k=512))
"""Neither experts nor tokens are chosen, for a choice may turn on any rounding."""


def test_logits_with_fp8_caches_stay_near(tmp_path: Path) -> None:
    """What attention adds is off by at most about 2**-4 of its size (above). Norms and residuals pass relative errors
    on as they come, and there are 3 layers, so logits are off by about 3 * 2**-4 of their own deviation at most;
    by much less in the mean, for errors of many latents cancel.
    """
    write_checkpoint(tmp_path, SMOOTH, dtype="float32")
    plain, coarse = (Stepper(tmp_path, cache_dtype=dtype) for dtype in (torch.float32, FP8))
    token_ids = tokens(1, 300)
    expected, logits = (stepper.run(0, token_ids, [300]) for stepper in (plain, coarse))
    error = (logits - expected).square().mean(1).sqrt() / expected.std()
    assert float(error.max()) < 3 * E4M3_STEP
    assert 0.0 < float(error.mean()) < E4M3_STEP


# All pools together.


@pytest.mark.parametrize("dtype", [torch.float32, "fp8"], ids=["float32", "fp8"])
def test_exported_blocks_go_on_elsewhere_to_the_bit(tmp_path: Path, dtype: CacheDtype) -> None:
    write_checkpoint(tmp_path, SMALL)
    token_ids = tokens(2, 200)
    here, there = (Stepper(tmp_path, cache_dtype=dtype, num_rows=2, max_model_len=256) for _ in range(2))
    whole = here.run(0, token_ids, [200])
    blocks = here.storage.export_blocks(list(here.block_ids(0)[:2]))
    assert set(blocks) == {LATENTS, INDEX_KEYS}
    there.start(0, token_ids)
    there.storage.import_blocks(list(there.block_ids(1)[:2]), blocks)
    there.start(0, token_ids, shared=2, of_row=1)
    assert torch.equal(there.step({0: 72})[0], whole[128:])
    for missing in (LATENTS, INDEX_KEYS):  # each pool matters
        there.storage.import_blocks(
            list(there.block_ids(1)[:2]), {**blocks, missing: torch.zeros_like(blocks[missing])}
        )
        there.start(0, token_ids, shared=2, of_row=1)
        assert not torch.equal(there.step({0: 72})[0], whole[128:])


def requests(count: int) -> list[Request]:
    """Some share long prefixes; some are sampled."""
    draw = random.Random(9)
    prefixes = [tokens(seed, 130) for seed in range(3)]
    result = []
    for number in range(count):
        prompt = draw.choice(prefixes)[: draw.randint(1, 130)] + tokens(100 + number, draw.randint(1, 60))
        sampling = SamplingParams(
            temperature=draw.choice((0.0, 1.0)),
            seed=number,
            max_tokens=draw.randint(1, 40),
            ignore_eos=True,
            logprobs=1,
        )
        result.append(Request(RequestId(str(number)), tuple(prompt), sampling))
    return result


@pytest.mark.parametrize(
    ("kv_cache_dtype", "num_speculative_tokens"),
    [
        ("auto", 0),
        ("fp8", 2),
        # Formats of the cache know nothing of drafts.
        pytest.param("auto", 2, marks=pytest.mark.slow),
        pytest.param("fp8", 0, marks=pytest.mark.slow),
    ],
)
def test_a_walk_in_a_small_pool_says_what_a_large_one_says(
    tmp_path: Path, kv_cache_dtype: str, num_speculative_tokens: int
) -> None:
    """Prefix cache, preemption, chunks and aborts at once; the answers are those of requests that come alone."""
    write_checkpoint(tmp_path, SMALL)
    common: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_dtype": kv_cache_dtype, "num_threads": 1}
    alone = LLM(tmp_path, num_blocks=64, enable_prefix_cache=False, num_speculative_tokens=0, **common)
    expected = {
        request.request_id: alone.generate([request.prompt_token_ids], request.sampling)[0] for request in requests(24)
    }
    options: dict[str, Any] = {"num_blocks": 11, "max_step_tokens": 48, "watermark": 0.0, "max_num_rows": 8}
    crowded = LLM(tmp_path, num_speculative_tokens=num_speculative_tokens, **options, **common)
    config = EngineConfig(model=tmp_path, num_speculative_tokens=num_speculative_tokens, **options, **common)
    scheduler, draw = Scheduler(scheduler_config(config, crowded.model)), random.Random(4)
    pipeline = Pipeline(scheduler, crowded.model.runner)
    waiting, aborted = requests(24), set[RequestId]()
    said: dict[RequestId, list[tuple[int, TokenLogprob]]] = {name: [] for name in expected}
    while waiting or scheduler.has_work:
        if waiting and draw.random() < 0.5:
            assert scheduler.add(waiting.pop()) == []
        if draw.random() < 0.02 and (running := [name for name in expected if name not in aborted and said[name]]):
            aborted.add(name := draw.choice(running))
            scheduler.abort(name)
        for event in pipeline.advance()[1] if scheduler.has_work else ():
            said[event.request_id] += zip(event.token_ids, event.logprobs, strict=True)
        scheduler.check_integrity()
    counters = scheduler.load().counters
    assert counters.num_preemptions > 0
    assert counters.num_prefix_cache_hit_tokens > 0
    assert aborted
    for name, pairs in said.items():
        full = expected[name]
        assert [token_id for token_id, _ in pairs] == full.token_ids[: len(pairs)]
        assert [logprob.logprob for _, logprob in pairs] == [
            entry[token_id] for token_id, entry in zip(full.token_ids, full.logprobs, strict=True)
        ][: len(pairs)]
        assert name in aborted or len(pairs) == len(full.token_ids)
    assert scheduler.load().num_free_blocks == 11
