"""Compiles one build for a GPU that need not be there."""

import contextlib
import importlib
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.ptx import Usage, read_log, tensor_instructions
from rempart_engine.kernels.target import Target


class ArgumentsError(Exception):
    """A build does not name each argument of its kernel once."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of one build on one target."""

    usage: Usage
    shared_bytes: int
    tensor_columns: int
    """Of tensor memory, which sm_100 has 512 of."""
    instructions: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The compiler refused."""

    reason: str


def compile_one(module: str, index: int, target: Target) -> Compiled | Failed:
    """The build at this place of `builds(target)` in a kernel's module.

    Triton must have been told by its environment to print the log of ptxas, and not to answer from a cache.
    """
    try:
        build = list(importlib.import_module(module).builds(target))[index]
        return _compile(build, target)
    except Exception as error:  # whatever the compiler raises belongs to this build, and others go on
        return Failed(f"{type(error).__name__}: {error}")


def _compile(build: Build, target: Target) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(build.kernel, signature_of(build), dict(build.constants), alignment_of(build))
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": True}
    log = io.StringIO()
    began = time.perf_counter()
    with contextlib.redirect_stdout(log):
        made = triton.compile(source, target=GPUTarget("cuda", target.capability, 32), options=options)
    seconds = time.perf_counter() - began
    return Compiled(
        read_log(log.getvalue()),
        made.metadata.shared,
        getattr(made.metadata, "tmem_size", None) or 0,
        tensor_instructions(made.asm["ptx"]),
        round(seconds, 2),
    )


def signature_of(build: Build) -> Mapping[str, str]:
    """The type of each argument, in order.

    Raises:
        ArgumentsError: one is missing, named twice, or unknown.
    """
    names: list[str] = build.kernel.arg_names
    given = [*build.arguments, *build.constants]
    if sorted(given) != sorted(names):
        raise ArgumentsError(f"the kernel has {', '.join(names)}; the build names {', '.join(given)}")
    return {name: build.arguments.get(name, "constexpr") for name in names}


def alignment_of(build: Build) -> Mapping[tuple[int], list[list[Any]]]:
    """What a launch finds out about pointers and numbers, by the place of the argument.

    Raises:
        ArgumentsError: the build calls something aligned that is no argument.
    """
    aligned = build.aligned
    if aligned is None:
        aligned = frozenset(name for name, kind in build.arguments.items() if kind.startswith("*"))
    if strangers := aligned - build.arguments.keys():
        raise ArgumentsError(f"aligned, but no arguments: {', '.join(sorted(strangers))}")
    places = {name: place for place, name in enumerate(build.kernel.arg_names)}
    return {(places[name],): [["tt.divisibility", 16]] for name in sorted(aligned)}
