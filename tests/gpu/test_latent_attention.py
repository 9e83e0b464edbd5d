"""Latent attention in Triton against its reference, with hostile inputs."""

from dataclasses import fields, replace

import pytest
import torch

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels import latent_attention as op
from rempart_engine.kernels.latent_attention import kernel
from rempart_engine.kernels.latent_attention.reference import latent_attention as reference
from rempart_engine.kernels.latent_cache import LatentLayout, read_latents, store_latents
from rempart_engine.kernels.select_tokens import Selection
from rempart_engine.kernels.target import A100, B200, H100, SHIPPED, Target
from rempart_engine.kernels.testing import make_step

SCALE = 0.3
LATENT_DIM, ROPE_DIM, NUM_BLOCKS = 36, 6, 8
KINDS = ["float32", "bfloat16", "fp8 of float32", "fp8 of bfloat16"]
RUBBISH = [-1, 2**31 - 1, -(2**31)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind.endswith("bfloat16") else torch.float32


def make_pool(kind: str, latent_dim: int = LATENT_DIM, rope_dim: int = ROPE_DIM) -> torch.Tensor:
    """Every slot holds a random record."""
    if kind.startswith("fp8"):
        pool = torch.zeros(NUM_BLOCKS, 64, LatentLayout(latent_dim, rope_dim).num_bytes, dtype=torch.uint8)
    else:
        pool = torch.zeros(NUM_BLOCKS, 64, latent_dim + rope_dim, dtype=dtype_of(kind))
    slots = torch.arange(64 * NUM_BLOCKS)
    sizes = 4.0 ** torch.randint(-2, 2, (len(slots), 1))  # so that fp8 records have different scales
    store_latents(torch.randn(len(slots), latent_dim) * sizes, torch.randn(len(slots), rope_dim), slots, pool)
    return pool


def make_queries(
    step: StepInputs, heads: int, kind: str, latent_dim: int = LATENT_DIM, rope_dim: int = ROPE_DIM
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens = len(step.positions)
    latent, rope = torch.randn(num_tokens, heads, latent_dim) / 3, torch.randn(num_tokens, heads, rope_dim)
    return latent.to(dtype_of(kind)), rope.to(dtype_of(kind))


def random_selection(step: StepInputs, top_k: int) -> Selection:
    """As an indexer makes it: everything where there is no more, else `top_k` at random; rubbish where it is void."""
    positions = torch.tensor(RUBBISH).repeat(top_k)[:top_k].int().repeat(len(step.positions), 1)
    for token, position in enumerate(step.positions.tolist()):
        if position >= top_k:
            positions[token] = torch.randperm(position + 1)[:top_k].sort().values.int()
    return Selection(positions, step.positions.clamp(max=top_k - 1) + 1)


def expected(
    queries: tuple[torch.Tensor, torch.Tensor], pool: torch.Tensor, step: StepInputs, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results in float64, and the means of the latents' magnitudes with the same weights. Absent tokens count nothing,
    one that is chosen twice counts twice.
    """
    latent, rope = (x.double() for x in queries)
    result, magnitudes = torch.zeros_like(latent), torch.zeros_like(latent)
    for token, position in enumerate(step.positions.tolist()):
        count = int(selection.counts[token])
        places = torch.arange(position + 1) if count > position else selection.positions[token, :count].long()
        places = places[(places >= 0) & (places <= position)]
        if not len(places):
            continue
        table = step.block_tables[int(step.token_rows[token])].long()
        keys, rope_keys = read_latents(pool, table[places // 64] * 64 + places % 64, latent.shape[2])
        weights = (SCALE * (latent[token] @ keys.double().T + rope[token] @ rope_keys.double().T)).softmax(-1)
        result[token], magnitudes[token] = weights @ keys.double(), weights @ keys.double().abs()
    return result, magnitudes


def assert_near(ours: torch.Tensor, result: torch.Tensor, magnitudes: torch.Tensor) -> None:
    """Equal but for the order of sums in float32, and two roundings where bfloat16 is the type.

    Each weight is rounded before it multiplies its latent, which moves the mean by at most 2**-8 of the mean magnitude;
    the result is then rounded, by at most 2**-8 of itself.
    """
    allowed = 1e-5 * magnitudes.clamp(min=1.0)
    if ours.dtype == torch.bfloat16:
        allowed = allowed + 2**-8 * magnitudes + 2**-8 * (result.abs() + 2**-8 * magnitudes)
    assert ours.isfinite().all()
    assert ((ours.cpu().double() - result).abs() - allowed).max().item() <= 0.0


def on(device: torch.device, step: StepInputs) -> StepInputs:
    tensors = {field.name: getattr(step, field.name) for field in fields(step) if field.name != "max_context"}
    return replace(step, **{name: tensor.to(device) for name, tensor in tensors.items()})


def compute(
    device: torch.device,
    queries: tuple[torch.Tensor, torch.Tensor],
    pool: torch.Tensor,
    step: StepInputs,
    selection: Selection,
    *,
    target: Target | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    latent, rope = (x.to(device) for x in queries)
    chosen = Selection(selection.positions.to(device), selection.counts.to(device))
    if target is None and splits is None:
        return op.latent_attention(latent, rope, pool.to(device), on(device, step), chosen, SCALE)
    return kernel.latent_attention(
        latent, rope, pool.to(device), on(device, step), chosen, SCALE, target=target, splits=splits
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [0, 7, 70])
def test_equals_its_reference_for_chunks_and_decode_together(device: torch.device, kind: str, top_k: int) -> None:
    """A chunk of a prompt, a whole prompt and a decoding sequence; with a top-k some see all and others chosen ones."""
    step, pool = make_step([(130, 3), (3, 3), (75, 1)], NUM_BLOCKS), make_pool(kind)
    selection = random_selection(step, top_k) if top_k else Selection.of_everything(step)
    queries = make_queries(step, 3, kind)
    ours = compute(device, queries, pool, step, selection)
    assert ours.dtype == queries[0].dtype
    law = reference(queries[0].float(), queries[1].float(), pool, step, selection, SCALE)
    assert_near(ours, law.double(), expected(queries, pool, step, selection)[1])


@pytest.mark.parametrize("target", [A100, H100, B200], ids=["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kind", ["bfloat16", "fp8 of bfloat16"])
@pytest.mark.parametrize("heads", [1, 7, 16, 32, 64, 128])
def test_every_number_of_heads(device: torch.device, kind: str, heads: int, target: Target) -> None:
    if device.type == "cuda" and target.has_fp8 and torch.cuda.get_device_capability(device) < (8, 9):
        target = A100
    step, pool = make_step([(70, 1), (90, 1)], NUM_BLOCKS), make_pool(kind)
    selection, queries = random_selection(step, 66), make_queries(step, heads, kind)
    ours = compute(device, queries, pool, step, selection, target=target)
    assert_near(ours, *expected(queries, pool, step, selection))


@pytest.mark.parametrize(
    ("kind", "latent_dim", "rope_dim"),
    [
        ("float32", 37, 6),
        ("bfloat16", 37, 6),
        ("float32", 16, 18),
        ("bfloat16", 200, 6),  # slices of which the last is not full
        ("fp8 of bfloat16", 132, 6),  # a second scale for the last 4 latents
        ("fp8 of float32", 132, 2),
        ("bfloat16", 512, 64),
        ("fp8 of bfloat16", 512, 64),
    ],
)
@pytest.mark.parametrize("target", [A100, H100, B200], ids=["sm_80", "sm_90", "sm_100"])
def test_every_size(device: torch.device, kind: str, latent_dim: int, rope_dim: int, target: Target) -> None:
    step, pool = make_step([(130, 1), (1, 1)], NUM_BLOCKS), make_pool(kind, latent_dim, rope_dim)
    heads = 64 if latent_dim == 512 else 5
    selection, queries = random_selection(step, 33), make_queries(step, heads, kind, latent_dim, rope_dim)
    ours = compute(device, queries, pool, step, selection, target=target)
    assert_near(ours, *expected(queries, pool, step, selection))


@pytest.mark.parametrize("kind", ["float32", "fp8 of bfloat16"])
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_splits_of_keys_give_the_same(device: torch.device, kind: str, splits: int) -> None:
    """Also where a token has fewer keys than splits."""
    step, pool = make_step([(300, 2), (2, 2)], NUM_BLOCKS), make_pool(kind)
    for selection in (Selection.of_everything(step), random_selection(step, 70)):
        queries = make_queries(step, 5, kind)
        ours = compute(device, queries, pool, step, selection, splits=splits)
        assert_near(ours, *expected(queries, pool, step, selection))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [1, 3])
def test_absent_and_repeated_choices(device: torch.device, kind: str, splits: int) -> None:
    step, pool = make_step([(130, 6)], NUM_BLOCKS), make_pool(kind)
    positions = torch.randint(0, 124, (6, 80), dtype=torch.int32)  # many of them twice
    positions[0] = -1
    positions[1] = torch.tensor(RUBBISH).repeat(27)[:80].int()
    positions[2, ::2] = -1
    positions[3, :64] = 126 + torch.arange(64)  # later than itself, but for the first two
    positions[4, 1:] = 128  # the token's own, and one before
    selection = Selection(positions, torch.tensor([80, 80, 80, 80, 2, 0], dtype=torch.int32))
    queries = make_queries(step, 3, kind)
    ours = compute(device, queries, pool, step, selection, splits=splits)
    result, magnitudes = expected(queries, pool, step, selection)
    assert_near(ours, result, magnitudes)
    assert not ours[[0, 1, 5]].any(), "tokens that see nothing"
    assert ours[2:5].abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [1, 2])
def test_what_is_not_seen_may_be_nan(device: torch.device, kind: str, splits: int) -> None:
    step, pool = make_step([(130, 2), (3, 1)], NUM_BLOCKS), make_pool(kind)
    queries = make_queries(step, 3, kind)
    selection = random_selection(step, 7)
    selection.positions[0, 3] = -1
    clean = compute(device, queries, pool, step, selection, splits=splits)
    is_seen = torch.zeros(NUM_BLOCKS * 64, dtype=torch.bool)
    for token, position in enumerate(step.positions.tolist()):
        count = int(selection.counts[token])
        places = torch.arange(count) if count > position else selection.positions[token].long()
        places = places[places >= 0]
        is_seen[step.block_tables[int(step.token_rows[token])].long()[places // 64] * 64 + places % 64] = True
    assert not is_seen.all()
    pool.view(NUM_BLOCKS * 64, -1)[~is_seen] = torch.tensor(0xFF if kind.startswith("fp8") else torch.nan).to(
        pool.dtype
    )
    assert torch.equal(compute(device, queries, pool, step, selection, splits=splits), clean)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("splits", [1, 2])
def test_a_query_of_nans_stays_one(device: torch.device, splits: int) -> None:
    step, pool = make_step([(66, 2), (6, 2)], NUM_BLOCKS), make_pool("bfloat16")
    latent, rope = make_queries(step, 3, "bfloat16")
    selection = Selection.of_everything(step)
    clean = compute(device, (latent, rope), pool, step, selection, splits=splits)
    latent[1] = torch.nan
    poisoned = compute(device, (latent, rope), pool, step, selection, splits=splits)
    assert poisoned[1].isnan().all()
    assert torch.equal(poisoned[[0, 2, 3]], clean[[0, 2, 3]])


def test_scores_of_any_size(device: torch.device) -> None:
    step, pool = make_step([(90, 2)], NUM_BLOCKS), make_pool("float32")
    queries, selection = make_queries(step, 3, "float32"), Selection.of_everything(step)
    for size in (0.0, 1e4, -1e4):
        sized = (queries[0] * size, queries[1] * size)
        assert_near(compute(device, sized, pool, step, selection), *expected(sized, pool, step, selection))


def test_padding_rows_see_their_first_token(device: torch.device) -> None:
    step, pool = make_step([(70, 1), (1, 1), (1, 1)], NUM_BLOCKS), make_pool("bfloat16")
    step = replace(step, token_rows=torch.tensor([0, 0, 0], dtype=torch.int32))
    queries, selection = make_queries(step, 3, "bfloat16"), random_selection(step, 7)
    assert_near(compute(device, queries, pool, step, selection), *expected(queries, pool, step, selection))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_queries_may_be_parts_of_others(device: torch.device, kind: str) -> None:
    step, pool = make_step([(70, 3)], NUM_BLOCKS), make_pool(kind)
    latent, rope = make_queries(step, 5, kind)
    within = torch.cat((latent, rope), 2)
    by_head = latent.transpose(0, 1).contiguous().transpose(0, 1)
    selection = random_selection(step, 33)
    ours = compute(device, (by_head, within[..., LATENT_DIM:]), pool, step, selection)
    assert torch.equal(ours, compute(device, (latent, rope), pool, step, selection))


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    step, pool = make_step([(70, 3)], NUM_BLOCKS), make_pool("float32")
    latent, rope = make_queries(step, 2, "float32")
    selection = random_selection(step, 7)
    with pytest.raises(ValueError, match="does not fit latents of 36 and rotary keys of 6"):
        compute(device, (latent, rope), pool[..., :-1], step, selection)
    with pytest.raises(ValueError, match="types differ"):
        compute(device, (latent, rope), pool.bfloat16(), step, selection)
    with pytest.raises(ValueError, match="queries differ"):
        compute(device, (latent, rope[:, :1]), pool, step, selection)
    with pytest.raises(ValueError, match="3 tokens, but choices"):
        compute(device, (latent, rope), pool, step, Selection(selection.positions[:2], selection.counts))
    with pytest.raises(ValueError, match="must be int32"):
        compute(device, (latent, rope), pool, step, Selection(selection.positions.long(), selection.counts))
    with pytest.raises(ValueError, match="heads must be contiguous"):
        compute(device, (latent.transpose(1, 2).contiguous().transpose(1, 2), rope), pool, step, selection)
    with pytest.raises(ValueError, match="not one of whole blocks"):
        compute(device, (latent, rope), pool.repeat(1, 1, 2)[..., : pool.shape[2]], step, selection)


@pytest.mark.parametrize("target", SHIPPED, ids=lambda target: f"sm_{target.capability}")
def test_splits_fill_the_gpu_and_no_more(target: Target) -> None:
    cut = kernel.tiling(target, 128, 512, is_fp8=True, is_float32=False)
    tiles = 128 // cut.heads
    for num_tokens in (1, 2, 3, 16, 100, 4096):
        for most_keys in (1, 64, 2048, 131_072):
            splits = kernel.num_splits(num_tokens, 128, most_keys, cut, target)
            assert 1 <= splits <= min(-(-most_keys // cut.keys), kernel.MOST_SPLITS)
            if most_keys == 131_072 and num_tokens < 16:
                rounds = num_tokens * tiles * splits / target.num_multiprocessors
                assert rounds > 0.8, "multiprocessors stand still"
    assert kernel.num_splits(4096, 128, 2048, cut, target) == 1
    assert kernel.num_splits(1, 128, cut.keys, cut, target) == 1
