"""How fast a placement could be at most: a GPU must read its bytes and do its FLOP.

Not counted, so that a bound stays one: what passes between GPUs, kernel launches, sampling, uneven stages and experts.
No speculation is assumed: a step gives each sequence one token.
"""

from dataclasses import dataclass

from rempart_platform.plan.lines import Unit, write, write_amount
from rempart_platform.plan.machines import Gpu
from rempart_platform.plan.placement import Placement
from rempart_platform.plan.shapes import ModelShape
from rempart_platform.plan.tensors import Part, TensorGroup
from rempart_platform.plan.weights import WeightFormat, group_bytes


@dataclass(frozen=True, slots=True)
class Bound:
    """The least time for some tokens."""

    seconds: float
    formula: str
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """At most."""
        return self.num_tokens / self.seconds


def experts_touched(model: ModelShape, num_tokens: int) -> float:
    """Expected number of distinct routed experts of a layer that tokens choose, were each choice equally likely."""
    return model.num_experts * _touched_share(model, num_tokens)


def touched_formula(model: ModelShape, num_tokens: int) -> str:
    """Of the share of experts."""
    return f"(1 - (1 - {model.num_experts_per_token} / {model.num_experts})^{num_tokens})"


def linear_rate(gpu: Gpu, weight_format: WeightFormat) -> float:
    """FLOP/s of linear layers. int4, and any format that the GPU cannot multiply, is decoded to bf16 first."""
    rates = {WeightFormat.FP8: gpu.fp8_rate, WeightFormat.INT8: gpu.int8_rate}
    return rates.get(weight_format) or gpu.bf16_rate


def index_rate(gpu: Gpu) -> float:
    """FLOP/s of the indexer's scores."""
    return gpu.fp8_rate or gpu.bf16_rate


def decode_step(placement: Placement, batch: int, context: int, *, dense: bool = False) -> Bound:
    """One step: a token for each of `batch` sequences of `context` tokens.

    A pipeline's stages work on one share of the batch after another, and a step is over when each share went through
    all of them.
    """
    model, setup = placement.model, placement.setup
    step_batch = -(-batch // placement.num_stages)  # of one stage at a time
    local = -(-step_batch // placement.num_groups)  # of one GPU
    stage = 1 / placement.num_stages
    shards = model.attention.cache_shards(placement.num_ranks)
    work = model.attention.decode_flop(context, dense=dense)
    read = placement.even_shares(lambda group: _bytes_if(group, placement.weight_format, is_read(group)))
    params = placement.even_shares(lambda group: float(group.num_params) if is_read(group) else 0.0)
    cache_read = model.attention.read_bytes(setup.cache_format, context, dense=dense) * stage / shards
    return _bound(
        placement,
        num_tokens=batch,
        parts=_Parts(
            fixed_bytes=read.outside_experts,
            expert_bytes=read.experts,
            touched=_touched_share(model, step_batch),
            touched_text=touched_formula(model, step_batch) if model.num_experts else "",
            local=local,
            local_bytes=cache_read,
            local_flop=2 * params.outside_experts,
            step_tokens=step_batch,
            token_expert_flop=_expert_flop(model, params.experts),
            attend_flop=work.attend * stage / placement.num_ranks,
            index_flop=work.index * stage,
        ),
        times=placement.num_stages,
    )


def prefill(placement: Placement, num_tokens: int, *, dense: bool = False) -> Bound:
    """Prompts of that many tokens, from their first on: one for each GPU when attention is data-parallel, else one.

    In a pipeline, of one stage while the others work on other prompts. The head is for the last token alone.
    """
    model = placement.model
    stage = 1 / placement.num_stages
    cache = num_tokens * model.attention.cache_bytes(placement.setup.cache_format)
    shards = model.attention.cache_shards(placement.num_ranks)
    work = model.attention.prefill_flop(num_tokens, dense=dense)
    read = placement.even_shares(lambda group: _bytes_if(group, placement.weight_format, is_read(group)))
    params = placement.even_shares(
        lambda group: float(group.num_params) if is_read(group) and group.part is not Part.HEAD else 0.0
    )
    step_tokens = num_tokens * placement.num_groups
    return _bound(
        placement,
        num_tokens=step_tokens,
        parts=_Parts(
            fixed_bytes=read.outside_experts,
            expert_bytes=read.experts,
            touched=_touched_share(model, step_tokens),
            touched_text=touched_formula(model, step_tokens) if model.num_experts else "",
            local=1,
            local_bytes=cache * stage / shards,
            local_flop=2 * params.outside_experts * num_tokens,
            step_tokens=step_tokens,
            token_expert_flop=_expert_flop(model, params.experts),
            attend_flop=work.attend * stage / placement.num_ranks,
            index_flop=work.index * stage,
        ),
    )


def cost_per_million(price_per_hour: float, tokens_per_s: float, utilisation: float) -> float:
    """Of a million tokens, when that share of a bound is reached."""
    return price_per_hour / (tokens_per_s * utilisation * 3600) * 1e6


def cost_formula(price_per_hour: float, tokens_per_s: float, utilisation: float) -> str:
    rate = write(tokens_per_s, Unit.TOKENS_PER_SECOND)
    return f"{price_per_hour:g} per hour / ({rate} * {utilisation:g} utilisation * 3600) * 1000000"


@dataclass(frozen=True, slots=True)
class _Parts:
    """What one GPU has to do: fixed, and for each of `local` sequences (decode) or prompts (prefill)."""

    fixed_bytes: float
    expert_bytes: float
    touched: float
    touched_text: str
    local: int
    local_bytes: float
    local_flop: float
    step_tokens: int
    token_expert_flop: float
    attend_flop: float
    index_flop: float


def _bound(placement: Placement, num_tokens: int, parts: _Parts, times: int = 1) -> Bound:
    gpu = placement.gpu
    rate, index = linear_rate(gpu, placement.weight_format), index_rate(gpu)
    num_bytes = parts.fixed_bytes + parts.expert_bytes * parts.touched + parts.local * parts.local_bytes
    linear = parts.local * parts.local_flop + parts.step_tokens * parts.token_expert_flop
    compute_s = linear / rate + parts.local * parts.attend_flop / gpu.bf16_rate + parts.local * parts.index_flop / index
    seconds = times * max(num_bytes / gpu.bandwidth, compute_s)

    bytes_text = f"{write_amount(parts.fixed_bytes, 'B')} weights"
    linear_text = f"{parts.local} * {write_amount(parts.local_flop, 'FLOP')}"
    if placement.model.num_experts:
        bytes_text += f" + {write_amount(parts.expert_bytes, 'B')} experts * {parts.touched_text}"
        linear_text += f" + {parts.step_tokens:,} * {write_amount(parts.token_expert_flop, 'FLOP')} experts"
    bytes_text += f" + {parts.local} * {write_amount(parts.local_bytes, 'B')} cache"
    text = (
        f"max(({bytes_text}) / {write_amount(gpu.bandwidth, 'B/s')}; ({linear_text}) / {write_amount(rate, 'FLOP/s')}"
        f" + {parts.local} * {write_amount(parts.attend_flop, 'FLOP')} attention / "
        f"{write_amount(gpu.bf16_rate, 'FLOP/s')}"
    )
    if parts.index_flop:
        text += f" + {parts.local} * {write_amount(parts.index_flop, 'FLOP')} indexer / {write_amount(index, 'FLOP/s')}"
    return Bound(seconds, (f"{times} stages * " if times > 1 else "") + text + ")", num_tokens)


def _touched_share(model: ModelShape, num_tokens: int) -> float:
    if not model.num_experts:
        return 0.0
    return 1.0 - (1.0 - model.num_experts_per_token / model.num_experts) ** num_tokens


def _expert_flop(model: ModelShape, expert_params: float) -> float:
    """Of one token, on a GPU with those parameters, its experts lying anywhere."""
    return 2 * expert_params * model.num_experts_per_token / model.num_experts if model.num_experts else 0.0


def is_read(group: TensorGroup) -> bool:
    """In a step without speculation. Of an embedding, only the rows of the step's tokens are."""
    return not group.is_mtp and group.part is not Part.EMBEDDING


def _bytes_if(group: TensorGroup, weight_format: WeightFormat, counts: bool) -> float:
    return float(group_bytes(group, weight_format)) if counts else 0.0
