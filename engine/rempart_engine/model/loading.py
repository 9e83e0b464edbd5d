"""From a weights source to a model, layer by layer: raw and packed weights never lie side by side as a whole."""

from collections import defaultdict
from collections.abc import Callable

import torch

from rempart_engine.model.llama import Llama, LlamaLayer
from rempart_engine.model.precision import Precision
from rempart_engine.model.weights.names import expected_shapes
from rempart_engine.model.weights.source import LlamaWeights


def load_llama(
    source: LlamaWeights, precision: Precision, max_model_len: int, on_progress: Callable[[float], None]
) -> Llama:
    """Read and pack all weights.

    Args:
        on_progress: told the fraction that is loaded, up to 1.

    Raises:
        ModelError: a tensor cannot be read.
    """
    config = source.config
    names_per_layer = sum(name.startswith("layers.0.") for name in expected_shapes(config))
    layers: dict[int, LlamaLayer] = {}
    waiting: defaultdict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    outside: dict[str, torch.Tensor] = {}
    for count, (name, tensor) in enumerate(source.tensors(precision.dtype), 1):
        if name.startswith("layers."):
            _, number, below = name.split(".", 2)
            index = int(number)
            waiting[index][below] = tensor
            if len(waiting[index]) == names_per_layer:
                layers[index] = LlamaLayer(config, waiting.pop(index), precision.make_linear)
        else:
            outside[name] = tensor
        on_progress(count / source.num_tensors)
    model = Llama(
        config, [layers[index] for index in range(config.num_layers)], outside, precision.make_linear, max_model_len
    )
    return model.to(precision.placement.device)
