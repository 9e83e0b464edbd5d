"""A plan's numbers against published and measured ones."""

import pytest

from rempart_platform.plan.attention import CacheFormat, SparseAttention
from rempart_platform.plan.bounds import decode_step, experts_touched, prefill
from rempart_platform.plan.fields import Fields, read_toml
from rempart_platform.plan.machines import Machine, choose_machines, read_machines
from rempart_platform.plan.models import PUBLISHED_FILE, find_model
from rempart_platform.plan.offload import Offload
from rempart_platform.plan.placement import Placement, Setup, Sharing, best, placements, roomiest, smallest
from rempart_platform.plan.shapes import ModelShape, shape_from_config
from rempart_platform.plan.tensors import Part, num_params
from rempart_platform.plan.weights import WeightFormat, num_tensors, weight_bytes

LONG = 131_072
SETUP = Setup(CacheFormat.FP8, overhead_bytes=4e9)


@pytest.fixture(scope="module")
def v32() -> ModelShape:
    return find_model("deepseek-v3.2")


def machine(name: str) -> Machine:
    (found,) = choose_machines(read_machines(), (name,))
    return found


def active_params(model: ModelShape) -> float:
    experts = num_params(model.tensors, lambda group: group.part is Part.ROUTED_EXPERTS and not group.is_mtp)
    rest = num_params(model.tensors, lambda group: group.part in (Part.OTHER, Part.HEAD) and not group.is_mtp)
    return experts * model.num_experts_per_token / model.num_experts + rest


def sparse(model: ModelShape) -> SparseAttention:
    assert isinstance(model.attention, SparseAttention)
    return model.attention


def test_parameters_of_v32(v32: ModelShape) -> None:
    main = num_params(v32.tensors, lambda group: not group.is_mtp)
    mtp = num_params(v32.tensors, lambda group: group.is_mtp)
    own = num_params(v32.tensors, lambda group: group.is_mtp and group.part in (Part.ROUTED_EXPERTS, Part.OTHER))
    assert (main, mtp, main + mtp) == (671_877_944_064, 13_477_385_728, 685_355_329_792)
    assert own == 11_624_027_648, "without the copies of embedding and head"
    assert active_params(v32) == pytest.approx(37.5e9, rel=1e-3)


def test_the_published_checkpoint_of_v32(v32: ModelShape) -> None:
    assert v32.published is WeightFormat.FP8
    assert num_tensors(v32.tensors, WeightFormat.FP8) == 92_425
    total = weight_bytes(v32.tensors, WeightFormat.FP8)
    assert total == pytest.approx(689.5e9, rel=1e-4)
    assert total / 2**30 == pytest.approx(642.1, abs=0.05)


def test_a_dense_layer_of_v32_has_27_tensors() -> None:
    """The first shard holds the embedding and two of them: 55 tensors."""
    config = read_toml(PUBLISHED_FILE).section("models").section("deepseek-v3.2").section("config")
    one_more = Fields({**config.values, "num_hidden_layers": 62, "first_k_dense_replace": 4}, "changed")
    counts = [num_tensors(shape_from_config(each, "v32").tensors, WeightFormat.FP8) for each in (config, one_more)]
    assert counts[1] - counts[0] == 27


@pytest.mark.parametrize(
    ("weight_format", "part", "gigabytes"),
    [
        (WeightFormat.BF16, "all", 1370),
        (WeightFormat.FP8, "main", 674),
        (WeightFormat.FP8, "experts", 654),
        (WeightFormat.FP8, "other", 20.0),
        (WeightFormat.BF16, "other", 35.9),
        (WeightFormat.INT4, "experts", 337),
        (WeightFormat.INT4, "main", 357),
        (WeightFormat.INT4, "all", 367),
    ],
)
def test_weights_of_v32_by_format(v32: ModelShape, weight_format: WeightFormat, part: str, gigabytes: float) -> None:
    choices = {
        "all": weight_bytes(v32.tensors, weight_format),
        "main": weight_bytes(v32.tensors, weight_format, lambda group: not group.is_mtp),
        "experts": weight_bytes(
            v32.tensors, weight_format, lambda group: group.part is Part.ROUTED_EXPERTS and not group.is_mtp
        ),
        "other": weight_bytes(
            v32.tensors, weight_format, lambda group: group.part is not Part.ROUTED_EXPERTS and not group.is_mtp
        ),
    }
    assert choices[part] / 1e9 == pytest.approx(gigabytes, rel=2e-3)


@pytest.mark.parametrize(
    ("cache_format", "with_mtp", "expected"),
    [
        (CacheFormat.FP8, False, 48_068),
        (CacheFormat.FP8, True, 48_856),
        (CacheFormat.BF16, False, 78_324),
        (CacheFormat.BF16, True, 79_608),
    ],
)
def test_cache_of_v32(v32: ModelShape, cache_format: CacheFormat, with_mtp: bool, expected: int) -> None:
    assert v32.attention.cache_bytes(cache_format, with_mtp=with_mtp) == expected


def test_cache_records_of_v32(v32: ModelShape) -> None:
    attention = sparse(v32)
    assert attention.latent_record_bytes(CacheFormat.FP8) == 656
    assert attention.latent_record_bytes(CacheFormat.BF16) == 1152
    assert attention.index_record_bytes == 132
    gibibytes = LONG * 48_068 / 2**30
    assert gibibytes == pytest.approx(5.87, abs=0.005)


def test_attention_work_of_v32(v32: ModelShape) -> None:
    attention = sparse(v32)
    pairs = (attention.index_pair_flop, attention.absorbed_pair_flop, attention.expanded_pair_flop)
    assert pairs == (16_384, 278_528, 81_920)
    assert attention.decode_flop(LONG).attend / 61 == pytest.approx(570e6, rel=1e-3)
    assert attention.read_bytes(CacheFormat.BF16, 2048) / 61 == pytest.approx(2.36e6, rel=1e-3)
    # Over 2,048 keys in the absorbed form, or over all in the expanded one: as dear at 6,963 keys.
    assert (
        6_963 * attention.expanded_pair_flop
        <= 2048 * attention.absorbed_pair_flop
        < 6_964 * attention.expanded_pair_flop
    )


@pytest.mark.parametrize("context", [1, 2047, 2048])
def test_short_contexts_score_nothing(v32: ModelShape, context: int) -> None:
    attention = v32.attention
    assert attention.decode_flop(context) == attention.decode_flop(context, dense=True)
    assert attention.read_bytes(CacheFormat.FP8, context) == attention.read_bytes(CacheFormat.FP8, context, dense=True)
    assert attention.prefill_flop(context).index == 0


def test_prefill_flop_are_those_of_each_query(v32: ModelShape) -> None:
    attention = sparse(v32)
    for num_tokens in (1, 2048, 2049, 5000):
        scored = sum(t for t in range(1, num_tokens + 1) if t > attention.top_k)
        chosen = sum(min(t, attention.top_k) for t in range(1, num_tokens + 1))
        every = num_tokens * (num_tokens + 1) // 2
        flop = attention.prefill_flop(num_tokens)
        assert flop.index == 61 * scored * 16_384
        assert flop.attend == 61 * min(chosen * 278_528, every * 81_920)


def test_glm_and_its_shared_indexers() -> None:
    glm, shared = find_model("glm-5"), find_model("glm-5.2")
    assert (sparse(glm).num_index_layers, sparse(shared).num_index_layers) == (78, 21)
    assert glm.attention.cache_bytes(CacheFormat.FP8) == 78 * (656 + 132)
    assert shared.attention.cache_bytes(CacheFormat.FP8) == 78 * 656 + 21 * 132
    assert shared.attention.cache_bytes(CacheFormat.FP8, with_mtp=True) == 79 * 656 + 22 * 132
    main = num_params(glm.tensors, lambda group: not group.is_mtp)
    assert main == pytest.approx(744e9, rel=2e-3)
    assert active_params(glm) == pytest.approx(40e9, rel=0.03)
    indexer = 32 * 128 * 2048 + 128 * 6144 + 32 * 6144 + 2 * 128
    assert main - num_params(shared.tensors, lambda group: not group.is_mtp) == 57 * indexer
    assert glm.published is WeightFormat.BF16


@pytest.mark.parametrize(("name", "expected"), [("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496)])
def test_llama(name: str, expected: int) -> None:
    model = find_model(name)
    assert num_params(model.tensors) == expected
    assert num_tensors(model.tensors, WeightFormat.BF16) == 9 * model.num_layers + 3
    assert not model.attention.is_sparse


def test_llama_8b_keeps_128_kib_a_token() -> None:
    assert find_model("llama-3.1-8b").attention.cache_bytes(CacheFormat.BF16) == 128 * 1024


@pytest.mark.parametrize(
    ("name", "weight_format", "num_machines"),
    [
        ("h200-x8", WeightFormat.FP8, 1),
        ("b200-x8", WeightFormat.FP8, 1),
        ("b300-x4", WeightFormat.FP8, 1),
        ("scaleway-b300-sxm-8", WeightFormat.FP8, 1),
        ("scaleway-h100-sxm-8", WeightFormat.FP8, 2),
        ("h100-x8", WeightFormat.FP8, 2),
        ("a100-80-x8", WeightFormat.INT8, 2),
        ("a100-80-x8", WeightFormat.INT4, 1),
        ("a100-80-x8", WeightFormat.BF16, 3),
    ],
)
def test_what_v32_needs(v32: ModelShape, name: str, weight_format: WeightFormat, num_machines: int) -> None:
    found = smallest(v32, machine(name), weight_format, SETUP, LONG)
    assert found is not None
    assert found.num_machines == num_machines


def test_v32_on_eight_h200(v32: ModelShape) -> None:
    tensor, expert = placements(v32, machine("h200-x8"), WeightFormat.FP8, 1, SETUP)
    assert (tensor.sharing, expert.sharing) == (Sharing.TENSOR, Sharing.EXPERT)
    assert tensor.held.total == pytest.approx(86e9, rel=2e-3)
    assert expert.held.outside_experts == pytest.approx(20.0e9, rel=2e-3)
    assert expert.held.experts == pytest.approx(81.7e9, rel=2e-3)
    assert expert.held.total == pytest.approx(102e9, rel=5e-3)
    assert roomiest((tensor, expert), LONG) is expert, "a latent is not cut: tensor parallelism repeats it on every GPU"


def test_one_a100_holds_v32_in_no_format(v32: ModelShape) -> None:
    """What the host can do: about 19 tokens/s at 200 GB/s and 38 at 400, and 13.5 s for a pass over PCIe."""
    one = machine("a100-80-x1")
    for weight_format in WeightFormat:
        assert roomiest(placements(v32, one, weight_format, 1, SETUP), LONG).num_contexts(LONG) == 0
    offload = Offload(v32, one, SETUP)
    assert offload.gpu_format is WeightFormat.BF16, "it has no fp8 hardware"
    assert offload.gpu_bytes == pytest.approx(35.9e9, rel=2e-3)
    assert offload.token_bytes(WeightFormat.INT4) == pytest.approx(10.5e9, rel=5e-3)
    assert offload.host_tokens_per_s(WeightFormat.INT4, 200e9) == pytest.approx(19, rel=5e-3)
    assert offload.host_tokens_per_s(WeightFormat.INT4, 400e9) == pytest.approx(38, rel=5e-3)
    assert offload.decode_tokens_per_s(WeightFormat.INT4, 400e9) < 25, "the GPU's part is not free"
    assert offload.pass_seconds(WeightFormat.INT4) == pytest.approx(13.5, rel=2e-3)


def test_eight_a100_hold_v32_in_int4_alone(v32: ModelShape) -> None:
    found = best(v32, machine("a100-80-x8"), SETUP, LONG)
    assert found is not None
    assert (found.weight_format, found.num_machines) == (WeightFormat.INT4, 1)


def test_expected_experts(v32: ModelShape) -> None:
    assert experts_touched(v32, 1) == pytest.approx(8)
    assert experts_touched(v32, 2) == pytest.approx(8 + 8 * (1 - 8 / 256))
    assert experts_touched(v32, 10_000) == pytest.approx(256)


def fastest_step_s(model: ModelShape, name: str, batch: int, context: int) -> float:
    found = placements(model, machine(name), WeightFormat.FP8, 1, SETUP)
    return min(decode_step(each, batch, context).seconds for each in found)


@pytest.mark.parametrize(
    ("name", "batch", "measured"),
    [("b200-x8", 1, 52), ("b200-x8", 8, 402), ("b200-x8", 16, 632), ("b200-x8", 64, 2392), ("b300-x8", 1, 125)],
)
def test_no_decode_that_was_measured_beats_its_bound(v32: ModelShape, name: str, batch: int, measured: float) -> None:
    """tokens/s of other systems without speculation, 4,096 tokens in (B300: length not stated)."""
    assert measured < batch / fastest_step_s(v32, name, batch, 4096)


@pytest.mark.parametrize(
    ("context", "first_token_s", "tokens_per_s"),
    [
        *((3_500, 0.49, 29_200), (8_000, 1.1, 28_400), (16_000, 2.3, 27_600), (32_000, 4.9, 26_500)),
        *((64_000, 11.0, 24_300), (120_000, 24.9, 21_500), (160_000, 37.4, 19_800)),
    ],
)
def test_no_prefill_that_was_measured_beats_its_bound(
    v32: ModelShape, context: int, first_token_s: float, tokens_per_s: float
) -> None:
    """Of another system on eight H200, saturated, and of one request alone."""
    tensor, expert = placements(v32, machine("h200-x8"), WeightFormat.FP8, 1, SETUP)
    assert first_token_s > prefill(tensor, context).seconds
    assert tokens_per_s < max(prefill(tensor, context).tokens_per_s, prefill(expert, context).tokens_per_s)


def test_sparse_decode_wins_at_length_and_loses_just_past_the_top_k(v32: ModelShape) -> None:
    placement: Placement = placements(v32, machine("h200-x8"), WeightFormat.FP8, 1, SETUP)[1]

    def gain(context: int) -> float:
        sparse_s = decode_step(placement, 40, context).seconds
        return decode_step(placement, 40, context, dense=True).seconds / sparse_s

    assert gain(2_048) == 1.0
    assert gain(2_100) < 1.0
    assert gain(LONG) > 1.2
