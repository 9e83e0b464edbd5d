"""A model's config.json as the tensors and the attention that follow from it."""

from dataclasses import dataclass

from rempart_platform.plan.attention import Attention, GroupedAttention, SparseAttention
from rempart_platform.plan.fields import Fields
from rempart_platform.plan.tensors import Part, Precision, TensorGroup
from rempart_platform.plan.weights import GROUP, WeightFormat

_SPARSE_TYPES = ("deepseek_v32", "glm_moe_dsa")
_MODEL_TYPES = (*_SPARSE_TYPES, "llama")
_INDEXER_LETTERS = {"F": "full", "S": "shared"}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What planning needs to know of a model."""

    name: str
    model_type: str
    num_layers: int
    max_model_len: int
    published: WeightFormat
    """Of its checkpoint."""
    tensors: tuple[TensorGroup, ...]
    attention: Attention
    num_experts: int = 0
    """Routed, of each layer that has them."""
    num_experts_per_token: int = 0
    num_expert_layers: int = 0
    num_mtp_layers: int = 0


def shape_from_config(config: Fields, name: str) -> ModelShape:
    """Raises PlanError naming the field that is missing or does not fit."""
    model_type = config.text("model_type")
    if model_type not in _MODEL_TYPES:
        raise config.error("model_type", f"must be one of {', '.join(_MODEL_TYPES)}, got {model_type!r}")
    return _sparse_shape(config, name) if model_type in _SPARSE_TYPES else _llama_shape(config, name)


def _published_format(config: Fields) -> WeightFormat:
    if not config.has("quantization_config"):
        return WeightFormat.BF16
    quantization = config.section("quantization_config")
    method = quantization.text("quant_method")
    if method != "fp8":
        raise quantization.error("quant_method", f"must be fp8, got {method!r}")
    block = quantization.values.get("weight_block_size")
    if block != [GROUP, GROUP]:
        raise quantization.error("weight_block_size", f"must be [{GROUP}, {GROUP}], got {block!r}")
    return WeightFormat.FP8


def _sparse_shape(config: Fields, name: str) -> ModelShape:
    num_layers = config.count("num_hidden_layers")
    num_dense = config.count("first_k_dense_replace", least=0)
    if num_dense >= num_layers:
        raise config.error("first_k_dense_replace", f"must be less than num_hidden_layers = {num_layers}")
    num_experts, chosen = config.count("n_routed_experts"), config.count("num_experts_per_tok")
    if chosen > num_experts:
        raise config.error("num_experts_per_tok", f"must be at most n_routed_experts = {num_experts}")
    num_mtp = config.count("num_nextn_predict_layers", 0, least=0)
    num_full = _num_full_indexers(config, num_layers)
    return ModelShape(
        name=name,
        model_type=config.text("model_type"),
        num_layers=num_layers,
        max_model_len=config.count("max_position_embeddings"),
        published=_published_format(config),
        tensors=(
            *_sparse_attention_tensors(config, num_layers, num_full),
            *_dense_mlp_tensors(config, num_dense),
            *_expert_tensors(config, num_layers - num_dense),
            *_top_tensors(config),
            *_mtp_tensors(config, num_mtp),
        ),
        attention=SparseAttention(
            num_layers=num_layers,
            num_index_layers=num_full,
            num_mtp_layers=num_mtp,
            num_heads=config.count("num_attention_heads"),
            latent_dim=config.count("kv_lora_rank"),
            rope_dim=config.count("qk_rope_head_dim"),
            nope_dim=config.count("qk_nope_head_dim"),
            value_dim=config.count("v_head_dim"),
            num_index_heads=config.count("index_n_heads"),
            index_dim=config.count("index_head_dim"),
            top_k=config.count("index_topk"),
        ),
        num_experts=num_experts,
        num_experts_per_token=chosen,
        num_expert_layers=num_layers - num_dense,
        num_mtp_layers=num_mtp,
    )


def _num_full_indexers(config: Fields, num_layers: int) -> int:
    """Layers with an indexer of their own: by a list, by a pattern, or by frequency and offset; all in DeepSeek's."""
    if config.has("indexer_types"):
        field, modes = "indexer_types", config.texts("indexer_types")
    elif config.has("index_topk_pattern"):
        field = "index_topk_pattern"
        modes = tuple(_INDEXER_LETTERS.get(letter, letter) for letter in config.text(field))
    else:
        frequency, offset = config.count("index_topk_freq", 1), config.count("index_skip_topk_offset", 2, least=0)
        return sum(max(layer - offset + 1, 0) % frequency == 0 for layer in range(num_layers))
    if len(modes) != num_layers or not set(modes) <= {"full", "shared"} or modes[0] != "full":
        raise config.error(field, f"must say full or shared for each of {num_layers} layers, full for the first")
    return modes.count("full")


def _sparse_attention_tensors(
    config: Fields, num_layers: int, num_index_layers: int, *, is_mtp: bool = False
) -> tuple[TensorGroup, ...]:
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    q_rank, rank, rope = (config.count(name) for name in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"))
    nope, value = config.count("qk_nope_head_dim"), config.count("v_head_dim")
    index_heads, index_dim = config.count("index_n_heads"), config.count("index_head_dim")

    def group(precision: Precision, rows: int, columns: int, count: int, *, is_split: bool = False) -> TensorGroup:
        return TensorGroup(Part.OTHER, precision, rows, columns, count, is_split, is_mtp)

    return (
        group(Precision.LINEAR, q_rank, hidden, num_layers),
        group(Precision.LINEAR, heads * (nope + rope), q_rank, num_layers, is_split=True),
        group(Precision.LINEAR, rank + rope, hidden, num_layers),
        group(Precision.LINEAR, heads * (nope + value), rank, num_layers, is_split=True),
        group(Precision.LINEAR, hidden, heads * value, num_layers, is_split=True),
        group(Precision.BF16, 1, hidden, 2 * num_layers),
        group(Precision.BF16, 1, q_rank, num_layers),
        group(Precision.BF16, 1, rank, num_layers),
        # The indexer is never cut: all ranks must choose the same tokens.
        group(Precision.LINEAR, index_heads * index_dim, q_rank, num_index_layers),
        group(Precision.LINEAR, index_dim, hidden, num_index_layers),
        group(Precision.BF16, index_heads, hidden, num_index_layers),
        group(Precision.F32, 1, index_dim, 2 * num_index_layers),
    )


def _dense_mlp_tensors(config: Fields, num_layers: int) -> tuple[TensorGroup, ...]:
    hidden, inner = config.count("hidden_size"), config.count("intermediate_size")
    return _mlp_tensors(Part.OTHER, Precision.LINEAR, hidden, inner, num_layers)


def _expert_tensors(config: Fields, num_layers: int, *, is_mtp: bool = False) -> tuple[TensorGroup, ...]:
    hidden, inner = config.count("hidden_size"), config.count("moe_intermediate_size")
    experts, shared = config.count("n_routed_experts"), config.count("n_shared_experts", least=0)
    routed = _mlp_tensors(Part.ROUTED_EXPERTS, Precision.BULK, hidden, inner, num_layers * experts, is_mtp=is_mtp)
    # However many shared experts there are, a checkpoint holds them as one that is as wide as all.
    whole = _mlp_tensors(Part.OTHER, Precision.LINEAR, hidden, inner * shared, num_layers, is_mtp=is_mtp)
    return (
        *routed,
        *(whole if shared else ()),
        TensorGroup(Part.OTHER, Precision.BF16, experts, hidden, num_layers, is_split=False, is_mtp=is_mtp),
        TensorGroup(Part.OTHER, Precision.F32, 1, experts, num_layers, is_split=False, is_mtp=is_mtp),
    )


def _mlp_tensors(
    part: Part, precision: Precision, hidden: int, inner: int, count: int, *, is_mtp: bool = False
) -> tuple[TensorGroup, ...]:
    """Gate and up, then down."""
    return (
        TensorGroup(part, precision, inner, hidden, 2 * count, is_mtp=is_mtp),
        TensorGroup(part, precision, hidden, inner, count, is_mtp=is_mtp),
    )


def _top_tensors(config: Fields) -> tuple[TensorGroup, ...]:
    """Embedding and head, of bf16, and the last norm."""
    hidden, vocab = config.count("hidden_size"), config.count("vocab_size")
    head = TensorGroup(Part.HEAD, Precision.BF16, vocab, hidden)
    if config.flag("tie_word_embeddings", False):
        embedding: tuple[TensorGroup, ...] = ()
    else:
        embedding = (TensorGroup(Part.EMBEDDING, Precision.BF16, vocab, hidden),)
    return (*embedding, head, TensorGroup(Part.OTHER, Precision.BF16, 1, hidden, is_split=False))


def _mtp_tensors(config: Fields, count: int) -> tuple[TensorGroup, ...]:
    """A whole expert layer, three norms, the projection that joins two hidden states, and copies of embedding and head.

    Serving aliases the copies; only the checkpoint has them.
    """
    if not count:
        return ()
    hidden, vocab = config.count("hidden_size"), config.count("vocab_size")
    return (
        *_sparse_attention_tensors(config, count, count, is_mtp=True),
        *_expert_tensors(config, count, is_mtp=True),
        TensorGroup(Part.OTHER, Precision.BF16, 1, hidden, 3 * count, is_split=False, is_mtp=True),
        TensorGroup(Part.OTHER, Precision.BF16, hidden, 2 * hidden, count, is_mtp=True),
        TensorGroup(Part.EMBEDDING, Precision.BF16, vocab, hidden, count, is_mtp=True),
        TensorGroup(Part.HEAD, Precision.BF16, vocab, hidden, count, is_mtp=True),
    )


def _llama_shape(config: Fields, name: str) -> ModelShape:
    num_layers, hidden = config.count("num_hidden_layers"), config.count("hidden_size")
    heads = config.count("num_attention_heads")
    kv_heads = config.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"must divide num_attention_heads = {heads}, got {kv_heads}")
    if not config.has("head_dim") and hidden % heads:
        raise config.error("hidden_size", f"must be a multiple of num_attention_heads = {heads}, got {hidden}")
    head_dim = config.count("head_dim", hidden // heads or None)
    return ModelShape(
        name=name,
        model_type="llama",
        num_layers=num_layers,
        max_model_len=config.count("max_position_embeddings"),
        published=_published_format(config),
        tensors=(
            TensorGroup(Part.OTHER, Precision.BULK, heads * head_dim, hidden, num_layers),
            TensorGroup(Part.OTHER, Precision.BULK, kv_heads * head_dim, hidden, 2 * num_layers),
            TensorGroup(Part.OTHER, Precision.BULK, hidden, heads * head_dim, num_layers),
            *_mlp_tensors(Part.OTHER, Precision.BULK, hidden, config.count("intermediate_size"), num_layers),
            TensorGroup(Part.OTHER, Precision.BF16, 1, hidden, 2 * num_layers, is_split=False),
            *_llama_biases(config, num_layers, heads * head_dim, kv_heads * head_dim),
            *_top_tensors(config),
        ),
        attention=GroupedAttention(num_layers, heads, kv_heads, head_dim),
    )


def _llama_biases(config: Fields, num_layers: int, q_dim: int, kv_dim: int) -> tuple[TensorGroup, ...]:
    hidden, inner = config.count("hidden_size"), config.count("intermediate_size")
    attention = (q_dim, kv_dim, kv_dim, hidden) if config.flag("attention_bias", False) else ()
    mlp = (inner, inner, hidden) if config.flag("mlp_bias", False) else ()
    return tuple(TensorGroup(Part.OTHER, Precision.BF16, 1, size, num_layers) for size in (*attention, *mlp))
