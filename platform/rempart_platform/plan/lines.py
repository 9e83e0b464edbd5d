"""What a plan says: lines of a name, a value and the formula that gives it; and how amounts are written."""

from dataclasses import dataclass
from enum import StrEnum

_STEPS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


class Unit(StrEnum):
    """Of a line's value."""

    BYTES = "B"
    PARAMS = "params"
    FLOP = "FLOP"
    SECONDS = "s"
    TOKENS_PER_SECOND = "tokens/s"
    COUNT = "count"
    RATIO = "ratio"
    MONEY = "money"
    """Per million tokens; the label names the currency."""
    WORDS = "words"


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that a plan says.

    Args:
        key: its name for programs, unique in its section.
        value: in `unit`; None when it is not known or cannot be, and then `note` says why.
        formula: `value`, spelled out with numbers; words in it explain them, `;` parts arguments, `^` is a power.
    """

    key: str
    label: str
    value: float | str | None
    unit: Unit
    formula: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """Lines that belong together; `machine` names the machine that they are about, if any."""

    key: str
    title: str
    lines: tuple[Line, ...]
    machine: str | None = None


def write(value: float | str | None, unit: Unit) -> str:
    """For people, to five digits."""
    if value is None:
        return "unknown"
    if isinstance(value, str):
        return value
    match unit:
        case Unit.BYTES | Unit.FLOP:
            return write_amount(value, unit)
        case Unit.PARAMS:
            return write_params(value)
        case Unit.SECONDS:
            return f"{_digits(value)} s" if value >= 1 else f"{_digits(value * 1e3)} ms"
        case Unit.TOKENS_PER_SECOND:
            return f"{_digits(value)} tokens/s"
        case Unit.RATIO | Unit.MONEY:
            return _digits(value)
        case Unit.COUNT | Unit.WORDS:
            return f"{value:,.0f}"


def write_amount(value: float, unit: str) -> str:
    """As 48,068 B, 689.47 GB, 1.979 PFLOP/s."""
    for step, prefix in _STEPS:
        if value >= step:
            return f"{value / step:.5g} {prefix}{unit}"
    return f"{_digits(value)} {unit}"


def write_params(value: float) -> str:
    """In billions, `bn`."""
    return f"{value / 1e9:.5g} bn"


def _digits(value: float) -> str:
    if value == round(value) or value >= 1e4:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if value >= 1e3 else f"{value:.4g}"
