"""A step that a graph can hold asks nothing of the device: no number of it is read by the host while it is launched.

On a GPU such a question would wait for everything launched before, and a capture would fail. In the interpreter nobody
would notice, so here every operation that reads is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from rempart_engine.gpu.buckets import Bucket, filling
from rempart_engine.gpu.copies import upload
from rempart_engine.gpu.rows import as_mapping, step_inputs
from rempart_engine.gpu.runner import GpuRunner
from rempart_engine.model.deepseek.config import Fp8Blocks
from rempart_engine.model.deepseek.testing import TINY, write_checkpoint
from rempart_engine.offline import LLM

READING = {
    torch.ops.aten._local_scalar_dense.default,  # .item(), bool(), int(), tolist()
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.bincount.default,
    torch.ops.aten.repeat_interleave.Tensor,
}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}


class _NothingIsRead(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING:
            raise AssertionError(f"{func} waits for the device")
        if func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1]):
            raise AssertionError(f"{func} by flags counts them first, and waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("numbers of the device are read by the host")

    with monkeypatch.context() as patch, _NothingIsRead():  # type: ignore[no-untyped-call]
        for name in ("numpy", "tolist", "item", "__bool__", "__int__"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


def small_step(folder: Path, **options: Any) -> tuple[GpuRunner, Any]:
    """A runner, and inputs of a step of two tokens that may see 128."""
    llm = LLM(folder, device="cuda", num_blocks=4, max_num_rows=4, max_model_len=128, max_graph_tokens=0, **options)
    runner = llm.model.runner
    assert isinstance(runner, GpuRunner)
    bucket = Bucket(2, 128)
    uploaded = upload(as_mapping(filling(bucket)), runner._rows.tokens.device)
    return runner, step_inputs(uploaded, runner._rows.tokens, bucket.max_context)


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda x: x.sum().item(), id="item"),
        pytest.param(lambda x: x[x > 1], id="flags as index"),
        pytest.param(lambda x: bool(x.any()), id="bool"),
        pytest.param(lambda x: x.numpy(), id="numpy"),
        pytest.param(lambda x: x.nonzero(), id="nonzero"),
    ],
)
def test_the_guard_notices_what_waits(monkeypatch: pytest.MonkeyPatch, read: Callable[[torch.Tensor], object]) -> None:
    x = torch.arange(4)
    with pytest.raises(AssertionError), nothing_is_read(monkeypatch):
        read(x)


def test_a_llama_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    runner, inputs = small_step(tmp_path, dtype="bfloat16")
    with nothing_is_read(monkeypatch):
        runner.compute(inputs)


@pytest.mark.parametrize(
    ("dtype", "cache"), [("auto", "fp8"), ("bfloat16", "auto"), ("int4", "auto")], ids=["fp8", "bfloat16", "int4"]
)
def test_a_deepseek_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, cache: str) -> None:
    """Contexts may exceed what the indexer chooses, so that scores and top-k are launched."""
    write_checkpoint(tmp_path, replace(TINY, fp8=Fp8Blocks(128, 128)))
    runner, inputs = small_step(tmp_path, dtype=dtype, kv_cache_dtype=cache, num_speculative_tokens=0)
    with nothing_is_read(monkeypatch):
        runner.compute(inputs)
