"""What a run on a GPU found, as tables and JSON. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from bench.dsa_points import V32, short
from bench.gpu_model_work import Projection, SliceTimes, project
from bench.gpu_points import (
    DENSE_ONLY,
    FULL,
    NUM_MOE_LAYERS,
    PROMPTS,
    WITH_EXPERTS,
    WITHOUT_GRAPHS,
    Measured,
    decode_name,
    experts_name,
)
from bench.gpu_work import Rates, bytes_s, floor_s, flop_s
from bench.report import table

LAYER_AIM = 8.0
"""How many times faster than dense attention sparse should decode at the longest context."""
_LAYERS = ("dense layer", "sparse layer")


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that was found."""

    card: str
    rates: Rates
    measured: tuple[Measured, ...]

    @property
    def timed(self) -> tuple[Measured, ...]:
        return tuple(found for found in self.measured if found.seconds)

    @property
    def refused(self) -> tuple[Measured, ...]:
        return tuple(found for found in self.measured if not found.seconds)

    def seconds_of(self, group: str, name: str) -> float | None:
        """Median, or None where there is no number."""
        for found in self.timed:
            if (found.group, found.name) == (group, name):
                return found.median_s
        return None


def rates_line(run: Run) -> str:
    """What everything is held against."""
    products = ", ".join(
        f"{numbers} products {rate / 1e12:,.0f} TFLOPS" for numbers, rate in run.rates.flop_per_s.items()
    )
    return f"{run.card}: memory {run.rates.bytes_per_s / 1e12:.2f} TB/s, {products} (measured in this run)"


def kernels_table(run: Run) -> str:
    """Every operation against its floor and its aim."""
    head = ["operation", "at", "µs", "least", "launched", "floor µs", "of floor", "bound by", "TFLOPS", "TB/s"]
    head += ["aim", "aim µs", "reached"]
    return table(head, [_cells(found, run.rates) for found in run.timed if found.works])


def _cells(found: Measured, rates: Rates) -> list[str]:
    seconds, works = found.median_s, found.works
    by_bytes = bytes_s(works, rates) >= flop_s(works, rates)
    return [
        found.group,
        found.name,
        _us(seconds),
        _us(min(found.seconds)),
        (_us(median(found.launched_seconds)) if found.launched_seconds else "") + ("*" if found.not_in_graph else ""),
        _us(floor_s(works, rates)),
        f"{found.of_floor(rates):.0%}",
        "bytes" if by_bytes else "FLOP",
        f"{sum(work.flop for work in works) / seconds / 1e12:,.1f}",
        f"{sum(work.num_bytes for work in works) / seconds / 1e12:.2f}",
        *_aim_cells(found, rates),
    ]


def _aim_cells(found: Measured, rates: Rates) -> tuple[str, str, str]:
    if found.aim is None:
        return "", "", ""
    return (
        found.aim.text,
        _us(found.aim.limit_s(found.works, rates)),
        "yes" if found.reaches_aim(rates) else "no",
    )


@dataclass(frozen=True, slots=True)
class Pair:
    """One layer's attention both ways, by medians."""

    name: str
    dense_s: float
    sparse_s: float

    @property
    def ratio(self) -> float:
        """How many times faster sparse is."""
        return self.dense_s / self.sparse_s


def pairs(run: Run) -> Iterator[Pair]:
    """Wherever there are numbers of both."""
    for found in run.timed:
        if found.group == _LAYERS[0] and (sparse := run.seconds_of(_LAYERS[1], found.name)) is not None:
            yield Pair(found.name, found.median_s, sparse)


def pairs_table(run: Run) -> str:
    """Sparse against dense attention."""
    longest = f"decode {short(FULL.longest)} "
    rows = [
        [
            pair.name,
            _us(pair.dense_s),
            _us(pair.sparse_s),
            f"{pair.ratio:.2f}",
            ("yes" if pair.ratio >= LAYER_AIM else "no") if pair.name.startswith(longest) else "",
        ]
        for pair in pairs(run)
    ]
    return table(["one layer", "dense µs", "sparse µs", "dense / sparse", f"{LAYER_AIM:.0f} reached"], rows)


@dataclass(frozen=True, slots=True)
class Steps:
    """Decode steps of the slice with experts, by medians."""

    batch: int
    with_graphs_s: float
    without_graphs_s: float | None
    floor_s: float


def model_steps(run: Run) -> Iterator[Steps]:
    """For each batch that has a number with graphs."""
    by_name = {found.name: found for found in run.timed if found.group == "model"}
    for batch in FULL.batches:
        if (found := by_name.get(decode_name(WITH_EXPERTS, batch))) is not None:
            without = by_name.get(decode_name(WITHOUT_GRAPHS, batch))
            seconds = None if without is None else without.median_s
            yield Steps(batch, found.median_s, seconds, floor_s(found.works, run.rates))


def model_table(run: Run) -> str:
    """What a step of the slice takes with graphs and without, and what gaps between launches cost."""
    head = ["sequences", "ms", "ms a layer", "tokens/s", "floor ms", "times floor", "without graphs ms", "gaps ms"]
    num_layers = V32.num_dense_layers + NUM_MOE_LAYERS
    rows = []
    for steps in model_steps(run):
        without = steps.without_graphs_s
        rows.append(
            [
                str(steps.batch),
                _ms(steps.with_graphs_s),
                _ms(steps.with_graphs_s / num_layers),
                f"{steps.batch / steps.with_graphs_s:,.0f}",
                _ms(steps.floor_s),
                f"{steps.with_graphs_s / steps.floor_s:.2f}",
                "" if without is None else _ms(without),
                "" if without is None else _ms(without - steps.with_graphs_s),
            ]
        )
    return table(head, rows)


def prompts_table(run: Run) -> str:
    """Steps that are full of prompts."""
    rows = [
        [found.name, _ms(found.median_s), f"{FULL.num_queries / found.median_s:,.0f}"]
        for found in run.timed
        if found.group == PROMPTS
    ]
    return table(["layers", f"ms for {FULL.num_queries} tokens", "tokens/s"], rows)


def projections(run: Run) -> Iterator[tuple[int, Projection]]:
    """The whole model on eight GPUs, for each batch whose numbers are all there."""
    num_experts = V32.moe.num_experts
    for batch in FULL.batches:
        times = (
            run.seconds_of("model", decode_name(DENSE_ONLY, batch)),
            run.seconds_of("model", decode_name(WITH_EXPERTS, batch)),
            run.seconds_of("experts", experts_name(num_experts, batch)),
            run.seconds_of("experts", experts_name(num_experts // 8, batch)),
        )
        dense_s, with_moe_s, experts_s, eighth_s = times
        if dense_s is None or with_moe_s is None or experts_s is None or eighth_s is None:
            continue
        yield batch, project(V32, SliceTimes(batch, dense_s, with_moe_s, NUM_MOE_LAYERS, experts_s, eighth_s))


def refusals(found: Sequence[Measured]) -> str:
    """Each point without a number, and why."""
    return "\n".join(f"- {one.group}, {one.name}: {one.refusal}" for one in found)


def text(run: Run) -> str:
    """All tables."""
    parts = [
        rates_line(run),
        "Medians, the L2 cache emptied before each time; from CUDA graphs, but where * marks that none can be made.\n"
        "`launched` is without a graph.",
        kernels_table(run),
    ]
    if any(pairs(run)):
        parts.append(pairs_table(run))
    if any(model_steps(run)):
        parts += [
            f"{V32.num_dense_layers} dense layers and {NUM_MOE_LAYERS} with experts:",
            model_table(run),
            prompts_table(run),
        ]
    for batch, projection in projections(run):
        lines = "\n".join(f"- {line}" for line in projection.arithmetic)
        parts.append(f"The whole model on 8 such GPUs, {batch} sequences on each:\n{lines}")
    if run.refused:
        parts.append(f"No number:\n{refusals(run.refused)}")
    return "\n\n".join(parts)


def results_json(run: Run, versions: Mapping[str, str]) -> dict[str, object]:
    """The same for programs, with every repeat."""
    return {
        "bench": "gpu",
        "card": run.card,
        "versions": dict(versions),
        "rates": asdict(run.rates),
        "measured": [
            asdict(found) | ({"floor_s": floor_s(found.works, run.rates), "reaches_aim": found.reaches_aim(run.rates)})
            for found in run.timed
        ],
        "refused": [{"group": one.group, "name": one.name, "refusal": one.refusal} for one in run.refused],
        "sparse_against_dense": [asdict(pair) | {"ratio": pair.ratio} for pair in pairs(run)],
        "projections": [{"batch": batch} | asdict(projection) for batch, projection in projections(run)],
    }


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}"
