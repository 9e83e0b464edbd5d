"""Every formula that a plan shows gives the value beside it, worked out from the text alone."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from rempart_platform.plan.attention import CacheFormat
from rempart_platform.plan.lines import Line, Section, Unit, write, write_amount
from rempart_platform.plan.machine_report import machine_sections, overview
from rempart_platform.plan.machines import Gpu, Machine, Price, read_machines, read_support
from rempart_platform.plan.model_report import model_sections
from rempart_platform.plan.placement import Setup
from rempart_platform.plan.question import Question, ask
from rempart_platform.plan.weights import WeightFormat

FUNCTIONS = {"max": max, "min": min, "floor": math.floor}
PREFIXES = {"M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
UNITS = {
    **{prefix + unit: scale for prefix, scale in PREFIXES.items() for unit in ("B", "B/s", "FLOP", "FLOP/s")},
    **{"bn": 1e9, "ms": 1e-3},
}
TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+|\d+)(?P<rest>\.\d+)?(?: (?P<unit>[A-Za-z]+(?:/s)?))?|[A-Za-z]+(?:/s)?"
)


def evaluate(formula: str) -> float:
    """Numbers with their units, operators and functions; any other word explains, and is dropped."""

    def translated(match: re.Match[str]) -> str:
        if match["number"] is None:
            return match[0] if match[0] in FUNCTIONS else ""
        value = float(match["number"].replace(",", "") + (match["rest"] or ""))
        return repr(value * UNITS.get(match["unit"] or "", 1.0))

    text = TOKEN.sub(translated, formula).replace("^", "**").replace(";", ",")
    return float(eval(text, {"__builtins__": {}}, FUNCTIONS))


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("61 layers * 656 B latent", 40_016),
        ("max(0; 8 * floor((80 GB - 4 GB overhead) / 6.3 GB cache))", 96),
        ("256 * (1 - (1 - 8 / 256)^2)", 15.75),
        ("1,048,576 tokens / 2 ms", 524_288_000),
        ("23.03 per hour / (10 tokens/s * 0.5 utilisation * 3600) * 1000000", 1279.444),
    ],
)
def test_the_evaluator(formula: str, value: float) -> None:
    assert evaluate(formula) == pytest.approx(value)


def lines(sections: Iterator[Section]) -> Iterator[tuple[Section, Line]]:
    for section in sections:
        keys = [line.key for line in section.lines]
        assert len(set(keys)) == len(keys), f"{section.title} names a line twice"
        for line in section.lines:
            yield section, line


def everything(question: Question, machines: tuple[Machine, ...]) -> Iterator[Section]:
    yield from model_sections(question.model, question.contexts, question.setup.cache_format)
    yield overview(question, machines, read_support())
    for machine in machines:
        yield from machine_sections(question, machine, read_support())


def check(question: Question, machines: tuple[Machine, ...]) -> None:
    num_checked = 0
    for section, line in lines(everything(question, machines)):
        if line.formula:
            assert isinstance(line.value, int | float)
            assert evaluate(line.formula) == pytest.approx(line.value, rel=2e-3, abs=1e-9), (section.title, line)
            num_checked += 1
        else:
            said = line.value is None or line.unit is Unit.WORDS or line.key.endswith("-machines")
            assert said, f"{section.title}, {line.label}: a number without a formula"
            assert line.note or line.value is not None, f"{section.title}, {line.label}: unknown, and no reason why"
    assert num_checked > 50


@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5", "glm-5.2", "llama-3.1-8b", "llama-3.1-70b"])
@pytest.mark.parametrize("weight_format", [None, *WeightFormat])
def test_every_formula_gives_its_value(name: str, weight_format: WeightFormat | None) -> None:
    setup = Setup(CacheFormat.FP8, 4e9, with_mtp=weight_format is WeightFormat.INT8)
    check(ask(name, setup, weight_format=weight_format, utilisation=0.3), read_machines())


ODD = Gpu("odd", 20e9, 3e11, 1e14, None, None, None)
ODD_MACHINES = (
    Machine("no-link", ODD, 3, host_memory_bytes=5e11, host_bandwidth=9e10, network_bits_per_s=4e11),
    Machine("priced", replace(ODD, host_link=1e10), 7, price=Price(1.5, "CHF", "a list", "2026-01-31")),
    Machine("tiny", replace(ODD, memory_bytes=5e9), 1),
    Machine("small-host", replace(ODD, memory_bytes=60e9, fp8_rate=2e14), 1, host_memory_bytes=1e11),
)


@pytest.mark.parametrize("cache_format", CacheFormat)
def test_odd_machines_too(cache_format: CacheFormat) -> None:
    """GPUs that do not divide the heads, links and rates that are unknown, memory that holds next to nothing."""
    setup = Setup(cache_format, 1e9)
    question = ask("deepseek-v3.2", setup, weight_format=None, contexts=(100, 5000), batches=(3, 999), utilisation=1.0)
    check(question, ODD_MACHINES)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (48_068, Unit.BYTES, "48,068 B"),
        (689.469e9, Unit.BYTES, "689.47 GB"),
        (0.0163, Unit.SECONDS, "16.3 ms"),
        (13.49, Unit.SECONDS, "13.49 s"),
        (18.98, Unit.TOKENS_PER_SECOND, "18.98 tokens/s"),
        (134_282.3, Unit.TOKENS_PER_SECOND, "134,282 tokens/s"),
        (37.4771e9, Unit.PARAMS, "37.477 bn"),
        (224, Unit.COUNT, "224"),
        (None, Unit.MONEY, "unknown"),
        ("no", Unit.WORDS, "no"),
    ],
)
def test_how_amounts_are_written(value: float | str | None, unit: Unit, text: str) -> None:
    assert write(value, unit) == text


def test_rates_are_written_with_prefixes() -> None:
    assert write_amount(1.979e15, "FLOP/s") == "1.979 PFLOP/s"
