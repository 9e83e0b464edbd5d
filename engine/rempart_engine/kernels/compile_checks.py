"""What is refused of a compiled kernel, and the table that shows all of them. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.compile_one import Compiled, Failed
from rempart_engine.kernels.target import Target

_TENSOR_COLUMNS = 512
_HEAD = ("kernel", "build", "arch", "registers", "shared", "spill", "tensor cores", "s")
_NUM_TEXT_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One build on one target."""

    operation: str
    """Its folder below kernels/."""
    build: Build
    target: Target
    result: Compiled | Failed

    @property
    def name(self) -> str:
        return f"{self.operation}, {self.build.name}, sm_{self.target.capability}"


def best_instruction(target: Target) -> str:
    """What large products should use."""
    if target.capability // 10 == 9:
        return "wgmma"
    return "tcgen05" if target.capability // 10 == 10 else "mma.sync"


def problems(row: Row) -> Iterator[str]:
    """Everything that is refused, each with its name. A reason counts only where it is needed."""
    if isinstance(row.result, Failed):
        yield f"{row.name}: does not compile: {row.result.reason}"
        return
    for text in (*_sizes(row, row.result), *_spills(row, row.result), *_products(row, row.result)):
        yield f"{row.name}: {text}"


def _sizes(row: Row, found: Compiled) -> Iterator[str]:
    if found.shared_bytes > row.target.shared_bytes:
        yield f"takes {found.shared_bytes:,} bytes of shared memory, {row.target.shared_bytes:,} are there"
    if found.tensor_columns > _TENSOR_COLUMNS:
        yield f"takes {found.tensor_columns} columns of tensor memory, {_TENSOR_COLUMNS} are there"


def _spills(row: Row, found: Compiled) -> Iterator[str]:
    spilled, reason = found.usage.spill_bytes, row.build.spill_reason
    if spilled and not reason:
        yield f"spills {spilled:,} bytes without a spill_reason"
    if reason and not spilled:
        yield "has a spill_reason but does not spill"


def _products(row: Row, found: Compiled) -> Iterator[str]:
    slow, reason = slowness(row, found), row.build.slow_path_reason
    if slow and not reason:
        yield f"{slow}, without a slow_path_reason"
    if reason and not slow:
        yield "has a slow_path_reason but is on no slow path"


def slowness(row: Row, found: Compiled) -> str:
    """Why its large product is slow; empty: it has none, or is as fast as the target can."""
    if not row.build.has_large_dot:
        return ""
    best = best_instruction(row.target)
    if not any(instruction.startswith(best) for instruction in found.instructions):
        return f"its large product uses {', '.join(found.instructions) or 'no tensor core'}, not {best}"
    if found.usage.serialized_wgmma:
        return f"its products wait for one another: {found.usage.serialized_wgmma}"
    return ""


def reasons(rows: Sequence[Row]) -> list[str]:
    """The written list: every spill and every slow path that is explained."""
    return [
        f"{row.name}: {reason}"
        for row in rows
        for reason in (row.build.spill_reason, row.build.slow_path_reason)
        if reason
    ]


def table(rows: Sequence[Row]) -> str:
    """For people: text to the left, numbers to the right."""
    lines = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < _NUM_TEXT_COLUMNS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    head = (row.operation, row.build.name, f"sm_{row.target.capability}")
    found = row.result
    if isinstance(found, Failed):
        return (*head, "", "", "", "does not compile", "")
    numbers = (str(found.usage.registers), f"{found.shared_bytes:,}", f"{found.usage.spill_bytes:,}")
    return (*head, *numbers, ", ".join(found.instructions) or "-", f"{found.seconds:.1f}")


def row_json(row: Row) -> dict[str, object]:
    """The same for programs."""
    head = {"kernel": row.operation, "build": row.build.name, "capability": row.target.capability}
    return {**head, **asdict(row.result), "problems": list(problems(row))}
