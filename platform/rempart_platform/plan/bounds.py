"""How fast a placement could be at most: a GPU must read its bytes and do its FLOP.

Not counted, so that a bound stays one: what passes between GPUs, kernel launches, sampling, uneven stages and experts.
No speculation is assumed: a step gives each sequence one token.
"""

from dataclasses import dataclass

from rempart_platform.plan.attention import AttentionFlop
from rempart_platform.plan.lines import Unit, write, write_amount
from rempart_platform.plan.machines import Gpu
from rempart_platform.plan.placement import Placement, Shares
from rempart_platform.plan.shapes import ModelShape
from rempart_platform.plan.tensors import Choice, Part, TensorGroup
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
    attention = placement.model.attention
    step_batch = -(-batch // placement.num_stages)  # of one stage at a time
    return _bound(
        placement,
        _Load(
            num_tokens=batch,
            step_tokens=step_batch,
            params=_params(placement, _is_read),
            local=-(-step_batch // placement.num_groups),  # of one GPU
            local_tokens=1,
            cache_bytes=attention.read_bytes(placement.setup.cache_format, context, dense=dense),
            work=attention.decode_flop(context, dense=dense),
        ),
        times=placement.num_stages,
    )


def prefill(placement: Placement, num_tokens: int, *, dense: bool = False) -> Bound:
    """Prompts of that many tokens, from their first on: one for each GPU when attention is data-parallel, else one.

    In a pipeline, of one stage while the others work on other prompts. The head is for the last token alone.
    """
    attention = placement.model.attention
    step_tokens = num_tokens * placement.num_groups
    return _bound(
        placement,
        _Load(
            num_tokens=step_tokens,
            step_tokens=step_tokens,
            params=_params(placement, lambda group: _is_read(group) and group.part is not Part.HEAD),
            local=1,
            local_tokens=num_tokens,
            cache_bytes=num_tokens * attention.cache_bytes(placement.setup.cache_format),
            work=attention.prefill_flop(num_tokens, dense=dense),
        ),
    )


def cost_per_million(price_per_hour: float, tokens_per_s: float, utilisation: float) -> float:
    """Of a million tokens, when that share of a bound is reached."""
    return price_per_hour / (tokens_per_s * utilisation * 3600) * 1e6


def cost_formula(price_per_hour: float, tokens_per_s: float, utilisation: float) -> str:
    rate = write(tokens_per_s, Unit.TOKENS_PER_SECOND)
    return f"{price_per_hour:g} per hour / ({rate} * {utilisation:g} utilisation * 3600) * 1000000"


@dataclass(frozen=True, slots=True)
class _Load:
    """What is to be done, on one GPU for each of `local` sequences (decode) or prompts (prefill)."""

    num_tokens: int
    step_tokens: int
    """Those that choose experts, wherever these lie."""
    params: Shares
    """That are multiplied with."""
    local: int
    local_tokens: int
    """Of one sequence or prompt, as for what follows."""
    cache_bytes: int
    work: AttentionFlop


def _bound(placement: Placement, load: _Load, times: int = 1) -> Bound:
    model, gpu, stage, local = placement.model, placement.gpu, 1 / placement.num_stages, load.local
    rate, index = linear_rate(gpu, placement.weight_format), index_rate(gpu)
    read = read_shares(placement)
    cache_bytes = load.cache_bytes * stage / model.attention.cache_shards(placement.num_ranks)
    local_flop = 2 * load.params.outside_experts * load.local_tokens
    expert_flop = _expert_flop(model, load.params.experts)
    attend_flop, index_flop = load.work.attend * stage / placement.num_ranks, load.work.index * stage

    num_bytes = read.outside_experts + read.experts * _touched_share(model, load.step_tokens) + local * cache_bytes
    linear = local * local_flop + load.step_tokens * expert_flop
    compute_s = linear / rate + local * attend_flop / gpu.bf16_rate + local * index_flop / index
    seconds = times * max(num_bytes / gpu.bandwidth, compute_s)

    bytes_text = f"{write_amount(read.outside_experts, 'B')} weights"
    linear_text = f"{local} * {write_amount(local_flop, 'FLOP')}"
    if model.num_experts:
        bytes_text += f" + {write_amount(read.experts, 'B')} experts * {touched_formula(model, load.step_tokens)}"
        linear_text += f" + {load.step_tokens:,} * {write_amount(expert_flop, 'FLOP')} experts"
    bytes_text += f" + {local} * {write_amount(cache_bytes, 'B')} cache"
    text = (
        f"max(({bytes_text}) / {write_amount(gpu.bandwidth, 'B/s')}; ({linear_text}) / {write_amount(rate, 'FLOP/s')}"
        f" + {local} * {write_amount(attend_flop, 'FLOP')} attention / {write_amount(gpu.bf16_rate, 'FLOP/s')}"
    )
    if index_flop:
        text += f" + {local} * {write_amount(index_flop, 'FLOP')} indexer / {write_amount(index, 'FLOP/s')}"
    return Bound(seconds, (f"{times} stages * " if times > 1 else "") + text + ")", load.num_tokens)


def read_shares(placement: Placement) -> Shares:
    """Bytes of weights that a GPU reads in a step without speculation."""
    return placement.even_shares(
        lambda group: float(group_bytes(group, placement.weight_format)) if _is_read(group) else 0.0
    )


def _params(placement: Placement, choice: Choice) -> Shares:
    return placement.even_shares(lambda group: float(group.num_params) if choice(group) else 0.0)


def _touched_share(model: ModelShape, num_tokens: int) -> float:
    if not model.num_experts:
        return 0.0
    return 1.0 - (1.0 - model.num_experts_per_token / model.num_experts) ** num_tokens


def _expert_flop(model: ModelShape, expert_params: float) -> float:
    """Of one token, on a GPU with those parameters, its experts lying anywhere."""
    return 2 * expert_params * model.num_experts_per_token / model.num_experts if model.num_experts else 0.0


def _is_read(group: TensorGroup) -> bool:
    """In a step without speculation. Of an embedding, only the rows of the step's tokens are."""
    return not group.is_mtp and group.part is not Part.EMBEDDING
