"""Which layer applies a weight."""

from torch import nn

from rempart_engine.kernels.fp8_linear import Fp8Linear
from rempart_engine.model.precision import Precision
from rempart_engine.model.weights.weight import LinearFactory, Weight


def converting(precision: Precision) -> LinearFactory:
    """Layers that hold every weight as the precision does."""

    def make_linear(weight: Weight) -> nn.Module:
        return precision.make_linear(weight.dequantized(precision.dtype), None)

    return make_linear


def keeping_fp8(precision: Precision) -> LinearFactory:
    """Layers that hold fp8 weights as the checkpoint does, and others as the precision does."""
    convert = converting(precision)

    def make_linear(weight: Weight) -> nn.Module:
        if weight.scales is None or weight.block is None:
            return convert(weight)
        return Fp8Linear(weight.data, weight.scales, weight.block)

    return make_linear
