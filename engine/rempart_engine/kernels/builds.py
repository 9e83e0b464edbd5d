"""What is compiled ahead of time: every kernel at every configuration that is shipped."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rempart_engine.kernels.target import Target


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel as one launch has it. A module `kernels/<op>/kernel.py` lists its own in `builds(target)`."""

    name: str
    """For people, such as "decode, fp8 records, 128 heads"."""
    kernel: Any
    """The function under `@triton.jit`."""
    arguments: Mapping[str, str]
    """Types of the arguments that are no constants, as Triton writes them: "*bf16", "*fp32", "*u8", "i32", "fp32"."""
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    has_large_dot: bool = False
    """Its products are large enough for wgmma on sm_90, so that anything less needs a reason."""
    aligned: frozenset[str] | None = None
    """Pointers and numbers known to be multiples of 16; by default all pointers and no number."""
    spill_reason: str = ""
    """Why it may spill registers; empty: it may not."""
    slow_path_reason: str = ""
    """Why a large product may do without the best instruction on this target."""


ListBuilds = Callable[[Target], Iterator[Build]]
"""`builds(target)` of a kernel's module."""
