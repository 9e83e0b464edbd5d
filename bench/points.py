"""What is measured of an engine, what the machine's limits allow there, and how engines compare. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Point:
    """So many requests at once, of so many tokens each way. All prompts differ."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def is_prefill(self) -> bool:
        """Whether the prompt is what counts."""
        return self.num_output_tokens == 1

    @property
    def num_counted_tokens(self) -> int:
        """What a rate counts: output tokens, or prompt tokens where there is one output token only."""
        return self.num_requests * (self.num_prompt_tokens if self.is_prefill else self.num_output_tokens)

    @property
    def name(self) -> str:
        if self.is_prefill:
            return f"prefill, {self.num_prompt_tokens:,} in"
        return f"{self.num_requests} at once, {self.num_prompt_tokens} in, {self.num_output_tokens} out"


FULL = (Point(1, 128, 64), Point(8, 128, 64), Point(32, 128, 64), Point(1, 1024, 1))
QUICK = (Point(1, 16, 8), Point(8, 16, 8), Point(32, 16, 8), Point(1, 128, 1))


def prompts(point: Point, vocab_size: int) -> list[list[int]]:
    """Token ids of the point's prompts; the first hundred ids, where special tokens are, do not occur."""
    span = vocab_size - 100
    return [
        [100 + (place * 7 + request * 13 + place * place % 31) % span for place in range(point.num_prompt_tokens)]
        for request in range(point.num_requests)
    ]


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What decides how fast a dense model can be."""

    num_layer_parameters: int
    """Of the matrices in all layers."""
    num_head_parameters: int
    """Of the output head, which only the last token of a sequence needs."""
    num_layers: int
    attention_width: int
    """Query heads times head dim."""
    bytes_per_parameter: float

    @property
    def weight_bytes(self) -> float:
        """What every step reads."""
        return (self.num_layer_parameters + self.num_head_parameters) * self.bytes_per_parameter


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do, measured."""

    stream_bytes_per_s: float
    gemm_flop_per_s: float


def bound(point: Point, size: ModelSize, limits: Limits) -> float:
    """Counted tokens/s that these limits allow at most, if memory and arithmetic overlap perfectly.

    Every step reads all weights once and multiplies them with every new token; causal attention counts for prompts
    only. A model in narrower weights than `size` says, or one whose weights stay in the caches, can be above it.
    """
    prompt_flop = 2 * size.num_layer_parameters * point.num_prompt_tokens + 2 * size.num_head_parameters
    # Scores and weighted sum, each 2 FLOP for each of T^2 / 2 pairs and each channel.
    prompt_flop += 2 * size.num_layers * size.attention_width * point.num_prompt_tokens**2
    step_flop = 2 * (size.num_layer_parameters + size.num_head_parameters) * point.num_requests
    read_s = size.weight_bytes / limits.stream_bytes_per_s
    prefill_s = max(prompt_flop * point.num_requests / limits.gemm_flop_per_s, read_s)
    step_s = max(step_flop / limits.gemm_flop_per_s, read_s)
    return point.num_counted_tokens / (prefill_s + (point.num_output_tokens - 1) * step_s)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours against the best of the others at one point."""

    best_peer: str
    """Of all rounds' medians."""
    ratio: float
    """Median over rounds of our rate over the fastest peer's of that round: noise that lasts a round cancels."""


def compare(ours: str, rates: Mapping[str, Sequence[float]]) -> Comparison | None:
    """None without peers.

    Args:
        ours: which name is ours.
        rates: for each name one rate a round, in the order of rounds.
    """
    peers = {name: of_peer for name, of_peer in rates.items() if name != ours}
    if not peers:
        return None
    rounds = zip(rates[ours], zip(*peers.values(), strict=True), strict=True)
    best = max(peers, key=lambda name: median(peers[name]))
    return Comparison(best, median(our_rate / max(of_peers) for our_rate, of_peers in rounds))
