"""Whether the tensors of a folder are those of a DeepSeek sparse-attention model."""

from collections.abc import Iterator, Mapping

from rempart_engine.model.deepseek.config import DeepseekConfig, Fp8Blocks
from rempart_engine.model.deepseek.names import SCALE_SUFFIX, TensorSpec, expected_tensors, mtp_copies
from rempart_engine.model.errors import ModelError
from rempart_engine.model.weights.names import listed
from rempart_engine.model.weights.shards import StoredTensor

_FLOATS = frozenset({"F32", "F16", "BF16"})
_FP8 = "F8_E4M3"
_SCALES = frozenset({"F32", "F8_E8M0"})

_Stored = Mapping[str, StoredTensor]


def check_tensors(config: DeepseekConfig, stored: _Stored, origin: str) -> None:
    """Refuse tensors that are missing, extra, misshapen or of the wrong type.

    The MTP layer's copies of the embedding and the head may be there or not: they are never read.

    Raises:
        ModelError: names them and `origin`, the folder.
    """
    specs = expected_tensors(config)
    copies = {name: specs[of] for name, of in mtp_copies(config).items() if name in stored}
    scales = {
        name + SCALE_SUFFIX: spec for name, spec in specs.items() if name in stored and stored[name].dtype == _FP8
    }
    known = specs.keys() | copies.keys() | scales.keys()
    problems = {
        "missing": (specs.keys() | scales.keys()) - stored.keys(),
        "unexpected": stored.keys() - known,
        "misshapen": set(_misshapen(specs | copies, scales, stored, config.fp8)),
        "of the wrong type": set(_of_wrong_type(specs | copies, scales, stored, config.fp8)),
    }
    named = [f"{kind} {listed(names)}" for kind, names in problems.items() if names]
    if named:
        raise ModelError(f"{origin}: tensors do not fit the model's configuration: {'; '.join(named)}")


def _misshapen(
    specs: Mapping[str, TensorSpec], scales: Mapping[str, TensorSpec], stored: _Stored, blocks: Fp8Blocks | None
) -> Iterator[str]:
    shapes = {name: spec.shape for name, spec in specs.items()}
    if blocks is not None:
        for name, spec in scales.items():
            if spec.may_be_fp8:
                rows, columns = spec.shape
                shapes[name] = (-(-rows // blocks.block_rows), -(-columns // blocks.block_columns))
    for name, shape in shapes.items():
        if name in stored and stored[name].shape != shape:
            yield f"{name} is {list(stored[name].shape)} instead of {list(shape)}"


def _of_wrong_type(
    specs: Mapping[str, TensorSpec], scales: Mapping[str, TensorSpec], stored: _Stored, blocks: Fp8Blocks | None
) -> Iterator[str]:
    for name, spec in specs.items():
        dtype = stored[name].dtype if name in stored else "F32"
        if dtype == _FP8 and not spec.may_be_fp8:
            yield f"{name} is in fp8, which only projections may be"
        elif dtype == _FP8 and blocks is None:
            yield f"{name} is in fp8, and config.json has no quantization_config"
        elif dtype != _FP8 and dtype not in _FLOATS:
            yield f"{name} is {dtype}"
    for name in scales:
        if name in stored and stored[name].dtype not in _SCALES:
            yield f"{name} is {stored[name].dtype}"
