"""What is measured on a GPU: points, what was aimed at, what was found. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from bench.dsa_points import V32
from bench.gpu_work import Rates, Work, Works, floor_s

from rempart_engine.model.deepseek.config import DeepseekConfig, IndexerConfig, MoEConfig

NOT_TIMED = "right, not timed"
"""A refusal where there is no GPU."""
PROMPTS = "model, prompts"
"""The group of steps that are full of prompts."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What a point should reach; one of the numbers says it."""

    text: str
    at_most_s: float | None = None
    flop_per_s: float | None = None
    of_bandwidth: float | None = None
    times_floor: float | None = None

    def limit_s(self, works: Works, rates: Rates) -> float:
        """Seconds that this allows."""
        if self.at_most_s is not None:
            return self.at_most_s
        if self.flop_per_s is not None:
            return sum(work.flop for work in works) / self.flop_per_s
        if self.of_bandwidth is not None:
            return sum(work.num_bytes for work in works) / (self.of_bandwidth * rates.bytes_per_s)
        assert self.times_floor is not None, "an aim has a number"
        return self.times_floor * floor_s(works, rates)


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One operation at one shape, its inputs made."""

    group: str
    name: str
    works: Works
    run: Callable[[], Any]
    check: Callable[[Any], None]
    """Raises `WrongAnswerError` if what `run` returned is wrong."""
    aim: Aim | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found at a point. Without seconds it is not reported as fast or slow: `refusal` says why."""

    group: str
    name: str
    works: Works
    aim: Aim | None = None
    seconds: tuple[float, ...] = ()
    """From a CUDA graph where one can be made, each after the L2 cache was emptied; else as launched."""
    launched_seconds: tuple[float, ...] = ()
    """The same without a graph: Python's time between launches counts where it is longer."""
    not_in_graph: str = ""
    """Why no CUDA graph can hold it."""
    refusal: str = ""
    """Why there is no number."""

    @property
    def median_s(self) -> float:
        """Raises StatisticsError where nothing was timed."""
        return median(self.seconds)

    def of_floor(self, rates: Rates) -> float:
        """Fraction of the best that is possible: floor / measured."""
        return floor_s(self.works, rates) / self.median_s

    def reaches_aim(self, rates: Rates) -> bool | None:
        """None without an aim."""
        return None if self.aim is None else self.median_s <= self.aim.limit_s(self.works, rates)


def experts_name(num_experts: int, num_tokens: int) -> str:
    """Of the point at which so many experts compute so many tokens."""
    return f"{num_experts} in fp8 x {num_tokens}"


def measured_from(line: Mapping[str, Any]) -> Measured:
    """Back from what `dataclasses.asdict` and JSON made of it."""
    return Measured(
        **{
            **line,
            "works": tuple(Work(**work) for work in line["works"]),
            "aim": None if line["aim"] is None else Aim(**line["aim"]),
            "seconds": tuple(line["seconds"]),
            "launched_seconds": tuple(line["launched_seconds"]),
        }
    )


@dataclass(frozen=True, slots=True)
class Slice:
    """Which layers of the model, and how steps are launched."""

    num_moe_layers: int
    with_graphs: bool

    def config(self, model: DeepseekConfig) -> DeepseekConfig:
        """The model with all its dense layers and a few of the others."""
        num_layers = model.num_dense_layers + self.num_moe_layers
        indexer = replace(model.indexer, is_full=(True,) * num_layers)
        return replace(model, num_layers=num_layers, num_mtp_layers=0, indexer=indexer)

    @property
    def name(self) -> str:
        return f"{self.num_moe_layers} layers with experts, {'graphs' if self.with_graphs else 'no graphs'}"


def decode_name(part: Slice, batch: int) -> str:
    """Of the point at which a slice decodes so many sequences."""
    return f"{part.name}, decode x {batch}"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large everything is."""

    model: DeepseekConfig
    batches: tuple[int, ...]
    """Sequences that decode at once."""
    attention_batch: int
    """Of the aims of sparse attention."""
    score_batch: int
    """Of the aims of index scores and top-k."""
    contexts: tuple[int, ...]
    num_queries: int
    """Of a prompt's chunk."""
    prompt_context: int
    """In which that chunk comes last."""
    layer_prompts: tuple[int, ...]
    """Contexts in which sparse and dense compute that chunk."""
    decode_context: int
    """Of every sequence when a slice of the model decodes."""
    decode_steps: int
    slices: tuple[Slice, ...]

    @property
    def longest(self) -> int:
        return self.contexts[-1]


NUM_MOE_LAYERS = 2
"""Of the larger slices; 11 GB of experts each."""
DENSE_ONLY, WITH_EXPERTS, WITHOUT_GRAPHS = (
    Slice(0, with_graphs=True),
    Slice(NUM_MOE_LAYERS, with_graphs=True),
    Slice(NUM_MOE_LAYERS, with_graphs=False),
)

FULL = Sizes(
    model=V32,
    batches=(1, 8, 32, 128),
    attention_batch=128,
    score_batch=64,
    contexts=(2048, 8192, 32_768, 131_072),
    num_queries=4096,
    prompt_context=32_768,
    layer_prompts=(8192, 32_768, 131_072),
    decode_context=4096,
    decode_steps=40,
    slices=(DENSE_ONLY, WITH_EXPERTS, WITHOUT_GRAPHS),
)
"""The published shapes."""

TINY = Sizes(
    model=replace(
        V32,
        vocab_size=320,
        num_dense_layers=1,
        hidden_size=256,
        intermediate_size=128,
        num_heads=3,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_rope_head_dim=16,
        moe=MoEConfig(16, 1, 2, 128, 4, 2, norm_topk_prob=True, routed_scaling_factor=2.5),
        indexer=IndexerConfig(num_heads=5, head_dim=32, top_k=32, rope="half-split", is_full=(True,) * 61),
    ),
    batches=(1, 2),
    attention_batch=2,
    score_batch=2,
    contexts=(32, 150),
    num_queries=40,
    prompt_context=100,
    layer_prompts=(100,),
    decode_context=36,
    decode_steps=2,
    slices=(Slice(1, with_graphs=True),),
)
"""Does everything run, and right? For machines without a GPU."""
