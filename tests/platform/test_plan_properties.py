"""What must hold for any machine and load."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rempart_platform.plan.attention import CacheFormat
from rempart_platform.plan.bounds import cost_per_million, decode_step, experts_touched, prefill
from rempart_platform.plan.machines import Gpu, Machine
from rempart_platform.plan.models import find_model, published_names
from rempart_platform.plan.placement import Placement, Setup, best, placements, roomiest, smallest
from rempart_platform.plan.weights import WeightFormat, weight_bytes

MODELS = {name: find_model(name) for name in published_names()}

gpus = st.builds(
    Gpu,
    name=st.just("some"),
    memory_bytes=st.floats(24e9, 2e12),
    bandwidth=st.floats(1e11, 2e13),
    bf16_rate=st.floats(1e13, 1e16),
    fp8_rate=st.none() | st.floats(1e13, 1e16),
    int8_rate=st.none() | st.floats(1e13, 1e16),
    host_link=st.none() | st.floats(1e10, 1e12),
)
machines = st.builds(Machine, name=st.just("some"), gpu=gpus, num_gpus=st.sampled_from([1, 2, 3, 4, 8, 16]))
models = st.sampled_from(sorted(MODELS)).map(MODELS.__getitem__)
setups = st.builds(Setup, st.sampled_from(CacheFormat), st.floats(0, 2e10), st.booleans())
formats = st.sampled_from(WeightFormat)
contexts = st.integers(1, 131_072)
all_placements = st.builds(placements, models, machines, formats, st.integers(1, 20), setups).flatmap(st.sampled_from)


def with_gpu(placement: Placement, gpu: Gpu) -> Placement:
    return replace(placement, machine=replace(placement.machine, gpu=gpu))


@given(all_placements, contexts, st.floats(1.0, 4.0))
def test_more_memory_never_holds_less(placement: Placement, context: int, factor: float) -> None:
    gpu = placement.gpu
    larger = with_gpu(placement, replace(gpu, memory_bytes=gpu.memory_bytes * factor))
    assert larger.num_contexts(context) >= placement.num_contexts(context)


@given(all_placements, contexts, st.integers(0, 100_000), st.floats(0, 1e10))
def test_longer_contexts_and_overhead_never_hold_more(
    placement: Placement, context: int, longer: int, overhead: float
) -> None:
    assert placement.num_contexts(context + longer) <= placement.num_contexts(context)
    setup = replace(placement.setup, overhead_bytes=placement.setup.overhead_bytes + overhead)
    assert replace(placement, setup=setup).num_contexts(context) <= placement.num_contexts(context)


@given(all_placements, contexts)
def test_what_is_said_to_fit_fits_and_one_more_does_not(placement: Placement, context: int) -> None:
    contexts_a_group = placement.num_contexts(context) // placement.num_groups
    each = placement.context_bytes(context)
    room = placement.gpu.memory_bytes - placement.setup.overhead_bytes
    assume(room > placement.held.total)
    assert placement.held.total + contexts_a_group * each <= room * (1 + 1e-9)
    assert placement.held.total + (contexts_a_group + 1) * each > room * (1 - 1e-9)


@given(all_placements)
def test_the_gpus_together_hold_the_model(placement: Placement) -> None:
    total = weight_bytes(placement.model.tensors, placement.weight_format, placement.is_held)
    assert placement.held.total * placement.num_gpus >= total * (1 - 1e-9)
    assert placement.held.total <= total * (1 + 1e-9)


@given(machines, formats, setups, contexts)
def test_the_least_number_of_machines_is_the_least(
    machine: Machine, weight_format: WeightFormat, setup: Setup, context: int
) -> None:
    model = MODELS["deepseek-v3.2"]
    found = smallest(model, machine, weight_format, setup, context)
    if found is None:
        return
    assert found.num_contexts(context) >= 1
    for fewer in range(1, found.num_machines):
        assert roomiest(placements(model, machine, weight_format, fewer, setup), context).num_contexts(context) == 0


@given(machines, setups, contexts)
def test_no_format_needs_fewer_machines_than_the_best(machine: Machine, setup: Setup, context: int) -> None:
    model = MODELS["glm-5.2"]
    found = best(model, machine, setup, context)
    others = [smallest(model, machine, each, setup, context) for each in WeightFormat]
    needed = [each.num_machines for each in others if each is not None]
    assert (found is None) == (not needed)
    if found is not None:
        assert found.num_machines == min(needed)


@given(all_placements, st.integers(1, 4096), contexts, st.booleans(), st.floats(1.0, 10.0))
def test_a_faster_gpu_is_never_slower(
    placement: Placement, batch: int, context: int, dense: bool, factor: float
) -> None:
    gpu = placement.gpu
    for field in ("bandwidth", "bf16_rate", "fp8_rate", "int8_rate"):
        rate = getattr(gpu, field)
        if rate is None:
            continue
        faster = with_gpu(placement, replace(gpu, **{field: rate * factor}))
        slack = 1 + 1e-9
        step = decode_step(placement, batch, context, dense=dense)
        assert decode_step(faster, batch, context, dense=dense).seconds <= step.seconds * slack
        assert prefill(faster, context).seconds <= prefill(placement, context).seconds * slack


@given(all_placements, st.integers(1, 4096), st.integers(0, 4096), contexts, st.integers(0, 30_000), st.booleans())
def test_more_work_never_takes_less_time(
    placement: Placement, batch: int, more: int, context: int, longer: int, dense: bool
) -> None:
    slack = 1 + 1e-9
    step = decode_step(placement, batch, context, dense=dense).seconds
    assert step <= decode_step(placement, batch + more, context, dense=dense).seconds * slack
    assert step <= decode_step(placement, batch, context + longer, dense=dense).seconds * slack
    assert prefill(placement, context).seconds <= prefill(placement, context + longer).seconds * slack


@given(all_placements, st.integers(1, 4096), contexts)
def test_a_step_is_no_faster_than_reading_its_cache(placement: Placement, batch: int, context: int) -> None:
    """Of all sequences, however they lie on the GPUs."""
    attention = placement.model.attention
    read = batch * attention.read_bytes(placement.setup.cache_format, context)
    least = read / (placement.num_gpus * placement.gpu.bandwidth)
    assert decode_step(placement, batch, context).seconds >= least * (1 - 1e-9)


@given(st.integers(1, 10_000), st.integers(0, 10_000))
def test_experts_touched_grow_up_to_all(num_tokens: int, more: int) -> None:
    model = MODELS["deepseek-v3.2"]
    few, many = experts_touched(model, num_tokens), experts_touched(model, num_tokens + more)
    assert 8 - 1e-9 <= few <= many <= min(256, 8 * (num_tokens + more)) + 1e-9


@pytest.mark.parametrize("name", sorted(MODELS))
def test_narrower_formats_take_fewer_bytes(name: str) -> None:
    int4, int8, fp8, bf16 = (
        weight_bytes(MODELS[name].tensors, each)
        for each in (WeightFormat.INT4, WeightFormat.INT8, WeightFormat.FP8, WeightFormat.BF16)
    )
    assert int4 < fp8 < int8 < bf16


@given(st.floats(0.01, 1e4), st.floats(0.1, 1e7), st.floats(0.01, 1))
def test_cost_is_price_over_tokens(price: float, rate: float, utilisation: float) -> None:
    cost = cost_per_million(price, rate, utilisation)
    assert cost * rate * utilisation * 3600 / 1e6 == pytest.approx(price)
