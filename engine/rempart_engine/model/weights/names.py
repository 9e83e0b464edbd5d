"""One naming of a Llama model's tensors, and the shapes they must have.

The names are those of Hugging Face without the leading `model.`: `embed_tokens.weight`,
`layers.{i}.self_attn.q_proj.weight`, `norm.weight`, `lm_head.weight`.
"""

from collections.abc import Iterable, Mapping

from rempart_engine.model.config import LlamaConfig
from rempart_engine.model.errors import ModelError

Shape = tuple[int, ...]

_MAX_NAMES_IN_MESSAGE = 5


def expected_shapes(config: LlamaConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of the model; no `lm_head.weight` when it is tied to the embedding."""
    shapes: dict[str, Shape] = {"embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    layer = _layer_shapes(config)
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def check_tensors(config: LlamaConfig, shapes: Mapping[str, Shape], origin: str) -> None:
    """Refuse tensors that are missing, extra or misshapen.

    Raises:
        ModelError: names them and `origin`, the file or folder.
    """
    expected = expected_shapes(config)
    problems = []
    if missing := expected.keys() - shapes.keys():
        problems.append(f"missing {listed(missing)}")
    if extra := shapes.keys() - expected.keys():
        problems.append(f"unexpected {listed(extra)}")
    misshapen = [
        f"{name} is {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if misshapen:
        problems.append(f"misshapen {listed(misshapen)}")
    if problems:
        raise ModelError(f"{origin}: tensors do not fit the model's configuration: {'; '.join(problems)}")


def _layer_shapes(config: LlamaConfig) -> dict[str, Shape]:
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, Shape] = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    for projection, rows, columns, has_bias in (
        ("self_attn.q_proj", queries, width, config.attention_bias),
        ("self_attn.k_proj", keys, width, config.attention_bias),
        ("self_attn.v_proj", keys, width, config.attention_bias),
        ("self_attn.o_proj", width, queries, config.attention_bias),
        ("mlp.gate_proj", inner, width, config.mlp_bias),
        ("mlp.up_proj", inner, width, config.mlp_bias),
        ("mlp.down_proj", width, inner, config.mlp_bias),
    ):
        shapes[f"{projection}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{projection}.bias"] = (rows,)
    return shapes


def listed(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    ordered = sorted(names)
    rest = len(ordered) - _MAX_NAMES_IN_MESSAGE
    return ", ".join(ordered[:_MAX_NAMES_IN_MESSAGE]) + (f" and {rest} more" if rest > 0 else "")
