"""Every setting of an engine process: one frozen value, parsed once, defaults nowhere else."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rempart_engine.core.scheduler_config import MAX_SPECULATIVE_TOKENS

DeviceName = Literal["cpu", "cuda"]

BLOCK_SIZE = 64
"""Tokens per KV block, everywhere."""


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def available_cpus() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine process.

    Raises:
        ValueError: a value is out of its range; the message names the field.
    """

    model: Path = field(metadata=_help("GGUF file or folder of safetensors to serve"))
    served_model_name: str | None = field(default=None, metadata=_help("name to serve the model under"))
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4", "fp8"] = field(
        default="auto",
        metadata=_help(
            "numbers to compute in; fp8: weights as in the checkpoint; int8: weights and activations of linear "
            "layers on a CPU, weights of routed experts on a GPU; int4: weights of routed experts on a GPU"
        ),
    )
    kv_cache_dtype: Literal["auto", "fp8"] = field(
        default="auto",
        metadata=_help("numbers that KV blocks hold; auto: those computed in; fp8: DeepSeek's compact records"),
    )
    require_manifest: Path | None = field(
        default=None, metadata=_help("refuse to serve unless the model is as this manifest says (see rempart verify)")
    )
    manifest_key: Path | None = field(
        default=None, metadata=_help("and the manifest is signed by the owner of this ed25519 public key, a PEM file")
    )
    device: DeviceName = field(default="cpu", metadata=_help("where to compute; cuda: an NVIDIA GPU"))
    runner: str = field(
        default="rempart_engine.runner:load_runner", metadata=_help("module:callable that loads the model")
    )
    num_threads: int = field(
        default_factory=available_cpus, metadata=_help("threads of the engine core (default: available CPU cores)")
    )

    max_num_rows: int = field(default=64, metadata=_help("most sequences that run at once"))
    max_step_tokens: int = field(default=512, metadata=_help("most tokens computed in one step"))
    max_model_len: int | None = field(
        default=None, metadata=_help("most tokens of prompt and output together (default: the model's own)")
    )
    num_blocks: int | None = field(
        default=None, metadata=_help("KV blocks in the pool (default: as many as kv-cache-bytes holds)")
    )
    kv_cache_bytes: int | None = field(
        default=None,
        metadata=_help("memory for KV blocks (default: 1 GiB on a CPU; on a GPU what a trial step leaves)"),
    )
    gpu_memory_fraction: float = field(
        default=0.92, metadata=_help("most of a GPU's memory that weights, KV blocks and steps take together")
    )
    max_graph_tokens: int = field(
        default=64, metadata=_help("steps of so many tokens at most are replayed from CUDA graphs; 0: none is")
    )
    index_score_bytes: int = field(
        default=64 << 20, metadata=_help("memory for index scores; long prompts are scored in pieces that fit it")
    )
    expand_prefill_from: int | None = field(
        default=None,
        metadata=_help(
            "new tokens of a prompt from which attention that sees all tokens expands the latents; slower on the CPUs "
            "measured so far, and the last bits then depend on how prompts are cut (default: never)"
        ),
    )
    watermark: float = field(default=0.01, metadata=_help("fraction of KV blocks kept free when sequences are let in"))
    enable_prefix_cache: bool = field(default=True, metadata=_help("find KV blocks of equal prefixes again"))
    max_num_waiting: int = field(default=1024, metadata=_help("most requests that wait; more are refused"))
    num_speculative_tokens: int | None = field(
        default=None,
        metadata=_help(
            "draft tokens that a row verifies in a step, 0 to 3 (default: 1 if the model can draft, else 0)"
        ),
    )
    max_speculative_rows: int = field(
        default=16, metadata=_help("no drafts are made while more sequences than this run at once")
    )

    max_n: int = field(default=16, metadata=_help("most choices of a request"))
    max_logprobs: int = field(default=20, metadata=_help("most alternatives reported beside a token"))
    max_stop_token_ids: int = field(default=64, metadata=_help("most stop token ids of a request"))
    max_logit_bias: int = field(default=1024, metadata=_help("most logit bias entries of a request"))
    max_allowed_token_ids: int = field(default=4096, metadata=_help("most allowed token ids of a request"))

    host: str = field(default="127.0.0.1", metadata=_help("address to listen on"))
    port: int = field(default=50051, metadata=_help("gRPC port; 0 picks a free one"))
    metrics_port: int = field(default=50052, metadata=_help("Prometheus port; 0 picks a free one"))
    max_concurrent_streams: int = field(default=100, metadata=_help("most streams of one gRPC connection"))
    max_concurrent_rpcs: int = field(default=1024, metadata=_help("most gRPC calls at once; more are refused"))
    max_message_bytes: int = field(default=4 << 20, metadata=_help("largest gRPC message taken"))
    keepalive_s: float = field(default=30.0, metadata=_help("a silent gRPC connection is probed this often"))
    keepalive_timeout_s: float = field(default=10.0, metadata=_help("a probe unanswered this long closes it"))
    max_session_buffer_bytes: int = field(
        default=16 << 20, metadata=_help("a session with more events than this not taken by its caller is closed")
    )
    load_interval_s: float = field(default=1.0, metadata=_help("pace of load updates on sessions"))

    step_timeout_s: float = field(default=60.0, metadata=_help("an engine core silent this long counts as hung"))
    drain_timeout_s: float = field(default=30.0, metadata=_help("running requests may take this long on SIGTERM"))
    log_level: Literal["debug", "info", "warning", "error"] = field(
        default="info", metadata=_help("least level logged")
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            _require_in_range(spec.name, getattr(self, spec.name))
        if self.runner.count(":") != 1:
            raise ValueError(f"runner must be module:callable, got {self.runner!r}")
        if not 0.0 <= self.watermark < 1.0:
            raise ValueError(f"watermark must be in [0, 1), got {self.watermark}")
        if not 0.0 < self.gpu_memory_fraction <= 1.0:
            raise ValueError(f"gpu_memory_fraction must be in (0, 1], got {self.gpu_memory_fraction}")
        if self.manifest_key is not None and self.require_manifest is None:
            raise ValueError("manifest_key goes with require_manifest")
        if (self.num_speculative_tokens or 0) > MAX_SPECULATIVE_TOKENS:
            raise ValueError(
                f"num_speculative_tokens must be at most {MAX_SPECULATIVE_TOKENS}, got {self.num_speculative_tokens}"
            )

    def num_drafts_with(self, num_mtp_layers: int) -> int:
        """Draft tokens a row with a model that has so many MTP layers; one layer, applied again, drafts any number.

        Raises:
            ValueError: drafts are asked for, but the model has nothing to draft with.
        """
        if self.num_speculative_tokens is None:
            return 1 if num_mtp_layers else 0
        if self.num_speculative_tokens and not num_mtp_layers:
            raise ValueError(
                f"num_speculative_tokens is {self.num_speculative_tokens}, but the model has no MTP layer to draft with"
            )
        return self.num_speculative_tokens

    @classmethod
    def from_args(cls, args: Sequence[str]) -> "EngineConfig":
        """Parse command-line flags, one per field; prints usage and exits with code 2 on a bad one."""
        parser = argparse.ArgumentParser(
            prog="rempart engine", description="Serve one model: token ids in, token ids out.", allow_abbrev=False
        )
        hints = get_type_hints(cls)
        for spec in fields(cls):
            _add_flag(parser, spec, hints[spec.name])
        try:
            return cls(**vars(parser.parse_args(args)))
        except ValueError as error:
            parser.error(str(error))


_MAY_BE_ZERO = frozenset(
    {
        "port",
        "metrics_port",
        "watermark",
        "max_logprobs",
        "drain_timeout_s",
        "num_speculative_tokens",
        "max_graph_tokens",
    }
)


def _require_in_range(name: str, setting: object) -> None:
    """Numbers are positive, or not negative where zero has a meaning; ports fit 16 bits."""
    if isinstance(setting, bool) or not isinstance(setting, int | float):
        return
    if name in _MAY_BE_ZERO and not setting >= 0:
        raise ValueError(f"{name} must not be negative, got {setting}")
    if name not in _MAY_BE_ZERO and not setting > 0:
        raise ValueError(f"{name} must be positive, got {setting}")
    if name.endswith("port") and setting > 0xFFFF:
        raise ValueError(f"{name} must be at most 65535, got {setting}")


def _add_flag(parser: argparse.ArgumentParser, spec: Field[Any], hint: Any) -> None:
    flag = "--" + spec.name.replace("_", "-")
    kind = hint
    if isinstance(hint, UnionType):
        (kind,) = (member for member in get_args(hint) if member is not NoneType)
    text = spec.metadata["help"].replace("%", "%%")
    if spec.default is MISSING and spec.default_factory is MISSING:
        parser.add_argument(flag, type=kind, required=True, help=text)
        return
    default = spec.default if spec.default_factory is MISSING else spec.default_factory()
    if spec.default is not MISSING and spec.default is not None:
        text = f"{text} (default: {spec.default})"
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
    elif get_origin(kind) is Literal:
        parser.add_argument(flag, choices=get_args(kind), default=default, help=text)
    else:
        parser.add_argument(flag, type=kind, default=default, help=text)
