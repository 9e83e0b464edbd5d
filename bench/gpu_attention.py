"""One layer's attention, kernel by kernel and as a whole, sparse against dense."""

from collections.abc import Callable, Iterator, Sequence

import torch
from bench import gpu_work
from bench.dsa_check import WrongAnswerError, check_choice, check_close
from bench.dsa_points import short
from bench.gpu_caches import (
    NewTokens,
    Pools,
    expected_attention,
    expected_scores,
    fill_pools,
    new_tokens,
    random_selection,
    room,
)
from bench.gpu_points import Aim, Point, Sizes
from bench.gpu_work import CACHES, Cache, Work, Works

from rempart_engine.kernels.index_cache import read_index_keys
from rempart_engine.kernels.latent_attention import latent_attention
from rempart_engine.kernels.latent_cache import read_latents
from rempart_engine.kernels.select_tokens import Selection, select_tokens
from rempart_engine.kernels.store_latent_kv import store_latent_kv
from rempart_engine.kernels.target import target_of
from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.options import AttentionOptions

_KV_EPS = 1e-6
_SCORE_BYTES = AttentionOptions().score_bytes
_SCORE_TOLERANCE = 1e-4
"""Of a score's difference, relative to the largest: operands are exact, sums are made in float32 in another order."""

DECODE_AIM = Aim("60 % of FlashMLA's 410 TFLOPS on an H800", flop_per_s=0.6 * 410e12)
PROMPT_AIM = Aim("50 % of FlashMLA's 640 TFLOPS on an H800", flop_per_s=0.5 * 640e12)
SCORES_AIM = Aim("70 % of the bandwidth", of_bandwidth=0.7)
TOP_K_AIM = Aim("100 µs", at_most_s=100e-6)


def store_points(sizes: Sizes, device: torch.device) -> Iterator[Point]:
    """What is cached of new tokens, one launch."""
    for cache in CACHES:
        for num_tokens in (sizes.attention_batch, sizes.num_queries):
            pools = fill_pools(sizes.model, cache, num_tokens + 64, device)
            new = new_tokens(pools, [(num_tokens, num_tokens)])
            yield Point(
                "store_latent_kv",
                f"{num_tokens} tokens, {cache}",
                (gpu_work.store(sizes.model, num_tokens, cache),),
                _storing(pools, new),
                _stored_check(pools, new),
            )


def score_points(sizes: Sizes, device: torch.device) -> Iterator[Point]:
    """Index scores of decoding sequences and of a prompt's chunk."""
    for cache in CACHES:
        batch, context = sizes.score_batch, sizes.longest
        pools = fill_pools(sizes.model, cache, room(batch, context), device)
        new = new_tokens(pools, [(context, 1)] * batch)
        works = (gpu_work.scores(sizes.model, batch * context, batch * context, batch, cache),)
        aim = SCORES_AIM if cache == "fp8" else None
        yield Point("index scores", f"decode {short(context)} x {batch}, {cache}", works, *_scoring(pools, new), aim)
        # As many queries of a prompt as an engine scores at a time: their scores have 64 MiB of room.
        context = sizes.prompt_context
        num_queries = min(sizes.num_queries, max(1, _SCORE_BYTES // (4 * context)))
        new = new_tokens(pools, [(context, num_queries)])
        pairs = gpu_work.causal_pairs(context, num_queries)
        works = (gpu_work.scores(sizes.model, pairs, context, num_queries, cache),)
        yield Point("index scores", f"prompt {num_queries} in {short(context)}, {cache}", works, *_scoring(pools, new))
        del pools, new


def top_k_points(sizes: Sizes, device: torch.device) -> Iterator[Point]:
    """The exact top-k of rows of scores."""
    for batch in (sizes.score_batch, 1):
        yield _top_k_point(sizes, batch, device)


def _top_k_point(sizes: Sizes, batch: int, device: torch.device) -> Point:
    from rempart_engine.kernels.select_tokens.kernel_top_k import launch_top_k

    width, top_k = sizes.longest, sizes.model.indexer.top_k
    scores = torch.randn(batch, width, generator=torch.Generator(device).manual_seed(3), device=device)
    positions = torch.full((batch,), width - 1, dtype=torch.int32, device=device)

    def run() -> torch.Tensor:
        chosen, counts = positions.new_empty(batch, top_k), positions.new_empty(batch)
        launch_top_k(scores, positions, width, chosen, counts)
        return chosen

    def check(chosen: torch.Tensor) -> None:
        expected = scores.topk(top_k).values.sort().values
        found = scores.gather(1, chosen.long()).sort().values
        if not torch.equal(found, expected) or not (chosen.diff() > 0).all():
            raise WrongAnswerError(f"top-k of {batch} rows: not the largest, in ascending places")

    aim = TOP_K_AIM if batch == sizes.score_batch else None
    return Point("top-k", f"[{batch}, {short(width)}]", (gpu_work.top_k(batch, width, top_k),), run, check, aim)


def attention_points(sizes: Sizes, device: torch.device) -> Iterator[Point]:
    """Attention to random choices, and to everything."""
    shape, top_k, batch = sizes.model, sizes.model.indexer.top_k, sizes.attention_batch
    for cache in CACHES:
        context = sizes.longest // 4
        pools = fill_pools(shape, cache, max(room(batch, context), room(1, sizes.prompt_context)), device)
        new = new_tokens(pools, [(context, 1)] * batch)
        seen = min(top_k, context) * batch
        works = (gpu_work.attention(shape, seen, seen, batch, cache),)
        aim = DECODE_AIM if cache == "fp8" else None
        name = f"sparse decode x {batch}, top-{top_k}, {cache}"
        yield Point("attention", name, works, *_attending(pools, new, random_selection(new, top_k)), aim)
        works = (gpu_work.attention(shape, context * batch, context * batch, batch, cache),)
        selection = Selection.of_everything(new.step)
        yield Point(
            "attention",
            f"dense decode {short(context)} x {batch}, {cache}",
            works,
            *_attending(pools, new, selection),
        )
        context = sizes.prompt_context
        new = new_tokens(pools, [(context, sizes.num_queries)])
        pairs = sizes.num_queries * min(top_k, context)
        works = (gpu_work.attention(shape, pairs, context, sizes.num_queries, cache),)
        aim = PROMPT_AIM if cache == "bfloat16" else None
        name = f"sparse prompt {sizes.num_queries} in {short(context)}, {cache}"
        yield Point("attention", name, works, *_attending(pools, new, random_selection(new, top_k)), aim)
        del pools, new, selection


def layer_points(sizes: Sizes, device: torch.device) -> Iterator[Point]:
    """All of a layer's attention but its projections, sparse and dense in turn, from the same pools."""
    shape, cache = sizes.model, CACHES[0]
    most = max(room(sizes.batches[-1], sizes.longest), *(room(1, context) for context in sizes.layer_prompts))
    pools = fill_pools(shape, cache, most, device)
    for context in sizes.contexts:
        for batch in sizes.batches:
            name = f"decode {short(context)} x {batch}"
            yield from _layer_pair(pools, [(context, 1)] * batch, name, cache)
    for context in sizes.layer_prompts:
        name = f"prompt {sizes.num_queries} in {short(context)}"
        yield from _layer_pair(pools, [(context, min(sizes.num_queries, context))], name, cache)


def _layer_pair(pools: Pools, lengths: list[tuple[int, int]], name: str, cache: Cache) -> Iterator[Point]:
    shape, new = pools.shape, new_tokens(pools, lengths)
    everything = Selection.of_everything(new.step)
    store_sparse, store_dense = _storing(pools, new), _storing(pools, new, with_keys=False)
    choose = _choosing(pools, new)

    def sparse() -> tuple[Selection, torch.Tensor]:
        store_sparse()
        selection = choose()
        return selection, _attend(pools, new, selection)

    def dense() -> tuple[Selection, torch.Tensor]:
        store_dense()
        return everything, _attend(pools, new, everything)

    dense_work, sparse_work = layer_works(shape, lengths, cache)
    yield Point("dense layer", name, dense_work, dense, _layer_check(pools, new))
    yield Point("sparse layer", name, sparse_work, sparse, _layer_check(pools, new))


def layer_works(shape: DeepseekConfig, lengths: Sequence[tuple[int, int]], cache: Cache) -> tuple[Works, Works]:
    """Dense and sparse attention of new tokens at the end of contexts, with what is stored. Pure."""
    top_k = shape.indexer.top_k
    num_queries = sum(new for _, new in lengths)
    num_records = sum(context for context, _ in lengths)
    pairs = sum(gpu_work.causal_pairs(context, new) for context, new in lengths)
    everything = gpu_work.attention(shape, pairs, num_records, num_queries, cache)
    dense = (gpu_work.store(shape, num_queries, cache, with_keys=False), everything)
    stored = gpu_work.store(shape, num_queries, cache)
    if max(context for context, _ in lengths) <= top_k:
        return dense, (stored, everything)
    seen = sum(gpu_work.seen_pairs(context, new, top_k) for context, new in lengths)
    seen_records = sum(min(context, top_k * new) for context, new in lengths)
    return dense, (
        stored,
        gpu_work.scores(shape, pairs, num_records, num_queries, cache),
        Work(0.0, 4 * (pairs + num_queries * top_k)),
        gpu_work.attention(shape, seen, seen_records, num_queries, cache),
    )


def _storing(pools: Pools, new: NewTokens, *, with_keys: bool = True) -> Callable[[], None]:
    keys, index_pool = (new.index_keys, pools.index_keys) if with_keys else (None, None)

    def store() -> None:
        store_latent_kv(
            new.latents_and_rope, new.kv_norm, _KV_EPS, new.angles, new.step.slots, pools.latents, keys, index_pool
        )

    return store


def _stored_check(pools: Pools, new: NewTokens) -> Callable[[None], None]:
    """Latents, as the norm leaves them; index keys, by their size, which a rotation does not change."""
    shape = pools.shape

    def check(_: None) -> None:
        latents, _rope = read_latents(pools.latents, new.step.slots, shape.kv_lora_rank)
        raw = new.latents_and_rope[:, : shape.kv_lora_rank].float()
        expected = raw * torch.rsqrt(raw.square().mean(-1, keepdim=True) + _KV_EPS)
        rounding = 2.0**-4 if pools.latents.dtype == torch.uint8 else 2.0**-7
        check_close(latents, expected, "stored latents", rounding)
        keys = read_index_keys(pools.index_keys, new.step.slots, shape.indexer.head_dim)
        normed = torch.nn.functional.layer_norm(new.index_keys.raw.float(), (shape.indexer.head_dim,))
        check_close(keys.norm(dim=-1), normed.norm(dim=-1), "stored index keys", rounding)

    return check


def _scoring(pools: Pools, new: NewTokens) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], None]]:
    from rempart_engine.kernels.select_tokens.kernel_queries import Queries, quantize_queries
    from rempart_engine.kernels.select_tokens.kernel_scores import launch_scores

    step, top_k = new.step, pools.shape.indexer.top_k
    target = target_of(pools.index_keys)
    scores = torch.empty(len(step.positions), room(1, step.max_context), device=pools.device)

    def run() -> torch.Tensor:
        if pools.index_keys.dtype == torch.uint8:
            queries = quantize_queries(new.index_queries, new.index_weights, step.positions, top_k, target)
        else:
            queries = Queries(new.index_queries, new.index_weights)
        launch_scores(queries, pools.index_keys, step, 0, top_k, target, scores)
        return scores

    def check(found: torch.Tensor) -> None:
        for token in _some(step.positions):
            expected = expected_scores(pools, new, token)
            error = (found[token, : len(expected)] - expected).abs().max() / expected.abs().max()
            if not error <= _SCORE_TOLERANCE:
                raise WrongAnswerError(f"scores of token {token} differ by {float(error):.1e} of the largest")

    return run, check


def _attending(
    pools: Pools, new: NewTokens, selection: Selection
) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], None]]:
    def run() -> torch.Tensor:
        return _attend(pools, new, selection)

    def check(found: torch.Tensor) -> None:
        for token in _some(new.step.positions):
            check_close(found[token], expected_attention(pools, new, selection, token), f"attention of token {token}")

    return run, check


def _attend(pools: Pools, new: NewTokens, selection: Selection) -> torch.Tensor:  # [T, H, R]
    return latent_attention(new.latent_queries, new.rope_queries, pools.latents, new.step, selection, pools.scale)


def _choosing(pools: Pools, new: NewTokens) -> Callable[[], Selection]:
    top_k = pools.shape.indexer.top_k

    def choose() -> Selection:
        if new.step.max_context <= top_k:
            return Selection.of_everything(new.step)
        return select_tokens(new.index_queries, new.index_weights, pools.index_keys, new.step, top_k, _SCORE_BYTES)

    return choose


def _layer_check(pools: Pools, new: NewTokens) -> Callable[[tuple[Selection, torch.Tensor]], None]:
    top_k = pools.shape.indexer.top_k

    def check(found: tuple[Selection, torch.Tensor]) -> None:
        selection, attended = found
        for token in _some(new.step.positions):
            context, count = int(new.step.positions[token]) + 1, int(selection.counts[token])
            if count < context:
                chosen = selection.positions[token, :count].long()
                check_choice(chosen, expected_scores(pools, new, token), top_k, f"choice of token {token}")
            check_close(attended[token], expected_attention(pools, new, selection, token), f"attention, token {token}")

    return check


def _some(tokens: torch.Tensor) -> tuple[int, ...]:
    """The first and the last of them."""
    return tuple({0, len(tokens) - 1})
