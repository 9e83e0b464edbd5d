"""From a DeepSeek folder to a model: weights are read as the layers that hold them are made."""

from collections.abc import Callable

from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.cpu_parts import CpuParts
from rempart_engine.model.deepseek.gpu_parts import GpuParts
from rempart_engine.model.deepseek.layer import DeepseekLayer
from rempart_engine.model.deepseek.model import Deepseek
from rempart_engine.model.deepseek.mtp import MTP
from rempart_engine.model.deepseek.names import expected_tensors, layer_tensors
from rempart_engine.model.deepseek.options import AttentionOptions
from rempart_engine.model.deepseek.parts import Parts
from rempart_engine.model.precision import Precision
from rempart_engine.model.weights.deepseek_folder import DeepseekFolder, StoredWeights, WeightsBelow
from rempart_engine.model.weights.heap import freed_memory_returned

_EXPERTS = "mlp.experts."


def load_deepseek(
    source: DeepseekFolder,
    precision: Precision,
    max_model_len: int,
    on_progress: Callable[[float], None],
    *,
    load_mtp: bool = True,
    options: AttentionOptions = AttentionOptions(),  # noqa: B008 -- frozen
) -> Deepseek:
    """Read all weights, layer by layer and expert by expert.

    What is made is all that is kept. Beside it there is at most one layer's share of weights as stored, routed experts
    left out (0.6 GB of DeepSeek-V3.2), or one weight on its way between formats.

    Args:
        on_progress: told the fraction that is loaded, up to 1.
        load_mtp: read the MTP layer, if there is one.
        options: how attention computes.

    Raises:
        ModelError: a tensor cannot be read, or a scale is not a positive number.
    """
    config = source.config
    has_mtp = load_mtp and config.num_mtp_layers > 0
    weights = source.weights(_counted(config, has_mtp, on_progress))
    parts = _parts_of(precision)

    def layer(index: int) -> DeepseekLayer:
        return _layer(config, index, weights, parts, options)

    with freed_memory_returned():
        layers = [layer(index) for index in range(config.num_layers)]
        mtp = None
        if has_mtp:
            own = WeightsBelow(weights, f"layers.{config.num_layers}.")
            mtp = MTP(config, own, layer(config.num_layers), parts)
        return Deepseek(config, layers, weights, parts, max_model_len, mtp)


def _parts_of(precision: Precision) -> Parts:
    return GpuParts(precision) if precision.placement.uses_triton else CpuParts(precision)


def _layer(
    config: DeepseekConfig,
    index: int,
    weights: StoredWeights,
    parts: Parts,
    options: AttentionOptions,
) -> DeepseekLayer:
    own = WeightsBelow(weights, f"layers.{index}.")
    experts = None
    if index >= config.num_dense_layers:
        experts = parts.experts(config, lambda number: WeightsBelow(own, f"{_EXPERTS}{number}."))
    others = {name: own[name] for name in layer_tensors(config, index) if not name.startswith(_EXPERTS)}
    return DeepseekLayer(config, index, others, experts, parts, options)


def _counted(config: DeepseekConfig, has_mtp: bool, on_progress: Callable[[float], None]) -> Callable[[str], None]:
    """Turns names of weights that were read into the fraction that is loaded."""
    mtp = f"layers.{config.num_layers}."
    unread = {name for name in expected_tensors(config) if has_mtp or not name.startswith(mtp)}
    total = len(unread)

    def on_read(name: str) -> None:
        unread.discard(name)
        on_progress(1.0 - len(unread) / total)

    return on_read
