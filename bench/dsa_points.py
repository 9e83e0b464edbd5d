"""What is computed and read where one layer of DeepSeek-V3.2 decodes, dense or sparse. Pure.

For each pair of a query and a key, counting a multiply and an add as two:

    indexer   2 * 64 heads * 128                         = 16,384 FLOP
    MQA       2 * 128 heads * (512 + 64 scores, 512 sum) = 278,528 FLOP

Dense attention is MQA with every key. Sparse attention is the indexer with every key and MQA with 2,048 of them at
most; up to 2,048 keys all are chosen, and nothing is scored. ReLU, softmax and top-k are not counted.
"""

from dataclasses import dataclass
from typing import Literal

from rempart_engine.model.deepseek.config import DeepseekConfig, IndexerConfig, MoEConfig, YarnScaling

Cache = Literal["bfloat16", "fp8", "float32"]
CACHES: tuple[Cache, ...] = ("bfloat16", "fp8", "float32")

V32 = DeepseekConfig(
    architecture="DeepseekV32ForCausalLM",
    vocab_size=129_280,
    hidden_size=7168,
    intermediate_size=18_432,
    num_layers=61,
    num_dense_layers=3,
    num_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_scaling=YarnScaling(factor=40.0, original_max_position_embeddings=4096),
    max_model_len=163_840,
    moe=MoEConfig(
        num_experts=256,
        num_shared_experts=1,
        num_experts_per_token=8,
        intermediate_size=2048,
        num_groups=8,
        num_chosen_groups=4,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
    indexer=IndexerConfig(num_heads=64, head_dim=128, top_k=2048, rope="half-split", is_full=(True,) * 61),
    num_mtp_layers=1,
)
"""The published shape."""

LATENT_BYTES: dict[Cache, int] = {"bfloat16": 2 * 576, "fp8": 512 + 4 * 4 + 2 * 64, "float32": 4 * 576}
"""Of one token's latent record."""
INDEX_BYTES: dict[Cache, int] = {"bfloat16": 2 * 128, "fp8": 128 + 4, "float32": 4 * 128}
"""Of one token's index key."""


@dataclass(frozen=True, slots=True)
class Case:
    """So many sequences, each with one new token that is the last of its context."""

    cache: Cache
    context: int
    batch: int

    @property
    def name(self) -> str:
        return f"{short(self.context)} x {self.batch}"

    @property
    def num_chosen(self) -> int:
        """Keys that sparse attention sees of one sequence."""
        return min(self.context, V32.indexer.top_k)


@dataclass(frozen=True, slots=True)
class Work:
    """What a step costs at least: each record read once, though its heads read it in groups, from the CPU's caches."""

    flop: int
    read_bytes: int


def dense_work(case: Case) -> Work:
    """All keys attended to."""
    return _attention(case, case.context)


def sparse_work(case: Case) -> Work:
    """All keys scored, the best attended to; the short cut where all are."""
    attended = _attention(case, case.num_chosen)
    if case.num_chosen == case.context:
        return attended
    num_pairs = case.batch * case.context
    flop_per_pair = 2 * V32.indexer.num_heads * V32.indexer.head_dim
    return Work(attended.flop + flop_per_pair * num_pairs, attended.read_bytes + INDEX_BYTES[case.cache] * num_pairs)


def _attention(case: Case, num_keys: int) -> Work:
    num_pairs = case.batch * num_keys
    width_of_scores, width_of_sum = V32.kv_lora_rank + V32.qk_rope_head_dim, V32.kv_lora_rank
    return Work(2 * V32.num_heads * (width_of_scores + width_of_sum) * num_pairs, LATENT_BYTES[case.cache] * num_pairs)


def score_matrix_bytes(num_queries: int, context: int) -> int:
    """What a float32 score for every query and key would take."""
    return 4 * num_queries * context


def short(num_tokens: int) -> str:
    """131072 as 128K."""
    return f"{num_tokens // 1024}K" if num_tokens % 1024 == 0 else f"{num_tokens:,}"
