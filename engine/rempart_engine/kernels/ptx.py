"""What the compiler's texts say of a kernel: tensor-core instructions in PTX, resources in the log of `ptxas -v`."""

import re
from dataclasses import dataclass

_TENSOR_INSTRUCTION = re.compile(r"^\s*(?:@\S+\s+)?((?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)\.\S+)", re.MULTILINE)
_TCGEN05_KIND = re.compile(r"\.kind::(\w+)")
_OPERAND_TYPES = re.compile(r"\.(?:f32|f16|s32|f64)\.(\w+)\.\w+")
"""The accumulator's type, then those of both operands: ...m64n256k16.f32.bf16.bf16."""
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized due to (.+?) in ")


class UnknownLogError(Exception):
    """ptxas says nothing of registers."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kernel takes."""

    registers: int
    """Of one thread."""
    spill_bytes: int
    """Stored to and loaded from memory because registers ran out."""
    serialized_wgmma: str
    """Why products on sm_90 wait for one another; empty: they do not."""


def read_log(log: str) -> Usage:
    """Usage from the log of `ptxas -v`.

    Raises:
        UnknownLogError: it is no such log.
    """
    registers = [int(count) for count in _REGISTERS.findall(log)]
    if not registers:
        raise UnknownLogError(f"the log of ptxas names no registers: {log!r}")
    spills = sum(int(stores) + int(loads) for stores, loads in _SPILLS.findall(log))
    serialized = _SERIALIZED.search(log)
    return Usage(max(registers), spills, serialized[1] if serialized else "")


def tensor_instructions(ptx: str) -> tuple[str, ...]:
    """Tensor-core instructions with the type of their operands, such as "wgmma e4m3" or "mma.sync bf16".

    tcgen05 names a kind instead: f16 is half and bfloat16, f8f6f4 all narrow floats.
    """
    return tuple(sorted({_short(instruction) for instruction in _TENSOR_INSTRUCTION.findall(ptx)}))


def _short(instruction: str) -> str:
    if kind := _TCGEN05_KIND.search(instruction):
        return f"tcgen05 {kind[1]}"
    types = _OPERAND_TYPES.search(instruction)
    name = "wgmma" if instruction.startswith("wgmma") else "mma.sync"
    return f"{name} {types[1]}" if types else name
